//! The efficiency of pipelines over real QUIC, beside its prediction.

use std::time::Duration;

use harness::mocked::{Mocked, Shape};
use harness::relay::Way;

use crate::clients::{Seen, run as drive};
use crate::model::{self, LAYERS, LINKS_MS, ROWS};
use crate::plot::Series;

/// Tokens per second of all nodes alone: [`ROWS`] every 20 ms, together.
const ALONE: f64 = ROWS as f64 / 20e-3;
/// Until the pipeline is full and its window settled.
const WARM: Duration = Duration::from_millis(2000);
const MEASURE: Duration = Duration::from_millis(3200);
/// Above it processors are what is measured.
const SPARE: f64 = 0.70;

fn measure(stages: u32, even: bool, link_ms: u32) -> Seen {
    let layer = |speed| Duration::from_secs_f64(model::layer_seconds(stages, speed));
    let way = Way::delayed(Duration::from_millis(link_ms.into()));
    let streams = model::streams(stages);
    let cluster = Mocked::start(&Shape {
        link: Some(way),
        max_batch_tokens: Some(ROWS),
        max_num_seqs: streams,
        ..Shape::of_layers(model::speeds(stages, even).into_iter().map(layer), LAYERS)
    });
    drive(&cluster, streams, model::answer_tokens, (WARM, MEASURE))
}

/// Measures, prints, and returns what is to be drawn.
pub(crate) fn run(stages: &[u32]) -> Vec<Series> {
    println!("Efficiency over real QUIC: tokens/s over {ALONE:.0}, what all nodes do alone");
    println!(
        "{:<7} {:>6} {:>7} {:>10} {:>10} {:>6} {:>10} {:>11}",
        "nodes", "stages", "link", "measured", "predicted", "rows", "busiest", "processors"
    );
    let (mut all, mut worst, mut busiest) = (Vec::new(), f64::INFINITY, 0.0f64);
    for even in [true, false] {
        let name = if even { "equal" } else { "2:1:1" };
        for link in LINKS_MS {
            let mut values = Vec::new();
            for &n in stages {
                let predicted = model::efficiency(n, even, link, |_| {});
                let seen = measure(n, even, link);
                let efficiency = seen.tokens_per_second / ALONE;
                println!(
                    "{name:<7} {n:>6} {:>7} {:>9.1}% {:>9.1}% {:>6.2} {:>9.1}% {:>10.1}%",
                    format!("{link} ms"),
                    efficiency * 100.0,
                    predicted * 100.0,
                    seen.rows,
                    seen.busiest * 100.0,
                    seen.processors * 100.0
                );
                worst = worst.min(efficiency);
                busiest = busiest.max(seen.processors);
                values.push(efficiency);
            }
            all.push(Series { name: format!("{name}, {link} ms"), dashed: !even, values });
        }
    }
    let verdict = if busiest < SPARE { "to spare" } else { "NOT to spare: figures mean little" };
    println!(
        "lowest efficiency {:.1} %; processors at most {:.1} % busy, {verdict}",
        worst * 100.0,
        busiest * 100.0
    );
    all
}
