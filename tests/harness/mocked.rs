//! A cluster whose nodes stand for machines of chosen speed, with links of chosen delay: the real
//! coordinator, real nodes, real QUIC; only the engine is the mock.
//!
//! Every member has a thread of its own, as processes would, beside its engine's. Each node is
//! reached through a relay, and reaches the coordinator through another one: so all links, also the
//! two of the coordinator, are as long as [`Shape::link`] says. The model is a file with the
//! dimensions that are asked for and zeros as weights; [`Mocked::expected`] says what it must answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_coordinator::actors::cluster::Readiness;
use millrace_coordinator::cli::{LimitArgs, deployment};
use millrace_coordinator::journal::JournalConfig;
use millrace_coordinator::security::Security;
use millrace_coordinator::text::rules::TextRules;
use millrace_coordinator::{Config as CoordinatorConfig, start};
use millrace_engine::mock::{MockConfig, expected_embedding, expected_tokens};
use millrace_net::ClusterCa;
use millrace_net::client::ClientConfig;
use millrace_node::Config as NodeConfig;
use millrace_node::enrol::Issued;
use millrace_shared::id::NodeId;
use millrace_shared::model::gguf::{Gguf, GgufWriter};
use millrace_shared::model::{ModelConfig, TensorType};
use millrace_shared::options::{EngineKind, EngineOptions, MicroBatches, Replan, TorchOptions};
use millrace_shared::pooling::Pooling;
use tokio::sync::{oneshot, watch};

use crate::relay::{Relay, Way};
use crate::{DEADLINE, http, wait_for};

/// What to start.
#[derive(Clone, Debug)]
pub struct Shape {
    /// What each node is like.
    pub nodes: Vec<MockConfig>,
    /// The last so many of them stand by: they come when the others serve.
    pub stand_bys: usize,
    /// Every link, each way; `None` for none but the machine's own loopback.
    pub link: Option<Way>,
    /// Layers of the model.
    pub layers: u32,
    /// Width of the model.
    pub hidden: u32,
    /// Micro-batches in flight.
    pub micro_batches: MicroBatches,
    /// Tokens of a micro-batch at most.
    pub max_batch_tokens: Option<u32>,
    /// Sequences at once.
    pub max_num_seqs: u32,
    /// What happens when the stages turn out uneven.
    pub replan: Replan,
    /// Positions in the KV cache; `None` for 128 per sequence.
    pub kv_cache_tokens: Option<u32>,
    /// What is kept of requests.
    pub journal: JournalConfig,
    /// What is done to prompts and answers.
    pub rules: TextRules,
}

impl Shape {
    /// Nodes of which each takes so long for a layer, whatever the micro-batch holds.
    pub fn of_layers(layer: impl IntoIterator<Item = Duration>, layers: u32) -> Self {
        let node = |layer_latency: Duration| MockConfig {
            layer_latency,
            // The planner has to see a difference where there is none to wait for.
            layer_seconds: layer_latency.as_secs_f64().max(1e-6),
            head_seconds: 1e-7,
            ..MockConfig::default()
        };
        Self {
            nodes: layer.into_iter().map(node).collect(),
            stand_bys: 0,
            link: None,
            layers,
            hidden: 8,
            micro_batches: MicroBatches::Auto,
            max_batch_tokens: None,
            max_num_seqs: 64,
            replan: Replan::Off,
            kv_cache_tokens: None,
            journal: JournalConfig::default(),
            rules: TextRules::default(),
        }
    }
}

/// Something that runs on a thread of its own until it is dropped.
struct Member {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Member {
    /// Runs `work` in an actix system of its own; it ends when its argument does.
    fn spawn<F>(work: impl FnOnce(oneshot::Receiver<()>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()>,
    {
        let (stop, stopping) = oneshot::channel();
        let run = move || actix_rt::System::new().block_on(work(stopping));
        Self { stop: Some(stop), thread: Some(std::thread::spawn(run)) }
    }
}

impl Member {
    fn tell(&mut self) {
        drop(self.stop.take());
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.tell();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A running cluster; dropping it stops it. Fields are dropped in this order.
pub struct Mocked {
    nodes: Vec<Member>,
    coordinator: Option<Member>,
    relays: Vec<Relay>,
    client: ClientConfig,
    http: SocketAddr,
    config: ModelConfig,
    _dir: tempfile::TempDir,
}

impl std::fmt::Debug for Mocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mocked").field("nodes", &self.nodes.len()).finish_non_exhaustive()
    }
}

impl Mocked {
    /// Starts a cluster and waits until it serves.
    ///
    /// # Panics
    /// If it does not.
    pub fn start(shape: &Shape) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("mocked.gguf");
        // A micro-batch holds no more, so plans must not count on more.
        let rows = shape.max_batch_tokens.unwrap_or(u32::MAX);
        std::fs::write(&file, model_file(shape)).expect("the model is written");
        let config =
            Gguf::open(&file).and_then(|f| f.config()).expect("the model that was written");
        let (coordinator, head) = start_coordinator(coordinator_config(shape, dir.path(), file));
        let (mut relays, mut nodes) = (Vec::new(), Vec::new());
        let ready = || {
            let state = head.readiness.borrow();
            assert!(state.failed.is_none(), "no pipeline: {state:?}");
            state.ready.then_some(())
        };
        for (index, mock) in shape.nodes.iter().enumerate() {
            if index + shape.stand_bys >= shape.nodes.len() {
                wait_for("pipeline", ready);
            }
            let seed = 2 * index as u64;
            let link = |seed| shape.link.map(|way| Relay::start(way, way, seed));
            let (towards, front) = (link(seed), link(seed + 1));
            towards.iter().for_each(|relay| relay.set_target(head.members));
            let identity = head.ca.issue_node(NodeId(uuid::Uuid::now_v7())).expect("papers");
            let coordinator = towards.as_ref().map_or(head.members, Relay::addr).to_string();
            let advertised = front.as_ref().map(Relay::addr);
            let settings = node_config(dir.path(), index, shape.nodes.len(), advertised);
            let mock = MockConfig { layer_rows: rows, ..mock.clone() };
            let (node, listen) = start_node(settings, Issued { identity, coordinator }, mock);
            front.iter().for_each(|relay| relay.set_target(listen));
            relays.extend(towards.into_iter().chain(front));
            nodes.push(node);
        }
        wait_for("pipeline", ready);
        let (coordinator, Head { client, http, .. }) = (Some(coordinator), head);
        Self { nodes, coordinator, relays, client, http, config, _dir: dir }
    }

    /// What a client needs.
    pub fn client(&self) -> &ClientConfig {
        &self.client
    }

    /// Where the HTTP API listens.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// What the coordinator measures of itself and its cluster.
    pub fn metrics(&self) -> String {
        http::get(self.http, "/metrics").text()
    }

    /// Ends a node, which says goodbye.
    pub fn stop(&mut self, index: usize) {
        drop(self.nodes.remove(index));
    }

    /// The links, in no order that means something.
    pub fn relays(&self) -> &[Relay] {
        &self.relays
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> u32 {
        self.config.vocab
    }

    /// What greedy decoding after `prompt` must give.
    pub fn expected(&self, prompt: &[u32], tokens: usize) -> Vec<u32> {
        expected_tokens(&self.config, prompt, tokens)
    }

    /// The embedding that a text of these ids must have.
    pub fn expected_embedding(&self, text: &[u32], pooling: Pooling) -> Vec<f32> {
        expected_embedding(&self.config, text, pooling)
    }
}

impl Drop for Mocked {
    /// The coordinator first: it then takes the end of the nodes for granted. They end together.
    fn drop(&mut self) {
        drop(self.coordinator.take());
        self.nodes.iter_mut().for_each(Member::tell);
    }
}

/// What a coordinator that runs says of itself.
struct Head {
    client: ClientConfig,
    members: SocketAddr,
    http: SocketAddr,
    ca: Arc<ClusterCa>,
    readiness: watch::Receiver<Readiness>,
}

fn start_coordinator(settings: CoordinatorConfig) -> (Member, Head) {
    let (told, telling) = mpsc::channel();
    let member = Member::spawn(move |stopping| async move {
        let running = Box::pin(start(settings)).await.expect("a coordinator");
        let head = Head {
            client: running.client().clone(),
            members: running.cluster,
            http: running.http.expect("it has an HTTP address"),
            ca: Arc::clone(&running.dir.ca),
            readiness: running.readiness.clone(),
        };
        told.send(head).expect("heard");
        let _ = stopping.await;
        running.stop().await;
    });
    (member, telling.recv_timeout(DEADLINE).expect("a coordinator"))
}

/// A node, and where it listens.
fn start_node(settings: NodeConfig, papers: Issued, mock: MockConfig) -> (Member, SocketAddr) {
    let (told, telling) = mpsc::channel();
    let member = Member::spawn(move |stopping| async move {
        let membership = papers.membership().expect("a node's papers");
        let running = millrace_node::start_with(settings, membership, mock).await;
        let running = running.expect("a node");
        told.send(running.listen).expect("heard");
        let _ = stopping.await;
        running.stop().await;
    });
    (member, telling.recv_timeout(DEADLINE).expect("a node"))
}

/// A model of zeros, with a vocabulary of printable characters.
fn model_file(shape: &Shape) -> Vec<u8> {
    const FFN: u64 = 16;
    let tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    let (vocab, hidden) = (tokens.len() as u64, u64::from(shape.hidden));
    let mut writer = GgufWriter::new();
    writer
        .set("general.architecture", "llama")
        .set("general.name", "mocked")
        .set("llama.block_count", shape.layers)
        .set("llama.embedding_length", shape.hidden)
        .set("llama.feed_forward_length", FFN as u32)
        .set("llama.attention.head_count", 1u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.context_length", 1024u32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "gpt-2")
        .set("tokenizer.ggml.token_type", vec![1i32; tokens.len()])
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.merges", Vec::<String>::new())
        .set("tokenizer.ggml.eos_token_id", 0u32);
    let mut tensor = |name: String, dims: &[u64]| {
        let bytes = dims.iter().product::<u64>() * 4;
        let zeros = vec![0; bytes as usize];
        writer.tensor(name, TensorType::F32, dims, zeros).expect("a tensor");
    };
    tensor("token_embd.weight".into(), &[hidden, vocab]);
    tensor("output_norm.weight".into(), &[hidden]);
    for layer in 0..shape.layers {
        for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            tensor(format!("blk.{layer}.{name}.weight"), &[hidden, hidden]);
        }
        for name in ["attn_norm", "ffn_norm"] {
            tensor(format!("blk.{layer}.{name}.weight"), &[hidden]);
        }
        for name in ["ffn_gate", "ffn_up"] {
            tensor(format!("blk.{layer}.{name}.weight"), &[hidden, FFN]);
        }
        tensor(format!("blk.{layer}.ffn_down.weight"), &[FFN, hidden]);
    }
    writer.to_bytes()
}

fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn coordinator_config(shape: &Shape, dir: &Path, model: PathBuf) -> CoordinatorConfig {
    let engine = EngineOptions {
        engine: EngineKind::Mock,
        micro_batches: shape.micro_batches,
        // Guesses would be right by chance only, and every prompt is another one.
        speculate: false,
        prefix_cache: false.into(),
        ..EngineOptions::default()
    };
    let limits = LimitArgs {
        max_batch_tokens: shape.max_batch_tokens,
        max_num_seqs: shape.max_num_seqs,
        kv_cache_tokens: Some(
            shape.kv_cache_tokens.unwrap_or_else(|| shape.max_num_seqs.max(16) * 128),
        ),
        replan: shape.replan,
        ..LimitArgs::default()
    };
    CoordinatorConfig {
        dir: dir.join("coordinator"),
        model,
        served_name: "mocked".to_owned(),
        stages: Some((shape.nodes.len() - shape.stand_bys) as u16),
        deployment: deployment(&engine, &limits),
        http: Some(loopback()),
        http_hosts: Vec::new(),
        security: Security { public_metrics: true, ..Security::default() },
        quic: loopback(),
        cluster: loopback(),
        advertise: None,
        journal: shape.journal,
        rules: shape.rules.clone(),
        otlp_endpoint: None,
        show_progress: false,
    }
}

fn node_config(dir: &Path, index: usize, nodes: usize, front: Option<SocketAddr>) -> NodeConfig {
    let dir = dir.join(format!("node-{index}"));
    NodeConfig {
        // Of its own: what was measured of one node is not true of another.
        cache: dir.join("cache"),
        dir,
        token: None,
        coordinator: None,
        listen: loopback(),
        next_free_port: false,
        advertise: front.map(|f| f.to_string()),
        name: format!("mock-{index}"),
        weights: None,
        threads: Some(1),
        nodes_in_process: nodes as u32,
        memory_bytes: None,
        engine: EngineKind::Mock,
        torch: TorchOptions::default(),
        require_kv_dtype: None,
        require_activation_dtype: None,
        show_progress: false,
        drains: false,
    }
}
