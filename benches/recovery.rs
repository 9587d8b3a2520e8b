//! How long streams stand still when a stage is killed, or drains, and a stand-by has its weights
//! cached: `cargo bench --bench recovery -- --rounds 6 --drains 4`.
//!
//! Two stages and one node more, real processes on this machine with one cache folder between them,
//! the real model, sixteen streams. Each round kills the node of one stage (`kill -9`), then starts
//! it again as the stand-by. What is printed: from the kill to its detection, from there to the
//! pipeline's being ready, and to the streams' next tokens, beside the bound of 0.5 s and 1.2 times
//! what computing the streams' tokens anew takes at the rate at which prompts were computed before.
//! A drain (SIGTERM) is judged by the longest silence of the streams while it goes on: what hands
//! layers over beside the work stands still only for the switch, which computes the streams anew.
//! It says more about recovery the less else runs on the machine; the load is printed too.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::ask;
use harness::chaos::Dice;
use harness::processes::{Coordinator, Process, command};
use harness::{block_on, model_arg, wait_for};
use millrace_net::client::ClientConfig;
use millrace_shared::wire::rpc::{GenerateEvent, Prompt};

const STREAMS: usize = 16;
const STAGES: u32 = 2;
const PROMPT_TOKENS: usize = 100;
/// Long enough that few streams end before the loss of their stage is noticed.
const TOKENS: u32 = 600;
/// Tokens of every stream before the kill.
const BEFORE: usize = 20;
const OPTIONS: [&str; 4] = ["--kv-cache-tokens", "16384", "--recovery-timeout", "120"];

/// Seconds of the day in UTC, as logs have them.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() % 86_400.0
}

/// When the last line with this mark was written, if that was after `since`.
fn logged(log: &str, mark: &str, since: f64) -> Option<f64> {
    let line = log.lines().rfind(|line| line.contains(mark))?;
    let time = line.split_whitespace().next()?.split_once('T')?.1.trim_end_matches('Z');
    let parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let at = parts.collect::<Option<Vec<f64>>>()?.iter().fold(0.0, |sum, part| sum * 60.0 + part);
    (at > since).then_some(at)
}

fn node(coordinator: &Coordinator, name: &str) -> Process {
    let dir = coordinator.root.join(name);
    let mut run = command("millrace-node", &coordinator.root);
    run.arg("run").arg("--dir").arg(&dir).args(["--name", name, "--threads", "1"]);
    run.args(["--listen", "127.0.0.1:0", "--weights", model_arg()]);
    if !dir.join("node.toml").exists() {
        run.args(["--token", &coordinator.token]);
    }
    Process::start(name, run, &coordinator.root)
}

/// Prompts that no prefix cache has seen.
fn prompts(dice: &mut Dice) -> Vec<Prompt> {
    let mut prompt = || Prompt::Tokens((0..PROMPT_TOKENS).map(|_| token(dice)).collect());
    (0..STREAMS).map(|_| prompt()).collect()
}

fn token(dice: &mut Dice) -> u32 {
    1000 + dice.below(40_000) as u32
}

/// When each token of each stream came.
type Times = Mutex<Vec<Vec<f64>>>;

fn read_all(config: &ClientConfig, prompts: Vec<Prompt>, tokens: u32, times: &Times) {
    block_on(async {
        let client = ask::connect(config).await;
        let reads = prompts.into_iter().enumerate().map(|(stream, prompt)| {
            let client = &client;
            async move {
                let mut events =
                    ask::begin(client, prompt, ask::sampled(stream as u64, tokens)).await.unwrap();
                while let Some(event) = events.next().await {
                    if matches!(event.unwrap(), GenerateEvent::Token { .. }) {
                        times.lock().unwrap()[stream].push(now());
                    }
                }
            }
        });
        futures::future::join_all(reads).await;
        client.close().await;
    });
}

fn fresh() -> Times {
    Mutex::new(vec![Vec::new(); STREAMS])
}

/// Prompt tokens a second, all streams at once; the median of five.
fn prefill_rate(config: &ClientConfig, dice: &mut Dice) -> f64 {
    let mut rates: Vec<f64> = (0..5)
        .map(|_| {
            let (begun, times) = (now(), fresh());
            read_all(config, prompts(dice), 1, &times);
            let last = times.lock().unwrap().iter().flatten().copied().fold(begun, f64::max);
            (STREAMS * PROMPT_TOKENS) as f64 / (last - begun)
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[2]
}

/// What a round has shown; seconds.
struct Round {
    detected: f64,
    ready: f64,
    next_p50: f64,
    next_p99: f64,
    replayed: usize,
}

/// Kills the node of a stage under the streams; its name, and what came of it.
fn round(
    coordinator: &Coordinator,
    nodes: &mut Vec<(String, Process)>,
    stage: usize,
    dice: &mut Dice,
) -> (String, Round) {
    let config = &coordinator.client;
    let status = block_on(async { ask::connect(config).await.status().await.unwrap() });
    let name = status.stages[stage].node_name.clone();
    let (times, prompts) = (fresh(), prompts(dice));
    let round = std::thread::scope(|scope| {
        let reading = scope.spawn(|| read_all(config, prompts, TOKENS, &times));
        wait_for("tokens of all streams", || {
            times.lock().unwrap().iter().all(|t| t.len() >= BEFORE).then_some(())
        });
        let killed = now();
        let victim = nodes.iter_mut().find(|(n, _)| *n == name).unwrap();
        victim.1.kill();
        let mark = |mark| wait_for(mark, || logged(&coordinator.process.log(), mark, killed));
        let (lost, ready) = (mark("node lost"), mark("pipeline ready"));
        reading.join().unwrap();
        let times = times.lock().unwrap();
        assert!(times.iter().all(|t| t.len() == TOKENS as usize), "a stream lost tokens");
        let before = times.iter().map(|t| t.iter().filter(|&&at| at < lost).count());
        let going = before.filter(|&tokens| tokens < TOKENS as usize);
        let replayed = going.map(|tokens| PROMPT_TOKENS + tokens).sum();
        // Those that had ended have none.
        let next = times.iter().filter_map(|t| t.iter().find(|&&at| at > lost));
        let mut next: Vec<f64> = next.map(|at| at - lost).collect();
        assert!(next.len() > STREAMS / 2, "most streams ended before the loss");
        next.sort_by(f64::total_cmp);
        let (next_p50, next_p99) = (next[next.len() / 2], next[next.len() - 1]);
        Round { detected: lost - killed, ready: ready - lost, next_p50, next_p99, replayed }
    });
    start_again(coordinator, nodes, &name);
    (name, round)
}

/// Starts a node that has ended as the stand-by.
fn start_again(coordinator: &Coordinator, nodes: &mut Vec<(String, Process)>, name: &str) {
    nodes.retain(|(n, _)| n != name);
    nodes.push((name.to_owned(), node(coordinator, name)));
    wait_for("the node that has ended", || {
        let client = &coordinator.client;
        let status = block_on(async { ask::connect(client).await.status().await.unwrap() });
        (status.nodes == STAGES + 1).then_some(())
    });
    // It measures the model's layers before it is of use.
    std::thread::sleep(Duration::from_secs(3));
}

/// What a drain has shown; seconds.
struct Drained {
    /// From the signal to the process's end.
    left: f64,
    /// The longest silence of a stream that touches it: the median stream's, and the most of all.
    silence_p50: f64,
    silence_max: f64,
    replayed: usize,
}

/// Asks the node of a stage to leave, under the streams.
fn drain(
    coordinator: &Coordinator,
    nodes: &mut Vec<(String, Process)>,
    stage: usize,
    dice: &mut Dice,
) -> Drained {
    let config = &coordinator.client;
    let status = block_on(async { ask::connect(config).await.status().await.unwrap() });
    let name = status.stages[stage].node_name.clone();
    let (times, prompts) = (fresh(), prompts(dice));
    let drained = std::thread::scope(|scope| {
        let reading = scope.spawn(|| read_all(config, prompts, TOKENS, &times));
        wait_for("tokens of all streams", || {
            times.lock().unwrap().iter().all(|t| t.len() >= BEFORE).then_some(())
        });
        let asked = now();
        let victim = nodes.iter_mut().find(|(n, _)| *n == name).unwrap();
        assert_eq!(victim.1.terminate().code(), Some(0), "{}", victim.1.log());
        let ended = now();
        reading.join().unwrap();
        let times = times.lock().unwrap();
        assert!(times.iter().all(|t| t.len() == TOKENS as usize), "a stream lost tokens");
        let touches = |pair: &&[f64]| pair[0] < ended && pair[1] > asked;
        let longest = |t: &Vec<f64>| {
            let gaps = t.windows(2).filter(touches).map(|pair| pair[1] - pair[0]);
            gaps.fold(0.0, f64::max)
        };
        let mut silences: Vec<f64> = times.iter().map(longest).collect();
        silences.sort_by(f64::total_cmp);
        let before = times.iter().map(|t| t.iter().filter(|&&at| at < ended).count());
        let replayed = before.map(|tokens| PROMPT_TOKENS + tokens).sum();
        let (silence_p50, silence_max) = (silences[STREAMS / 2], silences[STREAMS - 1]);
        Drained { left: ended - asked, silence_p50, silence_max, replayed }
    });
    start_again(coordinator, nodes, &name);
    drained
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: usize| {
        let at = words.iter().position(|w| w == name);
        at.and_then(|at| words.get(at + 1)).map_or(default, |w| w.parse().unwrap())
    };
    let (rounds, drains) = (number("--rounds", 6), number("--drains", 4));
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), STAGES, &OPTIONS);
    let mut nodes = Vec::new();
    for name in ["a", "b", "c"] {
        if name == "c" {
            // The first token is good for as many nodes as there are stages.
            coordinator.renew_token();
        }
        nodes.push((name.to_owned(), node(&coordinator, name)));
    }
    coordinator.wait_ready();
    let mut dice = Dice::new(7);
    // Both halves are packed and cached once every node has had its turn.
    round(&coordinator, &mut nodes, 0, &mut dice);
    round(&coordinator, &mut nodes, 1, &mut dice);
    let rate = prefill_rate(&coordinator.client, &mut dice);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("prompts: {rate:.0} tokens/s; load of the machine: {}", load.trim());
    println!(
        "stage  detected  ready  next p50  next p99  replayed  bound  (s; the last three from detection)"
    );
    let mut kept = 0;
    for number in 0..rounds {
        let stage = number % STAGES as usize;
        let (_, r) = round(&coordinator, &mut nodes, stage, &mut dice);
        let bound = 0.5 + 1.2 * r.replayed as f64 / rate;
        kept += usize::from(r.next_p50 <= bound);
        println!(
            "{stage:>5}  {:>8.2}  {:>5.2}  {:>8.2}  {:>8.2}  {:>8}  {bound:>5.2}",
            r.detected, r.ready, r.next_p50, r.next_p99, r.replayed
        );
    }
    println!("{kept} of {rounds} within the bound");
    println!("drain  left  silence p50    max  replayed  bound  (s)");
    for number in 0..drains {
        let stage = number % STAGES as usize;
        let d = drain(&coordinator, &mut nodes, stage, &mut dice);
        let bound = 0.5 + 1.2 * d.replayed as f64 / rate;
        println!(
            "{stage:>5}  {:>4.1}  {:>11.2}  {:>5.2}  {:>8}  {bound:>5.2}",
            d.left, d.silence_p50, d.silence_max, d.replayed
        );
    }
}
