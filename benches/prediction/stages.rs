//! Stages of the real model, measured alone on one core.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use millrace_coordinator::models::{NoProgress, cache_dir, hash_manifest};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::{
    Engine as _, HeadWant, Isa, StageInput, StageOutput, StageSpec, TensorSource,
};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, ModelFiles};
use millrace_shared::wire::control::{EngineSettings, PROFILE_CONTEXT, ProfileSpec, StageProfile};
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

/// Steps that are timed in a round; the lower quartile counts: a usual step of a machine that does
/// nothing else.
const STEPS: u32 = 12;
/// Rounds through all stages; the fastest counts: what else runs on a machine comes and goes.
const ROUNDS: u32 = 3;
const BLOCK: u32 = 64;

/// Which layers, and which ends of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Part {
    pub(crate) first: u32,
    pub(crate) end: u32,
    pub(crate) last: bool,
}

/// Measures stages, and knows what it has measured.
pub(crate) struct Bench {
    pub(crate) files: ModelFiles,
    wanted: BTreeMap<Part, BTreeSet<u32>>,
    known: BTreeMap<(Part, u32), f64>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let mut files = ModelFiles::open(harness::model()).unwrap();
        // Hashes, by which packed weights are found.
        let cache = cache_dir().ok();
        let manifest = hash_manifest(&files, "model", cache.as_deref(), &mut NoProgress);
        files.tensors = manifest.unwrap().tensors;
        Self { files, wanted: BTreeMap::new(), known: BTreeMap::new() }
    }

    pub(crate) fn layers(&self) -> u32 {
        self.files.config.layers
    }

    /// What a node with one thread says of itself, the best of some.
    pub(crate) fn profile(&self, spec: &ProfileSpec) -> StageProfile {
        let one = |_| CpuEngine::new().profile(spec, 1).unwrap();
        let all: Vec<StageProfile> = (0..ROUNDS).map(one).collect();
        let least = |of: fn(&StageProfile) -> &[f64; 4]| {
            std::array::from_fn(|i| all.iter().map(|p| of(p)[i]).fold(f64::INFINITY, f64::min))
        };
        StageProfile {
            layer_seconds: least(|p| &p.layer_seconds),
            head_seconds: least(|p| &p.head_seconds),
        }
    }

    /// Notes a stage that is to be measured with so many decoding rows.
    pub(crate) fn want(&mut self, part: Part, rows: [u32; 2]) {
        self.wanted.entry(part).or_default().extend(rows);
    }

    /// Measures all that was noted.
    pub(crate) fn measure(&mut self) {
        for _ in 0..ROUNDS {
            for (&part, rows) in &self.wanted {
                let mut stage = self.load(part, rows.iter().copied().max().unwrap_or(1));
                for &rows in rows {
                    let seconds = stage.measure(rows);
                    let known = self.known.entry((part, rows)).or_insert(seconds);
                    *known = known.min(seconds);
                }
            }
        }
    }

    /// Seconds of a step.
    pub(crate) fn seconds(&self, part: Part, rows: u32) -> f64 {
        self.known[&(part, rows)]
    }

    fn load(&self, part: Part, rows: u32) -> Stage {
        let blocks = (PROFILE_CONTEXT + 2 * STEPS).div_ceil(BLOCK);
        let spec = StageSpec {
            config: self.files.config.clone(),
            layers: part.first..part.end,
            embed: part.first == 0,
            head: part.last,
            settings: EngineSettings {
                kv_blocks: rows * blocks,
                kv_block_size: BLOCK,
                kv_dtype: Dtype::F16,
                activation_dtype: Dtype::F32,
                max_batch_tokens: rows,
                max_num_seqs: rows,
                max_model_len: blocks * BLOCK,
            },
            threads: 1,
            host_threads: 1,
            isa: Isa::detect().unwrap(),
            packed_cache: cache_dir().ok().map(|c| c.join("packed")),
        };
        let source = |entry: &millrace_shared::model::TensorEntry| TensorSource {
            entry: entry.clone(),
            path: harness::model().to_owned(),
            offset: entry.offset,
        };
        let mut engine = CpuEngine::new();
        let sources: Vec<TensorSource> = self.files.tensors.iter().map(source).collect();
        engine.load(&spec, &sources, &mut |_| {}).unwrap();
        let table = |i: u32| TableUpdate {
            sequence: SequenceId(u64::from(i)),
            first: 0,
            blocks: (i * blocks..(i + 1) * blocks).collect(),
        };
        let width = self.files.config.hidden as usize;
        Stage {
            engine,
            part,
            width,
            tables: (0..rows).map(table).collect(),
            input: (0..rows as usize * width).map(|i| (i % 13) as f32 / 13.0 - 0.5).collect(),
        }
    }
}

struct Stage {
    engine: CpuEngine,
    part: Part,
    width: usize,
    tables: Vec<TableUpdate>,
    input: Vec<f32>,
}

impl Stage {
    /// Sequences in the middle of their answers, around the context that plans are made for.
    fn measure(&mut self, rows: u32) -> f64 {
        let mut times: Vec<f64> = (0..STEPS + 4)
            .map(|step| self.step(rows, PROFILE_CONTEXT - STEPS + step))
            .skip(4)
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 4]
    }

    fn step(&mut self, rows: u32, position: u32) -> f64 {
        let row = |i: u32| Row {
            sequence: SequenceId(u64::from(i)),
            sequence_epoch: 0,
            position,
            count: 1,
            want: Want::Sample,
        };
        let meta = StepMeta {
            rows: (0..rows).map(row).collect(),
            tables: std::mem::take(&mut self.tables),
            ..StepMeta::default()
        };
        let tokens: Vec<u32> = (0..rows).map(|i| 100 + 7 * i + position).collect();
        let want = vec![HeadWant::Top(1); rows as usize];
        let mut out = vec![0f32; rows as usize * self.width];
        let start = Instant::now();
        let input = match self.part.first {
            0 => StageInput::Tokens(&tokens),
            _ => StageInput::Hidden(&self.input[..rows as usize * self.width]),
        };
        let output = match self.part.last {
            true => StageOutput::Head { want: &want, sink: &mut |_| {} },
            false => StageOutput::Hidden(&mut out),
        };
        self.engine.step(&meta, input, output).unwrap();
        start.elapsed().as_secs_f64()
    }
}
