//! Which tokens constrained answers may go on with: computed elsewhere, told to the last stage.
//!
//! A mask follows from the token before it, so it is computed as soon as that is known, on a thread
//! of the runtime's, while the step is on its way through the earlier stages; the last one waits for
//! it before it samples. A mask goes out when its row is issued, or, where the row was first, as
//! soon as it is ready. Whoever waits always gets one: of a sequence that ended in between, an empty
//! one, so that nobody else's rows wait for the deadline. Nothing here survives a life: a matcher is
//! made anew from grammar and tokens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use actix::prelude::*;
use millrace_shared::error::Status;
use millrace_shared::id::{MicroBatchId, SequenceId};
use millrace_shared::sampling::{Grammar, TokenMask};
use millrace_shared::wire::MAX_FRAME_META_BYTES;
use millrace_shared::wire::data::{FrameKind, MaskMeta, RowMask, StepMeta, Want};

use super::{Batcher, IssueError, frame};
use crate::request::Work;
use crate::text::{GrammarError, Matcher, Tokenizer};

/// Most bytes of masks in one frame: half of what its metadata may have.
const MAX_MASKS_BYTES: usize = MAX_FRAME_META_BYTES / 2;

/// A matcher, once it is made.
type Shared = Arc<Mutex<Option<Matcher>>>;

/// One constrained sequence.
#[derive(Debug, Default)]
struct State {
    matcher: Shared,
    /// What may come after this position.
    ready: Option<(u32, TokenMask)>,
    /// A row that waits at the last stage for the mask after this position.
    wanted: Option<u32>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Masks {
    states: HashMap<SequenceId, State>,
}

/// A mask is computed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct MaskReady {
    sequence: SequenceId,
    /// Whose it is, should the sequence have another name by now.
    of: Shared,
    position: u32,
    mask: Result<TokenMask, GrammarError>,
}

impl Masks {
    /// Computes what may come after `position`, once `work` has brought the matcher there.
    fn compute(
        &mut self,
        sequence: SequenceId,
        position: u32,
        batcher: &Addr<Batcher>,
        work: impl FnOnce(&mut Option<Matcher>) -> Result<(), GrammarError> + Send + 'static,
    ) {
        let matcher = Arc::clone(&self.states.entry(sequence).or_default().matcher);
        let of = Arc::clone(&matcher);
        let batcher = batcher.clone();
        actix_rt::spawn(async move {
            let computing = tokio::task::spawn_blocking(move || {
                let mut matcher = matcher.lock().unwrap_or_else(PoisonError::into_inner);
                work(&mut matcher)?;
                matcher.as_mut().map_or_else(|| Err(GrammarError::missing()), Matcher::mask)
            });
            let mask = computing.await.unwrap_or_else(|e| Err(GrammarError::panicked(&e)));
            let _ = batcher.send(MaskReady { sequence, of, position, mask }).await;
        });
    }

    /// A constrained sequence whose answer is empty so far.
    pub(super) fn begin(
        &mut self,
        sequence: SequenceId,
        position: u32,
        matcher: Matcher,
        batcher: &Addr<Batcher>,
    ) {
        self.compute(sequence, position, batcher, move |slot| {
            *slot = Some(matcher);
            Ok(())
        });
    }

    /// The same, of an earlier life: with the answer's tokens so far.
    pub(super) fn begin_again(
        &mut self,
        sequence: SequenceId,
        position: u32,
        (grammar, tokens): (Grammar, Vec<u32>),
        tokenizer: Arc<Tokenizer>,
        batcher: &Addr<Batcher>,
    ) {
        self.compute(sequence, position, batcher, move |slot| {
            let mut matcher = tokenizer.grammars()?.compile(&grammar)?;
            matcher.consume(&tokens)?;
            *slot = Some(matcher);
            Ok(())
        });
    }

    /// Another token of an answer, at `position`.
    pub(super) fn advance(
        &mut self,
        sequence: SequenceId,
        position: u32,
        token: u32,
        batcher: &Addr<Batcher>,
    ) {
        if !self.states.contains_key(&sequence) {
            return;
        }
        self.compute(sequence, position, batcher, move |slot| match slot {
            Some(matcher) => matcher.consume(&[token]),
            None => Err(GrammarError::missing()),
        });
    }

    /// The masks that a step's rows need and that are there; the others are wanted from now on.
    fn of_step(&mut self, step: &StepMeta) -> Vec<RowMask> {
        if self.states.is_empty() {
            return Vec::new();
        }
        let mut masks = Vec::new();
        for row in step.rows.iter().filter(|row| row.want == Want::Sample) {
            let Some(state) = self.states.get_mut(&row.sequence) else { continue };
            let position = row.position + row.count - 1;
            match &state.ready {
                Some((at, allowed)) if *at == position => {
                    let (sequence, allowed) = (row.sequence, allowed.clone());
                    masks.push(RowMask { sequence, position, allowed });
                }
                _ => state.wanted = Some(position),
            }
        }
        masks
    }

    /// The present name of the sequence that a mask is of.
    fn name_of(&self, ready: &MaskReady) -> Option<SequenceId> {
        let is_its = |state: &State| Arc::ptr_eq(&state.matcher, &ready.of);
        if self.states.get(&ready.sequence).is_some_and(is_its) {
            return Some(ready.sequence);
        }
        self.states.iter().find(|(_, state)| is_its(state)).map(|(id, _)| *id)
    }

    /// A sequence has another name; the row that waited under the old one has failed.
    pub(super) fn rename(&mut self, old: SequenceId, new: SequenceId) {
        if let Some(state) = self.states.remove(&old) {
            self.states.insert(new, State { wanted: None, ..state });
        }
    }

    /// Takes a mask; what is to be sent, where a row waits for it.
    fn on_ready(
        &mut self,
        sequence: SequenceId,
        position: u32,
        allowed: TokenMask,
    ) -> Option<RowMask> {
        let state = self.states.get_mut(&sequence)?;
        state.ready = Some((position, allowed.clone()));
        state.wanted.take_if(|wanted| *wanted == position)?;
        Some(RowMask { sequence, position, allowed })
    }

    /// Forgets a sequence; an empty mask where a row waits for one.
    fn end(&mut self, sequence: SequenceId) -> Option<RowMask> {
        let position = self.states.remove(&sequence)?.wanted?;
        Some(RowMask { sequence, position, allowed: TokenMask::default() })
    }

    /// An epoch is over: nobody waits any more.
    pub(super) fn on_epoch(&mut self) {
        self.states.values_mut().for_each(|state| state.wanted = None);
    }
}

impl Batcher {
    /// Tells the last stage what the rows of a step may give, as far as it is known.
    pub(super) fn send_masks_of(&mut self, step: &StepMeta) -> Result<(), IssueError> {
        let mut masks = self.masks.of_step(step);
        while !masks.is_empty() {
            let many = (MAX_MASKS_BYTES / masks[0].allowed.bytes().max(1)).clamp(1, masks.len());
            let rest = masks.split_off(many);
            self.send_masks(masks)?;
            masks = rest;
        }
        Ok(())
    }

    fn send_masks(&self, masks: Vec<RowMask>) -> Result<(), IssueError> {
        let Some(active) = self.active.as_ref().filter(|a| !a.broken) else { return Ok(()) };
        let meta = MaskMeta { masks };
        let frame = frame(active, FrameKind::Masks, MicroBatchId(0), &meta, &[])
            .map_err(IssueError::Frame)?;
        active.opens.try_send(frame).map_err(|_| IssueError::EdgeLost)
    }

    fn send_late(&mut self, mask: Option<RowMask>) {
        let Some(mask) = mask else { return };
        match self.send_masks(vec![mask]) {
            Ok(()) => {}
            Err(IssueError::EdgeLost) => self.break_off(),
            Err(IssueError::Frame(message)) => tracing::error!(message, "a mask was not sent"),
        }
    }

    /// Another token of an answer, at `position`.
    pub(super) fn advance_mask(&mut self, sequence: SequenceId, position: u32, token: u32) {
        if let Some(own) = &self.own {
            self.masks.advance(sequence, position, token, own);
        }
    }

    /// Makes the matchers of an earlier life's requests anew.
    pub(super) fn restore_masks(&mut self) {
        let Some(own) = &self.own else { return };
        for request in self.requests.iter() {
            let Work::Generate(generation) = &request.work else { continue };
            let Some(grammar) = generation.params().grammar else { continue };
            for &(sequence, choice) in &request.sequences {
                let tokens = generation.token_ids(choice);
                let position = (generation.head().prompt.len() + tokens.len()).saturating_sub(1);
                let past = (grammar.clone(), tokens);
                let tokenizer = Arc::clone(&self.tokenizer);
                self.masks.begin_again(sequence, position as u32, past, tokenizer, own);
            }
        }
    }

    /// A sequence has ended: whoever waits for its mask need not.
    pub(super) fn end_masks(&mut self, sequence: SequenceId) {
        let mask = self.masks.end(sequence);
        self.send_late(mask);
    }
}

impl Handler<MaskReady> for Batcher {
    type Result = ();

    fn handle(&mut self, m: MaskReady, _: &mut Context<Self>) {
        let Some(sequence) = self.masks.name_of(&m) else { return };
        match m.mask {
            Ok(allowed) => {
                let mask = self.masks.on_ready(sequence, m.position, allowed);
                self.send_late(mask);
            }
            Err(why) => {
                let Some(request) = self.forget(sequence) else { return };
                self.fail(request, Status::invalid("grammar", why.to_string()));
            }
        }
    }
}
