//! Every format that crosses a socket, and the limits that are checked before memory is allocated.
//!
//! Codecs: rkyv for what exists per micro-batch ([`data`]), bincode for the rare control and client
//! messages ([`control`], [`rpc`], [`join`]). A change to any message bumps its ALPN.

pub mod admin;
pub(crate) mod bounded;
pub mod chat;
pub mod codec;
pub mod control;
pub mod data;
pub mod frame;
pub mod join;
mod results;
pub mod rpc;
pub mod stamp;
pub mod status;

/// ALPN between cluster members; mutual TLS.
pub const ALPN_CLUSTER: &[u8] = b"millrace-cluster/8";
/// ALPN of clients; server-authenticated TLS and an API key.
pub const ALPN_CLIENT: &[u8] = b"millrace-client/11";
/// ALPN of joining nodes.
pub const ALPN_JOIN: &[u8] = b"millrace-join/3";

/// The version of everything in [`control`] and [`data`]; a node of another one is refused.
pub const WIRE_VERSION: u16 = 8;

/// Longest control message.
pub const MAX_CONTROL_BYTES: usize = 16 << 20;
/// Longest header of a client's call, which is read before the client has proved anything.
pub const MAX_CALL_HEADER_BYTES: usize = 4 << 10;
/// Longest [`rpc::Method`] of a call.
pub const MAX_RPC_BYTES: usize = 4 << 20;
/// Longest [`rpc::Reply`]; an id for every byte of the longest text fits.
pub const MAX_REPLY_BYTES: usize = 16 << 20;
/// Longest join message.
pub const MAX_JOIN_BYTES: usize = 16 << 10;
/// Longest metadata of a stage frame.
pub const MAX_FRAME_META_BYTES: usize = 16 << 20;
/// Longest payload of a stage frame.
pub const MAX_FRAME_PAYLOAD_BYTES: usize = 256 << 20;
/// Most entries of a [`control::CoordinatorMessage::Void`], and most that a stage remembers.
pub const MAX_VOID_ROWS: usize = 4096;
/// Longest range one blob request may ask for.
pub const MAX_BLOB_RANGE_BYTES: u64 = 4 << 20;

/// Name in the coordinator's certificate.
pub const COORDINATOR_NAME: &str = "coordinator.millrace.internal";

/// Name in a node's certificate.
pub fn node_name(id: crate::id::NodeId) -> String {
    format!("{id}.node.millrace.internal")
}

/// The node a certificate name belongs to, if it is a node's name.
pub fn node_of_name(name: &str) -> Option<crate::id::NodeId> {
    name.strip_suffix(".node.millrace.internal")?.parse().ok()
}

/// What the first frame of a stream on a cluster connection says it carries.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Plane {
    /// Bidirectional, node to coordinator: [`control`] messages both ways.
    Control,
    /// Bidirectional: stage frames forward, [`data::Credit`] messages back.
    Stage {
        /// The pipeline the edge belongs to.
        pipeline: crate::id::PipelineId,
        /// The epoch the edge was opened for; an edge lives for one epoch.
        epoch: crate::id::Epoch,
        /// What kind of edge.
        edge: Edge,
    },
    /// Bidirectional, one exchange: a [`control::BlobRequest`], then the bytes.
    Blob,
    /// Bidirectional, node to node: bytes that mean nothing, at most a mebibyte, then their number
    /// back; measures a way.
    Burst,
}

/// The edges of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Edge {
    /// Coordinator to the first stage: step frames.
    Steps,
    /// Stage to the next stage: activations.
    Activations,
    /// Last stage to the coordinator: results.
    Results,
    /// Coordinator to the last stage: opened sequences.
    Sequences,
}
