//! The `millrace-coordinator` binary: parse, run, exit code (0 clean, 1 failure, 2 usage,
//! 130 interrupted twice).
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::exit;
use std::time::Duration;

use millrace_coordinator::cli::{
    Cli, Command, PROGRAM, backup, create_token, init, key, restore, token,
};
use millrace_coordinator::paste::paste_lines;
use millrace_coordinator::state::CLIENT_FILE;
use millrace_coordinator::text::renderers;
use millrace_coordinator::{Config, Running, start};
use millrace_net::signals::terminated;
use millrace_net::telemetry::LogFormat;
use millrace_net::{supervisor, telemetry};
use millrace_shared::flags::parse_or_exit;

/// How long the token that `serve` prints is valid.
const SERVE_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

fn main() {
    if renderers::serve_if_asked() {
        return;
    }
    renderers::enable();
    let cli = parse_or_exit::<Cli>(PROGRAM);
    if let Err(message) = telemetry::init(cli.log_format) {
        eprintln!("error: {message}");
        exit(2);
    }
    let result = match cli.command {
        Command::Init(args) => init(&args).and_then(|text| print(&text)),
        Command::Token(command) => token(&command).and_then(|text| print(&text)),
        Command::Key(command) => key(&command).and_then(|text| print(&text)),
        Command::Backup(args) => backup(&args).and_then(|text| print(&text)),
        Command::Restore(args) => restore(&args).and_then(|text| print(&text)),
        Command::Serve(args) => match args.resolve() {
            Ok(config) => actix_rt::System::new().block_on(serve(config, cli.log_format)),
            Err(e) => Err(e),
        },
    };
    if let Err(e) = result {
        eprintln!("error: {e:#}");
        exit(1);
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// What to do on other machines. A log that a program collects is kept, and read by others: no token is
/// made for it.
fn how_to_join(
    running: &Running,
    stages: Option<u16>,
    log_format: LogFormat,
) -> anyhow::Result<String> {
    let quic = &running.client().quic;
    if log_format == LogFormat::Json {
        return Ok(format!(
            "Other machines join by 'millrace-node run --coordinator {quic}' with a token of \
             'millrace-coordinator token create'\n"
        ));
    }
    let uses = u32::from(stages.unwrap_or(16)).clamp(1, 1000);
    let token = create_token(&running.dir, uses, SERVE_TOKEN_LIFETIME)?;
    Ok(format!(
        "On every other machine ({uses} in all, within 24 hours), paste:\n\n  \
         millrace-node run --coordinator {quic} --token {token}\n"
    ))
}

async fn serve(config: Config, log_format: LogFormat) -> anyhow::Result<()> {
    let stages = config.stages;
    let running = start(config).await?;
    eprintln!(
        "HTTP     {}\nclients  {}/udp\nmembers  {}/udp\nfolder   {}\n\n{}",
        running.client().http,
        running.quic,
        running.cluster,
        running.dir.path.display(),
        how_to_join(&running, stages, log_format)?,
    );
    supervisor::ready("waiting for nodes");
    actix_rt::spawn(supervisor::keep_watchdog());
    let stop = terminated();
    tokio::pin!(stop);
    tokio::select! {
        ready = running.ready() => {
            ready?;
            supervisor::status("serving");
            if running.http.is_some() {
                let (file, ca) = (running.dir.path.join(CLIENT_FILE), running.own_ca());
                let url = &running.client().http;
                eprint!("\n{}", paste_lines(url, &running.served_name, &file, ca.as_deref()));
            }
            stop.await;
        }
        () = &mut stop => {}
    }
    supervisor::stopping("finishing what is in flight");
    eprintln!("stopping; once more to stop at once");
    actix_rt::spawn(async {
        terminated().await;
        exit(130);
    });
    running.stop().await;
    Ok(())
}
