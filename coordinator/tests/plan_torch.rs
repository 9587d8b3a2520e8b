//! Plans of torch nodes: memory as their engine takes it, and a GPU's own.
#![allow(clippy::unwrap_used)]

mod plan_common;

use clap::Parser;
use millrace_coordinator::cli::{LimitArgs, deployment};
use millrace_coordinator::plan::costs::{Kept, ModelParts, node_costs};
use millrace_coordinator::plan::{Plan, PlanNode, kinds, plan};
use millrace_shared::id::{Epoch, NodeId, PipelineId};
use millrace_shared::model::{Dtype, ModelManifest, StageTensors};
use millrace_shared::options::{EngineOptions, TorchDtype, TorchKept};
use millrace_shared::partition::PartitionError;
use millrace_shared::wire::control::{Hello, StageProfile};
use plan_common::{config, tensors};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    limits: LimitArgs,
}

const BF16: Kept = Some(TorchKept { dtype: TorchDtype::Bf16, gpu: true });
const F32: Kept = Some(TorchKept { dtype: TorchDtype::F32, gpu: false });
/// SmolLM2 135M has so many parameters.
const PARAMETERS: u64 = 134_515_008;

fn profile() -> StageProfile {
    StageProfile { layer_seconds: [1e-3, 2e-3, 4e-3, 9e-3], head_seconds: [1e-3, 2e-3, 4e-3, 9e-3] }
}

fn node(i: u16, torch: Kept, memory_bytes: u64) -> PlanNode {
    let hello = Hello {
        drains: true,
        wire_version: 0,
        numerics_revision: String::new(),
        version: String::new(),
        name: format!("n{i}"),
        advertise: format!("h:{i}"),
        host: "h".to_owned(),
        engine: if torch.is_some() { "torch" } else { "cpu" }.to_owned(),
        threads: 1,
        memory_bytes,
        hardware: String::new(),
        torch,
    };
    let id = NodeId(uuid::Uuid::from_u128(i.into()));
    PlanNode { id, hello, profile: profile(), round_trip: None }
}

fn planned(nodes: &[PlanNode]) -> Result<Plan, PartitionError> {
    let config = config();
    let manifest = ModelManifest::new("m".to_owned(), config.clone(), tensors(&config));
    let mut deployment = deployment(&EngineOptions::default(), &Flags::parse_from(["plan"]).limits);
    deployment.kv_cache_tokens = Some(4096);
    deployment.max_num_seqs = 4;
    plan(&manifest, &deployment, (PipelineId(1), Epoch(1)), nodes, &[], &[])
}

#[test]
fn a_torch_node_needs_what_its_engine_takes() {
    let config = config();
    let tensors = tensors(&config);
    let parts = ModelParts { config: &config, tensors: &tensors };
    let all = StageTensors { layers: 0..config.layers, embed: true, head: true };
    let bytes = |kept| parts.memory_bytes(&all, kept);
    let vectors = u64::from(config.hidden) * (2 * u64::from(config.layers) + 1);
    // Vectors are floats everywhere; the head is the embedding.
    assert_eq!(bytes(BF16), 2 * PARAMETERS + 2 * vectors);
    assert_eq!(bytes(F32), 4 * PARAMETERS);
    assert!(bytes(None) < PARAMETERS);

    // On the processor 4 bits a weight, on the GPU 16: 400 MB hold the one and not the other.
    let memory = 400_000_000;
    let report = planned(&[node(1, None, memory)]).unwrap().report;
    assert_eq!((report.weight_bytes, report.stages.len()), (bytes(None), 1));
    let refused = planned(&[node(1, BF16, memory)]).unwrap_err();
    assert!(matches!(refused, PartitionError::DoesNotFit { needed, .. } if needed > bytes(BF16)));
    let report = planned(&[node(1, BF16, 600_000_000)]).unwrap().report;
    assert_eq!(report.weight_bytes, bytes(BF16));
    assert!(report.stages[0].weight_bytes == bytes(BF16), "{report}");
}

#[test]
fn gpus_of_a_host_have_memory_of_their_own() {
    // Enough for half of it each; of one memory that both share it would not be.
    let memory = 330_000_000;
    assert!(planned(&[node(1, BF16, memory)]).is_err());
    let plan = planned(&[node(1, BF16, memory), node(2, BF16, memory)]).unwrap();
    assert_eq!(plan.assignments.len(), 2);
    let on_host = TorchKept { dtype: TorchDtype::Bf16, gpu: false };
    let shared = [node(1, Some(on_host), memory), node(2, Some(on_host), memory)];
    assert!(planned(&shared).is_err());
    // A GPU takes nothing from what the host's other nodes share.
    let beside = [node(1, None, 400_000_000), node(2, BF16, memory)];
    assert!(planned(&beside).is_ok());
}

#[test]
fn nodes_of_both_engines_are_never_given_more_than_they_hold() {
    let config = config();
    let tensors = tensors(&config);
    let parts = ModelParts { config: &config, tensors: &tensors };
    let kept = [None, BF16, F32];
    for memory in [100_000_000u64, 200_000_000, 400_000_000, 1_000_000_000] {
        let nodes: Vec<_> = kept.iter().map(|_| node_costs("n", &profile(), memory)).collect();
        let (model, nodes) = parts.mixed((&nodes, &kept), 4096, Dtype::F16, 64);
        for (node, kept) in nodes.iter().zip(kept) {
            let own = parts.costs(4096, Dtype::F16, 64, kept);
            let layers = config.layers as usize;
            for range in [0..0, 0..1, 3..9, 0..layers, layers - 2..layers] {
                for (first, last) in [(true, false), (false, false), (false, true), (true, true)] {
                    if model.stage_memory(range.clone(), first, last) <= node.memory_bytes {
                        assert!(own.stage_memory(range.clone(), first, last) <= memory);
                    }
                }
            }
        }
        assert_eq!(nodes[2].memory_bytes, memory, "the largest is reckoned with as it is");
        assert!(nodes[0].memory_bytes > nodes[1].memory_bytes && nodes[1].memory_bytes > memory);
    }
    let (alike, same) =
        parts.mixed((&[node_costs("n", &profile(), 7)], &[BF16]), 4096, Dtype::F16, 64);
    assert_eq!((alike, same[0].memory_bytes), (parts.costs(4096, Dtype::F16, 64, BF16), 7));
}

#[test]
fn accelerators_are_reckoned_with_as_they_keep_weights() {
    let file = kinds::parse("2xl4-24g,cpu-8c-32g").unwrap();
    assert_eq!([file.node[0].torch, file.node[1].torch], [BF16, None]);
}
