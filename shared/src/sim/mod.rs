//! A pipeline in virtual time around the real scheduler: what a policy is worth, without machines.
//!
//! Stages take micro-batches in order, each for as long as its cost says; links delay, and hold any
//! number of frames. Because order never changes, the whole way of a micro-batch is known when it is
//! sent, so a simulated second costs what the scheduler costs. Answers have the length that was
//! asked for; the tokens mean nothing.
//!
//! Not here: KV contents, sampling, failures (tests of the stages do those). Invariant: the same
//! calls give the same times to the nanosecond; noise comes from a counter.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::id::{MicroBatchId, SequenceId};
use crate::scheduler::cost::{Load, StageCost};
use crate::scheduler::{
    NewSequence, Outcome, Priority, Rejected, Scheduler, SchedulerConfig, Step,
};
use crate::wire::data::{ChosenToken, Row, RowOutcome, RowResult, StageTime, StepMeta, Want};
use crate::wire::rpc::PositionScore;

/// How often deadlines are looked at.
const SWEEP: Duration = Duration::from_millis(25);

/// The pipeline that is simulated.
#[derive(Clone, Debug)]
pub struct PipelineModel {
    /// What a micro-batch costs each stage.
    pub stages: Vec<StageCost>,
    /// Delay of every link: coordinator to first stage, between stages, last stage to coordinator.
    pub link: Duration,
    /// Service times vary by up to this share, up and down.
    pub jitter: f64,
}

impl PipelineModel {
    /// Stages that take so many seconds each, whatever the micro-batch holds.
    pub fn constant(seconds: impl IntoIterator<Item = f64>, link: Duration) -> Self {
        let stage = |fixed| StageCost { fixed, ..StageCost::default() };
        Self { stages: seconds.into_iter().map(stage).collect(), link, jitter: 0.0 }
    }
}

/// What became of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Who asked.
    pub client: u64,
    /// In which class.
    pub priority: Priority,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// When it was submitted.
    pub submitted: Duration,
    /// When each token came.
    pub tokens: Vec<Duration>,
    /// When it ended, well or not.
    pub ended: Option<Duration>,
    /// Rejected because of its deadline, at submission or while it waited.
    pub shed: bool,
    /// Not accepted for another reason.
    pub rejected: bool,
}

impl Record {
    /// Time to the first token.
    pub fn first_token(&self) -> Option<Duration> {
        self.tokens.first().map(|t| t.saturating_sub(self.submitted))
    }

    /// Times between tokens.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> + '_ {
        self.tokens.windows(2).map(|w| w[1].saturating_sub(w[0]))
    }
}

/// A micro-batch on its way.
#[derive(Debug)]
struct Travelling {
    id: MicroBatchId,
    arrives: Duration,
    times: Vec<StageTime>,
    results: Vec<RowResult>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Simulation {
    scheduler: Scheduler,
    pipeline: PipelineModel,
    now: Duration,
    /// When each stage has computed all it was sent.
    free: Vec<Duration>,
    busy: Vec<Duration>,
    travelling: VecDeque<Travelling>,
    arrivals: BTreeMap<(Duration, SequenceId), NewSequence>,
    records: BTreeMap<SequenceId, Record>,
    ended: Vec<SequenceId>,
    next_sweep: Duration,
    draws: u64,
    micro_batches: u64,
}

impl Simulation {
    /// A pipeline with nothing to do at time zero.
    pub fn new(config: SchedulerConfig, pipeline: PipelineModel) -> Self {
        let stages = pipeline.stages.len();
        Self {
            scheduler: Scheduler::new(config),
            pipeline,
            now: Duration::ZERO,
            free: vec![Duration::ZERO; stages],
            busy: vec![Duration::ZERO; stages],
            travelling: VecDeque::new(),
            arrivals: BTreeMap::new(),
            records: BTreeMap::new(),
            ended: Vec::new(),
            next_sweep: SWEEP,
            draws: 0,
            micro_batches: 0,
        }
    }

    /// A sequence arrives at its `submitted` time, or now where that is past.
    pub fn submit(&mut self, new: NewSequence) {
        let at = new.submitted.max(self.now);
        self.arrivals.insert((at, new.id), NewSequence { submitted: at, ..new });
    }

    /// The next event; `false` where nothing will ever happen any more.
    pub fn step(&mut self) -> bool {
        let arrival = self.arrivals.first_key_value().map(|(&(at, _), _)| at);
        let result = self.travelling.front().map(|t| t.arrives);
        let Some(next) = arrival.into_iter().chain(result).min() else { return false };
        self.now = self.now.max(next);
        if arrival == Some(next) {
            if let Some((_, new)) = self.arrivals.pop_first() {
                self.arrive(new);
            }
        } else if let Some(t) = self.travelling.pop_front() {
            self.scheduler.handle_times(t.id, &t.times, self.now);
            let outcomes = self.scheduler.handle_result(t.id, &t.results, self.now);
            self.apply(outcomes);
        }
        if self.now >= self.next_sweep {
            self.next_sweep = self.now + SWEEP;
            let outcomes = self.scheduler.poll_shed(self.now);
            self.apply(outcomes);
        }
        while let Some(step) = self.scheduler.poll_step(self.now) {
            self.send(&step);
        }
        true
    }

    /// Runs until `until`, or until nothing is left; `ended` may ask for more as sequences end.
    pub fn run(
        &mut self,
        until: Duration,
        mut ended: impl FnMut(SequenceId, &Record) -> Option<NewSequence>,
    ) {
        while self.now < until && self.step() {
            for id in std::mem::take(&mut self.ended) {
                let more = self.records.get(&id).and_then(|record| ended(id, record));
                if let Some(new) = more {
                    self.submit(new);
                }
            }
        }
    }

    /// Virtual time.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// The scheduler, to look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Every sequence that arrived.
    pub fn records(&self) -> &BTreeMap<SequenceId, Record> {
        &self.records
    }

    /// Time that each stage computed.
    pub fn busy(&self) -> &[Duration] {
        &self.busy
    }

    /// Micro-batches with rows that were sent.
    pub fn micro_batches(&self) -> u64 {
        self.micro_batches
    }

    fn arrive(&mut self, new: NewSequence) {
        let id = new.id;
        let mut record = Record {
            client: new.client,
            priority: new.priority,
            prompt: new.prompt.len() as u32,
            submitted: self.now,
            ..Record::default()
        };
        match self.scheduler.handle_submit(new) {
            Ok(()) => {}
            Err(Rejected::DeadlineTooShort { .. }) => record.shed = true,
            Err(_) => record.rejected = true,
        }
        if record.shed || record.rejected {
            record.ended = Some(self.now);
            self.ended.push(id);
        }
        self.records.insert(id, record);
    }

    fn apply(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            let (sequence, end) = match &outcome {
                Outcome::PrefillDone { .. } => continue,
                Outcome::Token { sequence, last, .. } | Outcome::Scores { sequence, last, .. } => {
                    (*sequence, *last)
                }
                Outcome::Embedding { sequence, .. }
                | Outcome::Shed { sequence, .. }
                | Outcome::Failed { sequence, .. } => (*sequence, true),
            };
            let Some(record) = self.records.get_mut(&sequence) else { continue };
            match outcome {
                Outcome::Token { .. } => record.tokens.push(self.now),
                Outcome::Shed { .. } => record.shed = true,
                Outcome::Failed { .. } => record.rejected = true,
                _ => {}
            }
            if end {
                record.ended = Some(self.now);
                self.ended.push(sequence);
            }
        }
    }

    /// The whole way of a micro-batch.
    fn send(&mut self, step: &Step) {
        if step.meta.rows.is_empty() {
            return;
        }
        self.micro_batches += 1;
        let load = load(&step.meta);
        let mut at = self.now + self.pipeline.link;
        let mut times = Vec::with_capacity(self.free.len());
        for stage in 0..self.free.len() {
            let noise = 1.0 + self.pipeline.jitter * self.noise();
            let seconds = self.pipeline.stages[stage].predict(&load) * noise;
            let service = Duration::from_secs_f64(seconds.max(0.0));
            let start = at.max(self.free[stage]);
            times.push(StageTime::new(start - at, service));
            self.free[stage] = start + service;
            self.busy[stage] += service;
            at = self.free[stage] + self.pipeline.link;
        }
        let results = results(&step.meta);
        self.travelling.push_back(Travelling { id: step.id, arrives: at, times, results });
    }

    /// In -1..1, even (splitmix64).
    fn noise(&mut self) -> f64 {
        self.draws += 1;
        let mut z = self.draws.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// What a micro-batch asks of a stage. A prompt of one token cannot be told from a decode, and costs
/// the same.
fn load(meta: &StepMeta) -> Load {
    meta.rows.iter().fold(Load::default(), |load, row| match row.want {
        Want::Sample if row.count == 1 => load.with_decode(row.position),
        Want::Sample => load.with_prompt(row.position, row.count, 1),
        Want::None | Want::Sum | Want::Embed { .. } => load.with_prompt(row.position, row.count, 0),
        Want::Score { .. } => load.with_prompt(row.position, row.count, row.count),
        Want::Verify | Want::Follow => {
            (row.position..row.position + row.count).fold(load, Load::with_decode)
        }
    })
}

fn results(meta: &StepMeta) -> Vec<RowResult> {
    let score = |position| PositionScore { position, ..PositionScore::default() };
    let outcome = |row: &Row| match row.want {
        Want::None | Want::Sum => RowOutcome::Done,
        Want::Embed { .. } => RowOutcome::Embedding(Vec::new()),
        Want::Sample => RowOutcome::Token { token: 7, logprobs: None },
        Want::Score { .. } => {
            RowOutcome::Scores((row.position..row.position + row.count).map(score).collect())
        }
        // No draft is ever right but the one that others build on.
        Want::Verify | Want::Follow => {
            RowOutcome::Tokens(vec![ChosenToken { token: 7, logprobs: None }])
        }
    };
    meta.rows.iter().map(|row| row.result(outcome(row))).collect()
}

/// The value below which `share` (0..1) of the values lie; `None` of none.
pub fn percentile(values: &mut [Duration], share: f64) -> Option<Duration> {
    values.sort_unstable();
    let last = values.len().checked_sub(1)?;
    values.get((last as f64 * share.clamp(0.0, 1.0)).round() as usize).copied()
}
