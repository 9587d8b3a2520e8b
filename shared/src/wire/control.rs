//! Control plane between a node and the coordinator (one bidirectional stream per node), and the
//! blob plane. bincode, length-prefixed.

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, NodeId, PipelineId, SequenceId, StageIndex};
use crate::model::{Dtype, ModelConfig, TensorEntry};
use crate::options::TorchKept;

/// What a node says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeMessage {
    /// First message: who, what and where.
    Hello(Box<Hello>),
    /// Every heartbeat interval, from outside the compute thread.
    Heartbeat(Heartbeat),
    /// Answer to [`CoordinatorMessage::Profile`].
    Profiled {
        /// What was measured.
        profile: StageProfile,
    },
    /// The assignment is loaded; the stage accepts frames.
    Ready {
        /// Pipeline it belongs to.
        pipeline: PipelineId,
        /// Epoch of the assignment.
        epoch: Epoch,
        /// How the load went.
        report: LoadReport,
    },
    /// The edges out of the stage are connected.
    Started {
        /// Pipeline it belongs to.
        pipeline: PipelineId,
        /// Epoch of the assignment.
        epoch: Epoch,
    },
    /// The assignment cannot be loaded.
    LoadFailed {
        /// Pipeline it belongs to.
        pipeline: PipelineId,
        /// Epoch of the assignment.
        epoch: Epoch,
        /// Why, and what to do.
        message: String,
    },
    /// A neighbour vanished or sent something malformed; the epoch is over.
    EdgeLost {
        /// Pipeline it belongs to.
        pipeline: PipelineId,
        /// Epoch of the edge.
        epoch: Epoch,
        /// What happened.
        message: String,
    },
    /// Answer to [`CoordinatorMessage::TryEdge`].
    EdgeTried {
        /// Whom it tried to reach.
        to: NodeId,
        /// How the way is, else why there is none.
        outcome: Result<WayMeasured, String>,
    },
    /// The node leaves on purpose.
    Leaving,
    /// The node wants to leave: hand its layers over first.
    Draining,
    /// Answer to [`CoordinatorMessage::Collect`].
    Collected {
        /// As asked.
        ticket: u64,
        /// At most [`super::admin::MAX_COLLECTED_BYTES`].
        files: Vec<super::admin::CollectedFile>,
    },
}

/// What a trial of a way has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WayMeasured {
    /// The round trip in seconds of a handshake with full datagrams.
    pub round_trip: f64,
    /// Bytes a second of a burst, where one was asked for and the way is short enough to tell.
    pub bytes_per_second: Option<f64>,
}

/// How a node introduces itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// [`super::WIRE_VERSION`].
    pub wire_version: u16,
    /// Revision of everything in the engine that may change a token.
    pub numerics_revision: String,
    /// Program version, for people.
    pub version: String,
    /// Name for people.
    pub name: String,
    /// `host:port` under which neighbours reach it.
    pub advertise: String,
    /// Name of the host, to tell which nodes share one.
    pub host: String,
    /// Engine: `cpu`, `torch`, `mock`.
    pub engine: String,
    /// Threads the engine uses.
    pub threads: u32,
    /// Bytes of memory the node may use.
    pub memory_bytes: u64,
    /// Processor and instruction set, for people.
    pub hardware: String,
    /// How the torch engine keeps weights, where it is the one.
    pub torch: Option<TorchKept>,
    /// Whether its process ends when the coordinator tells it to drain; one that shares its process
    /// with others does not.
    pub drains: bool,
}

/// Longest text in a [`Hello`]: it is shown to people, and kept for as long as the node is there.
pub const MAX_HELLO_TEXT_BYTES: usize = 256;
/// Most memory that a node may claim: a pebibyte, so that sums over nodes stay numbers.
pub const MAX_HELLO_MEMORY_BYTES: u64 = 1 << 50;
/// Most threads that a node may claim.
pub const MAX_HELLO_THREADS: u32 = 1 << 16;

impl Hello {
    /// Whether its memory is its own: that of a GPU, where other nodes of a host share the host's.
    pub fn has_own_memory(&self) -> bool {
        self.torch.is_some_and(|torch| torch.gpu)
    }

    /// Whether what the node says of itself can be shown and reckoned with.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        for (field, text) in [
            ("numerics_revision", &self.numerics_revision),
            ("version", &self.version),
            ("name", &self.name),
            ("advertise", &self.advertise),
            ("host", &self.host),
            ("engine", &self.engine),
            ("hardware", &self.hardware),
        ] {
            if text.len() > MAX_HELLO_TEXT_BYTES || text.chars().any(char::is_control) {
                return Err(format!(
                    "the hello's {field} is longer than {MAX_HELLO_TEXT_BYTES} bytes, or has \
                     control characters"
                ));
            }
        }
        if self.memory_bytes > MAX_HELLO_MEMORY_BYTES || self.threads > MAX_HELLO_THREADS {
            return Err(format!(
                "the hello claims {} bytes of memory and {} threads, which nobody has",
                self.memory_bytes, self.threads
            ));
        }
        Ok(())
    }
}

/// Sign of life with cumulative counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// CPU seconds of the engine's threads inside `step`.
    pub busy_seconds: f64,
    /// Wall seconds since the stage began.
    pub wall_seconds: f64,
    /// CPU seconds of the node's whole process since it began.
    pub process_seconds: f64,
    /// Micro-batches that came in; at most as many are computed.
    pub received: u64,
    /// Micro-batches computed.
    pub steps: u64,
    /// Stale frames dropped.
    pub stale_dropped: u64,
    /// Rows left out because nobody wanted them any more.
    pub rows_left_out: u64,
    /// Echo of the coordinator's last ping, for the round trip.
    pub echo: u64,
}

/// What the coordinator says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum CoordinatorMessage {
    /// The hello is accepted.
    Welcome {
        /// The name from the certificate, for the log.
        node_id: NodeId,
        /// Milliseconds between heartbeats.
        heartbeat_ms: u32,
        /// Milliseconds of silence after which the node is lost.
        lease_ms: u32,
    },
    /// The hello is refused; the connection closes.
    Refused {
        /// Why, and what to do.
        message: String,
    },
    /// Measure one layer and the head of this model, for each of [`PROFILE_ROWS`].
    Profile(Box<ProfileSpec>),
    /// Take this stage.
    Assign {
        /// The stage.
        assignment: Box<Assignment>,
        /// Make it ready beside the older one, which works on until it is released; else drop that
        /// first.
        beside: bool,
    },
    /// Try to reach another member as a neighbour would.
    TryEdge {
        /// Whom.
        peer: Peer,
        /// Also measure the bandwidth.
        burst: bool,
    },
    /// Every stage of this epoch is loaded: connect the edges out.
    Start {
        /// Pipeline.
        pipeline: PipelineId,
        /// Epoch of the assignment.
        epoch: Epoch,
    },
    /// Give up the stage of this epoch alone: it will not begin.
    Abandon {
        /// Pipeline.
        pipeline: PipelineId,
        /// That epoch.
        epoch: Epoch,
    },
    /// Give the stage up; its epoch is over. One that was made ready beside it takes its place.
    Release {
        /// Pipeline.
        pipeline: PipelineId,
        /// Every assignment up to this epoch.
        epoch: Epoch,
    },
    /// What the node's layers and head take while it serves, instead of what it measured alone: to
    /// be kept for its next start.
    Paced {
        /// Of the model that it was last asked to measure.
        profile: StageProfile,
    },
    /// Rows that are under way and that nobody wants any more.
    Void {
        /// Pipeline.
        pipeline: PipelineId,
        /// Epoch of the rows.
        epoch: Epoch,
        /// Which, at most [`super::MAX_VOID_ROWS`].
        rows: Vec<VoidRows>,
    },
    /// For the round trip: comes back in the next heartbeat.
    Ping(u64),
    /// The cluster is shutting down.
    Shutdown,
    /// An operator wants the node's process to end, as SIGTERM would.
    Drain,
    /// Answer to [`NodeMessage::Draining`]: the node may go.
    Drained {
        /// Why it takes requests along, where nobody could take its layers over.
        trouble: Option<String>,
    },
    /// Hand over what helps to find out what went wrong.
    Collect {
        /// Comes back with the answer.
        ticket: u64,
    },
}

/// Every row of a sequence up to an epoch of its own: it was cancelled, or will be computed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoidRows {
    /// The sequence.
    pub sequence: SequenceId,
    /// Rows of this epoch of the sequence, and of older ones.
    pub epoch: u32,
}

/// What to measure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileSpec {
    /// Dimensions.
    pub config: ModelConfig,
    /// Type of the layers' matrices.
    pub layer_type: crate::model::TensorType,
    /// Type of the head's matrix.
    pub head_type: crate::model::TensorType,
    /// Nodes on the host, which share its cores.
    pub sharing: u32,
}

/// Rows of the micro-batches that are measured: one stream, few, a cohort, a prefill chunk.
pub const PROFILE_ROWS: [u32; 4] = [1, 4, 16, 64];

/// Positions that the attention of each measured row reads: the middle of a usual conversation, so
/// that plans hold for answers in the making, not for their first token alone.
pub const PROFILE_CONTEXT: u32 = 256;

/// What was measured, for each of [`PROFILE_ROWS`], at [`PROFILE_CONTEXT`]. Looking up rows of the embedding costs less than
/// can be measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageProfile {
    /// Seconds of one layer.
    pub layer_seconds: [f64; PROFILE_ROWS.len()],
    /// Seconds of the head.
    pub head_seconds: [f64; PROFILE_ROWS.len()],
}

/// What a measured time is at least, and at most: what lies outside is no time that a stage takes.
const PROFILE_BOUNDS: (f64, f64) = (1e-9, 1e4);

impl StageProfile {
    /// The same with times that plans can reckon with: what is no number, or no time that a stage
    /// takes, counts as the slowest, so that whoever lies gets little to do.
    #[must_use]
    pub fn sound(self) -> Self {
        let (least, most) = PROFILE_BOUNDS;
        let sound = |s: f64| if s >= least && s <= most { s } else { most };
        Self {
            layer_seconds: self.layer_seconds.map(sound),
            head_seconds: self.head_seconds.map(sound),
        }
    }

    /// The same where everything takes `factor` times as long.
    #[must_use]
    pub fn slower(self, factor: f64) -> Self {
        Self {
            layer_seconds: self.layer_seconds.map(|s| s * factor),
            head_seconds: self.head_seconds.map(|s| s * factor),
        }
    }

    /// The same for any number of rows.
    pub const fn flat(layer_seconds: f64, head_seconds: f64) -> Self {
        Self { layer_seconds: [layer_seconds; 4], head_seconds: [head_seconds; 4] }
    }
}

/// A node's part in a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// Pipeline.
    pub pipeline: PipelineId,
    /// Epoch of the plan.
    pub epoch: Epoch,
    /// Place in the pipeline.
    pub stage: StageIndex,
    /// Stages in all.
    pub stages: u16,
    /// First layer.
    pub first_layer: u32,
    /// One past the last layer.
    pub end_layer: u32,
    /// The model's dimensions.
    pub config: ModelConfig,
    /// The tensors of this stage, each with its content hash.
    pub tensors: Vec<TensorEntry>,
    /// Who sends activations: `None` for the first stage (the coordinator does).
    pub previous: Option<NodeId>,
    /// Who gets them: `None` for the last stage.
    pub next: Option<Peer>,
    /// Settings every stage shares.
    pub settings: EngineSettings,
    /// Content hash of the model.
    pub content_hash: [u8; 32],
    /// What the stage's numerics must be.
    pub numerics_id: [u8; 32],
    /// Micro-batches in flight at most.
    pub in_flight: u32,
    /// Frames that an edge between stages may hold; one to or from the coordinator, which counts
    /// micro-batches itself, may hold [`Assignment::own_credits`].
    pub credits: u32,
    /// Stages of this pipeline on the node's host, which share its cores.
    pub host_stages: u32,
}

impl Assignment {
    /// Frames that an edge to or from the coordinator may hold: one more than micro-batches, for
    /// frames that only carry releases.
    pub fn own_credits(&self) -> u32 {
        self.in_flight.saturating_add(1)
    }

    /// Frames that an edge may hold.
    pub fn credits_of(&self, edge: super::Edge) -> u32 {
        match edge {
            super::Edge::Activations => self.credits,
            super::Edge::Steps | super::Edge::Results | super::Edge::Sequences => {
                self.own_credits()
            }
        }
    }
}

/// A neighbour.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its id, which its certificate must name.
    pub node_id: NodeId,
    /// Where it listens.
    pub address: String,
}

/// Settings that all stages of a pipeline share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineSettings {
    /// KV blocks to allocate.
    pub kv_blocks: u32,
    /// Positions per block; divides 64.
    pub kv_block_size: u32,
    /// Stored type of K and V.
    pub kv_dtype: Dtype,
    /// Type of activations at every layer boundary.
    pub activation_dtype: Dtype,
    /// Most tokens in one micro-batch.
    pub max_batch_tokens: u32,
    /// Most sequences open at once.
    pub max_num_seqs: u32,
    /// Longest sequence.
    pub max_model_len: u32,
}

/// How a load went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of KV cache.
    pub kv_bytes: u64,
    /// Bytes taken from the node's own file.
    pub from_file: u64,
    /// Bytes taken from the node's cache.
    pub from_cache: u64,
    /// Bytes fetched from the coordinator.
    pub from_coordinator: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Compute threads of the stage.
    pub threads: u32,
}

/// First message on a blob stream. The answer is a [`BlobResponse`], then the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRequest {
    /// BLAKE3 of the whole blob.
    pub hash: [u8; 32],
    /// First byte.
    pub offset: u64,
    /// How many; at most [`super::MAX_BLOB_RANGE_BYTES`].
    pub len: u64,
}

/// Answer to a blob request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlobResponse {
    /// This many bytes follow.
    Bytes(u64),
    /// No.
    Refused(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_that_are_none_count_as_slow() {
        let honest = StageProfile::flat(1e-3, 5e-3);
        assert_eq!(honest.sound(), honest);
        for lie in [0.0, -1.0, 1e-300, 1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(StageProfile::flat(lie, 5e-3).sound(), StageProfile::flat(1e4, 5e-3));
            assert_eq!(StageProfile::flat(1e-3, lie).sound(), StageProfile::flat(1e-3, 1e4));
        }
    }

    #[test]
    fn hellos_that_cannot_be() {
        let honest = Hello {
            wire_version: 1,
            numerics_revision: "cpu/1".into(),
            version: "1".into(),
            name: "node".into(),
            advertise: "h:1".into(),
            host: "h".into(),
            engine: "cpu".into(),
            threads: 4,
            memory_bytes: 1 << 30,
            hardware: "none".into(),
            torch: None,
            drains: true,
        };
        assert_eq!(honest.check(), Ok(()));
        for (lie, part) in [
            (Hello { name: "a\u{1b}[2Jb".into(), ..honest.clone() }, "name"),
            (Hello { hardware: "x".repeat(257), ..honest.clone() }, "hardware"),
            (Hello { host: "a\nb".into(), ..honest.clone() }, "host"),
            (Hello { memory_bytes: u64::MAX, ..honest.clone() }, "memory"),
            (Hello { threads: u32::MAX, ..honest.clone() }, "threads"),
        ] {
            assert!(lie.check().unwrap_err().contains(part));
        }
    }
}
