//! `millrace up`: coordinator and nodes in one process, as a server.
//!
//! The first Ctrl-C or SIGTERM ends the requests in flight and stops; the second aborts at once.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Args;
use millrace_cli::embedded::EmbeddedOptions;
use millrace_coordinator::cli::DirArg;
use millrace_coordinator::config::{DEFAULT_HTTP_PORT, DEFAULT_MAX_NUM_SEQS, DEFAULT_QUIC_PORT};
use millrace_coordinator::journal::JournalArgs;
use millrace_coordinator::models::ModelOptions;
use millrace_coordinator::paste::paste_lines;
use millrace_coordinator::security::Security;
use millrace_coordinator::spans::TraceArgs;
use millrace_coordinator::state::CLIENT_FILE;
use millrace_coordinator::text::rules::RulesArgs;
use millrace_engine::cache::set_limit;
use millrace_shared::options::{CacheOptions, EngineOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Interrupted, usage};
use crate::target::Session;
use crate::{output, serving};

/// Flags of `up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// GGUF file, folder of a model, catalogue name such as smollm2:135m, or org/name:file of the hub
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// Name of the model in requests [default: its catalogue name, or that of the file]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Stages to cut the model into, each a node of its own [default: 1, the fastest on one machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    stages: Option<u32>,
    /// Longest sequence, tokens of prompt and answer [default: the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_model_len: Option<u32>,
    /// Most requests that run at once; others wait
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_NUM_SEQS, value_parser = clap::value_parser!(u32).range(1..))]
    max_num_seqs: u32,
    /// Positions that the KV cache holds for all requests together [default: planned]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    kv_cache_tokens: Option<u32>,
    #[command(flatten)]
    model_options: ModelOptions,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    journal: JournalArgs,
    #[command(flatten)]
    rules: RulesArgs,
    #[command(flatten)]
    traces: TraceArgs,
    #[command(flatten)]
    security: Security,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

/// Where to listen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Address of the HTTP API; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// TCP port of the HTTP API; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_HTTP_PORT)]
    port: u16,
    /// Further name that requests may give as Host; may be given several times
    #[arg(long, value_name = "NAME")]
    http_host: Vec<String>,
    /// UDP address of the QUIC API for clients
    #[arg(long, value_name = "ADDR:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_QUIC_PORT)))]
    quic: SocketAddr,
    #[command(flatten)]
    dir: DirArg,
}

pub(crate) async fn run(args: UpArgs) -> anyhow::Result<()> {
    args.cache.cache_limit.into_iter().for_each(set_limit);
    let dir = args.network.dir.resolve()?;
    let options = options(&args, dir.clone())?;
    let name = options.model_name.clone();
    let session = Session::start(options).await?;
    let mut signals = Signals::new()?;
    let result = async {
        announce(&session, &name, &dir).await?;
        signals.next().await;
        output::remark("stopping; press Ctrl-C again to abort");
        Ok(())
    }
    .await;
    tokio::select! {
        () = session.close() => result,
        () = signals.next() => Err(Interrupted.into()),
    }
}

fn options(args: &UpArgs, dir: PathBuf) -> anyhow::Result<EmbeddedOptions> {
    let stages = serving::stages(args.stages, &args.engine, serving::DEFAULT_STAGES)?;
    let http = serving::address(&args.network.host, args.network.port)?;
    args.security.check(Some(http))?;
    if args.served_model_name.as_deref() == Some("") {
        return Err(usage("--served-model-name must not be empty"));
    }
    let plain = serving::private_cluster(&args.model, args.model_options, stages, &args.engine)?;
    Ok(EmbeddedOptions {
        model_name: args.served_model_name.clone().unwrap_or(plain.model_name),
        dir: Some(dir),
        quic: Some(args.network.quic),
        http: Some(http),
        http_hosts: args.network.http_host.clone(),
        security: args.security.clone(),
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        kv_cache_tokens: args.kv_cache_tokens,
        journal: args.journal.config(),
        rules: args.rules.rules()?,
        otlp_endpoint: args.traces.otlp_endpoint.clone(),
        ..plain
    })
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

async fn announce(session: &Session, model: &str, dir: &Path) -> anyhow::Result<()> {
    let status = session.status().await?;
    let tokens = u64::from(status.kv_blocks) * u64::from(status.kv_block_size);
    output::write(format_args!("{}\n", serving::plan_table(&status)))?;
    output::write(format_args!("KV cache: {} blocks, {tokens} tokens\n", status.kv_blocks))?;
    let config = dir.join(CLIENT_FILE);
    let Some(cluster) = session.embedded() else { return Ok(()) };
    output::write(format_args!(
        "QUIC {}, clients find it in {}\n",
        cluster.quic_addr(),
        config.display()
    ))?;
    if cluster.http_addr().is_some() {
        let (url, ca) = (&cluster.client_config().http, cluster.coordinator().own_ca());
        let lines = paste_lines(url, model, &config, ca.as_deref());
        output::write(format_args!("HTTP {url}\n\n{lines}"))?;
    }
    output::stream("\nready; Ctrl-C stops\n")
}
