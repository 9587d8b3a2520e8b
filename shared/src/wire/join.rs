//! The one exchange of `millrace-join/3`: a token, or a certificate that is to be renewed, and a
//! public key against a certificate.

use serde::{Deserialize, Serialize};

use crate::error::Status;
use crate::id::NodeId;

/// Most further nodes that a machine may have: one for each of 64 GPUs, and 16 on its processor.
pub const MAX_SEAT: u16 = 80;

/// What a joining node sends. Of the certificate request only the key and its proof are used.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// [`super::WIRE_VERSION`] of the node.
    pub wire_version: u16,
    /// What speaks for it.
    pub proof: JoinProof,
    /// PKCS#10 certificate request, DER.
    pub csr_der: Vec<u8>,
}

/// Why a node may have a certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum JoinProof {
    /// The secret part of a join token.
    Token(String),
    /// It is a member already: its certificate, DER, for the same key. Who only repeats such a
    /// request gains nothing: the answer is of use to the holder of the key alone.
    Renewal(Vec<u8>),
    /// It is a further node of a member's machine, with the same key: the certificate of the machine's
    /// first node, DER, and the number of the further one, 1 to [`MAX_SEAT`].
    Seat(Vec<u8>, u16),
}

/// What the coordinator answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum JoinResponse {
    /// Welcome.
    Accepted {
        /// The name the node has from now on.
        node_id: NodeId,
        /// Its certificate, DER.
        certificate_der: Vec<u8>,
        /// The cluster's CA certificate, DER.
        ca_der: Vec<u8>,
        /// Port of the coordinator's cluster endpoint; the host is the one that was dialled.
        cluster_port: u16,
    },
    /// No, and why.
    Refused(Status),
}
