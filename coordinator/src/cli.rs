//! Flags of `millrace-coordinator`, and the commands that only touch the cluster's folder.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Args, Parser, Subcommand};
use millrace_engine::cache::set_limit;
use millrace_net::awake;
use millrace_net::telemetry::LogFormat;
use millrace_shared::dirs;
use millrace_shared::flags::Program;
use millrace_shared::membership::{HEARTBEAT, LEASE};
use millrace_shared::names::env;
use millrace_shared::options::{CacheOptions, EngineOptions, Pin, Replan};
use millrace_shared::wire::admin::{KeyInfo, KeyLimits, NewKey, Scope};

use crate::config::{
    Config, DEFAULT_CLUSTER_PORT, DEFAULT_HTTP_PORT, DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_WAITING,
    DEFAULT_QUIC_PORT, DEFAULT_RECOVERY_SECONDS, host_port, own_address,
};
use crate::journal::JournalArgs;
use crate::models::{ConsoleProgress, HubName, ModelOptions, resolve_as};
use crate::plan::Deployment;
use crate::security::Security;
use crate::spans::TraceArgs;
use crate::state::{ClusterDir, unix_now};
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

/// Flags of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    #[command(flatten)]
    dir: DirArg,
    /// The file to write. It holds the CA's private key: keep it like one
    file: PathBuf,
}

/// Flags of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    dir: DirArg,
    /// What `backup` wrote
    file: PathBuf,
    /// Where clients will find the QUIC API [default: where they found it]
    #[arg(long, value_name = "HOST:PORT")]
    quic: Option<String>,
    /// Where clients will find the HTTP API [default: where they found it]
    #[arg(long, value_name = "URL")]
    http: Option<String>,
}

/// The cluster's folder.
#[derive(Clone, Debug, Args)]
pub struct DirArg {
    /// The cluster's folder [default: the XDG data folder millrace]
    #[arg(long, value_name = "DIR", env = env::DIR)]
    pub dir: Option<PathBuf>,
}

impl DirArg {
    /// The folder.
    ///
    /// # Errors
    /// If none is given and there is no home.
    pub fn resolve(&self) -> anyhow::Result<PathBuf> {
        self.dir
            .clone()
            .or_else(|| dirs::data(&|name| std::env::var_os(name)))
            .ok_or_else(|| anyhow!("no --dir given and $HOME is not set"))
    }
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Host under which others reach this machine [default: its address]
    #[arg(long, value_name = "HOST", value_parser = host)]
    advertise: Option<String>,
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

/// Commands about join tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a join token
    Create {
        #[command(flatten)]
        dir: DirArg,
        /// Nodes that may join with it
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// How long it is valid: 30m, 24h, 7d
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
        expires: Duration,
    },
}

/// Commands about API keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Print a new key; it is shown this once
    Create {
        #[command(flatten)]
        dir: DirArg,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// List keys
    List {
        #[command(flatten)]
        dir: DirArg,
    },
    /// Make a key invalid
    Revoke {
        #[command(flatten)]
        dir: DirArg,
        /// As `list` shows it
        id: String,
    },
}

/// What a new key is to be.
#[derive(Clone, Debug, Args)]
pub struct KeyArgs {
    /// Whose it is
    #[arg(long, alias = "label", default_value = "client")]
    name: String,
    /// What its holder may do: read (models, state, metrics), generate (that, and run the model) or
    /// admin (that, and change the cluster)
    #[arg(long, value_name = "SCOPE", default_value = "generate")]
    scope: Scope,
    /// The same as --scope admin
    #[arg(long, conflicts_with = "scope")]
    admin: bool,
    /// How long it is valid: 12h, 90d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    expires: Option<Duration>,
    /// Continuations and scorings a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens_per_minute: Option<u32>,
    /// Continuations and scorings at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrent: Option<u32>,
}

impl KeyArgs {
    /// The key that is asked for.
    pub fn key(&self) -> NewKey {
        NewKey {
            name: self.name.clone(),
            scope: if self.admin { Scope::Admin } else { self.scope },
            limits: KeyLimits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                concurrent: self.concurrent,
            },
            expires: self.expires.map(|time| unix_now().saturating_add(time.as_secs())),
        }
    }
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

/// Makes the folder.
///
/// # Errors
/// If it cannot be written.
pub fn init(args: &InitArgs) -> anyhow::Result<String> {
    let path = args.dir.resolve()?;
    let host = args.advertise.clone().unwrap_or_else(|| own_address().to_string());
    let quic = host_port(&host, DEFAULT_QUIC_PORT);
    let http = format!("http://127.0.0.1:{DEFAULT_HTTP_PORT}");
    let dir = ClusterDir::open_or_init(&path, &quic, &http)?;
    let what = if dir.created { "made" } else { "is there already" };
    Ok(format!(
        "The cluster's folder {} {what}.\nNext: millrace-coordinator serve --dir {} --model MODEL",
        path.display(),
        path.display()
    ))
}

/// Makes a join token.
///
/// # Errors
/// If the folder is not a cluster's.
pub fn token(command: &TokenCommand) -> anyhow::Result<String> {
    let TokenCommand::Create { dir, uses, expires } = command;
    let dir = ClusterDir::open(&dir.resolve()?)?;
    create_token(&dir, *uses, *expires)
}

/// Makes a join token for the address in `client.toml`.
///
/// # Errors
/// If it cannot be written.
pub fn create_token(dir: &ClusterDir, uses: u32, expires: Duration) -> anyhow::Result<String> {
    let now = unix_now();
    dir.tokens.purge(now)?;
    let until = now.saturating_add(expires.as_secs());
    let token = dir.tokens.create(&dir.client.quic, dir.ca.fingerprint(), uses, until)?;
    Ok(token.to_string())
}

/// Writes a backup.
///
/// # Errors
/// If the folder is not a cluster's, or the file cannot be written.
pub fn backup(args: &BackupArgs) -> anyhow::Result<String> {
    let dir = ClusterDir::open(&args.dir.resolve()?)?;
    crate::backup::write(&dir.path, &args.file)?;
    Ok(format!(
        "{} holds the CA's key, API keys (hashed), revocations and client.toml of {}",
        args.file.display(),
        dir.path.display()
    ))
}

/// Makes a folder from a backup.
///
/// # Errors
/// If the file is no backup, or the folder is not empty.
pub fn restore(args: &RestoreArgs) -> anyhow::Result<String> {
    let path = args.dir.resolve()?;
    crate::backup::restore(&args.file, &path)?;
    let mut dir = ClusterDir::open(&path)?;
    let quic = args.quic.clone().unwrap_or_else(|| dir.client.quic.clone());
    let http = args.http.clone().unwrap_or_else(|| dir.client.http.clone());
    dir.set_addresses(&quic, &http)?;
    let host = quic.rsplit_once(':').map_or(quic.as_str(), |(host, _)| host);
    Ok(format!(
        "{0} was restored.\nNext: millrace-coordinator serve --dir {0} --model MODEL --advertise {host}\n\
         Where its address has changed, start each node once with --coordinator {quic} (no token \
         is needed), and give clients the new client.toml or --connect {quic}.\n\
         API keys and nodes that were revoked after the backup have to be revoked again.",
        path.display(),
    ))
}

/// Makes, lists or revokes keys.
///
/// # Errors
/// If the folder is not a cluster's, or no key has the id.
pub fn key(command: &KeyCommand) -> anyhow::Result<String> {
    match command {
        KeyCommand::Create { dir, key } => {
            let dir = ClusterDir::open(&dir.resolve()?)?;
            let (_, secret) = dir.keys.create(&key.key(), unix_now())?;
            Ok(secret)
        }
        KeyCommand::List { dir } => {
            let keys = ClusterDir::open(&dir.resolve()?)?.keys.list()?;
            let mut table =
                format!("{:<14}  {:<20}  {:<8}  created (Unix time)", "id", "name", "scope");
            for KeyInfo { id, key, created, .. } in keys {
                let scope = key.scope.as_str();
                table.push_str(&format!("\n{id:<14}  {:<20}  {scope:<8}  {created}", key.name));
            }
            Ok(table)
        }
        KeyCommand::Revoke { dir, id } => {
            let path = dir.resolve()?;
            let revoked = ClusterDir::open(&path)?.keys.revoke(id).context("cannot revoke")?;
            if revoked {
                return Ok(format!("key {id} is no longer valid"));
            }
            Err(anyhow!(
                "no key has the id '{id}': 'millrace-coordinator key list --dir {}' shows them",
                path.display()
            ))
        }
    }
}
