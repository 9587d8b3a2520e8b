//! What a cut will do: tokens a second, time between tokens, time to the first, for so many streams.
//!
//! A closed loop: `S` streams are dealt out to `m` micro-batches in flight, so that each has `S / m`
//! rows; one ends every `P(m)`. More in flight hide links and uneven stages, but make each smaller,
//! and small ones are dear where weights must be read anyhow. The forecast takes the best `m`, which
//! is what a scheduler that knows the times should find.

use super::costs::Problem;
use super::solve::{Objective, Solution, StageCut};

/// Most micro-batches in flight that are looked at.
const MOST_IN_FLIGHT: u32 = 256;

/// What a pipeline will do.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Streams at once.
    pub streams: u32,
    /// Micro-batches in flight.
    pub micro_batches: u32,
    /// Rows of the largest.
    pub rows: u32,
    /// Seconds of each stage with so many rows.
    pub stage_seconds: Vec<f64>,
    /// The stage that sets the pace.
    pub slowest_stage: usize,
    /// Seconds from the coordinator through all stages and back.
    pub sum_seconds: f64,
    /// Seconds between two micro-batches.
    pub period_seconds: f64,
    /// Tokens a second, all streams together.
    pub tokens_per_second: f64,
    /// Seconds between two tokens of a stream.
    pub inter_token_seconds: f64,
}

/// With the best number of micro-batches in flight, or with the one given.
pub fn forecast(
    problem: &Problem<'_>,
    stages: &[StageCut],
    streams: u32,
    micro_batches: Option<u32>,
) -> Forecast {
    let streams = streams.max(1);
    let one = with_in_flight(problem, stages, streams, 1);
    let given =
        micro_batches.map(|m| with_in_flight(problem, stages, streams, m.clamp(1, streams)));
    given.unwrap_or_else(|| {
        // Where single rows cover the sum, more in flight only makes them smaller.
        let single = with_in_flight(problem, stages, streams, streams.min(MOST_IN_FLIGHT));
        let slowest = single.stage_seconds.iter().copied().fold(0.0, f64::max).max(1e-12);
        let cover = (single.sum_seconds / slowest).ceil().min(f64::from(MOST_IN_FLIGHT)) as u32;
        let most = streams.min(cover.max(2 * stages.len() as u32) + 1);
        (2..=most).fold(one, |best, m| {
            let next = with_in_flight(problem, stages, streams, m);
            // A little more is not worth longer waits between tokens.
            if next.tokens_per_second > best.tokens_per_second * 1.001 { next } else { best }
        })
    })
}

fn with_in_flight(problem: &Problem<'_>, stages: &[StageCut], streams: u32, m: u32) -> Forecast {
    let rows = streams.div_ceil(m);
    let problem = Problem { rows: f64::from(rows), ..*problem };
    let found = Solution::of(&problem, stages.to_vec(), Objective::Period { micro_batches: m });
    let last = stages.len().saturating_sub(1);
    let seconds = |(i, s): (usize, &StageCut)| {
        problem.stage_seconds(
            s.node,
            s.range.first as usize..s.range.end as usize,
            i == 0,
            i == last,
        )
    };
    let stage_seconds: Vec<f64> = stages.iter().enumerate().map(seconds).collect();
    let slowest = (0..stage_seconds.len())
        .max_by(|&a, &b| stage_seconds[a].total_cmp(&stage_seconds[b]).then(b.cmp(&a)));
    let period = found.value;
    Forecast {
        streams,
        micro_batches: m,
        rows,
        slowest_stage: slowest.unwrap_or(0),
        stage_seconds,
        sum_seconds: found.sum_seconds,
        period_seconds: period,
        tokens_per_second: f64::from(streams) / f64::from(m) / period,
        inter_token_seconds: f64::from(m) * period,
    }
}

/// What users were promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Promise {
    /// Seconds to the first token.
    pub first_token_seconds: f64,
    /// Seconds between tokens.
    pub inter_token_seconds: f64,
    /// Tokens of a prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens in one micro-batch.
    pub prefill_chunk: u32,
}

/// Seconds to the first token of a prompt beside so much decoding: its chunks follow each other
/// through the pipeline, each beside a decode micro-batch.
pub fn first_token_seconds(
    problem: &Problem<'_>,
    stages: &[StageCut],
    promise: &Promise,
    load: &Forecast,
) -> f64 {
    let rows = promise.prefill_chunk.min(promise.prompt_tokens).max(1);
    let chunk = Problem { rows: f64::from(rows), ..*problem };
    let found = Solution::of(&chunk, stages.to_vec(), Objective::Throughput);
    let more = promise.prompt_tokens.div_ceil(rows).saturating_sub(1);
    found.sum_seconds + f64::from(more) * (found.bottleneck_seconds + load.period_seconds)
}

/// The most streams that keep a promise, at most `most`, and the time to the first token then.
pub fn load_within(
    problem: &Problem<'_>,
    stages: &[StageCut],
    promise: &Promise,
    most: u32,
) -> Option<(Forecast, f64)> {
    let at = |streams: u32| {
        let load = in_time(problem, stages, streams, promise.inter_token_seconds)?;
        let first = first_token_seconds(problem, stages, promise, &load);
        (first <= promise.first_token_seconds).then_some((load, first))
    };
    // More streams only take longer: double, then halve.
    let mut best = at(1)?;
    let (mut low, mut high) = (1, 2);
    while let Some(found) = (high <= most).then(|| at(high)).flatten() {
        (best, low, high) = (found, high, high.saturating_mul(2));
    }
    high = high.min(most.saturating_add(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match at(middle) {
            Some(found) => (best, low) = (found, middle),
            None => high = middle,
        }
    }
    Some(best)
}

/// The best forecast whose tokens follow each other in time.
fn in_time(
    problem: &Problem<'_>,
    stages: &[StageCut],
    streams: u32,
    inter_token_seconds: f64,
) -> Option<Forecast> {
    let most = streams.min(2 * stages.len() as u32 + 2);
    (1..=most)
        .map(|m| with_in_flight(problem, stages, streams, m))
        .filter(|f| f.inter_token_seconds <= inter_token_seconds)
        .max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
}
