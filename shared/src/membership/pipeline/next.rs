//! The next epoch, made ready while another runs.
//!
//! ```text
//!   recut        all profiled      order given        all ready           switched
//!  ──────▶ Profiling ───▶ Planning ───────▶ Assigning ───────▶ Switching ─────────▶ (it runs)
//!              │             │    Plan         │  Assign  │  Start   │  Release of the old
//!              └─────────────┴─────────────────┘          └──────────┴─ trouble: both epochs end
//!                 trouble: Abandon, the old epoch runs on
//! ```
//!
//! Nodes load the new stage beside the old one, the edges of both are open for a moment, and the
//! owner of requests switches between two steps. From `Switching` on, the requests may be in either
//! epoch, so trouble ends both, and the pipeline forms anew as after any loss.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Action, PipelinePhase, PipelineState};
use crate::id::{Epoch, NodeId};

/// Where the next epoch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Profiling,
    Planning,
    Assigning,
    Switching,
}

/// An epoch in the making.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) epoch: Epoch,
    pub(super) deadline: Duration,
    /// First whom the cut may use, then the order of the stages.
    pub(super) chosen: Vec<NodeId>,
    step: Step,
    ready: BTreeSet<NodeId>,
}

impl Next {
    pub(super) fn detail(&self) -> String {
        let step = match self.step {
            Step::Profiling => "nodes are measuring".to_owned(),
            Step::Planning => "the model is being cut".to_owned(),
            Step::Assigning => {
                format!("{} of {} new stages are ready", self.ready.len(), self.chosen.len())
            }
            Step::Switching => "switching".to_owned(),
        };
        format!("running; a new cut is made ready: {step}")
    }

    pub(super) fn is_measuring(&self, node: NodeId) -> bool {
        self.step == Step::Profiling && self.chosen.contains(&node)
    }

    /// Nothing has been asked of the nodes yet but measurements.
    pub(super) fn is_early(&self) -> bool {
        matches!(self.step, Step::Profiling | Step::Planning)
    }

    pub(super) fn is_loading(&self, node: NodeId, epoch: Epoch) -> bool {
        self.step == Step::Assigning && self.epoch == epoch && self.chosen.contains(&node)
    }
}

impl PipelineState {
    /// Makes a new cut over some of `nodes` ready while this epoch runs, then switches to it.
    /// `false` where there is nothing to do it from: no epoch runs, another cut is under way, or
    /// none of the nodes is there.
    pub fn handle_recut(&mut self, nodes: &[NodeId], now: Duration) -> bool {
        let chosen: Vec<NodeId> =
            nodes.iter().copied().filter(|n| self.is_eligible(*n, now)).collect();
        if self.phase != PipelinePhase::Running || self.next.is_some() || chosen.is_empty() {
            return false;
        }
        self.last_epoch = Epoch(self.last_epoch.0 + 1);
        self.ask_profiles(&chosen);
        self.next = Some(Next {
            epoch: self.last_epoch,
            deadline: now + self.config.profile_timeout,
            chosen,
            step: Step::Profiling,
            ready: BTreeSet::new(),
        });
        self.trouble = None;
        self.advance(now);
        true
    }

    /// Ends this epoch on purpose and forms the pipeline anew, as after a loss: for what cannot be
    /// made ready beside it. `false` where no epoch runs.
    pub fn handle_restart(&mut self, reason: &str, now: Duration) -> bool {
        let running = self.phase == PipelinePhase::Running;
        if running {
            self.abort(reason.to_owned(), now);
        }
        running
    }

    /// The owner of requests has gone over to the next epoch.
    pub fn handle_switched(&mut self, epoch: Epoch) {
        let ready = |n: &mut Next| n.step == Step::Switching && n.epoch == epoch;
        let Some(next) = self.next.take_if(ready) else { return };
        let old = std::mem::replace(&mut self.chosen, next.chosen);
        let nodes = old.into_iter().filter(|n| self.nodes.contains_key(n)).collect();
        self.actions.push_back(Action::Release { epoch: self.epoch, nodes });
        self.epoch = next.epoch;
    }

    /// The epoch that is made ready beside the running one.
    pub fn next_epoch(&self) -> Option<Epoch> {
        self.next.as_ref().map(|n| n.epoch)
    }

    /// Why the last attempt ended, where none succeeded since.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    pub(super) fn next_planned(&mut self, order: Vec<NodeId>, now: Duration) {
        let Some(next) = self.next.as_mut().filter(|n| n.step == Step::Planning) else { return };
        next.chosen = order;
        next.step = Step::Assigning;
        next.deadline = now + self.config.load_timeout;
        self.actions.push_back(Action::Assign { epoch: next.epoch, nodes: next.chosen.clone() });
    }

    pub(super) fn next_ready(&mut self, node: NodeId, now: Duration) {
        let Some(next) = &mut self.next else { return };
        next.ready.insert(node);
        if next.ready.len() == next.chosen.len() {
            next.step = Step::Switching;
            next.deadline = now + self.config.load_timeout;
            self.actions.push_back(Action::Start { epoch: next.epoch, nodes: next.chosen.clone() });
        }
    }

    /// Cuts as soon as every node has measured.
    pub(super) fn advance_next(&mut self, now: Duration) {
        let measuring = self.next.as_ref().filter(|n| n.step == Step::Profiling);
        let profiles = measuring.and_then(|n| self.profiles(&n.chosen));
        if let (Some(nodes), Some(next)) = (profiles, &mut self.next) {
            next.step = Step::Planning;
            next.deadline = now + self.config.profile_timeout;
            self.actions.push_back(Action::Plan { epoch: next.epoch, nodes });
        }
    }

    /// The next epoch will not be; from `Switching` on, nor does this one go on.
    pub(super) fn abandon(&mut self, reason: String, now: Duration) {
        let Some(next) = self.next.take_if(|n| n.step != Step::Switching) else {
            return self.abort(reason, now);
        };
        if next.step == Step::Assigning {
            let there = |n: &NodeId| self.nodes.contains_key(n);
            let nodes = next.chosen.into_iter().filter(there).collect();
            self.actions.push_back(Action::Abandon { epoch: next.epoch, nodes });
        }
        self.trouble = Some(format!("the new cut was given up: {reason}"));
    }
}
