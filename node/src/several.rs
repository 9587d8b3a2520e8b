//! Several devices of one machine under one command: `millrace-node run --device cuda:all`.
//!
//! This process computes nothing. It joins the cluster once, gets a seat for each device from its own
//! membership, and starts this program again for each, in a folder, under a name and on a port of its
//! own: what goes wrong on one GPU ends its own process alone, which is started again after a pause.
//! Signals reach all of them, and none outlives this one. It ends when all have ended because they were
//! told to, or when none of them can be kept running.

use std::cell::Cell;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use millrace_net::certs::LiveIdentity;
use millrace_net::signals::terminated;
use millrace_net::supervisor;
use millrace_shared::names::env;
use millrace_shared::options::{Device, Devices};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::config::Config;
use crate::{engines, enrol};

/// Between the end of a process and its next start: doubled each time, up to the second.
const PAUSE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// After so long the pauses begin anew.
const FARED_WELL: Duration = Duration::from_secs(300);
/// How long a process may take to hand its layers over: a little longer than it takes itself.
const END: Duration = Duration::from_secs(65);

/// One device's process, as the one that starts it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Its place in the list.
    index: u16,
    device: Device,
    /// Which of the processor's.
    twin: u16,
}

impl Part {
    /// What the nodes of a list have. Numbers follow from the devices alone, so that each has the same
    /// name and folder whatever else is in the list.
    fn all(devices: &[Device]) -> Vec<Self> {
        let mut twins = 0;
        let one = |(index, &device): (usize, &Device)| {
            let twin = if device == Device::Cpu { twins } else { 0 };
            twins += u16::from(device == Device::Cpu);
            Self { index: index as u16, device, twin }
        };
        devices.iter().enumerate().map(one).collect()
    }

    /// `cuda2`, `cpu0`: in names and folders.
    fn name(&self) -> String {
        match self.device {
            Device::Cuda(n) => format!("cuda{n}"),
            _ => format!("cpu{}", self.twin),
        }
    }

    /// The number of its membership.
    fn seat(&self) -> u16 {
        match self.device {
            Device::Cuda(n) => n + 1,
            _ => 65 + self.twin,
        }
    }

    /// Its folder.
    fn dir(&self, config: &Config) -> PathBuf {
        config.dir.join("devices").join(self.name())
    }

    /// As the variable carries it.
    fn to_text(self) -> String {
        format!("{}/{}/{}/{}", std::process::id(), self.index, self.device, self.twin)
    }

    /// Back from there, and the process that wrote it.
    fn parse(text: &str) -> Option<(i32, Self)> {
        let mut parts = text.split('/');
        let pid = parts.next()?.parse().ok()?;
        let index = parts.next()?.parse().ok()?;
        let device = parts.next()?.parse().ok()?;
        let twin = parts.next()?.parse().ok()?;
        Some((pid, Self { index, device, twin }))
    }

    /// The settings of its node.
    fn config(&self, mut config: Config) -> anyhow::Result<Config> {
        let shifted = |port: u16| {
            let to = port.checked_add(self.index);
            to.with_context(|| format!("there is no port {} above {port}", self.index))
        };
        config.dir = self.dir(&config);
        config.name = format!("{}-{}", config.name, self.name());
        config.token = None;
        config.torch = config.torch.on(self.device);
        if !config.next_free_port && config.listen.port() != 0 {
            config.listen.set_port(shifted(config.listen.port())?);
        }
        if let Some((host, port)) = config.advertise.as_deref().and_then(|a| a.rsplit_once(':'))
            && let Ok(port) = port.parse::<u16>()
        {
            config.advertise = Some(format!("{host}:{}", shifted(port)?));
        }
        Ok(config)
    }
}

/// What this process is to do.
#[derive(Debug)]
pub enum Task {
    /// Be a node.
    Node(Box<Config>),
    /// Start one for each of these.
    Supervise(Box<Config>, Vec<Device>),
}

/// What the settings ask for; in a process that was started for one device, its node.
///
/// # Errors
/// If they name devices that are not there, or an engine that knows of none.
pub fn task(mut config: Config) -> anyhow::Result<Task> {
    engines::check(config.engine, &config.torch)?;
    config.torch = engines::torch_options(config.engine, config.torch)?;
    let Some(Device::Several(devices)) = config.torch.device else {
        return Ok(Task::Node(Box::new(config)));
    };
    if let Ok(text) = std::env::var(env::NODE_PART) {
        let (parent, part) =
            Part::parse(&text).with_context(|| format!("{}: '{text}'", env::NODE_PART))?;
        // Where that has ended already, nobody sends the signal any more.
        set_pdeathsig(Signal::SIGTERM)?;
        ensure!(getppid() == Pid::from_raw(parent), "the process that started this one has ended");
        return Ok(Task::Node(Box::new(part.config(config)?)));
    }
    let list = devices.list(engines::gpu_count).map_err(|e| named(devices, &e))?;
    match list[..] {
        [one] => {
            config.torch = config.torch.on(one);
            Ok(Task::Node(Box::new(config)))
        }
        _ => Ok(Task::Supervise(Box::new(config), list)),
    }
}

fn named(devices: Devices, message: &str) -> anyhow::Error {
    anyhow!("--device {devices}: {message}")
}

/// Runs a node for each device until they end.
///
/// # Errors
/// If the machine is refused, a process cannot be started, or none of them keeps running.
pub async fn supervise(config: Config, devices: &[Device]) -> anyhow::Result<()> {
    let parts = Part::all(devices);
    let machine = enrol::membership(&config).await?;
    for part in &parts {
        enrol::seat(&machine, part.seat(), &part.dir(&config)).await?;
    }
    let live = LiveIdentity::new(&machine.identity)?;
    if let Some(renewal) = machine.renewal {
        actix_rt::spawn(renewal.keep(machine.identity, live));
    }
    watch_over(&parts, &start).await
}

/// Starts the process of a device.
type Start = dyn Fn(&Part) -> anyhow::Result<Child>;

/// Keeps a process running for each device until they end. It is this one alone that systemd hears.
async fn watch_over(parts: &[Part], start: &Start) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(0u8);
    actix_rt::spawn(async move {
        terminated().await;
        supervisor::stopping("its nodes hand their layers over");
        let _ = stop.send(1);
        terminated().await;
        let _ = stop.send(2);
        std::future::pending::<()>().await;
    });
    supervisor::ready(&format!("runs a node for each of {} devices", parts.len()));
    actix_rt::spawn(supervisor::keep_watchdog());
    let running = Rc::new(Cell::new(parts.len()));
    let keep = |part: &Part| keep(*part, start, stopped.clone(), Rc::clone(&running));
    // The first that gives up ends the others with it: who started this program starts it again.
    futures::future::try_join_all(parts.iter().map(keep)).await.map(drop)
}

/// Keeps the process of one device running.
async fn keep(
    part: Part,
    start: &Start,
    mut stopped: watch::Receiver<u8>,
    running: Rc<Cell<usize>>,
) -> anyhow::Result<()> {
    let mut pause = PAUSE[0];
    loop {
        let started = Instant::now();
        let why = match start(&part) {
            // What is short now (memory, processes) may not be later.
            Err(e) => format!("could not be started: {e:#}"),
            Ok(mut child) => {
                tracing::info!(device = %part.device, pid = child.id(), "node started");
                let ended = tokio::select! {
                    ended = child.wait() => ended.map(Some),
                    () = asked(&mut stopped, 1) => Ok(None),
                };
                let Some(status) = ended.context("waiting for a node")? else {
                    return end(&part, child, &mut stopped).await;
                };
                if status.success() {
                    tracing::info!(device = %part.device, "node ended, as it was told to");
                    running.set(running.get() - 1);
                    return Ok(());
                }
                why(status)
            }
        };
        running.set(running.get() - 1);
        let fared_well = started.elapsed() > FARED_WELL;
        pause = if fared_well { PAUSE[0] } else { pause };
        tracing::error!(
            device = %part.device, "node {why}: the others go on; it starts again in {pause:?}"
        );
        // Those that fared well may have died of one cause, and start again.
        ensure!(
            running.get() > 0 || fared_well,
            "no node is left: the last, on {}, {why}",
            part.device
        );
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = asked(&mut stopped, 1) => return Ok(()),
        }
        pause = (pause * 2).min(PAUSE[1]);
        running.set(running.get() + 1);
    }
}

fn why(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        _ => "ended".to_owned(),
    }
}

/// This program again. A terminal's Ctrl-C is passed on like any signal, so none of them gets it twice.
fn start(part: &Part) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("this program's own file")?;
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).env(env::NODE_PART, part.to_text());
    command.env_remove(env::TOKEN);
    alone(&mut command);
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

/// A process that signals reach through this one alone, and that has nothing to say to systemd: that
/// one node is ready, or stops, is not so of the others.
fn alone(command: &mut Command) {
    command.process_group(0).kill_on_drop(true);
    for variable in supervisor::VARIABLES {
        command.env_remove(variable);
    }
}

/// Completes when the end was asked for so often.
async fn asked(stopped: &mut watch::Receiver<u8>, times: u8) {
    if stopped.wait_for(|&asked| asked >= times).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Lets a process hand over its layers; asked twice, or where it takes too long, it is killed.
async fn end(
    part: &Part,
    mut child: Child,
    stopped: &mut watch::Receiver<u8>,
) -> anyhow::Result<()> {
    if let Some(pid) = child.id() {
        // One that has just ended is waited for all the same.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
    }
    let in_time = tokio::select! {
        ended = child.wait() => { ended?; true }
        () = tokio::time::sleep(END) => false,
        () = asked(stopped, 2) => false,
    };
    if !in_time {
        tracing::warn!(device = %part.device, "node did not end in time: it is killed");
        child.kill().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::SocketAddr;
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;

    use millrace_shared::options::{EngineKind, TorchOptions};

    use super::*;

    fn config() -> Config {
        Config {
            drains: true,
            dir: "/d".into(),
            cache: "/c".into(),
            token: None,
            coordinator: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 9000)),
            next_free_port: false,
            advertise: Some("gpu1:7000".to_owned()),
            name: "gpu1".to_owned(),
            weights: None,
            threads: None,
            nodes_in_process: 1,
            memory_bytes: None,
            engine: EngineKind::Torch,
            torch: TorchOptions::default(),
            require_kv_dtype: None,
            require_activation_dtype: None,
            show_progress: false,
        }
    }

    #[test]
    fn every_device_has_a_name_a_folder_and_a_port_of_its_own() {
        let parts = Part::all(&[Device::Cuda(2), Device::Cuda(5), Device::Cpu, Device::Cpu]);
        let seats: Vec<u16> = parts.iter().map(Part::seat).collect();
        assert_eq!(seats, [3, 6, 65, 66]);
        for part in &parts {
            let parsed = Part::parse(&part.to_text());
            assert_eq!(parsed, Some((std::process::id().cast_signed(), *part)));
        }
        let of = |part: &Part| {
            let c = part.config(config()).unwrap();
            (c.name, c.dir.display().to_string(), c.listen.port(), c.advertise, c.torch.device())
        };
        let own = |name: &str, port: u16, device| {
            let name = name.to_owned();
            let dir = format!("/d/devices/{}", &name[5..]);
            (name, dir, 9000 + port, Some(format!("gpu1:{}", 7000 + port)), device)
        };
        assert_eq!(of(&parts[1]), own("gpu1-cuda5", 1, Device::Cuda(5)));
        assert_eq!(of(&parts[3]), own("gpu1-cpu1", 3, Device::Cpu));
        let high = Config { listen: SocketAddr::from(([0, 0, 0, 0], u16::MAX)), ..config() };
        assert!(parts[1].config(high).unwrap_err().to_string().contains("no port 1 above 65535"));
        for bad in ["", "1", "x/0/cpu/0", "1/0/gpu/0"] {
            assert_eq!(Part::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn devices_are_the_torch_engines() {
        let torch = TorchOptions::default().on("cuda:all".parse().unwrap());
        let other = Config { engine: EngineKind::Cpu, torch, ..config() };
        assert!(task(other).unwrap_err().to_string().contains("add --engine torch"));
        let torch = TorchOptions::default().on("cpu,cpu".parse().unwrap());
        let Task::Supervise(_, devices) = task(Config { torch, ..config() }).unwrap() else {
            panic!("one node");
        };
        assert_eq!(devices, [Device::Cpu; 2]);
    }

    /// Says in a file that it was started, and by whom it may be heard, and each time it is told to
    /// end. The second dies once, the third ends as if it had been told to.
    const NODE: &str = r#"
        trap 'echo told >> "$LOG"; exit 0' TERM
        echo "started, heard by ${NOTIFY_SOCKET:-nobody}" >> "$LOG"
        case "$LOG" in
            *cpu1) test "$(grep -c started "$LOG")" = 1 && kill -KILL $$ ;;
            *cpu2) exit 0 ;;
        esac
        while :; do sleep 0.05; done"#;
    const FOLDER: &str = "FOLDER_OF_THE_TEST";

    fn log_of(folder: &Path, part: &Part) -> Vec<String> {
        let log = fs::read_to_string(folder.join(part.name())).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// In a process of its own, which this test starts: watches over three that are no nodes.
    fn be_the_first(parts: &[Part], folder: PathBuf) {
        let start = move |part: &Part| {
            let mut command = Command::new("sh");
            command.args(["-c", NODE]).env("LOG", folder.join(part.name()));
            alone(&mut command);
            command.spawn().context("sh")
        };
        actix_rt::System::new().block_on(watch_over(parts, &start)).unwrap();
    }

    /// A signal, a death and an end lead to one thing each, and systemd hears of all this once.
    #[test]
    fn each_is_told_once() {
        let parts = Part::all(&[Device::Cpu; 3]);
        if let Some(folder) = std::env::var_os(FOLDER) {
            return be_the_first(&parts, folder.into());
        }
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("systemd");
        let systemd = UnixDatagram::bind(&socket).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut first = std::process::Command::new(std::env::current_exe().unwrap());
        first.args(["--exact", "several::tests::each_is_told_once"]);
        first
            .env(FOLDER, folder.path())
            .env("NOTIFY_SOCKET", &socket)
            .env("WATCHDOG_USEC", "90000");
        let mut first = first.spawn().unwrap();
        let hear = || {
            let mut said = [0; 256];
            let n = systemd.recv(&mut said).expect("a word in time");
            String::from_utf8_lossy(&said[..n]).into_owned()
        };

        let mut said = vec![hear()];
        // The watchdog's words are a clock.
        let all_run = || {
            let starts = [1, 2, 1];
            parts.iter().zip(starts).all(|(part, n)| log_of(folder.path(), part).len() == n)
        };
        while !all_run() {
            said.push(hear());
        }
        kill(Pid::from_raw(first.id().cast_signed()), Signal::SIGTERM).unwrap();
        while !said.last().is_some_and(|s| s.contains("STOPPING=1")) {
            said.push(hear());
        }
        assert!(first.wait().unwrap().success());
        systemd.set_nonblocking(true).unwrap();
        let mut rest = [0; 256];
        while let Ok(n) = systemd.recv(&mut rest) {
            said.push(String::from_utf8_lossy(&rest[..n]).into_owned());
        }
        let times = |word: &str| said.iter().filter(|s| s.contains(word)).count();
        assert_eq!((times("READY=1"), times("STOPPING=1")), (1, 1), "{said:?}");
        let (started, told) = ("started, heard by nobody", "told");
        let logs: Vec<_> = parts.iter().map(|part| log_of(folder.path(), part)).collect();
        let expected = [&[started, told][..], &[started, started, told], &[started]];
        assert_eq!(logs, expected);
    }
}
