//! A cluster of real processes in a folder of its own; their output goes to files there.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use millrace_net::client::ClientConfig;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, NodeStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rlimit::Resource;

use crate::{DEADLINE, ask, block_on, http, model_arg, program, wait_for};

/// A command of this workspace with an environment of its own: nothing of the user's is touched.
pub fn command(name: &str, home: &Path) -> Command {
    let mut command = Command::new(program(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("MILLRACE_") {
            command.env_remove(variable);
        }
    }
    command
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1")
        .env("HOME", home)
        .env("MILLRACE_CACHE", home.join("cache"))
        .current_dir(home)
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end.
///
/// # Panics
/// If it does not end within the deadline.
pub fn run(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.expect("the program starts");
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match waiting.recv_timeout(DEADLINE) {
        Ok(output) => output.expect("its output"),
        Err(_) => {
            let _ = kill(pid, Signal::SIGKILL);
            panic!("{command:?} did not end within {DEADLINE:?}");
        }
    }
}

/// Runs a command to its end, which must be a success; what it printed on its two outputs.
///
/// # Panics
/// If it fails, or as [`run`].
#[track_caller]
pub fn succeeds(command: Command) -> (String, String) {
    let what = format!("{command:?}");
    let output = run(command);
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{what}\n{out}\n{err}");
    (out, err)
}

/// Checks that a command failed with status 1 and said so on stderr.
#[track_caller]
pub fn fails_with(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "stderr: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "'{part}' is not in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "stderr: {stderr}");
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command; its output is appended to `NAME.log` in `folder`.
    pub fn start(name: &str, mut command: Command, folder: &Path) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let again = file.try_clone().expect("a second handle");
        let child = command.stdout(file).stderr(again).spawn().expect("the program starts");
        Self { name: name.to_owned(), child, log }
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has printed something that `pick` finds.
    pub fn wait_log<T>(&mut self, what: &str, pick: impl Fn(&str) -> Option<T>) -> T {
        let what = format!("{what} of {}", self.name);
        wait_for(&what, || {
            let found = pick(&self.log());
            assert!(found.is_some() || self.is_alive(), "{what}: it ended:\n{}", self.log());
            found
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("it runs");
    }

    /// Lowers or lifts what the system gives it, which it could itself.
    pub fn limit(&self, resource: Resource, soft: u64) {
        let pid = self.child.id().cast_signed();
        rlimit::prlimit(pid, resource, Some((soft, rlimit::INFINITY)), None).expect("it runs");
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("it runs");
        let _ = self.child.wait();
    }

    /// SIGTERM, then waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGTERM).expect("it runs");
        self.wait()
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        let what = format!("end of {}", self.name);
        wait_for(&what, || self.child.try_wait().expect("its status"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.name, self.log());
        }
    }
}

/// The cluster's nodes.
///
/// # Panics
/// If the coordinator does not say.
pub fn nodes(cluster: &Coordinator) -> Vec<NodeStatus> {
    block_on(async {
        let client = ask::connect(&cluster.client).await;
        let reply = client.admin(AdminRequest::Nodes).await;
        client.close().await;
        match reply {
            Ok(AdminReply::Nodes(nodes)) => nodes,
            other => panic!("{other:?}"),
        }
    })
}

/// A coordinator process that serves the real model.
#[derive(Debug)]
pub struct Coordinator {
    /// The program.
    pub process: Process,
    /// Folder of the whole cluster; the coordinator's own is `coordinator` in it.
    pub root: PathBuf,
    /// Join token, good for as many nodes as there are stages.
    pub token: String,
    /// Where members connect.
    pub cluster: SocketAddr,
    /// What a client needs.
    pub client: ClientConfig,
}

impl Coordinator {
    /// Starts one on free ports and waits until nodes may join.
    pub fn start(root: &Path, stages: u32, extra: &[&str]) -> Self {
        Self::serve(model_arg(), root, stages, extra)
    }

    /// As [`Coordinator::start`], for another model.
    pub fn serve(model: &str, root: &Path, stages: u32, extra: &[&str]) -> Self {
        Self::begin(model, root, stages, extra, "info")
    }

    /// As [`Coordinator::start`], with everything in its log.
    pub fn start_logging(root: &Path, stages: u32, extra: &[&str]) -> Self {
        Self::begin(model_arg(), root, stages, extra, "debug")
    }

    fn begin(model: &str, root: &Path, stages: u32, extra: &[&str], level: &str) -> Self {
        let dir = root.join("coordinator");
        let mut serve = command("millrace-coordinator", root);
        if level != "info" {
            serve.env("RUST_LOG", level);
        }
        serve.arg("serve").arg("--dir").arg(&dir).args(["--model", model]);
        serve.args(["--stages", &stages.to_string(), "--port", "0"]);
        serve.args(["--quic", "127.0.0.1:0", "--cluster", "127.0.0.1:0"]);
        serve.args(["--served-model-name", "model", "--max-model-len", "2048"]).args(extra);
        let mut process = Process::start("coordinator", serve, root);
        let word_after = |log: &str, mark: &str| {
            let rest = &log[log.find(mark)? + mark.len()..];
            let (word, _) = rest.trim_start().split_once(char::is_whitespace)?;
            Some(word.to_owned())
        };
        let token = process.wait_log("join token", |log| word_after(log, "--token "));
        let cluster = process.wait_log("address of members", |log| word_after(log, "members "));
        let cluster = cluster.trim_end_matches("/udp").parse().expect("an address");
        let client = ClientConfig::load(&dir.join("client.toml")).expect("client.toml");
        Self { process, root: root.to_owned(), token, cluster, client }
    }

    /// Starts it again in the same folder and on the same addresses, after its end, and waits until
    /// it answers.
    pub fn start_again(&mut self, stages: u32, extra: &[&str]) {
        let mut serve = command("millrace-coordinator", &self.root);
        serve.arg("serve").arg("--dir").arg(self.dir()).args(["--model", model_arg()]);
        serve.args(["--stages", &stages.to_string(), "--port", &self.http().port().to_string()]);
        serve.args(["--quic", &self.client.quic, "--cluster", &self.cluster.to_string()]);
        serve.args(["--served-model-name", "model", "--max-model-len", "2048"]).args(extra);
        self.process = Process::start("coordinator", serve, &self.root);
        let addr = self.http();
        wait_for("coordinator that is back", || {
            assert!(self.process.is_alive(), "it ended:\n{}", self.process.log());
            std::net::TcpStream::connect(addr).ok()
        });
    }

    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.root.join("coordinator")
    }

    /// Where the HTTP API listens.
    pub fn http(&self) -> SocketAddr {
        self.client.http.trim_start_matches("http://").parse().expect("an address")
    }

    /// Makes another join token, for one more node.
    pub fn renew_token(&mut self) {
        let mut create = command("millrace-coordinator", &self.root);
        create.args(["token", "create", "--dir"]).arg(self.dir());
        let output = run(create);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.token = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    }

    /// Starts a node whose folder and cache carry its name. It joins with the token the first time,
    /// and is known from then on.
    pub fn node(&self, name: &str, extra: &[&str]) -> Process {
        self.node_logging(name, "info", extra)
    }

    /// As [`Coordinator::node`], with another level of its log.
    pub fn node_logging(&self, name: &str, level: &str, extra: &[&str]) -> Process {
        let dir = self.root.join(name);
        let mut run = command("millrace-node", &self.root);
        if level != "info" {
            run.env("RUST_LOG", level);
        }
        run.env("MILLRACE_CACHE", self.root.join(format!("{name}-cache")));
        run.arg("run").arg("--dir").arg(&dir).args(["--name", name, "--threads", "1"]);
        run.args(["--listen", "127.0.0.1:0"]).args(extra);
        if !dir.join("node.toml").exists() {
            run.args(["--token", &self.token]);
        }
        Process::start(name, run, &self.root)
    }

    /// Waits until requests are served.
    pub fn wait_ready(&self) {
        wait_for("pipeline", || (http::get(self.http(), "/health").status == 200).then_some(()));
    }

    /// Waits until requests are not served any more.
    pub fn wait_not_ready(&self) {
        wait_for("end of the pipeline", || {
            (http::get(self.http(), "/health").status == 503).then_some(())
        });
    }

    /// Waits until no sequence, no request and no block is left.
    pub fn wait_nothing_left(&self) {
        for metric in [
            "millrace_kv_blocks_used",
            "millrace_num_requests_running",
            "millrace_num_requests_waiting",
        ] {
            wait_for(&format!("{metric} of 0"), || (self.metric(metric) == 0.0).then_some(()));
        }
    }

    /// The value of a metric without labels of its own.
    pub fn metric(&self, name: &str) -> f64 {
        let text = http::get_with(self.http(), "/metrics", &self.client.api_key).text();
        let line = text
            .lines()
            .find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let line = line.unwrap_or_else(|| panic!("no metric {name} in\n{text}"));
        line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number")
    }
}
