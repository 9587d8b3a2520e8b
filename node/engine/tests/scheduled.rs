//! Scheduler and stages together: with prefix cache and drafts or without, through the mock and
//! through the CPU engine, the answers are the same.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use common::{VOCAB, cut, place, runner};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::mock::{MockConfig, expected_tokens};
use millrace_engine::stage::StageRunner;
use millrace_engine::{Isa, StageSpec};
use millrace_shared::id::{Epoch, SequenceId};
use millrace_shared::model::{Dtype, TensorType};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::draft::Drafter;
use millrace_shared::scheduler::{
    Kind, NewSequence, Outcome, Policy, Priority, Scheduler, SchedulerConfig, SchedulerStats, Step,
};
use millrace_shared::wire::data::{OpenMeta, ResultMeta, SequenceOpen};
use millrace_shared::wire::frame::Frame;
use tiny::Tiny;

/// A request: prompt, parameters, seed, length of the answer.
type Request = (Vec<u32>, SamplingParams, u64, u32);

/// What runs together.
struct Served {
    scheduler: Scheduler,
    stages: Vec<StageRunner>,
    requests: BTreeMap<SequenceId, Request>,
    answers: BTreeMap<SequenceId, Vec<u32>>,
    wire: VecDeque<Frame>,
}

impl Served {
    fn new(stages: Vec<StageRunner>, spec: &StageSpec, policy: Policy) -> Self {
        let config = SchedulerConfig {
            num_blocks: spec.settings.kv_blocks,
            block_size: spec.settings.kv_block_size,
            max_num_seqs: spec.settings.max_num_seqs,
            max_waiting: 64,
            max_in_flight: stages.len() as u32 + 1,
            prefill_chunk: 16,
            max_batch_tokens: spec.settings.max_batch_tokens,
            max_model_len: spec.settings.max_model_len,
            policy,
        };
        Self {
            scheduler: Scheduler::new(config),
            stages,
            requests: BTreeMap::new(),
            answers: BTreeMap::new(),
            wire: VecDeque::new(),
        }
    }

    fn submit(&mut self, request: Request) {
        let id = SequenceId(self.requests.len() as u64 + 1);
        let new = NewSequence {
            id,
            prompt: request.0.clone(),
            max_new_tokens: request.3,
            kind: Kind::Generate,
            submitted: Duration::ZERO,
            deadline: None,
            client: 0,
            priority: Priority::Normal,
        };
        self.scheduler.handle_submit(new).expect("accepted");
        self.requests.insert(id, request);
    }

    fn open(&mut self, step: &Step) {
        let open = |id: &SequenceId| {
            let (tokens, prompt_len) = self.scheduler.tokens(*id).expect("just issued");
            let (_, params, seed, _) = &self.requests[id];
            SequenceOpen {
                sequence: *id,
                tokens: tokens.to_vec(),
                prompt_len: prompt_len as u32,
                params: params.clone(),
                seed: *seed,
                constrained: false,
            }
        };
        let opens = step.opens.iter().map(open).collect();
        let last = self.stages.last_mut().expect("stages");
        last.open(Epoch(1), OpenMeta { opens }).expect("room");
    }

    /// Everything that was submitted, to its end; results come when all slots are taken.
    fn drain(&mut self) {
        loop {
            while let Some(step) = self.scheduler.poll_step(Duration::ZERO) {
                self.open(&step);
                let mut frame = common::step_frame(step.id.0, &step.meta, &step.tokens);
                for stage in &mut self.stages {
                    let sent = stage.run(&frame).expect("good frames");
                    frame = Frame::parse(sent.into_buffer()).expect("sealed");
                }
                self.wire.push_back(frame);
            }
            let Some(frame) = self.wire.pop_front() else { return };
            let meta: ResultMeta = frame.meta().expect("results");
            let id = frame.header().micro_batch;
            for outcome in self.scheduler.handle_result(id, &meta.rows, Duration::ZERO) {
                match outcome {
                    Outcome::Token { sequence, token, .. } => {
                        self.answers.entry(sequence).or_default().push(token);
                    }
                    Outcome::PrefillDone { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn finish(mut self) -> (Vec<Vec<u32>>, SchedulerStats) {
        self.drain();
        (self.answers.into_values().collect(), self.scheduler.stats())
    }
}

/// Knows the answers, and is wrong every third time.
#[derive(Debug)]
struct Oracle {
    answers: Vec<Vec<u32>>,
    prompts: Vec<usize>,
    turn: u32,
}

impl Drafter for Oracle {
    fn draft(&mut self, sequence: SequenceId, tokens: &[u32], most: usize) -> Vec<u32> {
        let index = sequence.0 as usize - 1;
        let done = tokens.len() - self.prompts[index];
        let mut drafts: Vec<u32> =
            self.answers[index].iter().skip(done).take(most).copied().collect();
        self.turn += 1;
        if self.turn.is_multiple_of(3)
            && let Some(draft) = drafts.get_mut(self.turn as usize % 2)
        {
            *draft = (*draft + 1) % 90;
        }
        drafts
    }
}

fn policy(prefix_cache: bool, speculate: bool) -> Policy {
    Policy { prefix_cache: prefix_cache.into(), speculate, ..Policy::DEFAULT }
}

fn mock(stages: u16, policy: Policy) -> Served {
    let specs = cut(stages, Dtype::F32);
    let runners =
        specs.iter().enumerate().map(|(i, s)| runner(s, i as u16, MockConfig::default())).collect();
    Served::new(runners, &specs[0], policy)
}

fn cpu(tiny: &Tiny, ends: &[u32], policy: Policy) -> Served {
    let mut runners = Vec::new();
    for (i, &end) in ends.iter().enumerate() {
        let first = if i == 0 { 0 } else { ends[i - 1] };
        let (spec, sources) = tiny.stage(first..end, i == 0, i + 1 == ends.len(), 1, Isa::best());
        let mut runner = StageRunner::new(Box::new(CpuEngine::new()));
        runner.load(&spec, place(i as u16), &sources, &mut |_| {}).expect("loads");
        runners.push(runner);
    }
    let (spec, _) = tiny.stage(0..4, true, true, 1, Isa::best());
    Served::new(runners, &spec, policy)
}

/// `n` prompts of `shared` tokens in common and some of their own, with all ways to sample.
fn requests(n: u64, shared: u32, vocab: u32, new: u32) -> Vec<Request> {
    let request = |i: u64| {
        let common = (0..shared).map(|p| (p * 37 + 11) % vocab);
        let own = (0..1 + i as u32 % 5).map(|p| (p * 5 + i as u32 * 3 + 1) % vocab);
        let params = match i % 3 {
            0 => SamplingParams::greedy(),
            1 => SamplingParams { temperature: 0.8, ..SamplingParams::default() },
            _ => SamplingParams {
                temperature: 0.8,
                repetition_penalty: 1.3,
                frequency_penalty: 0.5,
                logprobs: Some(2),
                ..SamplingParams::default()
            },
        };
        (common.chain(own).collect(), params, 77 + i, new)
    };
    (0..n).map(request).collect()
}

/// The answers with cache and drafts on and off, all at once and one after the other.
fn all_say_the_same(requests: &[Request], serve: impl Fn(Policy) -> Served) {
    let run = |policy: Policy, at_once: bool, oracle: Option<Oracle>| {
        let mut served = serve(policy);
        if let Some(oracle) = oracle {
            served.scheduler.set_drafter(Box::new(oracle));
        }
        for request in requests {
            served.submit(request.clone());
            if !at_once {
                served.drain();
            }
        }
        served.finish()
    };
    let (plain, stats) = run(policy(false, false), true, None);
    assert_eq!((stats.prefix_query_tokens, stats.draft_tokens), (0, 0));
    for at_once in [true, false] {
        let (cached, stats) = run(policy(true, false), at_once, None);
        assert_eq!(cached, plain, "the cache changed an answer");
        assert!(stats.prefix_hit_tokens * 2 > stats.prefix_query_tokens, "{stats:?}");
        let oracle = Oracle {
            answers: plain.clone(),
            prompts: requests.iter().map(|r| r.0.len()).collect(),
            turn: 0,
        };
        let (drafted, stats) = run(policy(true, true), at_once, Some(oracle));
        assert_eq!(drafted, plain, "drafts changed an answer");
        if !at_once {
            assert!(stats.draft_tokens_accepted > 20, "{stats:?}");
            assert!(stats.draft_tokens_accepted < stats.draft_tokens, "{stats:?}");
        }
    }
    assert_eq!(run(policy(true, true), false, None).0, plain, "looking back changed an answer");
}

#[test]
fn the_mock_gives_the_same_tokens_with_cache_and_drafts() {
    for stages in [1, 2, 3] {
        let requests = requests(12, 60, VOCAB, 24);
        all_say_the_same(&requests, |policy| mock(stages, policy));
        let mut served = mock(stages, policy(true, true));
        requests.iter().for_each(|r| served.submit(r.clone()));
        let (answers, _) = served.finish();
        for (request, answer) in requests.iter().zip(answers).step_by(3) {
            assert_eq!(answer, expected_tokens(&common::config(), &request.0, 24));
        }
    }
}

#[test]
fn the_cpu_engine_gives_the_same_tokens_with_cache_and_drafts() {
    for types in [[TensorType::Q4_1, TensorType::Q8_0], [TensorType::F32, TensorType::F32]] {
        let tiny = Tiny::new(types[0], types[1]);
        for ends in [&[4][..], &[2, 4], &[1, 4, 4]] {
            all_say_the_same(&requests(9, 100, 96, 32), |policy| cpu(&tiny, ends, policy));
        }
    }
}

/// Few blocks: sequences lose theirs, and find them again or not.
#[test]
fn preemption_with_cache_and_drafts_changes_nothing() {
    let run = |policy: Policy| {
        let specs: Vec<StageSpec> = cut(2, Dtype::F32)
            .into_iter()
            .map(|mut spec| {
                spec.settings.kv_blocks = 30;
                spec
            })
            .collect();
        let runners = specs
            .iter()
            .enumerate()
            .map(|(i, s)| runner(s, i as u16, MockConfig::default()))
            .collect();
        let mut served = Served::new(runners, &specs[0], policy);
        requests(8, 12, VOCAB, 60).into_iter().for_each(|r| served.submit(r));
        served.finish()
    };
    let (plain, _) = run(policy(false, false));
    let (both, stats) = run(policy(true, true));
    assert!(stats.preemptions > 0 && stats.prefix_hit_tokens > 0, "{stats:?}");
    assert_eq!(both, plain);
}
