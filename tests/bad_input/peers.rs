//! Who may become a member: papers, join tokens, versions.

use harness::hostile;
use harness::processes::{self, command, fails_with};
use millrace_engine::Engine as _;
use millrace_engine::mock::{MockConfig, MockEngine};
use millrace_net::join::{JoinToken, request_join};
use millrace_net::{ClusterCa, Identity, NodeKey};
use millrace_shared::error::ErrorCode;
use millrace_shared::wire::control::CoordinatorMessage;
use millrace_shared::wire::{COORDINATOR_NAME, WIRE_VERSION};

use crate::cluster::under_attack;

#[test]
fn peers_without_the_right_papers() {
    under_attack(async |cluster| {
        let (ca, to) = (cluster.ca(), cluster.coordinator.cluster);
        let end = hostile::without_certificate(ca.ca_der(), to).await;
        assert!(end.to_lowercase().contains("certificate"), "{end}");
        cluster.is_unharmed("no certificate").await;

        // It knows the cluster's CA certificate, which is no secret; its own is another's.
        let strangers = ClusterCa::create().unwrap();
        let stranger = strangers.issue_node(hostile::new_id()).unwrap();
        let stranger = Identity { ca_der: ca.ca_der().to_vec(), ..stranger };
        if let Ok((_endpoint, connection)) = hostile::connect(&stranger, to, COORDINATOR_NAME).await
        {
            let end = harness::soon(connection.closed()).await.to_string();
            assert!(!end.is_empty());
        }
        // Both refusals are in the log.
        cluster.coordinator.process.wait_log("two refusals", |log| {
            (log.matches("refused on the cluster endpoint").count() == 2).then_some(())
        });
        cluster.is_unharmed("a stranger").await;
    });
}

#[test]
fn join_tokens() {
    under_attack(async |cluster| {
        let home = cluster.coordinator.root.clone();
        let mut create = command("millrace-coordinator", &home);
        create.args(["token", "create", "--dir", "coordinator"]);
        let output = processes::run(create);
        let text = String::from_utf8(output.stdout).unwrap();
        let token: JoinToken = text.trim().parse().unwrap();
        let first = NodeKey::generate().unwrap();
        let joined = request_join(&token, &first).await.unwrap();
        // The same key may ask again: its first answer may have been lost.
        assert_eq!(request_join(&token, &first).await.unwrap().node_id, joined.node_id);
        let second = NodeKey::generate().unwrap();
        let status = request_join(&token, &second).await.unwrap_err();
        assert_eq!(status.code, ErrorCode::PermissionDenied, "{status}");
        assert!(status.message.contains("has been used"), "{status}");
        let mut run = command("millrace-node", &home);
        run.args(["run", "--dir", "late", "--listen", "127.0.0.1:0", "--token", text.trim()]);
        fails_with(&processes::run(run), &["cannot join the cluster", "has been used"]);
        let mut run = command("millrace-node", &home);
        run.args(["run", "--dir", "later", "--listen", "127.0.0.1:0"]);
        fails_with(&processes::run(run), &["not a member yet", "--token"]);
        cluster.is_unharmed("a used token").await;
    });
}

#[test]
fn versions() {
    under_attack(async |cluster| {
        let (ca, to) = (cluster.ca(), cluster.coordinator.cluster);
        let numerics = MockEngine::new(MockConfig::default()).numerics_revision();
        let refusal = async |hello| match hostile::introduce(&ca, to, hello).await {
            CoordinatorMessage::Refused { message } => message,
            other => panic!("not refused: {other:?}"),
        };
        let mut other_wire = hostile::hello(&numerics);
        other_wire.wire_version = WIRE_VERSION + 1;
        let message = refusal(other_wire).await;
        assert!(message.contains(&format!("wire version {}", WIRE_VERSION + 1)), "{message}");
        cluster.is_unharmed("another wire version").await;

        let message = refusal(hostile::hello("cpu/999")).await;
        assert!(message.contains("'cpu/999'") && message.contains(&numerics), "{message}");
        cluster.is_unharmed("other numerics").await;

        let epoch = cluster.epoch().await;
        let answer = hostile::introduce(&ca, to, hostile::hello(&numerics)).await;
        assert!(matches!(answer, CoordinatorMessage::Welcome { .. }), "{answer:?}");
        cluster.is_unharmed("another build").await;
        assert_eq!(cluster.epoch().await, epoch, "a guest changes nothing");
    });
}
