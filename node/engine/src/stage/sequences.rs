//! What the last stage knows of each open sequence, and the sampling of its rows.
//!
//! The history of a sequence is its token log. A sampled token enters it at the index after the
//! row's last position; whatever was there (a step that is tried again) is cut off first, so running
//! a row twice gives the same token. A row that verifies drafts is as many samplings, one after the
//! other, each after the tokens that were really chosen; it ends where a draft is another token. A
//! row that follows another one which was under way when it was sent begins where the history ends,
//! with the token that was chosen last, or else with a wrong guess: then nothing comes of it. Of a
//! sequence that is embedded, hidden states are added up, each position once: after a failed step only
//! position 0 can follow.

use std::collections::{HashMap, HashSet, VecDeque};

use millrace_shared::id::SequenceId;
use millrace_shared::pooling::{Pooling, RunningSum, unit};
use millrace_shared::sampling::{
    Place, SampleError, Sampled, SamplingParams, Scratch, TokenMask, sample, sample_top, score,
};
use millrace_shared::wire::data::{
    ChosenToken, Failure, MaskMeta, OpenMeta, Row, RowMask, RowOutcome, SequenceOpen, StepMeta,
    Want,
};

use super::StageError;
use crate::head::{HeadLogits, HeadRow, HeadWant};
use crate::seam::StageSpec;

/// Sequences that were released before they were opened: the two travel on different streams. Only
/// the latest are remembered; forgetting one leaves an unused entry until the next load.
const REMEMBERED_RELEASES: usize = 1024;

struct Sequence {
    params: SamplingParams,
    seed: u64,
    prompt_len: usize,
    history: Vec<u32>,
    /// Every token waits for a mask.
    constrained: bool,
    /// What may come after which position: the latest that was told.
    mask: Option<(u32, TokenMask)>,
    /// Of its hidden states, where it is embedded.
    sum: RunningSum,
}

impl Sequence {
    /// Chooses the token after a position and enters it into the history, in place of whatever
    /// followed that position.
    fn choose(&mut self, got: HeadRow<'_>, scratch: &mut Scratch) -> Result<Sampled, SampleError> {
        let Self { params, seed, prompt_len, history, mask, .. } = self;
        let last = got.position;
        history.truncate(last as usize + 1);
        let sampled = match got.logits {
            HeadLogits::Full(logits) => {
                let mask = mask.as_ref().map(|(_, mask)| mask);
                let place =
                    Place { history, prompt_len: *prompt_len, seed: *seed, position: last, mask };
                sample(logits, params, place, scratch)
            }
            HeadLogits::Top(top) => sample_top(top?, params, *seed, last, scratch),
            HeadLogits::Hidden(_) => Err(SampleError::Empty),
        }?;
        history.push(sampled.token);
        Ok(sampled)
    }
}

/// A sequence, or why its rows cannot be sampled.
type Entry = Result<Sequence, String>;

pub(super) struct Sequences {
    /// The stage's number, for what its computing is to blame for.
    stage: u16,
    vocab: u32,
    max_len: usize,
    limit: usize,
    open: HashMap<SequenceId, Entry>,
    early: HashSet<SequenceId>,
    early_order: VecDeque<SequenceId>,
    scratch: Scratch,
}

/// Micro-batches that a pipeline can have in flight: one for each of 1,024 stages and one more.
const MAX_IN_FLIGHT: usize = 1025;

/// Outcome of a row as it grows: `None` where logits are still to come.
pub(super) type Outcomes = Vec<Option<RowOutcome>>;

impl Sequences {
    pub(super) fn new(spec: &StageSpec, stage: u16) -> Self {
        Self {
            stage,
            vocab: spec.config.vocab,
            max_len: spec.settings.max_model_len as usize,
            // Announcements overtake the releases that travel with the frames: every micro-batch in
            // flight may have opened as many sequences as run at once.
            limit: MAX_IN_FLIGHT * spec.settings.max_num_seqs as usize + 64,
            open: HashMap::new(),
            early: HashSet::new(),
            early_order: VecDeque::new(),
            scratch: Scratch::default(),
        }
    }

    pub(super) fn open(&mut self, opens: OpenMeta) -> Result<(), StageError> {
        let new = opens.opens.iter().filter(|o| !self.open.contains_key(&o.sequence)).count();
        let open = self.open.len() + new;
        if open > self.limit {
            return Err(StageError::TooManySequences { open, limit: self.limit });
        }
        for open in opens.opens {
            if self.early.remove(&open.sequence) {
                self.early_order.retain(|id| *id != open.sequence);
                continue;
            }
            let id = open.sequence;
            let entry = self.check(&open).map(|()| Sequence {
                params: open.params,
                seed: open.seed,
                prompt_len: open.prompt_len as usize,
                history: open.tokens,
                constrained: open.constrained,
                mask: None,
                sum: RunningSum::default(),
            });
            self.open.insert(id, entry);
        }
        Ok(())
    }

    fn check(&self, open: &SequenceOpen) -> Result<(), String> {
        open.params.validate(self.vocab).map_err(|e| format!("sampling parameters: {e}"))?;
        if open.tokens.len() > self.max_len || open.prompt_len as usize > open.tokens.len() {
            return Err(format!(
                "opened with {} tokens, {} of them the prompt; the limit is {}",
                open.tokens.len(),
                open.prompt_len,
                self.max_len
            ));
        }
        match open.tokens.iter().find(|&&id| id >= self.vocab) {
            Some(id) => Err(format!("token id {id} is outside the vocabulary of {}", self.vocab)),
            None => Ok(()),
        }
    }

    /// Notes what may come next. Of a sequence that is not open, or never constrained, it means
    /// nothing: the sequence may have ended in the meantime.
    pub(super) fn mask(&mut self, masks: MaskMeta) {
        for RowMask { sequence, position, allowed } in masks.masks {
            if let Some(Ok(sequence)) = self.open.get_mut(&sequence)
                && sequence.constrained
            {
                sequence.mask = Some((position, allowed));
            }
        }
    }

    pub(super) fn release(&mut self, id: SequenceId) {
        if self.open.remove(&id).is_some() || !self.early.insert(id) {
            return;
        }
        self.early_order.push_back(id);
        if self.early_order.len() > REMEMBERED_RELEASES
            && let Some(oldest) = self.early_order.pop_front()
        {
            self.early.remove(&oldest);
        }
    }

    /// The outcomes that are known before the engine has run.
    pub(super) fn begin(&mut self, meta: &StepMeta) -> Outcomes {
        meta.rows
            .iter()
            .enumerate()
            .map(|(index, row)| match row.want {
                Want::None => Some(RowOutcome::Done),
                Want::Follow if !self.follows(row, meta.drafts_of(index)) => Some(RowOutcome::Done),
                Want::Sample
                | Want::Score { .. }
                | Want::Verify
                | Want::Follow
                | Want::Sum
                | Want::Embed { .. } => self.ready(row).err().map(|e| RowOutcome::Failed(e.into())),
            })
            .collect()
    }

    /// Whether a row begins with the token that was chosen last.
    fn follows(&self, row: &Row, drafts: &[u32]) -> bool {
        let Some(Ok(sequence)) = self.open.get(&row.sequence) else { return true };
        let last = row.position as usize;
        sequence.history.len() == last + 1 && sequence.history.get(last) == drafts.first()
    }

    fn ready(&self, row: &Row) -> Result<(), String> {
        let sequence = self.get(row)?;
        // Drafts are no part of the history.
        let own = if row.drafts() > 0 { 1 } else { row.count };
        let end = (row.position + own) as usize;
        if sequence.history.len() < end {
            return Err(format!(
                "sequence {} has {} tokens at the last stage, the row ends at {end}",
                row.sequence,
                sequence.history.len()
            ));
        }
        let chooses = matches!(row.want, Want::Sample | Want::Verify | Want::Follow);
        let last = row.position + own - 1;
        if chooses
            && sequence.constrained
            && (row.drafts() > 0 || sequence.mask.as_ref().map(|m| m.0) != Some(last))
        {
            return Err(format!(
                "what the grammar of sequence {} allows after position {last} never came",
                row.sequence
            ));
        }
        Ok(())
    }

    fn get(&self, row: &Row) -> Result<&Sequence, String> {
        match self.open.get(&row.sequence) {
            None => Err(format!("sequence {} was never opened at the last stage", row.sequence)),
            Some(Err(cause)) => Err(cause.clone()),
            Some(Ok(sequence)) => Ok(sequence),
        }
    }

    /// What each row wants of the head: no more than its sampling reads.
    pub(super) fn wants(&self, meta: &StepMeta, wants: &mut Vec<HeadWant>) {
        let vocab = self.vocab as usize;
        wants.clear();
        wants.extend(meta.rows.iter().map(|row| match (row.want, self.open.get(&row.sequence)) {
            (Want::Score { .. }, _) => HeadWant::Full,
            (Want::Sum | Want::Embed { .. }, _) => HeadWant::Hidden,
            (Want::Sample | Want::Verify | Want::Follow, Some(Ok(sequence))) => {
                if sequence.constrained {
                    return HeadWant::Full;
                }
                sequence.params.candidates(vocab).map_or(HeadWant::Full, HeadWant::Top)
            }
            // Has failed already, or wants nothing.
            _ => HeadWant::Top(1),
        }));
    }

    /// Takes the logits of one position.
    pub(super) fn take(&mut self, meta: &StepMeta, outcomes: &mut Outcomes, got: HeadRow<'_>) {
        let (Some(row), Some(slot)) = (meta.rows.get(got.row), outcomes.get_mut(got.row)) else {
            return;
        };
        if matches!(slot, Some(RowOutcome::Failed(_) | RowOutcome::Done)) {
            return;
        }
        if let Err(cause) = self.outcome(row, meta.drafts_of(got.row), slot, got) {
            *slot = Some(RowOutcome::Failed(cause));
        }
    }

    fn outcome(
        &mut self,
        row: &Row,
        drafts: &[u32],
        slot: &mut Option<RowOutcome>,
        got: HeadRow<'_>,
    ) -> Result<(), Failure> {
        // Again, now in order: an earlier row of this step may have changed the history.
        self.ready(row)?;
        let Self { open, scratch, stage, .. } = self;
        let blame = |e: SampleError| of_sampling(*stage, &e);
        let Some(Ok(sequence)) = open.get_mut(&row.sequence) else {
            return Err("the sequence is gone".into());
        };
        match row.want {
            Want::None => {}
            Want::Sample => {
                let sampled = sequence.choose(got, scratch).map_err(blame)?;
                *slot =
                    Some(RowOutcome::Token { token: sampled.token, logprobs: sampled.logprobs });
            }
            Want::Verify | Want::Follow => {
                let mut chosen = match slot.take() {
                    Some(RowOutcome::Tokens(chosen)) => chosen,
                    _ => Vec::new(),
                };
                let index = (got.position - row.position) as usize;
                // The first token of a row is right, whoever chose it.
                let known = usize::from(row.want == Want::Verify);
                let expected = (index > 0).then(|| drafts.get(index - known).copied());
                if chosen.len() == index && expected.unwrap_or(None) == last_token(&chosen) {
                    let sampled = sequence.choose(got, scratch).map_err(blame)?;
                    chosen.push(ChosenToken { token: sampled.token, logprobs: sampled.logprobs });
                }
                *slot = Some(RowOutcome::Tokens(chosen));
            }
            Want::Score { top_k } => {
                let next = sequence.history.get(got.position as usize + 1).copied();
                let HeadLogits::Full(logits) = got.logits else {
                    return Err("the engine gave too few logits for a score".into());
                };
                let scored = score(logits, got.position, next, top_k, scratch).map_err(blame)?;
                match slot {
                    Some(RowOutcome::Scores(scores)) => scores.push(scored),
                    _ => *slot = Some(RowOutcome::Scores(vec![scored])),
                }
            }
            Want::Sum | Want::Embed { .. } => *slot = pool(&mut sequence.sum, row, &got, *stage)?,
        }
        Ok(())
    }

    /// The step of these rows failed: what was added of them counts for nothing.
    pub(super) fn spoil(&mut self, meta: &StepMeta) {
        for row in meta.rows.iter().filter(|r| matches!(r.want, Want::Sum | Want::Embed { .. })) {
            if let Some(Ok(sequence)) = self.open.get_mut(&row.sequence) {
                sequence.sum.spoil();
            }
        }
    }
}

/// Takes the hidden state of a position of a row that embeds; the row's outcome, with its last one.
fn pool(
    sum: &mut RunningSum,
    row: &Row,
    got: &HeadRow<'_>,
    stage: u16,
) -> Result<Option<RowOutcome>, Failure> {
    let HeadLogits::Hidden(hidden) = got.logits else {
        return Err("the engine gave logits for an embedding".into());
    };
    let last = got.position + 1 == row.position + row.count;
    let vector = match row.want {
        Want::Embed { pooling: Pooling::Last } => unit(hidden.iter().map(|&x| f64::from(x))),
        want => {
            sum.add(got.position, hidden).map_err(|e| Failure::from(e.to_string()))?;
            if !last {
                return Ok(None);
            }
            if want == Want::Sum {
                return Ok(Some(RowOutcome::Done));
            }
            sum.mean()
        }
    };
    let none = || Failure::of_stage(stage, "the hidden states are zero or not finite".to_owned());
    vector.map(|vector| Some(RowOutcome::Embedding(vector))).ok_or_else(none)
}

/// Logits that are not finite are the fault of what computed them; all else is the row's.
fn of_sampling(stage: u16, error: &SampleError) -> Failure {
    let stage = matches!(error, SampleError::NonFinite { .. }).then_some(stage);
    Failure { stage, message: error.to_string() }
}

fn last_token(chosen: &[ChosenToken]) -> Option<u32> {
    chosen.last().map(|c| c.token)
}

/// Every row's outcome; one for which the engine gave too little has failed.
pub(super) fn finish(meta: &StepMeta, outcomes: Outcomes) -> Vec<RowOutcome> {
    let complete = |row: &Row, outcome: Option<RowOutcome>| match outcome {
        Some(RowOutcome::Scores(scores)) if scores.len() != row.count as usize => {
            let message = format!("the engine scored {} of {}", scores.len(), row.count);
            RowOutcome::Failed(message.into())
        }
        Some(outcome) => outcome,
        None => RowOutcome::Failed("the engine gave no logits".into()),
    };
    meta.rows.iter().zip(outcomes).map(|(row, outcome)| complete(row, outcome)).collect()
}
