//! Joining: the happy path, and every way in which it is refused.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::*;
use millrace_net::join::{JoinDesk, JoinToken, Joined, TokenStore, request_join};
use millrace_net::{Alpn, ClusterCa, Endpoint, NodeKey, PeerName, tls};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::COORDINATOR_NAME;

const NOW: u64 = 1_800_000_000;
const CLUSTER_PORT: u16 = 4711;

struct Coordinator {
    ca: Arc<ClusterCa>,
    tokens: Arc<TokenStore>,
    desk: JoinDesk,
    endpoint: Endpoint,
    addr: SocketAddr,
    _dir: tempfile::TempDir,
}

fn coordinator() -> Coordinator {
    let dir = tempfile::tempdir().unwrap();
    let ca = Arc::new(ClusterCa::create().unwrap());
    let tokens = Arc::new(TokenStore::open(dir.path()).unwrap());
    let tls = tls::public_server(&ca.issue_coordinator().unwrap()).unwrap();
    let endpoint = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let desk = JoinDesk::new(ca.clone(), tokens.clone(), CLUSTER_PORT);
    Coordinator { ca, tokens, desk, endpoint, addr, _dir: dir }
}

impl Coordinator {
    fn token(&self) -> JoinToken {
        let addr = self.addr.to_string();
        self.tokens.create(&addr, self.ca.fingerprint(), 1, NOW + 60).unwrap()
    }

    /// Serves connections until the joiner has its answer; also what the desk admitted.
    async fn serve(&self, token: &JoinToken, key: &NodeKey) -> Outcome {
        let joining = Box::pin(request_join(token, key));
        let serving = async {
            let mut admitted = Vec::new();
            while let Some(incoming) = self.endpoint.accept().await {
                if let Ok(connection) = incoming.handshake(DEADLINE).await {
                    assert_eq!(connection.alpn(), Alpn::Join);
                    assert_eq!(connection.peer(), None);
                    admitted.push(self.desk.serve(&connection, NOW).await);
                }
            }
            admitted
        };
        soon(async {
            tokio::select! {
                joined = joining => joined,
                _ = serving => panic!("the endpoint closed"),
            }
        })
        .await
    }
}

type Outcome = Result<Joined, Status>;

#[tokio::test]
async fn a_node_joins() {
    let coordinator = coordinator();
    let token: JoinToken = coordinator.token().to_string().parse().unwrap();
    let key = NodeKey::generate().unwrap();
    let joined = coordinator.serve(&token, &key).await.unwrap();
    assert_eq!(joined.identity.name().unwrap(), PeerName::Node(joined.node_id));
    assert_eq!(joined.cluster_addr, format!("127.0.0.1:{CLUSTER_PORT}"));
    // The certificate opens the cluster endpoint.
    let (server, _) = cluster_endpoint(&coordinator.ca.issue_coordinator().unwrap());
    let (_client, accepted) = dial(&server, &joined.identity, COORDINATOR_NAME).await;
    assert_eq!(accepted.unwrap().peer(), Some(PeerName::Node(joined.node_id)));
    // Repeating with the same key gives the same name; another key is refused.
    let again = coordinator.serve(&token, &key).await.unwrap();
    assert_eq!(again.node_id, joined.node_id);
    let other = NodeKey::generate().unwrap();
    let refused = coordinator.serve(&token, &other).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    assert!(refused.message.contains("has been used"), "{refused}");
}

#[tokio::test]
async fn expired_and_unknown_tokens() {
    let coordinator = coordinator();
    let key = NodeKey::generate().unwrap();
    let addr = coordinator.addr.to_string();
    let old = coordinator.tokens.create(&addr, coordinator.ca.fingerprint(), 1, NOW).unwrap();
    let refused = coordinator.serve(&old, &key).await.unwrap_err();
    assert!(refused.message.contains("expired"), "{refused}");
    let guessed = JoinToken { secret: [7; 32], ..coordinator.token() };
    let refused = coordinator.serve(&guessed, &key).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    assert!(refused.message.contains("unknown join token"), "{refused}");
}

/// Whoever answers must belong to the CA in the token; no secret is sent to anybody else.
#[tokio::test]
async fn wrong_fingerprint() {
    let coordinator = coordinator();
    let key = NodeKey::generate().unwrap();
    let token = JoinToken { ca_sha256: [0; 32], ..coordinator.token() };
    let refused = coordinator.serve(&token, &key).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.message.contains("another cluster"), "{refused}");
    // The use is still there.
    let token = JoinToken { ca_sha256: coordinator.ca.fingerprint(), ..token };
    coordinator.serve(&token, &key).await.unwrap();
}

/// A member's certificate, with the right CA beside it, is not the coordinator's.
#[tokio::test]
async fn a_node_cannot_take_tokens() {
    let coordinator = coordinator();
    let node = coordinator.ca.issue_node(NodeId(uuid::Uuid::now_v7())).unwrap();
    let tls = tls::public_server(&node).unwrap();
    let impostor = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let addr = impostor.local_addr().unwrap().to_string();
    let token = JoinToken { addr, ..coordinator.token() };
    let key = NodeKey::generate().unwrap();
    let listening = async {
        while let Some(incoming) = impostor.accept().await {
            assert!(incoming.handshake(DEADLINE).await.is_err());
        }
    };
    let refused = soon(async {
        tokio::select! {
            joined = request_join(&token, &key) => joined.unwrap_err(),
            () = listening => panic!("the endpoint closed"),
        }
    })
    .await;
    assert_eq!(refused.code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn nobody_answers() {
    let socket = std::net::UdpSocket::bind(loopback()).unwrap();
    let addr = socket.local_addr().unwrap();
    drop(socket);
    let token =
        JoinToken { addr: addr.to_string(), ca_sha256: [0; 32], secret: [0; 32], expires: NOW };
    let key = NodeKey::generate().unwrap();
    let refused = soon(request_join(&token, &key)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.message.contains(&addr.to_string()), "{refused}");
}
