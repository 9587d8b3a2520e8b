//! Where a sequence is and what it waits for: read-only, for people who ask. Nothing decides by it.

use std::time::Duration;

use super::Scheduler;
use super::sequence::Phase;
use crate::id::{MicroBatchId, SequenceId};

/// What holds a sequence up now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the queue, behind so many that came before it (clients take turns, so some of them may
    /// begin later all the same).
    Queued {
        /// Those before it.
        ahead: u32,
    },
    /// First in the queue, and the KV cache has no room for it.
    NoBlocks {
        /// Blocks that its tokens take.
        needed: u32,
        /// Blocks that are free.
        free: u32,
    },
    /// Its prompt is being computed.
    Prefill,
    /// Its next token is being computed, or will be at the next free slot.
    Decode,
}

/// See [`Scheduler::whereabouts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// What holds it up.
    pub place: Place,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Those of prompt and answer that were sent to the stages since it was last admitted.
    pub issued: u32,
    /// Tokens generated.
    pub generated: u32,
    /// Times that it was computed anew.
    pub restarts: u32,
    /// Its oldest micro-batch in flight, and when that was issued.
    pub micro_batch: Option<(MicroBatchId, Duration)>,
}

impl Scheduler {
    /// Where a sequence is; `None` where it is not known (any more).
    pub fn whereabouts(&self, id: SequenceId) -> Option<Whereabouts> {
        let seq = self.sequences.get(&id)?;
        let place = match seq.phase {
            Phase::Prefilling => Place::Prefill,
            Phase::Decoding => Place::Decode,
            Phase::Waiting => {
                let waiting = self.queue.ids().filter_map(|other| self.sequences.get(&other));
                let ahead = waiting.filter(|other| other.order < seq.order).count() as u32;
                let needed = seq.len().div_ceil(self.config.block_size);
                let free = self.kv.total().saturating_sub(self.kv.used());
                if ahead == 0 && needed > free {
                    Place::NoBlocks { needed, free }
                } else {
                    Place::Queued { ahead }
                }
            }
        };
        Some(Whereabouts {
            place,
            prompt: seq.prompt_len,
            issued: seq.issued,
            generated: seq.len() - seq.prompt_len,
            restarts: seq.epoch,
            micro_batch: self.in_flight.of(id),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Kind, NewSequence, Policy, Priority, SchedulerConfig};

    #[test]
    fn a_queue_a_full_cache_and_a_micro_batch() {
        let config = SchedulerConfig {
            num_blocks: 4,
            block_size: 4,
            max_num_seqs: 4,
            max_waiting: 9,
            max_in_flight: 1,
            prefill_chunk: 64,
            max_batch_tokens: 64,
            max_model_len: 100,
            policy: Policy::DEFAULT,
        };
        let mut scheduler = Scheduler::new(config);
        let prompt = |first: u32| (first..first + 10).collect::<Vec<u32>>();
        let at = Duration::from_secs(1);
        for n in 0..3u64 {
            let new = NewSequence {
                id: SequenceId(n),
                prompt: prompt(n as u32 * 100),
                max_new_tokens: 2,
                kind: Kind::Generate,
                submitted: Duration::ZERO,
                deadline: None,
                priority: Priority::Normal,
                client: n,
            };
            scheduler.handle_submit(new).unwrap();
        }
        let place = |s: &Scheduler, n| s.whereabouts(SequenceId(n)).unwrap().place;
        assert_eq!(place(&scheduler, 1), Place::Queued { ahead: 1 });
        let step = scheduler.poll_step(at).expect("a step");
        let first = scheduler.whereabouts(SequenceId(0)).unwrap();
        assert_eq!(first.micro_batch, Some((step.id, at)));
        assert_eq!((first.prompt, first.issued, first.generated), (10, 10, 0));
        assert_eq!(place(&scheduler, 1), Place::NoBlocks { needed: 3, free: 1 });
        assert_eq!(place(&scheduler, 2), Place::Queued { ahead: 1 });
        assert_eq!(scheduler.whereabouts(SequenceId(9)), None);
    }
}
