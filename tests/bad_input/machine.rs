//! What a machine may lack: free ports, and memory.

use std::net::{TcpListener, UdpSocket};

use harness::processes::{self, Coordinator, command, fails_with};
use harness::{alone, http, model_arg, wait_for};

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
