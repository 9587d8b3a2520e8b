//! Nodes that want to leave: their layers go to others first, then they may go.
//!
//! A drain is a cordon of the node's own making: nobody plans with it any more, a new cut without it
//! is made ready beside the one that serves, and when that has taken over the node is told. Where
//! nobody can take its layers over it is told that at once, and its leaving is a loss like any
//! other. The cordon ends with the node, so that it is used again when it comes back.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::wire::control::CoordinatorMessage;

use super::Cluster;

/// Between tries to cut without a node: a cut that was under way for another reason is over by then.
const AGAIN: Duration = Duration::from_millis(500);

/// Nodes that want to leave.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// When each is looked at again.
    waiting: BTreeMap<NodeId, Duration>,
    /// Whom to forget the cordon of, when they are gone.
    cordoned: Vec<NodeId>,
}

impl Cluster {
    /// A node wants to leave.
    pub(super) fn begin_drain(&mut self, id: NodeId, now: Duration) {
        tracing::info!(node = %id, name = self.name_of(id), "the node wants to leave");
        self.chronicle.note("leaving", self.name_of(id));
        self.drains.waiting.insert(id, now);
        let Some(pipeline) = self.pipeline.as_mut().filter(|p| !p.is_cordoned(id)) else { return };
        self.drains.cordoned.push(id);
        pipeline.handle_cordon(id, true, now);
    }

    /// A node is gone, as it wanted or not.
    pub(super) fn end_drain(&mut self, id: NodeId, now: Duration) {
        self.drains.waiting.remove(&id);
        let own = self.drains.cordoned.iter().position(|c| *c == id);
        if let (Some(at), Some(pipeline)) = (own, &mut self.pipeline) {
            self.drains.cordoned.swap_remove(at);
            pipeline.handle_cordon(id, false, now);
        }
    }

    /// Cuts without those who want to leave, and lets go who has no layers any more.
    pub(super) fn check_drains(&mut self, now: Duration) {
        let due = |at: &Duration| *at <= now;
        let waiting: Vec<NodeId> =
            self.drains.waiting.iter().filter(|(_, at)| due(at)).map(|(id, _)| *id).collect();
        for id in waiting {
            self.drains.waiting.insert(id, now + AGAIN);
            self.check_drain(id);
        }
    }

    fn check_drain(&mut self, id: NodeId) {
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
            Err(message) => self.let_go(id, Some(message)),
        }
    }

    fn let_go(&mut self, id: NodeId, trouble: Option<String>) {
        self.drains.waiting.remove(&id);
        tracing::info!(node = %id, name = self.name_of(id), ?trouble, "the node may go");
        self.say(id, CoordinatorMessage::Drained { trouble });
    }
}
