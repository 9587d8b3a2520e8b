//! A description of a cluster, for plans without one: what `millrace-node probe` writes, what a
//! running coordinator says of its members, and what people edit by hand. TOML elsewhere, values
//! here.
//!
//! A node has what was measured for a model, or limits from which times of any model are estimated,
//! or both; what was measured for another model is not used.

use serde::{Deserialize, Serialize};

use crate::model::{ModelConfig, TensorType};
use crate::options::TorchKept;
use crate::wire::control::{PROFILE_ROWS, ProfileSpec, StageProfile};

/// The name of the coordinator in links.
pub const COORDINATOR: &str = "coordinator";

/// A cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Links that have no entry of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkEntry>,
    /// Machines.
    #[serde(default)]
    pub node: Vec<NodeEntry>,
    /// Links between some of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub link: Vec<LinkEntry>,
}

/// What links are like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkEntry {
    /// There and back, milliseconds.
    pub rtt_ms: f64,
    /// Bandwidth, millions of bits a second.
    pub megabits_per_second: f64,
}

/// A link; it holds for the way back too, unless that has an entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// Name of a node, or [`COORDINATOR`].
    pub from: String,
    /// Likewise.
    pub to: String,
    /// There and back, milliseconds; as in `network` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// Bandwidth, millions of bits a second; as in `network` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub megabits_per_second: Option<f64>,
    /// Nothing passes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub forbidden: bool,
}

/// One machine, or several that are alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeEntry {
    /// Name, unlike every other.
    pub name: String,
    /// How many such machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Processor, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
    /// Compute threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Memory for weights, KV cache and scratch.
    pub memory_bytes: u64,
    /// How the torch engine keeps weights there, where it is the one: `{ dtype = "bf16", gpu = true }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch: Option<TorchKept>,
    /// Free space of the cache folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free_bytes: Option<u64>,
    /// How fast the cache folder is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_second: Option<f64>,
    /// What an hour costs, in any currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// For models that were not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// For models that were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<Measured>,
}

impl NodeEntry {
    /// Whether its memory is a GPU's, and not shared with other nodes of its machine.
    pub fn has_own_memory(&self) -> bool {
        self.torch.is_some_and(|torch| torch.gpu)
    }
}

/// What a machine can do, whatever the model: estimates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of weights it reads a second.
    pub memory_bytes_per_second: f64,
    /// Multiply-adds a second.
    pub multiply_adds_per_second: f64,
    /// Seconds that a layer takes however small it is.
    pub layer_overhead_seconds: f64,
}

/// Times of a layer and of the head of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// [`shape_key`] of the model.
    pub shape: String,
    /// Rows of the micro-batches, rising.
    pub rows: Vec<u32>,
    /// Seconds of a layer for each.
    pub layer_seconds: Vec<f64>,
    /// Seconds of the head for each.
    pub head_seconds: Vec<f64>,
}

impl Measured {
    /// What a node measured.
    pub fn new(spec: &ProfileSpec, profile: &StageProfile) -> Self {
        Self {
            shape: shape_key(&spec.config, spec.layer_type, spec.head_type),
            rows: PROFILE_ROWS.to_vec(),
            layer_seconds: profile.layer_seconds.to_vec(),
            head_seconds: profile.head_seconds.to_vec(),
        }
    }
}

fn is_false(b: &bool) -> bool {
    !b
}

/// What times of a layer and of the head depend on; models with the same key take the same times.
pub fn shape_key(config: &ModelConfig, layer: TensorType, head: TensorType) -> String {
    let ModelConfig { hidden, heads, kv_heads, head_dim, ffn, vocab, .. } = config;
    let (layer, head) = (layer.as_str(), head.as_str());
    format!("{hidden} x {ffn}, {heads}/{kv_heads} heads of {head_dim}, {layer}; {vocab}, {head}")
}

impl ClusterFile {
    /// Whether the figures make sense.
    ///
    /// # Errors
    /// Names the entry and the field, and says what to do.
    pub fn validate(&self) -> Result<(), String> {
        if self.node.is_empty() {
            return Err("there is no [[node]]: add one, for example what 'millrace-node probe \
                        --output FILE' writes on that machine"
                .to_owned());
        }
        if let Some(network) = &self.network {
            check_link("[network]", Some(network.rtt_ms), Some(network.megabits_per_second))?;
        }
        for (i, node) in self.node.iter().enumerate() {
            node.validate(i)?;
            if self.node[..i].iter().any(|n| n.name == node.name) {
                return Err(format!(
                    "two [[node]] entries have the name '{}': give one another name, or use count",
                    node.name
                ));
            }
        }
        for link in &self.link {
            let what = format!("[[link]] from '{}' to '{}'", link.from, link.to);
            for end in [&link.from, &link.to] {
                if end != COORDINATOR && !self.node.iter().any(|n| n.name == *end) {
                    let names: Vec<&str> = self.node.iter().map(|n| n.name.as_str()).collect();
                    return Err(format!(
                        "{what}: there is no node '{end}'; the nodes are {}, and '{COORDINATOR}'",
                        names.join(", ")
                    ));
                }
            }
            check_link(&what, link.rtt_ms, link.megabits_per_second)?;
        }
        Ok(())
    }
}

fn check_link(what: &str, rtt_ms: Option<f64>, megabits: Option<f64>) -> Result<(), String> {
    if rtt_ms.is_some_and(|x| !x.is_finite() || x < 0.0) {
        return Err(format!("{what}: rtt_ms must be 0 or more, in milliseconds"));
    }
    if megabits.is_some_and(|x| x.is_nan() || x <= 0.0) {
        return Err(format!(
            "{what}: megabits_per_second must be above 0; write forbidden = true for a link that \
             does not exist"
        ));
    }
    Ok(())
}

impl NodeEntry {
    fn validate(&self, index: usize) -> Result<(), String> {
        if self.name.is_empty() || self.name == COORDINATOR {
            return Err(format!(
                "[[node]] number {}: name must be given, and not be '{COORDINATOR}'",
                index + 1
            ));
        }
        let bad = |field: &str, problem: &str| {
            Err(format!("[[node]] '{}': {field} {problem}", self.name))
        };
        if self.memory_bytes == 0 {
            return bad("memory_bytes", "must be above 0: the bytes that the node may use");
        }
        if self.count.is_some_and(|n| n == 0 || n > 1024) {
            return bad("count", "must be from 1 to 1024");
        }
        if self.price_per_hour.is_some_and(|p| !p.is_finite() || p < 0.0) {
            return bad("price_per_hour", "must be 0 or more");
        }
        if self.disk_bytes_per_second.is_some_and(|x| !(x.is_finite() && x > 0.0)) {
            return bad("disk_bytes_per_second", "must be above 0");
        }
        if let Some(limits) = &self.limits {
            let above = |x: f64| x.is_finite() && x > 0.0;
            if !above(limits.memory_bytes_per_second) || !above(limits.multiply_adds_per_second) {
                return bad("limits", "must be above 0");
            }
            if !limits.layer_overhead_seconds.is_finite() || limits.layer_overhead_seconds < 0.0 {
                return bad("limits.layer_overhead_seconds", "must be 0 or more");
            }
        }
        for measured in &self.measured {
            let rows = measured.rows.len();
            let seconds = [&measured.layer_seconds, &measured.head_seconds];
            if rows == 0 || seconds.iter().any(|s| s.len() != rows) {
                return bad("measured", "needs as many layer_seconds and head_seconds as rows");
            }
            let wrong = |s: &f64| !s.is_finite() || *s <= 0.0;
            if measured.layer_seconds.iter().any(wrong) || measured.head_seconds.iter().any(wrong) {
                return bad("measured", "has a time that is not above 0: measure again");
            }
        }
        if self.limits.is_none() && self.measured.is_empty() {
            return bad(
                "limits",
                "or measured must be given: run 'millrace-node probe --output FILE' there",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeEntry {
        let limits = Limits {
            memory_bytes_per_second: 2e10,
            multiply_adds_per_second: 1e11,
            layer_overhead_seconds: 0.0,
        };
        NodeEntry {
            name: name.to_owned(),
            memory_bytes: 1 << 30,
            limits: Some(limits),
            ..NodeEntry::default()
        }
    }

    #[test]
    fn errors_name_entry_and_field() {
        let with = |change: &dyn Fn(&mut ClusterFile)| {
            let mut file = ClusterFile { node: vec![node("a"), node("b")], ..Default::default() };
            change(&mut file);
            file.validate()
        };
        assert_eq!(with(&|_| {}), Ok(()));
        let link = |to: &str| LinkEntry {
            from: "a".into(),
            to: to.into(),
            rtt_ms: Some(-1.0),
            megabits_per_second: None,
            forbidden: false,
        };
        type Break<'a> = &'a dyn Fn(&mut ClusterFile);
        let cases: [(Break<'_>, &str); 7] = [
            (&|f| f.node.clear(), "no [[node]]"),
            (&|f| f.node[1].name = "a".into(), "two [[node]] entries have the name 'a'"),
            (&|f| f.node[0].memory_bytes = 0, "'a': memory_bytes"),
            (&|f| f.node[1].limits = None, "'b': limits or measured"),
            (&|f| f.node[0].count = Some(0), "'a': count"),
            (&|f| f.link.push(link("c")), "no node 'c'; the nodes are a, b"),
            (&|f| f.link.push(link("coordinator")), "rtt_ms must be 0 or more"),
        ];
        for (change, expected) in cases {
            let message = with(change).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
