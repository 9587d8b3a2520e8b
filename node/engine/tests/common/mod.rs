//! Pipelines of mock stages, driven by hand.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::ops::Range;

use millrace_engine::mock::{MockConfig, MockEngine, model_config};
use millrace_engine::stage::{StagePlace, StageRunner};
use millrace_engine::{Isa, StageSpec};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId, SequenceId, StageIndex};
use millrace_shared::model::{Dtype, ModelConfig};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{
    FrameHeader, FrameKind, OpenMeta, ResultMeta, Row, RowOutcome, SequenceOpen, StepMeta,
    TableUpdate, Want,
};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;

pub const VOCAB: u32 = 300;
pub const LAYERS: u32 = 6;
pub const BLOCK: u32 = 4;

pub fn settings(dtype: Dtype) -> EngineSettings {
    EngineSettings {
        kv_blocks: 64,
        kv_block_size: BLOCK,
        kv_dtype: Dtype::F32,
        activation_dtype: dtype,
        max_batch_tokens: 64,
        max_num_seqs: 4,
        max_model_len: 128,
    }
}

pub fn spec(layers: Range<u32>, embed: bool, head: bool, dtype: Dtype) -> StageSpec {
    StageSpec {
        config: config(),
        layers,
        embed,
        head,
        settings: settings(dtype),
        threads: 1,
        host_threads: 1,
        isa: Isa::Scalar,
        packed_cache: None,
    }
}

pub fn config() -> ModelConfig {
    model_config(LAYERS, VOCAB)
}

pub fn place(stage: u16) -> StagePlace {
    StagePlace { pipeline: PipelineId(1), epoch: Epoch(1), stage: StageIndex(stage) }
}

pub fn runner(spec: &StageSpec, stage: u16, mock: MockConfig) -> StageRunner {
    let mut runner = StageRunner::new(Box::new(MockEngine::new(mock)));
    runner.load(spec, place(stage), &[], &mut |_| {}).expect("the mock loads");
    runner
}

/// Even cuts; with more stages than layers the last ones hold none.
pub fn cut(stages: u16, dtype: Dtype) -> Vec<StageSpec> {
    let at = |i: u16| LAYERS * u32::from(i) / u32::from(stages);
    (0..stages).map(|i| spec(at(i)..at(i + 1), i == 0, i + 1 == stages, dtype)).collect()
}

/// Stages in a row, and what a scheduler would know.
pub struct Pipeline {
    pub stages: Vec<StageRunner>,
    pub next_batch: u64,
}

impl Pipeline {
    pub fn new(stages: u16, dtype: Dtype, mocks: Vec<MockConfig>) -> Self {
        let mut mocks = mocks.into_iter();
        let stages = cut(stages, dtype)
            .iter()
            .enumerate()
            .map(|(i, spec)| runner(spec, i as u16, mocks.next().unwrap_or_default()))
            .collect();
        Self { stages, next_batch: 0 }
    }

    pub fn open(&mut self, sequence: u64, prompt: &[u32], params: SamplingParams) {
        let open = open(sequence, prompt, params);
        let last = self.stages.last_mut().expect("stages");
        last.open(Epoch(1), OpenMeta { opens: vec![open] }).expect("last stage");
    }

    /// One micro-batch through all stages.
    pub fn step(&mut self, meta: &StepMeta, tokens: &[u32]) -> ResultMeta {
        self.next_batch += 1;
        let mut frame = step_frame(self.next_batch, meta, tokens);
        for stage in &mut self.stages {
            // Over the wire and back: what is sent must parse.
            let sent = stage.run(&frame).expect("good frames");
            frame = Frame::parse(sent.into_buffer()).expect("sealed");
        }
        assert_eq!(frame.header().kind, FrameKind::Results);
        assert_eq!(frame.header().micro_batch, MicroBatchId(self.next_batch));
        frame.meta().expect("results")
    }

    /// Prefills in chunks, then decodes greedily: `n` tokens.
    pub fn generate(&mut self, sequence: u64, prompt: &[u32], chunk: usize, n: usize) -> Vec<u32> {
        self.open(sequence, prompt, SamplingParams::greedy());
        let mut log = prompt.to_vec();
        let mut done = 0;
        while log.len() < prompt.len() + n {
            let count = if done < prompt.len() { chunk.min(prompt.len() - done) } else { 1 };
            let sample = done + count == log.len();
            let want = if sample { Want::Sample } else { Want::None };
            let mut meta = one_row(sequence, done as u32, count as u32, want);
            meta.tables = blocks(sequence, done, count);
            let results = self.step(&meta, &log[done..done + count]);
            done += count;
            match &results.rows[0].outcome {
                RowOutcome::Token { token, .. } if sample => log.push(*token),
                RowOutcome::Done if !sample => {}
                other => panic!("unexpected outcome {other:?}"),
            }
        }
        log.split_off(prompt.len())
    }
}

pub fn open(sequence: u64, prompt: &[u32], params: SamplingParams) -> SequenceOpen {
    SequenceOpen {
        sequence: SequenceId(sequence),
        tokens: prompt.to_vec(),
        prompt_len: prompt.len() as u32,
        params,
        seed: 7,
        constrained: false,
    }
}

/// The blocks that positions `done..done + count` need anew. Tables of different sequences are
/// interleaved and run backwards, so that no accident makes them right.
pub fn blocks(sequence: u64, done: usize, count: usize) -> Vec<TableUpdate> {
    let first = done.div_ceil(BLOCK as usize);
    let end = (done + count).div_ceil(BLOCK as usize);
    if first == end {
        return Vec::new();
    }
    let blocks = (first..end).map(|i| 63 - (i as u32 * 3 + sequence as u32 % 3)).collect();
    vec![TableUpdate { sequence: SequenceId(sequence), first: first as u32, blocks }]
}

pub fn row(sequence: u64, position: u32, count: u32, want: Want) -> Row {
    Row { sequence: SequenceId(sequence), sequence_epoch: 0, position, count, want }
}

pub fn one_row(sequence: u64, position: u32, count: u32, want: Want) -> StepMeta {
    StepMeta { rows: vec![row(sequence, position, count, want)], ..StepMeta::default() }
}

pub fn header(batch: u64) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Step,
        dtype: Dtype::U32,
        pipeline: PipelineId(1),
        epoch: Epoch(1),
        micro_batch: MicroBatchId(batch),
        rows: 0,
        meta_len: 0,
        payload_len: 0,
        crc: 0,
        ready: Stamp::NONE,
    }
}

pub fn frame(header: FrameHeader, meta: &StepMeta, payload: &[u8]) -> Frame {
    let mut frame = Frame::build(header, meta, payload.len()).expect("within limits");
    frame.payload_mut().copy_from_slice(payload);
    frame.seal()
}

pub fn step_frame(batch: u64, meta: &StepMeta, tokens: &[u32]) -> Frame {
    let header = FrameHeader { rows: tokens.len() as u32, ..header(batch) };
    frame(header, meta, bytemuck::cast_slice(tokens))
}
