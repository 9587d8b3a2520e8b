//! The decoder, over any backend: one graph for all families, whose differences are in the model's
//! configuration.
//!
//! One stage: optionally the embedding, a range of layers, optionally the head. Reads top to bottom.
//! The residual stream is rounded to the activation dtype at every layer boundary, whether the
//! pipeline is cut there or not. On the last stage the last layer is finished only for the positions
//! that the head is for.

use std::ops::Range;

use millrace_shared::model::{Dtype, ModelConfig};
use millrace_shared::sampling::MAX_CANDIDATES;
use millrace_shared::wire::data::StepMeta;

use super::layer::{Between, Layer, Norm, Parts, Room};
use super::weights::Sources;
use super::{Backend, Batch, BlockTables, Output, Part, Piece, TOP_ROWS};
use crate::{HeadWant, LoadError, StageInput, StageOutput, StageSpec, StepError, TopLogits};

/// Positions whose logits are computed together.
const HEAD_ROWS: usize = 16;

/// The embedding, the head, or both in one matrix.
enum Ends<B: Backend> {
    Neither,
    Embed(B::Weight),
    Head(B::Weight),
    Tied(B::Weight),
    Both(B::Weight, B::Weight),
}

/// Activations of a step; `n` is the most positions of a micro-batch.
struct Scratch<B: Backend> {
    /// The residual stream: `n x hidden`.
    x: B::Tensor,
    /// Normalised: `n x hidden`.
    normed: B::Tensor,
    /// `n x (heads + 2 kv_heads) head_dim`.
    qkv: B::Tensor,
    /// `n x heads head_dim`.
    attended: B::Tensor,
    /// Of the feed-forward part.
    room: Room<B>,
    /// Of factored matrices.
    between: Between<B>,
    /// What a part of a layer gives, before it is normalised and added: `n x hidden`.
    branch: Option<B::Tensor>,
    /// `16 x vocab`.
    logits: B::Tensor,
    /// The largest logits of 64 positions, where that is all they are wanted for.
    best: B::Best,
    /// Of one position, where all were computed.
    candidates: Vec<(u32, f32)>,
}

/// A loaded stage.
pub struct Decoder<B: Backend> {
    layers: Vec<Layer<B>>,
    kv: B::Kv,
    ends: Ends<B>,
    /// Of positions, where they are learned.
    positions: Option<B::Vector>,
    final_norm: Option<Norm<B>>,
    scratch: Scratch<B>,
    range: Range<u32>,
    config: ModelConfig,
    dtype: Dtype,
}

impl<B: Backend> std::fmt::Debug for Decoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("layers", &self.range).finish_non_exhaustive()
    }
}

/// What a stage needs, in the order in which a step reads it.
fn pieces<'a>(spec: &StageSpec, sources: &Sources<'a>) -> Result<Vec<Piece<'a>>, LoadError> {
    let mut pieces = Vec::with_capacity(spec.layers.len() + 3);
    if spec.embed {
        pieces.push(vec![Part::Matrices(vec![sources.embedding()?])]);
        pieces.extend(sources.positions(spec.settings.max_model_len)?.map(|table| vec![table]));
    }
    for layer in spec.layers.clone() {
        pieces.push(sources.layer(layer)?);
    }
    if spec.head {
        let (norm, head) = sources.head()?;
        pieces.push(norm);
        if !(spec.embed && spec.config.tied_head) {
            pieces.push(vec![Part::Matrices(vec![head])]);
        }
    }
    Ok(pieces)
}

impl<B: Backend> Decoder<B> {
    /// Loads the stage; `progress` gets the bytes of weights done so far.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or unsupported, or memory runs out.
    pub fn load(
        backend: &mut B,
        spec: &StageSpec,
        sources: &Sources<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let config = &spec.config;
        let n = spec.settings.max_batch_tokens as usize;
        let pieces = pieces(spec, sources)?;
        let longest = spec.settings.max_model_len;
        let factors = if spec.layers.is_empty() { None } else { sources.rope_factors(longest)? };
        let kv = backend.kv(spec.layers.clone(), config, &spec.settings, factors.as_deref())?;
        let ranks = sources.ranks(spec.layers.clone());
        let scratch = Self::scratch(backend, spec, n, &ranks)?;
        backend.touch()?;
        let mut parts = Parts::<B>::new(backend.weights(&pieces, progress)?);
        let embedding = spec.embed.then(|| parts.matrices());
        let learned = spec.embed && config.features.learned_positions;
        let positions = learned.then(|| parts.vector());
        let layer = |l| Layer::load(&mut parts, spec, &|first| sources.rank(l, first));
        let layers = spec.layers.clone().map(layer).collect();
        let final_norm = spec.head.then(|| Norm::load(&mut parts, &config.features));
        let ends = match (embedding, spec.head) {
            (None, false) => Ends::Neither,
            (Some(embedding), false) => Ends::Embed(embedding),
            (None, true) => Ends::Head(parts.matrices()),
            (Some(both), true) if config.tied_head => Ends::Tied(both),
            (Some(embedding), true) => Ends::Both(embedding, parts.matrices()),
        };
        Ok(Self {
            layers,
            kv,
            ends,
            positions,
            final_norm,
            scratch,
            range: spec.layers.clone(),
            config: config.clone(),
            dtype: spec.settings.activation_dtype,
        })
    }

    fn scratch(
        backend: &mut B,
        spec: &StageSpec,
        n: usize,
        ranks: &[u64],
    ) -> Result<Scratch<B>, LoadError> {
        let c = &spec.config;
        let [hidden, heads, kv_heads, dim] =
            [c.hidden, c.heads, c.kv_heads, c.head_dim].map(|x| x as usize);
        let shared = c.features.experts.is_some_and(|e| e.shared_ffn > 0);
        let inner = if spec.layers.is_empty() { 0 } else { n };
        let head_rows = if spec.head { HEAD_ROWS } else { 0 };
        Ok(Scratch {
            x: backend.tensor(n, hidden, false)?,
            normed: backend.tensor(n, hidden, true)?,
            qkv: backend.tensor(inner, (heads + 2 * kv_heads) * dim, false)?,
            attended: backend.tensor(inner, heads * dim, true)?,
            room: Room::new(backend, c, inner)?,
            between: Between::new(backend, ranks, inner)?,
            branch: match c.features.post_norms || shared {
                true => Some(backend.tensor(inner, hidden, false)?),
                false => None,
            },
            logits: backend.tensor(head_rows, c.vocab as usize, false)?,
            best: backend.best(if spec.head { TOP_ROWS.min(n) } else { 0 })?,
            candidates: Vec::with_capacity(2 * MAX_CANDIDATES),
        })
    }

    /// Computes one micro-batch.
    ///
    /// # Errors
    /// If input or output do not suit the stage or a value is not finite.
    pub fn step(
        &mut self,
        b: &mut B,
        meta: &StepMeta,
        batch: &Batch,
        tables: &BlockTables,
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<(), StepError> {
        self.check(batch, &input, &output)?;
        self.enter(b, input, batch);
        self.settle(b, meta, batch, "the input", self.range.start, false)?;
        let pruned = !matches!(output, StageOutput::Hidden(_));
        let last = self.layers.len();
        for index in 0..last {
            let prune = pruned && index + 1 == last;
            self.layer(b, index, batch, tables, prune);
            if prune && batch.keep.is_empty() {
                return Ok(());
            }
            let layer = self.range.start + index as u32;
            self.settle(b, meta, batch, "the feed-forward part", layer, prune)?;
        }
        match output {
            StageOutput::Hidden(out) => b.download(&self.scratch.x, out),
            head => {
                if last == 0 {
                    b.gather_rows(&batch.keep, &mut self.scratch.x);
                }
                self.head(b, batch, head);
            }
        }
        Ok(())
    }

    /// One transformer layer on the residual stream; with `prune` only the wanted positions go on
    /// after their keys and values are stored.
    fn layer(&mut self, b: &mut B, index: usize, batch: &Batch, tables: &BlockTables, prune: bool) {
        let (layer, s, c) = (&self.layers[index], &mut self.scratch, &self.config);
        let (heads, kv_heads, dim) = (c.heads as usize, c.kv_heads as usize, c.head_dim as usize);
        let keys = heads * dim;
        // Attention: normalise, project, rotate, remember.
        layer.attn_norm.apply(b, &s.x, c.rms_eps, &mut s.normed);
        let input = layer.qkv.input(b, &s.normed, &mut s.between);
        b.linear(input, &layer.qkv.matrices, &mut s.qkv);
        for (first, bias) in &layer.biases {
            b.add_bias(&mut s.qkv, *first, bias);
        }
        if let Some([q, k]) = &layer.head_norms {
            b.norm_heads(&mut s.qkv, 0, heads, q, c.rms_eps);
            b.norm_heads(&mut s.qkv, keys, kv_heads, k, c.rms_eps);
        }
        b.write_kv(&mut s.qkv, &mut self.kv, index, &batch.spans, tables);
        let spans = if prune {
            b.gather_rows(&batch.keep, &mut s.qkv);
            b.gather_rows(&batch.keep, &mut s.x);
            if batch.keep.is_empty() {
                return;
            }
            &batch.wanted
        } else {
            &batch.spans
        };
        // Attend, project back.
        b.attention(&s.qkv, &self.kv, index, spans, tables, &mut s.attended);
        let gain = (&layer.attn_post_norm, c.rms_eps);
        let attended = (&s.attended, &mut s.between);
        layer.attn_output.add(b, attended, gain, (&mut s.branch, &mut s.x));
        // Feed forward.
        layer.ffn_norm.apply(b, &s.x, c.rms_eps, &mut s.normed);
        let to = (&mut s.branch, &mut s.x);
        let normed = (&s.normed, &mut s.between);
        layer.feed_forward.add(b, normed, c, &mut s.room, &layer.ffn_post_norm, to);
    }

    /// Final norm, and logits a few rows at a time: never kept where rows want the largest alone, and
    /// not computed where they want what the norm gives.
    fn head(&mut self, b: &mut B, batch: &Batch, mut output: StageOutput<'_>) {
        let (Some(norm), Ends::Head(head) | Ends::Tied(head) | Ends::Both(_, head)) =
            (&self.final_norm, &self.ends)
        else {
            return;
        };
        let s = &mut self.scratch;
        norm.apply(b, &s.x, self.config.rms_eps, &mut s.normed);
        let (vocab, softcap) = (self.config.vocab as usize, self.config.features.logit_softcap);
        let mut rest = &batch.outputs[..];
        while !rest.is_empty() {
            let first = batch.outputs.len() - rest.len();
            let is_bare = |out: &&Output| output.want(out.row) == HeadWant::Hidden;
            let bare = rest.iter().take_while(is_bare).count();
            if bare > 0 {
                let (now, later) = rest.split_at(bare);
                let take = &mut |i: usize, hidden: &[f32]| {
                    output.hidden(now[i].row, now[i].position, hidden);
                };
                b.read_rows(&s.normed, first..first + bare, take);
                rest = later;
                continue;
            }
            let with_logits = rest.iter().take_while(|out| !is_bare(out)).count();
            let mut k = [0; TOP_ROWS];
            let mut tops = 0;
            // A soft cap may make unlike logits alike: then all are needed.
            let few = if softcap > 0.0 { &[] } else { &rest[..with_logits] };
            for (k, out) in k.iter_mut().zip(few) {
                let HeadWant::Top(n) = output.want(out.row) else { break };
                *k = n;
                tops += 1;
            }
            let full = with_logits.min(HEAD_ROWS);
            let (now, later) = rest.split_at(tops.max(full));
            if tops < full {
                let logits = b.logits(&s.normed, first..first + full, head, softcap, &mut s.logits);
                for (out, logits) in now.iter().zip(logits.chunks_mut(vocab)) {
                    output.full(out.row, out.position, logits, &mut s.candidates);
                }
            } else {
                let range = first..first + tops;
                let take = &mut |i: usize, top: TopLogits<'_>| {
                    output.top(now[i].row, now[i].position, top);
                };
                b.top_logits(&s.normed, range, head, &k[..tops], &mut s.best, take);
            }
            rest = later;
        }
    }

    /// Fills the residual stream.
    fn enter(&mut self, b: &mut B, input: StageInput<'_>, batch: &Batch) {
        match (input, &self.ends) {
            (
                StageInput::Tokens(tokens),
                Ends::Embed(table) | Ends::Tied(table) | Ends::Both(table, _),
            ) => {
                b.embed(table, tokens, &mut self.scratch.x);
                if self.config.features.embedding_scale != 1.0 {
                    b.scale(&mut self.scratch.x, self.config.features.embedding_scale);
                }
                if let Some(table) = &self.positions {
                    b.add_positions(table, &batch.spans, &mut self.scratch.x);
                }
            }
            (StageInput::Hidden(rows), _) => b.upload(rows, &mut self.scratch.x),
            (StageInput::Tokens(_), _) => {}
        }
    }

    /// Rounds the residual stream; an error names the first value that is not finite.
    fn settle(
        &mut self,
        b: &mut B,
        meta: &StepMeta,
        batch: &Batch,
        place: &'static str,
        layer: u32,
        gathered: bool,
    ) -> Result<(), StepError> {
        let Some(row) = b.settle(&mut self.scratch.x, self.dtype) else { return Ok(()) };
        let (row, position) = batch.locate(row, gathered);
        let sequence = meta.rows.get(row).map_or(0, |r| r.sequence.0);
        Err(StepError::NonFinite { place, layer, sequence, position })
    }

    /// Whether input and output suit this stage and have the right sizes.
    fn check(
        &self,
        batch: &Batch,
        input: &StageInput<'_>,
        output: &StageOutput<'_>,
    ) -> Result<(), StepError> {
        let invalid = |e: String| Err(StepError::Invalid(e));
        let embeds = matches!(self.ends, Ends::Embed(_) | Ends::Tied(_) | Ends::Both(..));
        let n = batch.positions;
        match input {
            StageInput::Tokens(_) if !embeds => {
                return invalid("token ids sent to a stage without the embedding".to_owned());
            }
            StageInput::Hidden(_) if embeds => {
                return invalid("activations sent to the first stage".to_owned());
            }
            StageInput::Tokens(t) if t.len() != n => {
                return invalid(format!("{} token ids for {n} positions", t.len()));
            }
            StageInput::Hidden(x) if x.len() != n * self.config.hidden as usize => {
                return invalid(format!("{} activations for {n} positions", x.len()));
            }
            StageInput::Tokens(t) => {
                if let Some(id) = t.iter().find(|&&id| id >= self.config.vocab) {
                    return invalid(format!("token id {id} outside the vocabulary"));
                }
            }
            StageInput::Hidden(_) => {}
        }
        match output {
            StageOutput::Hidden(_) if self.final_norm.is_some() => {
                invalid("activations asked of the last stage".to_owned())
            }
            StageOutput::Logits(_) | StageOutput::Head { .. } if self.final_norm.is_none() => {
                invalid("logits asked of a stage without the head".to_owned())
            }
            StageOutput::Hidden(out) if out.len() != n * self.config.hidden as usize => {
                invalid(format!("room for {} activations for {n} positions", out.len()))
            }
            _ => Ok(()),
        }
    }
}
