//! A coordinator that was held up itself does not take that for its nodes' silence.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::membership::{Event, LEASE, Membership, MembershipConfig};
use uuid::Uuid;

const STALL: Duration = Duration::from_secs(20);

fn three() -> (Membership, Vec<NodeId>, Vec<millrace_shared::membership::Session>) {
    let mut membership = Membership::new(MembershipConfig::default());
    let nodes: Vec<NodeId> = (1..=3).map(|n| NodeId(Uuid::from_u128(n))).collect();
    let sessions =
        nodes.iter().map(|&node| membership.handle_hello(node, Duration::ZERO)).collect();
    while membership.poll_event(Duration::ZERO).is_some() {}
    (membership, nodes, sessions)
}

#[test]
fn queued_heartbeats_are_heard_before_anybody_is_lost() {
    let (mut membership, nodes, sessions) = three();
    // All heartbeats wait in the queue while the program is held up; they come one by one.
    for (&node, &session) in nodes.iter().zip(&sessions) {
        assert!(membership.handle_heartbeat(node, session, STALL));
        while let Some(event) = membership.poll_handled() {
            assert!(!matches!(event, Event::Lost { .. }), "{event:?}");
        }
    }
    assert_eq!(membership.poll_event(STALL), None, "everybody was heard");
}

#[test]
fn after_an_own_delay_silence_counts_anew() {
    let (mut membership, _, _) = three();
    membership.handle_own_delay(STALL);
    assert!(
        std::iter::from_fn(|| membership.poll_event(STALL))
            .all(|e| !matches!(e, Event::Lost { .. })),
        "the delay was ours"
    );
    let lost = std::iter::from_fn(|| membership.poll_event(STALL + LEASE))
        .filter(|e| matches!(e, Event::Lost { .. }))
        .count();
    assert_eq!(lost, 3, "but whoever stays silent is lost all the same");
}

#[test]
fn without_a_delay_of_ours_silence_is_loss() {
    let (mut membership, _, _) = three();
    let lost = std::iter::from_fn(|| membership.poll_event(LEASE))
        .filter(|e| matches!(e, Event::Lost { .. }))
        .count();
    assert_eq!(lost, 3);
}
