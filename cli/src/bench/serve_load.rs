//! Clients in a closed loop: each sends a request, waits for the whole answer, sends the next. All
//! times are the clients' own: what a user of the cluster would see.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{GenerateEvent, GenerateRequest, Prompt};

use super::pseudo_tokens;
use crate::target::{Caller, Session};

/// Longest time a histogram can hold, microseconds: an hour.
const MAX_US: u64 = 3_600_000_000;

/// What each client asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) prompt_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) requests: u32,
    pub(super) vocab: u32,
}

/// What all clients of a run saw.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) wall: Duration,
    pub(super) requests: u64,
    pub(super) tokens: u64,
    pub(super) ttft_us: Histogram<u64>,
    pub(super) inter_token_us: Histogram<u64>,
    /// From each request to its first token, counted from the start of the run.
    waits: Vec<(Duration, Duration)>,
}

impl Seen {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            wall: Duration::ZERO,
            requests: 0,
            tokens: 0,
            ttft_us: Histogram::new_with_max(MAX_US, 3)?,
            inter_token_us: Histogram::new_with_max(MAX_US, 3)?,
            waits: Vec::new(),
        })
    }

    fn add(&mut self, start: Instant, answer: &Timeline) {
        let Some(&first) = answer.tokens.first() else { return };
        self.requests += 1;
        self.tokens += answer.tokens.len() as u64;
        self.ttft_us.saturating_record(micros(first - answer.sent));
        for pair in answer.tokens.windows(2) {
            self.inter_token_us.saturating_record(micros(pair[1] - pair[0]));
        }
        self.waits.push((answer.sent - start, first - start));
    }

    /// Time in which at least one client waited for its first token.
    pub(super) fn prefilling(&self) -> Duration {
        union(self.waits.clone())
    }
}

fn micros(d: Duration) -> u64 {
    d.as_micros().try_into().unwrap_or(u64::MAX)
}

/// Length of the union of intervals.
fn union(mut intervals: Vec<(Duration, Duration)>) -> Duration {
    intervals.sort();
    let mut covered = Duration::ZERO;
    let mut end = Duration::ZERO;
    for (from, to) in intervals {
        covered += to.saturating_sub(from.max(end));
        end = end.max(to);
    }
    covered
}

/// When things happened to one request.
#[derive(Debug)]
struct Timeline {
    sent: Instant,
    tokens: Vec<Instant>,
}

/// Connected clients, one connection each.
pub(super) struct Clients {
    callers: Vec<Caller>,
    load: Load,
    /// Prompts sent so far: no prompt is sent twice, so no cache can help.
    prompts: u64,
}

impl Clients {
    pub(super) async fn connect(session: &Session, load: Load, count: u32) -> anyhow::Result<Self> {
        let callers = try_join_all((0..count).map(|_| session.caller())).await?;
        Ok(Self { callers, load, prompts: 0 })
    }

    /// One request whose times do not count.
    pub(super) async fn warm_up(&mut self) -> anyhow::Result<()> {
        self.prompts += 1;
        request(&self.callers[0], self.load, self.prompts).await.map(drop)
    }

    /// Runs this many of the clients until each has all its answers.
    pub(super) async fn run(&mut self, concurrency: u32) -> anyhow::Result<Seen> {
        let load = self.load;
        let first = self.prompts;
        self.prompts += u64::from(concurrency) * u64::from(load.requests);
        let start = Instant::now();
        let client = async |(i, caller): (usize, &Caller)| -> anyhow::Result<Vec<Timeline>> {
            let mut answers = Vec::new();
            for round in 0..load.requests {
                let prompt = first + i as u64 * u64::from(load.requests) + u64::from(round) + 1;
                answers.push(request(caller, load, prompt).await?);
            }
            Ok(answers)
        };
        let running = self.callers.iter().take(concurrency as usize).enumerate().map(client);
        let answers = try_join_all(running).await?;
        let mut seen = Seen::new()?;
        seen.wall = start.elapsed();
        answers.iter().flatten().for_each(|a| seen.add(start, a));
        Ok(seen)
    }
}

async fn request(caller: &Caller, load: Load, prompt: u64) -> anyhow::Result<Timeline> {
    let ids = pseudo_tokens(prompt, load.prompt_tokens as usize, load.vocab);
    let params = SamplingParams {
        max_tokens: Some(load.max_tokens),
        ignore_eos: true,
        ..SamplingParams::greedy()
    };
    let request = GenerateRequest { model: String::new(), prompt: Prompt::Tokens(ids), params };
    let mut timeline = Timeline { sent: Instant::now(), tokens: Vec::new() };
    let mut events = caller.generate(request).await?;
    while let Some(event) = events.next().await? {
        if let GenerateEvent::Token { .. } = event {
            timeline.tokens.push(Instant::now());
        }
    }
    ensure!(
        timeline.tokens.len() == load.max_tokens as usize,
        "an answer has {} tokens instead of {}: is the context of the model long enough for --prompt-tokens and --max-tokens together?",
        timeline.tokens.len(),
        load.max_tokens
    );
    Ok(timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_waits_count_once() {
        let ms = Duration::from_millis;
        let waits = vec![(ms(20), ms(30)), (ms(0), ms(10)), (ms(5), ms(8)), (ms(25), ms(40))];
        assert_eq!(union(waits), ms(30));
        assert_eq!(union(Vec::new()), Duration::ZERO);
    }
}
