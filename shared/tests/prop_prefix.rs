//! Prefix cache and drafts against a fake pipeline: they save work and change no token.
//!
//! The fake stage runs steps in issue order on a paged memory. Each slot remembers position, token
//! and a hash of everything before, so that a table with a block of another beginning, a block that
//! was never filled (a failed step leaves its slots void) or a position that was skipped gives other
//! tokens than a sequence gives alone.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use millrace_shared::id::{MicroBatchId, SequenceId};
use millrace_shared::options::PrefixCache;
use millrace_shared::pooling::{Pooling, RunningSum, unit};
use millrace_shared::scheduler::{
    Kind, NewSequence, Outcome, Policy, Priority, Scheduler, SchedulerConfig, Step,
};
use millrace_shared::wire::data::{ChosenToken, Row, RowOutcome, RowResult, Want};
use millrace_shared::wire::rpc::PositionScore;
use proptest::prelude::*;

/// What a slot that was never written holds, and whatever is computed from it.
const VOID: u64 = u64::MAX;

fn mix(chain: u64, token: u32) -> u64 {
    if chain == VOID {
        return VOID;
    }
    let x = (chain ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 29)) >> 1
}

fn chain(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0, |chain, &t| mix(chain, t))
}

/// The fake model mostly repeats itself, so that looking back is a good guess, and often is not.
fn next_token(history: &[u32], chain: u64) -> u32 {
    match (history.len().checked_sub(5), chain % 8) {
        _ if chain == VOID => u32::MAX,
        (Some(back), 1..) => history[back],
        _ => (chain % 40) as u32,
    }
}

fn expected(prompt: &[u32], new: u32) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..new {
        all.push(next_token(&all, chain(&all)));
    }
    all.split_off(prompt.len())
}

/// `shared` tokens that the family has in common, then `own` ones.
fn prompt(family: u32, shared: u32, own: u32, id: u64) -> Vec<u32> {
    let common = (0..shared).map(|i| 100 + family * 7 + i % 11);
    common.chain((0..own).map(|i| 1000 + id as u32 * 64 + i)).collect()
}

type Slot = (u32, u32, u64);

struct Stage {
    block: u32,
    slots: Vec<Slot>,
    tables: BTreeMap<SequenceId, Vec<u32>>,
    /// The token log of each sequence, as the last stage has it.
    logs: BTreeMap<SequenceId, Vec<u32>>,
    /// Of sequences that are embedded.
    sums: BTreeMap<SequenceId, RunningSum>,
    /// Positions computed for rows of more than one position that are not drafts.
    prefilled: u64,
    positions: u64,
    steps: u64,
    /// Steps of guesses alone, and rows of them that were right to begin as they did.
    followed: u64,
    foreseen: u64,
}

impl Stage {
    fn new(config: &SchedulerConfig) -> Self {
        Self {
            block: config.block_size,
            slots: vec![(0, 0, VOID); (config.num_blocks * config.block_size) as usize],
            tables: BTreeMap::new(),
            logs: BTreeMap::new(),
            sums: BTreeMap::new(),
            prefilled: 0,
            positions: 0,
            steps: 0,
            followed: 0,
            foreseen: 0,
        }
    }

    fn slot(&self, id: SequenceId, position: u32) -> usize {
        let block = self.tables[&id][(position / self.block) as usize];
        (block * self.block + position % self.block) as usize
    }

    /// Tokens and hash of the positions before `end`, as the memory has them.
    fn history(&self, id: SequenceId, end: u32) -> (Vec<u32>, u64) {
        let mut tokens = Vec::new();
        let mut hash = 0;
        for position in 0..end {
            let (at, token, held) = self.slots[self.slot(id, position)];
            hash = mix(hash, token);
            if held != hash || at != position {
                hash = VOID;
            }
            tokens.push(token);
        }
        (tokens, hash)
    }

    fn execute(&mut self, step: &Step, fate: Fate) -> Reply {
        for id in &step.meta.released {
            self.tables.remove(id);
            self.logs.remove(id);
        }
        for update in &step.meta.tables {
            let table = self.tables.entry(update.sequence).or_default();
            assert!(update.first as usize <= table.len(), "a hole in the table");
            table.truncate(update.first as usize);
            table.extend(&update.blocks);
        }
        step.meta.validate(usize::MAX).expect("a valid frame");
        self.steps += 1;
        let mut rest = step.tokens.as_slice();
        let mut results = Vec::new();
        for (index, row) in step.meta.rows.iter().enumerate() {
            let (tokens, after) = rest.split_at(row.count as usize);
            rest = after;
            self.positions += u64::from(row.count);
            if row.drafts() == 0 && row.count > 1 {
                self.prefilled += u64::from(row.count);
            }
            let outcome = self.row(row, tokens, step.meta.drafts_of(index), fate);
            results.push(row.result(outcome));
        }
        match fate {
            Fate::Good => Reply::Results(step.id, results),
            Fate::Fails => Reply::Failed(step.id),
        }
    }

    /// The token after position `end - 1`, which enters the log in place of what followed.
    fn choose(&mut self, id: SequenceId, end: u32) -> u32 {
        let (history, hash) = self.history(id, end);
        let token = next_token(&history, hash);
        let log = self.logs.get_mut(&id).expect("opened");
        log.truncate(end as usize);
        log.push(token);
        token
    }

    fn follows(&self, row: &Row, tokens: &[u32]) -> bool {
        let log = &self.logs[&row.sequence];
        log.len() == row.position as usize + 1 && log.last() == tokens.first()
    }

    fn row(&mut self, row: &Row, tokens: &[u32], drafts: &[u32], fate: Fate) -> RowOutcome {
        let (_, mut hash) = self.history(row.sequence, row.position);
        for (position, &token) in (row.position..).zip(tokens) {
            hash = mix(hash, token);
            let slot = self.slot(row.sequence, position);
            self.slots[slot] =
                if fate == Fate::Good { (position, token, hash) } else { (0, 0, VOID) };
        }
        match row.want {
            Want::None => RowOutcome::Done,
            Want::Sample => {
                let end = row.position + row.count;
                RowOutcome::Token { token: self.choose(row.sequence, end), logprobs: None }
            }
            Want::Follow if !self.follows(row, tokens) => RowOutcome::Done,
            Want::Verify | Want::Follow => {
                let known = usize::from(row.want == Want::Verify);
                self.foreseen += 1 - known as u64;
                assert_eq!(drafts, &tokens[known..]);
                let mut chosen: Vec<ChosenToken> = Vec::new();
                for (i, end) in (row.position + 1..).take(tokens.len()).enumerate() {
                    if i > 0 && chosen[i - 1].token != tokens[i] {
                        break;
                    }
                    let token = self.choose(row.sequence, end);
                    chosen.push(ChosenToken { token, logprobs: None });
                }
                RowOutcome::Tokens(chosen)
            }
            Want::Sum | Want::Embed { .. } => {
                let positions = row.position..row.position + row.count;
                let mut sum = self.sums.remove(&row.sequence).unwrap_or_default();
                let state = |p: u32| [self.history(row.sequence, p + 1).1 as f32, 1.0];
                let last = state(row.position + row.count - 1);
                let added = positions.into_iter().try_for_each(|p| sum.add(p, &state(p)));
                let mean = sum.mean();
                self.sums.insert(row.sequence, sum);
                match row.want {
                    Want::Embed { pooling: Pooling::Last } => {
                        let last = unit(last.into_iter().map(f64::from));
                        RowOutcome::Embedding(last.expect("a vector"))
                    }
                    _ if added.is_err() => RowOutcome::Failed("out of turn".into()),
                    Want::Sum => RowOutcome::Done,
                    _ => RowOutcome::Embedding(mean.expect("a vector")),
                }
            }
            Want::Score { .. } => {
                let score = |p| PositionScore {
                    position: p,
                    log_sum_exp: self.history(row.sequence, p + 1).1 as f32,
                    ..PositionScore::default()
                };
                RowOutcome::Scores((row.position..row.position + row.count).map(score).collect())
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Good,
    Fails,
}

enum Reply {
    Results(MicroBatchId, Vec<RowResult>),
    Failed(MicroBatchId),
}

struct Client {
    prompt: Vec<u32>,
    expected: Vec<u32>,
    tokens: Vec<u32>,
    scores: usize,
}

struct World {
    scheduler: Scheduler,
    stage: Stage,
    wire: VecDeque<Reply>,
    clients: BTreeMap<SequenceId, Client>,
    next_id: u64,
    now: Duration,
    failed: u32,
}

impl World {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config),
            stage: Stage::new(&config),
            wire: VecDeque::new(),
            clients: BTreeMap::new(),
            next_id: 1,
            now: Duration::ZERO,
            failed: 0,
        }
    }

    fn submit(&mut self, prompt: Vec<u32>, new: u32, kind: Kind) -> bool {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let request = NewSequence {
            id,
            prompt: prompt.clone(),
            max_new_tokens: new,
            kind,
            submitted: self.now,
            deadline: None,
            client: id.0 % 3,
            priority: Priority::Normal,
        };
        if self.scheduler.handle_submit(request).is_err() {
            return false;
        }
        let new = if kind == Kind::Generate { new } else { 0 };
        let expected = expected(&prompt, new);
        self.clients.insert(id, Client { prompt, expected, tokens: Vec::new(), scores: 0 });
        true
    }

    fn poll(&mut self, fate: Fate) -> bool {
        let Some(step) = self.scheduler.poll_step(self.now) else { return false };
        for id in &step.opens {
            let (tokens, _) = self.scheduler.tokens(*id).expect("it runs");
            self.stage.logs.insert(*id, tokens.to_vec());
        }
        let guesses = |row: &Row| row.want == Want::Follow;
        let guessing = !step.meta.rows.is_empty() && step.meta.rows.iter().all(guesses);
        assert!(guessing || !step.meta.rows.iter().any(guesses), "guesses travel alone");
        self.stage.followed += u64::from(guessing);
        let reply = self.stage.execute(&step, fate);
        if !step.meta.rows.is_empty() {
            self.wire.push_back(reply);
        }
        true
    }

    /// Of what is void every other row stays unanswered, as if stages had left it out.
    fn leave_out(&mut self) {
        for void in self.scheduler.poll_void() {
            for reply in &mut self.wire {
                if let Reply::Results(_, rows) = reply {
                    rows.retain(|row| {
                        row.sequence != void.sequence
                            || row.sequence_epoch > void.epoch
                            || row.position % 2 == 0
                    });
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
            Outcome::Token { sequence, index, token, last, .. } => {
                let client = self.clients.get_mut(&sequence).expect("known");
                assert_eq!(index as usize, client.tokens.len(), "in order, once each");
                client.tokens.push(token);
                assert_eq!(token, client.expected[index as usize], "{sequence} at {index}");
                assert_eq!(last, client.tokens.len() == client.expected.len());
                if last {
                    self.clients.remove(&sequence);
                }
            }
            Outcome::Scores { sequence, scores, last } => {
                let client = self.clients.get_mut(&sequence).expect("known");
                for score in scores {
                    let right = chain(&client.prompt[..=score.position as usize]) as f32;
                    assert_eq!(
                        (score.position as usize, score.log_sum_exp),
                        (client.scores, right)
                    );
                    client.scores += 1;
                }
                if last {
                    self.clients.remove(&sequence);
                }
            }
            Outcome::Embedding { sequence, vector } => {
                let client = self.clients.remove(&sequence).expect("known");
                let states = || {
                    let ends = 1..=client.prompt.len();
                    ends.map(|end| [chain(&client.prompt[..end]) as f32, 1.0])
                };
                let mut sum = RunningSum::default();
                (0..).zip(states()).for_each(|(p, state)| sum.add(p, &state).expect("in order"));
                let last = states().next_back().and_then(|s| unit(s.into_iter().map(f64::from)));
                let right = [sum.mean(), last];
                assert!(right.contains(&Some(vector)), "{sequence}");
            }
            Outcome::Failed { sequence, failure, .. } => {
                assert_ne!(failure.message, "out of turn", "each position counts once");
                assert!(self.clients.remove(&sequence).is_some());
                self.failed += 1;
            }
            Outcome::PrefillDone { .. } => {}
            Outcome::Shed { .. } => panic!("nothing has a deadline"),
        }
    }

    fn turn(&mut self) {
        while self.poll(Fate::Good) {}
        self.deliver();
    }

    fn drain(&mut self) {
        let mut turns = 0;
        loop {
            while self.poll(Fate::Good) {
                turns += 1;
                assert!(turns < 200_000, "no end: {:?}", self.scheduler.stats());
            }
            if !self.deliver() {
                break;
            }
        }
        let stats = self.scheduler.stats();
        assert!(self.clients.is_empty(), "stuck: {stats:?}");
        assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
        assert_eq!(stats.blocks_used, 0, "leaked blocks");
        assert!(self.stage.tables.is_empty(), "leaked tables");
        assert!(stats.prefix_hit_tokens <= stats.prefix_query_tokens);
        assert!(stats.draft_tokens_accepted <= stats.draft_tokens);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Submit { family: u32, shared: u32, own: u32, new: u32 },
    Score { family: u32, shared: u32, own: u32 },
    Embed { family: u32, shared: u32, own: u32, pooling: Pooling },
    Cancel(usize),
    Poll,
    PollAll,
    Deliver,
    Fail,
    Epoch,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..3u32, 0..40u32, 0..6u32, 1..40u32)
            .prop_map(|(family, shared, own, new)| Op::Submit { family, shared, own, new }),
        2 => (0..3u32, 0..40u32, 0..6u32)
            .prop_map(|(family, shared, own)| Op::Score { family, shared, own }),
        4 => (0..3u32, 0..40u32, 0..6u32, prop_oneof![Just(Pooling::Mean), Just(Pooling::Last)])
            .prop_map(|(family, shared, own, pooling)| Op::Embed { family, shared, own, pooling }),
        2 => (0..8usize).prop_map(Op::Cancel),
        10 => Just(Op::Poll),
        10 => Just(Op::PollAll),
        20 => Just(Op::Deliver),
        1 => Just(Op::Fail),
        1 => Just(Op::Epoch),
    ]
}

fn cache() -> impl Strategy<Value = PrefixCache> {
    prop::sample::select(vec![PrefixCache::On, PrefixCache::PerKey, PrefixCache::Off])
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (
        (2u32..40, 1u32..8, 1u32..10, 1u32..40),
        (1u32..6, 1u32..80, 1u32..100, cache(), any::<bool>()),
    )
        .prop_map(
            |(
                (num_blocks, block_size, max_num_seqs, max_waiting),
                (max_in_flight, prefill_chunk, max_batch_tokens, prefix_cache, speculate),
            )| SchedulerConfig {
                num_blocks,
                block_size,
                max_num_seqs,
                max_waiting,
                max_in_flight,
                prefill_chunk,
                max_batch_tokens,
                max_model_len: 100,
                policy: Policy { prefix_cache, speculate, ..Policy::DEFAULT },
            },
        )
}

fn run(config: SchedulerConfig, ops: &[Op]) {
    let mut world = World::new(config);
    for op in ops {
        match *op {
            Op::Submit { family, shared, own, new } => {
                let prompt = prompt(family, shared, own, world.next_id);
                let new = new.min(100 - prompt.len() as u32);
                let _ = world.submit(prompt, new, Kind::Generate);
            }
            Op::Score { family, shared, own } => {
                let prompt = prompt(family, shared, own, world.next_id);
                let _ = world.submit(prompt, 0, Kind::Score { top_k: 1 });
            }
            Op::Embed { family, shared, own, pooling } => {
                let prompt = prompt(family, shared, own, world.next_id);
                let _ = world.submit(prompt, 0, Kind::Embed { pooling });
            }
            Op::Cancel(nth) => {
                if let Some(&id) = world.clients.keys().nth(nth) {
                    world.scheduler.handle_cancel(id);
                    world.clients.remove(&id);
                }
            }
            Op::Poll => drop(world.poll(Fate::Good)),
            Op::PollAll => while world.poll(Fate::Good) {},
            Op::Deliver => drop(world.deliver()),
            Op::Fail => drop(world.poll(Fate::Fails)),
            Op::Epoch => {
                // New stages: nothing that was cached is there any more.
                assert!(world.scheduler.handle_epoch(config).is_empty());
                world.stage = Stage::new(&config);
            }
        }
    }
    world.drain();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn neither_cache_nor_drafts_change_a_token(
        config in config(),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        run(config, &ops);
    }
}

fn roomy(prefix_cache: impl Into<PrefixCache>, speculate: bool) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: 512,
        block_size: 64,
        max_num_seqs: 64,
        max_waiting: 64,
        max_in_flight: 3,
        prefill_chunk: 64,
        max_batch_tokens: 128,
        max_model_len: 2048,
        policy: Policy { prefix_cache: prefix_cache.into(), speculate, ..Policy::DEFAULT },
    }
}

/// 64 requests with 1,000 tokens in common and 16 of their own: positions computed for prompts.
fn shared_prefix(cache: impl Into<PrefixCache>, first_alone: bool) -> u64 {
    let mut world = World::new(roomy(cache, false));
    for n in 0..64 {
        assert!(world.submit(prompt(1, 1000, 16, n), 8, Kind::Generate));
        if n == 0 && first_alone {
            world.drain();
        }
    }
    world.drain();
    world.stage.prefilled
}

#[test]
fn a_shared_prefix_is_computed_about_once() {
    for first_alone in [true, false] {
        let (without, with) = (shared_prefix(false, first_alone), shared_prefix(true, first_alone));
        let saved = 100.0 * (1.0 - with as f64 / without as f64);
        let when = if first_alone { "after the first finished" } else { "all at once" };
        println!(
            "64 requests, 1,000 tokens in common, 16 of their own, {when}: {with} prompt positions \
             computed instead of {without}, {saved:.1} % less"
        );
        assert!(without >= 64 * 1016);
        assert!(saved > 90.0);
    }
}

/// Each of the three clients computes the common part once for itself, and neither finds nor waits for
/// what others compute.
#[test]
fn clients_that_do_not_share_find_only_their_own() {
    for first_alone in [true, false] {
        let apart = shared_prefix(PrefixCache::PerKey, first_alone);
        let together = shared_prefix(PrefixCache::On, first_alone);
        assert_eq!(apart - together, 2 * (1000 / 64 * 64), "first alone: {first_alone}");
    }
}

/// Whoever computes what others wait for may go away.
#[test]
fn those_who_wait_for_a_prefix_go_on_without_the_other() {
    for cancel in [true, false] {
        let mut world = World::new(roomy(true, false));
        for n in 0..5 {
            assert!(world.submit(prompt(1, 600, 16, n), 4, Kind::Generate));
        }
        assert!(world.poll(Fate::Good) && world.poll(Fate::Good));
        world.deliver();
        if cancel {
            world.scheduler.handle_cancel(SequenceId(1));
            world.clients.remove(&SequenceId(1));
        } else {
            assert!(world.poll(Fate::Fails));
        }
        world.drain();
        assert_eq!(world.failed, u32::from(!cancel));
        let stats = world.scheduler.stats();
        assert!(world.stage.prefilled < 2 * 600 + 64 * 5 * 2, "{stats:?}");
    }
}

#[test]
fn a_conversation_finds_its_own_past() {
    let mut world = World::new(roomy(true, false));
    let mut said = prompt(2, 300, 0, 0);
    assert!(world.submit(said.clone(), 100, Kind::Generate));
    world.drain();
    said.extend(expected(&said, 100));
    said.extend([5, 6, 7]);
    assert!(world.submit(said, 4, Kind::Generate));
    assert!(world.poll(Fate::Good));
    // 399 positions were computed, six full blocks.
    assert_eq!(world.scheduler.cached_tokens(SequenceId(2)), 384);
    world.drain();
}

#[test]
fn the_preempted_find_their_own_blocks() {
    let config = SchedulerConfig { num_blocks: 22, block_size: 4, ..roomy(true, false) };
    let mut world = World::new(config);
    for n in 0..4 {
        let new = if n < 3 { 18 } else { 40 };
        assert!(world.submit(prompt(n, 6, 0, n.into()), new, Kind::Generate));
    }
    world.drain();
    // The others ended soon after one lost its blocks, and took only the last of them.
    let stats = world.scheduler.stats();
    assert_eq!(stats.preemptions, 1, "{stats:?}");
    assert!(stats.prefix_hit_tokens >= 8, "{stats:?}");
}

#[test]
fn scored_positions_are_always_computed() {
    let mut world = World::new(roomy(true, false));
    assert!(world.submit(prompt(1, 300, 0, 0), 4, Kind::Generate));
    world.drain();
    assert!(world.submit(prompt(1, 300, 0, 0), 0, Kind::Score { top_k: 1 }));
    world.drain();
    assert_eq!(world.scheduler.stats().prefix_hit_tokens, 0);
    // What a scoring computed serves others.
    assert!(world.submit(prompt(1, 300, 1, 0), 4, Kind::Generate));
    world.drain();
    assert_eq!(world.scheduler.stats().prefix_hit_tokens, 256);
}

/// Steps that held more than guesses, and how many drafts there were.
fn decode_steps(speculate: bool, streams: u32) -> (u64, u64) {
    let mut world = World::new(roomy(false, speculate));
    for n in 0..streams {
        assert!(world.submit(prompt(n, 40, 0, n.into()), 200, Kind::Generate));
    }
    world.drain();
    (world.stage.steps - world.stage.followed, world.scheduler.stats().draft_tokens)
}

/// While a row is under way and slots are idle, what may follow it is computed; where it was foreseen,
/// its tokens come without another round.
#[test]
fn guesses_fill_idle_slots() {
    let mut world = World::new(roomy(false, true));
    assert!(world.submit(prompt(1, 40, 0, 1), 200, Kind::Generate));
    world.drain();
    let Stage { followed, foreseen, .. } = world.stage;
    println!("200 tokens: {followed} steps of guesses, {foreseen} of them foreseen");
    assert!(foreseen >= 5 && foreseen * 3 > followed, "{foreseen} of {followed}");
    // With one slot there is never an idle one.
    let config = SchedulerConfig { max_in_flight: 1, ..roomy(false, true) };
    let mut world = World::new(config);
    assert!(world.submit(prompt(1, 40, 0, 1), 200, Kind::Generate));
    world.drain();
    assert_eq!(world.stage.followed, 0);
}

#[test]
fn drafts_save_steps_where_there_are_few_streams_and_cost_nothing_where_there_are_many() {
    let (plain, none) = decode_steps(false, 1);
    let (drafted, some) = decode_steps(true, 1);
    assert_eq!(none, 0);
    println!("200 tokens: {plain} steps without drafts, {drafted} with {some} of them");
    assert!(drafted * 3 < plain * 2 && some > 0);
    let (plain, _) = decode_steps(false, 32);
    assert!(decode_steps(true, 32).0 <= plain);
    let mut world = World::new(roomy(false, true));
    for n in 0..32 {
        assert!(world.submit(prompt(n, 40, 0, n.into()), 200, Kind::Generate));
    }
    for _ in 0..300 {
        world.turn();
    }
    assert_eq!(world.scheduler.stats().draft_tokens, 0, "a loaded pipeline drafts nothing");
}

/// A mean needs every position; the hidden state of the last one does not.
#[test]
fn a_mean_takes_no_position_from_the_cache() {
    let mut world = World::new(roomy(true, false));
    let mut hits = |pooling| {
        let before = world.scheduler.stats().prefix_hit_tokens;
        assert!(world.submit(prompt(1, 300, 0, 0), 0, Kind::Embed { pooling }));
        world.drain();
        world.scheduler.stats().prefix_hit_tokens - before
    };
    assert_eq!(hits(Pooling::Mean), 0);
    assert_eq!(hits(Pooling::Mean), 0, "though all of it is there");
    assert_eq!(hits(Pooling::Last), 256, "what a mean computed serves others");
}
