//! From answers of the cluster to the figures on the screen. Pure: time comes with the answers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use millrace_shared::id::NodeId;
use millrace_shared::wire::rpc::{ClusterStatus, StageStatus};

use crate::serving::layers;

/// Looks that the curve shows.
const CURVE: usize = 240;

/// What the screen shows.
#[derive(Debug)]
pub(super) struct View {
    /// Of the coordinator.
    pub(super) address: String,
    /// Name that clients use; empty until known.
    pub(super) model: String,
    /// The last answer.
    pub(super) status: ClusterStatus,
    /// Whether somebody sits before it, with keys.
    pub(super) watched: bool,
    /// Why there is no newer one, and how old it is.
    pub(super) trouble: Option<(String, Option<Duration>)>,
    /// Rates between the last two answers.
    pub(super) rates: Rates,
    /// The stages.
    pub(super) stages: Vec<Stage>,
    /// Tokens a second, oldest first.
    pub(super) curve: VecDeque<u64>,
    last: Option<Instant>,
}

/// What happened a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    /// Tokens generated.
    pub(super) tokens: f64,
    /// Prompt tokens computed.
    pub(super) prompts: f64,
    /// Share of prompt tokens that the prefix cache had.
    pub(super) cached: Option<f64>,
    /// Share of drafts that were right.
    pub(super) accepted: Option<f64>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stage {
    pub(super) node: String,
    pub(super) layers: String,
    /// Share of its threads' time inside steps; `None` where it has just begun.
    pub(super) busy: Option<f64>,
    /// Steps a second.
    pub(super) steps: f64,
    pub(super) threads: u32,
    /// Seconds to the next stage and back.
    pub(super) round_trip: Option<f64>,
    /// Frames that the way to the next stage may hold.
    pub(super) credits: u32,
}

impl View {
    pub(super) fn new(address: &str, model: &str) -> Self {
        Self {
            address: address.to_owned(),
            model: model.to_owned(),
            status: ClusterStatus::default(),
            watched: true,
            trouble: None,
            rates: Rates::default(),
            stages: Vec::new(),
            curve: VecDeque::new(),
            last: None,
        }
    }

    /// An answer.
    pub(super) fn take(&mut self, (now, status): (Instant, ClusterStatus)) {
        let seconds = self.last.map(|then| now.saturating_duration_since(then).as_secs_f64());
        let before = seconds.filter(|s| *s > 0.0).map(|s| (s, &self.status));
        self.rates = before.map_or_else(Rates::default, |(s, old)| rates(s, old, &status));
        self.stages = status.stages.iter().map(|stage| compare(stage, before)).collect();
        if before.is_some() {
            self.curve.push_back(self.rates.tokens.round() as u64);
            while self.curve.len() > CURVE {
                self.curve.pop_front();
            }
        }
        (self.status, self.trouble, self.last) = (status, None, Some(now));
    }

    /// No answer came.
    pub(super) fn miss(&mut self, now: Instant, why: String) {
        let age = self.last.map(|then| now.saturating_duration_since(then));
        self.trouble = Some((why, age));
    }
}

fn rates(seconds: f64, old: &ClusterStatus, new: &ClusterStatus) -> Rates {
    // A coordinator that was started anew counts from 0.
    let more = |old: u64, new: u64| new.saturating_sub(old) as f64;
    let share = |part: f64, all: f64| (all > 0.0).then(|| part / all);
    Rates {
        tokens: more(old.generation_tokens, new.generation_tokens) / seconds,
        prompts: more(old.prompt_tokens, new.prompt_tokens) / seconds,
        cached: share(
            more(old.prefix_hit_tokens, new.prefix_hit_tokens),
            more(old.prefix_query_tokens, new.prefix_query_tokens),
        ),
        accepted: share(
            more(old.draft_tokens_accepted, new.draft_tokens_accepted),
            more(old.draft_tokens, new.draft_tokens),
        ),
    }
}

fn compare(stage: &StageStatus, before: Option<(f64, &ClusterStatus)>) -> Stage {
    let same =
        |id: NodeId, first: u32| move |s: &&StageStatus| s.node_id == id && s.first_layer == first;
    let of_before = before.and_then(|(seconds, status)| {
        let old = status.stages.iter().find(same(stage.node_id, stage.first_layer))?;
        // A stage that was loaded anew counts from 0.
        (old.steps <= stage.steps && old.wall_seconds <= stage.wall_seconds)
            .then_some((seconds, old))
    });
    let busy = of_before.and_then(|(_, old)| {
        let all = (stage.wall_seconds - old.wall_seconds) * f64::from(stage.threads.max(1));
        (all > 0.0).then(|| ((stage.busy_seconds - old.busy_seconds) / all).clamp(0.0, 1.0))
    });
    let steps = of_before.map_or(0.0, |(s, old)| (stage.steps - old.steps) as f64 / s);
    Stage {
        node: stage.node_name.clone(),
        layers: layers(stage),
        busy,
        steps,
        threads: stage.threads,
        round_trip: stage.round_trip,
        credits: stage.credits,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A cluster of three stages after so many looks, a second apart.
    pub(in crate::top) fn cluster(looks: u64) -> ClusterStatus {
        let stage = |i: u32, busy: f64| StageStatus {
            node_id: NodeId(uuid::Uuid::from_u128(u128::from(i))),
            node_name: format!("gpu-{i}"),
            first_layer: i * 10,
            end_layer: i * 10 + 10,
            embed: i == 0,
            head: i == 2,
            weight_bytes: 1 << 30,
            busy_seconds: busy * 4.0 * looks as f64,
            wall_seconds: looks as f64,
            process_seconds: 1.0,
            steps: 100 * looks,
            threads: 4,
            rows_left_out: 0,
            credits: 3,
            round_trip: (i < 2).then_some(0.000_31),
        };
        ClusterStatus {
            ready: true,
            epoch: 3,
            stages: vec![stage(0, 0.9), stage(1, 0.55), stage(2, 0.4)],
            nodes: 4,
            running: 12,
            waiting: 3,
            kv_blocks: 512,
            kv_blocks_used: 220,
            kv_block_size: 16,
            prompt_tokens: 500 * looks,
            generation_tokens: 1200 * looks,
            prefix_query_tokens: 100 * looks,
            prefix_hit_tokens: 40 * looks,
            ..ClusterStatus::default()
        }
    }

    pub(in crate::top) fn after_two_looks() -> View {
        let mut view = View::new("10.0.0.1:8001", "smollm2:135m");
        let start = Instant::now();
        view.take((start, cluster(1)));
        view.take((start + Duration::from_secs(1), cluster(2)));
        view
    }

    #[test]
    fn rates_are_those_between_two_answers() {
        let view = after_two_looks();
        assert_eq!((view.rates.tokens, view.rates.prompts), (1200.0, 500.0));
        assert_eq!((view.rates.cached, view.rates.accepted), (Some(0.4), None));
        let busy: Vec<_> = view.stages.iter().map(|s| (s.busy.unwrap() * 100.0).round()).collect();
        assert_eq!(busy, [90.0, 55.0, 40.0]);
        assert_eq!(view.stages[0].steps, 100.0);
    }

    #[test]
    fn counters_that_begin_again_are_no_negative_rates() {
        let mut view = after_two_looks();
        view.take((Instant::now() + Duration::from_secs(9), cluster(0)));
        assert_eq!(view.rates.tokens, 0.0);
        assert_eq!(view.stages[0].busy, None);
    }
}
