//! The real model made smaller by each kind of method: the result serves at one stage and at three, with
//! the same tokens and logits, bit for bit. And a recipe's report says what the planner says.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use harness::ask::{self, Answer};
use harness::fixtures::{self, Reference};
use harness::local::{Local, Shape};
use harness::{alone, block_on, model, model_arg, processes};
use millrace_compress::compare::Terms;
use millrace_compress::survey::{survey, variants};
use millrace_compress::{Settings, Source, Step, apply, texts};
use millrace_coordinator::text::TextModel;
use millrace_shared::model::{Description, Dtype, ModelFiles, TensorType};
use millrace_shared::wire::rpc::{PositionScore, Prompt};

/// Tokens of an answer.
const ANSWER: u32 = 16;

/// Carries steps out, one after the other.
fn made(dir: &Path, name: &str, steps: &[&str], cases: &[Reference]) -> PathBuf {
    let calibration: Vec<u32> = cases.iter().flat_map(Reference::forced).collect();
    let settings = Settings {
        calibration: &calibration,
        known: None,
        store: TensorType::Q8_0,
        threads: 2,
        overwrite: false,
    };
    let mut current = model().to_owned();
    for (i, step) in steps.iter().enumerate() {
        let target = dir.join(format!("{name}{i}.gguf"));
        let source = Source::open(&current).unwrap();
        apply(&source, &target, &Step::parse(step).unwrap(), &settings, &mut |_| {}).unwrap();
        current = target;
    }
    current
}

/// What a cluster of so many stages makes of the fixtures' prompts.
fn said(path: &Path, stages: u32, cases: &[Reference]) -> (Vec<Vec<PositionScore>>, Vec<Answer>) {
    let cluster = Local::serve(path, Shape { stages, ..Shape::default() });
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        let (mut scores, mut answers) = (Vec::new(), Vec::new());
        for case in cases {
            let tokens = case.token_ids.clone();
            scores.push(ask::score(&client, tokens.clone(), fixtures::TOP).await.unwrap());
            let prompt = Prompt::Tokens(tokens);
            answers.push(ask::generate(&client, prompt, ask::greedy(ANSWER)).await.unwrap());
        }
        client.close().await;
        (scores, answers)
    })
}

/// As numbers they might be equal and differ.
fn bits(scores: &[Vec<PositionScore>]) -> Vec<(u32, Vec<(u32, u32)>)> {
    let one = |score: &PositionScore| {
        let top = score.top_logits.iter().map(|&(id, logit)| (id, logit.to_bits())).collect();
        (score.log_sum_exp.to_bits(), top)
    };
    scores.iter().flatten().map(one).collect()
}

/// The file at one stage and at three; what it answers.
fn serves_alike(name: &str, steps: &[&str]) -> ModelFiles {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cases = fixtures::references();
    let path = made(dir.path(), name, steps, &cases);
    cases.truncate(3);
    let (scores, answers) = said(&path, 1, &cases);
    assert!(answers.iter().all(|a| a.tokens.len() == ANSWER as usize), "{name}");
    let (three, same) = said(&path, 3, &cases);
    assert_eq!(answers, same, "{name}");
    assert_eq!(bits(&scores), bits(&three), "{name}");
    ModelFiles::open(&path).unwrap()
}

#[test]
fn quantised() {
    let files = serves_alike("quantised", &["method = 'quantise', type = 'q4_k'"]);
    assert!(files.tensors.iter().any(|t| t.dtype == TensorType::Q4_K));
}

#[test]
fn pruned() {
    let step = "method = 'magnitude', sparsity = 0.5, pattern = 'tile'";
    let files = serves_alike("pruned", &[step]);
    assert_eq!(files.config.layers, 30);
}

/// Files without their zeros serve what the files with them do, to the bit.
#[test]
fn without_zeros() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cases = fixtures::references();
    cases.truncate(2);
    let tiles = "method = 'magnitude', sparsity = 0.5, pattern = 'tile'";
    let eight = "method = 'quantise', type = 'q8_0'";
    let dense = made(dir.path(), "dense", &[tiles, eight], &cases);
    let (scores, answers) = said(&dense, 3, &cases);
    let all = ModelFiles::open(&dense).unwrap().weight_bytes();
    // Weights that share a scale cannot be kept one by one: those are floats.
    let floats = "method = 'quantise', type = 'f32'";
    for (form, steps) in [("tiles", &[][..]), ("csr", &[floats]), ("bitmask", &[floats])] {
        let storage = format!("method = 'storage', form = '{form}'");
        let first = [tiles, eight];
        let steps: Vec<&str> = first.iter().chain(steps).copied().chain([&*storage]).collect();
        let sparse = made(dir.path(), form, &steps, &cases);
        let files = ModelFiles::open(&sparse).unwrap();
        assert!(files.tensors.iter().any(|t| t.is_part()), "{form}");
        if form == "tiles" {
            assert!(files.weight_bytes() < all * 2 / 3, "{} of {all}", files.weight_bytes());
            let (same, answered) = said(&sparse, 3, &cases);
            assert_eq!((bits(&same), &answered), (bits(&scores), &answers), "{form}");
            continue;
        }
        // Products with floats round nothing: other bits than those in eight, the same at any cut.
        let (one, three) = (said(&sparse, 1, &cases), said(&sparse, 3, &cases));
        assert_eq!((bits(&one.0), one.1), (bits(&three.0), three.1), "{form}");
    }
}

/// Factors of some layers alone: decompositions take their time.
#[test]
fn factored() {
    let steps = [
        "method = 'keep-layers', layers = [0, 1, 2, 14, 28, 29]",
        "method = 'low-rank', size = 0.5",
    ];
    let files = serves_alike("factored", &steps);
    for layer in 0..6 {
        for inner in ["attn_q_in", "attn_output_in", "ffn_gate_in", "ffn_down_in"] {
            let name = format!("blk.{layer}.{inner}.weight");
            assert!(files.tensors.iter().any(|t| t.name == name), "{name}");
        }
    }
}

#[test]
fn smaller_in_shape() {
    let steps = [
        "method = 'drop-layers', count = 21",
        "method = 'drop-heads', count = 1",
        "method = 'drop-channels', fraction = 0.25",
    ];
    let config = serves_alike("smaller", &steps).config;
    assert_eq!((config.layers, config.kv_heads, config.heads, config.ffn), (9, 2, 6, 1152));
}

/// Methods that look at what matrices see lose less than their naive counterparts of equal size: on a text
/// that no calibration saw.
#[test]
fn calibrated_methods_are_better_on_text_that_they_did_not_see() {
    let _turn = alone();
    let tokenizer = TextModel::of(&Description::open(model()).unwrap()).unwrap().tokenizer;
    let ids = |text: &str| tokenizer.encode(text, true).unwrap();
    let (mut calibration, mut held_out) = (ids(texts::CALIBRATION), ids(texts::HELD_OUT));
    calibration.truncate(2048);
    held_out.truncate(512);
    let pairs = [
        ("q4_0", "q4_0 imatrix"),
        ("q4_0", "q4_0 gptq"),
        ("magnitude 50 %", "wanda 50 %"),
        ("wanda 50 %", "sparsegpt 50 %"),
        ("svd 80 %", "svd aware 80 %"),
    ];
    let is_asked =
        |name: &str| pairs.iter().any(|(naive, better)| [*naive, better].contains(&name));
    let mut chosen = variants(model(), None).unwrap();
    chosen.retain(|v| is_asked(&v.name));
    let settings = Settings {
        calibration: &calibration,
        known: None,
        store: TensorType::F16,
        threads: 2,
        overwrite: true,
    };
    let terms = Terms { window: 512, threads: 2, kv_dtype: Dtype::F16 };
    let all =
        survey(model(), &chosen, &held_out, &settings, (terms, None), &mut |_, _| {}).unwrap();
    let kl = |name: &str| {
        let entry = all.iter().find(|e| e.name == name).unwrap();
        assert_eq!(entry.failed, None, "{name}");
        entry.quality.mean_kl.unwrap()
    };
    for (naive, better) in pairs {
        assert!(kl(better) < 0.9 * kl(naive), "{better}: {}, {naive}: {}", kl(better), kl(naive));
    }
}

/// The fewest machines before and after are those that `millrace plan` finds.
#[test]
fn a_recipe_tells_how_many_machines_suffice() {
    const KIND: &str = "cpu-2c-1g";
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("held-out.txt"), "The mill stood where the river turned. ".repeat(8))
        .unwrap();
    let recipe = format!(
        "model = '{}'\noutput = 'small.gguf'\nevaluation = 'held-out.txt'\n\
         [[step]]\nmethod = 'keep-layers'\nlayers = [0, 1, 2, 27, 28, 29]\n\
         [[step]]\nmethod = 'quantise'\ntype = 'q4_0'\n",
        model_arg()
    );
    std::fs::write(path("small.toml"), recipe).unwrap();
    let millrace = |args: &[&str]| {
        let mut command = processes::command("millrace", dir.path());
        command.args(args);
        processes::run(command)
    };
    let run = millrace(&["compress", "run", "small.toml", "--node-kind", KIND, "--streams", "64"]);
    let [stdout, stderr] =
        [&run.stdout, &run.stderr].map(|b| String::from_utf8_lossy(b).into_owned());
    assert!(run.status.success(), "{stderr}");
    let report = std::fs::read(path("small.gguf.report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let suffice = |when: &str| {
        let plan = &report["plan"][when];
        (plan["nodes"].as_u64().unwrap(), plan["plan"]["tokens_per_second"].as_f64().unwrap())
    };
    let (before, after) = (suffice("before"), suffice("after"));
    assert!(before.0 > after.0 && after.0 >= 1, "{before:?} {after:?}");
    assert!(stdout.contains(&format!("before {}, ", before.0)), "{stdout}");
    assert!(stdout.contains(&format!("now {}, ", after.0)), "{stdout}");
    let plans = |model: &str, nodes: u64| {
        let nodes = format!("{nodes}x{KIND}");
        let args = ["plan", "--model", model, "--nodes", &nodes, "--concurrency", "64"];
        millrace(&args).status.success()
    };
    for (model, (nodes, _)) in [(model_arg(), before), ("small.gguf", after)] {
        assert!(plans(model, nodes), "{model} on {nodes}");
        assert!(nodes == 1 || !plans(model, nodes - 1), "{model} on {}", nodes - 1);
    }
}
