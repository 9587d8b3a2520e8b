//! What the coordinator knows that helps to find out what went wrong, for `millrace doctor --bundle`:
//! its ring of micro-batches, events, plan, state, settings, metrics, and what requests wait for.
//!
//! Invariant: no prompt, no token and no secret is in it; requests appear by their names alone.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::wire::WIRE_VERSION;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, CollectedFile, RequestQuery};
use serde::Serialize;

use crate::config::Config;
use crate::journal::unix_ms;
use crate::metrics::Metrics;
use crate::metrics::timeline::Timeline;
use crate::service::Service;
use crate::serving::Serving;
use crate::whereabouts;

/// Saved rings that are kept.
const FILES: usize = 8;
/// Those that are handed over.
const HANDED_OVER: usize = 4;

/// What never changes while the coordinator runs.
#[derive(Debug)]
pub struct About {
    /// Settings for people.
    settings: String,
    /// Where rings are saved.
    rings: PathBuf,
}

impl About {
    /// Of these settings.
    pub fn new(config: &Config) -> Self {
        let settings = format!(
            "version {}\nwire version {WIRE_VERSION}\nserved {}\nstages {:?}\nHTTP {:?}\nQUIC {}\n\
             members {}\njournal {:?}\n{:#?}\n",
            env!("CARGO_PKG_VERSION"),
            config.served_name,
            config.stages,
            config.http,
            config.quic,
            config.cluster,
            config.journal,
            config.deployment
        );
        Self { settings, rings: rings(&config.dir) }
    }
}

/// Where rings are saved in a cluster's folder.
fn rings(dir: &Path) -> PathBuf {
    dir.join("rings")
}

/// Saves the ring, and keeps the newest few. What cannot be written is logged.
pub(crate) fn save(timeline: &Timeline, dir: &Path) {
    let folder = rings(dir);
    let path = folder.join(format!("{:013}.csv", unix_ms()));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&folder)?;
        std::fs::write(&path, ring(timeline))?;
        let mut files = saved(&folder)?;
        files.truncate(files.len().saturating_sub(FILES));
        files.iter().try_for_each(std::fs::remove_file)
    };
    match write() {
        Ok(()) => tracing::warn!("the last micro-batches are in {}", path.display()),
        Err(e) => tracing::warn!("{}: {e}", path.display()),
    }
}

fn saved(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.retain(|path| path.extension().is_some_and(|e| e == "csv"));
    files.sort();
    Ok(files)
}

/// The ring as text: a line for each micro-batch, three times for each stage.
fn ring(timeline: &Timeline) -> String {
    let mut out = String::from(
        "ended_seconds_ago,micro_batch,round_trip_us,rows,positions,hop_wait_step_us\n",
    );
    let us = |seconds: f64| (seconds * 1e6).round() as u64;
    let (now, passages) = timeline.all();
    for p in passages {
        let _ = write!(
            out,
            "{:.3},{},{},{},{}",
            now - p.ended,
            p.id,
            us(p.round_trip),
            p.rows,
            p.positions
        );
        for s in &p.stages {
            let _ = write!(out, ",{}/{}/{}", us(s.hop), us(s.wait), us(s.step));
        }
        out.push('\n');
    }
    out
}

fn json(name: &str, value: &impl Serialize) -> CollectedFile {
    let text = serde_json::to_string_pretty(value);
    CollectedFile { name: name.to_owned(), bytes: text.unwrap_or_default().into_bytes() }
}

/// All of it.
///
/// # Errors
/// If the coordinator is shutting down.
pub(crate) async fn own(
    serving: &Serving,
    about: &Arc<About>,
    metrics: &Arc<Metrics>,
) -> Result<AdminReply, Status> {
    let status = serving.status().await;
    metrics.set_cluster(&status);
    let (_, events, plan) = metrics.chronicle().after(0);
    let text = |name: &str, text: String| CollectedFile {
        name: name.to_owned(),
        bytes: text.into_bytes(),
    };
    let mut files = vec![
        text("about.txt", about.settings.clone()),
        text("plan.txt", plan),
        text("metrics.txt", metrics.render()),
        text("ring.csv", ring(metrics.timeline())),
        json("status.json", &status),
        json("events.json", &events),
    ];
    let requests = whereabouts::answer(serving, RequestQuery::List { stuck: false }).await?;
    if let AdminReply::Requests(requests) = requests {
        files.push(json("requests.json", &requests));
    }
    let others =
        [("nodes.json", AdminRequest::Nodes), ("description.toml", AdminRequest::Describe)];
    for (name, request) in others {
        match serving.admin(None, request).await? {
            AdminReply::Nodes(nodes) => files.push(json(name, &nodes)),
            AdminReply::Description(described) => files.push(text(name, described)),
            _ => {}
        }
    }
    for path in saved(&about.rings).unwrap_or_default().iter().rev().take(HANDED_OVER) {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        if let (Some(name), Ok(bytes)) = (name, std::fs::read(path)) {
            files.push(CollectedFile { name: format!("stalled-{name}"), bytes });
        }
    }
    Ok(AdminReply::Collected(files))
}
