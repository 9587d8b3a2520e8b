//! What the journal costs: sixteen streams of a mock pipeline of two stages, with the journal on the
//! disk, in memory and off, in turns. Tokens per second of all streams together, and the times
//! between tokens as the clients see them.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use futures::future::join_all;
use harness::ask;
use harness::mocked::{Mocked, Shape};
use millrace_coordinator::journal::{JournalConfig, JournalMode};
use millrace_net::client::Client;
use millrace_shared::wire::rpc::{GenerateEvent, Prompt};

const STREAMS: u32 = 16;
const TOKENS: u32 = 400;
const ROUNDS: usize = 3;

/// A stream to its end: the times between its tokens.
async fn stream(client: &Client, first: u32) -> Vec<Duration> {
    let prompt = Prompt::Tokens(vec![first % 16; 4]);
    let mut stream = ask::begin(client, prompt, ask::greedy(TOKENS)).await.unwrap();
    let (mut gaps, mut last) = (Vec::new(), None);
    while let Some(event) = stream.next().await {
        if let GenerateEvent::Token { .. } = event.unwrap() {
            let now = Instant::now();
            gaps.extend(last.replace(now).map(|before| now - before));
        }
    }
    gaps
}

fn measure(mode: JournalMode) -> (f64, Vec<Duration>) {
    let mut shape = Shape::of_layers([Duration::from_micros(500); 2], 8);
    shape.journal = JournalConfig { mode, ..JournalConfig::default() };
    shape.kv_cache_tokens = Some(STREAMS * (TOKENS + 64));
    let cluster = Mocked::start(&shape);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = ask::connect(cluster.client()).await;
        stream(&client, 0).await;
        let start = Instant::now();
        let all = join_all((0..STREAMS).map(|i| stream(&client, i))).await;
        let rate = f64::from(STREAMS * TOKENS) / start.elapsed().as_secs_f64();
        client.close().await;
        (rate, all.concat())
    })
}

fn main() {
    let modes =
        [("off", JournalMode::Off), ("memory", JournalMode::Memory), ("disk", JournalMode::Disk)];
    let mut seen = modes.map(|_| (Vec::new(), Vec::new()));
    for _ in 0..ROUNDS {
        for (i, (_, mode)) in modes.iter().enumerate() {
            let (rate, gaps) = measure(*mode);
            seen[i].0.push(rate);
            seen[i].1.extend(gaps);
        }
    }
    println!("journal   tokens/s, median of {ROUNDS}   between tokens p50 ms   p99 ms");
    for ((name, _), (mut rates, mut gaps)) in modes.into_iter().zip(seen) {
        rates.sort_by(f64::total_cmp);
        gaps.sort();
        let ms = |share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        println!("{name:<8}{:>21.0}{:>24.2}{:>9.2}", rates[ROUNDS / 2], ms(0.5), ms(0.99));
    }
}
