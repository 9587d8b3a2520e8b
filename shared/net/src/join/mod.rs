//! Enrolment: a token and a public key against a certificate, over `millrace-join/3`.
//!
//! The joiner authenticates the coordinator by the CA fingerprint in its [`JoinToken`], sends one
//! bounded request, and gets a certificate for a name that the coordinator chose. The coordinator's
//! half is [`JoinDesk`]; [`TokenStore`] keeps the records. The private key never leaves the node.
//! An interrupted exchange can be repeated with the same key until the token expires. A member
//! renews its certificate the same way, with its present one instead of a token.

mod desk;
mod store;
mod token;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::join::{JoinProof, JoinRequest, JoinResponse};
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
    let proof = JoinProof::Token(token.secret_text());
    ask(&token.addr, token.ca_sha256, proof, key).await
}

/// Renews a member's certificate, for the same key and name. `addr`: `host:port` of the
/// coordinator's public endpoint.
///
/// # Errors
/// As [`request_join`]; [`ErrorCode::PermissionDenied`] if the node was revoked.
pub async fn request_renewal(addr: &str, identity: &Identity) -> Result<Joined, Status> {
    let unusable = |e: NetError| Status::new(ErrorCode::FailedPrecondition, e.to_string());
    let key = NodeKey::of_identity(identity).map_err(unusable)?;
    let proof = JoinProof::Renewal(identity.cert_der.clone());
    let joined = ask(addr, fingerprint(&identity.ca_der), proof, &key).await?;
    if joined.identity.name().map_err(unusable)? != identity.name().map_err(unusable)? {
        let message = "the coordinator answered with another name".to_owned();
        return Err(unusable(NetError::Identity(message)));
    }
    Ok(joined)
}

/// Enrols a further node of the machine whose first node `identity` is: the same key, a name of its own
/// that follows from the first one's and `seat`, which is the same whenever it is asked for again.
///
/// # Errors
/// As [`request_renewal`].
pub async fn request_seat(addr: &str, identity: &Identity, seat: u16) -> Result<Joined, Status> {
    let unusable = |e: NetError| Status::new(ErrorCode::FailedPrecondition, e.to_string());
    let key = NodeKey::of_identity(identity).map_err(unusable)?;
    let proof = JoinProof::Seat(identity.cert_der.clone(), seat);
    ask(addr, fingerprint(&identity.ca_der), proof, &key).await
}

async fn ask(
    addr: &str,
    ca_sha256: [u8; 32],
    proof: JoinProof,
    key: &NodeKey,
) -> Result<Joined, Status> {
    let exchange = Box::pin(async {
        let tls = tls::join_client(ca_sha256)?;
        let remote = resolve(addr).await?;
        let remote = remote.first().copied().ok_or(NetError::Ended("no address"))?;
        let endpoint = Endpoint::client(remote)?;
        let connection =
            endpoint.connect(remote, COORDINATOR_NAME, &tls, timing::HANDSHAKE).await?;
        let response = exchange(&connection, proof, key).await;
        endpoint.close("joined");
        endpoint.drain().await;
        response
    });
    let response = within(timing::JOIN, "joining", exchange).await.map_err(|e| e.to_status())?;
    match response {
        JoinResponse::Refused(status) => Err(status),
        JoinResponse::Accepted { node_id, certificate_der, ca_der, cluster_port } => {
            let identity = accept(ca_sha256, key, node_id, certificate_der, ca_der)
                .map_err(|e| Status::new(ErrorCode::FailedPrecondition, e.to_string()))?;
            let host = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
            Ok(Joined { node_id, identity, cluster_addr: format!("{host}:{cluster_port}") })
        }
    }
}

async fn exchange(
    connection: &Connection,
    proof: JoinProof,
    key: &NodeKey,
) -> Result<JoinResponse, NetError> {
    let (send, recv) = connection.open_bare().await?;
    let mut out = MessageSender::new(send);
    let request =
        JoinRequest { wire_version: WIRE_VERSION, proof, csr_der: key.csr_der().to_vec() };
    out.send(&request).await?;
    out.finish();
    MessageReceiver::new(recv).recv_one(MAX_JOIN_BYTES).await
}

/// Checks what the coordinator signed: CA, name and key.
fn accept(
    ca_sha256: [u8; 32],
    key: &NodeKey,
    node_id: NodeId,
    certificate_der: Vec<u8>,
    ca_der: Vec<u8>,
) -> Result<Identity, NetError> {
    if fingerprint(&ca_der) != ca_sha256 {
        return Err(NetError::Identity("the coordinator answered with another CA".into()));
    }
    let identity = key.certified(certificate_der, ca_der)?;
    if identity.name()? != PeerName::Node(node_id) {
        return Err(NetError::Identity("the signed certificate carries another name".into()));
    }
    Ok(identity)
}
