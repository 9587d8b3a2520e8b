//! Nodes that want to leave: their layers go to others first, then they may go.
//!
//! A drain is a cordon of the node's own making: nobody plans with it any more, a new cut without it
//! is made ready beside the one that serves, and when that has taken over the node is told. Where
//! nobody can take its layers over, also none that measures at the moment, it is told that at once, and its leaving is a loss like any
//! other. The cordon ends with the node, so that it is used again when it comes back.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::membership::{CordonReason, PROFILE_TIMEOUT};
use millrace_shared::wire::control::CoordinatorMessage;

use super::Cluster;

/// Between tries to cut without a node: a cut that was under way for another reason is over by then.
const AGAIN: Duration = Duration::from_millis(500);

/// Nodes that want to leave.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// Since when each waits, and when it is looked at again.
    waiting: BTreeMap<NodeId, (Duration, Duration)>,
}

impl Cluster {
    /// A node wants to leave.
    pub(super) fn begin_drain(&mut self, id: NodeId, now: Duration) {
        tracing::info!(node = %id, name = self.name_of(id), "the node wants to leave");
        self.chronicle.note("leaving", self.name_of(id));
        self.drains.waiting.entry(id).or_insert((now, now));
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_cordon(id, CordonReason::Drain, true, now);
        }
    }

    /// A node is gone, as it wanted or not.
    pub(super) fn end_drain(&mut self, id: NodeId, now: Duration) {
        self.drains.waiting.remove(&id);
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_cordon(id, CordonReason::Drain, false, now);
        }
    }

    /// Cuts without those who want to leave, and lets go who has no layers any more.
    pub(super) fn check_drains(&mut self, now: Duration) {
        let mut due = Vec::new();
        for (id, (since, at)) in &mut self.drains.waiting {
            if *at <= now {
                *at = now + AGAIN;
                due.push((*id, now.saturating_sub(*since)));
            }
        }
        due.into_iter().for_each(|(id, waited)| self.check_drain(id, waited));
    }

    fn check_drain(&mut self, id: NodeId, waited: Duration) {
        let Some(pipeline) = &self.pipeline else { return self.let_go(id, None) };
        let serves = pipeline.chosen().contains(&id);
        if !serves && pipeline.next_epoch().is_none() {
            return self.let_go(id, None);
        }
        if !serves || pipeline.next_epoch().is_some() || !self.is_serving() {
            return; // Something is under way: what comes of it is seen next time.
        }
        match self.offer(format!("{} wants to leave", self.name_of(id)), Some(id), 0) {
            Ok(offer) => {
                self.apply_offer(offer);
            }
            // Whoever measures may take the layers over in a moment.
            Err(_) if waited < PROFILE_TIMEOUT && self.somebody_measures() => {}
            Err(message) => self.let_go(id, Some(message)),
        }
    }

    /// Whether a node that could serve is yet to say what it can.
    fn somebody_measures(&self) -> bool {
        let Some(pipeline) = &self.pipeline else { return false };
        let usable = |id: &&NodeId| !pipeline.is_cordoned(**id) && !pipeline.is_suspect(**id);
        self.members.keys().filter(usable).any(|id| pipeline.measured(*id).is_none())
    }

    fn let_go(&mut self, id: NodeId, trouble: Option<String>) {
        self.drains.waiting.remove(&id);
        tracing::info!(node = %id, name = self.name_of(id), ?trouble, "the node may go");
        self.say(id, CoordinatorMessage::Drained { trouble });
    }
}
