//! The `millrace-node` binary: parse, run, exit code (0 clean, 1 failure, 2 usage, 130 interrupted
//! twice).
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::process::exit;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use millrace_net::signals::terminated;
use millrace_net::{supervisor, telemetry};
use millrace_node::cli::{Cli, Command, PROGRAM};
use millrace_node::probe::probe;
use millrace_node::several::{self, Task};
use millrace_node::{Config, enrol, start};
use millrace_shared::flags::parse_or_exit;

/// Longest hand-over before the end: below what the service unit in deploy/systemd waits.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

fn main() {
    let cli = parse_or_exit::<Cli>(PROGRAM);
    if let Err(message) = telemetry::init(cli.log_format) {
        eprintln!("error: {message}");
        exit(2);
    }
    let result = match cli.command {
        Command::Run(args) => match args.resolve() {
            Ok(config) => several::task(config).and_then(|task| {
                actix_rt::System::new().block_on(async {
                    match task {
                        Task::Node(config) => run(*config).await,
                        Task::Supervise(config, devices) => {
                            let _lock = lock(&config)?;
                            several::supervise(*config, &devices).await
                        }
                    }
                })
            }),
            Err(e) => Err(e),
        },
        Command::Probe(args) => {
            probe(&args).and_then(|text| writeln!(std::io::stdout(), "{text}").map_err(Into::into))
        }
    };
    if let Err(e) = result {
        eprintln!("error: {e:#}");
        exit(1);
    }
}

/// Two nodes with one identity would fight for the coordinator's link.
fn lock(config: &Config) -> anyhow::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.dir)
        .with_context(|| config.dir.display().to_string())?;
    let path = config.dir.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    file.try_lock().map_err(|_| {
        anyhow!(
            "{} is in use by another millrace-node: give each node on a host its own --dir",
            config.dir.display()
        )
    })?;
    Ok(file)
}

async fn run(config: Config) -> anyhow::Result<()> {
    let _lock = lock(&config)?;
    let membership = enrol::membership(&config).await?;
    let mut running = start(config, membership).await?;
    supervisor::ready("a member of the cluster");
    actix_rt::spawn(supervisor::keep_watchdog());
    let told = running.told_to_drain();
    tokio::select! {
        reason = running.refused() => return Err(anyhow!("the coordinator refuses this node: {reason}")),
        () = told => {}
        () = terminated() => {}
    }
    supervisor::stopping("handing its layers over");
    eprintln!("handing the layers over, then stopping; once more to stop at once");
    actix_rt::spawn(async {
        terminated().await;
        exit(130);
    });
    if let Some(trouble) = running.drain(DRAIN_LIMIT).await {
        eprintln!("leaving with the layers: {trouble}");
    }
    running.stop().await;
    Ok(())
}
