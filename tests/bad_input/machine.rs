//! What a machine may lack: free ports, memory, and room on the disk.

use std::net::{TcpListener, UdpSocket};

use harness::processes::{self, Coordinator, command, fails_with};
use harness::{alone, ask, block_on, http, model_arg, wait_for};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{Choices, GenerateRequest, Prompt};
use rlimit::Resource;

use crate::cluster::serve;

#[test]
fn ports_in_use() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    let file = model_arg();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let output = {
        let mut serve = command("millrace-coordinator", home.path());
        serve.args(["serve", "--dir", "serve", "--model", file, "--stages", "1"]);
        serve.args(["--port", &address.port().to_string()]);
        serve.args(["--quic", "127.0.0.1:0", "--cluster", "127.0.0.1:0"]);
        processes::run(serve)
    };
    fails_with(&output, &[&address.to_string(), "in use", "--port"]);
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = udp.local_addr().unwrap().to_string();
    for flag in ["--quic", "--cluster"] {
        let output = serve(home.path(), file, &[flag, &address]);
        fails_with(&output, &[flag, &address, "in use"]);
    }
    let coordinator = Coordinator::start(home.path(), 1, &[]);
    let mut run = command("millrace-node", home.path());
    run.args(["run", "--dir", "node", "--token", &coordinator.token, "--listen", &address]);
    fails_with(&processes::run(run), &["--listen", &address, "in use"]);
}

#[test]
fn a_model_that_does_not_fit() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), 1, &["--kv-cache-tokens", "8192"]);
    let mut small = coordinator.node("small", &["--memory", "16MiB"]);
    let said = wait_for("plan", || {
        let text = http::get(coordinator.http(), "/health").text();
        text.contains("does not fit").then_some(text)
    });
    assert!(said.contains("add a node") && said.contains("missing"), "{said}");
    assert!(coordinator.process.is_alive() && small.is_alive());
    let key = coordinator.client.api_key.clone();
    let refused = http::post(coordinator.http(), "/v1/completions", &key, b"{\"prompt\":\"a\"}");
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.text().contains("does not fit"), "{}", refused.text());
    assert_eq!(small.terminate().code(), Some(0));
    // The same node with the memory that it really has.
    let _large = coordinator.node("small", &["--weights", model_arg()]);
    coordinator.wait_ready();
    let served = http::post(coordinator.http(), "/v1/completions", &key, b"{\"prompt\":\"a\"}");
    assert_eq!(served.status, 200, "{}", served.text());
}

/// The memory that a cache of this many tokens needs is not there: the plan says how much is short,
/// nothing dies, and another coordinator's flag mends it.
#[test]
fn a_cache_that_does_not_fit() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    // 30 layers of 3 heads of 64 in f16, K and V: 23 KB a token, 46 GB in all.
    let flags = ["--engine", "mock", "--kv-cache-tokens", "2000000"];
    let mut coordinator = Coordinator::start(root.path(), 1, &flags);
    let mut node = coordinator.node("node-a", &["--engine", "mock", "--memory", "1GiB"]);
    let said = wait_for("plan", || {
        let text = http::get(coordinator.http(), "/health").text();
        text.contains("does not fit").then_some(text)
    });
    for part in ["KV cache need", "the nodes have", "missing", "--kv-cache-tokens"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(coordinator.process.is_alive() && node.is_alive());
    assert_eq!(coordinator.process.terminate().code(), Some(0));
    coordinator.start_again(1, &["--engine", "mock", "--kv-cache-tokens", "8192"]);
    coordinator.wait_ready();
    assert!(node.is_alive(), "the same process goes on");
}

/// A node that says it has more memory than the system gives it: the load fails with a message, the
/// node lives, and serves what it can hold.
#[test]
fn memory_that_is_not_there() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), 1, &["--kv-cache-tokens", "200000"]);
    let mut node = coordinator.node("node-a", &["--memory", "64GiB", "--weights", model_arg()]);
    // It has enough for itself and the weights, not for 4.6 GB of cache.
    let space = 3 << 30;
    node.limit(Resource::AS, space);
    let said = node.wait_log("failed load", |log| {
        log.lines().find(|l| l.contains("cannot load the stage")).map(str::to_owned)
    });
    assert!(said.contains("memory"), "{said}");
    assert!(coordinator.process.is_alive() && node.is_alive());
    assert_eq!(http::get(coordinator.http(), "/live").status, 200);
    coordinator.process.terminate();
    coordinator.start_again(1, &["--kv-cache-tokens", "2048"]);
    coordinator.wait_ready();
    assert!(node.is_alive(), "the same process goes on");
}

/// The journal's disk is full, really: requests go on, the metric says so, and when there is room
/// again everything that is known is written.
#[test]
fn a_full_disk() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let flags = ["--kv-cache-tokens", "8192", "--engine", "mock"];
    let mut coordinator = Coordinator::start(root.path(), 1, &flags);
    let mut node = coordinator.node("node-a", &["--engine", "mock"]);
    coordinator.wait_ready();
    let ids = [(); 3].map(|()| RequestId(uuid::Uuid::now_v7()));
    let ask_as = |coordinator: &Coordinator, id| {
        block_on(async {
            let client = ask::connect(&coordinator.client).await;
            let prompt = Prompt::Text("A mill at the river".to_owned());
            let (params, choices) = (ask::greedy(40), Choices::default());
            let request = GenerateRequest { model: String::new(), prompt, params, choices };
            let stream = client.generate_as(id, request).await.unwrap();
            let answer = ask::finish(stream).await.unwrap();
            client.close().await;
            answer
        })
    };
    let truth = ask_as(&coordinator, ids[0]);
    assert_eq!(coordinator.metric("millrace_journal_degraded"), 0.0);
    // No file of the process may grow beyond this, as on a full disk; the log is shorter.
    let full = 1 << 16;
    assert!(coordinator.dir().join("journal.redb").metadata().unwrap().len() > full);
    coordinator.process.limit(Resource::FSIZE, full);
    assert_eq!(ask_as(&coordinator, ids[1]), truth, "requests go on");
    wait_for("a degraded journal", || {
        (coordinator.metric("millrace_journal_degraded") == 1.0).then_some(())
    });
    assert_eq!(ask_as(&coordinator, ids[2]), truth, "requests go on");
    assert!(coordinator.process.is_alive() && node.is_alive());
    coordinator.process.limit(Resource::FSIZE, rlimit::INFINITY);
    wait_for("a journal that is written again", || {
        (coordinator.metric("millrace_journal_degraded") == 0.0).then_some(())
    });
    coordinator.process.kill();
    coordinator.start_again(1, &flags);
    coordinator.wait_ready();
    block_on(async {
        let client = ask::connect(&coordinator.client).await;
        for id in ids {
            let stream = client.attach(id, &[]).await.unwrap();
            assert_eq!(ask::finish(stream).await.unwrap(), truth, "what the disk had no room for");
        }
        client.close().await;
    });
}
