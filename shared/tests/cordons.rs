//! Why nodes are out of use: each reason for itself, and none that keeps a cluster from serving
//! though somebody could.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::membership::{
    Action, CordonReason, PipelineConfig, PipelinePhase, PipelineState,
};
use millrace_shared::wire::control::StageProfile;

const NOW: Duration = Duration::from_secs(1);

fn node(i: u128) -> NodeId {
    NodeId(uuid::Uuid::from_u128(i))
}

/// Answers everything that is asked; who serves.
fn settle(p: &mut PipelineState) -> Vec<NodeId> {
    while let Some(action) = p.poll_action() {
        match action {
            Action::Profile { node } => p.handle_profiled(node, StageProfile::flat(1.0, 1.0), NOW),
            Action::Plan { epoch, nodes } => {
                p.handle_planned(epoch, nodes.into_iter().map(|(n, _)| n).collect(), NOW);
            }
            Action::Assign { epoch, nodes } => {
                nodes.iter().for_each(|n| p.handle_ready(*n, epoch, NOW));
            }
            _ => {}
        }
    }
    if p.phase() == PipelinePhase::Running { p.chosen().to_vec() } else { Vec::new() }
}

fn pipeline(stages: u16, nodes: u128) -> PipelineState {
    let mut p = PipelineState::new(PipelineConfig::new(stages));
    (1..=nodes).for_each(|i| p.handle_joined(node(i), NOW));
    p
}

#[test]
fn lifting_one_reason_lifts_no_other() {
    use CordonReason::{Drain, Operator, Quarantine};
    let mut p = pipeline(1, 1);
    for why in CordonReason::ALL {
        p.handle_cordon(node(1), why, true, NOW);
    }
    assert!(p.cordons(node(1)).eq([Operator, Drain, Quarantine]));
    p.handle_cordon(node(1), Quarantine, false, NOW);
    p.handle_cordon(node(1), Drain, false, NOW);
    assert!(p.is_cordoned(node(1)) && p.cordons(node(1)).eq([Operator]));
    assert_eq!(p.profile_of(node(1)), None, "and it is not used");
    p.handle_cordon(node(1), Operator, false, NOW);
    assert!(!p.is_cordoned(node(1)));
    assert_eq!(settle(&mut p), [node(1)]);
}

#[test]
fn the_last_that_could_serve_is_needed_despite_its_quarantine() {
    use CordonReason::{Operator, Quarantine};
    let mut p = pipeline(2, 3);
    assert_eq!(settle(&mut p), [node(1), node(2)]);
    p.handle_cordon(node(1), Quarantine, true, NOW);
    assert_eq!(p.needed_despite(Quarantine, NOW), None, "one serves");
    assert!(p.handle_restart("a step failed", NOW));
    let later = NOW + Duration::from_secs(1);
    assert_eq!(p.needed_despite(Quarantine, later), None, "another one is there");
    p.handle_timeout(later);
    assert_eq!(settle(&mut p), [node(2), node(3)]);
    p.handle_lost(node(3), "killed", later);
    assert_eq!(settle(&mut p), []);
    assert_eq!(p.needed_despite(Quarantine, later), Some(node(1)));
    // What an operator or the node itself wants is another matter.
    assert_eq!(p.needed_despite(Operator, later), None);
    p.handle_cordon(node(1), Operator, true, later);
    assert_eq!(p.needed_despite(Quarantine, later), None);
    p.handle_cordon(node(1), Operator, false, later);
    p.handle_cordon(node(1), Quarantine, false, later);
    assert_eq!(settle(&mut p).len(), 2, "it serves again");
}
