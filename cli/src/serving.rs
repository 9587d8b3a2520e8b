//! From the flags of commands that start a cluster in this process to its options.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use millrace_cli::embedded::EmbeddedOptions;
use millrace_coordinator::cli::served_name;
use millrace_coordinator::config::DEFAULT_MAX_NUM_SEQS;
use millrace_coordinator::journal::JournalConfig;
use millrace_coordinator::models::ModelOptions;
use millrace_coordinator::plan::DEFAULT_KV_TOKENS;
use millrace_coordinator::security::Security;
use millrace_coordinator::text::rules::TextRules;
use millrace_shared::model::ModelFiles;
use millrace_shared::options::EngineOptions;
use millrace_shared::wire::rpc::{ClusterStatus, StageStatus};

use crate::error::usage;
use crate::input;
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};

/// Stages of a cluster inside this process: its nodes share one machine's processors, so that a cut
/// gains nothing and costs a hop.
pub(crate) const DEFAULT_STAGES: u32 = 1;

/// Stages to start: as told, as the cuts imply, or the command's default.
///
/// # Errors
/// If stages and cuts contradict each other.
pub(crate) fn stages(
    stages: Option<u32>,
    engine: &EngineOptions,
    default: u32,
) -> anyhow::Result<u32> {
    let implied = engine.cuts.as_ref().map(|cuts| cuts.len() as u32 + 1);
    match (stages, implied) {
        (Some(n), Some(cut)) if n != cut => Err(usage(format!(
            "--cuts with {} places makes {cut} stages, --stages says {n}: leave one of them out",
            cut - 1
        ))),
        (Some(n), _) | (None, Some(n)) => Ok(n),
        (None, None) => Ok(default),
    }
}

/// Options of a cluster with a throw-away CA and no HTTP; the model is fetched, and quantised, if
/// need be.
///
/// # Errors
/// If there is no such model or it cannot be fetched.
pub(crate) fn private_cluster(
    model: &str,
    model_options: ModelOptions,
    stages: u32,
    engine: &EngineOptions,
) -> anyhow::Result<EmbeddedOptions> {
    Ok(EmbeddedOptions {
        model: input::model_as(model, model_options)?,
        model_name: served_name(model, None),
        stages,
        engine: engine.clone(),
        dir: None,
        quic: None,
        http: None,
        http_hosts: Vec::new(),
        security: Security::default(),
        max_model_len: None,
        max_num_seqs: DEFAULT_MAX_NUM_SEQS,
        kv_cache_tokens: None,
        journal: JournalConfig::default(),
        rules: TextRules::default(),
        otlp_endpoint: None,
    })
}

/// KV positions for this many requests of any length; `None`, the planner's own choice, where that
/// is less. A command that sends one request at a time starts sooner with a smaller cache.
pub(crate) fn kv_cache_for(options: &EmbeddedOptions, requests: u32) -> Option<u32> {
    // What is wrong with a file is for the coordinator to say.
    let context = ModelFiles::open(&options.model).ok()?.config.context;
    context
        .next_multiple_of(64)
        .checked_mul(requests)
        .filter(|&positions| positions < DEFAULT_KV_TOKENS)
}

/// The address of `--host` and `--port`; names are looked up.
///
/// # Errors
/// If the host is neither an address nor a name that resolves.
pub(crate) fn address(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    if let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let found = (host, port).to_socket_addrs().ok().and_then(|mut all| all.next());
    found.ok_or_else(|| {
        usage(format!(
            "--host {host}: neither an IP address nor a known name; try --host 127.0.0.1, or 0.0.0.0 for all interfaces"
        ))
    })
}

/// The part of the model that a stage holds: `embed, 0-14`, `15-29, head`.
pub(crate) fn layers(stage: &StageStatus) -> String {
    let mut parts = Vec::new();
    if stage.embed {
        parts.push("embed".to_owned());
    }
    if stage.first_layer < stage.end_layer {
        parts.push(format!("{}-{}", stage.first_layer, stage.end_layer - 1));
    }
    if stage.head {
        parts.push("head".to_owned());
    }
    parts.join(", ")
}

/// The stages as a table: who holds what.
pub(crate) fn plan_table(status: &ClusterStatus) -> Table {
    let mut table = Table::new(&[
        ("stage", Right),
        ("node", Left),
        ("layers", Left),
        ("weights", Right),
        ("threads", Right),
    ]);
    for (index, stage) in status.stages.iter().enumerate() {
        table.row([
            index.to_string(),
            stage.node_name.clone(),
            layers(stage),
            bytes(stage.weight_bytes),
            stage.threads.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_from_cuts() {
        let cut = EngineOptions { cuts: Some(vec![5, 17]), ..EngineOptions::default() };
        let whole = EngineOptions::default();
        assert_eq!(stages(None, &whole, 2).unwrap(), 2);
        assert_eq!(stages(Some(5), &whole, 2).unwrap(), 5);
        assert_eq!(stages(None, &cut, 2).unwrap(), 3);
        assert_eq!(stages(Some(3), &cut, 2).unwrap(), 3);
        assert!(stages(Some(2), &cut, 2).is_err());
    }

    #[test]
    fn hosts() {
        assert_eq!(address("127.0.0.1", 1).unwrap().to_string(), "127.0.0.1:1");
        assert_eq!(address("[::1]", 2).unwrap().to_string(), "[::1]:2");
        assert!(address("localhost", 3).unwrap().ip().is_loopback());
        assert!(address("", 3).is_err());
    }
}
