//! Sequences that run alone: one of them at a time, and no row of anybody else's in flight.
//!
//! Of what fails then, they alone can be the cause. Everybody else waits: who runs is preempted (and
//! computed anew later), nobody is admitted. Where several are to run alone, they take turns until
//! the owner lets each into company again, or they end.

use std::collections::BTreeSet;

use super::Scheduler;
use crate::id::SequenceId;

impl Scheduler {
    /// From now on the sequence runs alone, before all others. Unknown ids are ignored.
    pub fn handle_alone(&mut self, id: SequenceId) {
        if self.sequences.contains_key(&id) {
            self.alone.insert(id);
        }
    }

    /// The sequence may run beside others again.
    pub fn handle_company(&mut self, id: SequenceId) {
        self.alone.remove(&id);
    }

    /// The sequences that have a row in flight which they still wait for.
    pub fn in_flight(&self) -> BTreeSet<SequenceId> {
        let rows = self.in_flight.all_rows().filter(|row| self.is_live(row));
        rows.map(|row| row.sequence).collect()
    }

    /// Makes way for the one that runs alone, where there is one. `false` while rows of others are
    /// in flight.
    pub(super) fn make_way(&mut self) -> bool {
        let running = self.running.values().find(|id| self.alone.contains(id));
        let Some(id) = running.or_else(|| self.alone.first()).copied() else { return true };
        let others: Vec<SequenceId> =
            self.running.values().copied().filter(|other| *other != id).collect();
        let waits = !self.running.values().any(|other| *other == id);
        others.into_iter().for_each(|other| self.preempt(other));
        if self.in_flight.all_rows().any(|row| row.sequence != id) {
            return false;
        }
        if waits {
            self.start(id);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::scheduler::{Kind, NewSequence, Outcome, Priority, SchedulerConfig, Step};
    use crate::wire::data::{RowOutcome, Want};

    fn submit(scheduler: &mut Scheduler, id: u64) {
        let new = NewSequence {
            id: SequenceId(id),
            prompt: vec![1; 9],
            max_new_tokens: 5,
            kind: Kind::Generate,
            submitted: Duration::ZERO,
            deadline: None,
            client: id,
            priority: Priority::Normal,
        };
        scheduler.handle_submit(new).unwrap();
    }

    fn who(step: &Step) -> BTreeSet<u64> {
        step.meta.rows.iter().map(|r| r.sequence.0).collect()
    }

    fn answer(scheduler: &mut Scheduler, step: &Step) -> Vec<Outcome> {
        let outcome = |want| match want {
            Want::Sample => RowOutcome::Token { token: 7, logprobs: None },
            _ => RowOutcome::Done,
        };
        let rows: Vec<_> = step.meta.rows.iter().map(|r| r.result(outcome(r.want))).collect();
        scheduler.handle_result(step.id, &rows, Duration::ZERO)
    }

    #[test]
    fn who_runs_alone_has_the_pipeline_to_itself() {
        let config = SchedulerConfig {
            num_blocks: 100,
            block_size: 4,
            max_num_seqs: 8,
            max_waiting: 8,
            max_in_flight: 3,
            prefill_chunk: 4,
            max_batch_tokens: 64,
            max_model_len: 100,
            policy: crate::scheduler::Policy { speculate: false, ..Default::default() },
        };
        let mut scheduler = Scheduler::new(config);
        (1..=4).for_each(|id| submit(&mut scheduler, id));
        let mut out = Vec::new();
        while let Some(step) = scheduler.poll_step(Duration::ZERO) {
            out.push(step);
        }
        assert!(!out.is_empty() && !scheduler.in_flight().is_empty());
        [2, 3].into_iter().for_each(|id| scheduler.handle_alone(SequenceId(id)));
        scheduler.handle_alone(SequenceId(99));
        submit(&mut scheduler, 5);
        let mut alone = Vec::new();
        let mut tokens = std::collections::BTreeMap::new();
        for _ in 0..200 {
            while let Some(step) = scheduler.poll_step(Duration::ZERO) {
                if !step.meta.rows.is_empty() && tokens.len() < 5 && alone.len() < 2 {
                    assert_eq!(who(&step).len(), 1, "{alone:?}");
                    assert!(out.iter().all(|s: &Step| who(s).is_subset(&who(&step))));
                }
                out.push(step);
            }
            if out.is_empty() {
                break;
            }
            let step = out.remove(0);
            for outcome in answer(&mut scheduler, &step) {
                let Outcome::Token { sequence, index, .. } = outcome else { continue };
                assert_eq!(*tokens.entry(sequence.0).or_insert(0), index, "each once, in order");
                tokens.insert(sequence.0, index + 1);
                if alone.len() < 2 && !alone.contains(&sequence.0) && index == 2 {
                    alone.push(sequence.0);
                    scheduler.handle_company(sequence);
                }
            }
        }
        assert_eq!(alone, [2, 3], "they came before all others");
        assert!((1..=5).all(|id| tokens.get(&id) == Some(&5)), "and all ended: {tokens:?}");
    }
}
