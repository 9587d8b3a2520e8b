//! Attention over the paged KV cache, and writing to it.

use criterion::Criterion;
use millrace_engine::cpu::CpuBackend;
use millrace_engine::model::{Backend, BlockTables, Span};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{
    Dtype, Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle,
};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{StepMeta, TableUpdate};

use crate::{Bench, Tensor, Work, new_backend, tensor, values};

const LAYERS: usize = 30;
const BLOCK: u32 = 64;

/// A KV cache of a small model that is full to `depth`.
struct Context {
    backend: CpuBackend,
    kv: <CpuBackend as Backend>::Kv,
    tables: BlockTables,
    qkv: Tensor,
    out: Tensor,
    spans: Vec<Span>,
    layer: usize,
}

fn config() -> ModelConfig {
    let rope = RopeConfig {
        base: 1e5,
        dim: 64,
        style: RopeStyle::Interleaved,
        scaling: RopeScaling::Linear(1.0),
    };
    ModelConfig {
        family: Family::Llama,
        layers: LAYERS as u32,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49152,
        context: 8192,
        rms_eps: 1e-5,
        rope,
        tied_head: true,
        rope_factors: false,
        features: Features::default(),
    }
}

impl Context {
    /// `sequences` at `depth`, of which each has `count` positions to compute.
    fn new(mut backend: CpuBackend, dtype: Dtype, depth: u32, sequences: u32, count: u32) -> Self {
        let per_sequence = (depth + count).div_ceil(BLOCK);
        let settings = EngineSettings {
            kv_blocks: per_sequence * sequences,
            kv_block_size: BLOCK,
            kv_dtype: dtype,
            activation_dtype: Dtype::F32,
            max_batch_tokens: 64,
            max_num_seqs: sequences,
            max_model_len: per_sequence * BLOCK,
        };
        let kv = backend.kv(0..LAYERS as u32, &config(), &settings, None).expect("memory");
        backend.touch().expect("memory");
        let mut tables = BlockTables::new(&settings);
        let update = |i: u32| TableUpdate {
            sequence: SequenceId(i.into()),
            first: 0,
            blocks: (i * per_sequence..(i + 1) * per_sequence).collect(),
        };
        let all = (0..sequences).map(update).collect();
        tables.apply(&StepMeta { tables: all, ..StepMeta::default() });
        let spans = (0..sequences).map(|i| Span {
            slot: tables.slot(SequenceId(i.into())).expect("just opened"),
            position: depth,
            count: count as usize,
            start: (i * count) as usize,
        });
        let spans: Vec<Span> = spans.collect();
        let width = 576 + 2 * 192;
        let qkv = tensor(&mut backend, 64, width, false);
        let out = backend.tensor(64, 576, true).expect("memory");
        let mut context = Self { backend, kv, tables, qkv, out, spans, layer: 0 };
        context.fill(depth + count);
        context.backend.upload(&values((sequences * count) as usize, width), &mut context.qkv);
        context
    }

    fn fill(&mut self, positions: u32) {
        for span in self.spans.clone() {
            for position in (0..positions).step_by(64) {
                let count = (positions - position).min(64) as usize;
                let spans = [Span { position, count, start: 0, ..span }];
                for layer in 0..LAYERS {
                    let Self { backend, kv, tables, qkv, .. } = self;
                    backend.write_kv(qkv, kv, layer, &spans, tables);
                }
            }
        }
    }

    fn attention(&mut self) {
        self.layer = (self.layer + 1) % LAYERS;
        let Self { backend, kv, tables, qkv, out, spans, layer } = self;
        backend.attention(qkv, kv, *layer, spans, tables, out);
    }

    fn write(&mut self) {
        self.layer = (self.layer + 1) % LAYERS;
        let Self { backend, kv, tables, qkv, spans, layer, .. } = self;
        backend.write_kv(qkv, kv, *layer, spans, tables);
    }
}

pub(crate) fn attention(c: &mut Criterion, bench: &mut Bench) {
    let (isa, threads) = (bench.limits.isa, bench.limits.threads);
    for dtype in [Dtype::F16, Dtype::Int8] {
        let mut group = c.benchmark_group(format!("attention/{}", dtype.as_str()));
        let per_position = config().kv_bytes_per_position(dtype) as usize;
        for depth in [128, 1024, 4096_u32] {
            for (sequences, count) in [(1, 1), (16, 1), (1, 64)] {
                if depth == 4096 && sequences > 1 {
                    continue;
                }
                let make =
                    |_| Context::new(new_backend(isa, threads), dtype, depth, sequences, count);
                let (queries, stored) = ((sequences * count) as usize, depth + count / 2);
                let bytes = per_position * (sequences * (depth + count)) as usize;
                let macs = 2 * 576 * queries * stored as usize;
                let (int8_macs, float_macs) =
                    if dtype == Dtype::Int8 { (macs, 0) } else { (0, macs) };
                let work = Work { int8_macs, float_macs, bytes, set: bytes * LAYERS };
                let what = if count > 1 { "prefill" } else { "decode" };
                let name = format!("{} {what} {queries} at {depth}", dtype.as_str());
                bench.measure(
                    &mut group,
                    ("attention", &name),
                    &work,
                    &mut None,
                    make,
                    Context::attention,
                );
            }
        }
        let make = |_| Context::new(new_backend(isa, threads), dtype, 128, 1, 64);
        let bytes = 64 * (per_position + 2 * 192 * 4);
        let work = Work { int8_macs: 0, float_macs: 0, bytes, set: bytes };
        let name = format!("{} x64", dtype.as_str());
        bench.measure(&mut group, ("write_kv", &name), &work, &mut None, make, Context::write);
        group.finish();
    }
}
