//! How long plans take: the largest clusters that are planned exactly, all nodes unlike, and larger
//! ones.

use criterion::{Criterion, criterion_group, criterion_main};
use millrace_shared::partition::{
    Curve, Link, ModelCosts, Network, NodeCosts, Objective, Problem, solve,
};

fn model(layers: usize, uneven: bool) -> ModelCosts {
    let share = |l: usize| if uneven { 1.0 + (l % 3) as f64 * 0.1 } else { 1.0 };
    ModelCosts {
        layer_bytes: (0..layers).map(|l| (3e9 * share(l)) as u64).collect(),
        layer_share: (0..layers).map(share).collect(),
        embed_bytes: 2 << 30,
        head_bytes: 2 << 30,
        tied_head: false,
        kv_bytes_per_layer: 1 << 28,
        stage_bytes: 1 << 30,
        row_bytes: 65_536,
    }
}

/// `kinds` kinds of nodes, taken in turn.
fn nodes(count: usize, kinds: usize) -> Vec<NodeCosts> {
    let node = |i: usize| {
        let layer = 0.002 * (1.0 + 0.37 * (i % kinds) as f64);
        NodeCosts {
            name: format!("n{i}"),
            layer: Curve::new([(1.0, layer), (64.0, layer * 3.0)]),
            head: Curve::flat(layer * 4.0),
            embed: Curve::flat(layer * 0.01),
            pin: None,
            memory_bytes: (60 << 30) + (((i % kinds) as u64 * 7) << 30),
        }
    };
    (0..count).map(node).collect()
}

fn bench(c: &mut Criterion) {
    let link = Link { rtt_seconds: 0.001, bytes_per_second: 1.25e9 };
    let mut run = |name: &str, (count, kinds), layers, uneven, objective| {
        let (model, nodes) = (model(layers, uneven), nodes(count, kinds));
        let mut network = Network::uniform(count, link);
        for i in 0..kinds.min(count) {
            // No two links alike where nodes are not.
            let slower = Link { rtt_seconds: 0.001 * (1 + i) as f64, ..link };
            (0..count).filter(|n| n % kinds == i).for_each(|n| network.set(count, n, Some(slower)));
        }
        let problem = Problem { model: &model, nodes: &nodes, network: &network, rows: 16.0 };
        let found = solve(&problem, objective, None).expect("it fits");
        eprintln!("{name}: {} stages, gap {:.1} %", found.stages.len(), found.gap() * 100.0);
        c.bench_function(name, |b| b.iter(|| solve(&problem, objective, None)));
    };
    let four = Objective::Period { micro_batches: 4 };
    run("throughput, 14 unlike nodes, 126 layers", (14, 14), 126, false, Objective::Throughput);
    run(
        "throughput, 14 unlike nodes, 126 unlike layers",
        (14, 14),
        126,
        true,
        Objective::Throughput,
    );
    run("latency, 9 unlike nodes, 126 layers", (9, 9), 126, true, Objective::Latency);
    run("period, 9 unlike nodes, 126 layers", (9, 9), 126, true, four);
    run("throughput, 32 nodes of 4 kinds, 126 layers", (32, 4), 126, false, Objective::Throughput);
    run("throughput, 40 unlike nodes, 126 layers", (40, 40), 126, false, Objective::Throughput);
    run("period, 40 unlike nodes, 126 layers", (40, 40), 126, false, four);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(3));
    targets = bench
}
criterion_main!(benches);
