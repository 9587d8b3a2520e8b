//! The epochs of one pipeline.
//!
//! ```text
//!           enough nodes           all profiled          order given          all ready
//!  Waiting ──────────────▶ Profiling ──────────▶ Planning ─────────▶ Assigning ─────────▶ Running
//!     ▲   Profile each         │      Plan           │     Assign        │      Start        │
//!     │                        │ node lost, timeout  │ cannot be cut     │ node or edge lost,│
//!     └────────────────────────┴─────────────────────┴───────────────────┴─ load failed ─────┘
//!     from Planning on: epoch + 1; from Assigning on: Release to the survivors; from Running: Stop
//! ```
//!
//! While an epoch runs, the next one may be made ready beside it, and takes over without a stop: see
//! `next`.
//!
//! Nodes are taken in the order in which they joined; the rest stand by. A node that cannot measure
//! or load is passed over for [`RETRY_NODE`]; a model that cannot be cut waits for other nodes.

mod next;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::id::{Epoch, NodeId};
use crate::wire::control::StageProfile;
use next::Next;
pub use types::{
    Action, CordonReason, FLAP_MEMORY, FLAPS, LOAD_TIMEOUT, PROFILE_TIMEOUT, PipelineConfig,
    PipelinePhase, RETRY_NODE, RETRY_PIPELINE,
};

#[derive(Clone, Debug)]
struct Candidate {
    order: u64,
    profile: Option<StageProfile>,
    suspect: bool,
    barred_until: Duration,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct PipelineState {
    config: PipelineConfig,
    phase: PipelinePhase,
    epoch: Epoch,
    /// The highest that was ever used.
    last_epoch: Epoch,
    /// What is made ready while this epoch runs.
    next: Option<Next>,
    nodes: BTreeMap<NodeId, Candidate>,
    /// Not to be used, whether there or not, and why.
    cordoned: BTreeSet<(NodeId, CordonReason)>,
    /// When nodes were lost: the last few times of each.
    losses: BTreeMap<NodeId, VecDeque<Duration>>,
    next_order: u64,
    /// The nodes of this attempt; from `Assigning` on in the order of the stages.
    chosen: Vec<NodeId>,
    ready: BTreeSet<NodeId>,
    /// End of patience in `Profiling` and `Assigning`.
    deadline: Option<Duration>,
    /// No try before.
    retry_at: Duration,
    /// The same nodes cannot be cut again.
    unplannable: bool,
    /// Why the last attempt ended.
    trouble: Option<String>,
    actions: VecDeque<Action>,
}

impl PipelineState {
    /// Waits for nodes; the first epoch is 1.
    pub fn new(config: PipelineConfig) -> Self {
        Self {
            config: PipelineConfig { stages: config.stages.max(1), ..config },
            phase: PipelinePhase::Waiting,
            epoch: Epoch(1),
            last_epoch: Epoch(1),
            next: None,
            nodes: BTreeMap::new(),
            cordoned: BTreeSet::new(),
            losses: BTreeMap::new(),
            next_order: 0,
            chosen: Vec::new(),
            ready: BTreeSet::new(),
            deadline: None,
            retry_at: Duration::ZERO,
            unplannable: false,
            trouble: None,
            actions: VecDeque::new(),
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> PipelinePhase {
        self.phase
    }

    /// The epoch that runs, or that is being formed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The nodes of the epoch; from `Assigning` on in the order of the stages.
    pub fn chosen(&self) -> &[NodeId] {
        &self.chosen
    }

    /// For people: what it waits for.
    pub fn detail(&self) -> String {
        let need = self.need();
        let state = match self.phase {
            PipelinePhase::Waiting => {
                format!("waiting for nodes: {} of {need} are there", self.nodes.len())
            }
            PipelinePhase::Profiling => "nodes are measuring".to_owned(),
            PipelinePhase::Planning => "the model is being cut".to_owned(),
            PipelinePhase::Assigning => {
                let all = self.chosen.len();
                format!("stages are loading: {} of {all} are ready", self.ready.len())
            }
            PipelinePhase::Running => match &self.next {
                None => return "running".to_owned(),
                Some(next) => next.detail(),
            },
        };
        match &self.trouble {
            Some(trouble) => format!("{state}; {trouble}"),
            None => state,
        }
    }

    /// A node is there.
    pub fn handle_joined(&mut self, node: NodeId, now: Duration) {
        let order = self.next_order;
        self.next_order += 1;
        let candidate =
            Candidate { order, profile: None, suspect: false, barred_until: Duration::ZERO };
        self.nodes.insert(node, candidate);
        self.unplannable = false;
        if self.phase == PipelinePhase::Running {
            // So that it is known what a cut with it would bring.
            self.actions.push_back(Action::Profile { node });
        }
        self.advance(now);
    }

    /// A node is taken out of use for a reason, or that reason is gone; others may be left. What
    /// runs on it runs on until the next cut.
    pub fn handle_cordon(
        &mut self,
        node: NodeId,
        reason: CordonReason,
        cordoned: bool,
        now: Duration,
    ) {
        if cordoned {
            self.cordoned.insert((node, reason));
            let early = matches!(self.phase, PipelinePhase::Profiling | PipelinePhase::Planning);
            let reason = format!("node {node} was cordoned");
            if early && self.chosen.contains(&node) {
                self.abort(reason, now);
            } else if self.next.as_ref().is_some_and(|n| n.is_early() && n.chosen.contains(&node)) {
                self.abandon(reason, now);
            }
        } else {
            self.cordoned.remove(&(node, reason));
            self.unplannable = false;
        }
        self.advance(now);
    }

    /// Whether the node is out of use, for whatever reason.
    pub fn is_cordoned(&self, node: NodeId) -> bool {
        self.cordons(node).next().is_some()
    }

    /// Why the node is out of use.
    pub fn cordons(&self, node: NodeId) -> impl Iterator<Item = CordonReason> + '_ {
        CordonReason::ALL.into_iter().filter(move |r| self.cordoned.contains(&(node, *r)))
    }

    /// A node without which no pipeline can form, and that only this reason keeps out of use: what
    /// is wrong with it matters less than that nothing is served.
    pub fn needed_despite(&self, reason: CordonReason, now: Duration) -> Option<NodeId> {
        let eligible = self.nodes.keys().filter(|n| self.is_eligible(**n, now)).count();
        if self.phase != PipelinePhase::Waiting || self.unplannable || eligible >= self.need() {
            return None;
        }
        let only = |n: &NodeId| self.cordons(*n).eq([reason]);
        let fit = |c: &Candidate| !c.suspect && c.barred_until <= now;
        let mut needed = self.nodes.iter().filter(|(n, c)| only(n) && fit(c));
        needed.next().map(|(node, _)| *node)
    }

    /// Whether the node is silent.
    pub fn is_suspect(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|c| c.suspect)
    }

    /// What the node measured, where it is there.
    pub fn measured(&self, node: NodeId) -> Option<StageProfile> {
        self.nodes.get(&node).and_then(|c| c.profile)
    }

    /// What the node measured, where it is there and may be used.
    pub fn profile_of(&self, node: NodeId) -> Option<StageProfile> {
        let usable = !self.is_suspect(node) && !self.is_cordoned(node);
        self.measured(node).filter(|_| usable)
    }

    /// A node is gone.
    pub fn handle_lost(&mut self, node: NodeId, reason: &str, now: Duration) {
        if self.nodes.remove(&node).is_none() {
            return;
        }
        self.unplannable = false;
        let losses = self.losses.entry(node).or_default();
        losses.push_back(now);
        if losses.len() > FLAPS {
            losses.pop_front();
        }
        let reason = format!("node {node} was lost: {reason}");
        if self.chosen.contains(&node) {
            // Its silence was waited for already: others that fell silent with it are suspect.
            self.abort_for(reason, Duration::ZERO, now);
        } else if self.next.as_ref().is_some_and(|n| n.chosen.contains(&node)) {
            self.abandon(reason, now);
        }
    }

    /// A node became silent, or stopped being so; a silent one is not chosen.
    pub fn handle_suspect(&mut self, node: NodeId, suspect: bool, now: Duration) {
        if let Some(candidate) = self.nodes.get_mut(&node) {
            candidate.suspect = suspect;
            self.advance(now);
        }
    }

    /// A node measured.
    pub fn handle_profiled(&mut self, node: NodeId, profile: StageProfile, now: Duration) {
        if let Some(candidate) = self.nodes.get_mut(&node) {
            candidate.profile = Some(profile);
            self.advance(now);
        }
    }

    /// A node could not measure.
    pub fn handle_profile_failed(&mut self, node: NodeId, message: &str, now: Duration) {
        let reason = format!("node {node} could not measure: {message}");
        if self.phase == PipelinePhase::Profiling && self.chosen.contains(&node) {
            self.bar(node, now);
            self.abort(reason, now);
        } else if self.next.as_ref().is_some_and(|n| n.is_measuring(node)) {
            self.abandon(reason, now);
        }
    }

    /// The model is cut: the chosen nodes in the order of the stages.
    pub fn handle_planned(&mut self, epoch: Epoch, order: Vec<NodeId>, now: Duration) {
        if self.next.as_ref().is_some_and(|n| n.epoch == epoch) {
            return self.next_planned(order, now);
        }
        if self.phase != PipelinePhase::Planning || epoch != self.epoch {
            return;
        }
        self.chosen = order;
        self.ready.clear();
        self.phase = PipelinePhase::Assigning;
        self.deadline = Some(now + self.config.load_timeout);
        self.actions.push_back(Action::Assign { epoch, nodes: self.chosen.clone() });
    }

    /// The model cannot be cut over these nodes; tried again when a node joins or goes.
    pub fn handle_plan_failed(&mut self, epoch: Epoch, message: &str, now: Duration) {
        if self.next.as_ref().is_some_and(|n| n.epoch == epoch) {
            self.abandon(message.to_owned(), now);
        } else if self.phase == PipelinePhase::Planning && epoch == self.epoch {
            self.unplannable = true;
            self.abort(message.to_owned(), now);
        }
    }

    /// The model cannot be cut over these nodes at this moment; tried again in a while.
    pub fn handle_plan_postponed(&mut self, epoch: Epoch, message: &str, now: Duration) {
        if self.next.as_ref().is_some_and(|n| n.epoch == epoch) {
            self.abandon(message.to_owned(), now);
        } else if self.phase == PipelinePhase::Planning && epoch == self.epoch {
            self.retry_at = now + self.config.retry_node;
            self.abort(message.to_owned(), now);
        }
    }

    /// A node has loaded its stage.
    pub fn handle_ready(&mut self, node: NodeId, epoch: Epoch, now: Duration) {
        if self.next.as_ref().is_some_and(|n| n.is_loading(node, epoch)) {
            self.next_ready(node, now);
        } else if self.is_assigned(node, epoch) {
            self.ready.insert(node);
            self.advance(now);
        }
    }

    /// A node cannot load its stage.
    pub fn handle_load_failed(&mut self, node: NodeId, epoch: Epoch, message: &str, now: Duration) {
        let reason = format!("node {node} could not load its stage: {message}");
        if self.next.as_ref().is_some_and(|n| n.is_loading(node, epoch)) {
            self.abandon(reason, now);
        } else if self.is_assigned(node, epoch) {
            self.bar(node, now);
            self.abort(reason, now);
        }
    }

    /// An edge broke, or carried something malformed.
    pub fn handle_edge_lost(&mut self, epoch: Epoch, message: &str, now: Duration) {
        let active = matches!(self.phase, PipelinePhase::Assigning | PipelinePhase::Running);
        let reason = format!("an edge was lost: {message}");
        if self.next.as_ref().is_some_and(|n| n.epoch == epoch) {
            self.abandon(reason, now);
        } else if active && epoch == self.epoch {
            self.abort(reason, now);
        }
    }

    /// Time has passed; call at [`Self::next_timeout`].
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.next.as_ref().is_some_and(|n| now >= n.deadline) {
            self.abandon("the nodes were not ready in time".to_owned(), now);
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            let late: Vec<NodeId> =
                self.chosen.iter().copied().filter(|&n| !self.has_answered(n)).collect();
            for &node in &late {
                self.bar(node, now);
            }
            let what = match self.phase {
                PipelinePhase::Profiling => "measure",
                _ => "load its stage",
            };
            let names: Vec<String> = late.iter().map(ToString::to_string).collect();
            self.abort(format!("node {} did not {what} in time", names.join(", ")), now);
        }
        self.advance(now);
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub fn next_timeout(&self) -> Option<Duration> {
        if self.phase != PipelinePhase::Waiting {
            return self.deadline.or_else(|| self.next.as_ref().map(|n| n.deadline));
        }
        if self.unplannable {
            return None;
        }
        // The moment at which enough nodes may be chosen, if no other joins.
        let mut times: Vec<Duration> = (self.nodes.iter())
            .filter(|(node, c)| !c.suspect && !self.is_cordoned(**node))
            .map(|(_, c)| c.barred_until.max(self.retry_at))
            .collect();
        times.sort_unstable();
        times.get(self.need() - 1).copied()
    }

    /// What to do next, in order. Call until `None` after every `handle_*`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn is_assigned(&self, node: NodeId, epoch: Epoch) -> bool {
        self.phase == PipelinePhase::Assigning && epoch == self.epoch && self.chosen.contains(&node)
    }

    fn has_answered(&self, node: NodeId) -> bool {
        match self.phase {
            PipelinePhase::Profiling => self.nodes.get(&node).is_some_and(|c| c.profile.is_some()),
            _ => self.ready.contains(&node),
        }
    }

    /// Fewest nodes that make a pipeline.
    fn need(&self) -> usize {
        if self.config.flexible { 1 } else { usize::from(self.config.stages) }
    }

    /// Whether a plan may use the node now.
    fn is_eligible(&self, node: NodeId, now: Duration) -> bool {
        let fit = |c: &Candidate| !c.suspect && c.barred_until <= now;
        self.nodes.get(&node).is_some_and(fit) && !self.is_cordoned(node)
    }

    /// Asks those who have not measured to do so.
    fn ask_profiles(&mut self, nodes: &[NodeId]) {
        for &node in nodes {
            if self.measured(node).is_none() {
                self.actions.push_back(Action::Profile { node });
            }
        }
    }

    /// The nodes with what they measured, once all have.
    fn profiles(&self, nodes: &[NodeId]) -> Option<Vec<(NodeId, StageProfile)>> {
        nodes.iter().map(|&node| Some((node, self.measured(node)?))).collect()
    }

    /// A node that comes and goes is taken last, so that it does not take the others along.
    fn is_flapping(&self, node: NodeId, now: Duration) -> bool {
        let recent = |times: &VecDeque<Duration>| {
            times.len() >= FLAPS && times.iter().all(|&t| now.saturating_sub(t) < FLAP_MEMORY)
        };
        self.losses.get(&node).is_some_and(recent)
    }

    fn bar(&mut self, node: NodeId, now: Duration) {
        if let Some(candidate) = self.nodes.get_mut(&node) {
            candidate.barred_until = now + self.config.retry_node;
        }
    }

    /// Takes every step that needs no further input.
    fn advance(&mut self, now: Duration) {
        if self.phase == PipelinePhase::Waiting {
            self.choose(now);
        }
        if self.phase == PipelinePhase::Profiling {
            self.plan();
        }
        if self.phase == PipelinePhase::Assigning && self.ready.len() == self.chosen.len() {
            self.phase = PipelinePhase::Running;
            self.deadline = None;
            self.trouble = None;
            let nodes = self.chosen.clone();
            self.actions.push_back(Action::Start { epoch: self.epoch, nodes });
            // Stand-bys measure now, so that they can take over at once.
            let idle = self.nodes.keys().filter(|n| !self.chosen.contains(n)).copied();
            self.ask_profiles(&idle.collect::<Vec<_>>());
        }
        self.advance_next(now);
    }

    fn choose(&mut self, now: Duration) {
        if self.unplannable || now < self.retry_at {
            return;
        }
        let mut eligible: Vec<(bool, u64, NodeId)> = (self.nodes.iter())
            .filter(|(node, _)| self.is_eligible(**node, now))
            .map(|(&node, c)| (self.is_flapping(node, now), c.order, node))
            .collect();
        if eligible.len() < self.need() {
            return;
        }
        eligible.sort_unstable();
        if self.config.flexible && eligible.iter().any(|e| !e.0) {
            eligible.retain(|e| !e.0);
        }
        let most = usize::from(self.config.stages);
        self.chosen = eligible.into_iter().take(most).map(|(.., node)| node).collect();
        self.phase = PipelinePhase::Profiling;
        self.deadline = Some(now + self.config.profile_timeout);
        self.ask_profiles(&self.chosen.clone());
    }

    fn plan(&mut self) {
        if let Some(nodes) = self.profiles(&self.chosen) {
            self.phase = PipelinePhase::Planning;
            self.deadline = None;
            self.actions.push_back(Action::Plan { epoch: self.epoch, nodes });
        }
    }

    /// The attempt or the epoch is over; the next try is in a moment.
    fn abort(&mut self, reason: String, now: Duration) {
        self.abort_for(reason, self.config.retry_pipeline, now);
    }

    /// The attempt or the epoch is over; no next try for so long.
    fn abort_for(&mut self, reason: String, pause: Duration, now: Duration) {
        let phase = std::mem::replace(&mut self.phase, PipelinePhase::Waiting);
        let chosen = std::mem::take(&mut self.chosen);
        self.ready.clear();
        self.deadline = None;
        let next = self.next.take();
        let epoch = next.as_ref().map_or(self.epoch, |n| n.epoch);
        if phase == PipelinePhase::Running {
            self.actions.push_back(Action::Stop { epoch: self.epoch, reason: reason.clone() });
        }
        if !matches!(phase, PipelinePhase::Waiting | PipelinePhase::Profiling) {
            // A cut that is under way must not meet other nodes.
            self.last_epoch = Epoch(self.last_epoch.0 + 1);
            self.epoch = self.last_epoch;
        }
        if matches!(phase, PipelinePhase::Assigning | PipelinePhase::Running) {
            self.retry_at = now + pause;
            let both: BTreeSet<NodeId> =
                chosen.into_iter().chain(next.into_iter().flat_map(|n| n.chosen)).collect();
            let nodes = both.into_iter().filter(|n| self.nodes.contains_key(n)).collect();
            self.actions.push_back(Action::Release { epoch, nodes });
        }
        self.trouble = Some(reason);
        self.advance(now);
    }
}
