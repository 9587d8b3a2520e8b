//! Identities. Newtypes, so that a block index can never be passed for a sequence.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl std::str::FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(s).map($name)
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize,
            Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id!(
    /// A node, named by the coordinator when it enrols (version 7).
    NodeId
);
impl NodeId {
    /// A further node of the machine whose first node this is (version 8): always the same for the same
    /// two, and different for others.
    pub fn seat(self, seat: u16) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("millrace node seat");
        hash.update(self.0.as_bytes());
        hash.update(&seat.to_le_bytes());
        let mut bytes = [0; 16];
        hash.finalize_xof().fill(&mut bytes);
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }

    /// Whether it is such a further node.
    pub fn is_seat(self) -> bool {
        self.0.get_version_num() == 8
    }
}
uuid_id!(
    /// A client's request (version 7).
    RequestId
);
number_id!(
    /// One choice of one request, as the pipeline knows it. Drawn by the coordinator from a counter
    /// and never used again in its lifetime; the pair `(RequestId, choice)` stays at the coordinator.
    SequenceId(u64)
);
number_id!(
    /// A micro-batch in flight; strictly increasing within an epoch, so it is also the issue order.
    MicroBatchId(u64)
);
number_id!(
    /// A pipeline: one chain of stages that serves one model.
    PipelineId(u32)
);
number_id!(
    /// The generation of a pipeline. Anything that carries an older one is dropped.
    Epoch(u64)
);
number_id!(
    /// A KV block: the same index on every stage of a pipeline.
    BlockId(u32)
);
number_id!(
    /// Position of a stage in its pipeline, 0 first.
    StageIndex(u16)
);
