//! The scheduler against a fake pipeline.
//!
//! The fake stage executes steps in issue order on a real paged memory whose slots remember who
//! wrote them. Each row reads its whole history back through its block table: a table that does not
//! cover a row, a block that two live sequences share, or a chunk that was skipped shows at once.
//! Tokens are a hash of that history, so that they prove what was computed. Of the rows that the
//! scheduler calls void, every other one stays unanswered, as if stages had left it out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use millrace_shared::id::{MicroBatchId, SequenceId};
use millrace_shared::pooling::{Pooling, RunningSum, unit};
use millrace_shared::scheduler::{
    Kind, NewSequence, Outcome, Policy, Priority, Rejected, Scheduler, SchedulerConfig, Step,
};
use millrace_shared::wire::data::{Row, RowOutcome, RowResult, Want};
use millrace_shared::wire::rpc::PositionScore;
use proptest::prelude::*;

fn hash(history: &[u32]) -> u32 {
    let h = history
        .iter()
        .fold(0x811c_9dc5u32, |h, &t| (h ^ t).wrapping_mul(0x0100_0193).rotate_left(5));
    // Mixed once more, or a history that ends in its own hash would always give the same.
    (h ^ (h >> 15)).wrapping_mul(0x85eb_ca6b) ^ 0x5bd1
}

/// The end token of the fake model: one in sixty-one.
fn is_end(token: u32) -> bool {
    token.is_multiple_of(61)
}

fn prompt(id: u64, len: u32) -> Vec<u32> {
    (0..len).map(|i| hash(&[id as u32, i])).collect()
}

/// What a sequence generates, alone and with all the memory in the world.
fn expected(prompt: &[u32], max_new: u32, max_len: u32) -> Vec<u32> {
    let mut all = prompt.to_vec();
    let mut new = Vec::new();
    while (new.len() as u32) < max_new && (all.len() as u32) < max_len {
        let token = hash(&all);
        all.push(token);
        new.push(token);
        if is_end(token) {
            break;
        }
    }
    new
}

/// All stages in one: they run the same frames in the same order.
struct Stage {
    config: SchedulerConfig,
    slots: Vec<Option<(SequenceId, u32, u32)>>,
    tables: BTreeMap<SequenceId, Vec<u32>>,
    opened: BTreeSet<SequenceId>,
    /// Sequences with rows in a step that failed: what they compute is garbage.
    poisoned: BTreeSet<SequenceId>,
    /// Of sequences that are embedded.
    sums: BTreeMap<SequenceId, RunningSum>,
}

impl Stage {
    fn new(config: SchedulerConfig) -> Self {
        let slots = vec![None; (config.num_blocks * config.block_size) as usize];
        Self {
            config,
            slots,
            tables: BTreeMap::new(),
            opened: BTreeSet::new(),
            poisoned: BTreeSet::new(),
            sums: BTreeMap::new(),
        }
    }

    fn slot(&self, sequence: SequenceId, position: u32) -> usize {
        let block = self.tables[&sequence][(position / self.config.block_size) as usize];
        (block * self.config.block_size + position % self.config.block_size) as usize
    }

    fn apply_tables(&mut self, step: &Step) {
        for id in &step.meta.released {
            assert!(self.opened.remove(id), "released {id} without opening it, or twice");
            self.tables.remove(id);
            self.sums.remove(id);
        }
        for update in &step.meta.tables {
            let table = self.tables.entry(update.sequence).or_default();
            assert!(update.first as usize <= table.len(), "a hole in the table");
            table.truncate(update.first as usize);
            if update.first == 0 {
                // Computed anew after a preemption: what failed before does not matter.
                self.poisoned.remove(&update.sequence);
            }
            table.extend(&update.blocks);
            assert!(table.iter().all(|&b| b < self.config.num_blocks));
        }
    }

    fn check_shape(&self, step: &Step) {
        step.meta.validate(self.config.max_batch_tokens as usize).expect("a valid frame");
        assert_eq!(step.meta.positions(), step.tokens.len());
        assert!(step.meta.failed.is_none());
        let ids: BTreeSet<_> = step.meta.rows.iter().map(|r| r.sequence).collect();
        assert_eq!(ids.len(), step.meta.rows.len(), "one row per sequence");
        assert!(step.opens.iter().all(|id| ids.contains(id)), "opened with its first row");
        assert!(ids.is_subset(&self.opened), "rows only of opened sequences");
        assert!(self.opened.len() <= self.config.max_num_seqs as usize, "too many open at once");
    }

    /// Writes a row and returns the history up to its end.
    fn write(&mut self, row: &Row, tokens: &[u32]) -> Vec<u32> {
        for (position, &token) in (row.position..).zip(tokens) {
            let slot = self.slot(row.sequence, position);
            self.slots[slot] = Some((row.sequence, position, token));
        }
        if self.poisoned.contains(&row.sequence) {
            return vec![0; (row.position + row.count) as usize];
        }
        (0..row.position + row.count)
            .map(|position| {
                let (owner, at, token) =
                    self.slots[self.slot(row.sequence, position)].expect("written before");
                assert_eq!((owner, at), (row.sequence, position), "somebody else's block");
                token
            })
            .collect()
    }

    fn embed(&mut self, row: &Row, history: &[u32]) -> RowOutcome {
        let end = row.position + row.count;
        if row.want == (Want::Embed { pooling: Pooling::Last }) {
            return RowOutcome::Embedding(embedding(history, Pooling::Last).expect("a vector"));
        }
        let sum = self.sums.entry(row.sequence).or_default();
        let added = (row.position..end).try_for_each(|p| sum.add(p, &state(history, p)));
        match (added, row.want) {
            (Err(e), _) => RowOutcome::Failed(e.to_string().into()),
            (Ok(()), Want::Sum) => RowOutcome::Done,
            (Ok(()), _) => RowOutcome::Embedding(sum.mean().expect("a vector")),
        }
    }

    fn execute(&mut self, step: &Step, fate: Fate) -> Reply {
        for &id in &step.opens {
            assert!(self.opened.insert(id), "opened twice");
        }
        self.apply_tables(step);
        self.check_shape(step);
        if fate == Fate::StepFails {
            self.poisoned.extend(step.meta.rows.iter().map(|r| r.sequence));
            return Reply::Failed(step.id);
        }
        let mut results = Vec::new();
        let mut rest = step.tokens.as_slice();
        for (i, row) in step.meta.rows.iter().enumerate() {
            let (tokens, after) = rest.split_at(row.count as usize);
            rest = after;
            let history = self.write(row, tokens);
            let outcome = match row.want {
                _ if i == 0 && fate == Fate::RowFails => RowOutcome::Failed("broken".into()),
                Want::None => RowOutcome::Done,
                Want::Verify | Want::Follow => unreachable!("nothing is drafted here"),
                Want::Sum | Want::Embed { .. } => self.embed(row, &history),
                Want::Sample => RowOutcome::Token { token: hash(&history), logprobs: None },
                Want::Score { .. } => RowOutcome::Scores(
                    (row.position..row.position + row.count).map(|p| score(&history, p)).collect(),
                ),
            };
            if i == 0 && fate == Fate::RowMissing {
                continue;
            }
            results.push(row.result(outcome));
        }
        Reply::Results(step.id, results)
    }
}

/// What stands for a hidden state.
fn state(history: &[u32], position: u32) -> [f32; 2] {
    [hash(&history[..=position as usize]) as f32, 1.0]
}

/// The embedding of a prompt, computed at once.
fn embedding(prompt: &[u32], pooling: Pooling) -> Option<Vec<f32>> {
    let positions = 0..prompt.len() as u32;
    let mut sum = RunningSum::default();
    positions.clone().for_each(|p| sum.add(p, &state(prompt, p)).expect("in order"));
    match pooling {
        Pooling::Mean => sum.mean(),
        Pooling::Last => {
            let last = state(prompt, positions.last().expect("a prompt"));
            unit(last.into_iter().map(f64::from))
        }
    }
}

fn score(history: &[u32], position: u32) -> PositionScore {
    let sum = hash(&history[..=position as usize]) as f32;
    PositionScore { position, log_sum_exp: sum, ..PositionScore::default() }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Good,
    StepFails,
    RowFails,
    RowMissing,
}

enum Reply {
    Results(MicroBatchId, Vec<RowResult>),
    Failed(MicroBatchId),
}

struct Client {
    prompt: Vec<u32>,
    kind: Kind,
    expected: Vec<u32>,
    tokens: Vec<u32>,
    scores: Vec<PositionScore>,
    prefilled: bool,
}

struct World {
    config: SchedulerConfig,
    scheduler: Scheduler,
    stage: Stage,
    wire: VecDeque<Reply>,
    clients: BTreeMap<SequenceId, Client>,
    next_id: u64,
    last_step: u64,
    finished: u32,
    failed: u32,
    /// A stage has lost a row that it had no reason to leave out.
    missing: bool,
    now: Duration,
}

impl World {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            scheduler: Scheduler::new(config),
            stage: Stage::new(config),
            wire: VecDeque::new(),
            clients: BTreeMap::new(),
            next_id: 0,
            last_step: 0,
            finished: 0,
            failed: 0,
            missing: false,
            now: Duration::ZERO,
        }
    }

    fn submit(&mut self, len: u32, max_new: u32, kind: Kind) -> Result<SequenceId, Rejected> {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let prompt = prompt(id.0, len);
        let new = NewSequence {
            id,
            prompt: prompt.clone(),
            max_new_tokens: max_new,
            kind,
            submitted: self.now,
            deadline: None,
            client: id.0 % 3,
            priority: [Priority::Normal, Priority::High, Priority::Low][(id.0 % 5 % 3) as usize],
        };
        let waiting = self.scheduler.stats().waiting;
        let result = self.scheduler.handle_submit(new);
        if let Err(Rejected::QueueFull { limit }) = result {
            assert!(waiting >= limit);
        }
        result?;
        let expected = match kind {
            Kind::Generate | Kind::Constrained => {
                expected(&prompt, max_new, self.config.max_model_len)
            }
            Kind::Score { .. } | Kind::Embed { .. } => Vec::new(),
        };
        let client = Client {
            prompt,
            kind,
            expected,
            tokens: Vec::new(),
            scores: Vec::new(),
            prefilled: false,
        };
        self.clients.insert(id, client);
        Ok(id)
    }

    fn cancel(&mut self, nth: usize) {
        let Some(&id) = self.clients.keys().nth(nth) else { return };
        let before = self.scheduler.stats().blocks_used;
        self.scheduler.handle_cancel(id);
        self.clients.remove(&id);
        assert!(self.scheduler.stats().blocks_used <= before);
        assert!(self.scheduler.tokens(id).is_none());
    }

    /// One `poll_step`; whether there was a step.
    fn poll(&mut self, fate: Fate) -> bool {
        let before = self.scheduler.stats().in_flight;
        let Some(step) = self.scheduler.poll_step(self.now) else { return false };
        assert!(step.id.0 > self.last_step, "ids increase");
        self.last_step = step.id.0;
        let stats = self.scheduler.stats();
        assert!(stats.in_flight <= self.config.max_in_flight);
        if step.meta.rows.is_empty() {
            assert!(before == 0 && !step.meta.released.is_empty(), "empty steps only to release");
        } else {
            assert_eq!(stats.in_flight, before + 1);
        }
        assert!(stats.running <= self.config.max_num_seqs && stats.blocks_used <= stats.blocks);
        self.check_budget(&step);
        self.missing |= fate == Fate::RowMissing;
        let reply = self.stage.execute(&step, fate);
        self.wire.push_back(reply);
        true
    }

    fn check_budget(&self, step: &Step) {
        let prompt_positions: u32 = (step.meta.rows.iter())
            .filter(|r| r.count > 1 || r.want == Want::None)
            .map(|r| r.count)
            .sum();
        assert!(prompt_positions <= self.config.prefill_chunk);
    }

    /// Stages hear what is void, and leave some of it out.
    fn leave_out(&mut self) {
        for void in self.scheduler.poll_void() {
            let dead =
                |row: &RowResult| row.sequence == void.sequence && row.sequence_epoch <= void.epoch;
            for reply in &mut self.wire {
                if let Reply::Results(_, rows) = reply {
                    rows.retain(|row| !dead(row) || (row.position + row.count) % 2 == 0);
                }
            }
        }
    }

    fn deliver(&mut self) -> bool {
        self.now += Duration::from_millis(1);
        self.leave_out();
        let outcomes = match self.wire.pop_front() {
            None => return false,
            Some(Reply::Failed(id)) => self.scheduler.handle_step_failed(id, "boom"),
            Some(Reply::Results(id, rows)) => self.scheduler.handle_result(id, &rows, self.now),
        };
        for outcome in outcomes {
            self.observe(outcome);
        }
        true
    }

    fn observe(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::PrefillDone { sequence } => {
                let client = self.clients.get_mut(&sequence).expect("not cancelled");
                assert!(!std::mem::replace(&mut client.prefilled, true));
            }
            Outcome::Token { sequence, index, token, last, .. } => {
                let client = self.clients.get_mut(&sequence).expect("not cancelled");
                assert!(client.prefilled);
                assert_eq!(index as usize, client.tokens.len(), "in order, once each");
                client.tokens.push(token);
                assert_eq!(client.tokens[..], client.expected[..client.tokens.len()]);
                let done = client.tokens.len() == client.expected.len();
                assert!(done || !last);
                assert!(last || !done || is_end(token), "the scheduler knows its limits");
                if done {
                    self.clients.remove(&sequence);
                    self.scheduler.handle_finish(sequence);
                    self.finished += 1;
                }
            }
            Outcome::Scores { sequence, scores, last } => {
                let client = self.clients.get_mut(&sequence).expect("not cancelled");
                client.scores.extend(scores);
                for (p, s) in client.scores.iter().enumerate() {
                    assert_eq!(*s, score(&client.prompt, p as u32));
                }
                assert_eq!(last, client.scores.len() == client.prompt.len());
                assert!(matches!(client.kind, Kind::Score { .. }));
                if last {
                    self.clients.remove(&sequence);
                    self.scheduler.handle_finish(sequence);
                    self.finished += 1;
                }
            }
            Outcome::Embedding { sequence, vector } => {
                let client = self.clients.remove(&sequence).expect("not cancelled");
                let Kind::Embed { pooling } = client.kind else { panic!("not asked for") };
                assert!(client.prefilled);
                assert_eq!(Some(vector), embedding(&client.prompt, pooling));
                self.finished += 1;
            }
            Outcome::Shed { .. } => unreachable!("no deadlines here"),
            Outcome::Failed { sequence, failure, .. } => {
                assert!(
                    self.missing || !failure.message.contains("no result"),
                    "it was called void"
                );
                assert!(!failure.message.contains("cannot be added"), "each position once");
                assert!(self.clients.remove(&sequence).is_some());
                assert!(self.scheduler.tokens(sequence).is_none());
                self.failed += 1;
            }
        }
    }

    /// A new epoch with another cache. Who has no room in it is told; nobody else notices.
    fn epoch(&mut self, num_blocks: u32) {
        self.config.num_blocks = num_blocks;
        let refused = self.scheduler.handle_epoch(self.config);
        for (id, why) in refused {
            assert!(
                matches!(why, Rejected::NeedsMoreBlocksThanExist { exist, .. } if exist == num_blocks)
            );
            assert!(self.clients.remove(&id).is_some());
            assert!(self.scheduler.tokens(id).is_none());
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.in_flight, stats.blocks_used), (0, 0, 0));
        assert_eq!(stats.waiting as usize, self.clients.len());
        self.stage = Stage::new(self.config);
        // Results of the old epoch may still arrive.
    }

    /// Runs until nothing is left, and checks that nothing is.
    fn drain(&mut self) {
        let mut steps = 0;
        loop {
            while self.poll(Fate::Good) {
                steps += 1;
                assert!(steps < 200_000, "no end: {:?}", self.scheduler.stats());
            }
            if !self.deliver() {
                break;
            }
        }
        assert!(self.clients.is_empty(), "stuck: {:?}", self.scheduler.stats());
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
        assert_eq!(stats.blocks_used, 0, "leaked blocks");
        assert!(self.stage.tables.is_empty() && self.stage.opened.is_empty(), "leaked tables");
    }
}

#[derive(Clone, Debug)]
enum Op {
    Submit(u32, u32),
    Score(u32),
    Embed(u32, Pooling),
    Cancel(usize),
    Poll,
    PollAll,
    Deliver,
    Fail(Fate),
    Epoch(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..40u32, 0..30u32).prop_map(|(len, new)| Op::Submit(len, new)),
        3 => (0..90u32).prop_map(Op::Score),
        4 => (0..90u32).prop_map(|len| Op::Embed(len, Pooling::Mean)),
        2 => (0..90u32).prop_map(|len| Op::Embed(len, Pooling::Last)),
        3 => (0..8usize).prop_map(Op::Cancel),
        10 => Just(Op::Poll),
        10 => Just(Op::PollAll),
        20 => Just(Op::Deliver),
        1 => prop_oneof![Just(Fate::StepFails), Just(Fate::RowFails), Just(Fate::RowMissing)]
            .prop_map(Op::Fail),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (
        (2u32..40, 1u32..8, 1u32..10, 1u32..16),
        (1u32..6, 1u32..80, prop_oneof![Just(1u32), 2u32..100], 2u32..100),
    )
        .prop_map(
            |(
                (num_blocks, block_size, max_num_seqs, max_waiting),
                (max_in_flight, prefill_chunk, max_batch_tokens, max_model_len),
            )| SchedulerConfig {
                num_blocks,
                block_size,
                max_num_seqs,
                max_waiting,
                max_in_flight,
                prefill_chunk,
                max_batch_tokens,
                max_model_len,
                policy: Policy { speculate: false, ..Policy::DEFAULT },
            },
        )
}

fn run(config: SchedulerConfig, ops: &[Op]) -> World {
    let mut world = World::new(config);
    for op in ops {
        match *op {
            Op::Submit(len, new) => drop(world.submit(len, new, Kind::Generate)),
            Op::Score(len) => drop(world.submit(len, 0, Kind::Score { top_k: 3 })),
            Op::Embed(len, pooling) => drop(world.submit(len, 0, Kind::Embed { pooling })),
            Op::Cancel(nth) => world.cancel(nth),
            Op::Poll => drop(world.poll(Fate::Good)),
            Op::PollAll => while world.poll(Fate::Good) {},
            Op::Deliver => drop(world.deliver()),
            Op::Fail(fate) => drop(world.poll(fate)),
            Op::Epoch(blocks) => world.epoch(blocks),
        }
    }
    world.drain();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn everything_ends_with_exactly_its_tokens(
        config in config(),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        run(config, &ops);
    }

    #[test]
    fn an_epoch_changes_no_token(
        config in config(),
        before in prop::collection::vec(op(), 1..60),
        blocks in 2u32..40,
        between in prop::collection::vec(op(), 0..20),
        more_blocks in 2u32..40,
        after in prop::collection::vec(op(), 1..60),
    ) {
        let change = |blocks| vec![Op::Epoch(blocks)];
        run(config, &[before, change(blocks), between, change(more_blocks), after].concat());
    }
}

fn roomy() -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: 512,
        block_size: 16,
        max_num_seqs: 64,
        max_waiting: 64,
        max_in_flight: 3,
        prefill_chunk: 32,
        max_batch_tokens: 64,
        max_model_len: 512,
        policy: Policy { speculate: false, ..Policy::DEFAULT },
    }
}

/// A prompt whose answer does not end by itself for `n` tokens.
fn endless(world: &mut World, len: u32, n: u32) -> SequenceId {
    loop {
        let full = expected(&prompt(world.next_id, len), n, u32::MAX).len() as u32 == n;
        if full {
            return world.submit(len, n, Kind::Generate).expect("accepted");
        }
        world.next_id += 1;
    }
}

#[test]
fn chunks_of_one_prompt_fill_the_pipeline() {
    let mut world = World::new(roomy());
    world.submit(80, 1, Kind::Generate).unwrap();
    let steps: Vec<_> = std::iter::from_fn(|| world.scheduler.poll_step(Duration::ZERO)).collect();
    let rows: Vec<_> = steps.iter().map(|s| s.meta.rows[0]).collect();
    assert_eq!(
        rows.iter().map(|r| (r.position, r.count)).collect::<Vec<_>>(),
        [(0, 32), (32, 32), (64, 16)]
    );
    assert_eq!(
        rows.iter().map(|r| r.want).collect::<Vec<_>>(),
        [Want::None, Want::None, Want::Sample]
    );
    assert_eq!(steps.iter().map(|s| s.opens.len()).collect::<Vec<_>>(), [1, 0, 0]);
}

#[test]
fn decodes_spread_over_the_slots() {
    // All prompts fit into one micro-batch, so the decodes begin in a clump.
    let config = SchedulerConfig { prefill_chunk: 96, max_batch_tokens: 128, ..roomy() };
    let mut world = World::new(config);
    for _ in 0..12 {
        endless(&mut world, 8, 12);
    }
    let mut sizes = Vec::new();
    for _ in 0..60 {
        while let Some(step) = world.scheduler.poll_step(world.now) {
            if step.meta.rows.iter().all(|r| r.count == 1) {
                sizes.push(step.meta.rows.len());
            }
            let reply = world.stage.execute(&step, Fate::Good);
            world.wire.push_back(reply);
        }
        world.deliver();
    }
    assert!(sizes.len() > 20, "{sizes:?}");
    let balanced = sizes.iter().filter(|&&n| n == 4).count();
    assert!(balanced * 10 >= sizes.len() * 7, "12 decodes over 3 slots are 4 each: {sizes:?}");
}

#[test]
fn prompts_and_decodes_do_not_starve_each_other() {
    let config = SchedulerConfig { max_batch_tokens: 8, prefill_chunk: 8, ..roomy() };
    let mut world = World::new(config);
    for _ in 0..36 {
        endless(&mut world, 4, 200);
    }
    for _ in 0..200 {
        while world.poll(Fate::Good) {}
        world.deliver();
    }
    // Decodes alone would fill every micro-batch now; a prompt still gets through,
    let prompt = endless(&mut world, 64, 2);
    let mut rounds = 0;
    while !world.clients.get(&prompt).is_none_or(|c| c.prefilled) {
        while world.poll(Fate::Good) {}
        world.deliver();
        rounds += 1;
        assert!(rounds < 64, "the prompt starves");
    }
    // and beside a queue of prompts every decode goes on.
    let decoding: Vec<_> = world.clients.keys().copied().collect();
    let had: Vec<_> = decoding.iter().map(|id| world.clients[id].tokens.len()).collect();
    for _ in 0..10 {
        endless(&mut world, 200, 1);
    }
    for _ in 0..40 {
        while world.poll(Fate::Good) {}
        world.deliver();
    }
    for (id, had) in decoding.iter().zip(had) {
        let has = world.clients.get(id).map_or(usize::MAX, |c| c.tokens.len());
        assert!(has > had, "decode of {id} starves");
    }
    world.drain();
}

#[test]
fn preemption_happens_and_changes_nothing() {
    let config = SchedulerConfig { num_blocks: 12, block_size: 4, ..roomy() };
    let mut world = World::new(config);
    let ids: Vec<_> = (0..4).map(|_| endless(&mut world, 6, 30)).collect();
    world.drain();
    assert!(world.scheduler.stats().preemptions > 0);
    assert_eq!(world.finished as usize, ids.len());
    let stats = world.scheduler.stats();
    assert_eq!(stats.prompt_tokens, 4 * 6, "recomputation is not counted");
    assert_eq!(stats.generated_tokens, 4 * 30);
}

#[test]
fn results_of_the_cancelled_are_dropped_and_counted() {
    let mut world = World::new(roomy());
    let id = endless(&mut world, 8, 4);
    assert!(world.poll(Fate::Good));
    world.scheduler.handle_cancel(id);
    world.clients.clear();
    assert_eq!(world.scheduler.stats().blocks_used, 0);
    world.deliver();
    assert_eq!(world.scheduler.stats().stale_dropped, 1);
    world.drain();
}

#[test]
fn what_can_never_run_is_refused() {
    let config = SchedulerConfig { num_blocks: 4, max_waiting: 1, max_model_len: 100, ..roomy() };
    let mut world = World::new(config);
    let mut submit = |len, new, kind| world.submit(len, new, kind).unwrap_err();
    let generate = Kind::Generate;
    assert_eq!(submit(0, 1, generate), Rejected::EmptyPrompt);
    assert_eq!(submit(100, 1, generate), Rejected::PromptTooLong { len: 100, max: 99 });
    assert_eq!(submit(9, 0, generate), Rejected::NothingToGenerate);
    let needed = Rejected::NeedsMoreBlocksThanExist { needed: 5, exist: 4 };
    assert_eq!(submit(10, 55, generate), needed);
    let score = Kind::Score { top_k: 65 };
    assert_eq!(submit(9, 0, score), Rejected::TooManyTopLogits { top_k: 65 });
    world.submit(10, 54, generate).unwrap();
    let full = world.submit(1, 1, generate).unwrap_err();
    assert_eq!(full, Rejected::QueueFull { limit: 1 });
    assert_eq!(world.scheduler.max_sequence_len(), 64);
    world.drain();
}

/// Results are vectors as wide as the model: a frame holds so many and no more.
#[test]
fn embeddings_of_a_micro_batch_are_bounded() {
    let config = SchedulerConfig {
        num_blocks: 400,
        block_size: 4,
        max_num_seqs: 200,
        max_waiting: 200,
        max_in_flight: 1,
        prefill_chunk: 1000,
        max_batch_tokens: 1000,
        max_model_len: 100,
        policy: Policy::DEFAULT,
    };
    let mut world = World::new(config);
    for _ in 0..150 {
        world.submit(2, 0, Kind::Embed { pooling: Pooling::Mean }).expect("room for it");
    }
    // A frame with more is not valid, which the stage looks at.
    world.drain();
    assert_eq!(world.finished, 150);
    assert_eq!(world.last_step, 4, "64, 64, 22, and one that releases the last of them");
}
