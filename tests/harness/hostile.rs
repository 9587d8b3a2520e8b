//! Peers that are not what they should be: members made by hand, and one without a certificate.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use millrace_net::{
    ClusterCa, Connection, Endpoint, Identity, MessageReceiver, MessageSender, NetError, tls,
};
use millrace_shared::id::NodeId;
use millrace_shared::wire::control::{CoordinatorMessage, Hello, NodeMessage};
use millrace_shared::wire::rpc::CallHeader;
use millrace_shared::wire::{ALPN_CLUSTER, COORDINATOR_NAME, MAX_CONTROL_BYTES, Plane, codec};

use crate::DEADLINE;

/// A name that no other node has.
pub fn new_id() -> NodeId {
    NodeId(uuid::Uuid::now_v7())
}

/// A connection as the holder of `identity`; the endpoint must outlive it.
///
/// # Errors
/// If the peer refuses during the handshake.
pub async fn connect(
    identity: &Identity,
    to: SocketAddr,
    name: &str,
) -> Result<(Endpoint, Connection), NetError> {
    let endpoint = Endpoint::client(to)?;
    let tls = tls::cluster_client(identity)?;
    let connection = endpoint.connect(to, name, &tls, DEADLINE).await?;
    Ok((endpoint, connection))
}

/// A hello of this build, to be changed by the caller.
pub fn hello(numerics_revision: &str) -> Hello {
    Hello {
        torch: None,
        wire_version: millrace_shared::wire::WIRE_VERSION,
        numerics_revision: numerics_revision.to_owned(),
        version: "0.0.0-by-hand".to_owned(),
        name: "by-hand".to_owned(),
        advertise: "127.0.0.1:9".to_owned(),
        host: "by-hand".to_owned(),
        engine: "mock".to_owned(),
        threads: 1,
        memory_bytes: 1 << 30,
        hardware: "none".to_owned(),
        drains: true,
    }
}

/// Introduces a new, properly certified node; the coordinator's first answer.
pub async fn introduce(
    ca: &ClusterCa,
    coordinator: SocketAddr,
    hello: Hello,
) -> CoordinatorMessage {
    let identity = ca.issue_node(new_id()).expect("a certificate");
    let (endpoint, connection) =
        connect(&identity, coordinator, COORDINATOR_NAME).await.expect("a member may connect");
    let (send, recv) = connection.open_stream(&Plane::Control).await.expect("a stream");
    let (mut out, mut messages) = (MessageSender::new(send), MessageReceiver::new(recv));
    out.send(&NodeMessage::Hello(Box::new(hello))).await.expect("sent");
    let answer = messages.recv_one(MAX_CONTROL_BYTES).await.expect("an answer to the hello");
    out.send(&NodeMessage::Leaving).await.ok();
    endpoint.close("done");
    endpoint.drain().await;
    answer
}

/// Begins a call with these bytes, whatever they are, on a stream of its own.
///
/// # Errors
/// If the connection is gone.
pub async fn begin_call(
    connection: &Connection,
    bytes: &[u8],
) -> Result<(MessageSender, MessageReceiver), NetError> {
    let (send, recv) = connection.open_bare().await?;
    let mut out = MessageSender::new(send);
    out.send_bytes(bytes.to_vec().into()).await?;
    Ok((out, MessageReceiver::new(recv)))
}

/// The header of a call with this key, as it is sent.
pub fn call_header(key: &str) -> Vec<u8> {
    let metadata = vec![("authorization".to_owned(), format!("Bearer {key}"))];
    codec::encode_frame(&CallHeader { metadata, deadline_ms: None })
}

/// Speaks the members' protocol but shows no certificate; how that ended.
pub async fn without_certificate(ca_der: &[u8], to: SocketAddr) -> String {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca_der.to_vec().into()).expect("the CA certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_CLUSTER.to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).expect("a cipher suite");
    let endpoint = quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let endpoint = endpoint.expect("a socket");
    let config = quinn::ClientConfig::new(Arc::new(config));
    // TLS 1.3 lets the client finish first; the refusal follows.
    match endpoint.connect_with(config, to, COORDINATOR_NAME).expect("a name").await {
        Ok(connection) => connection.closed().await.to_string(),
        Err(e) => e.to_string(),
    }
}
