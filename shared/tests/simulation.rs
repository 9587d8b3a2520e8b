//! The scheduler around a pipeline in virtual time: what its rules promise, shown by what comes out.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_shared::id::SequenceId;
use millrace_shared::scheduler::cost::StageCost;
use millrace_shared::scheduler::{Kind, NewSequence, Policy, Priority, SchedulerConfig};
use millrace_shared::sim::{PipelineModel, Record, Simulation, percentile};
use proptest::prelude::*;

const FOREVER: Duration = Duration::from_secs(1 << 30);

fn ms(n: f64) -> Duration {
    Duration::from_secs_f64(n / 1e3)
}

fn config(stages: u32) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: 4096,
        block_size: 16,
        max_num_seqs: 256,
        max_waiting: 20_000,
        max_in_flight: 2 * stages + 2,
        prefill_chunk: 64,
        max_batch_tokens: 320,
        max_model_len: 8192,
        policy: Policy {
            measured_from: Some(stages + 1),
            prefix_cache: false.into(),
            speculate: false,
            ..Policy::DEFAULT
        },
    }
}

fn sequence(id: u64, at: Duration, prompt: u32, answer: u32) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        prompt: (0..prompt).map(|i| i ^ id as u32).collect(),
        max_new_tokens: answer,
        kind: Kind::Generate,
        submitted: at,
        deadline: None,
        client: 0,
        priority: Priority::Normal,
    }
}

/// A processor's stage: reading the weights takes as long as three rows.
fn processor(share: f64) -> StageCost {
    StageCost {
        fixed: 4e-3 * share,
        decode_row: 1.2e-3 * share,
        prefill_token: 1.1e-3 * share,
        context: 6e-7 * share,
        head_row: 1e-4 * share,
    }
}

fn assert_empty(sim: &Simulation) {
    let stats = sim.scheduler().stats();
    assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
    assert_eq!(stats.blocks_used, 0, "leaked blocks");
    assert!(sim.records().values().all(|r| r.ended.is_some()));
}

/// 200 stages, 10,000 requests of ten clients, one of which floods: everything ends, nothing leaks,
/// and while all of them wait each gets the same.
#[test]
fn two_hundred_stages_ten_thousand_requests() {
    let stages = 200;
    let pipeline = PipelineModel::constant(vec![1e-3; stages], ms(0.2));
    let mut sim = Simulation::new(SchedulerConfig { max_num_seqs: 2000, ..config(200) }, pipeline);
    for n in 0..10_000u64 {
        // Half of all is client 0's.
        let client = if n % 2 == 0 { 0 } else { 1 + n / 2 % 9 };
        let answer = 4 + (n / 18 * 7 % 9) as u32;
        sim.submit(NewSequence { client, ..sequence(n, Duration::ZERO, 8, answer) });
    }
    sim.run(FOREVER, |_, _| None);
    assert_empty(&sim);
    let records = sim.records();
    assert!(records.values().all(|r| !r.rejected && !r.shed));
    // As long as requests of every client wait, each is served about as much as any other.
    let mut ends: BTreeMap<u64, Duration> = BTreeMap::new();
    for r in records.values() {
        let end = ends.entry(r.client).or_default();
        *end = (*end).max(r.tokens.first().copied().unwrap_or_default());
    }
    let all_wait = ends.values().min().copied().unwrap() * 9 / 10;
    let mut got: BTreeMap<u64, usize> = BTreeMap::new();
    for r in records.values() {
        let tokens = r.tokens.iter().filter(|t| **t <= all_wait).count();
        // As service is counted: a prompt position once, a token twice.
        *got.entry(r.client).or_default() += if tokens > 0 { 8 + 2 * tokens } else { 0 };
    }
    let (least, most) = (got.values().min().unwrap(), got.values().max().unwrap());
    assert!(most * 10 <= least * 13, "shares {got:?}");
    let busy = sim.busy().iter().map(Duration::as_secs_f64).sum::<f64>();
    let share = busy / (stages as f64 * sim.now().as_secs_f64());
    assert!(share > 0.8, "stages are busy {share:.2} of the time");
}

/// Chats with a pause between turns, and long prompts all the while.
fn mixed(stages: u32, long: bool) -> Vec<Duration> {
    let pipeline = PipelineModel {
        stages: vec![processor(1.0 / f64::from(stages)); stages as usize],
        link: ms(0.2),
        jitter: 0.05,
    };
    let mut sim = Simulation::new(config(stages), pipeline);
    for chat in 0..8 {
        sim.submit(NewSequence { client: chat, ..sequence(chat, ms(3.0), 40, 150) });
    }
    for n in 0..if long { 40 } else { 0 } {
        let at = ms(700.0 + 50.0 * n as f64);
        sim.submit(NewSequence { client: 99, ..sequence(1000 + n, at, 1500, 4) });
    }
    sim.run(FOREVER, |_, _| None);
    assert_empty(&sim);
    let chats = sim.records().iter().filter(|(id, _)| id.0 < 1000);
    // What was measured while the model was still cold does not count.
    chats.flat_map(|(_, r)| r.gaps().skip(20)).collect()
}

#[test]
fn long_prompts_among_chats_cost_the_chats_little() {
    for stages in [1, 2, 4] {
        let mut alone = mixed(stages, false);
        let mut loaded = mixed(stages, true);
        let p = |v: &mut Vec<Duration>, share| percentile(v, share).unwrap().as_secs_f64();
        let (unloaded, median, p99) =
            (p(&mut alone, 0.5), p(&mut loaded, 0.5), p(&mut loaded, 0.99));
        assert!(median <= 1.5 * unloaded, "{stages} stages: {median} of {unloaded}");
        assert!(p99 <= 2.0 * median, "{stages} stages: {p99} of {median}");
    }
}

/// A stream of short requests whose prompts are twice as long as their answers: looking after those
/// who read along costs little of what the pipeline does.
#[test]
fn short_requests_lose_little_throughput() {
    let finished = |timed_chunks| {
        let stages = vec![processor(0.5); 2];
        let pipeline = PipelineModel { stages, link: ms(0.2), jitter: 0.05 };
        let mut config = config(2);
        config.policy.timed_chunks = timed_chunks;
        let mut sim = Simulation::new(config, pipeline);
        let mut next = 16;
        for n in 0..next {
            sim.submit(sequence(n, Duration::ZERO, 128, 64));
        }
        sim.run(Duration::from_secs(60), |_, record| {
            next += 1;
            Some(sequence(next, record.ended?, 128, 64))
        });
        sim.records().values().filter(|r| r.tokens.len() == 64).count()
    };
    let (fixed, timed) = (finished(false), finished(true));
    assert!(timed * 100 >= fixed * 85, "{timed} of {fixed} requests");
}

/// With as many decodes as fit and prompts without end, both go on.
#[test]
fn neither_prompts_nor_decodes_starve() {
    let pipeline = PipelineModel { stages: vec![processor(0.5); 2], link: ms(0.2), jitter: 0.1 };
    let mut sim = Simulation::new(config(2), pipeline);
    for n in 0..48 {
        sim.submit(sequence(n, Duration::ZERO, 16, 2000));
    }
    for n in 0..20 {
        sim.submit(NewSequence { client: 1, ..sequence(100 + n, ms(500.0), 600, 1) });
    }
    sim.run(Duration::from_secs(60), |_, _| None);
    let prompts = sim.records().range(SequenceId(100)..);
    assert!(prompts.filter(|(_, r)| r.ended.is_some()).count() == 20, "prompts starve");
    let slowest = sim.records().range(..SequenceId(100)).map(|(_, r)| r.tokens.len()).min();
    assert!(slowest > Some(200), "a decode starves: {slowest:?} tokens");
}

/// The window follows the links: full speed where the delay is longer than all computing.
#[test]
fn links_are_hidden() {
    for (link, least) in [(0.0, 0.97), (5.0, 0.95), (20.0, 0.9)] {
        let pipeline = PipelineModel::constant(vec![20e-3; 4], ms(link));
        let config = SchedulerConfig { max_batch_tokens: 8, prefill_chunk: 8, ..config(4) };
        let mut sim = Simulation::new(config, pipeline);
        let mut next = 0;
        for n in 0..120 {
            sim.submit(sequence(n, Duration::ZERO, 1, 40));
            next = n + 1;
        }
        let (from, until) = (Duration::from_secs(5), Duration::from_secs(20));
        sim.run(until, |_, record| {
            next += 1;
            Some(sequence(next, record.ended.unwrap_or_default(), 1, 40))
        });
        let tokens = sim.records().values().flat_map(|r: &Record| &r.tokens);
        let done = tokens.filter(|t| **t >= from && **t < until).count() as f64;
        let efficiency = done / (until - from).as_secs_f64() / (8.0 / 20e-3);
        assert!(efficiency >= least, "link of {link} ms: {efficiency:.3}");
        let window = sim.scheduler().stats().window;
        assert!((1..=10).contains(&window), "{window}");
    }
}

/// Urgent requests wait less than others, and the least urgent ones are served all the same.
#[test]
fn classes_differ_and_none_starves() {
    let pipeline = PipelineModel { stages: vec![processor(1.0)], link: ms(0.1), jitter: 0.0 };
    let mut sim = Simulation::new(SchedulerConfig { max_num_seqs: 8, ..config(1) }, pipeline);
    let classes = [Priority::High, Priority::Normal, Priority::Low];
    for n in 0..300 {
        let priority = classes[(n % 3) as usize];
        let new = sequence(n, Duration::ZERO, 30, 10);
        sim.submit(NewSequence { client: n % 3, priority, ..new });
    }
    sim.run(FOREVER, |_, _| None);
    assert_empty(&sim);
    let mean = |class| {
        let waits = sim.records().values().filter(|r| r.priority == class);
        waits.filter_map(Record::first_token).map(|t| t.as_secs_f64()).sum::<f64>() / 100.0
    };
    let [high, normal, low] = classes.map(mean);
    assert!(high < 0.8 * normal && normal < 0.9 * low, "{high} {normal} {low}");
}

/// Four chats come just after two long prompts of the same client: when each began to answer.
fn behind_documents(short_turns: bool) -> (f64, f64) {
    let pipeline = PipelineModel { stages: vec![processor(0.5); 2], link: ms(0.2), jitter: 0.0 };
    let config = config(2);
    let policy = Policy { short_turns, ..config.policy };
    let mut sim = Simulation::new(SchedulerConfig { policy, ..config }, pipeline);
    for n in 0..2 {
        sim.submit(sequence(n, Duration::ZERO, 2000, 4));
    }
    for n in 2..6 {
        sim.submit(sequence(n, ms(10.0), 64, 32));
    }
    sim.run(FOREVER, |_, _| None);
    assert_empty(&sim);
    let last = |ids: std::ops::Range<u64>| {
        let begun = ids.map(|id| sim.records()[&SequenceId(id)].first_token().expect("it began"));
        begun.max().unwrap_or_default().as_secs_f64()
    };
    (last(2..6), last(0..2))
}

#[test]
fn chats_do_not_wait_for_documents_and_documents_are_not_starved() {
    let (chat, document) = behind_documents(true);
    let (waiting_chat, undisturbed) = behind_documents(false);
    assert!(chat < 0.5 * waiting_chat, "{chat} {waiting_chat}");
    assert!(document < 1.3 * undisturbed, "{document} {undisturbed}");
}

fn deadlines(requests: &[(u16, u16, u16)], enforce: bool) -> Simulation {
    let pipeline = PipelineModel { stages: vec![processor(0.5); 2], link: ms(0.2), jitter: 0.0 };
    let config = SchedulerConfig { max_num_seqs: 16, ..config(2) };
    let mut sim = Simulation::new(config, pipeline);
    // Something to measure by.
    for n in 0..4 {
        sim.submit(sequence(n, Duration::ZERO, 100, 20));
    }
    for (n, &(at, prompt, patience)) in requests.iter().enumerate() {
        let at = ms(1000.0 + f64::from(at % 500));
        let new = sequence(100 + n as u64, at, 1 + u32::from(prompt) % 800, 5);
        // All have one: in the same order, whether they are patient or not.
        let deadline = Some(at + if enforce { ms(f64::from(patience % 4000)) } else { FOREVER });
        sim.submit(NewSequence { client: n as u64 % 3, deadline, ..new });
    }
    sim.run(FOREVER, |_, _| None);
    assert_empty(&sim);
    sim
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    /// Whoever is shed would not have had its first token in time even where nobody is shed; and
    /// shedding leaves nothing behind.
    #[test]
    fn only_the_hopeless_are_shed(
        requests in prop::collection::vec((any::<u16>(), any::<u16>(), any::<u16>()), 1..60),
    ) {
        let shedding = deadlines(&requests, true);
        let patient = deadlines(&requests, false);
        for (id, record) in shedding.records().iter().filter(|(_, r)| r.shed) {
            let patience = ms(f64::from(requests[(id.0 - 100) as usize].2 % 4000));
            let waited = patient.records()[id].first_token().expect("it was served");
            prop_assert!(waited > patience, "{id} shed: {waited:?} would do for {patience:?}");
            prop_assert!(record.tokens.is_empty());
        }
    }

    /// Whatever the times and links: the window stays within its limits, everything ends.
    #[test]
    fn anything_ends_and_the_window_keeps_its_bounds(
        stages in prop::collection::vec(1u32..40, 1..9),
        link in 0u32..60,
        jitter in 0u32..80,
        requests in prop::collection::vec((0u16..3000, 1u16..300, 1u16..40, 0u64..4), 1..60),
        blocks in 40u32..400,
    ) {
        let mut pipeline =
            PipelineModel::constant(stages.iter().map(|&s| f64::from(s) / 1e3), ms(f64::from(link)));
        pipeline.jitter = f64::from(jitter) / 100.0;
        let n = stages.len() as u32;
        let config = SchedulerConfig { num_blocks: blocks, ..config(n) };
        let mut sim = Simulation::new(config, pipeline);
        for (id, &(at, prompt, answer, client)) in requests.iter().enumerate() {
            let new = sequence(id as u64, ms(f64::from(at)), prompt.into(), answer.into());
            sim.submit(NewSequence { client, ..new });
        }
        let mut steps = 0u32;
        while sim.step() {
            let window = sim.scheduler().stats().window;
            prop_assert!((1..=config.max_in_flight).contains(&window));
            steps += 1;
            prop_assert!(steps < 200_000, "no end");
        }
        assert_empty(&sim);
        for (id, &(_, _, answer, _)) in requests.iter().enumerate() {
            let record = &sim.records()[&SequenceId(id as u64)];
            prop_assert_eq!(record.tokens.len(), usize::from(answer));
        }
    }
}
