//! `millrace bench serve --rate` and `--duration`: load for a time, and whether what was promised
//! was kept.
//!
//! An *open loop* sends requests at random times (a Poisson process), however the cluster fares, as
//! users do; a closed one keeps a number of clients busy. Times count from when a request was due.
//! Refusals are counted apart from errors. One thread, one task: what clients take is reported too.

mod caller;
mod http;
mod lengths;
mod plot;
mod progress;
mod report;
mod tally;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use clap::Args;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use millrace_net::ulimits;

use self::caller::{Ask, Caller, Heard};
use self::lengths::Chance;
pub(super) use self::lengths::Lengths;
use self::progress::Progress;
use self::report::{Level, Report};
use self::tally::{Slo, Tally};
use super::pseudo_tokens;
use super::serve::{Moment, ServeArgs};
use crate::error::usage;
use crate::output::{self, TableOrJson};
use crate::target::{self, Needs, Session};

/// Longest wait for answers after the last request was sent.
const DRAIN: Duration = Duration::from_secs(120);
/// Seconds of an open loop where nothing is said.
const DURATION: f64 = 60.0;
/// Between the first requests of two clients: handshakes are paced at the server.
const STAGGER: Duration = Duration::from_millis(10);
/// How long a client of a closed loop waits after it was turned away.
const BACK_OFF: Duration = Duration::from_millis(500);
/// Between looks at how far the run is.
const LOOK: Duration = Duration::from_millis(250);

/// Flags of load for a time.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load for a time")]
pub(super) struct LoadArgs {
    /// Requests a second that come at random times (Poisson), whether or not answers keep up; one
    /// run each
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = rate, conflicts_with_all = ["concurrency", "mixed", "shared_prefix", "repeat_after"])]
    rate: Vec<f64>,
    /// Seconds in which requests are sent [default: 60 with --rate]; without --rate, --concurrency
    /// clients send theirs one after the other
    #[arg(long, value_name = "SECONDS", value_parser = seconds, conflicts_with_all = ["mixed", "shared_prefix", "repeat_after", "requests"])]
    duration: Option<f64>,
    /// Number from which arrivals and lengths are drawn
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Over the HTTP API instead of QUIC; one connection for each request under way, either way
    #[arg(long, conflicts_with_all = ["model", "mixed", "shared_prefix"])]
    http: bool,
    /// Milliseconds to the first token within which a request counts as good
    #[arg(long, value_name = "MS", default_value_t = 1000.0, value_parser = seconds)]
    slo_ttft: f64,
    /// Milliseconds between its tokens, on average, within which it does
    #[arg(long, value_name = "MS", default_value_t = 100.0, value_parser = seconds)]
    slo_itl: f64,
    /// Draw the runs: latencies, throughput over time
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|r| (0.001..=100_000.0).contains(r));
    rate.ok_or_else(|| format!("{text:?} is no number of requests a second, such as 2.5"))
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|s| (0.001..=1e7).contains(s));
    value.ok_or_else(|| format!("{text:?} is no positive number"))
}

impl LoadArgs {
    /// Whether load for a time is asked for.
    pub(super) fn is_asked(&self) -> bool {
        !self.rate.is_empty() || self.duration.is_some()
    }

    fn slo(&self) -> Slo {
        let ms = |ms: f64| Duration::from_secs_f64(ms / 1e3);
        Slo { ttft: ms(self.slo_ttft), itl: ms(self.slo_itl) }
    }

    /// What is wrong where it is not asked for.
    ///
    /// # Errors
    /// If a flag is given that only load for a time knows.
    pub(super) fn refuse(&self) -> anyhow::Result<()> {
        if self.http || self.svg.is_some() {
            return Err(usage("--http and --svg go with --rate or --duration"));
        }
        Ok(())
    }
}

/// How requests come in one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arrivals {
    /// So many a second, at random.
    Open(f64),
    /// From so many clients, each one after the other.
    Closed(u32),
}

pub(super) async fn run(args: &ServeArgs) -> anyhow::Result<()> {
    ulimits::prepare();
    let runs: Vec<Arrivals> = match args.load.rate.as_slice() {
        [] => args.concurrency.iter().map(|n| Arrivals::Closed(*n)).collect(),
        rates => rates.iter().map(|r| Arrivals::Open(*r)).collect(),
    };
    let most = args.concurrency.iter().copied().max().unwrap_or(1);
    let length = args.prompt_tokens.most().saturating_add(args.max_tokens.most());
    let requests = if args.load.rate.is_empty() { most } else { 64 };
    let needs = Needs { requests, positions: requests.checked_mul(length.next_multiple_of(64)) };
    let report = target::with_session(&args.target, needs, async |session| {
        measure(args, session, &runs).await
    })
    .await?;
    if let Some(path) = &args.load.svg {
        std::fs::write(path, plot::page(&report)).with_context(|| path.display().to_string())?;
    }
    match args.output {
        TableOrJson::Json => output::json(&report),
        TableOrJson::Table => output::write(&report),
    }
}

async fn measure(args: &ServeArgs, session: &Session, runs: &[Arrivals]) -> anyhow::Result<Report> {
    let model = session.model().await?;
    let place = match args.load.http {
        true => {
            let (url, key) = session.http();
            Some(http::Place::new(url, key, &model.id)?)
        }
        false => None,
    };
    // A running cluster may still hold the prompts of an earlier run.
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let prompts = Cell::new(since.as_secs() << 20);
    let load = Load { args, session, place, vocab: model.vocab, prompts };
    load.warm_up().await?;
    let mut levels = Vec::new();
    for &arrivals in runs {
        let before = Moment::now(session).await?;
        let tally = load.run(arrivals).await?;
        let after = Moment::now(session).await?;
        levels.push(Level::new(arrivals, tally, &before, &after));
    }
    Ok(Report {
        model: model.id,
        stages: session.status().await?.stages.len(),
        over: if args.load.http { "http" } else { "quic" },
        prompt_tokens: args.prompt_tokens,
        max_tokens: args.max_tokens,
        seed: args.load.seed,
        slo_ttft_ms: args.load.slo_ttft,
        slo_itl_ms: args.load.slo_itl,
        results: levels,
    })
}

/// Runs against one cluster.
struct Load<'a> {
    args: &'a ServeArgs,
    session: &'a Session,
    place: Option<http::Place>,
    vocab: u32,
    /// Number of the last prompt: none is sent twice, so no cache can help.
    prompts: Cell<u64>,
}

impl Load<'_> {
    fn ask(&self, chance: &mut Chance) -> Ask {
        self.prompts.set(self.prompts.get() + 1);
        let length = self.args.prompt_tokens.draw(chance) as usize;
        let prompt = pseudo_tokens(self.prompts.get(), length, self.vocab);
        Ask { prompt, max_tokens: self.args.max_tokens.draw(chance) }
    }

    async fn connect(&self) -> anyhow::Result<Caller> {
        Caller::connect(self.session, self.place.as_ref()).await
    }

    /// A request whose times do not count; what is wrong with all of them shows here.
    async fn warm_up(&self) -> anyhow::Result<()> {
        let tally = RefCell::new(Tally::new(self.args.load.slo())?);
        let ask = self.ask(&mut Chance::new(self.args.load.seed));
        tally.borrow_mut().send();
        let heard = Heard::new(&tally, Instant::now(), ask.max_tokens);
        self.connect().await?.ask(ask, heard).await;
        let tally = tally.into_inner();
        match tally.reasons.into_keys().next() {
            Some(why) => Err(anyhow::anyhow!("the first request {why}")),
            None => Ok(()),
        }
    }

    async fn run(&self, arrivals: Arrivals) -> anyhow::Result<Tally> {
        let tally = RefCell::new(Tally::new(self.args.load.slo())?);
        let total = match (self.args.load.duration, self.args.requests) {
            (None, Some(requests)) => progress::Total::Requests(requests.into()),
            (seconds, _) => progress::Total::Seconds(seconds.unwrap_or(DURATION)),
        };
        let mut progress = Progress::new(total);
        self.watched(arrivals, total, &tally, &mut progress).await;
        progress.end(&tally.borrow());
        let mut tally = tally.into_inner();
        for _ in 0..tally.in_flight {
            tally.failed(format!("no whole answer within {DRAIN:?} of the last request"));
        }
        Ok(tally)
    }

    async fn watched(
        &self,
        arrivals: Arrivals,
        total: progress::Total,
        tally: &RefCell<Tally>,
        progress: &mut Progress,
    ) {
        let work = async {
            match arrivals {
                Arrivals::Open(rate) => self.open(rate, total, tally).await,
                Arrivals::Closed(clients) => self.closed(clients, total, tally).await,
            }
        };
        let mut work = std::pin::pin!(work);
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                biased;
                () = &mut work => return,
                _ = look.tick() => progress.show(&tally.borrow()),
            }
        }
    }

    /// Requests at random times, each on a connection that no other uses meanwhile.
    async fn open(&self, rate: f64, total: progress::Total, tally: &RefCell<Tally>) {
        let idle: RefCell<Vec<Caller>> = RefCell::default();
        let mut chance = Chance::new(self.args.load.seed);
        let mut running = FuturesUnordered::new();
        let start = tally.borrow().start();
        let (mut sent, mut at) = (0, chance.gap(rate));
        let due = |at: f64| start + Duration::from_secs_f64(at);
        while total.allows(sent, at) {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due(at).into()) => {
                    let ask = self.ask(&mut chance);
                    running.push(self.once(ask, due(at), &idle, tally));
                    sent += 1;
                    at += chance.gap(rate);
                }
                Some(()) = running.next() => {}
            }
        }
        let rest = async { while running.next().await.is_some() {} };
        // What is late is told by who counts.
        let _ = tokio::time::timeout(DRAIN, rest).await;
    }

    async fn once(
        &self,
        ask: Ask,
        due: Instant,
        idle: &RefCell<Vec<Caller>>,
        tally: &RefCell<Tally>,
    ) {
        tally.borrow_mut().send();
        let heard = Heard::new(tally, due, ask.max_tokens);
        let waiting = idle.borrow_mut().pop();
        let caller = match waiting {
            Some(caller) => Ok(caller),
            None => self.connect().await,
        };
        match caller {
            Err(e) => heard.close(Err(e.into())),
            Ok(mut caller) => {
                if caller.ask(ask, heard).await {
                    idle.borrow_mut().push(caller);
                }
            }
        }
    }

    /// Clients that each send a request when they have an answer.
    async fn closed(&self, clients: u32, total: progress::Total, tally: &RefCell<Tally>) {
        let start = tally.borrow().start();
        let client = |number: u32| async move {
            tokio::time::sleep(STAGGER * number).await;
            let mut chance = Chance::new(self.args.load.seed ^ (u64::from(number) << 32));
            let mut caller = None;
            while total.allows(0, start.elapsed().as_secs_f64()) {
                let ask = self.ask(&mut chance);
                let refused = tally.borrow().refused;
                tally.borrow_mut().send();
                let heard = Heard::new(tally, Instant::now(), ask.max_tokens);
                let mut connected = match caller.take() {
                    Some(caller) => caller,
                    None => match self.connect().await {
                        Ok(caller) => caller,
                        Err(e) => {
                            heard.close(Err(e.into()));
                            tokio::time::sleep(BACK_OFF).await;
                            continue;
                        }
                    },
                };
                if connected.ask(ask, heard).await {
                    caller = Some(connected);
                }
                if caller.is_none() || tally.borrow().refused > refused {
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
        };
        let running = join_all((0..clients).map(client));
        let seconds = self.args.load.duration.unwrap_or(DURATION);
        let _ = tokio::time::timeout(Duration::from_secs_f64(seconds) + DRAIN, running).await;
    }
}
