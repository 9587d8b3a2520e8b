//! Clients in a closed loop over the QUIC API, on this thread; what they saw, and what the machine
//! spent meanwhile.

use std::cell::Cell;
use std::time::{Duration, Instant};

use futures::future::{join_all, select};
use harness::ask;
use harness::mocked::Mocked;
use millrace_net::client::Client;
use millrace_net::cpu_time::process_seconds;
use millrace_shared::wire::rpc::{GenerateEvent, Prompt, StageStatus};

/// Connections that the streams share.
const CONNECTIONS: usize = 4;

/// What was seen of a cluster under load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) tokens_per_second: f64,
    /// Rows of a micro-batch, on average.
    pub(crate) rows: f64,
    /// Share of the time that the busiest stage was inside its step.
    pub(crate) busiest: f64,
    /// Share of this machine's processors that this process kept busy.
    pub(crate) processors: f64,
}

/// Counters at a moment.
struct Moment {
    at: Instant,
    tokens: u64,
    cpu_seconds: f64,
    /// By the clocks of the heartbeats that carried them.
    stages: Vec<StageStatus>,
}

impl Moment {
    async fn now(client: &Client, tokens: u64) -> Self {
        let status = client.status().await.expect("a status");
        Self { at: Instant::now(), tokens, cpu_seconds: process_seconds(), stages: status.stages }
    }
}

/// Keeps so many streams going, each with one request after the other of `answer(n)` tokens; looks
/// at them for `measure`, after `warm`.
pub(crate) fn run(
    cluster: &Mocked,
    streams: u32,
    answer: impl Fn(u64) -> u32,
    (warm, measure): (Duration, Duration),
) -> Seen {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let connecting = (0..CONNECTIONS).map(|_| ask::connect(cluster.client()));
        let clients = join_all(connecting).await;
        // Known beforehand, so that checking costs nothing.
        let longest = (0..1000).map(&answer).max().unwrap_or(0) as usize;
        let expected: Vec<Vec<u32>> =
            (0..cluster.vocab()).map(|token| cluster.expected(&[token], longest)).collect();
        let (tokens, next) = (Cell::new(0u64), Cell::new(0u64));
        let stream = async |client: &Client| {
            loop {
                let n = next.replace(next.get() + 1);
                let prompt = (n % u64::from(cluster.vocab())) as u32;
                let count = answer(n);
                let params = ask::greedy(count);
                let asked = ask::begin(client, Prompt::Tokens(vec![prompt]), params).await;
                let mut stream = asked.expect("the cluster takes the request");
                let mut wanted = expected[prompt as usize].iter();
                while let Some(event) = stream.next().await {
                    if let GenerateEvent::Token { token_id, .. } = event.expect("an event") {
                        assert_eq!(Some(&token_id), wanted.next(), "request {n}");
                        tokens.set(tokens.get() + 1);
                    }
                }
            }
        };
        let looking = async {
            tokio::time::sleep(warm).await;
            let before = Moment::now(&clients[0], tokens.get()).await;
            tokio::time::sleep(measure).await;
            let after = Moment::now(&clients[0], tokens.get()).await;
            seen(&before, &after)
        };
        let streams = join_all((0..streams as usize).map(|i| stream(&clients[i % CONNECTIONS])));
        match select(Box::pin(looking), Box::pin(streams)).await {
            futures::future::Either::Left((seen, _)) => seen,
            futures::future::Either::Right(_) => unreachable!("streams never end"),
        }
    })
}

fn seen(before: &Moment, after: &Moment) -> Seen {
    let wall = (after.at - before.at).as_secs_f64();
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let tokens = (after.tokens - before.tokens) as f64;
    let tokens_per_second = tokens / wall;
    let per_second = |value: fn(&StageStatus) -> f64| {
        let stages = after.stages.iter().zip(&before.stages);
        stages.map(move |(a, b)| (value(a) - value(b)) / (a.wall_seconds - b.wall_seconds))
    };
    let steps = per_second(|s| s.steps as f64).next().unwrap_or(f64::NAN);
    Seen {
        tokens_per_second,
        rows: tokens_per_second / steps,
        busiest: per_second(|s| s.busy_seconds).fold(0.0, f64::max),
        processors: (after.cpu_seconds - before.cpu_seconds) / wall / cores,
    }
}
