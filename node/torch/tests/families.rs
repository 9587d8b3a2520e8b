//! Every family by libtorch on the processor, against Hugging Face `transformers`, with the models and
//! the rig of the CPU engine's tests: f32 by the same rule; smaller types by how far they may be off.

#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/families/case.rs"]
mod case;
#[path = "../../engine/tests/families/gguf.rs"]
mod gguf;
#[path = "../../engine/tests/formats/rig.rs"]
mod rig;
#[path = "../../engine/tests/cpu_engine/tiny.rs"]
mod tiny;

use std::path::Path;

use case::{CASES, Case};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::quantize::{self, Options};
use millrace_engine::{Engine, Isa, StageSpec};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Activation, Dtype, ModelFiles, TensorType};
use millrace_shared::options::{TorchDtype, TorchOptions};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{StepMeta, TableUpdate, Want};
use millrace_torch::{Graphing, TorchEngine};
use rig::{answers, as_floats, deviations, pipeline_of, run, worst};
use tiny::{Pipeline, row};

fn torch(dtype: TorchDtype) -> Box<dyn Engine> {
    graphing(dtype, Graphing::Auto)
}

fn graphing(dtype: TorchDtype, graphing: Graphing) -> Box<dyn Engine> {
    let options = TorchOptions { torch_dtype: Some(dtype), ..TorchOptions::default() };
    Box::new(TorchEngine::new(options).graphing(graphing))
}

fn pipeline(files: &ModelFiles, ends: &[u32], dtype: TorchDtype) -> Pipeline {
    pipeline_of(files, ends, Isa::best(), &mut |_| torch(dtype))
}

#[test]
fn logits_and_answers_are_those_of_transformers() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let layers = files.config.layers;
        let (prompt, answer) = (case.tokens("prompt"), case.tokens("answer"));
        let known = (&prompt[..], &answer[..], &case.logits()[..]);
        let (all, found) = answers(case.name, known, pipeline(&files, &[layers], TorchDtype::F32));

        // Wherever it is cut, and however it comes in: the same but for rounding.
        let whole = as_floats(&found);
        for (ends, chunk) in [(&[1, 2, layers][..], 64), (&[layers], 7), (&[2, layers, layers], 1)]
        {
            let again = run(pipeline(&files, ends, TorchDtype::F32), &all, chunk);
            let deviation = worst(&again, &whole);
            assert!(deviation < 1e-4, "{} at {ends:?}, by {chunk}: {deviation}", case.name);
        }

        // With the sizes and the inputs of graphs, as far as their steps are decodes.
        for (ends, chunk) in [(&[layers][..], 1), (&[1, 2, layers], 1), (&[1, layers], 5)] {
            let rehearsed = &mut |_| graphing(TorchDtype::F32, Graphing::Rehearsed);
            let again = run(pipeline_of(&files, ends, Isa::best(), rehearsed), &all, chunk);
            let deviation = worst(&again, &whole);
            assert!(deviation < 1e-4, "{} as graphs at {ends:?}: {deviation}", case.name);
        }
    }
}

#[test]
fn stages_of_both_engines_make_one_pipeline() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let layers = files.config.layers;
        let prompt = case.tokens("prompt");
        for first in [0, 1] {
            let mixed = &mut |i: usize| match (i + first) % 2 {
                0 => torch(TorchDtype::F32),
                _ => Box::new(CpuEngine::new()),
            };
            let found = run(pipeline_of(&files, &[1, 2, layers], Isa::best(), mixed), &prompt, 13);
            let deviation = worst(&found, &case.logits());
            assert!(deviation < 1e-3, "{}: {deviation}", case.name);
        }
    }
}

#[test]
fn gguf_files_say_what_llama_cpp_says() {
    for case in CASES.map(Case::read) {
        let folder = tempfile::tempdir().unwrap();
        let files = ModelFiles::open(&gguf::write(&case, folder.path())).unwrap();
        let layers = files.config.layers;
        let found = run(pipeline(&files, &[layers], TorchDtype::F32), &case.tokens("prompt"), 64);
        let deviation = worst(&found, &case::logits(&case.of_llama_cpp()));
        // llama.cpp has a table of f16 for GELU.
        let gelu = files.config.features.activation == Activation::GeluTanh;
        assert!(deviation < if gelu { 5e-3 } else { 1e-3 }, "{}: {deviation}", case.name);
    }
}

/// Types that matrices may be kept as, and how far logits of these models (three layers of random
/// weights, nothing that training made robust) may be off.
const SMALLER: [(TorchDtype, f64); 4] = [
    (TorchDtype::F16, 0.01),
    (TorchDtype::Bf16, 0.05),
    (TorchDtype::Int8, 0.1),
    // Of int4, matrices are compared one by one (`matrix`), and models whose files have 4 bits below.
    (TorchDtype::Fp8, 0.6),
];

#[test]
fn smaller_types_are_as_close_as_they_should_be() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let prompt = case.tokens("prompt");
        for (dtype, bound) in SMALLER {
            let found = run(pipeline(&files, &[1, files.config.layers], dtype), &prompt, 64);
            let mut all = deviations(&found, &case.logits());
            all.sort_by(f64::total_cmp);
            // A rounding may choose another expert for a row: that says nothing of the others.
            let at =
                if files.config.features.experts.is_some() { all.len() / 2 } else { all.len() - 1 };
            assert!(all[at] < bound, "{} {}: {all:?}", case.name, dtype.as_str());
        }
    }
}

#[test]
fn four_bits_of_a_file_are_kept_as_they_are() {
    for (family, to) in [("llama", TensorType::Q4_0), ("qwen3", TensorType::Q4_1)] {
        let case = Case::read(family);
        let folder = case.folder(TensorType::F32, 1);
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("small");
        let plan = quantize::plan_of(folder.path(), &Options::new(to)).unwrap();
        plan.write(&target, false, 2, &mut |_| {}).unwrap();
        let files = ModelFiles::open(&target).unwrap();
        let of = |dtype| {
            run(pipeline(&files, &[files.config.layers], dtype), &case.tokens("prompt"), 64)
        };
        let deviation = worst(&of(TorchDtype::Int4), &as_floats(&of(TorchDtype::F32)));
        // The embedding, which is the head, has 8 bits.
        assert!(deviation < 0.02, "{family}: {deviation}");
    }
}

#[test]
fn published_quantised_checkpoints_say_what_their_weights_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/testdata/formats");
    for (name, four_bits) in [
        ("gptq-asym-32", true),
        ("gptq-v2-all", true),
        ("gptq-act-32", false),
        ("awq-32", true),
        ("fp8-tensor", false),
        ("fp8-channel", false),
        ("fp8-block", false),
    ] {
        let text = std::fs::read(folder.join(format!("{name}.json"))).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let case = Case { name, json };
        let files = ModelFiles::open(&folder.join(name)).unwrap();
        let of = |dtype| run(pipeline(&files, &[1], dtype), &case.tokens("prompt"), 64);
        let deviation = worst(&of(TorchDtype::F32), &case.logits());
        assert!(deviation < 1e-3, "{name}: {deviation}");
        if four_bits {
            let deviation = worst(&of(TorchDtype::Int4), &case.logits());
            assert!(deviation < 0.02, "{name} as int4: {deviation}");
        }
    }
}

/// A stage with the whole model, for several sequences whose blocks lie scattered.
fn together(files: &ModelFiles, how: Graphing) -> Pipeline {
    let spec = StageSpec {
        config: files.config.clone(),
        layers: 0..files.config.layers,
        embed: true,
        head: true,
        settings: EngineSettings {
            kv_blocks: 64,
            kv_block_size: 4,
            kv_dtype: Dtype::F32,
            activation_dtype: Dtype::F32,
            max_batch_tokens: 256,
            max_num_seqs: 8,
            max_model_len: 64,
        },
        threads: 1,
        host_threads: 1,
        isa: Isa::best(),
        packed_cache: None,
    };
    let mut engine = graphing(TorchDtype::F32, how);
    engine.load(&spec, &rig::sources(files), &mut |_| {}).unwrap();
    Pipeline::of(vec![engine], files.config.hidden as usize, 4)
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let prompt = case.tokens("prompt");
        // Each says something else, so that nobody's keys pass for another's.
        let said: Vec<Vec<u32>> = (0..6)
            .map(|i| {
                let mut said = prompt.clone();
                said.rotate_left(i);
                said
            })
            .collect();
        let alone = |said: &Vec<u32>| {
            let alone = pipeline(&files, &[files.config.layers], TorchDtype::F32);
            as_floats(&run(alone, said, 64))
        };
        let alone: Vec<_> = said.iter().map(alone).collect();
        for how in [Graphing::Auto, Graphing::Rehearsed] {
            batch(&case, &files, how, (&said, &alone));
        }
    }
}

/// Six sequences at once, whose logits must be those that each has alone.
fn batch(
    case: &Case,
    files: &ModelFiles,
    how: Graphing,
    (said, alone): (&[Vec<u32>], &[Vec<Vec<f64>>]),
) {
    let mut pipeline = together(files, how);
    // Beginnings of these lengths, blocks dealt out in turns and backwards.
    let lens = [1, 30, 2, 17, 1, 36];
    let table = |(i, _): (usize, &usize)| TableUpdate {
        sequence: SequenceId(i as u64),
        first: 0,
        blocks: (0..10).map(|b| 63 - (b * 6 + i as u32)).collect(),
    };
    let mut tables: Vec<TableUpdate> = lens.iter().enumerate().map(table).collect();
    let mut done = [0; 6];
    for step in 0..5 {
        // At once, then one by one, two of them in runs.
        let counts: Vec<usize> = (0..6)
            .map(|i| match step {
                0 => lens[i],
                3 if i % 3 == 1 => 2,
                _ => 1,
            })
            .collect();
        let rows = (0..6).map(|i| row(i as u64, done[i], counts[i], Want::Score { top_k: 1 }));
        let tokens: Vec<u32> =
            (0..6).flat_map(|i| said[i][done[i]..done[i] + counts[i]].to_vec()).collect();
        let meta = StepMeta {
            rows: rows.collect(),
            tables: std::mem::take(&mut tables),
            ..StepMeta::default()
        };
        for (i, position, logits) in pipeline.step(&meta, &tokens).unwrap() {
            let deviation = worst(&[logits], &[alone[i][position as usize].clone()]);
            assert!(deviation < 1e-4, "{} {how:?} {i} at {position}: {deviation}", case.name);
        }
        (0..6).for_each(|i| done[i] += counts[i]);
    }
}
