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
use millrace_coordinator::{Config, start};
use millrace_net::signals::terminated;
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
            Ok(config) => actix_rt::System::new().block_on(serve(config)),
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

async fn serve(config: Config) -> anyhow::Result<()> {
    let stages = config.stages;
    let running = start(config).await?;
    let uses = u32::from(stages.unwrap_or(16)).clamp(1, 1000);
    let token = create_token(&running.dir, uses, SERVE_TOKEN_LIFETIME)?;
    eprintln!(
        "HTTP     {}\nclients  {}/udp\nmembers  {}/udp\nfolder   {}\n\n\
         On every other machine ({uses} in all, within 24 hours), paste:\n",
        running.client().http,
        running.quic,
        running.cluster,
        running.dir.path.display(),
    );
    supervisor::ready("waiting for nodes");
    actix_rt::spawn(supervisor::keep_watchdog());
    eprintln!("  millrace-node run --coordinator {} --token {token}\n", running.client().quic);
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
