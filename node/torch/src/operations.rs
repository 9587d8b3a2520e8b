//! The torch [`Backend`]: each operation by libtorch, on whatever device.

use std::ops::Range;

use millrace_engine::model::{Backend, BlockTables, LoadedPart, LoadedParts, Piece, Span};
use millrace_engine::{LoadError, TopLogits};
use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::sampling::largest_logits;
use millrace_shared::wire::control::EngineSettings;
use tch::{Kind, TchError, Tensor};

use crate::attention::{Rule, TorchKv};
use crate::backend::{Activations, TorchBackend, activated, load_error};
use crate::graphs::Geometry;
use crate::largest::Largest;
use crate::matrix::Matrix;
use crate::{experts, weights};

/// The kind of a cache or of activations; `None` where libtorch has none like it.
fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::Bf16 => Some(Kind::BFloat16),
        Dtype::U32 | Dtype::Int8 => None,
    }
}

fn indices(rows: &[usize], device: tch::Device) -> Result<Tensor, TchError> {
    let rows: Vec<i64> = rows.iter().map(|&r| r as i64).collect();
    Tensor::f_from_slice(&rows)?.f_to_device(device)
}

impl Backend for TorchBackend {
    type Tensor = Activations;
    type Weight = Matrix;
    type Vector = Tensor;
    type Kv = TorchKv;
    type Best = ();
    type Routes = ();

    fn tensor(&mut self, _: usize, width: usize, _: bool) -> Result<Activations, LoadError> {
        Ok(Activations { data: Tensor::new(), width: width as i64, host: Vec::new() })
    }

    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Matrix, Tensor>, LoadError> {
        let parts = weights::load(self.place, self.threads, pieces, progress)?;
        let bytes = |part: &LoadedPart<Matrix, Tensor>| match part {
            LoadedPart::Matrices(matrix) => matrix.bytes(),
            LoadedPart::Vector(vector) => vector.numel() as u64 * 4,
        };
        self.weight_bytes += parts.iter().map(bytes).sum::<u64>();
        Ok(parts)
    }

    fn touch(&mut self) -> Result<(), LoadError> {
        // The cache is zeros, which were written; the others come and go with a step.
        Ok(())
    }

    fn kv(
        &mut self,
        layers: Range<u32>,
        config: &ModelConfig,
        settings: &EngineSettings,
        factors: Option<&[f32]>,
    ) -> Result<TorchKv, LoadError> {
        let Some(kind) = kind(settings.kv_dtype) else {
            return Err(LoadError::Settings(format!(
                "the torch engine keeps K and V as f16 or f32, not {}: use --kv-cache-dtype f16",
                settings.kv_dtype.as_str()
            )));
        };
        self.layers = layers.len();
        let slots = i64::from(settings.kv_blocks) * i64::from(settings.kv_block_size);
        let dim = i64::from(config.head_dim);
        // One more, for what pads the steps of a graph.
        let shape = [slots + 1, i64::from(config.kv_heads), dim];
        let bytes = 2 * (slots as u64) * u64::from(config.kv_heads * config.head_dim);
        self.kv_bytes = layers.len() as u64 * bytes * settings.kv_dtype.bytes() as u64;
        let failed = |e: &TchError| load_error(e, "the KV cache", self.kv_bytes);
        let room = || Tensor::f_zeros(shape, (kind, self.place.device)).map_err(|e| failed(&e));
        let caches = layers.clone().map(|_| Ok((room()?, room()?)));
        let caches = caches.collect::<Result<Vec<_>, LoadError>>()?;
        let positions = if layers.is_empty() { 0 } else { settings.max_model_len as usize };
        let mut ropes = vec![self.rope(&config.rope, positions, factors).map_err(|e| failed(&e))?];
        if let Some(local) = layers.clone().find_map(|i| config.window(i)?.rope) {
            ropes.push(self.rope(&local, positions, None).map_err(|e| failed(&e))?);
        }
        let f = &config.features;
        let rule = |layer| {
            let window = config.window(layer);
            Rule {
                scale: f.attention_scale.map_or_else(|| 1.0 / (dim as f64).sqrt(), f64::from),
                softcap: f64::from(f.attention_softcap),
                window: window.map_or(usize::MAX, |w| w.size as usize),
                rope: usize::from(window.is_some_and(|w| w.rope.is_some())),
            }
        };
        let rules: Vec<Rule> = layers.map(rule).collect();
        let mut windows: Vec<usize> = rules.iter().map(|r| r.window).collect();
        windows.sort_unstable();
        windows.dedup();
        self.geometry = Geometry {
            block_size: settings.kv_block_size as usize,
            nowhere: slots,
            windows,
            hidden: i64::from(config.hidden),
        };
        Ok(TorchKv {
            layers: caches,
            kind,
            block_size: settings.kv_block_size as usize,
            heads: i64::from(config.heads),
            kv_heads: i64::from(config.kv_heads),
            dim,
            ropes,
            rules,
        })
    }

    fn routes(&mut self, _: usize, _: usize, _: usize, _: &Experts) -> Result<(), LoadError> {
        self.host_reads = true;
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], out: &mut Activations) {
        self.enter(None);
        self.attempt(|s| {
            out.data = match s.fixed() {
                Some(fixed) => table.rows(&fixed.ids)?,
                None => {
                    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
                    table.rows(&Tensor::f_from_slice(&ids)?.f_to_device(s.place.device)?)?
                }
            };
            Ok(())
        });
    }

    fn add_positions(&mut self, table: &Tensor, spans: &[Span], out: &mut Activations) {
        self.attempt(|s| {
            let positions = s.step.positions(spans, s.place.device)?;
            let rows = table.f_view([-1, out.width])?.f_index_select(0, &positions)?;
            let _ = out.data.f_add_(&rows)?;
            Ok(())
        });
    }

    fn upload(&mut self, rows: &[f32], out: &mut Activations) {
        self.enter(Some(rows));
        self.attempt(|s| {
            out.data = match s.fixed() {
                // Layers add to it where it lies: not to the graph's input.
                Some(fixed) => fixed.hidden.f_add_scalar(0.0)?,
                None => {
                    let host = Tensor::f_from_slice(rows)?.f_view([-1, out.width])?;
                    host.f_to_device(s.place.device)?
                }
            };
            Ok(())
        });
    }

    fn download(&mut self, x: &Activations, out: &mut [f32]) {
        self.attempt(|s| {
            let all = x.data.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(-1)?;
            s.land(&all, out)
        });
    }

    fn read_rows(
        &mut self,
        x: &Activations,
        rows: Range<usize>,
        take: &mut dyn FnMut(usize, &[f32]),
    ) {
        self.attempt(|s| {
            let part = x.data.f_narrow(0, rows.start as i64, rows.len() as i64)?;
            let flat = part.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(-1)?;
            let mut found = vec![0.0; flat.numel()];
            s.land(&flat, &mut found)?;
            let width = (found.len() / rows.len().max(1)).max(1);
            found.chunks_exact(width).enumerate().for_each(|(i, row)| take(i, row));
            Ok(())
        });
    }

    fn rms_norm(&mut self, x: &Activations, gain: &Tensor, eps: f32, out: &mut Activations) {
        self.attempt(|s| {
            out.data = s.computed(&s.rms(&x.data, gain, eps)?)?;
            Ok(())
        });
    }

    fn layer_norm(
        &mut self,
        x: &Activations,
        gain: &Tensor,
        bias: &Tensor,
        eps: f32,
        out: &mut Activations,
    ) {
        self.attempt(|s| {
            let x = x.data.f_to_kind(Kind::Float)?;
            let found =
                x.f_layer_norm(gain.size(), Some(gain), Some(bias), f64::from(eps), false)?;
            out.data = s.computed(&found)?;
            Ok(())
        });
    }

    fn linear(&mut self, x: &Activations, w: &Matrix, out: &mut Activations) {
        self.attempt(|_| {
            out.data = w.product(&x.data)?;
            Ok(())
        });
    }

    fn linear_add(&mut self, x: &Activations, w: &Matrix, out: &mut Activations) {
        self.attempt(|_| {
            let _ = out.data.f_add_(&w.product(&x.data)?)?;
            Ok(())
        });
    }

    fn gated(
        &mut self,
        x: &Activations,
        w: &Matrix,
        activation: Activation,
        out: &mut Activations,
    ) {
        self.attempt(|s| {
            out.data = s.gate(&x.data, w, activation)?;
            Ok(())
        });
    }

    fn activate(&mut self, x: &mut Activations, bias: Option<&Tensor>, activation: Activation) {
        self.attempt(|_| {
            if let Some(bias) = bias {
                let _ = x.data.f_add_(bias)?;
            }
            x.data = activated(&x.data, activation)?;
            Ok(())
        });
    }

    fn experts<'w>(
        &mut self,
        x: &Activations,
        scores: &Activations,
        weights: &dyn Fn(usize) -> [&'w Matrix; 2],
        (rule, activation): (&Experts, Activation),
        (): &mut (),
        out: &mut Activations,
    ) where
        Matrix: 'w,
    {
        self.attempt(|s| {
            for (expert, rows, share) in experts::routes(&scores.data, rule)? {
                let [gate_up, down] = weights(expert);
                let act = s.gate(&x.data.f_index_select(0, &rows)?, gate_up, activation)?;
                let given = down.product(&act)?.f_to_kind(Kind::Float)?.f_mul(&share)?;
                let _ = out.data.f_index_add_(0, &rows, &given)?;
            }
            Ok(())
        });
    }

    fn add_gated(
        &mut self,
        x: &Activations,
        scores: &Activations,
        column: usize,
        out: &mut Activations,
    ) {
        self.attempt(|_| {
            let gate = scores.data.f_narrow(1, column as i64, 1)?.f_to_kind(Kind::Float)?;
            let _ = out.data.f_add_(&x.data.f_mul(&gate.f_sigmoid()?)?)?;
            Ok(())
        });
    }

    fn rms_norm_add(&mut self, x: &Activations, gain: &Tensor, eps: f32, out: &mut Activations) {
        self.attempt(|s| {
            let _ = out.data.f_add_(&s.rms(&x.data, gain, eps)?)?;
            Ok(())
        });
    }

    fn norm_heads(
        &mut self,
        x: &mut Activations,
        first: usize,
        count: usize,
        gain: &Tensor,
        eps: f32,
    ) {
        self.attempt(|s| {
            let (rows, dim, count) = (x.data.size()[0], gain.numel() as i64, count as i64);
            let mut part = x.data.f_narrow(1, first as i64, count * dim)?;
            let found = s.rms(&part.f_reshape([rows, count, dim])?, gain, eps)?;
            part.f_copy_(&found.f_reshape([rows, count * dim])?)
        });
    }

    fn add_bias(&mut self, x: &mut Activations, first: usize, bias: &Tensor) {
        self.attempt(|_| {
            let mut part = x.data.f_narrow(1, first as i64, bias.numel() as i64)?;
            let _ = part.f_add_(bias)?;
            Ok(())
        });
    }

    fn scale(&mut self, x: &mut Activations, factor: f32) {
        self.attempt(|_| {
            let _ = x.data.f_mul_scalar_(f64::from(factor))?;
            Ok(())
        });
    }

    fn write_kv(
        &mut self,
        qkv: &mut Activations,
        kv: &mut TorchKv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        self.attempt(|s| kv.write(&qkv.data, layer, &mut s.step, spans, tables));
    }

    fn attention(
        &mut self,
        qkv: &Activations,
        kv: &TorchKv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Activations,
    ) {
        self.attempt(|s| {
            out.data = kv.attend(&qkv.data, layer, &mut s.step, spans, tables)?;
            Ok(())
        });
    }

    fn settle(&mut self, x: &mut Activations, dtype: Dtype) -> Option<usize> {
        let looks = self.looks();
        let mut found = None;
        self.attempt(|_| {
            if let Some(kind @ (Kind::Half | Kind::BFloat16)) = kind(dtype) {
                x.data = x.data.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
            }
            Ok(())
        });
        if !looks {
            return None;
        }
        self.leave(x);
        self.attempt(|_| {
            let finite = x.data.f_isfinite()?;
            if finite.f_all()?.f_int64_value(&[])? == 0 {
                let rows = finite.f_all_dim(1, false)?.f_to_kind(Kind::Int64)?;
                let mut host = vec![1i64; rows.numel()];
                rows.f_copy_data(&mut host, rows.numel())?;
                found = host.iter().position(|&fine| fine == 0);
            }
            Ok(())
        });
        found
    }

    fn gather_rows(&mut self, rows: &[usize], x: &mut Activations) {
        // All rows of a graph's step go the whole way.
        if self.is_inside() {
            return;
        }
        self.attempt(|s| {
            // Rows that go no further are looked at here, and only here: their keys and values stay.
            let finite = x.data.f_isfinite()?.f_all()?;
            s.finite = Some(match s.finite.take() {
                Some(before) => before.f_logical_and(&finite)?,
                None => finite,
            });
            x.data = x.data.f_index_select(0, &indices(rows, s.place.device)?)?;
            Ok(())
        });
    }

    fn logits<'t>(
        &mut self,
        x: &Activations,
        rows: Range<usize>,
        head: &Matrix,
        softcap: f32,
        out: &'t mut Activations,
    ) -> &'t mut [f32] {
        // Where it fails, nobody takes them for logits.
        out.host.clear();
        out.host.resize(rows.len() * out.width as usize, f32::NAN);
        self.attempt(|s| {
            let mut logits = s.head(x, &rows, head)?;
            if softcap > 0.0 {
                let cap = f64::from(softcap);
                logits = logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
            }
            let (flat, len) = (logits.f_contiguous()?.f_view(-1)?, out.host.len());
            flat.f_copy_data(&mut out.host, len)
        });
        &mut out.host
    }

    fn best(&mut self, _: usize) -> Result<(), LoadError> {
        Ok(())
    }

    fn top_logits(
        &mut self,
        x: &Activations,
        rows: Range<usize>,
        head: &Matrix,
        k: &[usize],
        (): &mut (),
        take: &mut dyn FnMut(usize, TopLogits<'_>),
    ) {
        let most = k.iter().copied().max().unwrap_or(1);
        self.attempt(|s| {
            let logits = s.head(x, &rows, head)?;
            let vocab = logits.size()[1] as usize;
            let found = Largest::find(&logits, most)?;
            let mut candidates = Vec::new();
            for (row, &k) in k.iter().enumerate() {
                if found.of(row, k, vocab, &mut candidates) {
                    take(row, Ok(&candidates));
                    continue;
                }
                let mut all = vec![0f32; vocab];
                logits.f_get(row as i64)?.f_copy_data(&mut all, vocab)?;
                take(row, largest_logits(&all, k, &mut candidates).map(|()| &candidates[..]));
            }
            Ok(())
        });
    }
}
