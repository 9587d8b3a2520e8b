//! `millrace up`: coordinator and nodes in one process, as a server.
//!
//! The first Ctrl-C or SIGTERM ends the requests in flight and stops; the second aborts at once.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Args;
use millrace_cli::embedded::EmbeddedOptions;
use millrace_coordinator::cli::DirArg;
use millrace_coordinator::config::{DEFAULT_HTTP_PORT, DEFAULT_MAX_NUM_SEQS, DEFAULT_QUIC_PORT};
use millrace_coordinator::state::CLIENT_FILE;
use millrace_shared::options::EngineOptions;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Interrupted, usage};
use crate::target::Session;
use crate::{output, serving};

/// Flags of `up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Path of a GGUF file or catalogue name, for example smollm2:135m
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// Name of the model in requests [default: its catalogue name, or that of the file]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Stages to cut the model into, each a node of its own [default: 2]
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
    network: NetworkArgs,
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

/// Default of `--stages`.
const DEFAULT_STAGES: u32 = 2;

pub(crate) async fn run(args: UpArgs) -> anyhow::Result<()> {
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
    let stages = serving::stages(args.stages, &args.engine, DEFAULT_STAGES)?;
    let http = serving::address(&args.network.host, args.network.port)?;
    if args.served_model_name.as_deref() == Some("") {
        return Err(usage("--served-model-name must not be empty"));
    }
    let plain = serving::private_cluster(&args.model, stages, &args.engine)?;
    Ok(EmbeddedOptions {
        model_name: args.served_model_name.clone().unwrap_or(plain.model_name),
        dir: Some(dir),
        quic: Some(args.network.quic),
        http: Some(http),
        http_hosts: args.network.http_host.clone(),
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        kv_cache_tokens: args.kv_cache_tokens,
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
    if let Some(http) = cluster.http_addr() {
        output::write(format_args!("HTTP http://{http}\n\n{}", paste_lines(http, model, &config)))?;
    }
    output::stream("\nready; Ctrl-C stops\n")
}

/// A curl line and five lines of Python that work when pasted. The key is read from `client.toml`
/// rather than printed: what is on a screen ends up in logs.
fn paste_lines(http: SocketAddr, model: &str, config: &Path) -> String {
    let mut reachable = http;
    if http.ip().is_unspecified() {
        reachable.set_ip(match http {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let config = config.display().to_string();
    let body = serde_json::json!({
        "model": model,
        "messages": [{ "role": "user", "content": "Why is the sky blue?" }],
        "max_tokens": 128,
    })
    .to_string();
    let (shell_config, shell_body) = (shell_quote(&config), shell_quote(&body));
    let (python_config, python_body) = (python_quote(&config), python_quote(&body));
    format!(
        "Ask it with curl:\n\n\
curl -sS http://{reachable}/v1/chat/completions -H \"Authorization: Bearer $(sed -n 's/^api_key *= *\"\\(.*\\)\"/\\1/p' {shell_config})\" -H 'Content-Type: application/json' -d {shell_body}\n\n\
or with Python:\n\n\
import json, re, urllib.request\n\
key = re.search(r'^api_key *= *\"(.*)\"', open({python_config}).read(), re.M).group(1)\n\
headers = {{'Authorization': 'Bearer ' + key, 'Content-Type': 'application/json'}}\n\
request = urllib.request.Request('http://{reachable}/v1/chat/completions', {python_body}.encode(), headers)\n\
print(json.load(urllib.request.urlopen(request))['choices'][0]['message']['content'])\n"
    )
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn python_quote(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pasted_lines_are_quoted_and_reach_a_bound_address() {
        let any = "0.0.0.0:8123".parse().unwrap();
        let text = paste_lines(any, "it's", Path::new("/a b/client.toml"));
        assert!(text.contains("http://127.0.0.1:8123/v1/chat/completions"), "{text}");
        assert!(text.contains(r#""model":"it'\''s""#), "{text}");
        assert!(text.contains(r#""model":"it\'s""#), "{text}");
        assert!(text.contains("'/a b/client.toml'"), "{text}");
    }
}
