//! What a run under load came to, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::super::serve::Moment;
use super::tally::Tally;
use super::{Arrivals, Lengths};
use crate::table::Align::{Left, Right};
use crate::table::{Table, figure};

/// Points of a distribution that are drawn.
const POINTS: u32 = 200;

/// What was measured, and how.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) stages: usize,
    /// `quic` or `http`.
    pub(super) over: &'static str,
    pub(super) prompt_tokens: Lengths,
    pub(super) max_tokens: Lengths,
    pub(super) seed: u64,
    pub(super) slo_ttft_ms: f64,
    pub(super) slo_itl_ms: f64,
    pub(super) results: Vec<Level>,
}

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Level {
    /// Requests a second that were offered; absent in a closed loop.
    pub(super) rate: Option<f64>,
    /// Clients of a closed loop.
    pub(super) clients: Option<u32>,
    pub(super) wall_s: f64,
    pub(super) sent: u64,
    pub(super) answered: u64,
    /// Told to come back later: 429, `RESOURCE_EXHAUSTED`.
    pub(super) refused: u64,
    /// Anything else but a whole answer.
    pub(super) failed: u64,
    /// Reasons of both, and how often.
    pub(super) reasons: BTreeMap<String, u64>,
    pub(super) most_in_flight: u32,
    pub(super) requests_per_s: f64,
    pub(super) tokens: u64,
    pub(super) tokens_per_s: f64,
    /// Requests a second that kept both bounds.
    pub(super) goodput_per_s: f64,
    /// Those of all that were sent.
    pub(super) good_share: f64,
    pub(super) ttft_ms: Percentiles,
    pub(super) inter_token_ms: Percentiles,
    pub(super) end_to_end_ms: Percentiles,
    /// Processor time for each token, microseconds; absent where the pipeline changed meanwhile, or
    /// all of it runs in this process.
    pub(super) coordinator_us_per_token: Option<f64>,
    pub(super) nodes_us_per_token: Option<f64>,
    pub(super) clients_us_per_token: f64,
    /// By second from the start: tokens, and requests under way.
    pub(super) tokens_by_second: Vec<u64>,
    pub(super) in_flight_by_second: Vec<u32>,
    /// For the drawing: at each share, milliseconds.
    #[serde(skip)]
    pub(super) ttft_curve: Vec<(f64, f64)>,
    #[serde(skip)]
    pub(super) gap_curve: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: Option<f64>,
    pub(super) p90: Option<f64>,
    pub(super) p99: Option<f64>,
    pub(super) max: Option<f64>,
}

impl Percentiles {
    fn of(us: &Histogram<u64>) -> Self {
        let some = |value: u64| (!us.is_empty()).then_some(value as f64 / 1e3);
        let at = |q| some(us.value_at_quantile(q));
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: some(us.max()) }
    }
}

/// Milliseconds below which each share lies.
fn curve(us: &Histogram<u64>) -> Vec<(f64, f64)> {
    if us.is_empty() {
        return Vec::new();
    }
    let share = |n| f64::from(n) / f64::from(POINTS);
    (0..=POINTS).map(|n| (us.value_at_quantile(share(n)) as f64 / 1e3, share(n))).collect()
}

impl Level {
    pub(super) fn new(arrivals: Arrivals, tally: Tally, before: &Moment, after: &Moment) -> Self {
        let wall_s = after.since(before).as_secs_f64();
        let per_s = |count: u64| count as f64 / wall_s;
        let tokens = tally.tokens.max(1) as f64;
        let us_per_token = |seconds: f64| seconds * 1e6 / tokens;
        let spent = after.spent_since(before);
        let (rate, clients) = match arrivals {
            Arrivals::Open(rate) => (Some(rate), None),
            Arrivals::Closed(clients) => (None, Some(clients)),
        };
        Self {
            rate,
            clients,
            wall_s,
            sent: tally.sent,
            answered: tally.answered,
            refused: tally.refused,
            failed: tally.failed,
            most_in_flight: tally.most_in_flight,
            requests_per_s: per_s(tally.answered),
            tokens: tally.tokens,
            tokens_per_s: per_s(tally.tokens),
            goodput_per_s: per_s(tally.good),
            good_share: tally.good as f64 / tally.sent.max(1) as f64,
            ttft_ms: Percentiles::of(&tally.ttft),
            inter_token_ms: Percentiles::of(&tally.gaps),
            end_to_end_ms: Percentiles::of(&tally.whole),
            coordinator_us_per_token: spent.cluster.map(|(head, _)| us_per_token(head)),
            nodes_us_per_token: spent.cluster.map(|(_, nodes)| us_per_token(nodes)),
            clients_us_per_token: us_per_token(spent.own),
            tokens_by_second: tally.seconds.iter().map(|s| s.tokens).collect(),
            in_flight_by_second: tally.seconds.iter().map(|s| s.in_flight).collect(),
            ttft_curve: curve(&tally.ttft),
            gap_curve: curve(&tally.gaps),
            reasons: tally.reasons,
        }
    }

    /// What it is called.
    pub(super) fn name(&self) -> String {
        match (self.rate, self.clients) {
            (Some(rate), _) => format!("{rate}/s"),
            (None, clients) => format!("{} clients", clients.unwrap_or(0)),
        }
    }
}

impl Report {
    fn counts(&self) -> Table {
        let names = [
            "sent",
            "answered",
            "refused",
            "failed",
            "most at once",
            "requests/s",
            "tokens/s",
            "goodput/s",
            "good",
        ];
        let mut columns = vec![("load", Left)];
        columns.extend(names.map(|name| (name, Right)));
        let mut table = Table::new(&columns);
        for level in &self.results {
            table.row([
                level.name(),
                level.sent.to_string(),
                level.answered.to_string(),
                level.refused.to_string(),
                level.failed.to_string(),
                level.most_in_flight.to_string(),
                format!("{:.2}", level.requests_per_s),
                figure(Some(level.tokens_per_s)),
                format!("{:.2}", level.goodput_per_s),
                format!("{:.1}%", level.good_share * 100.0),
            ]);
        }
        table
    }

    fn times(&self) -> Table {
        let mut table = Table::new(&[
            ("load", Left),
            ("milliseconds", Left),
            ("p50", Right),
            ("p90", Right),
            ("p99", Right),
            ("most", Right),
        ]);
        for level in &self.results {
            let rows = [
                ("to the first token", level.ttft_ms),
                ("between tokens", level.inter_token_ms),
                ("whole answer", level.end_to_end_ms),
            ];
            for (name, at) in rows {
                let cells = [at.p50, at.p90, at.p99, at.max].map(figure);
                table.row([vec![level.name(), name.to_owned()], cells.to_vec()].concat());
            }
        }
        table
    }

    fn spent(&self) -> Table {
        let mut table = Table::new(&[
            ("load", Left),
            ("processor us a token: coordinator", Right),
            ("nodes", Right),
            ("clients", Right),
        ]);
        for level in &self.results {
            table.row([
                level.name(),
                figure(level.coordinator_us_per_token),
                figure(level.nodes_us_per_token),
                figure(Some(level.clients_us_per_token)),
            ]);
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {} stage(s), over {}, prompts of {} tokens, answers of {}, seed {}; good: first \
             token within {} ms, {} ms between tokens\n",
            self.model,
            self.stages,
            self.over.to_uppercase(),
            self.prompt_tokens,
            self.max_tokens,
            self.seed,
            self.slo_ttft_ms,
            self.slo_itl_ms
        )?;
        write!(f, "{}\n{}\n{}", self.counts(), self.times(), self.spent())?;
        for level in &self.results {
            for (why, times) in &level.reasons {
                write!(f, "\n{}: {times} x {why}", level.name())?;
            }
        }
        if self.results.iter().any(|l| !l.reasons.is_empty()) {
            writeln!(f)?;
        }
        Ok(())
    }
}
