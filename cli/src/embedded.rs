//! A whole cluster inside this process: a coordinator and its nodes, over QUIC on loopback.
//!
//! The same parts as in separate processes, with the same wire between them; only papers are issued
//! directly instead of by token. All actors share the calling thread, so that a frame passes from
//! member to member without waking another; each node has its engine's threads beside it, which take
//! turns on the processors.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use millrace_coordinator::cli::{LimitArgs, deployment};
use millrace_coordinator::journal::JournalConfig;
use millrace_coordinator::security::Security;
use millrace_coordinator::text::rules::TextRules;
use millrace_coordinator::{Config as CoordinatorConfig, Running as Coordinator, start};
use millrace_net::awake;
use millrace_net::client::ClientConfig;
use millrace_node::enrol::Issued;
use millrace_node::{Config as NodeConfig, Running as Node};
use millrace_shared::dirs;
use millrace_shared::id::NodeId;
use millrace_shared::options::EngineOptions;

/// Longest start: measuring and loading have deadlines of their own, which add up to less.
const START_DEADLINE: Duration = Duration::from_secs(900);

/// What to start.
#[derive(Debug)]
pub struct EmbeddedOptions {
    /// The model file.
    pub model: PathBuf,
    /// Name that clients use.
    pub model_name: String,
    /// Stages, each on its own node.
    pub stages: u32,
    /// Engine options.
    pub engine: EngineOptions,
    /// The cluster's folder; `None` for a throw-away CA.
    pub dir: Option<PathBuf>,
    /// QUIC endpoint of clients; `None` for any loopback port.
    pub quic: Option<SocketAddr>,
    /// HTTP endpoint; `None` for none.
    pub http: Option<SocketAddr>,
    /// Names that HTTP answers to besides loopback and the bound address.
    pub http_hosts: Vec<String>,
    /// How HTTP is protected.
    pub security: Security,
    /// Longest sequence.
    pub max_model_len: Option<u32>,
    /// Sequences at once.
    pub max_num_seqs: u32,
    /// Positions of KV cache.
    pub kv_cache_tokens: Option<u32>,
    /// What is kept of requests.
    pub journal: JournalConfig,
    /// What is done to prompts and answers.
    pub rules: TextRules,
    /// Collector of traces.
    pub otlp_endpoint: Option<String>,
}

/// A running cluster.
#[derive(Debug)]
pub struct EmbeddedCluster {
    coordinator: Coordinator,
    nodes: Vec<Node>,
    /// Removed when the cluster is dropped.
    _throw_away: Option<tempfile::TempDir>,
}

impl EmbeddedCluster {
    /// Starts coordinator and nodes and waits until requests are served. `progress` gets a line for
    /// each step.
    ///
    /// # Errors
    /// If the model cannot be served or a port is taken.
    pub async fn start(options: EmbeddedOptions, progress: impl Fn(&str)) -> anyhow::Result<Self> {
        awake::set(options.engine.wake_latency);
        let stages = stages(&options)?;
        let throw_away = match options.dir {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("millrace-").tempdir()?),
        };
        let dir = options
            .dir
            .clone()
            .or_else(|| throw_away.as_ref().map(|t| t.path().to_owned()))
            .context("no folder for the cluster")?;
        progress("reading the model");
        let coordinator = start(coordinator_config(&options, dir.clone(), stages)).await?;
        progress(&format!("loading {stages} {}", if stages == 1 { "stage" } else { "stages" }));
        let mut nodes = Vec::new();
        for index in 0..stages {
            let identity = coordinator.dir.ca.issue_node(NodeId(uuid::Uuid::now_v7()))?;
            let cluster = format!("127.0.0.1:{}", coordinator.cluster.port());
            let papers = Issued { identity, coordinator: cluster };
            let config = node_config(&options, &dir, index, stages)?;
            nodes.push(millrace_node::start(config, papers.membership()?).await?);
        }
        let cluster = Self { coordinator, nodes, _throw_away: throw_away };
        match cluster.wait_until_ready().await {
            Ok(()) => Ok(cluster),
            Err(e) => {
                cluster.stop().await;
                Err(e)
            }
        }
    }

    /// A cluster in one process cannot gain nodes: what fails now will not work later.
    async fn wait_until_ready(&self) -> anyhow::Result<()> {
        let mut readiness = self.coordinator.readiness.clone();
        let settled = readiness.wait_for(|r| r.ready || r.failed.is_some());
        let settled = tokio::time::timeout(START_DEADLINE, settled)
            .await
            .map_err(|_| anyhow!("the cluster did not start within {START_DEADLINE:?}"))?
            .context("the coordinator stopped")?
            .clone();
        match settled.failed {
            Some(message) if !settled.ready => Err(anyhow!("{message}")),
            _ => Ok(()),
        }
    }

    /// What a client needs.
    pub fn client_config(&self) -> &ClientConfig {
        self.coordinator.client()
    }

    /// The running coordinator.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Where the HTTP API listens.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.coordinator.http
    }

    /// Where clients connect.
    pub fn quic_addr(&self) -> SocketAddr {
        self.coordinator.quic
    }

    /// Lets answers finish, then stops nodes and coordinator.
    pub async fn stop(self) {
        self.coordinator.drain().await;
        futures::future::join_all(self.nodes.into_iter().map(Node::stop)).await;
        self.coordinator.stop().await;
    }
}

fn stages(options: &EmbeddedOptions) -> anyhow::Result<u32> {
    match &options.engine.cuts {
        None => Ok(options.stages.max(1)),
        Some(cuts) if cuts.len() + 1 == options.stages as usize => Ok(options.stages),
        Some(cuts) => Err(anyhow!(
            "--cuts names {} cuts, which makes {} stages, but --stages is {}",
            cuts.len(),
            cuts.len() + 1,
            options.stages
        )),
    }
}

fn coordinator_config(options: &EmbeddedOptions, dir: PathBuf, stages: u32) -> CoordinatorConfig {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let limits = LimitArgs {
        max_model_len: options.max_model_len,
        max_num_seqs: options.max_num_seqs,
        kv_cache_tokens: options.kv_cache_tokens,
        ..LimitArgs::default()
    };
    CoordinatorConfig {
        dir,
        model: options.model.clone(),
        served_name: options.model_name.clone(),
        stages: Some(stages as u16),
        deployment: deployment(&options.engine, &limits),
        http: options.http,
        http_hosts: options.http_hosts.clone(),
        security: options.security.clone(),
        quic: options.quic.unwrap_or(loopback),
        cluster: loopback,
        advertise: None,
        journal: options.journal,
        rules: options.rules.clone(),
        otlp_endpoint: options.otlp_endpoint.clone(),
        show_progress: false,
    }
}

fn node_config(
    options: &EmbeddedOptions,
    dir: &std::path::Path,
    index: u32,
    nodes: u32,
) -> anyhow::Result<NodeConfig> {
    let cache = dirs::cache(&|name| std::env::var_os(name)).unwrap_or_else(|| dir.join("cache"));
    Ok(NodeConfig {
        dir: dir.join(format!("node-{index}")),
        cache,
        token: None,
        coordinator: None,
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        next_free_port: false,
        advertise: None,
        name: format!("local-{index}"),
        weights: Some(options.model.clone()),
        threads: options.engine.threads,
        nodes_in_process: nodes,
        memory_bytes: None,
        engine: options.engine.engine,
        torch: options.engine.torch,
        require_kv_dtype: None,
        require_activation_dtype: None,
        show_progress: false,
        drains: false,
    })
}
