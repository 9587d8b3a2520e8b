//! The side of the coordinator: it translates between messages and the state machines.

use std::collections::BTreeMap;

use millrace_shared::id::{Epoch, NodeId, SequenceId};
use millrace_shared::membership::{
    Action, Event, LEASE, LinkTimes, LostReason, Oldest, PipelinePhase,
};
use millrace_shared::scheduler::Outcome;
use millrace_shared::wire::control::StageProfile;

use super::{
    COORDINATOR, Happening, Member, Message, Said, Starting, TICK, World, ms, name, number,
};
use crate::doubt::request_of;
use crate::node::{Assignment, Frame, expected};

impl World {
    pub(super) fn heard(&mut self, node: usize, message: Message) {
        match message {
            Message::Hello { link } => {
                let session = self.membership.handle_hello(name(node), self.now);
                if let Some(old) = self.members.insert(node, Member { session, link }) {
                    self.send(COORDINATOR, node, Message::Closed { link: old.link });
                }
                self.send(COORDINATOR, node, Message::Welcome);
            }
            Message::FromNode { link, what } => {
                let member = self.members.get(&node).filter(|m| m.link == link);
                let Some(session) = member.map(|m| m.session) else {
                    self.stale += 1;
                    return;
                };
                self.membership.handle_heartbeat(name(node), session, self.now);
                self.on_said(node, what);
            }
            Message::Results(frame) => self.on_results(&frame),
            _ => {}
        }
        self.advance();
    }

    pub(super) fn on_said(&mut self, node: usize, what: Said) {
        let now = self.now;
        match what {
            Said::Beat => {}
            Said::Profiled => {
                self.pipeline.handle_profiled(name(node), StageProfile::flat(1e-3, 1e-3), now);
            }
            Said::Ready(epoch) => self.pipeline.handle_ready(name(node), epoch, now),
            Said::LoadFailed(epoch) => {
                self.pipeline.handle_load_failed(name(node), epoch, "no", now);
            }
            Said::Started(epoch) => {
                if let Some(starting) = self.starting.as_mut().filter(|s| s.epoch == epoch) {
                    starting.missing.remove(&node);
                }
                if let Some(starting) = self.starting.take_if(|s| s.missing.is_empty()) {
                    let order = self.orders[&starting.epoch].clone();
                    self.next_up = Some((starting.epoch, order));
                    self.pump();
                }
            }
        }
    }

    pub(super) fn on_results(&mut self, frame: &Frame) {
        if self.active.as_ref().is_none_or(|(epoch, _)| *epoch != frame.epoch) {
            self.stale += 1;
            return;
        }
        self.stalls.handle_answer(self.now);
        self.scheduler.handle_times(frame.id, &frame.meta.times, self.now);
        let outcomes = self.scheduler.handle_result(frame.id, &frame.results, self.now);
        let mut failed: BTreeMap<(u16, bool), Vec<SequenceId>> = BTreeMap::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Failed { sequence, failure, alone } => {
                    let stage = failure.stage.unwrap_or_else(|| panic!("{}", failure.message));
                    failed.entry((stage, alone)).or_default().push(sequence);
                }
                other => self.on_outcome(other),
            }
        }
        for ((stage, alone), sequences) in failed {
            self.judge(frame.epoch, (usize::from(stage), alone), &sequences);
        }
        self.pump();
    }

    pub(super) fn on_outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Token { sequence, index, token, last, .. } => {
                self.note(u64::from(token) ^ sequence.0 << 20);
                self.note_token(sequence);
                let id = request_of(sequence);
                let Some(request) = self.requests.get_mut(&id) else {
                    panic!("a token of nobody's");
                };
                assert!(!request.ended, "a token after the end of {id}, {sequence:?}");
                assert_eq!(index as usize, request.log.len(), "each token once, in order");
                request.log.push(token);
                if last {
                    request.ended = true;
                    assert_eq!(
                        request.log,
                        expected(&request.prompt, request.wanted),
                        "seed {}: request {} has other tokens",
                        self.seed,
                        sequence
                    );
                    self.note_ended(id);
                }
            }
            Outcome::PrefillDone { .. } => {}
            Outcome::Shed { sequence, .. } | Outcome::Failed { sequence, .. } => {
                panic!("seed {}: {sequence} did not survive: {outcome:?}", self.seed);
            }
            Outcome::Scores { .. } | Outcome::Embedding { .. } => {}
        }
    }

    pub(super) fn submit(&mut self, id: u64) {
        self.ahead -= 1;
        let sequence = self.sequence_of(id);
        // Who was held up may hear that the client has gone before it hears of the request.
        let Some(request) = self.requests.get_mut(&id).filter(|r| !r.ended) else { return };
        let new = request.sequence(sequence, self.now);
        if self.scheduler.handle_submit(new).is_err() {
            // A full queue sheds, and says so.
            request.rejected = true;
            request.ended = true;
        }
        let stats = self.scheduler.stats();
        assert!(stats.waiting <= self.config.max_waiting + self.config.max_num_seqs);
        self.pump();
    }

    /// The fence, the switch, and every micro-batch that is ready.
    pub(crate) fn pump(&mut self) {
        let fenced = self.active.is_some() && self.scheduler.stats().in_flight > 0;
        if let Some((epoch, order)) = self.next_up.take_if(|_| !fenced) {
            let refused = self.scheduler.handle_epoch(self.config);
            assert!(refused.is_empty());
            self.note_epoch_begin();
            self.resume();
            if self.pipeline.next_epoch() == Some(epoch) {
                self.pipeline.handle_switched(epoch);
            }
            self.epochs += 1;
            self.active = Some((epoch, order));
        }
        while self.next_up.is_none() {
            let Some((epoch, order)) = self.active.clone() else { return };
            let Some(step) = self.scheduler.poll_step(self.now) else { return };
            assert!(self.scheduler.stats().in_flight <= self.config.max_in_flight);
            let frame = Frame {
                epoch,
                id: step.id,
                meta: step.meta,
                tokens: step.tokens,
                hashes: Vec::new(),
                results: Vec::new(),
            };
            self.send(COORDINATOR, order[0], Message::Frame(frame));
        }
    }

    pub(super) fn tick(&mut self) {
        self.at(self.now + TICK, Happening::Tick);
        if std::mem::take(&mut self.late) {
            self.membership.handle_own_delay(self.now);
        }
        while let Some(event) = self.membership.poll_event(self.now) {
            self.on_membership(event);
        }
        let oldest = self.scheduler.oldest_in_flight().filter(|_| self.active.is_some());
        let oldest = oldest.map(|(id, issued)| Oldest {
            issued,
            predicted: self.scheduler.predicted_seconds(id).iter().sum(),
            positions: self.scheduler.positions(id),
        });
        if self.stalls.is_stalled(oldest, &LinkTimes::default(), LEASE, self.now) {
            self.note_death();
            let epoch = self.active.as_ref().map_or(Epoch(0), |a| a.0);
            self.pipeline.handle_edge_lost(epoch, "a micro-batch did not come back", self.now);
        }
        if let Some(starting) = self.starting.take_if(|s| s.deadline <= self.now) {
            self.pipeline.handle_edge_lost(starting.epoch, "not connected in time", self.now);
        }
        self.advance();
    }

    pub(super) fn on_membership(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Joined { node, .. } => self.pipeline.handle_joined(node, now),
            Event::Suspect { node } => self.pipeline.handle_suspect(node, true, now),
            Event::Recovered { node } => self.pipeline.handle_suspect(node, false, now),
            Event::Lost { node, session, reason } => {
                let at = number(node);
                if self.members.get(&at).is_some_and(|m| m.session == session)
                    && let Some(member) = self.members.remove(&at)
                {
                    self.send(COORDINATOR, at, Message::Closed { link: member.link });
                }
                self.forget_lost(node, reason == LostReason::Left);
                self.pipeline.handle_lost(node, &reason.to_string(), now);
            }
        }
    }

    pub(crate) fn advance(&mut self) {
        while let Some(event) = self.membership.poll_handled() {
            self.on_membership(event);
        }
        self.check_drains();
        self.check_sick();
        self.pipeline.handle_timeout(self.now);
        while let Some(action) = self.pipeline.poll_action() {
            self.carry_out(action);
        }
        self.check();
    }

    pub(super) fn tell_all(&mut self, nodes: &[NodeId], message: impl Fn() -> Message) {
        for node in nodes {
            if self.members.contains_key(&number(*node)) {
                self.send(COORDINATOR, number(*node), message());
            }
        }
    }

    pub(super) fn carry_out(&mut self, action: Action) {
        match action {
            Action::Profile { node } => self.tell_all(&[node], || Message::Profile),
            Action::Plan { epoch, nodes } => {
                let mut order: Vec<NodeId> = nodes.into_iter().map(|(n, _)| n).collect();
                // Some order, by the seed.
                let turn = self.draw(order.len() as u64) as usize;
                order.rotate_left(turn);
                self.pipeline.handle_planned(epoch, order, self.now);
            }
            Action::Assign { epoch, nodes } => {
                let order: Vec<usize> = nodes.iter().map(|n| number(*n)).collect();
                self.orders.insert(epoch, order.clone());
                let (blocks, block_size) = (self.config.num_blocks, self.config.block_size);
                for (at, node) in order.iter().enumerate() {
                    let order = order.clone();
                    let assignment = Assignment { epoch, order, at, blocks, block_size };
                    self.tell_all(&[name(*node)], || Message::Assign(assignment.clone()));
                }
            }
            Action::Start { epoch, nodes } => {
                let missing = nodes.iter().map(|n| number(*n)).collect();
                self.starting = Some(Starting { epoch, missing, deadline: self.now + ms(15_000) });
                self.tell_all(&nodes, || Message::Start(epoch));
            }
            Action::Stop { epoch, .. } => {
                if let Some((active, _)) = &self.active {
                    assert!(*active <= epoch, "an epoch that never served is stopped");
                }
                self.note_epoch_end();
                self.active = None;
                self.next_up = None;
                self.starting = None;
            }
            Action::Abandon { epoch, nodes } => {
                self.starting = self.starting.take().filter(|s| s.epoch != epoch);
                self.tell_all(&nodes, || Message::Abandon(epoch));
            }
            Action::Release { epoch, nodes } => {
                self.starting = self.starting.take().filter(|s| s.epoch > epoch);
                self.tell_all(&nodes, || Message::Release(epoch));
            }
        }
    }

    /// What must hold whenever the coordinator has acted.
    pub(super) fn check(&self) {
        let running = self.pipeline.phase() == PipelinePhase::Running;
        assert!(running || self.active.is_none(), "micro-batches without a pipeline");
        let stats = self.scheduler.stats();
        assert!(stats.in_flight <= self.config.max_in_flight);
        assert!(stats.blocks_used <= self.config.num_blocks);
    }
}
