//! A cluster to attack, and the proof that it took no harm.

use std::net::SocketAddr;
use std::path::Path;

use harness::ask::{self, Answer};
use harness::processes::{self, Coordinator, Process, command};
use harness::{alone, block_on};
use millrace_net::client::Client;
use millrace_net::{ClusterCa, Identity, PeerName};
use millrace_shared::error::Status;
use millrace_shared::id::NodeId;
use millrace_shared::wire::rpc::Prompt;

/// `millrace-coordinator serve` with this file.
pub fn serve(home: &Path, file: &str, extra: &[&str]) -> std::process::Output {
    let mut serve = command("millrace-coordinator", home);
    serve.args(["serve", "--dir", "serve", "--model", file, "--port", "0", "--stages", "1"]);
    serve.args(extra);
    if !extra.contains(&"--quic") {
        serve.args(["--quic", "127.0.0.1:0"]);
    }
    if !extra.contains(&"--cluster") {
        serve.args(["--cluster", "127.0.0.1:0"]);
    }
    processes::run(serve)
}

/// Two stages of the mock engine, which is as picky as the real one.
pub struct Cluster {
    pub coordinator: Coordinator,
    pub nodes: Vec<Process>,
    pub client: Client,
    pub expected: Answer,
}

async fn normal(client: &Client) -> Result<Answer, Status> {
    let prompt = Prompt::Text("A request like any other".to_owned());
    ask::generate(client, prompt, ask::greedy(8)).await
}

impl Cluster {
    async fn start(root: &Path) -> Self {
        let flags = ["--kv-cache-tokens", "8192", "--engine", "mock"];
        // With everything in its log: some refusals are told nowhere else.
        let coordinator = Coordinator::start_logging(root, 2, &flags);
        let mock: &[&str] = &["--engine", "mock"];
        let nodes = vec![coordinator.node("node-a", mock), coordinator.node("node-b", mock)];
        coordinator.wait_ready();
        let client = ask::connect(&coordinator.client).await;
        let expected = normal(&client).await.unwrap();
        Self { coordinator, nodes, client, expected }
    }

    /// Everybody lives, nothing is left behind, and a normal request gets its normal answer.
    pub async fn is_unharmed(&mut self, after: &str) {
        assert!(self.coordinator.process.is_alive(), "{after}");
        assert!(self.nodes.iter_mut().all(Process::is_alive), "{after}");
        assert_eq!(normal(&self.client).await.as_ref(), Ok(&self.expected), "{after}");
        ask::idle(&self.client).await;
        let logs = [&self.coordinator.process, &self.nodes[0], &self.nodes[1]].map(Process::log);
        assert!(logs.iter().all(|log| !log.contains("panicked")), "{after}: {logs:?}");
    }

    pub async fn epoch(&self) -> u64 {
        self.client.status().await.unwrap().epoch
    }

    /// The CA, as whoever has the coordinator's folder holds it.
    pub fn ca(&self) -> ClusterCa {
        ClusterCa::load(&self.coordinator.dir()).unwrap()
    }

    /// Stages in order: each node's papers and where it listens.
    pub async fn stages(&mut self) -> Vec<(NodeId, Identity, SocketAddr)> {
        let mut found = Vec::new();
        for stage in self.client.status().await.unwrap().stages {
            let node = self.nodes.iter_mut().zip(["node-a", "node-b"]).find_map(|(node, name)| {
                let papers = Identity::load(&self.coordinator.root.join(name), "node").unwrap();
                (papers.name().unwrap() == PeerName::Node(stage.node_id)).then_some((node, papers))
            });
            let (node, papers) = node.unwrap();
            let address = node.wait_log("address", |log| {
                let (_, rest) = log.split_once("listen=")?;
                rest.split_whitespace().next()?.parse().ok()
            });
            found.push((stage.node_id, papers, address));
        }
        found
    }
}

/// Runs attacks on a fresh cluster.
pub fn under_attack(attack: impl AsyncFnOnce(&mut Cluster)) {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    block_on(async {
        let mut cluster = Cluster::start(root.path()).await;
        attack(&mut cluster).await;
        cluster.client.close().await;
    });
}
