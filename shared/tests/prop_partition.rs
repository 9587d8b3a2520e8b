//! The planner against brute force: every choice and order of nodes, every cut.

use millrace_shared::partition::{
    Change, Choice, Curve, Goal, LayerRange, LeftOut, Link, ModelCosts, Network, NodeCosts,
    Objective, PartitionError, Problem, Promise, Solution, StageCut, Stood, Wish, check_memory,
    choose, forecast, from_cuts, improvements, in_order, keep, left_out, load_within, solve,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    model: ModelCosts,
    nodes: Vec<NodeCosts>,
    network: Network,
    rows: f64,
}

impl Case {
    fn problem(&self) -> Problem<'_> {
        Problem { model: &self.model, nodes: &self.nodes, network: &self.network, rows: self.rows }
    }
}

/// Every ordered choice of `k` of `n`.
fn orders(n: usize, k: usize) -> Vec<Vec<usize>> {
    if k == 0 {
        return vec![Vec::new()];
    }
    let longer = |shorter: Vec<usize>| {
        (0..n)
            .filter(|i| !shorter.contains(i))
            .map(|i| [&shorter[..], &[i]].concat())
            .collect::<Vec<_>>()
    };
    orders(n, k - 1).into_iter().flat_map(longer).collect()
}

/// Every way to cut `layers` in `parts`, each but the last with a layer.
fn cuts(layers: u32, parts: usize) -> Vec<Vec<LayerRange>> {
    fn go(first: u32, layers: u32, parts: usize) -> Vec<Vec<LayerRange>> {
        if parts == 1 {
            return vec![vec![LayerRange { first, end: layers }]];
        }
        let mut all = Vec::new();
        for end in first + 1..=layers {
            for mut rest in go(end, layers, parts - 1) {
                rest.insert(0, LayerRange { first, end });
                all.push(rest);
            }
        }
        all
    }
    go(0, layers, parts)
}

fn fits(case: &Case, stages: &[StageCut]) -> bool {
    let last = stages.len() - 1;
    stages.iter().enumerate().all(|(i, s)| {
        let layers = s.range.first as usize..s.range.end as usize;
        case.model.stage_memory(layers, i == 0, i == last) <= case.nodes[s.node].memory_bytes
    })
}

/// Whether pinned nodes have what they must have.
fn pins_hold(case: &Case, stages: &[StageCut]) -> bool {
    (case.nodes.iter().enumerate())
        .filter_map(|(n, node)| Some((n, node.pin?)))
        .all(|(n, range)| stages.iter().any(|s| s.node == n && s.range == range))
}

/// The least value; `None` where nothing fits.
fn brute_force(case: &Case, objective: Objective, stages: Option<usize>) -> Option<f64> {
    let layers = case.model.layers() as u32;
    let sizes = stages.map_or(1..=case.nodes.len(), |n| n..=n);
    let mut best: Option<f64> = None;
    for size in sizes {
        for order in orders(case.nodes.len(), size) {
            for ranges in cuts(layers, size) {
                let stages: Vec<StageCut> = (order.iter().zip(&ranges))
                    .map(|(&node, &range)| StageCut { node, range })
                    .collect();
                if !fits(case, &stages) || !pins_hold(case, &stages) {
                    continue;
                }
                let value = Solution::of(&case.problem(), stages, objective);
                // A forbidden link shows in the sum.
                if value.sum_seconds.is_finite() && best.is_none_or(|b| value.value < b) {
                    best = Some(value.value);
                }
            }
        }
    }
    best
}

fn node(i: usize, (memory_bytes, layer, head, embed): (u64, u32, u32, u32)) -> NodeCosts {
    NodeCosts {
        name: format!("n{i}"),
        layer: Curve::flat(f64::from(layer) * 0.25),
        head: Curve::flat(f64::from(head) * 0.75),
        embed: Curve::flat(f64::from(embed) * 0.1),
        pin: None,
        memory_bytes,
    }
}

fn link() -> impl Strategy<Value = Option<Link>> {
    prop_oneof![
        1 => Just(None),
        3 => Just(Some(Link::FREE)),
        4 => (0u32..20, 1u32..40).prop_map(|(rtt, speed)| Some(Link {
            rtt_seconds: f64::from(rtt) * 0.3,
            bytes_per_second: f64::from(speed),
        })),
    ]
}

fn case(most_nodes: usize, most_layers: usize) -> impl Strategy<Value = Case> {
    let node_figures = (20u64..260, 1u32..8, 0u32..6, 0u32..4);
    let layers =
        prop::collection::vec((1u64..30, prop_oneof![Just(4u32), 1u32..9]), 1..=most_layers);
    let nodes = prop::collection::vec(node_figures, 1..=most_nodes);
    // Few links of their own, few twins: both happen often enough.
    (layers, nodes, any::<[bool; 3]>(), 0u64..10, 1u64..20).prop_flat_map(
        |(layers, mut nodes, [tied_head, uniform, twins], kv, row_bytes)| {
            if twins && nodes.len() > 2 {
                nodes[1] = nodes[0];
            }
            let share = |s: u32| if uniform { 1.0 } else { f64::from(s) * 0.25 };
            let model = ModelCosts {
                layer_bytes: layers
                    .iter()
                    .map(|l| if uniform { layers[0].0 } else { l.0 })
                    .collect(),
                layer_share: layers.iter().map(|l| share(l.1)).collect(),
                embed_bytes: 20,
                head_bytes: 22,
                tied_head,
                kv_bytes_per_layer: kv,
                stage_bytes: 3,
                row_bytes,
            };
            let nodes: Vec<NodeCosts> =
                nodes.into_iter().enumerate().map(|(i, n)| node(i, n)).collect();
            let n = nodes.len();
            let own = prop::collection::vec(((0..=n, 0..=n), link()), 0..2 * n);
            (Just((model, nodes)), link(), own).prop_map(move |((model, nodes), all, own)| {
                let mut network = Network::uniform(n, all.unwrap_or(Link::FREE));
                network.scheduling_seconds = 0.125;
                for ((from, to), link) in own {
                    if from != to {
                        network.set(from, to, link);
                    }
                }
                Case { model, nodes, network, rows: 2.0 }
            })
        },
    )
}

/// A case with some nodes pinned to layers that do not overlap.
fn pinned(most_nodes: usize, most_layers: usize) -> impl Strategy<Value = Case> {
    let pins = prop::collection::vec((any::<prop::sample::Index>(), 0u32..4, 1u32..4), 1..3);
    (case(most_nodes, most_layers), pins).prop_map(|(mut case, pins)| {
        let layers = case.model.layers() as u32;
        let mut first = 0;
        for (node, gap, len) in pins {
            let begin = first + gap;
            let range = LayerRange { first: begin, end: (begin + len).min(layers) };
            let node = node.index(case.nodes.len());
            if range.first < range.end && case.nodes[node].pin.is_none() {
                case.nodes[node].pin = Some(range);
                first = range.end;
            }
        }
        case
    })
}

fn check(case: &Case, objective: Objective, stages: Option<usize>) -> Result<(), TestCaseError> {
    let best = brute_force(case, objective, stages);
    match solve(&case.problem(), objective, stages) {
        Ok(found) => {
            let last = found.stages.len() - 1;
            prop_assert!(fits(case, &found.stages));
            prop_assert!(pins_hold(case, &found.stages), "{:?}", found.stages);
            prop_assert_eq!(found.stages[0].range.first, 0);
            prop_assert_eq!(found.stages[last].range.end, case.model.layers() as u32);
            prop_assert!(found.stages.windows(2).all(|w| w[0].range.end == w[1].range.first));
            prop_assert!(found.stages[..last].iter().all(|s| !s.range.is_empty()));
            prop_assert!(stages.is_none_or(|n| n == last + 1));
            prop_assert!(found.sum_seconds.is_finite(), "a forbidden link is used");
            let best = best.expect("brute force finds one too");
            let same = (found.value - best).abs() <= 1e-6 * best.max(1e-9);
            prop_assert!(same, "{objective:?}: found {} best {best}", found.value);
            prop_assert_eq!(found.gap(), 0.0);
        }
        Err(e) => prop_assert_eq!(best, None, "{}", e),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..Default::default() })]

    #[test]
    fn throughput_is_the_best((case, stages) in (case(4, 8), prop::option::weighted(0.3, 1usize..5))) {
        check(&case, Objective::Throughput, stages)?;
    }

    #[test]
    fn latency_is_the_best((case, stages) in (case(4, 8), prop::option::weighted(0.3, 1usize..5))) {
        check(&case, Objective::Latency, stages)?;
    }

    #[test]
    fn the_best_around_pins(
        (case, stages, m) in (pinned(4, 8), prop::option::weighted(0.3, 1usize..5), 1u32..7)
    ) {
        check(&case, Objective::Throughput, stages)?;
        check(&case, Objective::Latency, stages)?;
        check(&case, Objective::Period { micro_batches: m }, stages)?;
    }

    #[test]
    fn the_period_is_the_best((case, m) in (case(4, 8), 1u32..7)) {
        check(&case, Objective::Period { micro_batches: m }, None)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn five_nodes_too((case, m) in (case(5, 6), 1u32..7)) {
        check(&case, Objective::Throughput, None)?;
        check(&case, Objective::Period { micro_batches: m }, None)?;
    }
}

/// `layers` alike layers and nodes with the given times of a layer, the head in layers.
fn plain(layers: usize, head: f64, nodes: &[f64]) -> Case {
    let model = ModelCosts {
        layer_bytes: vec![10; layers],
        layer_share: vec![1.0; layers],
        embed_bytes: 20,
        head_bytes: 20,
        tied_head: false,
        kv_bytes_per_layer: 5,
        stage_bytes: 0,
        row_bytes: 1,
    };
    let node = |(i, &layer): (usize, &f64)| NodeCosts {
        name: format!("n{i}"),
        layer: Curve::flat(layer),
        head: Curve::flat(layer * head),
        embed: Curve::flat(0.0),
        pin: None,
        memory_bytes: 1 << 30,
    };
    Case {
        model,
        network: Network::uniform(nodes.len(), Link::FREE),
        nodes: nodes.iter().enumerate().map(node).collect(),
        rows: 1.0,
    }
}

fn lens(case: &Case) -> Vec<u32> {
    let found =
        solve(&case.problem(), Objective::Throughput, Some(case.nodes.len())).expect("it fits");
    found.stages.iter().map(|s| s.range.len()).collect()
}

#[test]
fn a_heavy_head_counts_as_layers() {
    assert_eq!(lens(&plain(30, 8.0, &[1.0; 2])), [19, 11]);
    // The table of the design: equal split against optimum, head of 8 layers.
    for (nodes, bottleneck) in [(2, 19.0), (3, 13.0), (4, 10.0), (5, 8.0), (6, 8.0)] {
        let case = plain(30, 8.0, &vec![1.0; nodes]);
        let found = solve(&case.problem(), Objective::Throughput, Some(nodes)).unwrap();
        assert_eq!(found.bottleneck_seconds, bottleneck, "{nodes} nodes");
    }
}

#[test]
fn without_a_reason_cuts_are_even() {
    let mut found = lens(&plain(10, 0.5, &[1.0; 4]));
    found.sort_unstable();
    assert_eq!(found, [2, 2, 3, 3]);
    assert_eq!(lens(&plain(2, 5.0, &[1.0; 3])), [1, 1, 0], "the head alone on the last");
}

#[test]
fn many_nodes_are_planned_with_a_gap() {
    let times: Vec<f64> = (0..40).map(|i| 1.0 + f64::from(i) * 0.173).collect();
    let case = plain(126, 4.0, &times);
    for objective in [Objective::Throughput, Objective::Latency] {
        let found = solve(&case.problem(), objective, None).unwrap();
        assert!(found.lower_bound > 0.0 && found.lower_bound <= found.value);
        assert!(found.gap() < 0.6, "{objective:?}: {}", found.gap());
        assert_eq!(found.stages.iter().map(|s| s.range.len()).sum::<u32>(), 126);
    }
    let alike = plain(126, 4.0, &[1.0; 64]);
    assert_eq!(solve(&alike.problem(), Objective::Throughput, None).unwrap().gap(), 0.0);
}

#[test]
fn errors_say_how_much_is_missing() {
    let gib = 1u64 << 30;
    let mut case = plain(4, 1.0, &[1.0; 2]);
    case.model.layer_bytes = vec![gib; 4];
    let solve = |case: &Case, n| solve(&case.problem(), Objective::Throughput, n);
    let text = solve(&case, Some(2)).unwrap_err().to_string();
    assert!(text.contains("need 4.00 GiB") && text.contains("have 2.00 GiB"), "{text}");
    assert!(text.contains("--kv-cache-tokens"), "{text}");

    case.nodes[1].memory_bytes = 2 * gib;
    case.nodes[0].memory_bytes = 5 * gib / 2;
    let error = solve(&case, None).unwrap_err();
    assert!(matches!(error, PartitionError::DoesNotFitInOrder { .. }), "{error}");
    case.nodes[1].memory_bytes = 8 * gib;
    assert!(solve(&case, None).is_ok());
    let mut cut_off = case.clone();
    cut_off.network.set(1, 2, None);
    let error = solve(&cut_off, Some(1)).unwrap_err();
    assert!(matches!(error, PartitionError::NoWay { forbidden: 1.., .. }), "{error}");

    let ranges = from_cuts(4, &[3]).unwrap();
    let text = check_memory(&case.problem(), &[0, 1], &ranges).unwrap_err().to_string();
    assert!(text.contains("stage 0 (layers 0..3)") && text.contains("node n0"), "{text}");
    assert_eq!(solve(&case, Some(0)).unwrap_err(), PartitionError::NoStages);
    let error = solve(&case, Some(3)).unwrap_err();
    assert_eq!(error, PartitionError::TooFewNodes { stages: 3, nodes: 2 });
    let error = solve(&plain(1, 1.0, &[1.0; 3]), Some(3)).unwrap_err();
    assert_eq!(error, PartitionError::TooManyStages { stages: 3, layers: 1 });
}

fn pin(case: &mut Case, node: usize, first: u32, end: u32) {
    case.nodes[node].pin = Some(LayerRange { first, end });
}

#[test]
fn wrong_pins_are_named() {
    let solve = |case: &Case| solve(&case.problem(), Objective::Throughput, None);
    let mut case = plain(10, 1.0, &[1.0, 2.0, 3.0]);
    pin(&mut case, 1, 4, 11);
    let text = solve(&case).unwrap_err().to_string();
    assert!(
        text.contains("node n1") && text.contains("layers 4-10") && text.contains("layers 0-9"),
        "{text}"
    );
    pin(&mut case, 1, 4, 8);
    pin(&mut case, 0, 7, 9);
    let text = solve(&case).unwrap_err().to_string();
    assert!(text.contains("n1 and n0") && text.contains("layer 7"), "{text}");
    pin(&mut case, 0, 0, 3);
    case.nodes[1].memory_bytes = 50;
    let text = solve(&case).unwrap_err().to_string();
    assert!(text.contains("4-7 do not fit on node n1"), "{text}");
    // Layer 3 and those from 8 on need a node each, there is one.
    case.nodes[1].memory_bytes = 1 << 30;
    let text = solve(&case).unwrap_err().to_string();
    assert!(text.contains("n0=0-2, n1=4-7"), "{text}");
    pin(&mut case, 0, 0, 4);
    let found = solve(&case).unwrap();
    assert_eq!(found.stages.iter().map(|s| s.node).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn many_nodes_are_planned_around_pins() {
    let times: Vec<f64> = (0..40).map(|i| 1.0 + f64::from(i) * 0.173).collect();
    let mut case = plain(126, 4.0, &times);
    pin(&mut case, 7, 0, 6);
    pin(&mut case, 11, 30, 33);
    pin(&mut case, 30, 125, 126);
    for objective in [Objective::Throughput, Objective::Latency] {
        let found = solve(&case.problem(), objective, None).unwrap();
        assert!(pins_hold(&case, &found.stages) && fits(&case, &found.stages));
        assert_eq!(found.stages.iter().map(|s| s.range.len()).sum::<u32>(), 126);
        assert!(found.gap() < 1.0, "{objective:?}: {}", found.gap());
    }
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

#[test]
fn given_cuts_go_around_closed_ways() {
    let mut case = plain(9, 1.0, &[1.0; 3]);
    let ranges = from_cuts(9, &[3, 6]).unwrap();
    let order = |case: &Case| in_order(&case.problem(), &ranges);
    assert_eq!(order(&case), Ok(vec![0, 1, 2]), "as they come");
    case.network.set(0, 1, None);
    assert_eq!(order(&case), Ok(vec![0, 2, 1]));
    case.network.set(0, 2, None);
    assert_eq!(order(&case), Ok(vec![1, 2, 0]));
    // Layers 0-2 and the embedding fit on the last alone.
    (case.nodes[0].memory_bytes, case.nodes[1].memory_bytes) = (64, 64);
    case.model.head_bytes = 1;
    assert_eq!(order(&case), Ok(vec![2, 1, 0]));
    case.network.set(2, 1, None);
    let error = order(&case).unwrap_err();
    assert!(matches!(error, PartitionError::StageDoesNotFit { stage: 0, .. }), "{error}");
    case.nodes.iter_mut().for_each(|n| n.memory_bytes = 1 << 30);
    (0..3).for_each(|n| case.network.set(n, 3, None));
    let error = order(&case).unwrap_err();
    assert!(matches!(error, PartitionError::NoWay { .. }), "{error}");
}

/// Times that grow with the rows, so that a split pays.
fn loaded(nodes: &[f64]) -> Case {
    let mut case = plain(12, 2.0, nodes);
    for node in &mut case.nodes {
        let layer = node.layer.at(1.0) * 1e-3;
        node.layer = Curve::new([(1.0, layer), (64.0, layer * 64.0)]);
        node.head = Curve::new([(1.0, layer * 2.0), (64.0, layer * 128.0)]);
    }
    case
}

fn wish(streams: u32) -> Wish {
    Wish { goal: Goal::Throughput, streams, stages: None, micro_batches: None }
}

#[test]
fn a_split_is_made_only_where_it_pays() {
    let case = loaded(&[1.0, 1.0, 1.0, 30.0]);
    let busy = choose(&case.problem(), &wish(32)).unwrap();
    assert_eq!(busy.stages.len(), 3);
    assert!(!busy.refused_to_split(&case.problem(), &wish(32)));
    let (_, alone) = busy.alone.as_ref().unwrap();
    assert!(busy.forecast.tokens_per_second > 2.0 * alone.tokens_per_second);
    let out = left_out(&case.problem(), &wish(32), &busy);
    assert!(matches!(out[..], [(3, LeftOut::TooSlow { .. })]), "{out:?}");

    let quiet = choose(&case.problem(), &wish(1)).unwrap();
    assert_eq!(quiet.stages.len(), 1);
    assert!(quiet.refused_to_split(&case.problem(), &wish(1)));
    let out = left_out(&case.problem(), &wish(1), &quiet);
    assert!(out.iter().any(|(_, r)| matches!(r, LeftOut::NoGain { .. })), "{out:?}");
    let two = Wish { stages: Some(2), ..wish(1) };
    assert_eq!(choose(&case.problem(), &two).unwrap().stages.len(), 2);
}

#[test]
fn left_out_nodes_have_reasons() {
    let mut case = loaded(&[1.0, 1.0, 1.0, 1.0]);
    case.nodes[2].memory_bytes = 3;
    for place in 0..5 {
        case.network.set(place, 3, None);
    }
    let choice = choose(&case.problem(), &wish(32)).unwrap();
    let out = left_out(&case.problem(), &wish(32), &choice);
    assert!(matches!(out[0], (2, LeftOut::TooSmall { .. })), "{out:?}");
    assert_eq!(out[1], (3, LeftOut::NoLink));
}

#[test]
fn what_helps_is_in_order() {
    let case = loaded(&[1.0, 2.0]);
    let choice = choose(&case.problem(), &wish(32)).unwrap();
    let found = improvements(&case.problem(), &wish(32), &choice);
    assert!(found.windows(2).all(|w| w[0].1 >= w[1].1));
    assert!(found.iter().all(|(_, t)| *t > choice.forecast.tokens_per_second));
    assert!(found.iter().any(|(c, _)| matches!(c, Change::Add(0))), "{found:?}");
}

#[test]
fn links_are_hidden_by_micro_batches_in_flight() {
    let mut case = loaded(&[1.0, 1.0]);
    let slow = Link { rtt_seconds: 0.2, bytes_per_second: f64::INFINITY };
    case.network = Network::uniform(2, slow);
    let choice = choose(&case.problem(), &Wish { stages: Some(2), ..wish(64) }).unwrap();
    let f = forecast(&case.problem(), &choice.stages, 64, None);
    assert!(f.micro_batches > 3, "{f:?}");
    let few = forecast(&case.problem(), &choice.stages, 64, Some(2));
    assert!(f.tokens_per_second > 1.2 * few.tokens_per_second);
    assert!(f.period_seconds * f64::from(f.micro_batches) >= f.sum_seconds * 0.999);
}

#[test]
fn promises_bound_the_load() {
    let case = loaded(&[1.0, 1.0]);
    let stages = choose(&case.problem(), &wish(32)).unwrap().stages;
    let promise = |itl| Promise {
        first_token_seconds: 10.0,
        inter_token_seconds: itl,
        prompt_tokens: 128,
        prefill_chunk: 64,
    };
    let load = |itl| load_within(&case.problem(), &stages, &promise(itl), 4096);
    let (a, first) = load(0.5).unwrap();
    assert!(a.inter_token_seconds <= 0.5 && first <= 10.0);
    let (b, _) = load(1.0).unwrap();
    assert!(b.streams > a.streams);
    assert!(load(0.001).is_none());
}

/// Stages of nodes with so many layers each.
fn stages_of(nodes: &[usize], layers: &[u32]) -> Vec<StageCut> {
    let mut first = 0;
    let stage = |(&node, &layers): (&usize, &u32)| {
        let range = LayerRange { first, end: first + layers };
        first = range.end;
        StageCut { node, range }
    };
    nodes.iter().zip(layers).map(stage).collect()
}

fn stood(stages: &[StageCut], gone: Option<usize>) -> Vec<Stood> {
    stages.iter().map(|s| (Some(s.node).filter(|n| Some(*n) != gone), s.range)).collect()
}

const MANY: Wish =
    Wish { goal: Goal::Throughput, streams: 32, stages: Some(3), micro_batches: None };

#[test]
fn layers_stay_where_they_lie() {
    let mut case = plain(30, 0.0, &[1.0; 5]);
    for node in &mut case.nodes {
        node.layer = Curve::new([(1.0, 1.0), (64.0, 64.0)]);
    }
    let problem = case.problem();
    let best = stages_of(&[0, 1, 2], &[10, 10, 10]);
    let before = stages_of(&[2, 0, 1], &[10, 10, 10]);
    let keep = |stood: &[Stood]| keep(&problem, &MANY, best.clone(), stood);
    assert_eq!(keep(&stood(&before, None)).stages, before);
    // Another node takes the place of one that is gone; which, does not matter.
    let kept = keep(&stood(&before, Some(0))).stages;
    assert_eq!((kept[0], kept[2]), (before[0], before[2]));
    assert_eq!(kept[1].range, before[1].range);
    // A little uneven is not worth moving layers; much is, but the nodes keep their places.
    let uneven = stages_of(&[4, 3, 2], &[10, 10, 10]);
    assert_eq!(keep(&stood(&uneven, None)).stages, uneven);
    let wrong = stages_of(&[2, 0, 1], &[20, 5, 5]);
    assert_eq!(keep(&stood(&wrong, None)).stages, before);
    assert_eq!(keep(&[]).stages, best);
}

proptest! {
    #[test]
    fn what_is_kept_fits_and_is_nearly_the_best(
        case in case(4, 8),
        order in Just((0..4).collect::<Vec<usize>>()).prop_shuffle(),
        layers in prop::collection::vec(1u32..5, 1..5),
        gone in prop::option::of(0usize..4),
    ) {
        let problem = case.problem();
        let wish = Wish { stages: None, ..MANY };
        let Ok(best) = choose(&problem, &wish) else { return Ok(()) };
        let nodes: Vec<usize> = order.into_iter().filter(|n| *n < case.nodes.len()).collect();
        let mut before = stages_of(&nodes, &layers);
        before.retain(|s| s.range.end as usize <= case.model.layers());
        if let Some(last) = before.last_mut() {
            last.range.end = case.model.layers() as u32;
        }
        let kept = keep(&problem, &wish, best.stages.clone(), &stood(&before, gone));
        prop_assert!(fits(&case, &kept.stages));
        let of = |stages: &[StageCut]| {
            Choice::of(&problem, &wish, stages.to_vec()).forecast.tokens_per_second
        };
        prop_assert!(of(&kept.stages) * 1.050_001 >= of(&best.stages));
        prop_assert!((0.0..=0.05).contains(&kept.given_up));
    }
}
