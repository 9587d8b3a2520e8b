//! Two stages for real: nodes as processes of their own with a core each, a coordinator and clients.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use millrace_coordinator::cli::{LimitArgs, create_token, deployment};
use millrace_coordinator::plan::cluster::{describe, parse};
use millrace_coordinator::{Config, Running};
use millrace_net::client::Client;
use millrace_shared::model::Dtype;
use millrace_shared::model::ModelFiles;
use millrace_shared::options::EngineOptions;
use millrace_shared::partition::{Choice, Goal, LayerRange, Problem, StageCut, Wish};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{Choices, ClusterStatus, GenerateEvent, GenerateRequest, Prompt};

use super::{Outcome, parts};

/// The word by which this program knows that it is a node.
pub(crate) const NODE: &str = "--node";
const STAGES: u16 = 2;
/// Streams of the runs, each a cluster that was planned for so many.
const STREAMS: [u32; 2] = [16, 32];
/// Longer than the coordinator watches before it brings measurements up to date.
const WARM: Duration = Duration::from_secs(45);
/// Half the context that plans are made for, and as much again: the mean is what they reckon with.
const PROMPT: usize = 128;
const ANSWER: u32 = 256;

/// A node, until it is killed.
pub(crate) fn node(args: &[OsString]) {
    let word = |i: usize| args[i].to_str().unwrap().to_owned();
    let at = args.iter().position(|a| a == NODE).unwrap();
    let (dir, token, core) = (PathBuf::from(&args[at + 1]), word(at + 2), word(at + 3));
    let mut cores = nix::sched::CpuSet::new();
    cores.set(core.parse().unwrap()).unwrap();
    let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cores);
    let config = millrace_node::Config {
        cache: dir.join("cache"),
        dir,
        token: Some(token.parse().unwrap()),
        coordinator: None,
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        next_free_port: false,
        advertise: None,
        name: format!("node-{core}"),
        weights: Some(harness::model().to_owned()),
        threads: Some(1),
        nodes_in_process: 1,
        memory_bytes: None,
        engine: millrace_shared::options::EngineKind::Cpu,
        torch: millrace_shared::options::TorchOptions::default(),
        require_kv_dtype: None,
        require_activation_dtype: None,
        show_progress: false,
        drains: false,
    };
    actix_rt::System::new().block_on(async {
        let membership = millrace_node::enrol::membership(&config).await.unwrap();
        let mut running = millrace_node::start(config, membership).await.unwrap();
        running.refused().await;
    });
}

struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_node(folder: &Path, token: &str, core: usize) -> Node {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.arg(NODE).arg(folder.join(format!("node-{core}"))).arg(token).arg(core.to_string());
    Node(command.stdout(Stdio::null()).spawn().unwrap())
}

/// The largest error.
pub(crate) fn run() -> f64 {
    let outcomes = STREAMS.map(|streams| actix_rt::System::new().block_on(cluster(streams)));
    outcomes.iter().map(|o| o.error().abs()).fold(0.0, f64::max)
}

async fn cluster(streams: u32) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let running = millrace_coordinator::start(config(folder.path(), streams)).await.unwrap();
    let token = create_token(&running.dir, STAGES.into(), Duration::from_secs(600)).unwrap();
    let nodes: Vec<Node> =
        (0..STAGES.into()).map(|core| start_node(folder.path(), &token, core)).collect();
    tokio::time::timeout(Duration::from_secs(120), running.ready()).await.unwrap().unwrap();
    let client = Client::connect(running.client()).await.unwrap();
    // Until the members' own measurements have been brought up to date by what is seen.
    let begun = Instant::now();
    let fresh = forecast(&described(&client).await, &client.status().await.unwrap(), streams);
    while begun.elapsed() < WARM {
        decode(&running, streams).await;
    }
    let choice = forecast(&described(&client).await, &client.status().await.unwrap(), streams);
    let mut seen = decode(&running, streams).await;
    let again = decode(&running, streams).await;
    // What else runs on the machine only makes it slower.
    if again.tokens_per_second > seen.tokens_per_second {
        seen = again;
    }
    let f = &choice.forecast;
    let outcome = Outcome {
        name: format!("2 live, {streams} streams"),
        cut: choice.stages.iter().map(|s| s.range.len()).collect(),
        micro_batches: f.micro_batches,
        rows: f.rows,
        predicted: f.tokens_per_second,
        measured: seen.tokens_per_second,
        stages: f.stage_seconds.iter().zip(&seen.steps).map(|(p, m)| [p * 1e3, m * 1e3]).collect(),
    };
    println!(
        "{}   {:.1} as measured alone; {:.1} rows a step; {:.0} % of the cores taken by all but the stages; stages busy {}",
        outcome.line(None),
        fresh.forecast.tokens_per_second,
        seen.rows,
        seen.others * 100.0,
        seen.busy
    );
    client.close().await;
    drop(nodes);
    running.stop().await;
    outcome
}

async fn described(client: &Client) -> String {
    match client.admin(AdminRequest::Describe).await.unwrap() {
        AdminReply::Description(text) => text,
        other => panic!("no description: {other:?}"),
    }
}

/// Counters at a moment.
struct Moment {
    at: Instant,
    status: ClusterStatus,
    cores_seconds: f64,
}

/// Seconds for which the stages' cores did anything, for anybody: `/proc/stat` counts in hundredths.
fn cores_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap();
    let core = |i: u16| {
        let name = format!("cpu{i} ");
        let line = text.lines().find_map(|l| l.strip_prefix(&name)).unwrap();
        let ticks: Vec<f64> = line.split_whitespace().map(|t| t.parse().unwrap()).collect();
        // User, nice, system; not idle nor waiting; interrupts and what other guests took.
        ticks[..3].iter().chain(&ticks[5..8]).sum::<f64>() / 100.0
    };
    (0..STAGES).map(core).sum()
}

/// What was seen while every stream decoded.
struct Seen {
    tokens_per_second: f64,
    /// Share of the cores that all but the engines' steps took.
    others: f64,
    /// Of each stage, for people.
    busy: String,
    /// Processor time of a step of each stage, seconds.
    steps: Vec<f64>,
    /// Tokens of a step.
    rows: f64,
}

fn seen(times: &[Vec<Instant>], moments: &[Moment]) -> Seen {
    let from = *times.iter().filter_map(|t| t.first()).max().unwrap();
    let until = *times.iter().filter_map(|t| t.last()).min().unwrap();
    let tokens = times.iter().flatten().filter(|&&t| (from..until).contains(&t)).count();
    let mut within = moments.iter().filter(|m| (from..until).contains(&m.at));
    let then = within.next().unwrap();
    let now = within.next_back().unwrap();
    let wall = (now.at - then.at).as_secs_f64();
    let mut others = (now.cores_seconds - then.cores_seconds) / wall;
    let (mut busy, mut each) = (Vec::new(), Vec::new());
    for (now, then) in now.status.stages.iter().zip(&then.status.stages) {
        let wall = (now.wall_seconds - then.wall_seconds).max(1e-9);
        let steps = now.busy_seconds - then.busy_seconds;
        others -= steps / wall;
        each.push(steps / (now.steps - then.steps).max(1) as f64);
        busy.push(format!("{:.0} %", steps / wall * 100.0));
    }
    let steps = now.status.stages[0].steps - then.status.stages[0].steps;
    let tokens_per_second = tokens as f64 / (until - from).as_secs_f64();
    Seen {
        tokens_per_second,
        rows: tokens_per_second * wall / steps.max(1) as f64,
        others: (others / f64::from(STAGES)).clamp(0.0, 0.9),
        busy: busy.join(", "),
        steps: each,
    }
}

fn config(folder: &Path, streams: u32) -> Config {
    let limits = LimitArgs {
        max_model_len: Some(1024),
        max_num_seqs: streams,
        kv_cache_tokens: Some(streams * 512),
        ..LimitArgs::default()
    };
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Config {
        dir: folder.join("coordinator"),
        model: harness::model().to_owned(),
        served_name: "model".to_owned(),
        stages: Some(STAGES),
        deployment: deployment(&EngineOptions::default(), &limits),
        http: None,
        http_hosts: Vec::new(),
        security: millrace_coordinator::security::Security::default(),
        quic: loopback,
        cluster: loopback,
        advertise: Some("127.0.0.1".to_owned()),
        journal: millrace_coordinator::journal::JournalConfig::default(),
        rules: millrace_coordinator::text::rules::TextRules::default(),
        otlp_endpoint: None,
        show_progress: false,
    }
}

/// What the plan that serves promises, by the members' own measurements.
fn forecast(text: &str, status: &ClusterStatus, streams: u32) -> Choice {
    let files = ModelFiles::open(harness::model()).unwrap();
    let parts = parts(&files);
    let described = describe(&parse(text).unwrap(), &parts).unwrap();
    let model = parts.costs(65_536, Dtype::F16, 256, None);
    let (nodes, network) = (&described.nodes[..], &described.network);
    let problem = Problem { model: &model, nodes, network, rows: 1.0 };
    let stage = |s: &millrace_shared::wire::rpc::StageStatus| StageCut {
        node: nodes.iter().position(|n| n.name == s.node_name).unwrap(),
        range: LayerRange { first: s.first_layer, end: s.end_layer },
    };
    let wish =
        Wish { goal: Goal::Throughput, streams, stages: Some(STAGES.into()), micro_batches: None };
    Choice::of(&problem, &wish, status.stages.iter().map(stage).collect())
}

/// Every stream decodes an answer.
async fn decode(running: &Running, streams: u32) -> Seen {
    let connect = (0..streams).map(|_| Client::connect(running.client()));
    let clients = try_join_all(connect).await.unwrap();
    let one = async |(i, client): (usize, &Client)| {
        let ids = (0..PROMPT).map(|p| 100 + ((p * 7919 + i * 104_729) % 40_000) as u32).collect();
        let params = SamplingParams {
            max_tokens: Some(ANSWER),
            ignore_eos: true,
            ..SamplingParams::greedy()
        };
        let prompt = Prompt::Tokens(ids);
        let request =
            GenerateRequest { model: String::new(), prompt, params, choices: Choices::default() };
        let mut events = client.generate(request).await.unwrap();
        let mut times = Vec::new();
        while let Some(event) = events.next().await {
            if let GenerateEvent::Token { .. } = event.unwrap() {
                times.push(Instant::now());
            }
        }
        times
    };
    let watch = Client::connect(running.client()).await.unwrap();
    let mut moments = Vec::new();
    let answers = join_all(clients.iter().enumerate().map(one));
    tokio::pin!(answers);
    let times = loop {
        tokio::select! {
            times = &mut answers => break times,
            () = tokio::time::sleep(Duration::from_millis(300)) => {
                let status = watch.status().await.unwrap();
                moments.push(Moment { at: Instant::now(), status, cores_seconds: cores_seconds() });
            }
        }
    };
    join_all(clients.iter().chain([&watch]).map(Client::close)).await;
    seen(&times, &moments)
}
