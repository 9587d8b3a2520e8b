//! Enrolment: a token and a public key against a certificate, over `millrace-join/1`.
//!
//! The joiner authenticates the coordinator by the CA fingerprint in its [`JoinToken`], sends one
//! bounded request, and gets a certificate for a name that the coordinator chose. The coordinator's
//! half is [`JoinDesk`]; [`TokenStore`] keeps the records. The private key never leaves the node.
//! An interrupted exchange can be repeated with the same key until the token expires.

mod desk;
mod store;
mod token;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::join::{JoinRequest, JoinResponse};
use millrace_shared::wire::{COORDINATOR_NAME, MAX_JOIN_BYTES, WIRE_VERSION};

pub use desk::JoinDesk;
pub use store::{SpendError, TokenStore};
pub use token::{JoinToken, TokenError};

use crate::endpoint::resolve;
use crate::error::within;
use crate::identity::fingerprint;
use crate::{
    Connection, Endpoint, Identity, MessageReceiver, MessageSender, NetError, NodeKey, PeerName,
    timing, tls,
};

/// A node that has joined.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The name it has from now on.
    pub node_id: NodeId,
    /// Its identity; save it.
    pub identity: Identity,
    /// `host:port` of the coordinator's cluster endpoint.
    pub cluster_addr: String,
}

/// Enrols with the coordinator that the token names.
///
/// # Errors
/// A status that says what was refused and what to do; [`ErrorCode::Unavailable`] if the
/// coordinator cannot be reached.
pub async fn request_join(token: &JoinToken, key: &NodeKey) -> Result<Joined, Status> {
    let exchange = Box::pin(async {
        let tls = tls::join_client(token.ca_sha256)?;
        let remote = resolve(&token.addr).await?;
        let addr = remote.first().copied().ok_or(NetError::Ended("no address"))?;
        let endpoint = Endpoint::client(addr)?;
        let connection = endpoint.connect(addr, COORDINATOR_NAME, &tls, timing::HANDSHAKE).await?;
        let response = exchange(&connection, token, key).await;
        endpoint.close("joined");
        endpoint.drain().await;
        response
    });
    let response = within(timing::JOIN, "joining", exchange).await.map_err(|e| e.to_status())?;
    match response {
        JoinResponse::Refused(status) => Err(status),
        JoinResponse::Accepted { node_id, certificate_der, ca_der, cluster_port } => {
            let identity = accept(token, key, node_id, certificate_der, ca_der)
                .map_err(|e| Status::new(ErrorCode::FailedPrecondition, e.to_string()))?;
            let host = token.addr.rsplit_once(':').map_or(token.addr.as_str(), |(host, _)| host);
            Ok(Joined { node_id, identity, cluster_addr: format!("{host}:{cluster_port}") })
        }
    }
}

async fn exchange(
    connection: &Connection,
    token: &JoinToken,
    key: &NodeKey,
) -> Result<JoinResponse, NetError> {
    let (send, recv) = connection.open_bare().await?;
    let mut out = MessageSender::new(send);
    let request = JoinRequest {
        wire_version: WIRE_VERSION,
        secret: token.secret_text(),
        csr_der: key.csr_der().to_vec(),
    };
    out.send(&request).await?;
    out.finish();
    MessageReceiver::new(recv).recv_one(MAX_JOIN_BYTES).await
}

/// Checks what the coordinator signed: CA, name and key.
fn accept(
    token: &JoinToken,
    key: &NodeKey,
    node_id: NodeId,
    certificate_der: Vec<u8>,
    ca_der: Vec<u8>,
) -> Result<Identity, NetError> {
    if fingerprint(&ca_der) != token.ca_sha256 {
        return Err(NetError::Identity("the coordinator answered with another CA".into()));
    }
    let identity = key.certified(certificate_der, ca_der)?;
    if identity.name()? != PeerName::Node(node_id) {
        return Err(NetError::Identity("the signed certificate carries another name".into()));
    }
    Ok(identity)
}
