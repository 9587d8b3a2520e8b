//! Judging a model on the CPU engine: likelihood of a text, distance from another model, tasks, speed.
//!
//! One stage with everything in it. A text is cut into windows that do not overlap, as `eval nll` does
//! it; a window's first token is not scored. Speeds are those of this machine at this moment.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use millrace_engine::cpu::CpuEngine;
use millrace_engine::target::io_error;
use millrace_engine::{
    Engine, Isa, LoadError, LogitsRow, StageInput, StageOutput, StageSpec, TensorSource,
};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, ModelConfig, ModelFiles};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};
use serde::{Deserialize, Serialize};

use crate::CompressError;

/// Positions whose logits are computed in one step.
const CHUNK: usize = 64;
/// Positions of a KV block.
const BLOCK: u32 = 16;

/// A loaded model.
#[derive(Debug)]
pub struct Judge {
    engine: CpuEngine,
    /// Dimensions.
    pub config: ModelConfig,
    /// Bytes of all tensors in its file.
    pub file_bytes: u64,
    /// Bytes of weights as the engine holds them.
    pub memory_bytes: u64,
    /// Longest sequence.
    pub window: usize,
    next: u64,
}

/// How a model fares with a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Tokens scored.
    pub tokens: u64,
    /// Nats per token.
    pub mean_nll: f64,
    /// Kullback-Leibler divergence of this model from the original, nats per token.
    pub mean_kl: Option<f64>,
    /// Part of the positions where both find the same token most probable.
    pub same_top: Option<f64>,
}

/// Tokens a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Of a prompt.
    pub prefill: f64,
    /// Of an answer, one sequence.
    pub decode: f64,
    /// Both relative to those of another model that was timed in turns with it.
    pub beside: Option<[f64; 2]>,
}

/// Rounds that speeds are of.
const ROUNDS: usize = 3;

/// What one round took: a prompt, and each step of an answer. Seconds.
struct Round {
    prompt: f64,
    steps: Vec<f64>,
}

/// A model's log-probabilities of every token at every position of a text, in a file without a name.
#[derive(Debug)]
pub struct Baseline {
    file: File,
    vocab: usize,
    tokens: Vec<u32>,
    window: usize,
}

impl Judge {
    /// Loads a model, for sequences of at most `window` positions.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn open(
        path: &Path,
        window: usize,
        threads: usize,
        kv_dtype: Dtype,
    ) -> Result<Self, CompressError> {
        let files = ModelFiles::open(path)?;
        let config = files.config.clone();
        let window = window.min(config.context as usize).max(2);
        let blocks = (window as u32).div_ceil(BLOCK);
        let isa = Isa::detect().map_err(LoadError::Settings)?;
        let spec = StageSpec {
            config: config.clone(),
            layers: 0..config.layers,
            embed: true,
            head: true,
            settings: EngineSettings {
                kv_blocks: blocks,
                kv_block_size: BLOCK,
                kv_dtype,
                activation_dtype: Dtype::F32,
                max_batch_tokens: 256,
                max_num_seqs: 1,
                max_model_len: blocks * BLOCK,
            },
            threads,
            host_threads: threads,
            isa,
            packed_cache: None,
        };
        let source = |t: &millrace_shared::model::TensorEntry| TensorSource {
            entry: t.clone(),
            path: files.path_of(t).to_owned(),
            offset: t.offset,
        };
        let tensors: Vec<TensorSource> = files.tensors.iter().map(source).collect();
        let mut engine = CpuEngine::new();
        let loaded = engine.load(&spec, &tensors, &mut |_| {})?;
        let (file_bytes, memory_bytes) = (files.weight_bytes(), loaded.weight_bytes);
        Ok(Self { engine, config, file_bytes, memory_bytes, window, next: 0 })
    }

    /// A new sequence; the one before is forgotten.
    fn begin(&mut self) -> StepMeta {
        let sequence = SequenceId(self.next);
        let released = self.next.checked_sub(1).map(SequenceId);
        self.next += 1;
        let blocks = (0..(self.window as u32).div_ceil(BLOCK)).collect();
        StepMeta {
            tables: vec![TableUpdate { sequence, first: 0, blocks }],
            released: released.into_iter().collect(),
            ..StepMeta::default()
        }
    }

    /// Tokens that follow what the sequence has; their logits, where they are wanted.
    fn feed(
        &mut self,
        mut meta: StepMeta,
        position: usize,
        tokens: &[u32],
        want: Want,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CompressError> {
        let sequence = SequenceId(self.next - 1);
        let (position, count) = (position as u32, tokens.len() as u32);
        meta.rows = vec![Row { sequence, sequence_epoch: 0, position, count, want }];
        let mut sink = |row: LogitsRow<'_>| each(row.position as usize, row.logits);
        let output = StageOutput::Logits(&mut sink);
        Ok(self.engine.step(&meta, StageInput::Tokens(tokens), output)?)
    }

    /// The logits after each position of a window.
    ///
    /// # Errors
    /// If the model gives values that are not finite.
    pub fn logits(
        &mut self,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CompressError> {
        let mut meta = self.begin();
        for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
            let now = std::mem::take(&mut meta);
            self.feed(now, i * CHUNK, chunk, Want::Score { top_k: 0 }, each)?;
        }
        Ok(())
    }

    /// The sum of the negative log-probabilities of `tokens[from..]` after what comes before.
    ///
    /// # Errors
    /// As [`Judge::logits`], or if they are longer than the window.
    pub fn continuation(&mut self, tokens: &[u32], from: usize) -> Result<f64, CompressError> {
        if tokens.len() > self.window || from == 0 {
            return Err(CompressError::Settings(format!(
                "{} tokens after a prompt of {from}: a prompt has a token at least, and both fit in \
                 {}",
                tokens.len() - from,
                self.window
            )));
        }
        let mut sum = 0.0;
        self.logits(tokens, &mut |at, logits| {
            if at + 1 >= from && at + 1 < tokens.len() {
                sum -= log_probability(logits, tokens[at + 1]);
            }
        })?;
        Ok(sum)
    }

    /// Greedy tokens after a prompt, up to `most` or one of `ends`.
    ///
    /// # Errors
    /// As [`Judge::continuation`].
    pub fn greedy(
        &mut self,
        prompt: &[u32],
        most: usize,
        ends: &dyn Fn(&[u32]) -> bool,
    ) -> Result<Vec<u32>, CompressError> {
        if prompt.is_empty() || prompt.len() + most > self.window {
            return Err(CompressError::Settings(format!(
                "a prompt of {} tokens and an answer of {most} do not fit in {}",
                prompt.len(),
                self.window
            )));
        }
        let (mut meta, mut best, mut at) = (self.begin(), 0, 0);
        let mut answer = Vec::new();
        let mut top = |_: usize, logits: &[f32]| best = argmax(logits);
        for chunk in prompt.chunks(CHUNK) {
            self.feed(std::mem::take(&mut meta), at, chunk, Want::Sample, &mut top)?;
            at += chunk.len();
        }
        loop {
            answer.push(best);
            if answer.len() == most || ends(&answer) {
                return Ok(answer);
            }
            let token = [best];
            let mut top = |_: usize, logits: &[f32]| best = argmax(logits);
            self.feed(StepMeta::default(), at, &token, Want::Sample, &mut top)?;
            at += 1;
        }
    }

    /// How well a text is predicted, and how far from the baseline, which was made of the same text.
    /// `progress` gets tokens done.
    ///
    /// # Errors
    /// If the text is too short, the models have different vocabularies, or one fails.
    pub fn quality(
        &mut self,
        tokens: &[u32],
        baseline: Option<&Baseline>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Quality, CompressError> {
        if let Some(base) = baseline {
            let same = base.vocab == self.config.vocab as usize && base.tokens == tokens;
            if !same || base.window != self.window {
                return Err(CompressError::settings(
                    "models are compared on one text, with one vocabulary and one window",
                ));
            }
        }
        let (mut count, mut nll, mut kl, mut same, mut compared) = (0u64, 0f64, 0f64, 0u64, 0u64);
        let mut error = None;
        let mut other = vec![0f32; self.config.vocab as usize];
        for (i, window) in tokens.chunks(self.window).enumerate().filter(|(_, w)| w.len() > 1) {
            let first = i * self.window;
            self.logits(window, &mut |at, logits| {
                let Some(&next) = window.get(at + 1) else { return };
                let norm = log_sum_exp(logits);
                nll += norm - f64::from(logits[next as usize]);
                count += 1;
                if let Some(base) = baseline {
                    if let Err(e) = base.read(first + at, &mut other) {
                        error.get_or_insert(e);
                    }
                    kl += divergence(&other, logits, norm);
                    same += u64::from(argmax(&other) == argmax(logits));
                    compared += 1;
                }
            })?;
            progress(first + window.len());
        }
        if let Some(e) = error {
            return Err(e);
        }
        if count == 0 {
            return Err(CompressError::settings("the text has fewer than two tokens"));
        }
        let mean = |sum: f64| (compared > 0).then(|| sum / compared as f64);
        Ok(Quality {
            tokens: count,
            mean_nll: nll / count as f64,
            mean_kl: mean(kl),
            same_top: mean(same as f64),
        })
    }

    /// This model's predictions of a text, for others to be compared with: `4 vocab` bytes for each
    /// token, in the system's folder for temporary files.
    ///
    /// # Errors
    /// If the model fails or the disk is full.
    pub fn baseline(&mut self, tokens: &[u32]) -> Result<Baseline, CompressError> {
        let folder = std::env::temp_dir();
        let file = tempfile::tempfile().map_err(io_error("make a file in", &folder))?;
        let vocab = self.config.vocab as usize;
        let mut error = None;
        for (i, window) in tokens.chunks(self.window).enumerate() {
            let first = i * self.window;
            let mut bytes = Vec::with_capacity(vocab * 4);
            self.logits(window, &mut |at, logits| {
                let norm = log_sum_exp(logits) as f32;
                bytes.clear();
                logits.iter().for_each(|x| bytes.extend((x - norm).to_le_bytes()));
                let offset = ((first + at) * vocab * 4) as u64;
                if let Err(e) = file.write_all_at(&bytes, offset) {
                    error.get_or_insert(e);
                }
            })?;
        }
        match error {
            Some(e) => Err(io_error("write to", &folder)(e).into()),
            None => Ok(Baseline { file, vocab, tokens: tokens.to_vec(), window: self.window }),
        }
    }

    /// Tokens a second: the best of a few rounds, so that what else the machine does shows little; of
    /// two models in turns, and then the median of what one is faster than the other.
    ///
    /// # Errors
    /// If a model fails.
    pub fn speed(&mut self, other: Option<&mut Self>) -> Result<Speed, CompressError> {
        let (mut own, mut theirs) = (Vec::new(), Vec::new());
        match other {
            None => {
                for _ in 0..ROUNDS {
                    own.push(self.round(None)?.0);
                }
            }
            Some(other) => {
                for _ in 0..ROUNDS {
                    let (mine, beside) = self.round(Some(&mut *other))?;
                    own.push(mine);
                    theirs.extend(beside);
                }
            }
        }
        let least = |x: &[f64]| x.iter().copied().fold(f64::INFINITY, f64::min);
        let prompts = |all: &[Round]| all.iter().map(|r| r.prompt).collect::<Vec<_>>();
        let steps = |all: &[Round]| all.iter().flat_map(|r| r.steps.clone()).collect::<Vec<_>>();
        let ratio = |own: Vec<f64>, theirs: Vec<f64>| {
            let mut all: Vec<f64> = theirs.iter().zip(&own).map(|(t, o)| t / o).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let beside = (!theirs.is_empty())
            .then(|| [ratio(prompts(&own), prompts(&theirs)), ratio(steps(&own), steps(&theirs))]);
        Ok(Speed {
            prefill: self.prompt_len() as f64 / least(&prompts(&own)),
            decode: 1.0 / least(&steps(&own)),
            beside,
        })
    }

    fn prompt_len(&self) -> usize {
        128.min(self.window - 1)
    }

    /// A prompt and an answer; of two models in turns.
    fn round(
        &mut self,
        mut other: Option<&mut Self>,
    ) -> Result<(Round, Option<Round>), CompressError> {
        let prompt = other.as_ref().map_or(usize::MAX, |o| o.prompt_len()).min(self.prompt_len());
        let window = other.as_ref().map_or(usize::MAX, |o| o.window).min(self.window);
        let mut own = Round { prompt: self.timed_prompt(prompt)?, steps: Vec::new() };
        let mut beside = match &mut other {
            Some(o) => Some(Round { prompt: o.timed_prompt(prompt)?, steps: Vec::new() }),
            None => None,
        };
        for at in prompt..window.min(prompt + 24) {
            own.steps.push(self.timed_step(at)?);
            if let (Some(o), Some(round)) = (&mut other, &mut beside) {
                round.steps.push(o.timed_step(at)?);
            }
        }
        Ok((own, beside))
    }

    fn timed_prompt(&mut self, len: usize) -> Result<f64, CompressError> {
        let vocab = self.config.vocab as usize;
        let tokens: Vec<u32> = (0..len).map(|i| (i * 37 % vocab) as u32).collect();
        let meta = self.begin();
        let start = Instant::now();
        self.feed(meta, 0, &tokens, Want::Sample, &mut |_, _| {})?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn timed_step(&mut self, at: usize) -> Result<f64, CompressError> {
        let token = [(at % self.config.vocab as usize) as u32];
        let start = Instant::now();
        self.feed(StepMeta::default(), at, &token, Want::Sample, &mut |_, _| {})?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Baseline {
    fn read(&self, at: usize, out: &mut [f32]) -> Result<(), CompressError> {
        let mut bytes = vec![0u8; self.vocab * 4];
        let read = self.file.read_exact_at(&mut bytes, (at * self.vocab * 4) as u64);
        read.map_err(io_error("read from", &std::env::temp_dir()))?;
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(o, b)| *o = number(b));
        Ok(())
    }
}

/// `KL(P || Q)`: `p` are log-probabilities, `q` logits with that logarithm of their sum.
fn divergence(p: &[f32], q: &[f32], norm: f64) -> f64 {
    let one = |(&p, &q): (&f32, &f32)| {
        let p = f64::from(p);
        p.exp() * (p - (f64::from(q) - norm))
    };
    // Rounding may put equal distributions below 0.
    p.iter().zip(q).map(one).sum::<f64>().max(0.0)
}

fn argmax(x: &[f32]) -> u32 {
    let best = x
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (i, &x)| if x > best.1 { (i, x) } else { best });
    best.0 as u32
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    logits.iter().map(|&x| (f64::from(x) - top).exp()).sum::<f64>().ln() + top
}

fn log_probability(logits: &[f32], token: u32) -> f64 {
    f64::from(logits[token as usize]) - log_sum_exp(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_of_itself_and_right_of_another() {
        let logits = [0.5f32, -1.0, 2.0];
        let norm = log_sum_exp(&logits);
        let p: Vec<f32> = logits.iter().map(|x| x - norm as f32).collect();
        assert!(divergence(&p, &logits, norm) < 1e-6);
        // Even odds against 3 to 1.
        let even = [0.5f32.ln(), 0.5f32.ln()];
        let q = [0.75f32.ln(), 0.25f32.ln()];
        let naive = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((divergence(&even, &q, log_sum_exp(&q)) - naive).abs() < 1e-6);
        assert_eq!((argmax(&logits), argmax(&[1.0, 1.0])), (2, 0));
    }
}
