//! What the last stage hands out of a position: all logits, the largest few, or its hidden state.
//!
//! A sampler that needs only the best `k` logits says so per row ([`HeadWant`]); an engine may then
//! leave the others where they were computed. The best `k` are exactly those that a scan of all
//! logits would find, and a logit that is not finite is as much an error; an engine that has all
//! logits anyway reduces them by [`StageOutput::full`].

use millrace_shared::sampling::{MAX_CANDIDATES, SampleError, largest_logits};

use crate::seam::{LogitsRow, StageOutput};

/// What a row's positions need of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadWant {
    /// All logits.
    Full,
    /// The largest `k`, 1 to [`MAX_CANDIDATES`] (any other number is as `Full`).
    Top(usize),
    /// No logits: the hidden state that they would be made of.
    Hidden,
}

/// The largest logits of a position as pairs of (token id, logit), larger first, equal ones by lower
/// id; fewer than asked for where the vocabulary has fewer. Or the first logit that is not finite.
pub type TopLogits<'a> = Result<&'a [(u32, f32)], SampleError>;

/// Logits of one position, as its row wants them.
#[derive(Debug)]
pub enum HeadLogits<'a> {
    /// `vocab` logits; the receiver may change them.
    Full(&'a mut [f32]),
    /// The largest.
    Top(TopLogits<'a>),
    /// The normalised hidden state, as wide as the model; no logits.
    Hidden(&'a [f32]),
}

/// What the head gives for one position.
#[derive(Debug)]
pub struct HeadRow<'a> {
    /// Index into `StepMeta::rows`.
    pub row: usize,
    /// Position in the sequence.
    pub position: u32,
    /// Its logits.
    pub logits: HeadLogits<'a>,
}

impl StageOutput<'_> {
    /// What is wanted of row `row` of the step.
    pub fn want(&self, row: usize) -> HeadWant {
        match self {
            Self::Head { want, .. } => match want.get(row) {
                Some(&HeadWant::Top(k)) if (1..=MAX_CANDIDATES).contains(&k) => HeadWant::Top(k),
                Some(HeadWant::Hidden) => HeadWant::Hidden,
                _ => HeadWant::Full,
            },
            Self::Hidden(_) | Self::Logits(_) => HeadWant::Full,
        }
    }

    /// Hands out a position of which all logits are there, reduced to what its row wants;
    /// `candidates` is only memory.
    pub fn full(
        &mut self,
        row: usize,
        position: u32,
        logits: &mut [f32],
        candidates: &mut Vec<(u32, f32)>,
    ) {
        let want = self.want(row);
        match self {
            Self::Hidden(_) => {}
            Self::Logits(sink) => sink(LogitsRow { row, position, logits }),
            Self::Head { sink, .. } => {
                let logits = match want {
                    // Who wants no logits is not asked here.
                    HeadWant::Full | HeadWant::Hidden => HeadLogits::Full(logits),
                    HeadWant::Top(k) => HeadLogits::Top(
                        largest_logits(logits, k, candidates).map(|()| candidates.as_slice()),
                    ),
                };
                sink(HeadRow { row, position, logits });
            }
        }
    }

    /// Hands out the largest logits of a position whose row wants no others.
    pub fn top(&mut self, row: usize, position: u32, top: TopLogits<'_>) {
        if let Self::Head { sink, .. } = self {
            sink(HeadRow { row, position, logits: HeadLogits::Top(top) });
        }
    }

    /// Hands out the normalised hidden state of a position whose row wants no logits.
    pub fn hidden(&mut self, row: usize, position: u32, hidden: &[f32]) {
        if let Self::Head { sink, .. } = self {
            sink(HeadRow { row, position, logits: HeadLogits::Hidden(hidden) });
        }
    }
}
