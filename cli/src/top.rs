//! `millrace top`: a running cluster on one screen, once a second, by the QUIC API's `Status`.
//!
//! What it asks for any key may ask. Shares and rates are those between the last two answers; the
//! first screen has none. [`view`] turns two answers into figures, [`draw`] paints them: neither
//! talks to anybody. Where stdout is no terminal, or with `--once`, one screen is printed as text.

mod draw;
mod view;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use millrace_shared::wire::rpc::ClusterStatus;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use tokio::sync::mpsc;

use self::view::View;
use crate::output;
use crate::target::{RunningArgs, Session};

/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(3);
/// The screen of `--once`.
const SIZE: (u16, u16) = (80, 24);

/// Flags of `top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print one screen as text, and end
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(args: TopArgs) -> anyhow::Result<()> {
    let session = Session::connect(&args.running).await?;
    let interval = Duration::from_secs(args.interval);
    let result = if args.once || !std::io::stdout().is_terminal() {
        once(&session, interval).await
    } else {
        let mut terminal = ratatui::try_init()?;
        let result = watch(&session, interval, &mut terminal).await;
        ratatui::restore();
        result
    };
    session.close().await;
    result
}

/// An answer and when it came.
async fn look(session: &Session) -> anyhow::Result<(Instant, ClusterStatus)> {
    let status = session.status_within(PATIENCE).await?;
    Ok((Instant::now(), status))
}

async fn once(session: &Session, interval: Duration) -> anyhow::Result<()> {
    let mut view =
        View::new(session.address(), &session.model().await.map(|m| m.id).unwrap_or_default());
    view.watched = false;
    view.take(look(session).await?);
    tokio::time::sleep(interval).await;
    view.take(look(session).await?);
    let mut terminal = Terminal::new(TestBackend::new(SIZE.0, SIZE.1))?;
    terminal.draw(|frame| draw::draw(frame, &view))?;
    output::write(draw::text(terminal.backend().buffer()))
}

async fn watch(
    session: &Session,
    interval: Duration,
    terminal: &mut ratatui::DefaultTerminal,
) -> anyhow::Result<()> {
    let mut view = View::new(session.address(), "");
    let mut keys = keys()?;
    let mut turns = tokio::time::interval(interval);
    loop {
        tokio::select! {
            _ = turns.tick() => {
                // Waited for beside the keys: a cluster that is gone must not keep anybody.
                tokio::select! {
                    answer = look(session) => match answer {
                        Ok(answer) => view.take(answer),
                        Err(e) => view.miss(Instant::now(), format!("{e:#}")),
                    },
                    key = keys.recv() => if ends(key) { return Ok(()) },
                }
                if view.model.is_empty() {
                    view.model = session.model().await.map(|m| m.id).unwrap_or_default();
                }
            }
            key = keys.recv() => if ends(key) { return Ok(()) },
        }
        terminal.draw(|frame| draw::draw(frame, &view))?;
    }
}

/// Whether an event, or the end of events, ends the program.
fn ends(event: Option<Event>) -> bool {
    match event {
        None => true,
        Some(Event::Key(key)) => {
            let control = key.modifiers.contains(KeyModifiers::CONTROL);
            matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
                || (control && matches!(key.code, KeyCode::Char('c' | 'd')))
        }
        Some(_) => false,
    }
}

/// Keys and changes of size, read by a thread of their own, for reading blocks.
fn keys() -> std::io::Result<mpsc::Receiver<Event>> {
    let (sender, keys) = mpsc::channel(16);
    std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    })?;
    Ok(keys)
}
