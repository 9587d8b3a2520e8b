//! The processes of `millrace demo`, seen from the one that starts them.
//!
//! All of them end when this is dropped, and also when this process ends without that: each watches
//! its stdin, a pipe from here. They are in process groups of their own, so that Ctrl-C at a
//! terminal reaches the demo alone, which then ends them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use millrace_coordinator::state::CLIENT_FILE;
use millrace_net::client::{Client, ClientConfig};
use millrace_shared::names::env;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};

/// Longest start: a machine that is slow and busy measures and loads within it.
const START_DEADLINE: Duration = Duration::from_secs(180);
/// Between looks at what is awaited.
const LOOK: Duration = Duration::from_millis(50);
/// Lines of each log that an error shows.
const LOG_LINES: usize = 12;

/// The coordinator's name.
pub(super) const COORDINATOR: &str = "coordinator";
/// Any free port.
const ANY: &str = "127.0.0.1:0";
/// Enough for one answer.
const LIMITS: [&str; 6] = ["--port", "0", "--max-model-len", "2048", "--kv-cache-tokens", "8192"];

#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Processes {
    // Before the folder, so that they end before it is removed.
    nodes: Vec<Process>,
    coordinator: Process,
    token: String,
    client: ClientConfig,
    /// Where members connect.
    cluster: String,
    stages: String,
    model: String,
    folder: tempfile::TempDir,
}

impl Processes {
    /// Starts a coordinator for so many stages; nodes may join when it returns.
    ///
    /// # Errors
    /// If it cannot be started, or ends.
    pub(super) async fn start(model: &Path, stages: usize) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("millrace-demo-").tempdir()?;
        let model = std::path::absolute(model)?.to_str().context("the model's path")?.to_owned();
        let stages = stages.to_string();
        let (coordinator, token, cluster) =
            serve(folder.path(), &model, &stages, (ANY, ANY)).await?;
        let client = ClientConfig::load(&folder.path().join(COORDINATOR).join(CLIENT_FILE))?;
        let nodes = Vec::new();
        Ok(Self { nodes, coordinator, token, client, cluster, stages, model, folder })
    }

    /// Starts one more node.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn add_node(&mut self, name: &str) -> anyhow::Result<()> {
        let mut command = part("node", self.folder.path(), name)?;
        command.arg("--dir").arg(self.folder.path().join(name)).args(["--name", name]);
        command.args(["--coordinator", &self.client.quic, "--token", &self.token]);
        command.args(["--listen", "127.0.0.1:0", "--weights", &self.model]);
        self.nodes.push(spawn(name, command)?);
        Ok(())
    }

    /// Ends a node with SIGKILL; the coordinator is started again in the same place.
    ///
    /// # Errors
    /// If there is none of that name, or it cannot be started again.
    pub(super) async fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        if name == COORDINATOR {
            self.coordinator.child.kill()?;
            self.coordinator.child.wait()?;
            let addresses = (self.client.quic.as_str(), self.cluster.as_str());
            let (again, ..) =
                serve(self.folder.path(), &self.model, &self.stages, addresses).await?;
            self.coordinator = again;
            return Ok(());
        }
        let node = self.nodes.iter_mut().find(|n| n.name == name);
        node.with_context(|| format!("no node is called {name}"))?.child.kill()?;
        Ok(())
    }

    /// A connection of its own.
    ///
    /// # Errors
    /// If the coordinator is not there.
    pub(super) async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(&self.client).await?)
    }

    /// Waits until requests are served.
    ///
    /// # Errors
    /// If a process ends, or it takes too long.
    pub(super) async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let client = self.client().await?;
        self.wait("the pipeline", async || Ok(client.status().await?.ready)).await?;
        client.close().await;
        Ok(())
    }

    /// Waits until so many nodes have measured what they can do.
    ///
    /// # Errors
    /// If a process ends, or it takes too long.
    pub(super) async fn wait_measured(&mut self, nodes: usize) -> anyhow::Result<()> {
        let client = self.client().await?;
        let measured = async || match client.admin(AdminRequest::Describe).await? {
            AdminReply::Description(text) => Ok(text.matches("[[node]]").count() >= nodes),
            other => Err(anyhow!("the coordinator's answer makes no sense: {other:?}")),
        };
        self.wait("the stand-by", measured).await?;
        client.close().await;
        Ok(())
    }

    async fn wait(
        &mut self,
        what: &str,
        mut done: impl AsyncFnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !done().await? {
            for process in self.nodes.iter_mut().chain([&mut self.coordinator]) {
                if let Some(status) = process.child.try_wait()? {
                    return Err(anyhow!("{} ended ({status})", process.name));
                }
            }
            if begun.elapsed() > START_DEADLINE {
                return Err(anyhow!("{what} was not ready within {START_DEADLINE:?}"));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The last lines that each process wrote.
    pub(super) fn logs(&self) -> String {
        let names = self.nodes.iter().map(|n| n.name.as_str()).chain([COORDINATOR]);
        let log = |name: &str| {
            format!("---- {name}\n{}", tail(&self.folder.path().join(format!("{name}.log"))))
        };
        names.map(log).collect::<Vec<_>>().join("\n")
    }
}

/// A coordinator at these addresses of clients and members, a join token, and where members connect.
async fn serve(
    folder: &Path,
    model: &str,
    stages: &str,
    (quic, members): (&str, &str),
) -> anyhow::Result<(Process, String, String)> {
    let mut command = part(COORDINATOR, folder, COORDINATOR)?;
    command.arg("--dir").arg(folder.join(COORDINATOR)).args(["--model", model]).args(LIMITS);
    command.args(["--stages", stages, "--quic", quic, "--cluster", members]);
    command.stdout(Stdio::piped());
    let mut coordinator = spawn(COORDINATOR, command)?;
    let stdout = coordinator.child.stdout.take().context("its output")?;
    // Elsewhere, so that a signal is heard meanwhile: who drops this ends the coordinator, and with
    // it the wait.
    let line = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).map(|_| line)
    });
    let line = tokio::time::timeout(START_DEADLINE, line)
        .await
        .with_context(|| format!("the coordinator said nothing within {START_DEADLINE:?}"))???;
    match line.trim().split_once(' ') {
        Some((token, cluster)) => Ok((coordinator, token.to_owned(), cluster.to_owned())),
        None => {
            let log = tail(&folder.join(format!("{COORDINATOR}.log")));
            Err(anyhow!("the coordinator did not start: {log}"))
        }
    }
}

/// This program as a part of a demo, with a log of its own.
fn part(what: &str, folder: &Path, name: &str) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(program);
    command.args(["demo-part", what]);
    for variable in [env::DIR, env::TOKEN, env::API_KEY, env::CLUSTER] {
        command.env_remove(variable);
    }
    let log = File::create(folder.join(format!("{name}.log")))?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).process_group(0);
    Ok(command)
}

fn spawn(name: &str, mut command: Command) -> anyhow::Result<Process> {
    let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    Ok(Process { name: name.to_owned(), child })
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
