//! Requests that nodes die of.
//!
//! ```text
//!              death                death                  two deaths
//!  (unknown) ─────────▶ in company ─────────▶ to run alone ─────────────▶ fails
//!      ▲                    │                     │
//!      └────────────────────┴─────────────────────┘
//!         PROOF tokens more since the last death, or its end
//! ```
//!
//! Counts, for each sequence, the unexplained deaths of nodes at which it was in flight, one for an
//! epoch: nodes that are lost together (a host of several, a switch, a stall and then the node that
//! stood still) have one cause. What runs alone is in flight alone, so that of a third death no
//! other request can be the cause; a second one of that kind is no coincidence either, even where
//! something else kills node after node. A death counts only where the sequence has not had a token
//! since the one before: what nodes die of does not get on. Tokens acquit: a sequence that gets past where it was is none that nodes
//! die of, and of many streams under which nodes are killed none need run alone. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::SequenceId;

/// Deaths after which a sequence runs alone.
const ALONE: u32 = 2;
/// Deaths after which its request fails.
const FAILS: u32 = 4;
/// Tokens since the last death that prove a sequence harmless: one could be luck.
pub const PROOF: u32 = 8;

/// What follows from a death for a sequence that was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is computed again, like all others.
    Company,
    /// It is computed again with no other in flight.
    Alone,
    /// Its request fails.
    Fails,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    deaths: u32,
    tokens: u32,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Deaths {
    seen: BTreeMap<SequenceId, Seen>,
    /// What was in flight when the epoch ended, of which nobody knows yet whether a node died.
    exposed: BTreeSet<SequenceId>,
    /// A death of this epoch has been counted.
    counted: bool,
}

impl Deaths {
    /// An epoch begins.
    pub fn handle_begin(&mut self) {
        self.exposed.clear();
        self.counted = false;
    }

    /// The epoch stands still, while these are in flight.
    pub fn handle_end(&mut self, in_flight: BTreeSet<SequenceId>) {
        if !self.counted {
            self.exposed = in_flight;
        }
    }

    /// A node died, nobody knows why, and with it the epoch that was said to have ended. What follows
    /// for each sequence, where it is the first death of the epoch.
    pub fn handle_death(&mut self) -> Vec<(SequenceId, Fate)> {
        if std::mem::replace(&mut self.counted, true) {
            return Vec::new();
        }
        let mut count = |id| {
            let seen = self.seen.entry(id).or_default();
            let counts = u32::from(seen.tokens == 0);
            *seen = Seen { deaths: seen.deaths + counts, tokens: 0 };
            match seen.deaths {
                0..ALONE => (id, Fate::Company),
                ALONE..FAILS => (id, Fate::Alone),
                _ => (id, Fate::Fails),
            }
        };
        std::mem::take(&mut self.exposed).into_iter().map(&mut count).collect()
    }

    /// A sequence has one more token.
    pub fn handle_token(&mut self, id: SequenceId) {
        let Some(seen) = self.seen.get_mut(&id) else { return };
        seen.tokens += 1;
        if seen.tokens >= PROOF {
            self.seen.remove(&id);
        }
    }

    /// A sequence has ended, however.
    pub fn handle_ended(&mut self, id: SequenceId) {
        self.seen.remove(&id);
        self.exposed.remove(&id);
    }

    /// A sequence has another name from now on.
    pub fn handle_renamed(&mut self, old: SequenceId, new: SequenceId) {
        if let Some(seen) = self.seen.remove(&old) {
            self.seen.insert(new, seen);
        }
        if self.exposed.remove(&old) {
            self.exposed.insert(new);
        }
    }

    /// Whether nothing is remembered of any sequence.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty() && self.exposed.is_empty()
    }

    /// Whether a sequence must run alone.
    pub fn is_alone(&self, id: SequenceId) -> bool {
        self.seen.get(&id).is_some_and(|s| s.deaths >= ALONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POISON: SequenceId = SequenceId(1);
    const COMPANY: SequenceId = SequenceId(2);

    /// A death in an epoch of its own.
    fn death<const N: usize>(
        deaths: &mut Deaths,
        in_flight: [SequenceId; N],
    ) -> Vec<(SequenceId, Fate)> {
        deaths.handle_begin();
        deaths.handle_end(in_flight.into());
        deaths.handle_death()
    }

    #[test]
    fn the_second_death_of_one_that_ran_alone_is_its_fault() {
        let mut deaths = Deaths::default();
        let both = [POISON, COMPANY];
        assert_eq!(death(&mut deaths, both), both.map(|id| (id, Fate::Company)));
        assert!(!deaths.is_alone(POISON));
        assert_eq!(death(&mut deaths, both), both.map(|id| (id, Fate::Alone)));
        assert!(deaths.is_alone(POISON) && deaths.is_alone(COMPANY));
        assert_eq!(death(&mut deaths, [POISON]), [(POISON, Fate::Alone)], "chance, perhaps");
        assert_eq!(death(&mut deaths, [POISON]), [(POISON, Fate::Fails)]);
        deaths.handle_ended(POISON);
        // Who was there both times, and is harmless, goes on.
        (0..PROOF).for_each(|_| deaths.handle_token(COMPANY));
        assert!(!deaths.is_alone(COMPANY));
        assert_eq!(death(&mut deaths, [COMPANY]), [(COMPANY, Fate::Company)]);
    }

    #[test]
    fn tokens_acquit_and_names_change_nothing() {
        let mut deaths = Deaths::default();
        death(&mut deaths, [POISON]);
        (1..PROOF).for_each(|_| deaths.handle_token(POISON));
        deaths.handle_renamed(POISON, COMPANY);
        // One token short of an acquittal; but it had got on.
        assert_eq!(death(&mut deaths, [COMPANY]), [(COMPANY, Fate::Company)]);
        assert_eq!(death(&mut deaths, [COMPANY]), [(COMPANY, Fate::Alone)]);
        (1..PROOF).for_each(|_| deaths.handle_token(COMPANY));
        assert!(deaths.is_alone(COMPANY));
        for _ in 0..10 {
            assert_eq!(death(&mut deaths, [COMPANY]), [(COMPANY, Fate::Alone)]);
            deaths.handle_token(COMPANY);
        }
        let mut deaths = Deaths::default();
        for _ in 0..10 {
            assert_eq!(death(&mut deaths, [POISON]), [(POISON, Fate::Company)]);
            (0..PROOF).for_each(|_| deaths.handle_token(POISON));
        }
        death(&mut deaths, [POISON]);
        deaths.handle_ended(POISON);
        assert_eq!(death(&mut deaths, [POISON]), [(POISON, Fate::Company)]);
    }

    #[test]
    fn nodes_that_are_lost_together_die_once() {
        let mut deaths = Deaths::default();
        let both = [POISON, COMPANY];
        for expected in [Fate::Company, Fate::Alone] {
            deaths.handle_begin();
            deaths.handle_end(both.into());
            assert_eq!(deaths.handle_death(), both.map(|id| (id, expected)));
            // The host's second node, and the third, after the epoch was called lost.
            deaths.handle_end(both.into());
            assert_eq!(deaths.handle_death(), []);
            deaths.handle_end(both.into());
            assert_eq!(deaths.handle_death(), []);
        }
        // An end without a death counts nothing.
        let mut deaths = Deaths::default();
        deaths.handle_end(both.into());
        deaths.handle_begin();
        assert_eq!(deaths.handle_death(), []);
        assert!(deaths.is_empty());
    }
}
