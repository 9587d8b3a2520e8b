//! Embeddings of the CPU engine: what `transformers` makes of the same text, and the same to the bit
//! wherever the model is cut, however the text is chunked, and whatever runs beside it.

#![allow(clippy::unwrap_used)]

#[path = "families/case.rs"]
mod case;
#[path = "formats/rig.rs"]
mod rig;
#[path = "cpu_engine/tiny.rs"]
mod tiny;

use case::{CASES, Case};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::stage::{StagePlace, StageRunner};
use millrace_engine::{Isa, StageSpec};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId, SequenceId, StageIndex};
use millrace_shared::model::{Dtype, ModelFiles, TensorType};
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{
    FrameHeader, FrameKind, OpenMeta, ResultMeta, Row, RowOutcome, SequenceOpen, StepMeta, Want,
};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;
use tiny::{row, tables};

/// Another sequence, which decodes beside the one that is embedded.
const COMPANY: u64 = 2;

/// Stages that end at these layers, as nodes run them.
struct Pipeline {
    stages: Vec<StageRunner>,
    batch: u64,
}

impl Pipeline {
    fn new(files: &ModelFiles, ends: &[u32], threads: usize, isa: Isa) -> Self {
        let sources = rig::sources(files);
        let stage = |i: usize| {
            let alone = rig::spec(files, ends, i, isa);
            let settings =
                EngineSettings { kv_blocks: 24, max_num_seqs: 4, ..alone.settings.clone() };
            let spec = StageSpec { settings, threads, host_threads: threads, ..alone };
            let pipeline = PipelineId(1);
            let place = StagePlace { pipeline, epoch: Epoch(1), stage: StageIndex(i as u16) };
            let mut runner = StageRunner::new(Box::new(CpuEngine::new()));
            runner.load(&spec, place, &sources, &mut |_| {}).unwrap();
            runner
        };
        Self { stages: (0..ends.len()).map(stage).collect(), batch: 0 }
    }

    fn open(&mut self, sequence: u64, tokens: &[u32]) {
        let open = SequenceOpen {
            sequence: SequenceId(sequence),
            tokens: tokens.to_vec(),
            prompt_len: tokens.len() as u32,
            params: SamplingParams::greedy(),
            seed: 7,
            constrained: false,
        };
        self.stages.last_mut().unwrap().open(Epoch(1), OpenMeta { opens: vec![open] }).unwrap();
    }

    fn step(&mut self, meta: &StepMeta, tokens: &[u32]) -> ResultMeta {
        self.batch += 1;
        let header = FrameHeader {
            kind: FrameKind::Step,
            dtype: Dtype::U32,
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            micro_batch: MicroBatchId(self.batch),
            rows: tokens.len() as u32,
            meta_len: 0,
            payload_len: 0,
            crc: 0,
            ready: Stamp::NONE,
        };
        let mut frame = Frame::build(header, meta, tokens.len() * 4).unwrap();
        frame.payload_mut().copy_from_slice(bytemuck::cast_slice(tokens));
        let mut frame = frame.seal();
        for stage in &mut self.stages {
            frame = Frame::parse(stage.run(&frame).unwrap().into_buffer()).unwrap();
        }
        frame.meta().unwrap()
    }

    /// Embeds in chunks; with `company` another sequence has a row in each step.
    fn embed(&mut self, tokens: &[u32], chunk: usize, pooling: Pooling, company: bool) -> Vec<f32> {
        self.open(1, tokens);
        self.open(COMPANY, tokens);
        for (i, some) in tokens.chunks(chunk).enumerate() {
            let last = (i + 1) * chunk >= tokens.len();
            let want = match (pooling, last) {
                (pooling, true) => Want::Embed { pooling },
                (Pooling::Mean, false) => Want::Sum,
                (Pooling::Last, false) => Want::None,
            };
            let mut rows: Vec<Row> = vec![row(1, i * chunk, some.len(), want)];
            let mut ids = some.to_vec();
            let mut updates = Vec::new();
            if i == 0 {
                updates.extend(tables(1, tokens.len(), 16, 0));
                updates.extend(tables(COMPANY, tokens.len(), 16, 8));
            }
            if company {
                rows.insert(0, row(COMPANY, i, 1, Want::Sample));
                ids.insert(0, tokens[i]);
            }
            let meta = StepMeta { rows, tables: updates, ..StepMeta::default() };
            let results = self.step(&meta, &ids);
            match (&results.rows.last().unwrap().outcome, last) {
                (RowOutcome::Embedding(vector), true) => return vector.clone(),
                (RowOutcome::Done, false) => {}
                (other, _) => panic!("unexpected outcome {other:?}"),
            }
        }
        panic!("no embedding")
    }
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|x| x.to_bits()).collect()
}

/// The head's rows, as `transformers` has them.
fn head(case: &Case, width: usize) -> Vec<Vec<f64>> {
    let tensors = case.tensors();
    let named = |end: &str| tensors.iter().find(|(name, ..)| name.ends_with(end));
    let (_, _, data) = named("lm_head.weight")
        .or_else(|| named("embed_tokens.weight"))
        .or_else(|| named("wte.weight"))
        .unwrap();
    data.chunks(width).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

/// Logits are the head's products with the hidden state, so those of an embedding are `transformers`'
/// own but for a factor, and those of a mean their mean.
#[test]
fn embeddings_are_of_the_hidden_states_of_transformers() {
    let mut checked = 0;
    for case in CASES.map(Case::read) {
        // What a soft cap has flattened cannot be told apart any more.
        if case.json["config"]["final_logit_softcapping"].is_f64() {
            continue;
        }
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let (width, layers) = (files.config.hidden as usize, files.config.layers);
        let (prompt, logits, head) = (case.tokens("prompt"), case.logits(), head(&case, width));
        let mean = |i: usize| logits.iter().map(|l| l[i]).sum::<f64>() / logits.len() as f64;
        for pooling in [Pooling::Mean, Pooling::Last] {
            let expected: Vec<f64> = match pooling {
                Pooling::Mean => (0..head.len()).map(mean).collect(),
                Pooling::Last => logits.last().unwrap().clone(),
            };
            let mut pipeline = Pipeline::new(&files, &[1, layers], 1, Isa::best());
            let vector = pipeline.embed(&prompt, 64, pooling, false);
            assert_eq!(vector.len(), width);
            let dot = |row: &Vec<f64>| -> f64 {
                row.iter().zip(&vector).map(|(w, &x)| w * f64::from(x)).sum()
            };
            let found: Vec<f64> = head.iter().map(dot).collect();
            let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            // The length of the hidden state, which the embedding has not.
            let length = product(&expected, &found) / product(&found, &found);
            let size = expected.iter().fold(1f64, |m, x| m.max(x.abs()));
            let worst = expected.iter().zip(&found).map(|(e, f)| (e - length * f).abs() / size);
            let worst = worst.fold(0.0, f64::max);
            assert!(length > 0.0 && worst < 1e-3, "{} {pooling:?}: {worst}", case.name);
            checked += 1;
        }
    }
    assert_eq!(checked, 2 * (CASES.len() - 1), "all but Gemma 2");
}

#[test]
fn cuts_chunks_company_threads_and_instruction_sets_change_nothing() {
    for name in ["llama", "gemma3", "qwen3_moe", "gpt2"] {
        let case = Case::read(name);
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let (prompt, layers) = (case.tokens("prompt"), files.config.layers);
        for pooling in [Pooling::Mean, Pooling::Last] {
            let mut whole = Pipeline::new(&files, &[layers], 1, Isa::Scalar);
            let expected = bits(&whole.embed(&prompt, 64, pooling, false));
            let pieces: [(&[u32], usize, usize, bool); 5] = [
                (&[layers], 1, 1, true),
                (&[layers], 7, 2, false),
                (&[1, layers], 13, 1, true),
                (&[1, 2, layers], 33, 2, true),
                // The last stage has the head alone.
                (&[2, layers, layers], 5, 1, false),
            ];
            for (ends, chunk, threads, company) in pieces {
                let mut pipeline = Pipeline::new(&files, ends, threads, Isa::best());
                let found = bits(&pipeline.embed(&prompt, chunk, pooling, company));
                let what = format!("{name} {pooling:?} {ends:?} {chunk} {threads} {company}");
                assert!(found == expected, "{what}");
            }
        }
    }
}
