//! Flags of `millrace-node`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use clap::{Args, Parser, Subcommand};
use millrace_engine::cache::set_limit;
use millrace_net::awake;
use millrace_net::join::JoinToken;
use millrace_net::telemetry::LogFormat;
use millrace_shared::dirs;
use millrace_shared::flags::Program;
use millrace_shared::model::Dtype;
use millrace_shared::names::env;
use millrace_shared::options::{CacheOptions, EngineOptions, MicroBatches, byte_size};

use crate::config::{Config, DEFAULT_PORT};
use crate::enrol;
use crate::hardware::Hardware;
use crate::probe::ProbeArgs;

/// One machine of a Millrace cluster: computes a stage of the model.
#[derive(Debug, Parser)]
#[command(name = "millrace-node", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// Log lines: text or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How the environment twins of flags begin.
pub const PROGRAM: Program = Program { prefix: "MILLRACE_NODE", main: "run" };

const EXAMPLES: &str = "\
Examples:
  millrace-node run --coordinator 10.0.0.1:8001 --token mlrj1.…    join, then work
  millrace-node run                                               work again; no token needed
  millrace-node run --weights model.gguf                          take weights from an own file
  millrace-node probe                                             what this machine offers
  millrace-node probe --model m.gguf --output a.toml              measured, for 'millrace plan'

Ports: 8010/udp, or the next free one. Several nodes on one host need a --dir each.";

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join the cluster and compute
    Run(Box<RunArgs>),
    /// Show what this machine offers, measured if asked
    Probe(ProbeArgs),
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The coordinator's address for joining nodes [default: the one in the token]
    #[arg(long, value_name = "HOST:PORT", help_heading = "Cluster")]
    coordinator: Option<String>,
    /// Join token, needed the first time
    #[arg(long, value_name = "TOKEN", env = env::TOKEN, hide_env_values = true, hide_default_value = true, help_heading = "Cluster")]
    token: Option<String>,
    /// File that holds the join token; not looked at once the node has enrolled
    #[arg(long, value_name = "FILE", conflicts_with = "token", help_heading = "Cluster")]
    token_file: Option<PathBuf>,
    /// The node's folder [default: 'node' in the XDG data folder millrace]
    #[arg(long, value_name = "DIR", env = env::DIR, help_heading = "Cluster")]
    dir: Option<PathBuf>,
    /// Name for people [default: the host's name]
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    name: Option<String>,
    /// Address to bind, UDP [default: 0.0.0.0:8010, or the next free port]
    #[arg(long, value_name = "ADDR", help_heading = "Cluster")]
    listen: Option<SocketAddr>,
    /// Host, or host and port, that neighbours dial [default: the address towards the coordinator]
    #[arg(long, value_name = "HOST[:PORT]", help_heading = "Cluster")]
    advertise: Option<String>,
    /// Model file or folder to take weights from, instead of fetching them
    #[arg(long, value_name = "PATH", help_heading = "Resources")]
    weights: Option<PathBuf>,
    /// Most memory to use, for example 8GiB [default: what is available]
    #[arg(long, value_name = "BYTES", value_parser = byte_size, help_heading = "Resources")]
    memory: Option<u64>,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

impl RunArgs {
    /// Validates, and sets what the cache may hold.
    ///
    /// # Errors
    /// If the token is malformed, or no folder can be found.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let lookup = |name: &str| std::env::var_os(name);
        let dir = match self.dir {
            Some(dir) => dir,
            None => dirs::data(&lookup)
                .ok_or_else(|| anyhow!("no --dir given and $HOME is not set"))?
                .join("node"),
        };
        let cache = dirs::cache(&lookup)
            .ok_or_else(|| anyhow!("set MILLRACE_CACHE to a folder: $HOME is not set"))?;
        let token = match &self.token_file {
            Some(file) if !enrol::is_member(&dir) => {
                let text = std::fs::read_to_string(file);
                Some(text.with_context(|| format!("--token-file {}", file.display()))?)
            }
            _ => self.token,
        };
        let token = token.map(|t| t.trim().parse::<JoinToken>().context("--token")).transpose()?;
        self.cache.cache_limit.into_iter().for_each(set_limit);
        awake::set(self.engine.wake_latency);
        self.engine.warn_foreign();
        let given = |dtype: Dtype, default: Dtype| (dtype != default).then_some(dtype);
        let defaults = EngineOptions::default();
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT));
        Ok(Config {
            dir,
            cache,
            token,
            coordinator: self.coordinator,
            next_free_port: self.listen.is_none(),
            listen: self.listen.unwrap_or(any),
            advertise: self.advertise,
            name: self.name.unwrap_or_else(|| Hardware::probe().host),
            weights: self.weights,
            threads: self.engine.threads,
            nodes_in_process: 1,
            memory_bytes: self.memory,
            engine: self.engine.engine,
            torch: self.engine.torch,
            require_kv_dtype: given(self.engine.kv_cache_dtype, defaults.kv_cache_dtype),
            require_activation_dtype: given(
                self.engine.activation_dtype,
                defaults.activation_dtype,
            ),
            show_progress: true,
            drains: true,
        })
    }
}

/// Says which options a node leaves to the coordinator.
trait WarnForeign {
    fn warn_foreign(&self);
}

impl WarnForeign for EngineOptions {
    fn warn_foreign(&self) {
        let defaults = Self::default();
        let foreign = [
            (self.cuts.is_some(), "--cuts"),
            (self.prefill_chunk != defaults.prefill_chunk, "--prefill-chunk"),
            (self.micro_batches != MicroBatches::Auto, "--micro-batches"),
            (self.prefix_cache != defaults.prefix_cache, "--prefix-cache"),
            (self.speculate != defaults.speculate, "--speculate"),
        ];
        for (given, flag) in foreign {
            if given {
                tracing::warn!("{flag} is the coordinator's to decide: it has no effect on a node");
            }
        }
    }
}
