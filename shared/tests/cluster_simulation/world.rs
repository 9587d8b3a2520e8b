//! The coordinator, the nodes and the links between them, driven by one queue of events.
//!
//! The coordinator here is what the actors are around the state machines: it translates. Links keep
//! order and hold what is sent over them while they are cut, as QUIC does; what belongs to an ended
//! session or epoch is dropped where the actors drop it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId, SequenceId};
use millrace_shared::membership::{
    Action, CordonReason, Event, LEASE, LinkTimes, LostReason, Membership, MembershipConfig,
    Oldest, PipelineConfig, PipelinePhase, PipelineState, Session, Stalls,
};
use millrace_shared::scheduler::{NewSequence, Outcome, Scheduler, SchedulerConfig};
use millrace_shared::wire::control::StageProfile;
use millrace_shared::wire::data::{Row, StageTime};

use super::doubt::{Doubts, Poison, request_of};
use super::node::{Assignment, Frame, Node, Stage, expected, mix};

pub(crate) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// So often the coordinator looks at leases.
const TICK: Duration = Duration::from_millis(50);
const HEARTBEAT: Duration = Duration::from_millis(250);
/// The end of patience: everything has ended by then, or something hangs.
const END: Duration = Duration::from_secs(3600);
/// Far more than is ever under way on a link.
const LINK_LIMIT: usize = 4096;

/// The coordinator's number among the ends of links.
pub(crate) const COORDINATOR: usize = usize::MAX;

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most of them are arrivals of frames")]
pub(crate) enum Happening {
    Tick,
    Beat {
        node: usize,
        life: u64,
        link: u64,
    },
    /// Something arrives at the end of a link.
    Arrives {
        from: usize,
        to: usize,
        message: Message,
    },
    /// A node connects to the coordinator.
    Connects {
        node: usize,
        life: u64,
    },
    Loaded {
        node: usize,
        life: u64,
        epoch: Epoch,
    },
    Computed {
        node: usize,
        life: u64,
        epoch: Epoch,
        wait: Duration,
        step: Duration,
    },
    Submit(u64),
    Leave(u64),
    Fault(Fault),
    Heal(usize, usize),
    Restart(usize),
    Recover(usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Message {
    Hello { link: u64 },
    Welcome,
    Closed { link: u64 },
    FromNode { link: u64, what: Said },
    Profile,
    Assign(Assignment),
    Start(Epoch),
    Release(Epoch),
    Abandon(Epoch),
    Frame(Frame),
    Results(Frame),
}

#[derive(Clone, Debug)]
pub(crate) enum Said {
    Beat,
    Profiled,
    Ready(Epoch),
    Started(Epoch),
    LoadFailed(Epoch),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Crash(usize, Duration),
    /// A host with the nodes of this mask.
    Host(u64, Duration),
    Freeze(usize, Duration),
    Cut(usize, usize, Duration),
    Slow(usize, u32, Duration),
    FailLoad(usize),
    /// The engine hangs, the node lives.
    Hang(usize, Duration),
    /// So many steps fail on the node.
    Sick(usize, u32),
    /// The node wants to leave.
    Drain(usize),
    Recut(u64),
    Cordon(usize, bool),
    EdgeLost,
    /// The coordinator itself stands still.
    Delay(Duration),
}

impl Fault {
    /// How often a node may be called dead, or a step fail, of it.
    fn causes(self) -> u32 {
        match self {
            Self::Drain(_) | Self::Recut(_) | Self::Cordon(..) | Self::FailLoad(_) => 0,
            Self::Sick(_, steps) => steps,
            _ => 1,
        }
    }
}

/// What a client asked for, and what it got.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) wanted: usize,
    pub(crate) log: Vec<u32>,
    pub(crate) ended: bool,
    pub(crate) rejected: bool,
    pub(crate) poison: Option<Poison>,
}

/// What is under way on a link, and until when it is cut.
#[derive(Default)]
struct Link {
    cut_until: Duration,
    held: VecDeque<Message>,
    last: Duration,
}

struct Member {
    session: Session,
    link: u64,
}

/// An epoch whose stages connect.
struct Starting {
    epoch: Epoch,
    missing: BTreeSet<usize>,
    deadline: Duration,
}

pub(crate) struct World {
    pub(crate) seed: u64,
    draws: u64,
    pub(crate) now: Duration,
    numbered: u64,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    pub(crate) nodes: Vec<Node>,
    links: BTreeMap<(usize, usize), Link>,
    members: BTreeMap<usize, Member>,
    pub(crate) doubts: Doubts,
    stalls: Stalls,
    /// Fewest and most stages.
    pub(crate) need: usize,
    pub(crate) most: usize,
    pub(crate) membership: Membership,
    pub(crate) pipeline: PipelineState,
    pub(crate) scheduler: Scheduler,
    config: SchedulerConfig,
    /// Epoch in which micro-batches run, and its order.
    pub(crate) active: Option<(Epoch, Vec<usize>)>,
    next_up: Option<(Epoch, Vec<usize>)>,
    pub(crate) orders: BTreeMap<Epoch, Vec<usize>>,
    starting: Option<Starting>,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Faults and requests that are still to come.
    pub(crate) ahead: usize,
    coordinator_until: Duration,
    late: bool,
    pub(crate) trace: u64,
    pub(crate) epochs: u64,
    pub(crate) stale: u64,
    /// What may make a request look like the cause, so often.
    pub(crate) causes: u32,
}

pub(crate) fn name(node: usize) -> NodeId {
    NodeId(uuid::Uuid::from_u128(node as u128 + 1))
}

pub(crate) fn number(node: NodeId) -> usize {
    node.0.as_u128() as usize - 1
}

impl World {
    pub(crate) fn new(
        seed: u64,
        nodes: usize,
        pipeline: PipelineConfig,
        config: SchedulerConfig,
    ) -> Self {
        let mut world = Self {
            seed,
            draws: 0,
            now: Duration::ZERO,
            numbered: 0,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            nodes: (0..nodes).map(|_| Node { slow: 1, ..Node::default() }).collect(),
            links: BTreeMap::new(),
            members: BTreeMap::new(),
            doubts: Doubts::default(),
            stalls: Stalls::default(),
            need: if pipeline.flexible { 1 } else { usize::from(pipeline.stages) },
            most: usize::from(pipeline.stages),
            membership: Membership::new(MembershipConfig::default()),
            pipeline: PipelineState::new(pipeline),
            scheduler: Scheduler::new(config),
            config,
            active: None,
            next_up: None,
            orders: BTreeMap::new(),
            starting: None,
            requests: BTreeMap::new(),
            ahead: 0,
            coordinator_until: Duration::ZERO,
            late: false,
            trace: seed,
            epochs: 0,
            stale: 0,
            causes: 0,
        };
        world.at(TICK, Happening::Tick);
        world
    }

    /// Even in 0..n.
    pub(crate) fn draw(&mut self, n: u64) -> u64 {
        self.draws += 1;
        mix(self.seed, self.draws) % n.max(1)
    }

    pub(crate) fn at(&mut self, when: Duration, what: Happening) {
        self.numbered += 1;
        self.queue.push(Reverse((when.max(self.now), self.numbered)));
        self.happenings.insert(self.numbered, what);
    }

    fn note(&mut self, what: u64) {
        self.trace = mix(self.trace, what ^ (self.now.as_nanos() as u64) << 8);
    }

    /// Runs until every request has ended and no fault is ahead.
    pub(crate) fn run(&mut self) {
        while let Some(Reverse((when, key))) = self.queue.pop() {
            self.now = when;
            assert!(self.now < END, "seed {}: no end: {}", self.seed, self.describe());
            let Some(what) = self.happenings.remove(&key) else { continue };
            self.note(key);
            self.happen(what);
            if self.ahead == 0 && self.requests.values().all(|r| r.ended) {
                return;
            }
        }
    }

    pub(crate) fn session_of(&self, node: usize) -> Option<Session> {
        self.members.get(&node).map(|m| m.session)
    }

    /// The nodes of the epoch that serves.
    pub(crate) fn active_order(&self) -> Vec<usize> {
        self.active.as_ref().map_or_else(Vec::new, |(_, order)| order.clone())
    }

    pub(crate) fn describe(&self) -> String {
        let open = self.requests.values().filter(|r| !r.ended).count();
        format!("{open} requests, {}, {:?}", self.pipeline.detail(), self.scheduler.stats())
    }

    /// When a node may act: later where it is frozen.
    fn awake(&self, node: usize) -> Duration {
        self.nodes[node].frozen_until.max(self.now)
    }

    fn happen(&mut self, what: Happening) {
        // Who stands still takes things up when it goes on.
        let frozen = match &what {
            Happening::Beat { node, .. }
            | Happening::Loaded { node, .. }
            | Happening::Computed { node, .. }
            | Happening::Connects { node, .. } => self.awake(*node),
            Happening::Arrives { to, .. } if *to != COORDINATOR => self.awake(*to),
            Happening::Arrives { .. }
            | Happening::Tick
            | Happening::Submit(_)
            | Happening::Leave(_) => self.coordinator_until,
            _ => self.now,
        };
        if frozen > self.now {
            return self.at(frozen, what);
        }
        match what {
            Happening::Tick => self.tick(),
            Happening::Beat { node, life, link } => self.beat(node, life, link),
            Happening::Arrives { from, to: COORDINATOR, message } => self.heard(from, message),
            Happening::Arrives { from, to, message } => self.told(from, to, message),
            Happening::Connects { node, life } => self.connect(node, life),
            Happening::Loaded { node, life, epoch } => self.loaded(node, life, epoch),
            Happening::Computed { node, life, epoch, wait, step } => {
                self.computed(node, life, epoch, StageTime::new(wait, step));
            }
            Happening::Submit(id) => self.submit(id),
            Happening::Leave(id) => {
                if let Some(request) = self.requests.get_mut(&id).filter(|r| !r.ended) {
                    request.ended = true;
                    let sequence = self.sequence_of(id);
                    self.scheduler.handle_cancel(sequence);
                    self.note_ended(id);
                    self.pump();
                }
                self.ahead -= 1;
            }
            Happening::Fault(fault) => {
                self.ahead -= 1;
                self.suffer(fault);
            }
            Happening::Heal(a, b) => self.heal(a, b),
            Happening::Restart(node) => {
                self.nodes[node].alive = true;
                let life = self.nodes[node].life;
                self.at(self.now, Happening::Connects { node, life });
            }
            Happening::Recover(node) => self.nodes[node].slow = 1,
        }
    }

    // ---- links

    fn send(&mut self, from: usize, to: usize, message: Message) {
        let delay = Duration::from_micros(100 + self.draw(3000));
        let now = self.now;
        let link = self.links.entry((from, to)).or_default();
        if link.cut_until > now {
            link.held.push_back(message);
            assert!(link.held.len() < LINK_LIMIT, "a link holds too much");
            return;
        }
        link.last = link.last.max(now + delay);
        let when = link.last;
        self.at(when, Happening::Arrives { from, to, message });
    }

    fn heal(&mut self, a: usize, b: usize) {
        for (from, to) in [(a, b), (b, a)] {
            let now = self.now;
            let Some(link) = self.links.get_mut(&(from, to)).filter(|l| l.cut_until <= now) else {
                continue;
            };
            for message in std::mem::take(&mut link.held) {
                self.send(from, to, message);
            }
        }
    }

    /// A crash loses what was under way from and to the node.
    pub(crate) fn lose_links(&mut self, node: usize) {
        for ((from, to), link) in &mut self.links {
            if *from == node || *to == node {
                link.held.clear();
            }
        }
        self.happenings.retain(|_, what| {
            !matches!(what, Happening::Arrives { from, to, .. } if *from == node || *to == node)
        });
    }

    // ---- nodes

    fn connect(&mut self, node: usize, life: u64) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life || n.linked {
            return;
        }
        n.link += 1;
        n.linked = true;
        let link = n.link;
        self.send(node, COORDINATOR, Message::Hello { link });
        self.at(self.now + HEARTBEAT, Happening::Beat { node, life, link });
    }

    fn beat(&mut self, node: usize, life: u64, link: u64) {
        let n = &self.nodes[node];
        if n.alive && n.life == life && n.link == link && n.linked {
            self.send(node, COORDINATOR, Message::FromNode { link, what: Said::Beat });
            self.at(self.now + HEARTBEAT, Happening::Beat { node, life, link });
        }
    }

    fn say(&mut self, node: usize, what: Said) {
        if self.nodes[node].linked {
            let link = self.nodes[node].link;
            self.send(node, COORDINATOR, Message::FromNode { link, what });
        }
    }

    fn told(&mut self, from: usize, node: usize, message: Message) {
        if !self.nodes[node].alive {
            return;
        }
        let (life, slow) = (self.nodes[node].life, self.nodes[node].slow);
        match message {
            Message::Closed { link }
                if self.nodes[node].link == link && self.nodes[node].linked =>
            {
                self.nodes[node].forget();
                self.at(self.now + ms(250), Happening::Connects { node, life });
            }
            Message::Profile => self.say(node, Said::Profiled),
            Message::Assign(assignment) => {
                let epoch = assignment.epoch;
                let n = &mut self.nodes[node];
                assert!(n.stages.len() < 2, "a node never holds three stages");
                n.stages.push(Stage::new(assignment));
                // An engine of its own.
                n.hung_until = Duration::ZERO;
                let took = ms((50 + self.draw(500)) * u64::from(slow));
                self.at(self.now + took, Happening::Loaded { node, life, epoch });
            }
            Message::Start(epoch) => {
                if let Some(stage) = self.nodes[node].stage(epoch) {
                    stage.started = true;
                    self.say(node, Said::Started(epoch));
                }
            }
            Message::Release(epoch) => {
                self.nodes[node].stages.retain(|s| s.assignment.epoch > epoch);
            }
            Message::Abandon(epoch) => {
                self.nodes[node].stages.retain(|s| s.assignment.epoch != epoch);
            }
            Message::Frame(frame) => self.frame(from, node, frame),
            _ => {}
        }
    }

    fn loaded(&mut self, node: usize, life: u64, epoch: Epoch) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life {
            return;
        }
        let fails = n.fail_loads > 0;
        n.fail_loads = n.fail_loads.saturating_sub(1);
        let Some(stage) = n.stage(epoch) else { return };
        if fails {
            n.stages.retain(|s| s.assignment.epoch != epoch);
            return self.say(node, Said::LoadFailed(epoch));
        }
        stage.ready = true;
        self.say(node, Said::Ready(epoch));
    }

    fn frame(&mut self, from: usize, node: usize, frame: Frame) {
        let now = self.now;
        let limit = self.config.max_in_flight as usize;
        let Some(stage) = self.nodes[node].stage(frame.epoch).filter(|s| s.ready) else {
            self.stale += 1;
            return;
        };
        // Only from whom the plan names.
        let before = stage.assignment.at.checked_sub(1).map(|i| stage.assignment.order[i]);
        assert_eq!(from, before.unwrap_or(COORDINATOR), "a frame came from a stranger");
        stage.queue.push_back((now, frame));
        let rows = stage.queue.iter().filter(|(_, f)| !f.meta.rows.is_empty()).count();
        assert!(rows <= limit, "more micro-batches wait at a stage than may be in flight");
        self.begin(node);
    }

    /// The engine takes the next frame, of whichever stage.
    fn begin(&mut self, node: usize) {
        let (now, slow, life) = (self.now, self.nodes[node].slow, self.nodes[node].life);
        let begun: Vec<(Epoch, Duration, usize)> = (self.nodes[node].stages.iter_mut())
            .filter(|s| !s.working)
            .filter_map(|s| {
                let (since, frame) = s.queue.front()?;
                s.working = true;
                Some((s.assignment.epoch, now - *since, frame.tokens.len()))
            })
            .collect();
        for (epoch, wait, positions) in begun {
            let micros = (500 + 100 * positions as u64) * u64::from(slow) + self.draw(200);
            let hangs = self.nodes[node].hung_until.saturating_sub(now);
            let step = Duration::from_micros(micros) + hangs;
            self.at(now + step, Happening::Computed { node, life, epoch, wait, step });
        }
    }

    fn computed(&mut self, node: usize, life: u64, epoch: Epoch, time: StageTime) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life {
            return;
        }
        let sick = n.sick_steps > 0;
        let Some(stage) = n.stage(epoch) else { return };
        stage.working = false;
        let Some((_, frame)) = stage.queue.pop_front() else { return };
        let poison =
            |row: &Row| self.requests.get(&request_of(row.sequence)).and_then(|r| r.poison);
        let poisons: Vec<Poison> = frame.meta.rows.iter().filter_map(poison).collect();
        if poisons.contains(&Poison::Kills) {
            return self.suffer(Fault::Crash(node, ms(300)));
        }
        let fails = !frame.meta.rows.is_empty() && (sick || poisons.contains(&Poison::Fails));
        let n = &mut self.nodes[node];
        n.sick_steps -= u32::from(fails && sick);
        let Some(stage) = n.stage(epoch) else { return };
        let next = stage.compute(frame, time, fails);
        match stage.assignment.order.get(stage.assignment.at + 1).copied() {
            Some(to) => self.send(node, to, Message::Frame(next)),
            None if !next.meta.rows.is_empty() => {
                self.send(node, COORDINATOR, Message::Results(next));
            }
            None => {}
        }
        self.begin(node);
    }

    // ---- the coordinator

    fn heard(&mut self, node: usize, message: Message) {
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

    fn on_said(&mut self, node: usize, what: Said) {
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

    fn on_results(&mut self, frame: &Frame) {
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

    fn on_outcome(&mut self, outcome: Outcome) {
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
            Outcome::Scores { .. } => {}
        }
    }

    fn submit(&mut self, id: u64) {
        self.ahead -= 1;
        let sequence = self.sequence_of(id);
        // Who was held up may hear that the client has gone before it hears of the request.
        let Some(request) = self.requests.get_mut(&id).filter(|r| !r.ended) else { return };
        let new = NewSequence {
            id: sequence,
            prompt: request.prompt.clone(),
            max_new_tokens: request.wanted as u32,
            kind: millrace_shared::scheduler::Kind::Generate,
            submitted: self.now,
            deadline: None,
            client: id % 3,
            priority: millrace_shared::scheduler::Priority::Normal,
        };
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

    fn tick(&mut self) {
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

    fn on_membership(&mut self, event: Event) {
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

    fn tell_all(&mut self, nodes: &[NodeId], message: impl Fn() -> Message) {
        for node in nodes {
            if self.members.contains_key(&number(*node)) {
                self.send(COORDINATOR, number(*node), message());
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
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
    fn check(&self) {
        let running = self.pipeline.phase() == PipelinePhase::Running;
        assert!(running || self.active.is_none(), "micro-batches without a pipeline");
        let stats = self.scheduler.stats();
        assert!(stats.in_flight <= self.config.max_in_flight);
        assert!(stats.blocks_used <= self.config.num_blocks);
    }

    // ---- what goes wrong

    fn suffer(&mut self, fault: Fault) {
        let now = self.now;
        self.causes += fault.causes();
        match fault {
            Fault::Crash(node, pause) => {
                let n = &mut self.nodes[node];
                n.alive = false;
                n.life += 1;
                n.link += 1;
                n.frozen_until = Duration::ZERO;
                n.forget();
                self.lose_links(node);
                self.at(now + pause, Happening::Restart(node));
            }
            Fault::Host(mask, pause) => {
                let all = (0..self.nodes.len()).filter(|i| mask >> i & 1 == 1);
                all.collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|n| self.suffer(Fault::Crash(n, pause)));
            }
            Fault::Freeze(node, time) => {
                self.nodes[node].frozen_until = self.nodes[node].frozen_until.max(now + time);
            }
            Fault::Cut(a, b, time) => {
                for ends in [(a, b), (b, a)] {
                    let link = self.links.entry(ends).or_default();
                    link.cut_until = link.cut_until.max(now + time);
                }
                self.at(now + time, Happening::Heal(a, b));
            }
            Fault::Slow(node, factor, time) => {
                self.nodes[node].slow = factor;
                self.at(now + time, Happening::Recover(node));
            }
            Fault::FailLoad(node) => self.nodes[node].fail_loads += 1,
            Fault::Hang(node, time) => self.nodes[node].hung_until = now + time,
            Fault::Sick(node, steps) => self.nodes[node].sick_steps += steps,
            Fault::Drain(node) => self.drain(node),
            Fault::Recut(mask) => {
                let chosen: Vec<NodeId> =
                    (0..self.nodes.len()).filter(|i| mask >> i & 1 == 1).map(name).collect();
                self.pipeline.handle_recut(&chosen, now);
                self.advance();
            }
            Fault::Cordon(node, on) => {
                self.pipeline.handle_cordon(name(node), CordonReason::Operator, on, now);
                self.advance();
            }
            Fault::EdgeLost => {
                let epoch = self.pipeline.next_epoch().unwrap_or_else(|| self.pipeline.epoch());
                self.pipeline.handle_edge_lost(epoch, "closed", now);
                self.advance();
            }
            Fault::Delay(time) => {
                self.coordinator_until = self.coordinator_until.max(now + time);
                self.late = true;
            }
        }
    }
}
