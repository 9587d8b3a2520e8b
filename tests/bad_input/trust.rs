//! Trust that ends or was never there: revoked, expired and posing members, replays, lies; keys that
//! are guessed, limited and revoked; what logs must not hold.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use harness::processes::{Coordinator, Process, command, fails_with, run};
use harness::{alone, ask, hostile, http, model_arg, wait_for};
use millrace_engine::Engine as _;
use millrace_engine::mock::{MockConfig, MockEngine};
use millrace_net::client::{Client, ClientConfig};
use millrace_net::identity::Validity;
use millrace_net::join::{request_join, request_renewal};
use millrace_net::{ClusterCa, Identity, NodeKey, PeerName};
use millrace_net::{Connection, Endpoint, MessageReceiver, MessageSender};
use millrace_shared::error::ErrorCode;
use millrace_shared::wire::admin::{
    AdminReply, AdminRequest, KeyLimits, KeyRequest, NewKey, Scope,
};
use millrace_shared::wire::control::{CoordinatorMessage, NodeMessage, StageProfile};
use millrace_shared::wire::rpc::Prompt;
use millrace_shared::wire::{COORDINATOR_NAME, Edge, MAX_CONTROL_BYTES, Plane, node_name};

use nix::sys::signal::Signal;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::cluster::{Cluster, under_attack};

/// How a member's connection ends; whether in the handshake or after it is up to TLS.
async fn refusal(identity: &Identity, cluster: &Cluster) -> String {
    match hostile::connect(identity, cluster.coordinator.cluster, COORDINATOR_NAME).await {
        Err(e) => e.to_string(),
        Ok((_endpoint, connection)) => harness::soon(connection.closed()).await.to_string(),
    }
}

/// A client with a key of its own, made from afar.
async fn with_key(cluster: &Cluster, scope: Scope, limits: KeyLimits) -> (String, ClientConfig) {
    let key = NewKey { limits, ..NewKey::new("guest", scope) };
    let made = cluster.client.admin(AdminRequest::Keys(KeyRequest::Create(key))).await;
    let Ok(AdminReply::NewKey { info, secret }) = made else { panic!("no key: {made:?}") };
    (info.id, ClientConfig { api_key: secret, ..cluster.coordinator.client.clone() })
}

#[test]
fn members_that_are_not_to_be_trusted() {
    under_attack(async |cluster| {
        let ca = cluster.ca();
        let now = Validity::lasting(Duration::ZERO).until;
        for (from, until, why) in [
            (now - 9000, now - 3600, "certificate expired"),
            (now + 3600, now + 9000, "certificate not valid yet"),
        ] {
            let node = ca.issue_node_for(hostile::new_id(), Validity { from, until }).unwrap();
            assert!(!refusal(&node, cluster).await.is_empty());
            cluster.coordinator.process.wait_log(why, |log| {
                let mut refused =
                    log.lines().filter(|l| l.contains("refused on the cluster endpoint"));
                refused.any(|line| line.contains(why)).then_some(())
            });
        }
        // The right CA, the wrong role: HTTPS's certificate, and the coordinator's own.
        let web = ca.issue_web(&["localhost".to_owned()]).unwrap();
        assert!(!refusal(&web, cluster).await.is_empty());
        let posing = ca.issue_coordinator().unwrap();
        let end = refusal(&posing, cluster).await;
        assert!(end.contains("only nodes connect here"), "{end}");
        // Nodes let no coordinator in on their own endpoint, and nobody passes for another node.
        let (node, papers, address) = cluster.stages().await.remove(1);
        let (_e, connection) = hostile::connect(&posing, address, &node_name(node)).await.unwrap();
        let end = harness::soon(connection.closed()).await.to_string();
        assert!(end.contains("only nodes connect here"), "{end}");
        let wrong = hostile::connect(&papers, address, &node_name(hostile::new_id())).await;
        assert!(wrong.is_err(), "another name than the certificate's");
        cluster.is_unharmed("wrong papers").await;
    });
}

/// A node whose certificate is revoked is thrown out at once, ends, and never comes back; the
/// machine may enrol as a new node. Others renew theirs.
#[test]
fn a_node_is_revoked() {
    under_attack(async |cluster| {
        let public = cluster.coordinator.client.quic.clone();
        let guest = cluster.coordinator.root.join("guest");
        cluster.coordinator.renew_token();
        let token = cluster.coordinator.token.parse().unwrap();
        let key = NodeKey::generate().unwrap();
        let joined = request_join(&token, &key).await.unwrap();
        assert_eq!(joined.cluster_addr, cluster.coordinator.cluster.to_string());
        let renewed = request_renewal(&public, &joined.identity).await.unwrap();
        assert_eq!(renewed.identity.name().unwrap(), PeerName::Node(joined.node_id));
        assert_ne!(renewed.identity.cert_der, joined.identity.cert_der);

        cluster.coordinator.renew_token();
        let mut node = cluster.coordinator.node("guest", &["--engine", "mock"]);
        let admin = cluster.client.clone();
        let present = async || match admin.admin(AdminRequest::Nodes).await {
            Ok(AdminReply::Nodes(nodes)) => nodes.iter().any(|n| n.name == "guest"),
            other => panic!("{other:?}"),
        };
        while !present().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let papers = Identity::load(&guest, "node").unwrap();
        let (_endpoint, second) =
            hostile::connect(&papers, cluster.coordinator.cluster, COORDINATOR_NAME).await.unwrap();
        let mut revoke = command("millrace", &cluster.coordinator.root);
        revoke.args(["nodes", "--cluster"]).arg(cluster.coordinator.dir().join("client.toml"));
        revoke.args(["revoke", "guest"]);
        let output = tokio::task::spawn_blocking(|| run(revoke)).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let end = harness::soon(second.closed()).await.to_string();
        assert!(end.contains("revoked"), "every connection of it: {end}");
        let status = tokio::task::spawn_blocking(move || (node.wait(), node.log())).await.unwrap();
        assert_eq!(status.0.code(), Some(1));
        assert!(status.1.contains("revoked"), "{}", status.1);

        assert!(!refusal(&papers, cluster).await.is_empty());
        let refused = request_renewal(&public, &papers).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::PermissionDenied);
        assert!(refused.message.contains("was revoked"), "{refused}");
        let again = cluster.coordinator.node("guest", &["--engine", "mock"]);
        let ended = |mut node: Process| (node.wait().code(), node.log());
        let (code, log) = tokio::task::spawn_blocking(move || ended(again)).await.unwrap();
        assert_eq!(code, Some(1));
        assert!(log.contains("revoked"), "{log}");
        assert!(!present().await);
        cluster.is_unharmed("a revoked node").await;
    });
}

#[test]
fn join_tokens_from_afar() {
    under_attack(async |cluster| {
        let root = cluster.coordinator.root.clone();
        let config = cluster.coordinator.dir().join("client.toml");
        let tokens = async |words: &[&str]| {
            let mut tokens = command("millrace", &root);
            tokens.arg("tokens").args(words).arg("--cluster").arg(&config);
            let output = tokio::task::spawn_blocking(|| run(tokens)).await.unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            (output.status.success(), text(output.stdout), text(output.stderr))
        };
        let before = tokens(&["list"]).await.1;
        let (made, token, said) = tokens(&["create", "--uses", "2", "--expires", "1h"]).await;
        assert!(made && said.contains("millrace-node run --coordinator"), "{token}{said}");
        let id = said.split_whitespace().nth(1).unwrap().trim_end_matches(';').to_owned();
        let token = token.trim().parse().unwrap();
        let keys = [(); 3].map(|()| NodeKey::generate().unwrap());
        let joined = request_join(&token, &keys[0]).await.unwrap();
        let (_, listed, _) = tokens(&[]).await;
        let line = listed.lines().find(|l| l.starts_with(&id)).unwrap();
        let counts: Vec<&str> = line.split_whitespace().skip(1).take(2).collect();
        assert_eq!(counts, ["1", "1"], "one left, one joined: {listed}");

        // Nobody joins with it any more; who did is a member.
        assert!(tokens(&["revoke", &id]).await.0);
        for key in &keys[..2] {
            let refused = request_join(&token, key).await.unwrap_err();
            assert!(refused.message.contains("unknown join token"), "{refused}");
        }
        let public = cluster.coordinator.client.quic.clone();
        request_renewal(&public, &joined.identity).await.unwrap();
        assert_eq!(tokens(&["list"]).await.1, before);
        let (again, _, said) = tokens(&["revoke", &id]).await;
        assert!(!again && said.contains("no join token has the id"), "{said}");
        let (many, _, said) = tokens(&["create", "--uses", "1001"]).await;
        assert!(!many && said.contains("1001 is not in 1..=1000"), "{said}");
        cluster.is_unharmed("a revoked join token").await;
    });
}

#[test]
fn keys_from_afar() {
    under_attack(async |cluster| {
        let greedy = |n| ask::greedy(n);
        let story = || Prompt::Text("A story".to_owned());
        let limits = KeyLimits { concurrent: Some(1), ..KeyLimits::default() };
        let (id, config) = with_key(cluster, Scope::Generate, limits).await;
        let client = ask::connect(&config).await;
        let addr = cluster.coordinator.http();
        let body = br#"{"prompt": "a", "max_tokens": 1}"#;
        // The first one may be through before the others come: then again.
        let mut tries = 0..20;
        let (busy, over) = loop {
            tries.next().expect("one request that is still running when the next ones come");
            let mut running = ask::begin(&client, story(), greedy(1500)).await.unwrap();
            ask::take_tokens(&mut running, 1).await.unwrap();
            let busy = ask::generate(&client, story(), greedy(2)).await;
            let over = http::post(addr, "/v1/completions", &config.api_key, body);
            drop(running);
            ask::idle(&cluster.client).await;
            if let (Err(busy), 429) = (busy, over.status) {
                break (busy, over);
            }
        };
        assert_eq!(busy.code, ErrorCode::ResourceExhausted, "{busy}");
        assert!(busy.retry_after_ms.is_some(), "{busy}");
        assert!(over.header("retry-after").is_some(), "the same limit over HTTP");
        assert!(ask::generate(&client, story(), greedy(2)).await.is_ok());

        // Revoked: from the next call on, also of those who are connected.
        let revoke = AdminRequest::Keys(KeyRequest::Revoke { id });
        assert!(client.admin(revoke.clone()).await.is_err(), "not with a client's key");
        assert!(cluster.client.admin(revoke).await.is_ok());
        let refused = ask::generate(&client, story(), greedy(2)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Unauthenticated, "{refused}");
        assert_eq!(http::post(addr, "/v1/completions", &config.api_key, body).status, 401);
        let list = cluster.client.admin(AdminRequest::Keys(KeyRequest::List)).await;
        let Ok(AdminReply::Keys(keys)) = list else { panic!("no keys: {list:?}") };
        let by = &keys.iter().find(|k| k.key.name == "first client").unwrap().id;
        let log = cluster.coordinator.process.log();
        let said = |line: &str| line.contains(by.as_str()) && line.contains("Revoke");
        assert!(log.lines().any(said), "who revoked it: {log}");

        let (_, reader) = with_key(cluster, Scope::Read, KeyLimits::default()).await;
        let read = http::get_with(addr, "/metrics", &reader.api_key);
        assert_eq!(read.status, 200);
        assert_eq!(http::get(addr, "/metrics").status, 401);
        let refused = http::post(addr, "/v1/completions", &reader.api_key, body);
        assert_eq!(refused.status, 403, "{}", refused.text());

        // Guessing over QUIC, each with a connection of its own or all with one.
        let guess = |i: u32| ClientConfig { api_key: format!("mlr-guess-{i}"), ..config.clone() };
        let shared = ask::connect(&guess(0)).await;
        let mut codes = Vec::new();
        while codes.last() != Some(&ErrorCode::ResourceExhausted) && codes.len() < 100 {
            let own = ask::connect(&guess(codes.len() as u32)).await;
            for client in [&own, &shared] {
                let refused = client.models().await.unwrap_err();
                assert_eq!(
                    refused.retry_after_ms.is_some(),
                    refused.code == ErrorCode::ResourceExhausted,
                    "{refused}"
                );
                codes.push(refused.code);
            }
            own.close().await;
        }
        assert!(codes.contains(&ErrorCode::Unauthenticated), "{codes:?}");
        assert_eq!(codes.last(), Some(&ErrorCode::ResourceExhausted), "{codes:?}");
        assert!(cluster.client.models().await.is_ok(), "who has a key never waits");

        // The host has used its guesses up, over HTTP too; who has a key never waits.
        let unseen = with_key(cluster, Scope::Read, KeyLimits::default()).await.1.api_key;
        let get = |key: &str| http::get_with(addr, "/v1/models", key).status;
        let statuses: Vec<u16> = (0..40).map(|i| get(&format!("mlr-{i}"))).collect();
        assert!(statuses.contains(&429), "{statuses:?}");
        assert!(statuses.iter().all(|status| [401, 429].contains(status)), "{statuses:?}");
        assert_eq!(get(&unseen), 200);
        assert_eq!(get(&reader.api_key), 200);
        cluster.is_unharmed("keys").await;
    });
}

/// A member by hand, up to the coordinator's request for a profile.
async fn member(cluster: &Cluster) -> (Endpoint, Connection, MessageSender, MessageReceiver) {
    let identity = cluster.ca().issue_node(hostile::new_id()).unwrap();
    let to = cluster.coordinator.cluster;
    let (endpoint, connection) = hostile::connect(&identity, to, COORDINATOR_NAME).await.unwrap();
    let (send, recv) = connection.open_stream(&Plane::Control).await.unwrap();
    (endpoint, connection, MessageSender::new(send), MessageReceiver::new(recv))
}

#[test]
fn members_that_lie() {
    under_attack(async |cluster| {
        let numerics = MockEngine::new(MockConfig::default()).numerics_revision();
        let honest = hostile::hello(&numerics);
        let mut impossible = honest.clone();
        impossible.memory_bytes = u64::MAX;
        let mut escape = honest.clone();
        escape.name = "a\u{1b}[2Jb\nWARN all is well".to_owned();
        for hello in [impossible, escape] {
            let answer =
                hostile::introduce(&cluster.ca(), cluster.coordinator.cluster, hello).await;
            assert!(matches!(answer, CoordinatorMessage::Refused { .. }), "{answer:?}");
        }
        cluster.is_unharmed("impossible hellos").await;
        for (told, lie) in (1..).zip([f64::NAN, 0.0, -1.0, 1e300]) {
            let (endpoint, _connection, mut out, mut messages) = member(cluster).await;
            let hello = NodeMessage::Hello(Box::new(honest.clone()));
            out.send(&hello).await.unwrap();
            loop {
                let message = messages.recv_one(MAX_CONTROL_BYTES).await.unwrap();
                if matches!(message, CoordinatorMessage::Profile(_)) {
                    break;
                }
            }
            let profile = StageProfile::flat(lie, lie);
            out.send(&NodeMessage::Profiled { profile }).await.unwrap();
            let what = "what it measured makes no sense";
            // Not by blocking: what was sent leaves while this waits.
            while cluster.coordinator.process.log().matches(what).count() < told {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let recut = cluster.client.admin(AdminRequest::Recut { apply: false }).await;
            if let Ok(AdminReply::Recut(report)) = recut {
                assert!(report.gain.is_finite(), "{report:?}");
            }
            cluster.is_unharmed("a lie about times").await;
            let _ = out.send(&NodeMessage::Leaving).await;
            endpoint.close("done");
            endpoint.drain().await;
        }
    });
}

/// Edges of an epoch that is over, and of one that never was.
#[test]
fn stale_and_future_epochs() {
    under_attack(async |cluster| {
        let epoch = cluster.epoch().await;
        let stages = cluster.stages().await;
        let [(_, first, _), (second, _, address)] = &stages[..] else { panic!("two stages") };
        for wrong in [epoch - 1, epoch + 1, u64::MAX] {
            let (_endpoint, connection) =
                hostile::connect(first, *address, &node_name(*second)).await.unwrap();
            let plane = Plane::Stage {
                pipeline: millrace_shared::id::PipelineId(1),
                epoch: millrace_shared::id::Epoch(wrong),
                edge: Edge::Activations,
            };
            let (send, _recv) = connection.open_stream(&plane).await.unwrap();
            let mut out = MessageSender::new(send);
            let _ = out.send_bytes(vec![7; 4096].into()).await;
            cluster.is_unharmed("another epoch's edge").await;
        }
        assert_eq!(cluster.epoch().await, epoch);
    });
}

/// Neither keys nor tokens nor prompts get into logs, however much is logged.
#[test]
fn logs_hold_no_secrets() {
    let _turn = harness::alone();
    let root = tempfile::tempdir().unwrap();
    harness::block_on(async {
        let prompt = "Zanzibar-7731 never tells";
        let extra = ["--engine", "mock", "--kv-cache-tokens", "8192"];
        let coordinator = Coordinator::start_logging(root.path(), 1, &extra);
        let mut node = coordinator.node_logging("node-a", "debug", &["--engine", "mock"]);
        coordinator.wait_ready();
        let client = ask::connect(&coordinator.client).await;
        ask::generate(&client, Prompt::Text(prompt.to_owned()), ask::greedy(4)).await.unwrap();
        let key = coordinator.client.api_key.clone();
        let body = serde_json::json!({"prompt": prompt, "max_tokens": 2}).to_string();
        let answer = http::post(coordinator.http(), "/v1/completions", &key, body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
        let wrong = http::post(coordinator.http(), "/v1/completions", "mlr-wrong-key", b"{}");
        assert_eq!(wrong.status, 401);
        let new = AdminRequest::Keys(KeyRequest::Create(NewKey::new("x", Scope::Read)));
        let Ok(AdminReply::NewKey { secret, .. }) = client.admin(new).await else {
            panic!("no key")
        };
        client.close().await;
        node.terminate();
        let log = format!("{}{}", coordinator.process.log(), node.log());
        assert!(log.contains("DEBUG"), "much is logged: {log}");
        // What 'serve' prints for the operator to paste is no log line.
        let logged: String =
            log.lines().filter(|l| !l.trim_start().starts_with("millrace-node run")).collect();
        for (what, text) in [
            ("the key", key.as_str()),
            ("a new key", &secret),
            ("a wrong key", "mlr-wrong-key"),
            ("the join token", &coordinator.token),
            ("the prompt", "Zanzibar"),
        ] {
            assert!(!logged.contains(text), "{what} is in the log");
        }
        let key = std::fs::read_to_string(coordinator.dir().join("ca.key")).unwrap();
        let line = key.lines().nth(1).unwrap();
        assert!(!logged.contains(line));
    });
}

/// A backup, taken while the cluster serves, makes a coordinator elsewhere to which nodes and
/// clients come back without enrolling.
#[test]
fn a_cluster_moves() {
    under_attack(async |cluster| {
        let root = cluster.coordinator.root.clone();
        let mut backup = command("millrace-coordinator", &root);
        backup.args(["backup", "--dir", "coordinator", "cluster.backup"]);
        let output = run(backup);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        cluster.is_unharmed("a backup").await;
        let mut restore = command("millrace-coordinator", &root);
        restore.args(["restore", "--dir", "coordinator", "cluster.backup"]);
        fails_with(&run(restore), &["is not empty"]);

        let (key, old) = (cluster.coordinator.client.clone(), cluster.coordinator.cluster);
        cluster.coordinator.process.kill();
        let elsewhere = root.join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let mut restore = command("millrace-coordinator", &root);
        restore.args(["restore", "--dir", "elsewhere/coordinator", "cluster.backup"]);
        let output = run(restore);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let moved =
            Coordinator::start(&elsewhere, 2, &["--kv-cache-tokens", "8192", "--engine", "mock"]);
        assert_ne!(moved.cluster, old);
        for (node, name) in cluster.nodes.iter_mut().zip(["node-a", "node-b"]) {
            node.kill();
            *node = cluster
                .coordinator
                .node(name, &["--engine", "mock", "--coordinator", &moved.client.quic]);
        }
        moved.wait_ready();
        let config = ClientConfig { quic: moved.client.quic.clone(), ..key };
        cluster.client = ask::connect(&config).await;
        cluster.coordinator = moved;
        cluster.is_unharmed("another coordinator").await;
    });
}

/// `GET /live` over TLS: the status line, or why there was none.
fn over_tls(addr: SocketAddr, ca_pem: &[u8], name: &str) -> Result<String, String> {
    let mut roots = rustls::RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(ca_pem) {
        roots.add(ca.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let tcp = TcpStream::connect(addr).unwrap();
    tcp.set_read_timeout(Some(harness::DEADLINE)).unwrap();
    let mut stream = rustls::StreamOwned::new(tls, tcp);
    let head = format!("GET /live HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).map_err(|e| e.to_string())?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// HTTP that others can reach is encrypted or does not start; certificates of the cluster's own, and
/// of a company, which is read again at SIGHUP.
#[test]
fn https() {
    let _turn = harness::alone();
    let root = tempfile::tempdir().unwrap();
    let open = crate::cluster::serve(root.path(), harness::model_arg(), &["--host", "0.0.0.0"]);
    fails_with(&open, &["would not be encrypted", "--insecure-http", "--tls-cert", "--https"]);

    let own = root.path().join("own");
    std::fs::create_dir(&own).unwrap();
    let coordinator = Coordinator::start(&own, 1, &["--engine", "mock", "--https"]);
    let url = coordinator.client.http.clone();
    let addr: SocketAddr = url.strip_prefix("https://").expect("an https URL").parse().unwrap();
    let ca = coordinator.client.ca_pem.clone();
    for name in ["localhost", "127.0.0.1"] {
        assert_eq!(over_tls(addr, ca.as_bytes(), name).unwrap(), "HTTP/1.1 200");
    }
    assert!(over_tls(addr, ca.as_bytes(), "evil.example").is_err());
    let stranger = ClusterCa::create().unwrap();
    assert!(over_tls(addr, stranger.ca_pem().as_bytes(), "localhost").is_err());
    let mut plain = TcpStream::connect(addr).unwrap();
    plain.set_read_timeout(Some(harness::DEADLINE)).unwrap();
    plain.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "nothing without TLS");
    drop(coordinator);

    let company = ClusterCa::create().unwrap();
    let issue = |ca: &ClusterCa| {
        ca.issue_web(&["models.example".to_owned()]).unwrap().save(root.path(), "web").unwrap();
    };
    issue(&company);
    let other = root.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let (cert, key) = (root.path().join("web.pem"), root.path().join("web.key"));
    let mut flags = vec!["--engine", "mock", "--tls-cert", cert.to_str().unwrap()];
    flags.extend(["--tls-key", key.to_str().unwrap()]);
    let coordinator = Coordinator::start(&other, 1, &flags);
    let addr: SocketAddr = coordinator.client.http["https://".len()..].parse().unwrap();
    let ask = |ca: &ClusterCa| over_tls(addr, ca.ca_pem().as_bytes(), "models.example");
    assert_eq!(ask(&company).unwrap(), "HTTP/1.1 200");
    issue(&stranger);
    coordinator.process.signal(Signal::SIGHUP);
    wait_for("the new certificate", || ask(&stranger).ok());
    assert!(ask(&company).is_err());
    harness::block_on(async {
        let config = ClientConfig {
            ca_pem: stranger.ca_pem(),
            server_name: Some("models.example".to_owned()),
            ..coordinator.client.clone()
        };
        assert!(Client::connect(&config).await.is_ok(), "QUIC shows it too");
        assert!(Client::connect(&coordinator.client).await.is_ok(), "and the cluster's own");
    });
}

/// A log for collectors is kept and read by others: whoever reads it cannot join.
#[test]
fn a_collected_log_has_no_join_token() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let mut serve = command("millrace-coordinator", root.path());
    serve.args(["--log-format", "json", "serve", "--dir", "c", "--stages", "1", "--port", "0"]);
    serve.args(["--quic", "127.0.0.1:0", "--cluster", "127.0.0.1:0", "--model", model_arg()]);
    let mut process = Process::start("coordinator", serve, root.path());
    let log = process.wait_log("what to do on other machines", |log| {
        log.contains("millrace-coordinator token create").then(|| log.to_owned())
    });
    assert!(log.contains("millrace-node run --coordinator 127.0.0.1:"), "{log}");
    assert!(!log.contains("mlrj1."), "{log}");
    let made = std::fs::read_dir(root.path().join("c/tokens")).unwrap().count();
    assert_eq!(made, 0, "and none was made");
}
