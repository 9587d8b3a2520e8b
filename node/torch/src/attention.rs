//! The paged KV cache on a device, RoPE, and attention over it.
//!
//! Keys and values lie `slot x head x element` for each layer, slot `block * block_size + offset`, under
//! the tables that come with each step; blocks are the coordinator's, as on every engine. What a step
//! reads of a sequence is gathered into one piece (or used where it lies, if its blocks follow one
//! another), and goes through `scaled_dot_product_attention`: single positions of many sequences
//! together, padded to the longest of their group; longer runs one by one. Windows are masks over what
//! they see, of which nothing before is read. Soft caps, which that operation does not have, are
//! composed.

use millrace_engine::model::{BlockTables, Span};
use millrace_shared::model::RopeStyle;
use tch::{Device, Kind, TchError, Tensor};

use crate::step::{Group, Rows, Seen, Step};

/// Keys and values of a stage's layers, and what goes with them.
#[derive(Debug)]
pub struct TorchKv {
    /// `slots x kv_heads x dim` each.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    pub(crate) kind: Kind,
    pub(crate) block_size: usize,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) dim: i64,
    /// Of layers that see everything, and of local ones where they differ.
    pub(crate) ropes: Vec<Rope>,
    /// What each layer does.
    pub(crate) rules: Vec<Rule>,
}

/// Cosines and sines of all positions, each `positions x pairs`.
#[derive(Debug)]
pub(crate) struct Rope {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) pairs: i64,
    pub(crate) style: RopeStyle,
}

/// What attention does in a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) scale: f64,
    /// Above 0: scores are `c * tanh(score / c)`.
    pub(crate) softcap: f64,
    /// How many positions are seen, the row's own included.
    pub(crate) window: usize,
    /// Index into the ropes.
    pub(crate) rope: usize,
}

impl TorchKv {
    /// Rotates queries and keys of `q | k | v` rows, and stores keys and values.
    pub(crate) fn write(
        &mut self,
        qkv: &Tensor,
        layer: usize,
        step: &mut Step,
        spans: &[Span],
        tables: &BlockTables,
    ) -> Result<(), TchError> {
        let rows = qkv.size()[0];
        let rule = self.rules[layer];
        let (queries, keys) = (self.heads * self.dim, self.kv_heads * self.dim);
        let places = step.places(spans, tables, (self.block_size, qkv.device()))?;
        let rope = &self.ropes[rule.rope];
        let mut k = qkv.f_narrow(1, queries, keys)?;
        if rope.pairs > 0 {
            let (cos, sin) = step.angles(spans, rule.rope, rope)?;
            let mut both = qkv.f_narrow(1, 0, queries + keys)?;
            let heads = both.f_reshape([rows, self.heads + self.kv_heads, self.dim])?;
            let turned = rope.turn(&heads.f_to_kind(Kind::Float)?, &cos, &sin)?;
            both.f_copy_(&turned.f_reshape([rows, queries + keys])?)?;
            k = turned.f_narrow(1, self.heads, self.kv_heads)?;
        }
        let shape = [rows, self.kv_heads, self.dim];
        let v = qkv.f_narrow(1, queries + keys, keys)?.f_reshape(shape)?;
        let (cached_keys, cached_values) = &mut self.layers[layer];
        let k = k.f_reshape(shape)?.f_to_kind(self.kind)?;
        let _ = cached_keys.f_index_copy_(0, &places, &k)?;
        let _ = cached_values.f_index_copy_(0, &places, &v.f_to_kind(self.kind)?)?;
        Ok(())
    }

    /// Attention of the rows' queries: `rows x heads * dim`.
    pub(crate) fn attend(
        &self,
        qkv: &Tensor,
        layer: usize,
        step: &mut Step,
        spans: &[Span],
        tables: &BlockTables,
    ) -> Result<Tensor, TchError> {
        let (rule, device) = (&self.rules[layer], qkv.device());
        let q = qkv.f_narrow(1, 0, self.heads * self.dim)?;
        let groups = step.groups(spans, tables, (self.block_size, rule.window), device)?;
        if let [group @ Group { rows: Rows::All, .. }] = groups {
            return self.attend_group(&q, layer, group);
        }
        let mut out = q.f_empty_like()?;
        for group in groups {
            match &group.rows {
                Rows::All => {}
                Rows::Run(first, count) => {
                    let found = self.attend_group(&q.f_narrow(0, *first, *count)?, layer, group)?;
                    out.f_narrow(0, *first, *count)?.f_copy_(&found)?;
                }
                Rows::Some(rows) => {
                    let found = self.attend_group(&q.f_index_select(0, rows)?, layer, group)?;
                    let _ = out.f_index_copy_(0, rows, &found)?;
                }
            }
        }
        Ok(out)
    }

    /// What a group sees, `sequences x kv_heads x positions x dim`.
    fn gather(&self, cached: &Tensor, group: &Group, kind: Kind) -> Result<Tensor, TchError> {
        let [sequences, _, positions] = group.sizes;
        let found = match &group.seen {
            Seen::Run(first, count) => cached.f_narrow(0, *first, *count)?,
            Seen::Some(slots) => cached.f_index_select(0, slots)?,
        };
        let shape = [sequences, positions, self.kv_heads, self.dim];
        found.f_view(shape)?.f_transpose(1, 2)?.f_to_kind(kind)
    }

    fn attend_group(&self, q: &Tensor, layer: usize, group: &Group) -> Result<Tensor, TchError> {
        let (rule, kind) = (&self.rules[layer], q.f_kind()?);
        let [sequences, rows, positions] = group.sizes;
        let (keys, values) = &self.layers[layer];
        let (k, v) = (self.gather(keys, group, kind)?, self.gather(values, group, kind)?);
        let share = self.heads / self.kv_heads;
        let (dim, width) = (self.dim, self.heads * self.dim);
        if rule.softcap > 0.0 {
            // Heads that share keys, then rows: `sequences x kv_heads x share * rows x dim`.
            let q = q
                .f_reshape([sequences, rows, self.kv_heads, share, dim])?
                .f_permute([0, 2, 3, 1, 4])?;
            let q = q.f_reshape([sequences, self.kv_heads, share * rows, dim])?;
            let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_to_kind(Kind::Float)?;
            let scores = scores.f_mul_scalar(rule.scale / rule.softcap)?.f_tanh()?;
            let scores = scores.f_mul_scalar(rule.softcap)?;
            let mut scores = scores.f_view([sequences, self.kv_heads, share, rows, positions])?;
            if let Some(mask) = self.mask(group, q.device())? {
                let hidden = mask.f_logical_not()?.f_unsqueeze(2)?;
                let _ = scores.f_masked_fill_(&hidden, f64::NEG_INFINITY)?;
            }
            let weights = scores.f_softmax(-1, Kind::Float)?.f_to_kind(kind)?;
            let weights = weights.f_view([sequences, self.kv_heads, share * rows, positions])?;
            let out = weights.f_matmul(&v)?.f_view([sequences, self.kv_heads, share, rows, dim])?;
            return out.f_permute([0, 3, 1, 2, 4])?.f_reshape([sequences * rows, width]);
        }
        let (mask, causal, scale) = (group.mask.as_ref(), group.causal, Some(rule.scale));
        if rows == 1 {
            // Heads that share keys are rows of one.
            let q = q.f_reshape([sequences, self.kv_heads, share, dim])?;
            let out =
                Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask, 0.0, false, scale, false)?;
            return out.f_reshape([sequences, width]);
        }
        let q = q.f_reshape([sequences, rows, self.heads, dim])?.f_transpose(1, 2)?;
        let out = Tensor::f_scaled_dot_product_attention(
            &q,
            &k,
            &v,
            mask,
            0.0,
            causal,
            scale,
            share > 1,
        )?;
        out.f_transpose(1, 2)?.f_reshape([sequences * rows, width])
    }

    /// A group's mask, also where the operation itself would know it.
    fn mask(&self, group: &Group, device: Device) -> Result<Option<Tensor>, TchError> {
        if !group.causal {
            return Ok(group.mask.as_ref().map(Tensor::shallow_clone));
        }
        let [_, rows, positions] = group.sizes;
        let keys = Tensor::f_arange(positions, (Kind::Int64, device))?;
        let rows = Tensor::f_arange(rows, (Kind::Int64, device))?.f_view([1, 1, rows, 1])?;
        keys.f_le_tensor(&rows).map(Some)
    }
}

impl Rope {
    /// Rotates `n x heads x dim`.
    fn turn(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, TchError> {
        let size = x.size();
        let (n, heads, dim, pairs) = (size[0], size[1], size[2], self.pairs);
        let turned = |a: &Tensor, b: &Tensor| -> Result<[Tensor; 2], TchError> {
            let first = a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?;
            let second = a.f_mul(sin)?.f_add(&b.f_mul(cos)?)?;
            Ok([first, second])
        };
        let found = match self.style {
            RopeStyle::Halves => {
                let (a, b) = (x.f_narrow(2, 0, pairs)?, x.f_narrow(2, pairs, pairs)?);
                Tensor::f_cat(&turned(&a, &b)?, 2)?
            }
            RopeStyle::Interleaved => {
                let x = x.f_narrow(2, 0, 2 * pairs)?.f_reshape([n, heads, pairs, 2])?;
                let both = turned(&x.f_select(3, 0)?, &x.f_select(3, 1)?)?;
                Tensor::f_stack(&both, 3)?.f_reshape([n, heads, 2 * pairs])?
            }
        };
        match dim - 2 * pairs {
            0 => Ok(found),
            rest => Tensor::f_cat(&[found, x.f_narrow(2, 2 * pairs, rest)?], 2),
        }
    }
}
