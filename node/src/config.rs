//! Validated settings of a node.

use std::net::SocketAddr;
use std::path::PathBuf;

use millrace_net::join::JoinToken;
use millrace_shared::model::Dtype;
use millrace_shared::options::{EngineKind, TorchOptions};

/// First UDP port that nodes try; the next free one is taken on a shared host.
pub const DEFAULT_PORT: u16 = 8010;
/// How many ports are tried.
pub const PORT_TRIES: u16 = 64;

/// Everything a node needs to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// State folder: certificate, key, where the coordinator is.
    pub dir: PathBuf,
    /// Folder of fetched tensors.
    pub cache: PathBuf,
    /// How to become a member, where the folder says that this node is not one yet.
    pub token: Option<JoinToken>,
    /// `host:port` of the coordinator's public endpoint; overrides the one in the token.
    pub coordinator: Option<String>,
    /// Address to bind.
    pub listen: SocketAddr,
    /// Take the next free port if the one in `listen` is in use.
    pub next_free_port: bool,
    /// `host` or `host:port` that neighbours dial; found out where not given.
    pub advertise: Option<String>,
    /// Name for people.
    pub name: String,
    /// Model file to take tensors from.
    pub weights: Option<PathBuf>,
    /// Compute threads; `None` for every physical core granted, shared among the stages on the host.
    pub threads: Option<usize>,
    /// Nodes in this process, this one included: their stages take turns on the same threads' worth of
    /// processors, where those of other processes divide them.
    pub nodes_in_process: u32,
    /// Most bytes of memory to use; `None` for what is available.
    pub memory_bytes: Option<u64>,
    /// Engine.
    pub engine: EngineKind,
    /// Where and in what the torch engine computes.
    pub torch: TorchOptions,
    /// Refuse assignments whose KV cache has another type.
    pub require_kv_dtype: Option<Dtype>,
    /// Refuse assignments whose activations have another type.
    pub require_activation_dtype: Option<Dtype>,
    /// Bars and tables on stderr; off where another program embeds the node.
    pub show_progress: bool,
    /// Whether the process ends when an operator tells the node to drain.
    pub drains: bool,
}
