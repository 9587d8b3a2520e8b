//! What went wrong last, for those who ask where their requests are: which node or link it was, and
//! since when. Kept until requests are served again; what is more certain replaces what is less.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::id::NodeId;

use super::Cluster;

/// How certain a cause is: a node that is lost explains links that broke because of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Certainty {
    /// A link broke, whoever is to blame.
    Link,
    /// Nothing comes from somewhere.
    Stall,
    /// A node is gone, or says itself that it cannot.
    Node,
}

/// Something that went wrong.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    certainty: Certainty,
    since: Duration,
    node: Option<String>,
    what: String,
}

/// How a stage fares by its node's last heartbeat.
#[derive(Clone, Debug, PartialEq)]
pub struct StagePlace {
    /// The node's name.
    pub node: String,
    /// Micro-batches that came in during this epoch.
    pub received: u64,
    /// Those that were computed.
    pub steps: u64,
    /// Whether its node has been silent for longer than it should.
    pub silent: bool,
}

/// See [`GetPlaces`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Places {
    /// The stages that serve, in order.
    pub stages: Vec<StagePlace>,
    /// What is recovered from: the node where one is known, and what happened in words.
    pub trouble: Option<(Option<String>, String)>,
    /// The node whose memory is the least for the KV cache it has to hold.
    pub fullest: Option<String>,
}

/// Where stages are, for who asks about requests.
#[derive(Debug, Message)]
#[rtype(result = "Places")]
pub struct GetPlaces;

impl Handler<GetPlaces> for Cluster {
    type Result = MessageResult<GetPlaces>;

    fn handle(&mut self, _: GetPlaces, _: &mut Context<Self>) -> Self::Result {
        let now = self.now();
        let said = |t: &Trouble| {
            let ago = now.saturating_sub(t.since).as_secs_f64();
            (t.node.clone(), format!("{} {ago:.1} s ago", t.what))
        };
        MessageResult(Places {
            stages: self.places(),
            trouble: self.trouble.as_ref().map(said),
            fullest: self.fullest(),
        })
    }
}

/// A micro-batch does not come back. Where it hangs is for the cluster to find out.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stalled {
    /// Of this epoch.
    pub epoch: millrace_shared::id::Epoch,
    /// Its place among those of the epoch, from 1.
    pub nth: u64,
    /// Its number.
    pub micro_batch: u64,
    /// How long it has been under way.
    pub waited: Duration,
}

impl Handler<Stalled> for Cluster {
    type Result = ();

    fn handle(&mut self, m: Stalled, ctx: &mut Context<Self>) {
        let stages = self.places();
        let place = whereabouts(&stages, m.nth);
        let (node, at) = match &place {
            Some(place) => (place.node(&stages), place.words(&stages)),
            None => (None, "in the pipeline".to_owned()),
        };
        let seconds = m.waited.as_secs_f64();
        let what = format!("micro-batch {} got no further than {at}", m.micro_batch);
        self.note_trouble(Certainty::Stall, node, what.clone());
        self.save_rings();
        self.edge_failed(m.epoch, &format!("{what} for {seconds:.1} s although its node lives"));
        self.advance(ctx);
    }
}

/// Where a micro-batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// It came to this stage, and was not computed yet.
    Stage(usize),
    /// It was not received by this stage; behind the last stage, by the coordinator.
    LinkTo(usize),
}

impl Spot {
    /// The node that is to blame, or the far end of the link.
    pub fn node(self, stages: &[StagePlace]) -> Option<String> {
        let (Self::Stage(at) | Self::LinkTo(at)) = self;
        stages.get(at).or_else(|| stages.last()).map(|s| s.node.clone())
    }

    /// In words.
    pub fn words(self, stages: &[StagePlace]) -> String {
        let name = |at: usize| stages.get(at).map_or("the coordinator", |s| s.node.as_str());
        match self {
            Self::Stage(at) => format!("stage {at} on {}", name(at)),
            Self::LinkTo(at) => {
                let from = at.checked_sub(1).map_or("the coordinator", name);
                format!("the link from {from} to {}", name(at))
            }
        }
    }
}

/// Where the micro-batch is that was the `nth` of its epoch. Stages compute in order and count, so
/// it is before the first one that has not computed so many; a silent node says nothing new, so
/// what did not come to it is taken to be with it.
pub fn whereabouts(stages: &[StagePlace], nth: u64) -> Option<Spot> {
    if stages.is_empty() {
        return None;
    }
    let Some(at) = stages.iter().position(|s| s.steps < nth) else {
        return Some(Spot::LinkTo(stages.len()));
    };
    let here = stages[at].received >= nth || stages[at].silent;
    Some(if here { Spot::Stage(at) } else { Spot::LinkTo(at) })
}

impl Cluster {
    fn places(&self) -> Vec<StagePlace> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let place = |id: &NodeId| {
            let beat = self.members.get(id).map(|m| m.heartbeat).unwrap_or_default();
            let suspect = self.pipeline.as_ref().is_some_and(|p| p.is_suspect(*id));
            StagePlace {
                node: self.name_of(*id),
                received: beat.received,
                steps: beat.steps,
                silent: suspect || !self.members.contains_key(id),
            }
        };
        plan.assignments.iter().map(|(id, _)| place(id)).collect()
    }

    /// The stage with the least memory for each byte of cache it must hold.
    fn fullest(&self) -> Option<String> {
        let plan = self.plan.as_ref()?;
        let room = |(id, a): &&(NodeId, millrace_shared::wire::control::Assignment)| {
            let member = self.members.get(id);
            let memory = member.map_or(0, |m| m.hello.memory_bytes);
            let weights = member.map_or(0, |m| m.report.weight_bytes);
            let layers = u64::from(a.end_layer.saturating_sub(a.first_layer)).max(1);
            memory.saturating_sub(weights) / layers
        };
        plan.assignments.iter().min_by_key(room).map(|(id, _)| self.name_of(*id))
    }

    /// Something went wrong.
    pub(super) fn note_trouble(
        &mut self,
        certainty: Certainty,
        node: Option<String>,
        what: String,
    ) {
        if self.trouble.as_ref().is_some_and(|t| t.certainty > certainty) {
            return;
        }
        let since = self.now();
        self.trouble = Some(Trouble { certainty, since, node, what });
    }

    /// An edge broke, as one of its ends says; the other end is named in what it says.
    pub(super) fn note_lost_edge(&mut self, reporter: NodeId, message: &str) {
        let other = self.called.mentioned(message).map(str::to_owned);
        let node = other.or_else(|| Some(self.name_of(reporter)));
        let what = self.called.in_names(message);
        let what = format!("{} lost an edge ({what})", self.name_of(reporter));
        self.note_trouble(Certainty::Link, node, what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(received: u64, steps: u64) -> StagePlace {
        StagePlace { node: format!("gpu-{received}"), received, steps, silent: false }
    }

    #[test]
    fn a_micro_batch_is_where_it_got_to() {
        let at = |stages: &[StagePlace], nth| whereabouts(stages, nth).unwrap();
        let stages = [stage(9, 9), stage(8, 7), stage(7, 7)];
        assert_eq!(at(&stages, 8), Spot::Stage(1), "it came, and was not computed");
        assert_eq!(at(&stages, 9), Spot::LinkTo(1), "it was sent, and did not come");
        assert_eq!(at(&stages, 10), Spot::LinkTo(0), "it has not come to the first");
        assert_eq!(at(&stages, 7), Spot::LinkTo(3), "all have done it");
        assert_eq!(whereabouts(&[], 1), None);
        let mut silent = stages.clone();
        silent[1].silent = true;
        assert_eq!(at(&silent, 9), Spot::Stage(1), "nobody knows whether it came");
        assert_eq!(Spot::LinkTo(1).words(&stages), "the link from gpu-9 to gpu-8");
        assert_eq!(Spot::LinkTo(0).words(&stages), "the link from the coordinator to gpu-9");
        assert_eq!(Spot::LinkTo(3).words(&stages), "the link from gpu-7 to the coordinator");
        assert_eq!(Spot::Stage(1).node(&stages).unwrap(), "gpu-8");
        assert_eq!(Spot::LinkTo(3).node(&stages).unwrap(), "gpu-7");
    }
}
