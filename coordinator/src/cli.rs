//! Flags of `millrace-coordinator`.

mod folder;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand};
use millrace_engine::cache::set_limit;
use millrace_net::awake;
use millrace_net::telemetry::LogFormat;
use millrace_shared::flags::Program;
use millrace_shared::membership::{HEARTBEAT, LEASE};
use millrace_shared::options::{CacheOptions, EngineOptions, Pin, Replan};

pub use self::folder::{
    BackupArgs, DirArg, InitArgs, KeyArgs, KeyCommand, RestoreArgs, TokenArgs, TokenCommand,
    backup, create_token, init, key, restore, token,
};
use crate::config::{
    Config, DEFAULT_CLUSTER_PORT, DEFAULT_HTTP_PORT, DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_WAITING,
    DEFAULT_QUIC_PORT, DEFAULT_RECOVERY_SECONDS,
};
use crate::journal::JournalArgs;
use crate::models::{ConsoleProgress, HubName, ModelOptions, resolve_as};
use crate::plan::Deployment;
use crate::security::Security;
use crate::spans::TraceArgs;
use crate::text::rules::RulesArgs;

/// Coordinates a Millrace cluster: admits nodes, cuts the model, schedules, serves clients.
#[derive(Debug, Parser)]
#[command(name = "millrace-coordinator", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// Log lines: text or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How the environment twins of flags begin.
pub const PROGRAM: Program = Program { prefix: "MILLRACE_COORDINATOR", main: "serve" };

const EXAMPLES: &str = "\
Examples:
  millrace-coordinator serve --model smollm2:135m --stages 3
      make the cluster's folder, print the line to paste on every other machine, serve
  millrace-coordinator token create --uses 5 --expires 2h
      another join token, beside the running coordinator
  millrace-coordinator key create --name alice
      an API key for a client
  millrace-coordinator serve --model smollm2:135m --host 0.0.0.0 --tls-cert c.pem --tls-key k.pem
      HTTPS for everybody, with the company's certificate
  millrace-coordinator backup cluster.backup
      CA, keys and revocations in one file, also while it serves; 'restore' makes a folder of it

Ports: HTTP 8000/tcp (loopback unless --host says otherwise), 8001/udp for clients and joining
nodes, 8002/udp for members.";

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the cluster's CA, the coordinator's identity and the first client's key
    Init(InitArgs),
    /// Serve a model; makes the folder too where it is missing
    Serve(Box<ServeArgs>),
    /// Join tokens of nodes
    #[command(subcommand)]
    Token(TokenCommand),
    /// API keys of clients
    #[command(subcommand)]
    Key(KeyCommand),
    /// Copy the cluster's folder into one file, also while it serves
    Backup(BackupArgs),
    /// Make a cluster's folder from a backup, on this machine or another
    Restore(RestoreArgs),
}

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Model: a GGUF file, a model's folder, a catalogue name, or org/name:file of the hub
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// Name that clients use [default: the model's name]
    #[arg(long, alias = "alias", value_name = "NAME")]
    served_model_name: Option<String>,
    /// Stages to wait for [default: the nodes that join within two quiet seconds]
    #[arg(long, alias = "pipeline-parallel-size", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    stages: Option<u16>,
    /// Layers that a node must have, the first and the last of them included, as long as it is there;
    /// the others are cut around them. May be given for several nodes
    #[arg(long, value_name = "NAME=FIRST-LAST", conflicts_with = "cuts")]
    pin: Vec<Pin>,
    /// Address of the HTTP API
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), help_heading = "Network")]
    host: IpAddr,
    /// TCP port of the HTTP API
    #[arg(long, default_value_t = DEFAULT_HTTP_PORT, help_heading = "Network")]
    port: u16,
    /// A further name that the HTTP API answers to
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    http_host: Vec<String>,
    /// Address of clients and joining nodes, UDP
    #[arg(long, value_name = "ADDR", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_QUIC_PORT)), help_heading = "Network")]
    quic: SocketAddr,
    /// Address of members, UDP
    #[arg(long, value_name = "ADDR", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_CLUSTER_PORT)), help_heading = "Network")]
    cluster: SocketAddr,
    /// Host under which others reach this machine [default: its address]
    #[arg(long, value_name = "HOST", value_parser = host, help_heading = "Network")]
    advertise: Option<String>,
    #[command(flatten)]
    security: Security,
    #[command(flatten)]
    model_options: ModelOptions,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    journal: JournalArgs,
    #[command(flatten)]
    rules: RulesArgs,
    #[command(flatten)]
    traces: TraceArgs,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

/// Limits of what is served.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub struct LimitArgs {
    /// Longest sequence, tokens [default: the model's context]
    #[arg(long, short = 'c', alias = "ctx-size", value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_model_len: Option<u32>,
    /// Sequences computed at once
    #[arg(long, alias = "parallel", value_name = "N", default_value_t = DEFAULT_MAX_NUM_SEQS, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: u32,
    /// Tokens of one micro-batch at most [default: a prefill chunk, and one of every sequence]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch_tokens: Option<u32>,
    /// Requests that may wait; more are told to come back
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_WAITING)]
    pub max_waiting: u32,
    /// What is done about a better cut while requests run: auto makes it, propose says so, off
    /// looks for none. After a loss the pipeline always forms again
    #[arg(long, value_name = "MODE", default_value = "propose")]
    pub replan: Replan,
    /// Seconds that requests wait, after a node was lost, for the pipeline to form again
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_RECOVERY_SECONDS)]
    pub recovery_timeout: u32,
    /// Milliseconds between heartbeats of a node
    #[arg(long, value_name = "MS", default_value_t = HEARTBEAT.as_millis() as u32, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    pub heartbeat: u32,
    /// Milliseconds of silence after which a node is lost; three heartbeats at least
    #[arg(long, value_name = "MS", default_value_t = LEASE.as_millis() as u32, value_parser = clap::value_parser!(u32).range(100..=600_000))]
    pub lease: u32,
    /// Positions of KV cache over all sequences [default: 32768, less where memory is short]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_cache_tokens: Option<u32>,
}

impl Default for LimitArgs {
    fn default() -> Self {
        Self {
            max_model_len: None,
            max_num_seqs: DEFAULT_MAX_NUM_SEQS,
            max_batch_tokens: None,
            max_waiting: DEFAULT_MAX_WAITING,
            replan: Replan::Propose,
            recovery_timeout: DEFAULT_RECOVERY_SECONDS,
            heartbeat: HEARTBEAT.as_millis() as u32,
            lease: LEASE.as_millis() as u32,
            kv_cache_tokens: None,
        }
    }
}

/// Engine options and limits as plans need them.
pub fn deployment(engine: &EngineOptions, limits: &LimitArgs) -> Deployment {
    Deployment {
        cuts: engine.cuts.clone(),
        pins: Vec::new(),
        stages: None,
        prefill_chunk: engine.prefill_chunk.max(1),
        max_batch_tokens: limits.max_batch_tokens,
        micro_batches: engine.micro_batches,
        engine: engine.engine,
        prefix_cache: engine.prefix_cache,
        speculate: engine.speculate,
        kv_dtype: engine.kv_cache_dtype,
        activation_dtype: engine.activation_dtype,
        max_model_len: limits.max_model_len,
        max_num_seqs: limits.max_num_seqs,
        max_waiting: limits.max_waiting,
        kv_cache_tokens: limits.kv_cache_tokens,
        replan: limits.replan,
        recovery_timeout: Duration::from_secs(limits.recovery_timeout.into()),
        heartbeat: Duration::from_millis(limits.heartbeat.into()),
        lease: Duration::from_millis(limits.lease.into()),
    }
}

impl ServeArgs {
    /// Fetches the model where needed, and validates.
    ///
    /// # Errors
    /// If the model cannot be had, or flags contradict each other.
    pub fn resolve(&self) -> anyhow::Result<Config> {
        let stages = match (self.stages, &self.engine.cuts) {
            (Some(n), Some(cuts)) if usize::from(n) != cuts.len() + 1 => {
                return Err(anyhow!(
                    "--cuts names {} cuts, which makes {} stages, but --stages is {n}",
                    cuts.len(),
                    cuts.len() + 1
                ));
            }
            (None, Some(cuts)) => Some(cuts.len() as u16 + 1),
            (stages, _) => stages,
        };
        if self.limits.lease < 3 * self.limits.heartbeat {
            return Err(anyhow!(
                "--lease {} is less than three heartbeats of {} ms: one lost packet would end a node; \
                 raise --lease or lower --heartbeat",
                self.limits.lease,
                self.limits.heartbeat
            ));
        }
        let rules = self.rules.rules()?;
        let dir = self.dir.resolve()?;
        let http = SocketAddr::new(self.host, self.port);
        self.security.check(Some(http))?;
        self.cache.cache_limit.into_iter().for_each(set_limit);
        awake::set(self.engine.wake_latency);
        let model = resolve_as(&self.model, self.model_options, &mut ConsoleProgress::new())?;
        Ok(Config {
            dir,
            served_name: served_name(&self.model, self.served_model_name.as_deref()),
            model,
            stages,
            deployment: Deployment {
                pins: self.pin.clone(),
                ..deployment(&self.engine, &self.limits)
            },
            http: Some(http),
            http_hosts: self.http_host.clone(),
            security: self.security.clone(),
            quic: self.quic,
            cluster: self.cluster,
            advertise: self.advertise.clone(),
            journal: self.journal.config(),
            rules,
            otlp_endpoint: self.traces.otlp_endpoint.clone(),
            show_progress: true,
        })
    }
}

/// The name that clients use: as given, else the name of the file without its ending or of the
/// folder, else that of the hub's repository, else the catalogue's.
pub fn served_name(model: &str, given: Option<&str>) -> String {
    let path = std::path::Path::new(model);
    let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
    let is_weights = |e: &std::ffi::OsStr| e == "gguf" || e == "safetensors";
    let stem = || path.file_stem().filter(|_| path.extension().is_some_and(is_weights)).map(text);
    let folder = || path.file_name().filter(|_| path.exists()).map(text);
    let repo = || HubName::parse(model).map(|name| name.repo);
    let name = given.map(str::to_owned).or_else(stem).or_else(folder).or_else(repo);
    name.unwrap_or_else(|| model.to_owned())
}

fn host(s: &str) -> Result<String, String> {
    if s.contains(':') && s.parse::<std::net::Ipv6Addr>().is_err() {
        return Err(format!(
            "'{s}' is not a host alone: the ports are those of --quic and --cluster"
        ));
    }
    Ok(s.to_owned())
}

pub(crate) fn duration(s: &str) -> Result<Duration, String> {
    let wrong = || format!("'{s}' is not a time such as 30m, 24h or 7d");
    let unit_at = s.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let n: u64 = s[..unit_at].parse().map_err(|_| wrong())?;
    let seconds = match &s[unit_at..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    n.checked_mul(seconds).filter(|&s| s > 0).map(Duration::from_secs).ok_or_else(wrong)
}
