//! Faults on purpose, by a seeded schedule, under clients that read: real processes, links through
//! relays, the real model.
//!
//! Every node reaches the coordinator through one relay and is reached by its neighbours through
//! another. Streams ask for answers that are known; a fault begins, ends, and the pipeline must
//! serve again before the next one. What is checked as it goes: every request ends, with the tokens
//! of the run without faults, each once. What is measured: how long streams stood still.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use millrace_net::client::ClientConfig;
use millrace_shared::error::Status;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};
use nix::sys::signal::Signal;

use crate::ask::{self, Answer};
use crate::local::{Local, Shape};
use crate::processes::{Coordinator, Process, command};
use crate::relay::{Relay, Way};
use crate::{block_on, http, wait_for};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Everything random follows from it.
    pub seed: u64,
    /// Faults, one after the other.
    pub faults: usize,
    /// Clients that read at once.
    pub streams: usize,
    /// Stages of the pipeline.
    pub stages: u32,
    /// Nodes beyond those that serve.
    pub stand_bys: usize,
    /// No further fault begins after so long.
    pub patience: Duration,
}

/// What goes wrong, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// `kill -9` of a node, which is started again after a while.
    Kill(usize, Duration),
    /// The same of all nodes at once, as when a rack loses its power.
    Rack(Duration),
    /// `kill -9` of the coordinator, which is started again after a while.
    Coordinator(Duration),
    /// SIGSTOP of a node, then SIGCONT.
    Stop(usize, Duration),
    /// Nothing passes between a node and the coordinator, or its neighbours (`false`).
    Cut(usize, bool, Duration),
    /// All links of a node are like this for a while.
    Bad(usize, Way, Duration),
}

impl Fault {
    /// The kind, for tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kill(..) => "kill -9",
            Self::Rack(_) => "all nodes",
            Self::Coordinator(_) => "coordinator",
            Self::Stop(..) => "SIGSTOP",
            Self::Cut(..) => "cut link",
            Self::Bad(_, way, _) if way.corrupted > 0.0 => "corrupted",
            Self::Bad(_, way, _) if way.duplicated > 0.0 => "duplicated",
            Self::Bad(_, way, _) if way.jitter > Duration::ZERO => "reordered",
            Self::Bad(_, way, _) if way.loss > 0.0 => "loss",
            Self::Bad(..) => "delay",
        }
    }
}

/// A generator (splitmix64): the schedule is a function of the seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.next() % (to - from))
    }

    /// A fault on one of so many nodes.
    pub fn fault(&mut self, nodes: usize) -> Fault {
        let node = self.below(nodes);
        let way = Way::default();
        match self.below(12) {
            0 | 1 => Fault::Kill(node, self.millis(0, 1500)),
            9 => Fault::Coordinator(self.millis(0, 1000)),
            10 => Fault::Kill(node, self.millis(2000, 4000)),
            11 => Fault::Rack(self.millis(0, 1500)),
            2 => Fault::Stop(node, self.millis(200, 3000)),
            3 => Fault::Cut(node, self.below(2) == 0, self.millis(300, 3000)),
            4 => {
                let loss = 0.01 * (1 + self.below(5)) as f64;
                Fault::Bad(node, Way { loss, ..way }, self.millis(500, 2000))
            }
            5 => {
                let delay = Duration::from_millis(50);
                Fault::Bad(node, Way { delay, ..way }, self.millis(500, 2000))
            }
            6 => {
                let jitter = Duration::from_millis(20);
                Fault::Bad(node, Way { jitter, ..way }, self.millis(500, 2000))
            }
            7 => Fault::Bad(node, Way { duplicated: 0.3, ..way }, self.millis(500, 2000)),
            _ => Fault::Bad(node, Way { corrupted: 0.05, ..way }, self.millis(500, 2000)),
        }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Faults that were made, by kind.
    pub faults: BTreeMap<&'static str, usize>,
    /// Requests that ended as they should.
    pub requests: u64,
    /// Their tokens.
    pub tokens: u64,
    /// What went wrong; empty in a good run.
    pub wrong: Vec<String>,
    /// By kind of fault, of each stream: the longest silence that touches the fault.
    pub stalls: BTreeMap<&'static str, Vec<Duration>>,
    /// Epochs of the pipeline.
    pub epochs: f64,
}

impl Report {
    /// The stall below which `share` of them lie.
    pub fn stall(&self, share: f64) -> Duration {
        let mut all: Vec<Duration> = self.stalls.values().flatten().copied().collect();
        millrace_shared::sim::percentile(&mut all, share).unwrap_or_default()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text =
            format!("{:<12} {:>6} {:>10} {:>10}\n", "fault", "count", "stall p50", "p99");
        for (name, count) in &self.faults {
            let mut stalls = self.stalls.get(name).cloned().unwrap_or_default();
            let mut at = |share| {
                let stall = millrace_shared::sim::percentile(&mut stalls, share);
                format!("{:.2} s", stall.unwrap_or_default().as_secs_f64())
            };
            let (median, most) = (at(0.5), at(0.99));
            text += &format!("{name:<12} {count:>6} {median:>10} {most:>10}\n");
        }
        let faults: usize = self.faults.values().sum();
        text += &format!(
            "{faults} faults, {} epochs; {} requests ended, {} tokens, {} wrong; stall p50 {:.2} s, \
             p99 {:.2} s\n",
            self.epochs,
            self.requests,
            self.tokens,
            self.wrong.len(),
            self.stall(0.5).as_secs_f64(),
            self.stall(0.99).as_secs_f64()
        );
        text
    }
}

/// Of the coordinator.
const OPTIONS: [&str; 4] = ["--kv-cache-tokens", "16384", "--recovery-timeout", "120"];

/// What streams ask for: greedy, sampled, with penalties, stop strings and log-probabilities, in a
/// given form, several answers at once.
fn requests() -> Vec<GenerateRequest> {
    let sentence = "The wheel turns slowly while the water runs below the old stone bridge. ";
    let request = |i: usize| {
        let prompt = Prompt::Text(format!("{}Story {i}:", sentence.repeat(i % 4)));
        let tokens = 60 + 20 * (i as u32 % 4);
        let params = match i % 4 {
            _ if i == 6 => ask::constrained(i as u64, tokens),
            0 => ask::greedy(tokens),
            1 => SamplingParams { logprobs: Some(2), ..ask::sampled(7 + i as u64, tokens) },
            2 => SamplingParams {
                presence_penalty: 0.4,
                frequency_penalty: 0.3,
                repetition_penalty: 1.1,
                ..ask::sampled(i as u64, tokens)
            },
            _ => SamplingParams {
                stop: vec!["the end of the story that never".to_owned()],
                ..ask::sampled(i as u64, tokens)
            },
        };
        let choices = Choices::of(if i == 5 { 2 } else { 1 });
        GenerateRequest { model: String::new(), prompt, params, choices }
    };
    (0..8).map(request).collect()
}

/// What one stage says to which nothing happens: of each request, its choices.
fn truth(asked: &[GenerateRequest]) -> Vec<Vec<Answer>> {
    let single = Local::start(Shape::default());
    block_on(async {
        let client = ask::connect(single.client()).await;
        let mut answers = Vec::new();
        for request in asked {
            let answer = ask::choices(&client, request.clone(), |_| {}).await;
            answers.push(answer.expect("an answer"));
        }
        client.close().await;
        answers
    })
}

/// A node process, and the links to it.
struct Node {
    name: String,
    process: Process,
    /// From the node to the coordinator, and from its neighbours to the node.
    links: [Relay; 2],
}

fn free_port() -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    socket.local_addr().expect("its address")
}

impl Node {
    /// Enrols directly, and from then on lives behind its relays.
    fn start(coordinator: &Coordinator, index: usize, seed: u64) -> Self {
        let name = format!("node-{index}");
        let dir = coordinator.root.join(&name);
        let listen = free_port();
        let link =
            |n| Relay::start(Way::default(), Way::default(), seed ^ ((index as u64) << 8) ^ n);
        let links = [link(1), link(2)];
        links[0].set_target(coordinator.cluster);
        links[1].set_target(listen);
        let mut enrolling = coordinator.node(&name, &[]);
        let file = dir.join("node.toml");
        let papers = enrolling.wait_log("its papers", |log| {
            let enrolled = log.contains("enrolled");
            enrolled.then(|| std::fs::read_to_string(&file).ok()).flatten()
        });
        enrolling.kill();
        let (real, relayed) = (coordinator.cluster.to_string(), links[0].addr().to_string());
        assert!(papers.contains(&real), "{papers}");
        std::fs::write(&file, papers.replacen(&real, &relayed, 1)).expect("written");
        let process = Self::run(&coordinator.root, &name, listen, links[1].addr());
        Self { name, process, links }
    }

    fn run(root: &Path, name: &str, listen: SocketAddr, front: SocketAddr) -> Process {
        let mut run = command("millrace-node", root);
        run.env("MILLRACE_CACHE", root.join(format!("{name}-cache")));
        run.arg("run").arg("--dir").arg(root.join(name)).args(["--name", name, "--threads", "1"]);
        run.args(["--listen", &listen.to_string(), "--advertise", &front.to_string()]);
        run.args(["--weights", crate::model_arg()]);
        Process::start(name, run, root)
    }

    fn start_again(&mut self, root: &Path) {
        let listen = self.links[1].target().expect("it has a target");
        self.process = Self::run(root, &self.name, listen, self.links[1].addr());
    }

    fn set_ways(&self, way: Way) {
        self.links.iter().for_each(|link| link.set_ways(way, way));
    }
}

/// When tokens came.
struct Seen {
    /// Of each stream, the silences that are worth a note: from, until.
    silences: Vec<Mutex<Vec<(Instant, Instant)>>>,
    tokens: AtomicU64,
    requests: AtomicU64,
    wrong: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// No request takes so long, whatever is done to the cluster: more than the recovery time of two faults.
const LONGEST: Duration = Duration::from_secs(300);
/// Shorter ones are the model's own pace.
const NOTED: Duration = Duration::from_millis(50);

impl Seen {
    fn note(&self, stream: usize, from: Instant) {
        let now = Instant::now();
        if now - from >= NOTED {
            let mut noted = self.silences[stream].lock().unwrap_or_else(PoisonError::into_inner);
            noted.push((from, now));
        }
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }
}

/// Asks one request after the other until told to stop.
fn read(
    stream: usize,
    config: &ClientConfig,
    asked: &[GenerateRequest],
    truth: &[Vec<Answer>],
    seen: &Seen,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let client = ask::connect(config).await;
        let mut which = stream;
        while !seen.stop.load(Ordering::Relaxed) {
            which = (which + 1) % asked.len();
            let mut last = Instant::now();
            let answer = ask::choices(&client, asked[which].clone(), |event| {
                if matches!(event, GenerateEvent::Token { .. }) {
                    seen.note(stream, last);
                    last = Instant::now();
                    seen.tokens.fetch_add(1, Ordering::Relaxed);
                }
            });
            let timely = tokio::time::timeout(LONGEST, answer).await;
            match timely.unwrap_or_else(|_| Err(Status::internal("it never ended"))) {
                Ok(answer) if answer == truth[which] => {
                    seen.requests.fetch_add(1, Ordering::Relaxed);
                }
                Ok(answer) => seen
                    .wrong(format!("request {which}: {}", ask::difference(&answer, &truth[which]))),
                Err(status) => seen.wrong(format!("request {which}: {status}")),
            }
        }
        client.close().await;
    });
}

/// Makes the fault and ends it.
fn suffer(fault: Fault, plan: &Plan, coordinator: &mut Coordinator, nodes: &mut [Node]) {
    match fault {
        Fault::Coordinator(pause) => {
            coordinator.process.kill();
            std::thread::sleep(pause);
            coordinator.start_again(plan.stages, &OPTIONS);
        }
        Fault::Kill(node, pause) => {
            nodes[node].process.kill();
            std::thread::sleep(pause);
            nodes[node].start_again(&coordinator.root);
        }
        Fault::Rack(pause) => {
            nodes.iter_mut().for_each(|node| node.process.kill());
            std::thread::sleep(pause);
            nodes.iter_mut().for_each(|node| node.start_again(&coordinator.root));
        }
        Fault::Stop(node, time) => {
            nodes[node].process.signal(Signal::SIGSTOP);
            std::thread::sleep(time);
            nodes[node].process.signal(Signal::SIGCONT);
        }
        Fault::Cut(node, up, time) => {
            let link = &nodes[node].links[usize::from(!up)];
            link.set_ways(Way::cut(), Way::cut());
            std::thread::sleep(time);
            link.set_ways(Way::default(), Way::default());
        }
        Fault::Bad(node, way, time) => {
            nodes[node].set_ways(way);
            std::thread::sleep(time);
            nodes[node].set_ways(Way::default());
        }
    }
}

/// Waits until every stream has had tokens since.
fn wait_progress(coordinator: &Coordinator, seen: &Seen, streams: usize) {
    let before = seen.tokens.load(Ordering::Relaxed);
    let enough = before + 4 * streams as u64;
    wait_for("tokens after a fault", || {
        let ready = http::get(coordinator.http(), "/health").status == 200;
        (ready && seen.tokens.load(Ordering::Relaxed) >= enough).then_some(())
    });
}

/// Carries a plan out; `say` gets a line for each fault.
///
/// # Panics
/// If the cluster does not come back after a fault.
pub fn run(plan: Plan, mut say: impl FnMut(&str)) -> Report {
    let asked = requests();
    let truth = truth(&asked);
    let root = tempfile::tempdir().expect("a folder");
    let mut coordinator = Coordinator::start(root.path(), plan.stages, &OPTIONS);
    let count = plan.stages as usize + plan.stand_bys;
    let mut nodes: Vec<Node> = Vec::new();
    for index in 0..count {
        if index >= plan.stages as usize {
            // The first one is good for as many nodes as there are stages.
            coordinator.renew_token();
        }
        nodes.push(Node::start(&coordinator, index, plan.seed));
    }
    coordinator.wait_ready();
    let config = coordinator.client.clone();
    let seen = Seen {
        silences: (0..plan.streams).map(|_| Mutex::default()).collect(),
        tokens: AtomicU64::new(0),
        requests: AtomicU64::new(0),
        wrong: Mutex::default(),
        stop: AtomicBool::new(false),
    };
    let mut report = Report::default();
    let mut windows = Vec::new();
    std::thread::scope(|scope| {
        for stream in 0..plan.streams {
            let (config, asked, truth, seen) = (&config, &asked, &truth, &seen);
            scope.spawn(move || read(stream, config, asked, truth, seen));
        }
        let told = StopOnDrop(&seen.stop);
        wait_progress(&coordinator, &seen, plan.streams);
        let (mut dice, begun) = (Dice::new(plan.seed), Instant::now());
        for number in 0..plan.faults {
            let fault = dice.fault(count);
            if begun.elapsed() > plan.patience {
                break;
            }
            let from = Instant::now();
            suffer(fault, &plan, &mut coordinator, &mut nodes);
            wait_progress(&coordinator, &seen, plan.streams);
            let until = Instant::now();
            windows.push((fault.name(), from, until));
            *report.faults.entry(fault.name()).or_default() += 1;
            let took = (until - from).as_secs_f64();
            say(&format!("fault {number}: {fault:?}, over after {took:.1} s"));
        }
        drop(told);
    });
    for silences in &seen.silences {
        let silences = silences.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, from, until) in &windows {
            let touching = silences.iter().filter(|(a, b)| a < until && b > from);
            let longest = touching.map(|(a, b)| *b - *a).max().unwrap_or_default();
            report.stalls.entry(*name).or_default().push(longest);
        }
    }
    report.requests = seen.requests.load(Ordering::Relaxed);
    report.tokens = seen.tokens.load(Ordering::Relaxed);
    report.wrong = seen.wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.epochs = coordinator.metric("millrace_plan_epoch");
    coordinator.wait_nothing_left();
    report
}

/// Tells the streams to end, also where a panic is under way.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
