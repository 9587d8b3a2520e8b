//! What plans say, word for word: the table for people, and JSON for programs.
//!
//! After a change on purpose, look at what the test prints and copy it into `testdata`.
#![allow(clippy::unwrap_used)]

mod plan_common;

use millrace_coordinator::plan::cluster::{Described, describe, parse, to_text};
use millrace_coordinator::plan::costs::ModelParts;
use millrace_coordinator::plan::kinds;
use millrace_coordinator::plan::pins::bind;
use millrace_coordinator::plan::report::{PlanReport, Question};
use millrace_engine::cpu::packed_bytes;
use millrace_shared::cluster_file::ClusterFile;
use millrace_shared::model::{Dtype, SparseForm, StageTensors, TILE_ROWS, TensorEntry, TensorType};
use millrace_shared::partition::{Goal, Problem, Promise, Wish, choose};
use plan_common::{config, tensors};

const CLUSTER: &str = r#"
[network]
rtt_ms = 0.2
megabits_per_second = 10000

[[node]]
name = "fast"
memory_bytes = 8_000_000_000
disk_free_bytes = 50_000_000_000
disk_bytes_per_second = 2e9
price_per_hour = 0.30

[[node.measured]]
shape = "576 x 1536, 9/3 heads of 64, Q4_1; 49152, Q8_0"
rows = [1, 4, 16, 64]
layer_seconds = [100e-6, 180e-6, 550e-6, 2100e-6]
head_seconds = [1000e-6, 1300e-6, 3600e-6, 13e-3]

[[node]]
name = "slow"
count = 2
memory_bytes = 4_000_000_000
price_per_hour = 0.10

[[node.measured]]
shape = "576 x 1536, 9/3 heads of 64, Q4_1; 49152, Q8_0"
rows = [1, 4, 16, 64]
layer_seconds = [200e-6, 360e-6, 1100e-6, 4200e-6]
head_seconds = [2000e-6, 2600e-6, 7200e-6, 26e-3]

[[node]]
name = "tiny"
memory_bytes = 20_000_000

[node.limits]
memory_bytes_per_second = 1e9
multiply_adds_per_second = 1e9
layer_overhead_seconds = 1e-5

[[link]]
from = "fast"
to = "slow"
rtt_ms = 0.5
"#;

fn report(file: &ClusterFile, goal: Goal, streams: u32) -> PlanReport {
    let config = config();
    let tensors = tensors(&config);
    let parts = ModelParts { config: &config, tensors: &tensors };
    let Described { nodes, network, facts, .. } = describe(file, &parts).unwrap();
    let context = 2048;
    let model =
        parts.costs(u64::from(context) * u64::from(streams), Dtype::F16, streams + 64, None);
    let problem = Problem { model: &model, nodes: &nodes, network: &network, rows: 1.0 };
    let wish = Wish { goal, streams, stages: None, micro_batches: None };
    let choice = choose(&problem, &wish).unwrap();
    let promise = Promise {
        first_token_seconds: 1.0,
        inter_token_seconds: 0.06,
        prompt_tokens: 256,
        prefill_chunk: 64,
    };
    let question = Question {
        model_name: "smollm2:135m".to_owned(),
        parts,
        kv_dtype: Dtype::F16,
        context,
        wish,
        promise: Some(promise),
    };
    PlanReport::new(&question, &problem, &facts, &choice, true)
}

#[track_caller]
fn same(found: &str, expected: &str) {
    assert!(found.trim_end() == expected.trim_end(), "found:\n{found}\nexpected:\n{expected}");
}

#[test]
fn the_table() {
    let report = report(&parse(CLUSTER).unwrap(), Goal::Throughput, 32);
    same(&report.to_string(), include_str!("testdata/plan.txt"));
}

#[test]
fn json() {
    let report = report(&parse(CLUSTER).unwrap(), Goal::Throughput, 32);
    let text = serde_json::to_string_pretty(&report).unwrap();
    same(&text, include_str!("testdata/plan.json"));
}

#[test]
fn one_stream_is_not_split() {
    let report = report(&parse(CLUSTER).unwrap(), Goal::Latency, 1);
    assert!(report.refused_to_split, "{report}");
    assert_eq!(report.stages.len(), 1);
    assert_eq!(report.stages[0].node, "fast");
    assert!(
        report.to_string().contains("not split: one node alone is better for latency"),
        "{report}"
    );
    let reasons: Vec<&str> = report.left_out.iter().map(|l| l.reason.as_str()).collect();
    assert!(reasons.iter().any(|r| r.starts_with("no gain")), "{reasons:?}");
}

#[test]
fn kinds_are_estimates() {
    let report = report(&kinds::parse("2xcpu-4c-16g").unwrap(), Goal::Throughput, 16);
    assert!(report.estimated);
    let text = report.to_string();
    assert!(text.contains("~cpu-4c-16g-1") && text.contains("estimates"), "{text}");
}

#[test]
fn pins_show_in_the_table() {
    let file = parse(CLUSTER).unwrap();
    let config = config();
    let tensors = tensors(&config);
    let parts = ModelParts { config: &config, tensors: &tensors };
    let Described { mut nodes, network, facts, .. } = describe(&file, &parts).unwrap();
    let pins = ["slow-2=0-4".parse().unwrap()];
    let names: Vec<String> = nodes.iter().map(|n| n.name.clone()).collect();
    bind(&pins, &mut nodes, |n, pin| names[n] == pin.node);
    let model = parts.costs(65_536, Dtype::F16, 96, None);
    let problem = Problem { model: &model, nodes: &nodes, network: &network, rows: 1.0 };
    let goal = Goal::Throughput;
    let wish = Wish { goal, streams: 32, stages: None, micro_batches: None };
    let choice = choose(&problem, &wish).unwrap();
    let question = Question {
        model_name: "m".into(),
        parts,
        kv_dtype: Dtype::F16,
        context: 2048,
        wish,
        promise: None,
    };
    let text = PlanReport::new(&question, &problem, &facts, &choice, false).to_string();
    let line = text.lines().find(|l| l.contains("slow-2")).unwrap();
    assert!(line.contains("embed, 0-4") && line.ends_with("pinned"), "{text}");
}

#[test]
fn descriptions_survive_the_way_to_text_and_back() {
    let file = parse(CLUSTER).unwrap();
    assert_eq!(parse(&to_text(&file)).unwrap(), file);
}

#[test]
fn bad_descriptions_name_line_and_field() {
    for (change, to, expected) in [
        ("memory_bytes = 4_000_000_000", "memory_byte = 4", &["line 22", "memory_byte"][..]),
        ("count = 2", "count = \"two\"", &["line 21", "count = \"two\""]),
        ("count = 2", "count = 0", &["'slow': count"]),
        ("to = \"slow\"", "to = \"slo\"", &["no node 'slo'", "fast, slow, tiny"]),
    ] {
        let text = CLUSTER.replace(change, to);
        let message = parse(&text).unwrap_err();
        for part in expected {
            assert!(message.contains(part), "{part} in: {message}");
        }
    }
    let config = config();
    let tensors = tensors(&config);
    let other = CLUSTER.replace("576 x 1536", "1024 x 4096");
    let parts = ModelParts { config: &config, tensors: &tensors };
    let message = describe(&parse(&other).unwrap(), &parts).unwrap_err();
    assert!(message.contains("'fast'") && message.contains("millrace-node probe"), "{message}");
}

/// Of a matrix without its zeros as much is in memory as the engine keeps: its tiles alone, and all of one
/// whose zeros are put back.
#[test]
fn matrices_without_zeros_take_what_the_engine_keeps() {
    let (config, dense) = (config(), tensors(&config()));
    let bytes = |tensors: &[TensorEntry]| {
        let stage = StageTensors { layers: 0..1, embed: false, head: false };
        ModelParts { config: &config, tensors }.memory_bytes(&stage, None)
    };
    let name = "blk.0.ffn_up.weight";
    let whole = dense.iter().find(|t| t.name == name).unwrap();
    let (all, [cols, rows]) = (bytes(&dense), [whole.dims[0], whole.dims[1]]);
    let matrix = packed_bytes(TensorType::F16, rows, cols).unwrap();
    let others = all - packed_bytes(whole.dtype, rows, cols).unwrap();
    for form in SparseForm::ALL {
        // Half of it is left: single weights, or tiles of 16 rows.
        let width = form.width(TensorType::F16);
        let lines = rows * cols / 2 / width;
        let count = if width == 1 { (lines, 0) } else { (lines / TILE_ROWS, lines) };
        let shapes = form.shapes(TensorType::F16, [cols, rows], count);
        let parts = ["weight", form.parts()[0], form.parts()[1]];
        let entry = |(part, (dtype, dims)): (&str, (TensorType, Vec<u64>))| TensorEntry {
            name: format!("blk.0.ffn_up.{part}"),
            dtype,
            bytes: dtype.bytes_of(dims.iter().product()).unwrap(),
            dims: if part == "weight" { whole.dims.clone() } else { dims },
            ..whole.clone()
        };
        let mut tensors: Vec<TensorEntry> =
            dense.iter().filter(|t| t.name != name).cloned().collect();
        tensors.extend(parts.into_iter().zip(shapes).map(entry));
        let expected = if form == SparseForm::Tiles { matrix / 2 } else { matrix };
        assert_eq!(bytes(&tensors), others + expected, "{}", form.as_str());
    }
}
