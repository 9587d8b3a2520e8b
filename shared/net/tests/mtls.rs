//! Who may speak to whom: certificates, names, protocols.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use millrace_net::identity::ProvenKey;
use millrace_net::{Alpn, ClusterCa, Endpoint, Identity, NetError, NodeKey, PeerName, tls};
use millrace_shared::wire::{ALPN_CLUSTER, COORDINATOR_NAME, Plane, node_name};

#[tokio::test]
async fn members_know_each_other_by_name() {
    let cluster = cluster();
    let (server, _) = cluster_endpoint(&cluster.coordinator);
    let id = node_id();
    let node = cluster.ca.issue_node(id).unwrap();
    let (client, accepted) = dial(&server, &node, COORDINATOR_NAME).await;
    let (client, accepted) = (client.unwrap(), accepted.unwrap());
    assert_eq!(client.peer_name().unwrap(), PeerName::Coordinator);
    assert_eq!(accepted.peer_name().unwrap(), PeerName::Node(id));
    assert_eq!((client.alpn(), accepted.alpn()), (Alpn::Cluster, Alpn::Cluster));
}

#[tokio::test]
async fn nodes_dial_nodes() {
    let cluster = cluster();
    let (a, b) = (node_id(), node_id());
    let (server, _) = cluster_endpoint(&cluster.ca.issue_node(a).unwrap());
    let node = cluster.ca.issue_node(b).unwrap();
    let (client, accepted) = dial(&server, &node, &node_name(a)).await;
    assert_eq!(client.unwrap().peer(), Some(PeerName::Node(a)));
    assert_eq!(accepted.unwrap().peer(), Some(PeerName::Node(b)));
}

/// Speaks the members' protocol, but shows no certificate.
fn anonymous(ca_der: &[u8]) -> quinn::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca_der.to_vec().into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_CLUSTER.to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    quinn::ClientConfig::new(Arc::new(config))
}

/// A peer that shows no certificate gets no connection, and no byte of it is read.
#[tokio::test]
async fn without_a_certificate() {
    let cluster = cluster();
    let (server, addr) = cluster_endpoint(&cluster.coordinator);
    let (connected, accepted) = soon(async {
        tokio::join!(
            async {
                let client = quinn::Endpoint::client(loopback()).unwrap();
                let config = anonymous(cluster.ca.ca_der());
                let connecting = client.connect_with(config, addr, COORDINATOR_NAME).unwrap();
                // TLS 1.3 lets the client finish first; the refusal follows.
                match connecting.await {
                    Ok(connection) => Err::<(), _>(connection.closed().await),
                    Err(e) => Err(e),
                }
            },
            async { server.accept().await.unwrap().handshake(DEADLINE).await }
        )
    })
    .await;
    assert!(connected.is_err());
    assert!(matches!(accepted, Err(NetError::Handshake { .. })), "{accepted:?}");
}

#[tokio::test]
async fn a_stranger_is_refused() {
    let cluster = cluster();
    let (server, _) = cluster_endpoint(&cluster.coordinator);
    let strangers = ClusterCa::create().unwrap();
    // It has learnt our CA certificate, which is no secret, but its own is signed by another.
    let stranger = Identity {
        ca_der: cluster.ca.ca_der().to_vec(),
        ..strangers.issue_node(node_id()).unwrap()
    };
    let (client, accepted) = dial(&server, &stranger, COORDINATOR_NAME).await;
    assert!(matches!(accepted, Err(NetError::Handshake { .. })), "{accepted:?}");
    if let Ok(connection) = client {
        let lost = soon(connection.closed()).await;
        assert!(matches!(lost, NetError::Lost(_)), "{lost}");
    }
}

#[tokio::test]
async fn a_strangers_server_is_refused() {
    let cluster = cluster();
    let strangers = ClusterCa::create().unwrap();
    let (server, _) = cluster_endpoint(&strangers.issue_coordinator().unwrap());
    let node = cluster.ca.issue_node(node_id()).unwrap();
    let (client, _) = dial(&server, &node, COORDINATOR_NAME).await;
    let message = client.unwrap_err().to_string();
    assert!(message.contains("another cluster"), "{message}");
}

#[tokio::test]
async fn a_node_cannot_pose_as_the_coordinator() {
    let cluster = cluster();
    let (server, _) = cluster_endpoint(&cluster.ca.issue_node(node_id()).unwrap());
    let node = cluster.ca.issue_node(node_id()).unwrap();
    let (client, _) = dial(&server, &node, COORDINATOR_NAME).await;
    assert!(matches!(client, Err(NetError::Connect { .. })), "{client:?}");
}

/// The name that a certificate request asks for is ignored; only its key is used.
#[tokio::test]
async fn the_coordinator_chooses_the_name() {
    let cluster = cluster();
    let pair = rcgen::KeyPair::generate().unwrap();
    let asked = rcgen::CertificateParams::new(vec![COORDINATOR_NAME.to_owned()]).unwrap();
    let csr = asked.serialize_request(&pair).unwrap();
    let key = ProvenKey::from_csr(csr.der()).unwrap();
    let id = node_id();
    let cert = cluster.ca.sign_node(&key, id).unwrap();
    assert_eq!(PeerName::of_certificate(&cert).unwrap(), PeerName::Node(id));
}

/// No damaged request is taken for one of another key: a request proves possession of its own.
#[test]
fn certificate_requests_need_proof_of_possession() {
    let key = NodeKey::generate().unwrap();
    let proven = ProvenKey::from_csr(key.csr_der()).unwrap().spki_sha256();
    let mut accepted = 0;
    for i in 0..key.csr_der().len() {
        let mut forged = key.csr_der().to_vec();
        forged[i] ^= 1;
        if let Ok(forged) = ProvenKey::from_csr(&forged) {
            assert_eq!(forged.spki_sha256(), proven, "byte {i}");
            accepted += 1;
        }
    }
    assert!(accepted < 10, "only encoding details around the signature may vary: {accepted}");
    assert!(ProvenKey::from_csr(b"").is_err());
}

#[test]
fn identities_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    let ca = ClusterCa::create().unwrap();
    ca.save(&dir).unwrap();
    let again = ClusterCa::load(&dir).unwrap();
    assert_eq!(again.fingerprint(), ca.fingerprint());
    let id = node_id();
    let node = again.issue_node(id).unwrap();
    node.save(&dir, "node").unwrap();
    let loaded = Identity::load(&dir, "node").unwrap();
    assert_eq!(loaded, node);
    assert_eq!(loaded.name().unwrap(), PeerName::Node(id));
    let key = NodeKey::generate().unwrap();
    key.save(&dir, "joining").unwrap();
    assert!(NodeKey::load(&dir, "joining").is_ok());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |p: &str| std::fs::metadata(dir.join(p)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("."), mode("ca.key"), mode("node.key")), (0o700, 0o600, 0o600));
    }
    // A key that is not the certificate's is noticed.
    std::fs::copy(dir.join("node.key"), dir.join("ca.key")).unwrap();
    assert!(ClusterCa::load(&dir).is_err());
    assert!(Identity::load(&dir, "nobody").unwrap_err().to_string().contains("nobody.pem"));
}

/// A reloaded CA signs what members of the first one accept.
#[tokio::test]
async fn a_reloaded_ca_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let first = cluster();
    first.ca.save(dir.path()).unwrap();
    let again = ClusterCa::load(dir.path()).unwrap();
    let (server, _) = cluster_endpoint(&first.coordinator);
    let node = again.issue_node(node_id()).unwrap();
    let (client, accepted) = dial(&server, &node, COORDINATOR_NAME).await;
    let (client, accepted) = (client.unwrap(), accepted.unwrap());
    let ((_send, _recv), (plane, ..)) = soon(async {
        tokio::try_join!(client.open_stream(&Plane::Control), accepted.accept_stream()).unwrap()
    })
    .await;
    assert_eq!(plane, Plane::Control);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let (_holder, addr) = cluster_endpoint(&cluster().coordinator);
    let refused = Endpoint::bind(addr, None).unwrap_err();
    assert!(matches!(refused, NetError::InUse { .. }));
    assert!(refused.to_string().contains(&addr.to_string()), "{refused}");
    let next = Endpoint::bind_next_free(addr, 50, None).unwrap();
    assert_ne!(next.local_addr().unwrap().port(), addr.port());
    assert!(Endpoint::bind_next_free(addr, 1, None).is_err());
}

#[tokio::test]
async fn nobody_there_is_an_error_in_time() {
    let cluster = cluster();
    let (silent, addr) = {
        // A socket that never answers.
        let socket = std::net::UdpSocket::bind(loopback()).unwrap();
        let addr = socket.local_addr().unwrap();
        (socket, addr)
    };
    let client = Endpoint::client(addr).unwrap();
    let tls = tls::cluster_client(&cluster.coordinator).unwrap();
    let deadline = std::time::Duration::from_millis(200);
    let error = soon(client.connect(addr, COORDINATOR_NAME, &tls, deadline)).await.unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
    drop(silent);
}
