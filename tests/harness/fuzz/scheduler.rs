//! Sequences of operations on the scheduler, read from bytes.
//!
//! Two bytes are an operation: submit, cancel, take the next step, answer the oldest one, fail it, a
//! new epoch. Whatever the order: limits hold, tokens come once and in order, and at the end all of
//! it comes back.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use millrace_shared::id::SequenceId;
use millrace_shared::pooling::Pooling;
use millrace_shared::scheduler::{
    Kind, NewSequence, Outcome, Policy, Priority, Scheduler, SchedulerConfig, Step,
};
use millrace_shared::wire::data::{ChosenToken, Row, RowOutcome, Want};

pub(super) fn corpus() -> Vec<Vec<u8>> {
    let mut plain = vec![9];
    for i in 0..12 {
        plain.extend([0, 17 * i, 2, 0, 2, 0, 3, 0, 1, i, 2, 1, 3, 0]);
    }
    let mut stormy = plain.clone();
    stormy.extend([5, 3, 0, 9, 2, 0, 4, 0, 5, 0, 2, 0, 3, 0]);
    vec![plain, stormy]
}

fn config(byte: u8) -> SchedulerConfig {
    let b = u32::from(byte);
    SchedulerConfig {
        num_blocks: 8 + b % 40,
        block_size: 4,
        max_num_seqs: 1 + b % 6,
        max_waiting: 1 + b % 9,
        max_in_flight: 1 + b % 4,
        prefill_chunk: 1 + b % 16,
        max_batch_tokens: 4 + b % 32,
        max_model_len: 48,
        policy: Policy { measured_from: b.is_multiple_of(2).then_some(1), ..Policy::DEFAULT },
    }
}

fn outcome(row: &Row) -> RowOutcome {
    let token = (row.position * 7 + row.sequence.0 as u32) % 50;
    match row.want {
        Want::None => RowOutcome::Done,
        Want::Sample => RowOutcome::Token { token, logprobs: None },
        Want::Verify | Want::Follow => {
            RowOutcome::Tokens(vec![ChosenToken { token, logprobs: None }])
        }
        Want::Sum => RowOutcome::Done,
        Want::Embed { .. } => RowOutcome::Embedding(vec![1.0]),
        Want::Score { .. } => RowOutcome::Failed("not asked for".into()),
    }
}

struct Driver {
    scheduler: Scheduler,
    limit: u32,
    now: Duration,
    flight: VecDeque<Step>,
    tokens: BTreeMap<SequenceId, u32>,
    next: u64,
}

impl Driver {
    fn note(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Token { sequence, index, last, .. } => {
                    let seen = self.tokens.get_mut(&sequence).expect("a sequence that runs");
                    assert_eq!(*seen, index, "each token once, in order");
                    *seen += 1;
                    if last {
                        self.tokens.remove(&sequence);
                    }
                }
                Outcome::Shed { sequence, .. } | Outcome::Failed { sequence, .. } => {
                    assert!(self.tokens.remove(&sequence).is_some(), "an end of nobody's");
                }
                Outcome::Embedding { sequence, .. } => {
                    assert_eq!(self.tokens.remove(&sequence), Some(0), "an end of nobody's");
                }
                Outcome::PrefillDone { .. } | Outcome::Scores { .. } => {}
            }
        }
    }

    fn submit(&mut self, byte: u8) {
        self.next += 1;
        let b = u32::from(byte);
        let id = SequenceId(self.next);
        let new = NewSequence {
            id,
            prompt: (0..1 + b % 24).map(|i| i % (1 + b % 5)).collect(),
            max_new_tokens: 1 + b % 12,
            kind: match byte % 7 {
                0 => Kind::Embed { pooling: Pooling::Mean },
                1 => Kind::Embed { pooling: Pooling::Last },
                _ => Kind::Generate,
            },
            submitted: self.now,
            deadline: b.is_multiple_of(7).then(|| self.now + Duration::from_millis(u64::from(b))),
            client: u64::from(b % 3),
            priority: [Priority::High, Priority::Normal, Priority::Low][(b % 3) as usize],
        };
        if self.scheduler.handle_submit(new).is_ok() {
            self.tokens.insert(id, 0);
        }
    }

    fn step(&mut self) -> bool {
        let Some(step) = self.scheduler.poll_step(self.now) else { return false };
        if !step.meta.rows.is_empty() {
            self.flight.push_back(step);
        }
        assert!(self.flight.len() <= self.limit as usize, "too many micro-batches in flight");
        true
    }

    fn answer(&mut self, good: bool) {
        let Some(step) = self.flight.pop_front() else { return };
        let outcomes = if good {
            let results: Vec<_> = step.meta.rows.iter().map(|r| r.result(outcome(r))).collect();
            self.scheduler.handle_result(step.id, &results, self.now)
        } else {
            self.scheduler.handle_step_failed(step.id, "no")
        };
        self.note(outcomes);
    }

    fn operate(&mut self, op: u8, byte: u8) {
        self.now += Duration::from_millis(u64::from(byte) % 16);
        match op % 6 {
            0 => self.submit(byte),
            1 => {
                let id = SequenceId(1 + u64::from(byte) % self.next.max(1));
                self.scheduler.handle_cancel(id);
                self.tokens.remove(&id);
            }
            2 => {
                self.step();
            }
            3 => self.answer(true),
            4 => self.answer(!byte.is_multiple_of(4)),
            _ => {
                let config = config(byte);
                self.limit = config.max_in_flight;
                self.flight.clear();
                for (id, _) in self.scheduler.handle_epoch(config) {
                    self.tokens.remove(&id);
                }
            }
        }
        let shed = self.scheduler.poll_shed(self.now);
        self.note(shed);
        drop(self.scheduler.poll_void());
    }
}

/// Carries operations out, then lets everything end.
pub(super) fn read(bytes: &[u8]) -> bool {
    let Some((first, operations)) = bytes.split_first() else { return true };
    let config = config(*first);
    let mut driver = Driver {
        scheduler: Scheduler::new(config),
        limit: config.max_in_flight,
        now: Duration::ZERO,
        flight: VecDeque::new(),
        tokens: BTreeMap::new(),
        next: 0,
    };
    for pair in operations.as_chunks::<2>().0.iter().take(2000) {
        driver.operate(pair[0], pair[1]);
    }
    for _ in 0..20_000 {
        while driver.step() {}
        if driver.flight.is_empty() {
            break;
        }
        driver.now += Duration::from_millis(1);
        driver.answer(true);
    }
    let stats = driver.scheduler.stats();
    assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0), "something hangs");
    assert_eq!(stats.blocks_used, 0, "blocks leak");
    assert!(driver.tokens.is_empty(), "a sequence never ended");
    true
}
