//! The one exchange of `millrace-join/1`: a token and a public key against a certificate.

use serde::{Deserialize, Serialize};

use crate::error::Status;
use crate::id::NodeId;

/// What a joining node sends. Of the certificate request only the key and its proof are used.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// [`super::WIRE_VERSION`] of the node.
    pub wire_version: u16,
    /// The secret part of the join token.
    pub secret: String,
    /// PKCS#10 certificate request, DER.
    pub csr_der: Vec<u8>,
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
