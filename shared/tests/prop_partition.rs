//! The partitioner against brute force, and its errors.

use millrace_shared::id::NodeId;
use millrace_shared::partition::{
    LayerRange, ModelCost, NodeCapacity, PartitionError, check_memory, from_cuts, partition,
};
use proptest::prelude::*;

fn node(i: u128, memory_bytes: u64, speed: f64) -> NodeCapacity {
    NodeCapacity { node: NodeId(uuid::Uuid::from_u128(i + 1)), memory_bytes, speed }
}

fn model(layers: u32, head: f64) -> ModelCost {
    ModelCost {
        layers,
        layer_bytes: vec![10; layers as usize],
        embed_bytes: 20,
        head_bytes: 20,
        tied_head: false,
        kv_bytes_per_layer: 5,
        layer_cost: 1.0,
        head_cost_in_layers: head,
    }
}

fn bottleneck(model: &ModelCost, nodes: &[NodeCapacity], ranges: &[LayerRange]) -> f64 {
    let last = ranges.len() - 1;
    (ranges.iter().zip(nodes).enumerate())
        .map(|(i, (r, n))| {
            let head = if i == last { model.head_cost_in_layers } else { 0.0 };
            (f64::from(r.len()) + head) * model.layer_cost / n.speed
        })
        .fold(0.0, f64::max)
}

/// Every way to cut; the least bottleneck of those that fit.
fn brute_force(model: &ModelCost, nodes: &[NodeCapacity], stages: usize) -> Option<f64> {
    fn cuts(layers: u32, from: u32, left: usize, so_far: &mut Vec<u32>, all: &mut Vec<Vec<u32>>) {
        if left == 0 {
            all.push(so_far.clone());
            return;
        }
        for cut in from + 1..=layers {
            so_far.push(cut);
            cuts(layers, cut, left - 1, so_far, all);
            so_far.pop();
        }
    }
    let mut all = Vec::new();
    cuts(model.layers, 0, stages - 1, &mut Vec::new(), &mut all);
    (all.iter())
        .filter_map(|c| from_cuts(model.layers, c).ok())
        .filter(|r| check_memory(model, nodes, r).is_ok())
        .map(|r| bottleneck(model, nodes, &r))
        .min_by(f64::total_cmp)
}

fn problem() -> impl Strategy<Value = (ModelCost, Vec<NodeCapacity>, usize)> {
    let nodes = prop::collection::vec((30u64..200, 1u32..8), 1..5);
    let layers = prop::collection::vec(1u64..30, 1..9);
    (layers, nodes, 0u32..12, any::<bool>(), 0u64..10).prop_flat_map(
        |(layer_bytes, nodes, head, tied_head, kv)| {
            let model = ModelCost {
                layers: layer_bytes.len() as u32,
                layer_bytes,
                tied_head,
                kv_bytes_per_layer: kv,
                ..model(0, f64::from(head) * 0.75)
            };
            let nodes: Vec<_> = (nodes.iter().enumerate())
                .map(|(i, &(m, s))| node(i as u128, m, f64::from(s) * 0.5))
                .collect();
            let stages = 1..nodes.len() + 1;
            (Just(model), Just(nodes), stages)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..Default::default() })]

    #[test]
    fn as_good_as_brute_force((model, nodes, stages) in problem()) {
        let best = brute_force(&model, &nodes, stages);
        match partition(&model, &nodes, stages) {
            Ok(ranges) => {
                prop_assert_eq!(ranges.len(), stages);
                prop_assert_eq!(ranges[0].first, 0);
                prop_assert_eq!(ranges[stages - 1].end, model.layers);
                prop_assert!(ranges.windows(2).all(|w| w[0].end == w[1].first));
                prop_assert!(ranges[..stages - 1].iter().all(|r| !r.is_empty()));
                prop_assert!(check_memory(&model, &nodes, &ranges).is_ok());
                let found = bottleneck(&model, &nodes, &ranges);
                let best = best.expect("brute force finds one too");
                prop_assert!((found - best).abs() < 1e-9, "found {} best {}", found, best);
            }
            Err(_) => prop_assert_eq!(best, None),
        }
    }
}

#[test]
fn a_heavy_head_counts_as_layers() {
    let nodes: Vec<_> = (0..2).map(|i| node(i, 1 << 30, 1.0)).collect();
    let ranges = partition(&model(30, 8.0), &nodes, 2).unwrap();
    assert_eq!(ranges[0].range(), 0..19);
    assert_eq!(ranges[1].range(), 19..30);
}

#[test]
fn without_a_reason_cuts_are_even() {
    let nodes: Vec<_> = (0..4).map(|i| node(i, 1 << 30, 1.0)).collect();
    let ranges = partition(&model(10, 0.5), &nodes, 4).unwrap();
    let mut lens: Vec<_> = ranges.iter().map(LayerRange::len).collect();
    lens.sort_unstable();
    assert_eq!(lens, [2, 2, 3, 3]);
}

#[test]
fn the_last_stage_may_hold_the_head_alone() {
    let nodes: Vec<_> = (0..3).map(|i| node(i, 1 << 30, 1.0)).collect();
    let ranges = partition(&model(2, 5.0), &nodes, 3).unwrap();
    assert!(ranges[2].is_empty());
    let error = partition(&model(1, 5.0), &nodes, 3).unwrap_err();
    assert_eq!(error, PartitionError::TooManyStages { stages: 3, layers: 1 });
}

#[test]
fn many_stages_of_a_real_model_are_quick() {
    let nodes: Vec<_> = (0..64).map(|i| node(i, 1 << 30, 1.0 + (i % 5) as f64)).collect();
    let ranges = partition(&model(200, 8.0), &nodes, 64).unwrap();
    assert_eq!(ranges.iter().map(LayerRange::len).sum::<u32>(), 200);
}

#[test]
fn errors_say_how_much_is_missing() {
    let gib = 1u64 << 30;
    let big = ModelCost { layer_bytes: vec![gib; 4], ..model(4, 1.0) };
    let small = [node(0, gib, 1.0), node(1, gib, 1.0)];
    let text = partition(&big, &small, 2).unwrap_err().to_string();
    assert!(text.contains("need 4.00 GiB") && text.contains("have 2.00 GiB"), "{text}");
    assert!(text.contains("--kv-cache-tokens"), "{text}");

    let lopsided = [node(0, gib / 2, 1.0), node(1, 8 * gib, 1.0)];
    let error = partition(&big, &lopsided, 2).unwrap_err();
    assert!(matches!(error, PartitionError::DoesNotFitInOrder { .. }), "{error}");

    let ranges = from_cuts(4, &[3]).unwrap();
    let nodes = [node(0, 2 * gib, 1.0), node(1, 8 * gib, 1.0)];
    let text = check_memory(&big, &nodes, &ranges).unwrap_err().to_string();
    assert!(text.contains("stage 0 (layers 0..3)") && text.contains("1.00 GiB"), "{text}");

    assert_eq!(partition(&big, &small, 0).unwrap_err(), PartitionError::NoStages);
    let error = partition(&big, &small, 3).unwrap_err();
    assert_eq!(error, PartitionError::TooFewNodes { stages: 3, nodes: 2 });
}

#[test]
fn a_tied_head_is_held_once_by_a_single_stage() {
    let tied = ModelCost { tied_head: true, ..model(1, 1.0) };
    assert!(partition(&tied, &[node(0, 35, 1.0)], 1).is_ok());
    assert!(partition(&tied, &[node(0, 34, 1.0)], 1).is_err());
    assert!(partition(&model(1, 1.0), &[node(0, 54, 1.0)], 1).is_err());
}

#[test]
fn explicit_cuts() {
    let lens = |cuts: &[u32]| -> Result<Vec<u32>, PartitionError> {
        Ok(from_cuts(30, cuts)?.iter().map(LayerRange::len).collect())
    };
    assert_eq!(lens(&[5, 17]), Ok(vec![5, 12, 13]));
    assert_eq!(lens(&[]), Ok(vec![30]));
    assert_eq!(lens(&[30]), Ok(vec![30, 0]));
    for bad in [&[0][..], &[5, 5], &[17, 5], &[31]] {
        assert!(matches!(lens(bad), Err(PartitionError::BadCut { .. })), "{bad:?}");
    }
}
