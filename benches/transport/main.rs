//! What a hop between two stages costs on this machine: ping-pong of activation frames over a stage
//! edge (QUIC, mutual TLS, credits), beside the same bytes over plain UDP and TCP, in one run.
//!
//! Both ends live on threads of their own, as two processes would: a hop holds two wake-ups. One way
//! is half of a round trip, with building, sealing and checking of the frame on the QUIC side.
//! `cargo bench --bench transport`; figures are for comparison within one run.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod plain;
mod quic;

use std::time::{Duration, Instant};

use harness::frames::{HIDDEN, activations};

/// Round trips of one measurement, after a tenth as many to warm up.
const ROUNDS: usize = 2000;
/// Frames that may be under way in the throughput measurement.
const WINDOW: u32 = 8;
/// Frames of a throughput measurement.
const FRAMES: usize = 1500;

/// Round trips, sorted.
fn ping_pong(mut once: impl FnMut()) -> Vec<Duration> {
    (0..ROUNDS / 10).for_each(|_| once());
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            once();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

/// One way: half of the round trip at this share of them, milliseconds.
fn one_way(times: &[Duration], share: f64) -> f64 {
    let at = ((times.len() - 1) as f64 * share) as usize;
    times[at].as_secs_f64() * 1e3 / 2.0
}

fn main() {
    // Cargo's own flags; there is nothing to choose.
    println!("activation frames of {HIDDEN} floats a row, loopback, {ROUNDS} round trips each\n");
    println!("rows      bytes   transport    one way p50      p99      moved");
    for rows in [1_usize, 8, 64] {
        let bytes = activations(rows, 1).as_bytes().len();
        let line = |name: &str, times: &[Duration], rate: f64| {
            println!(
                "{rows:>4} {bytes:>10}   {name:<9}  {:>9.3} ms {:>7.3} ms {:>7.2} GB/s",
                one_way(times, 0.5),
                one_way(times, 0.99),
                rate / 1e9
            );
        };
        let (times, rate) = quic::measure(rows);
        line("QUIC edge", &times, rate);
        let (times, rate) = plain::tcp(bytes);
        line("TCP", &times, rate);
        // What exceeds a socket's buffer is lost without the flow control that this is about.
        if bytes <= plain::UDP_FRAME {
            let (times, rate) = plain::udp(bytes);
            line("UDP", &times, rate);
        }
    }
}
