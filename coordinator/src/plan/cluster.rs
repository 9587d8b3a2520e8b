//! From a description of a cluster to what the planner reckons with, for one model.

use std::path::Path;
use std::time::Duration;

use millrace_shared::cluster_file::{
    COORDINATOR, ClusterFile, Limits, LinkEntry, Measured, NodeEntry, shape_key,
};
use millrace_shared::id::NodeId;
use millrace_shared::partition::{Curve, Link, Network, NodeCosts};
use millrace_shared::wire::control::{Hello, ProfileSpec, StageProfile};

use super::costs::{Kept, ModelParts};
use super::report::NodeFacts;
use super::{KnownWay, LAN, MEMORY_SHARE};

/// Reads a description.
///
/// # Errors
/// Names file, line and field.
pub fn read(path: &Path) -> Result<ClusterFile, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("cannot read the cluster's description {}: {e}", path.display()))?;
    parse(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Reads the text of a description.
///
/// # Errors
/// Names line and field.
pub fn parse(text: &str) -> Result<ClusterFile, String> {
    let file: ClusterFile = toml::from_str(text).map_err(|e| e.to_string())?;
    file.validate()?;
    Ok(file)
}

/// The text of a description.
pub fn to_text(file: &ClusterFile) -> String {
    toml::to_string(file).unwrap_or_default()
}

/// A member of a running cluster.
#[derive(Debug)]
pub struct LiveNode<'a> {
    /// Which.
    pub id: NodeId,
    /// What it said of itself.
    pub hello: &'a Hello,
    /// What it measured.
    pub profile: StageProfile,
    /// There and back, from the coordinator.
    pub rtt: Duration,
}

/// The description of a running cluster that measured `spec`, with the ways that were tried.
pub fn live<'a>(
    spec: &ProfileSpec,
    members: impl IntoIterator<Item = LiveNode<'a>>,
    ways: &[KnownWay],
) -> ClusterFile {
    let mut file = ClusterFile::default();
    let mut hosts: Vec<&str> = Vec::new();
    let mut ids: Vec<NodeId> = Vec::new();
    for LiveNode { id, hello, profile, rtt } in members {
        hosts.push(&hello.host);
        ids.push(id);
        let twins = file.node.iter().filter(|n| n.name.starts_with(&hello.name)).count();
        let name = match twins {
            0 => hello.name.clone(),
            n => format!("{}-{}", hello.name, n + 1),
        };
        file.link.push(LinkEntry {
            from: COORDINATOR.to_owned(),
            to: name.clone(),
            rtt_ms: Some(rtt.as_secs_f64() * 1e3),
            megabits_per_second: None,
            forbidden: false,
        });
        file.node.push(NodeEntry {
            name,
            hardware: Some(hello.hardware.clone()),
            threads: Some(hello.threads),
            memory_bytes: hello.memory_bytes,
            torch: hello.torch,
            measured: vec![Measured::new(spec, &profile)],
            ..NodeEntry::default()
        });
    }
    let name = |id| Some(file.node[ids.iter().position(|i| *i == id)?].name.clone());
    let link = |way: &KnownWay| {
        Some(LinkEntry {
            from: name(way.from)?,
            to: name(way.to)?,
            rtt_ms: way.round_trip.map(|s| s * 1e3),
            megabits_per_second: way.bytes_per_second.map(|b| b * 8e-6),
            forbidden: way.round_trip.is_none(),
        })
    };
    let links: Vec<LinkEntry> = ways.iter().filter_map(link).collect();
    file.link.extend(links);
    // Members on one host share its memory; a GPU has its own.
    let shares: Vec<bool> = file.node.iter().map(|n| !n.has_own_memory()).collect();
    for (i, node) in file.node.iter_mut().enumerate().filter(|(i, _)| shares[*i]) {
        let on_host =
            hosts.iter().zip(&shares).filter(|(host, shares)| **host == hosts[i] && **shares);
        node.memory_bytes /= on_host.count().max(1) as u64;
    }
    file
}

/// A described cluster, for one model: each machine by itself.
#[derive(Clone, Debug)]
pub struct Described {
    /// What the planner reckons with.
    pub nodes: Vec<NodeCosts>,
    /// How each keeps weights.
    pub kept: Vec<Kept>,
    /// Their links.
    pub network: Network,
    /// What reports say of them.
    pub facts: Vec<NodeFacts>,
    /// Whether some figure is an estimate.
    pub estimated: bool,
}

/// Takes a description for a model.
///
/// # Errors
/// If a node has neither measured this model nor limits to estimate it by.
pub fn describe(file: &ClusterFile, parts: &ModelParts<'_>) -> Result<Described, String> {
    let spec = parts.profile_spec(1);
    let shape = shape_key(&spec.config, spec.layer_type, spec.head_type);
    let (mut nodes, mut facts, mut names) = (Vec::new(), Vec::new(), Vec::new());
    let mut kept = Vec::new();
    let mut estimated = false;
    for entry in &file.node {
        let measured = entry.measured.iter().find(|m| m.shape == shape);
        let [layer, head] = match (measured, &entry.limits) {
            (Some(measured), _) => curves(measured),
            (None, Some(limits)) => {
                estimated = true;
                estimate(limits, parts, entry.torch)
            }
            (None, None) => {
                return Err(format!(
                    "node '{}' measured other models than this one ({shape}) and has no [limits]: \
                     run 'millrace-node probe --model FILE' there",
                    entry.name
                ));
            }
        };
        let count = entry.count.unwrap_or(1);
        for i in 0..count {
            let name = match count {
                1 => entry.name.clone(),
                _ => format!("{}-{}", entry.name, i + 1),
            };
            facts.push(facts_of(entry, &name, measured.is_none()));
            names.push(entry.name.clone());
            kept.push(entry.torch);
            nodes.push(NodeCosts {
                name,
                layer: layer.clone(),
                head: head.clone(),
                embed: Curve::flat(0.0),
                pin: None,
                memory_bytes: (entry.memory_bytes as f64 * MEMORY_SHARE) as u64,
            });
        }
    }
    let network = network(file, &names);
    Ok(Described { nodes, kept, network, facts, estimated })
}

fn facts_of(entry: &NodeEntry, name: &str, estimated: bool) -> NodeFacts {
    NodeFacts {
        name: name.to_owned(),
        memory_bytes: entry.memory_bytes,
        kept: entry.torch,
        disk_free_bytes: entry.disk_free_bytes,
        disk_bytes_per_second: entry.disk_bytes_per_second,
        price_per_hour: entry.price_per_hour,
        estimated,
    }
}

fn curves(measured: &Measured) -> [Curve; 2] {
    let curve = |seconds: &Vec<f64>| {
        Curve::new(measured.rows.iter().map(|&r| f64::from(r)).zip(seconds.iter().copied()))
    };
    [curve(&measured.layer_seconds), curve(&measured.head_seconds)]
}

/// The larger of reading the weights and of computing, and what every layer takes.
fn estimate(limits: &Limits, parts: &ModelParts<'_>, kept: Kept) -> [Curve; 2] {
    let model = parts.costs(0, millrace_shared::model::Dtype::F16, 1, kept);
    let layers = model.layers().max(1) as f64;
    let layer_bytes = model.layer_bytes.iter().sum::<u64>() as f64 / layers;
    let (layer_work, head_work) = parts.multiply_adds();
    let time = |bytes: f64, work: f64, rows: f64| {
        let read = bytes / limits.memory_bytes_per_second;
        read.max(rows * work / limits.multiply_adds_per_second) + limits.layer_overhead_seconds
    };
    // Where the one gives way to the other lies between the points: a few more of them.
    let rows = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
    let head_bytes = model.head_bytes as f64;
    [
        Curve::new(rows.map(|r| (r, time(layer_bytes, layer_work, r)))),
        Curve::new(rows.map(|r| (r, time(head_bytes, head_work, r)))),
    ]
}

/// Links by the entries' names; machines of one entry are linked as the network is.
fn network(file: &ClusterFile, names: &[String]) -> Network {
    let usual = file.network.map_or(LAN, |n| Link {
        rtt_seconds: n.rtt_ms / 1e3,
        bytes_per_second: n.megabits_per_second * 1e6 / 8.0,
    });
    let link = |entry: &LinkEntry| {
        (!entry.forbidden).then(|| Link {
            rtt_seconds: entry.rtt_ms.map_or(usual.rtt_seconds, |ms| ms / 1e3),
            bytes_per_second: entry
                .megabits_per_second
                .map_or(usual.bytes_per_second, |m| m * 1e6 / 8.0),
        })
    };
    let mut network = Network::uniform(names.len(), usual);
    let places = |name: &str| -> Vec<usize> {
        if name == COORDINATOR {
            return vec![names.len()];
        }
        (0..names.len()).filter(|&i| names[i] == name).collect()
    };
    // The way back first, so that an entry of its own takes precedence.
    for back in [true, false] {
        for entry in &file.link {
            let (from, to) = match back {
                true => (&entry.to, &entry.from),
                false => (&entry.from, &entry.to),
            };
            for a in places(from) {
                for b in places(to).into_iter().filter(|&b| b != a) {
                    network.set(a, b, link(entry));
                }
            }
        }
    }
    network
}
