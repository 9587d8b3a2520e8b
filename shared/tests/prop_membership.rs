//! Leases and the epochs of a pipeline, under any order of events.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::membership::{
    Action, CordonReason, Event, FLAPS, LEASE, LostReason, MemberState, Membership,
    MembershipConfig, PipelineConfig, PipelinePhase, PipelineState, RETRY_NODE, RETRY_PIPELINE,
    SUSPECT_AFTER, Session,
};
use millrace_shared::wire::control::StageProfile;
use proptest::prelude::*;

fn node(i: u64) -> NodeId {
    NodeId(uuid::Uuid::from_u128(u128::from(i) + 1))
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn events(m: &mut Membership, now: Duration) -> Vec<Event> {
    std::iter::from_fn(|| m.poll_event(now)).collect()
}

#[test]
fn silence_is_suspect_then_lost() {
    let mut m = Membership::new(MembershipConfig::default());
    let a = node(0);
    let session = m.handle_hello(a, ms(0));
    assert_eq!(m.state(a), Some(MemberState::Joining));
    assert_eq!(events(&mut m, ms(0)), [Event::Joined { node: a, session }]);
    assert!(m.handle_heartbeat(a, session, ms(250)));
    assert_eq!(m.state(a), Some(MemberState::Ready));
    assert_eq!(m.next_timeout(), Some(ms(250) + SUSPECT_AFTER));
    assert_eq!(events(&mut m, ms(999)), []);
    assert_eq!(events(&mut m, ms(1000)), [Event::Suspect { node: a }]);
    assert_eq!(m.next_timeout(), Some(ms(250) + LEASE));
    assert!(m.handle_heartbeat(a, session, ms(1500)));
    assert_eq!(events(&mut m, ms(1500)), [Event::Recovered { node: a }]);
    let reason = LostReason::LeaseExpired { silent: LEASE };
    assert_eq!(events(&mut m, ms(3000)), [Event::Lost { node: a, session, reason }]);
    assert!(!m.handle_heartbeat(a, session, ms(3000)), "too late");
    assert_eq!((m.state(a), m.next_timeout(), m.is_empty()), (None, None, true));
}

#[test]
fn an_old_session_cannot_end_a_new_one() {
    let mut m = Membership::new(MembershipConfig::default());
    let a = node(0);
    let old = m.handle_hello(a, ms(0));
    let new = m.handle_hello(a, ms(100));
    m.handle_disconnect(a, old);
    assert!(!m.handle_heartbeat(a, old, ms(200)));
    assert_eq!(
        events(&mut m, ms(200)),
        [
            Event::Joined { node: a, session: old },
            Event::Lost { node: a, session: old, reason: LostReason::Replaced },
            Event::Joined { node: a, session: new },
        ]
    );
    m.handle_leaving(a, new);
    let reason = LostReason::Left;
    assert_eq!(events(&mut m, ms(200)), [Event::Lost { node: a, session: new, reason }]);
}

#[derive(Clone, Debug)]
enum LeaseOp {
    Hello(u64),
    Heartbeat(u64),
    Disconnect(u64),
    Wait(u64),
}

fn lease_op() -> impl Strategy<Value = LeaseOp> {
    prop_oneof![
        (0..3u64).prop_map(LeaseOp::Hello),
        (0..3u64).prop_map(LeaseOp::Heartbeat),
        (0..3u64).prop_map(LeaseOp::Disconnect),
        (1..900u64).prop_map(LeaseOp::Wait),
    ]
}

/// Joined and Lost alternate per node, nobody stays silent for a lease, nobody is lost early.
fn run_leases(ops: &[LeaseOp]) {
    let mut m = Membership::new(MembershipConfig::default());
    let mut sessions: BTreeMap<u64, Session> = BTreeMap::new();
    let mut heard: BTreeMap<NodeId, Duration> = BTreeMap::new();
    let mut present: BTreeSet<NodeId> = BTreeSet::new();
    let mut now = ms(0);
    for op in ops {
        match *op {
            LeaseOp::Hello(i) => {
                sessions.insert(i, m.handle_hello(node(i), now));
                heard.insert(node(i), now);
            }
            LeaseOp::Heartbeat(i) => {
                let Some(&session) = sessions.get(&i) else { continue };
                if m.handle_heartbeat(node(i), session, now) {
                    heard.insert(node(i), now);
                }
            }
            LeaseOp::Disconnect(i) => {
                let Some(&session) = sessions.get(&i) else { continue };
                m.handle_disconnect(node(i), session);
            }
            LeaseOp::Wait(n) => now += ms(n),
        }
        for event in events(&mut m, now) {
            match event {
                Event::Joined { node, .. } => assert!(present.insert(node)),
                Event::Lost { node, reason, .. } => {
                    assert!(present.remove(&node));
                    if let LostReason::LeaseExpired { silent } = reason {
                        assert!(silent >= LEASE && silent == now - heard[&node]);
                    }
                }
                Event::Suspect { node } => assert!(now - heard[&node] >= SUSPECT_AFTER),
                Event::Recovered { node } => assert_eq!(heard[&node], now),
            }
        }
        assert!(present.iter().all(|n| now - heard[n] < LEASE));
        assert_eq!(m.len(), present.len());
        assert!(m.next_timeout().is_none_or(|t| t > now), "a timer in the past never ends");
    }
}

fn actions(p: &mut PipelineState) -> Vec<Action> {
    std::iter::from_fn(|| p.poll_action()).collect()
}

const PROFILE: StageProfile = StageProfile::flat(0.001, 0.008);

fn running(stages: u16) -> PipelineState {
    let mut p = PipelineState::new(PipelineConfig::new(stages));
    let nodes: Vec<_> = (0..u64::from(stages)).map(node).collect();
    for &n in &nodes {
        p.handle_joined(n, ms(0));
    }
    for &n in &nodes {
        p.handle_profiled(n, PROFILE, ms(1));
    }
    p.handle_planned(Epoch(1), nodes.clone(), ms(2));
    for &n in &nodes {
        p.handle_ready(n, Epoch(1), ms(3));
    }
    assert_eq!(p.phase(), PipelinePhase::Running);
    assert_eq!(actions(&mut p).last(), Some(&Action::Start { epoch: Epoch(1), nodes }));
    p
}

#[test]
fn a_pipeline_forms_step_by_step() {
    let mut p = PipelineState::new(PipelineConfig::new(2));
    let (a, b) = (node(0), node(1));
    p.handle_joined(a, ms(0));
    assert_eq!((actions(&mut p), p.phase()), (vec![], PipelinePhase::Waiting));
    assert_eq!(p.detail(), "waiting for nodes: 1 of 2 are there");
    p.handle_joined(b, ms(0));
    assert_eq!(actions(&mut p), [Action::Profile { node: a }, Action::Profile { node: b }]);
    p.handle_profiled(b, PROFILE, ms(1));
    assert_eq!(actions(&mut p), []);
    p.handle_profiled(a, PROFILE, ms(2));
    let nodes = vec![(a, PROFILE), (b, PROFILE)];
    assert_eq!(actions(&mut p), [Action::Plan { epoch: Epoch(1), nodes }]);
    p.handle_planned(Epoch(1), vec![b, a], ms(3));
    assert_eq!(actions(&mut p), [Action::Assign { epoch: Epoch(1), nodes: vec![b, a] }]);
    p.handle_ready(a, Epoch(1), ms(4));
    p.handle_ready(b, Epoch(0), ms(4));
    assert_eq!(actions(&mut p), []);
    p.handle_ready(b, Epoch(1), ms(5));
    assert_eq!(actions(&mut p), [Action::Start { epoch: Epoch(1), nodes: vec![b, a] }]);
    assert_eq!((p.phase(), p.next_timeout()), (PipelinePhase::Running, None));
}

#[test]
fn a_lost_node_ends_the_epoch_and_a_new_one_replaces_it() {
    let mut p = running(2);
    p.handle_lost(node(0), "no heartbeat for 1500 ms", ms(100));
    let done = actions(&mut p);
    assert!(
        matches!(&done[0], Action::Stop { epoch: Epoch(1), reason } if reason.contains("1500"))
    );
    assert_eq!(done[1..], [Action::Release { epoch: Epoch(1), nodes: vec![node(1)] }]);
    assert_eq!((p.phase(), p.epoch()), (PipelinePhase::Waiting, Epoch(2)));
    let at = ms(200);
    p.handle_joined(node(7), at);
    assert_eq!(actions(&mut p), [Action::Profile { node: node(7) }], "the other is measured");
    p.handle_profiled(node(7), PROFILE, at);
    assert!(matches!(actions(&mut p)[..], [Action::Plan { epoch: Epoch(2), .. }]));
}

#[test]
fn an_edge_of_an_older_epoch_harms_nothing() {
    let mut p = running(2);
    p.handle_edge_lost(Epoch(0), "closed", ms(10));
    assert_eq!(p.phase(), PipelinePhase::Running);
    p.handle_edge_lost(Epoch(1), "closed", ms(10));
    let done = actions(&mut p);
    assert!(matches!(&done[0], Action::Stop { epoch: Epoch(1), .. }));
    assert_eq!(done[1], Action::Release { epoch: Epoch(1), nodes: vec![node(0), node(1)] });
    let at = p.next_timeout().unwrap();
    assert_eq!(at, ms(10) + RETRY_PIPELINE, "a moment for the stages to let go");
    p.handle_timeout(at);
    assert!(matches!(actions(&mut p)[..], [Action::Plan { epoch: Epoch(2), .. }]));
}

#[test]
fn a_measured_standby_takes_over_at_once() {
    let mut p = PipelineState::new(PipelineConfig::new(1));
    p.handle_joined(node(0), ms(0));
    p.handle_joined(node(1), ms(0));
    p.handle_profiled(node(0), PROFILE, ms(0));
    p.handle_planned(Epoch(1), vec![node(0)], ms(0));
    actions(&mut p);
    p.handle_ready(node(0), Epoch(1), ms(1));
    let done = actions(&mut p);
    assert_eq!(done[1..], [Action::Profile { node: node(1) }], "who waits measures meanwhile");
    p.handle_profiled(node(1), PROFILE, ms(2));
    p.handle_lost(node(0), "gone", ms(3));
    let done = actions(&mut p);
    assert!(matches!(&done[2], Action::Plan { epoch: Epoch(2), nodes } if nodes[0].0 == node(1)));
}

#[test]
fn a_standby_takes_the_place_of_a_node_that_cannot_load() {
    let mut p = PipelineState::new(PipelineConfig::new(1));
    p.handle_joined(node(0), ms(0));
    p.handle_joined(node(1), ms(0));
    p.handle_profiled(node(0), PROFILE, ms(0));
    p.handle_planned(Epoch(1), vec![node(0)], ms(0));
    p.handle_load_failed(node(0), Epoch(1), "out of memory", ms(10));
    actions(&mut p);
    assert!(p.detail().contains("out of memory"), "{}", p.detail());
    p.handle_timeout(p.next_timeout().unwrap());
    assert_eq!(actions(&mut p), [Action::Profile { node: node(1) }]);
}

#[test]
fn alone_a_node_that_cannot_load_is_tried_again_later() {
    let mut p = PipelineState::new(PipelineConfig::new(1));
    p.handle_joined(node(0), ms(0));
    p.handle_profiled(node(0), PROFILE, ms(0));
    p.handle_planned(Epoch(1), vec![node(0)], ms(0));
    actions(&mut p);
    let deadline = p.next_timeout().unwrap();
    p.handle_timeout(deadline);
    assert_eq!(actions(&mut p), [Action::Release { epoch: Epoch(1), nodes: vec![node(0)] }]);
    assert_eq!(p.next_timeout(), Some(deadline + RETRY_NODE));
    p.handle_timeout(deadline + RETRY_NODE);
    assert!(matches!(actions(&mut p)[..], [Action::Plan { epoch: Epoch(2), .. }]));
}

#[test]
fn what_cannot_be_cut_waits_for_other_nodes() {
    let mut p = PipelineState::new(PipelineConfig::new(1));
    p.handle_joined(node(0), ms(0));
    p.handle_profiled(node(0), PROFILE, ms(0));
    p.handle_plan_failed(Epoch(1), "model does not fit", ms(1));
    actions(&mut p);
    assert_eq!(p.next_timeout(), None);
    assert!(p.detail().contains("model does not fit"));
    p.handle_lost(node(0), "it left", ms(2));
    p.handle_joined(node(1), ms(3));
    assert_eq!(actions(&mut p), [Action::Profile { node: node(1) }]);
}

#[test]
fn a_cut_that_is_under_way_does_not_meet_other_nodes() {
    let mut p = PipelineState::new(PipelineConfig::new(1));
    p.handle_joined(node(0), ms(0));
    p.handle_joined(node(1), ms(0));
    p.handle_profiled(node(0), PROFILE, ms(0));
    p.handle_lost(node(0), "it left", ms(1));
    p.handle_profiled(node(1), PROFILE, ms(2));
    actions(&mut p);
    p.handle_planned(Epoch(1), vec![node(0)], ms(3));
    assert_eq!((actions(&mut p), p.phase()), (vec![], PipelinePhase::Planning));
    p.handle_planned(Epoch(2), vec![node(1)], ms(4));
    assert_eq!(p.phase(), PipelinePhase::Assigning);
}

#[test]
fn a_flexible_pipeline_forms_from_those_who_are_left() {
    let config = PipelineConfig { flexible: true, ..PipelineConfig::new(3) };
    let mut p = PipelineState::new(config);
    let mut now = ms(0);
    for n in 0..3 {
        p.handle_joined(node(n), now);
        p.handle_profiled(node(n), PROFILE, now);
    }
    // It took the first who came, alone; the others were measured beside it.
    p.handle_planned(Epoch(1), vec![node(0)], now);
    p.handle_ready(node(0), Epoch(1), now);
    assert!(p.handle_recut(&[node(0), node(1), node(2)], now));
    p.handle_planned(Epoch(2), vec![node(0), node(1), node(2)], now);
    (0..3).for_each(|n| p.handle_ready(node(n), Epoch(2), now));
    p.handle_switched(Epoch(2));
    assert_eq!((p.epoch(), p.chosen().len()), (Epoch(2), 3));
    actions(&mut p);
    for _ in 0..FLAPS {
        p.handle_lost(node(2), "gone", now);
        let done = actions(&mut p);
        assert!(matches!(&done[2], Action::Plan { nodes, .. } if nodes.len() == 2), "{done:?}");
        p.handle_joined(node(2), now);
        p.handle_profiled(node(2), PROFILE, now);
        p.handle_plan_postponed(p.epoch(), "later", now);
        now = p.next_timeout().unwrap();
        p.handle_timeout(now);
        let done = actions(&mut p);
        let Some(Action::Plan { epoch, nodes }) = done.last() else { panic!("{done:?}") };
        let order: Vec<_> = nodes.iter().map(|(n, _)| *n).collect();
        p.handle_planned(*epoch, order.clone(), now);
        order.iter().for_each(|n| p.handle_ready(*n, *epoch, now));
        actions(&mut p);
    }
    assert_eq!(p.chosen(), [node(0), node(1)], "who comes and goes stays a stand-by");
}

#[derive(Clone, Debug)]
enum PipeOp {
    Join(u64),
    Lose(u64),
    Suspect(u64, bool),
    EdgeLost,
    /// A new cut over the nodes whose bits are set.
    Recut(u8),
    Restart,
    Cordon(u64, usize, bool),
    /// Answers the nth action that is outstanding; `false` badly.
    Answer(usize, bool),
    Wait(u64),
}

fn pipe_op() -> impl Strategy<Value = PipeOp> {
    prop_oneof![
        3 => (0..5u64).prop_map(PipeOp::Join),
        1 => (0..5u64).prop_map(PipeOp::Lose),
        1 => (0..5u64, any::<bool>()).prop_map(|(i, s)| PipeOp::Suspect(i, s)),
        1 => Just(PipeOp::EdgeLost),
        2 => (1..32u8).prop_map(PipeOp::Recut),
        1 => Just(PipeOp::Restart),
        1 => (0..5u64, 0..3usize, any::<bool>()).prop_map(|(i, why, on)| PipeOp::Cordon(i, why, on)),
        12 => (0..4usize, prop::bool::weighted(0.9)).prop_map(|(n, ok)| PipeOp::Answer(n, ok)),
        2 => (1..8000u64).prop_map(PipeOp::Wait),
    ]
}

/// What the outside world owes the machine.
#[derive(Clone, Debug)]
enum Debt {
    Profile(NodeId),
    Plan(Epoch, Vec<NodeId>),
    Load(NodeId, Epoch),
    Switch(Epoch),
}

/// The coordinator and its nodes, as the machine sees them.
struct World {
    p: PipelineState,
    present: BTreeSet<NodeId>,
    debts: Vec<Debt>,
    /// The epoch that serves.
    started: Option<Epoch>,
    last_assigned: u64,
    /// Stages that nodes hold, by epoch.
    held: BTreeSet<(NodeId, u64)>,
    now: Duration,
}

impl World {
    fn answer(&mut self, debt: Debt, good: bool) {
        let (p, now) = (&mut self.p, self.now);
        match debt {
            Debt::Profile(n) if !self.present.contains(&n) => {}
            Debt::Load(n, _) if !self.present.contains(&n) => {}
            Debt::Profile(n) if good => p.handle_profiled(n, PROFILE, now),
            Debt::Profile(n) => p.handle_profile_failed(n, "no", now),
            Debt::Plan(epoch, nodes) if good => p.handle_planned(epoch, nodes, now),
            Debt::Plan(epoch, _) => p.handle_plan_failed(epoch, "no", now),
            Debt::Switch(epoch) if p.next_epoch() != Some(epoch) => {}
            Debt::Switch(epoch) if good => {
                self.started = Some(epoch);
                p.handle_switched(epoch);
            }
            Debt::Switch(epoch) => p.handle_edge_lost(epoch, "no", now),
            Debt::Load(n, epoch) if good => p.handle_ready(n, epoch, now),
            Debt::Load(n, epoch) => p.handle_load_failed(n, epoch, "no", now),
        }
    }

    fn apply(&mut self, op: &PipeOp) {
        let now = self.now;
        match *op {
            PipeOp::Join(i) if self.present.insert(node(i)) => self.p.handle_joined(node(i), now),
            PipeOp::Join(_) => {}
            PipeOp::Lose(i) => {
                self.present.remove(&node(i));
                self.held.retain(|(n, _)| *n != node(i));
                self.p.handle_lost(node(i), "gone", now);
            }
            PipeOp::Suspect(i, s) => self.p.handle_suspect(node(i), s, now),
            PipeOp::EdgeLost => self.p.handle_edge_lost(self.p.epoch(), "closed", now),
            PipeOp::Recut(mask) => {
                let nodes: Vec<_> = (0..5).filter(|i| mask >> i & 1 == 1).map(node).collect();
                let idle = self.started.is_some() && self.p.next_epoch().is_none();
                let began = self.p.handle_recut(&nodes, now);
                assert!(idle || !began, "only beside an epoch that runs, one at a time");
            }
            PipeOp::Cordon(i, why, on) => {
                self.p.handle_cordon(node(i), CordonReason::ALL[why], on, now);
            }
            PipeOp::Restart => {
                assert_eq!(self.p.handle_restart("told to", now), self.started.is_some());
            }
            PipeOp::Answer(n, good) if n < self.debts.len() => {
                let debt = self.debts.remove(n);
                self.answer(debt, good);
            }
            PipeOp::Answer(..) => {}
            PipeOp::Wait(n) => {
                self.now += ms(n);
                if self.p.next_timeout().is_some_and(|t| t <= self.now) {
                    self.p.handle_timeout(self.now);
                }
            }
        }
    }

    fn carry_out(&mut self, stages: usize) {
        for action in actions(&mut self.p) {
            match action {
                Action::Profile { node } => self.debts.push(Debt::Profile(node)),
                Action::Plan { epoch, nodes } => {
                    assert!(nodes.iter().all(|(n, _)| !self.p.is_cordoned(*n)), "cordoned");
                    assert!(nodes.len() == stages || self.p.next_epoch() == Some(epoch));
                    let order = nodes.into_iter().rev().map(|(n, _)| n).collect();
                    self.debts.push(Debt::Plan(epoch, order));
                }
                Action::Assign { epoch, nodes } => {
                    let beside = self.p.next_epoch() == Some(epoch);
                    assert_eq!(self.started.is_some(), beside, "one at a time, or beside it");
                    assert!(epoch.0 > self.last_assigned, "epochs increase");
                    self.last_assigned = epoch.0;
                    self.held.extend(nodes.iter().map(|n| (*n, epoch.0)));
                    self.debts.extend(nodes.into_iter().map(|n| Debt::Load(n, epoch)));
                }
                Action::Start { epoch, nodes } => {
                    assert!(nodes.iter().all(|n| self.present.contains(n)));
                    assert_eq!(epoch.0, self.last_assigned);
                    match self.started {
                        Some(old) => {
                            assert!(self.p.next_epoch() == Some(epoch) && old < epoch);
                            self.debts.push(Debt::Switch(epoch));
                        }
                        None => {
                            assert_eq!(nodes.len(), stages);
                            self.started = Some(epoch);
                        }
                    }
                }
                Action::Stop { epoch, .. } => assert_eq!(self.started.take(), Some(epoch)),
                Action::Abandon { epoch, nodes } => {
                    assert!(self.started.is_some_and(|s| s < epoch), "the old one serves on");
                    assert!(nodes.iter().all(|n| self.present.contains(n)));
                    self.held.retain(|&(n, e)| e != epoch.0 || !nodes.contains(&n));
                }
                Action::Release { epoch, nodes } => {
                    assert!(nodes.iter().all(|n| self.present.contains(n)));
                    assert!(self.started.is_none_or(|s| s > epoch));
                    self.held.retain(|&(n, e)| e > epoch.0 || !nodes.contains(&n));
                }
            }
        }
        let is_running = self.p.phase() == PipelinePhase::Running;
        assert_eq!(self.started.is_some(), is_running);
        assert!(self.p.chosen().iter().all(|n| self.present.contains(n)), "only present nodes");
        if let (true, None) = (is_running, self.p.next_epoch()) {
            let held: Vec<_> = self.held.iter().copied().collect();
            let mut serving: Vec<_> =
                self.p.chosen().iter().map(|&n| (n, self.p.epoch().0)).collect();
            serving.sort_unstable();
            assert_eq!(held, serving, "nobody keeps a stage of another epoch");
            assert_eq!(self.started, Some(self.p.epoch()));
        }
    }
}

fn run_pipeline(stages: u16, ops: &[PipeOp]) {
    let mut world = World {
        p: PipelineState::new(PipelineConfig::new(stages)),
        present: BTreeSet::new(),
        debts: Vec::new(),
        started: None,
        last_assigned: 0,
        held: BTreeSet::new(),
        now: ms(0),
    };
    for op in ops {
        world.apply(op);
        world.carry_out(usize::from(stages));
    }
    // When all is well again it runs: fresh nodes, everything answered well, time passes.
    for i in 0..5 {
        world.apply(&PipeOp::Suspect(i, false));
        (0..3).for_each(|why| world.apply(&PipeOp::Cordon(i, why, false)));
        world.apply(&PipeOp::Join(i));
    }
    world.apply(&PipeOp::Join(5));
    for _ in 0..40 {
        world.carry_out(usize::from(stages));
        while !world.debts.is_empty() {
            world.apply(&PipeOp::Answer(0, true));
            world.carry_out(usize::from(stages));
        }
        world.apply(&PipeOp::Wait(60_000));
    }
    assert_eq!(world.p.phase(), PipelinePhase::Running, "{}", world.p.detail());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn leases_are_kept(ops in prop::collection::vec(lease_op(), 1..80)) {
        run_leases(&ops);
    }

    #[test]
    fn a_pipeline_always_forms_again(
        stages in 1u16..4,
        ops in prop::collection::vec(pipe_op(), 1..120),
    ) {
        run_pipeline(stages, &ops);
    }
}
