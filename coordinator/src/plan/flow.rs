//! What may be under way in a pipeline: micro-batches in flight, and frames on an edge. Both are
//! limits; how many micro-batches really are in flight, the scheduler measures.
//!
//! A round trip of one micro-batch takes all stages and links, `sum(t) + sum(l)`, and the slowest
//! stage never waits if that many of its steps fit in: `m = (sum(t) + sum(l)) / max(t)`. An edge
//! holds one frame that is computed, one that is next, and those on the way there and of the credits
//! on their way back: `2 + round trip / t`; one more for a frame that only carries releases.

use millrace_shared::scheduler::cost::{Load, StageCost};

/// Room for links and steps that are not as they were when the plan was made.
const MARGIN: f64 = 1.5;
/// As much as options allow to ask for, and what an engine's queue holds.
const MOST: u32 = 1024;
/// A stage for which nothing was measured, or next to nothing.
const SHORTEST_STEP: f64 = 1e-4;

/// The links of a plan, as round trips in seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Links {
    /// Between each stage and the next.
    pub(super) between: Vec<f64>,
    /// From the coordinator to the first stage and to the last.
    pub(super) ends: [f64; 2],
}

/// Seconds of each stage for the shortest micro-batch there is.
fn steps(stages: &[StageCost]) -> impl Iterator<Item = f64> + '_ {
    let one = Load::default().with_decode(0);
    stages.iter().map(move |s| s.predict(&one).max(SHORTEST_STEP))
}

/// Micro-batches in flight at most where measurements decide: `usual`, and more where links are
/// long beside the steps.
pub(super) fn in_flight(usual: u32, stages: &[StageCost], links: &Links) -> u32 {
    let round = links.between.iter().chain(&links.ends).sum::<f64>() / 2.0;
    let (sum, slowest) = steps(stages).fold((0.0, SHORTEST_STEP), |(s, m), t| (s + t, t.max(m)));
    let wanted = MARGIN * (sum + round) / slowest;
    let wanted = (wanted.ceil() as u32).saturating_add(2);
    wanted.min(MOST).max(usual)
}

/// Frames that an edge between stages may hold, where so many micro-batches are in flight: enough
/// for every such edge of the pipeline.
pub(super) fn credits(in_flight: u32, stages: &[StageCost], links: &Links) -> u32 {
    let on_the_way = |(rtt, step): (&f64, f64)| (rtt / step).ceil() as u32;
    let most = links.between.iter().zip(steps(stages).skip(1)).map(on_the_way).max().unwrap_or(0);
    most.saturating_add(3).min(in_flight.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(milliseconds: &[f64]) -> Vec<StageCost> {
        let stage = |ms: &f64| StageCost { fixed: ms / 1e3, ..StageCost::default() };
        milliseconds.iter().map(stage).collect()
    }

    fn links(stages: usize, one_way_ms: f64) -> Links {
        let rtt = 2.0 * one_way_ms / 1e3;
        Links { between: vec![rtt; stages - 1], ends: [rtt; 2] }
    }

    #[test]
    fn short_links_change_nothing() {
        let (stages, links) = (stages(&[10.0; 4]), links(4, 0.15));
        assert_eq!(in_flight(10, &stages, &links), 10);
        assert_eq!(credits(10, &stages, &links), 4);
    }

    #[test]
    fn long_links_hold_more() {
        let (few, near) = (stages(&[5.0; 4]), links(4, 20.0));
        // (4 x 5 + 5 x 20) / 5 = 24 fill the pipeline.
        assert_eq!(in_flight(10, &few, &near), 38);
        assert_eq!(credits(38, &few, &near), 11);
        assert_eq!(in_flight(10, &stages(&[0.0]), &links(1, 400.0)), MOST);
        // The receiver's own pace counts.
        assert_eq!(credits(38, &stages(&[5.0, 50.0]), &links(2, 20.0)), 4);
        assert_eq!(credits(4, &few, &near), 5, "never more than can be under way");
    }
}
