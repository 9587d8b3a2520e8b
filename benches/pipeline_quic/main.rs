//! A pipeline over real QUIC, where nodes are faster than this machine has processors: the table of
//! `benches/pipeline`, measured, beside what it predicts in virtual time.
//!
//! `cargo bench --bench pipeline_quic -- [efficiency] [hops] [STAGES ...] [DIR]`; without arguments
//! everything, which takes less than four minutes. The coordinator, the nodes (each on a thread of
//! its own), QUIC and its edges, the scheduler and the clients are real; the engines are the mock,
//! whose step takes 20 ms x its share of 128 layers x stages / speed of its node, whatever the rows.
//! Relays make every link: each way, a datagram arrives so much later. Every token is checked.
//!
//! *Efficiency* = tokens/s over the sum of what each node alone would do with the whole model, 400
//! by arithmetic. It means something only while processors are to spare, so the share that all of it
//! kept busy is printed: below 70 % they are not what is measured. *Hops* are from output ready on
//! one engine to input ready on the next, two stages on loopback without relays; see
//! `StageTime::hop_micros`.
#![allow(clippy::print_stdout, reason = "it prints tables")]

#[path = "../pipeline/model.rs"]
#[allow(dead_code, reason = "the tables in virtual time use all of it")]
mod model;
#[path = "../pipeline/plot.rs"]
#[allow(dead_code, reason = "bars are another table's")]
mod plot;

mod clients;
mod efficiency;
mod hops;

use std::path::PathBuf;
use std::time::Instant;

fn main() -> std::io::Result<()> {
    let (mut stages, mut parts, mut folder) = (Vec::new(), Vec::new(), None);
    // Cargo adds `--bench`.
    for arg in std::env::args().skip(1).filter(|a| a != "--bench") {
        match (arg.parse(), arg.as_str()) {
            (Ok(n), _) => stages.push(n),
            (_, "efficiency" | "hops") => parts.push(arg),
            _ => folder = Some(PathBuf::from(arg)),
        }
    }
    let start = Instant::now();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    if stages.is_empty() {
        stages = vec![2, 4, 8];
    }
    if wanted("hops") {
        hops::run();
    }
    if wanted("efficiency") {
        let series = efficiency::run(&stages);
        if let Some(folder) = folder {
            std::fs::create_dir_all(&folder)?;
            let lines = plot::lines("Pipeline efficiency over real QUIC", &stages, &series);
            std::fs::write(folder.join("efficiency-quic.svg"), lines)?;
        }
    }
    println!("\n{:.0} s in all", start.elapsed().as_secs_f64());
    Ok(())
}
