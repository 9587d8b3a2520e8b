//! The last micro-batches and where each spent its time, for whoever draws the pipeline.
//!
//! A ring: the passages of the last 60 s, the newest `LENGTH` at most. Numbered in the order of return, over all epochs, so that a reader asks for what is new.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use millrace_shared::wire::data::ResultMeta;
use schemars::JsonSchema;
use serde::Serialize;

/// Passages that are kept.
const LENGTH: usize = 16_384;
/// Seconds that they are kept, as long as others come.
const SPAN: f64 = 60.0;
/// Most passages of one answer.
const MOST: usize = 2048;

/// One micro-batch's way through the pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Passage {
    /// Number of the micro-batch in its epoch.
    pub id: u64,
    /// When its result came back, seconds of [`Timeline`]'s clock.
    pub ended: f64,
    /// Seconds from its issue until then.
    pub round_trip: f64,
    /// Rows in it.
    pub rows: usize,
    /// Positions in it.
    pub positions: u32,
    /// The stages in order.
    pub stages: Vec<Stay>,
}

/// What one stage spent on it, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Stay {
    /// From the stage before; 0 where nobody knows.
    pub hop: f64,
    /// In the queue.
    pub wait: f64,
    /// In the step.
    pub step: f64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Timeline {
    started: Instant,
    passages: Mutex<(u64, VecDeque<Passage>)>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { started: Instant::now(), passages: Mutex::default() }
    }
}

impl Timeline {
    /// A micro-batch came back, `round_trip` seconds after its issue.
    pub fn push(&self, id: u64, meta: &ResultMeta, round_trip: f64) {
        let stay = |hop, wait, step| Stay { hop, wait, step };
        let stages = meta.times.iter().map(|t| {
            let hop = t.hop().unwrap_or_default();
            stay(hop.as_secs_f64(), t.wait().as_secs_f64(), t.step().as_secs_f64())
        });
        let ended = self.started.elapsed().as_secs_f64();
        let passage = Passage {
            id,
            ended,
            round_trip,
            rows: meta.rows.len(),
            positions: meta.rows.iter().map(|r| r.count).sum(),
            stages: stages.collect(),
        };
        let mut passages = self.passages.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, ring) = &mut *passages;
        *seen += 1;
        ring.push_back(passage);
        let old = |p: &Passage| p.ended < ended - SPAN;
        while ring.len() > LENGTH || ring.front().is_some_and(old) {
            ring.pop_front();
        }
    }

    /// The time now, and all of it.
    pub fn all(&self) -> (f64, Vec<Passage>) {
        let now = self.started.elapsed().as_secs_f64();
        let passages = self.passages.lock().unwrap_or_else(PoisonError::into_inner);
        (now, passages.1.iter().cloned().collect())
    }

    /// The time now; how many passages there were in all; and those after the first `after`, the
    /// newest 2,048 at most. Where fewer than that were ever seen, a reader has another life of the
    /// coordinator in mind, and gets everything.
    pub fn after(&self, after: u64) -> (f64, u64, Vec<Passage>) {
        let now = self.started.elapsed().as_secs_f64();
        let passages = self.passages.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, ring) = &*passages;
        let new = seen.checked_sub(after).unwrap_or(*seen);
        let new = usize::try_from(new).unwrap_or(usize::MAX).min(ring.len()).min(MOST);
        (now, *seen, ring.iter().skip(ring.len() - new).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_shared::wire::data::StageTime;

    use super::*;

    #[test]
    fn readers_get_what_is_new_and_the_ring_is_bounded() {
        let timeline = Timeline::default();
        let time = StageTime::new(Duration::from_millis(2), Duration::from_millis(30))
            .with_hop(Some(Duration::from_millis(1)));
        let meta = ResultMeta { times: vec![time; 2], rows: Vec::new() };
        assert_eq!(timeline.after(0).2, []);
        (1..=3).for_each(|id| timeline.push(id, &meta, 0.1));
        let (_, last, all) = timeline.after(0);
        assert_eq!((last, all.len()), (3, 3));
        assert_eq!(all[0].stages, [Stay { hop: 0.001, wait: 0.002, step: 0.03 }; 2]);
        let ids = |after| timeline.after(after).2.iter().map(|p| p.id).collect::<Vec<_>>();
        assert_eq!((ids(1), ids(3)), (vec![2, 3], vec![]));
        assert_eq!(ids(17), [1, 2, 3], "the reader comes from an earlier life");
        (4..=20_000).for_each(|id| timeline.push(id, &meta, 0.1));
        let (_, last, most) = timeline.after(0);
        assert_eq!((last, most.len(), most[0].id), (20_000, MOST, 20_000 - MOST as u64 + 1));
        assert_eq!(timeline.passages.lock().unwrap().1.len(), LENGTH);
    }
}
