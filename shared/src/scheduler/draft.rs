//! Guessing the next tokens of a sequence, and when that pays.
//!
//! A pipeline with few streams is bound by reading weights: a row of five positions takes little
//! longer than a row of one. So a decode may carry *drafts*, tokens that are likely to follow; the
//! last stage samples after each of them and keeps what it would have chosen anyway (Leviathan et
//! al. 2023; with tokens that are a function of the token log, acceptance is equality and no answer
//! changes). Drafts come from a [`Drafter`]; the one here looks the last tokens up in what the
//! sequence already holds (prompt lookup; Saxena 2023).
//!
//! Where slots are idle while such a row is under way, further micro-batches begin where it will end
//! if all its guesses are right ([`Want::Follow`]); if they are not, those are stale, and stages that
//! have not begun them leave them out.
//!
//! Not here: verification (the last stage's) and blocks. Invariant: a pipeline that is loaded drafts
//! nothing, and a sequence whose drafts are not accepted soon stops drafting.

use crate::id::SequenceId;
#[cfg(doc)]
use crate::wire::data::Want;

/// Proposes tokens. Implementations may keep state per sequence.
pub trait Drafter: std::fmt::Debug + Send {
    /// At most `most` tokens that may follow `tokens` (prompt and answer so far, never empty); none
    /// where nothing suggests itself.
    fn draft(&mut self, sequence: SequenceId, tokens: &[u32], most: usize) -> Vec<u32>;

    /// The sequence has ended.
    fn forget(&mut self, _sequence: SequenceId) {}
}

/// Most drafts of a row.
const MAX_DRAFTS: u32 = 8;

/// Looks for the latest earlier place with the same last tokens, three of them, else two, and
/// proposes what followed there. Without state; takes time in proportion to the sequence's length.
#[derive(Clone, Copy, Debug, Default)]
pub struct NgramDrafter;

impl Drafter for NgramDrafter {
    fn draft(&mut self, _: SequenceId, tokens: &[u32], most: usize) -> Vec<u32> {
        let found = [3, 2].into_iter().find_map(|n| continuation(tokens, n));
        let mut drafts = Vec::with_capacity(most);
        let Some(mut at) = found else { return drafts };
        // What is copied may be copied again: a loop shorter than the drafts goes round.
        while drafts.len() < most {
            let next = tokens.get(at).or_else(|| drafts.get(at - tokens.len()));
            let Some(&next) = next else { break };
            drafts.push(next);
            at += 1;
        }
        drafts
    }
}

/// Where the latest earlier occurrence of the last `n` tokens goes on.
fn continuation(tokens: &[u32], n: usize) -> Option<usize> {
    let before = tokens.len().checked_sub(1)?;
    let suffix = tokens.len().checked_sub(n).map(|start| &tokens[start..])?;
    tokens[..before].windows(n).rposition(|w| w == suffix).map(|start| start + n)
}

/// Weight of a new verification in the acceptance of a sequence.
const NEW: f64 = 0.3;
/// Acceptance that a sequence begins with: what a place found three tokens long usually gives.
const FIRST_ACCEPTANCE: f64 = 0.7;
/// Drafts are for at most this many streams for each micro-batch in flight: with more, steps are
/// bound by their rows, and every position costs.
pub(super) const FEW_STREAMS: u32 = 2;
/// What one more position costs of a step with one row, until measured: about what CPU stages show.
const USUAL_COST: f64 = 0.25;
/// Acceptance with which it is tried again after a pause: a draft or two.
const RETRY_ACCEPTANCE: f64 = 0.5;
/// Decodes without drafts after drafts did not pay, at first; doubled each time.
const FIRST_PAUSE: u32 = 8;
const LONGEST_PAUSE: u32 = 256;
/// A draft must promise this much more than it costs: predictions err.
const MARGIN: f64 = 1.1;

/// Guesses that fill idle slots are right with this probability at least: a wrong one costs somebody
/// else's time where stages share a machine, and heat everywhere.
const LIKELY: f64 = 0.5;

/// How drafts of one sequence fare.
#[derive(Clone, Debug)]
pub(super) struct Acceptance {
    /// Probability that a draft is right where those before it were.
    rate: f64,
    /// Decodes left without drafts.
    pause: u32,
    next_pause: u32,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { rate: FIRST_ACCEPTANCE, pause: 0, next_pause: FIRST_PAUSE }
    }
}

impl Acceptance {
    /// How many drafts pay in one of `rows` rows of a micro-batch, which takes `time` with so many.
    pub(super) fn length(&mut self, rows: u32, time: impl Fn(u32) -> f64) -> u32 {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        let mut expected = f64::from(rows.max(1));
        let (mut best, mut best_speed) = (0, MARGIN * expected / time(0).max(1e-9));
        let mut chance = 1.0;
        for drafts in 1..=MAX_DRAFTS {
            chance *= self.rate;
            expected += chance;
            let speed = expected / time(drafts).max(1e-9);
            if speed > best_speed {
                (best, best_speed) = (drafts, speed);
            }
        }
        if best == 0 {
            self.pause = self.next_pause;
            self.next_pause = (2 * self.next_pause).min(LONGEST_PAUSE);
            // After the pause it is tried again.
            self.rate = self.rate.max(RETRY_ACCEPTANCE);
        }
        best
    }

    /// How many guesses, drafts of the next row and what may follow them, are likely enough to be
    /// computed in a slot that is idle, where `unverified` others are under way.
    pub(super) fn ahead(&self, unverified: u32) -> u32 {
        let mut chance = self.rate.powi(unverified as i32 + 1);
        let mut count = 0;
        while self.pause == 0 && chance >= LIKELY && count <= MAX_DRAFTS {
            count += 1;
            chance *= self.rate;
        }
        count
    }

    /// `accepted` of `drafted` drafts were right.
    pub(super) fn observe(&mut self, drafted: usize, accepted: usize) {
        if drafted == 0 {
            return;
        }
        let tried = if accepted < drafted { accepted + 1 } else { accepted };
        // Several drafts are several observations.
        let weight = 1.0 - (1.0 - NEW).powi(tried as i32);
        self.rate += weight * (accepted as f64 / tried as f64 - self.rate);
        if accepted == drafted {
            self.next_pause = FIRST_PAUSE;
        }
    }
}

/// Time of a micro-batch of `positions` positions where nothing is measured, in any unit.
pub(super) fn usual_time(positions: u32) -> f64 {
    1.0 - USUAL_COST + USUAL_COST * f64::from(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(tokens: &[u32], most: usize) -> Vec<u32> {
        NgramDrafter.draft(SequenceId(1), tokens, most)
    }

    #[test]
    fn what_followed_last_time_is_proposed() {
        assert_eq!(draft(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 2), [4, 5]);
        assert_eq!(draft(&[1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3], 2), [9, 1], "the latest place");
        assert_eq!(draft(&[7, 2, 3, 4, 8, 2, 3], 3), [4, 8, 2], "two tokens, where three are new");
        assert_eq!(draft(&[5, 6, 5, 6, 5, 6], 5), [5, 6, 5, 6, 5], "a loop goes round");
        assert_eq!(draft(&[4, 4, 4], 4), [4, 4, 4, 4]);
        for nothing in [&[1][..], &[1, 2], &[1, 2, 3, 4, 5], &[1, 2, 1]] {
            assert!(draft(nothing, 4).is_empty(), "{nothing:?}");
        }
    }

    #[test]
    fn drafts_stop_where_they_do_not_pay() {
        let usual = |rows: u32| move |drafts: u32| usual_time(rows + drafts);
        let mut good = Acceptance::default();
        let mut bad = Acceptance::default();
        let mut drafted = 0;
        for _ in 0..500 {
            let n = good.length(1, usual(1)) as usize;
            assert!(n > 0);
            good.observe(n, n);
            let n = bad.length(1, usual(1)) as usize;
            drafted += n;
            bad.observe(n, 0);
        }
        assert_eq!(good.length(1, usual(1)), MAX_DRAFTS);
        assert!(drafted < 60, "{drafted} drafts for nothing in 500 decodes");
        let each_costs_a_step = |drafts: u32| f64::from(1 + drafts);
        assert_eq!(Acceptance::default().length(1, each_costs_a_step), 0);
    }
}
