//! The coordinator, the nodes and the links between them, driven by one queue of events.
//!
//! The coordinator here is what the actors are around the state machines: it translates. Links keep
//! order and hold what is sent over them while they are cut, as QUIC does; what belongs to an ended
//! session or epoch is dropped where the actors drop it.

mod coordinator;
mod faults;
mod members;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId, SequenceId};
use millrace_shared::membership::{
    Membership, MembershipConfig, PipelineConfig, PipelineState, Session, Stalls,
};
use millrace_shared::scheduler::{Kind, NewSequence, Priority, Scheduler, SchedulerConfig};
use millrace_shared::wire::data::StageTime;

use super::doubt::{Doubts, Poison, request_of};
use super::node::{Assignment, Frame, Node, mix};

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

impl Request {
    /// What the scheduler is given, under one of its names.
    pub(crate) fn sequence(&self, id: SequenceId, now: Duration) -> NewSequence {
        NewSequence {
            id,
            prompt: self.prompt.clone(),
            max_new_tokens: self.wanted as u32,
            kind: Kind::Generate,
            submitted: now,
            deadline: None,
            client: request_of(id) % 3,
            priority: Priority::Normal,
        }
    }
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
}
