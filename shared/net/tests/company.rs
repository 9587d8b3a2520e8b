//! A company's certificate beside the cluster's own; certificates that change in use; nodes that
//! are kept out.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::*;
use millrace_net::certs::{CertFiles, LiveIdentity};
use millrace_net::client::{Client, ClientConfig};
use millrace_net::revoked::Revocations;
use millrace_net::{ClusterCa, Endpoint, Identity, PeerName, tls};
use millrace_shared::wire::COORDINATOR_NAME;

/// The company's CA, and a certificate of it in `c.pem` and `c.key`.
fn company(dir: &Path) -> ClusterCa {
    let ca = ClusterCa::create().unwrap();
    ca.issue_web(&["models.example".to_owned()]).unwrap().save(dir, "c").unwrap();
    ca
}

#[tokio::test]
async fn clients_that_know_the_company_or_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let company = company(dir.path());
    let files = CertFiles::load(&dir.path().join("c.pem"), &dir.path().join("c.key")).unwrap();
    let cluster = cluster();
    let own = LiveIdentity::new(&cluster.coordinator).unwrap();
    let tls = tls::public_server_of(&own, Some(&files)).unwrap();
    let endpoint = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let config = |ca_pem: String, server_name: Option<&str>| ClientConfig {
        quic: endpoint.local_addr().unwrap().to_string(),
        http: String::new(),
        api_key: "mlr-test".into(),
        ca_pem,
        server_name: server_name.map(str::to_owned),
    };
    let connect = async |config: ClientConfig| {
        let accepting = async {
            let incoming = endpoint.accept().await.unwrap();
            incoming.handshake(DEADLINE).await
        };
        soon(async { tokio::join!(Client::connect(&config), accepting) }).await.0
    };
    assert!(connect(config(cluster.ca.ca_pem(), None)).await.is_ok());
    assert!(connect(config(company.ca_pem(), Some("models.example"))).await.is_ok());
    assert!(connect(config(company.ca_pem(), Some("other.example"))).await.is_err());
    assert!(connect(config(company.ca_pem(), None)).await.is_err(), "it is not the coordinator's");
    let stranger = ClusterCa::create().unwrap().ca_pem();
    assert!(connect(config(stranger.clone(), Some("models.example"))).await.is_err());

    // The files change; a pair that does not belong together is not used.
    assert!(!files.reload(false).unwrap());
    let key = std::fs::read(dir.path().join("c.key")).unwrap();
    let next = self::company(dir.path());
    assert!(files.reload(true).unwrap());
    assert!(connect(config(company.ca_pem(), Some("models.example"))).await.is_err());
    assert!(connect(config(next.ca_pem(), Some("models.example"))).await.is_ok());
    std::fs::write(dir.path().join("c.key"), key).unwrap();
    let message = files.reload(true).unwrap_err().to_string();
    assert!(message.contains("c.key"), "{message}");
    assert!(connect(config(next.ca_pem(), Some("models.example"))).await.is_ok());
}

#[tokio::test]
async fn a_certificate_is_renewed_under_its_endpoint() {
    let cluster = cluster();
    let live = LiveIdentity::new(&cluster.coordinator).unwrap();
    let tls = tls::cluster_server_of(&live, None).unwrap();
    let server = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let node = cluster.ca.issue_node(node_id()).unwrap();
    let (client, _) = dial(&server, &node, COORDINATOR_NAME).await;
    assert!(client.is_ok());
    live.replace(&cluster.ca.issue_coordinator().unwrap()).unwrap();
    let (client, _) = dial(&server, &node, COORDINATOR_NAME).await;
    assert_eq!(client.unwrap().peer_name().unwrap(), PeerName::Coordinator);
    // Another member's name shows at once.
    let other = node_id();
    live.replace(&cluster.ca.issue_node(other).unwrap()).unwrap();
    assert!(dial(&server, &node, COORDINATOR_NAME).await.0.is_err());
    let foreign = ClusterCa::create().unwrap().issue_coordinator().unwrap();
    assert!(live.replace(&foreign).is_err(), "another CA is no renewal");
}

#[tokio::test]
async fn who_is_kept_out_gets_no_connection() {
    let dir = tempfile::tempdir().unwrap();
    let revoked = Arc::new(Revocations::open(dir.path()).unwrap());
    let cluster = cluster();
    let live = LiveIdentity::new(&cluster.coordinator).unwrap();
    let tls = tls::cluster_server_of(&live, Some(revoked.clone())).unwrap();
    let server = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let (bad, good) = (node_id(), node_id());
    let [bad_papers, good_papers] = [bad, good].map(|id| cluster.ca.issue_node(id).unwrap());
    assert!(dial(&server, &bad_papers, COORDINATOR_NAME).await.1.is_ok());
    revoked.revoke(bad, "bad", 7).unwrap();
    let refused = |papers: Identity| {
        let server = server.clone();
        async move { dial(&server, &papers, COORDINATOR_NAME).await }
    };
    let (client, accepted) = refused(bad_papers).await;
    assert!(accepted.is_err());
    if let Ok(client) = client {
        let end = soon(client.closed()).await;
        assert!(end.is_revocation(), "{end}");
    }
    assert!(refused(good_papers).await.1.is_ok());
    // HTTPS's certificate makes nobody a member.
    let web = cluster.ca.issue_web(&["localhost".to_owned()]).unwrap();
    assert!(refused(web).await.1.is_err());
    assert!(cluster.ca.issue_web(&[COORDINATOR_NAME.to_owned()]).is_err());
}
