//! An engine without arithmetic: tokens are a hash of the history, latency and faults are chosen.
//!
//! The hash is computed the way a transformer computes: every layer writes one value per position
//! into the KV slot that the block table names, and reads all earlier ones back through the table.
//! A wrong table, an aliased block, a lost or swapped frame therefore changes the tokens, and
//! [`expected_tokens`] says what a right pipeline gives. It takes no weights.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use millrace_shared::id::SequenceId;
use millrace_shared::model::{Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle};
use millrace_shared::pooling::{Pooling, RunningSum, unit};
use millrace_shared::wire::control::{PROFILE_ROWS, ProfileSpec, StageProfile};
use millrace_shared::wire::data::{Row, StepMeta, Want};

use crate::seam::{
    Engine, LoadError, LoadedStage, StageInput, StageOutput, StageSpec, StepError, TensorSource,
};
use crate::thread::EngineFactory;

/// Activations that carry one hash: eight bytes, each exact in f32, f16 and bf16.
const BYTES: usize = 8;
/// The logit of the token that the hash names; all others are 0.
const PEAK: f32 = 40.0;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The step returns an error.
    Fail,
    /// The step panics.
    Panic,
    /// The step gives NaN as activations or logits.
    Nan,
    /// The step takes [`HANG`] longer, as if it would never end.
    Hang,
}

/// How long a step hangs: longer than tests wait for it, and not for ever, for its thread is joined.
pub const HANG: Duration = Duration::from_secs(20);

/// How the mock behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct MockConfig {
    /// Sleep in every step.
    pub step_latency: Duration,
    /// Sleep in every step, once more per layer.
    pub layer_latency: Duration,
    /// Keep a processor busy for the time of a step instead of sleeping, as computing does.
    pub busy_steps: bool,
    /// Sleep in `load`.
    pub load_latency: Duration,
    /// What `profile` says of a layer.
    pub layer_seconds: f64,
    /// Rows that `profile` says a layer computes in that time; so many more take it again. At least 1.
    pub layer_rows: u32,
    /// What `profile` says of the head.
    pub head_seconds: f64,
    /// What goes wrong in which call of `step`, the first being 0.
    pub faults: Vec<(u64, Fault)>,
    /// What goes wrong in every step of a first stage that computes this token.
    pub poison: Option<(u32, Fault)>,
}

impl Default for MockConfig {
    fn default() -> Self {
        Self {
            step_latency: Duration::ZERO,
            layer_latency: Duration::ZERO,
            busy_steps: false,
            load_latency: Duration::ZERO,
            layer_seconds: 1e-3,
            layer_rows: u32::MAX,
            head_seconds: 1e-3,
            faults: Vec::new(),
            poison: None,
        }
    }
}

/// A model for the mock: `layers` layers, `vocab` tokens, the narrowest width it can use.
pub fn model_config(layers: u32, vocab: u32) -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        layers,
        hidden: BYTES as u32,
        heads: 1,
        kv_heads: 1,
        head_dim: BYTES as u32,
        ffn: 16,
        vocab,
        context: 8192,
        rms_eps: 1e-5,
        rope: RopeConfig {
            base: 10_000.0,
            dim: BYTES as u32,
            style: RopeStyle::Interleaved,
            scaling: RopeScaling::Linear(1.0),
        },
        tied_head: true,
        rope_factors: false,
        features: Features::default(),
    }
}

/// Builds mock engines for an engine thread.
pub fn factory(config: MockConfig) -> EngineFactory {
    Box::new(move || Box::new(MockEngine::new(config)))
}

/// The embedding that a right pipeline gives, however the model is cut.
pub fn expected_embedding(config: &ModelConfig, prompt: &[u32], pooling: Pooling) -> Vec<f32> {
    let mut kv: Vec<Vec<u64>> = vec![Vec::new(); config.layers as usize];
    let (mut sum, mut state) = (RunningSum::default(), vec![0.0; config.hidden as usize]);
    for (position, &token) in (0..).zip(prompt) {
        encode(advance(&mut kv, token), false, &mut state);
        let _ = sum.add(position, &state);
    }
    let last = || unit(state.iter().map(|&x| f64::from(x)));
    let vector = if pooling == Pooling::Mean { sum.mean() } else { last() };
    vector.unwrap_or_default()
}

/// What all layers make of the next token.
fn advance(kv: &mut [Vec<u64>], token: u32) -> u64 {
    (0..).zip(kv).fold(embed(token), |hash, (layer, kv)| {
        kv.push(key(layer, hash));
        attend(layer, hash, kv.iter().copied())
    })
}

/// The `n` tokens that greedy decoding after `prompt` must give, however the model is cut.
pub fn expected_tokens(config: &ModelConfig, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut kv: Vec<Vec<u64>> = vec![Vec::new(); config.layers as usize];
    let mut advance = |token: u32| next_token(advance(&mut kv, token), config.vocab);
    let Some((last, first)) = prompt.split_last() else { return Vec::new() };
    for &token in first {
        advance(token);
    }
    let mut tokens = vec![*last];
    while tokens.len() <= n {
        let next = advance(tokens[tokens.len() - 1]);
        tokens.push(next);
    }
    tokens.split_off(1)
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn embed(token: u32) -> u64 {
    mix(u64::from(token) + 1)
}

/// What a layer writes into the cache.
fn key(layer: u32, hash: u64) -> u64 {
    mix(hash ^ (u64::from(layer) << 40))
}

/// What a layer makes of its input and of all it has cached, this position's own entry included.
fn attend(layer: u32, hash: u64, kv: impl Iterator<Item = u64>) -> u64 {
    let sum = kv.enumerate().fold(0u64, |sum, (position, key)| {
        sum.wrapping_add(mix(key ^ (position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    });
    mix(sum ^ hash.rotate_left(17) ^ u64::from(layer))
}

fn next_token(hash: u64, vocab: u32) -> u32 {
    (mix(hash) % u64::from(vocab.max(1))) as u32
}

/// The mock.
#[derive(Debug)]
pub struct MockEngine {
    config: MockConfig,
    spec: Option<StageSpec>,
    tables: HashMap<SequenceId, Vec<u32>>,
    /// Per layer of the stage, one value per slot.
    kv: Vec<Vec<u64>>,
    logits: Vec<f32>,
    candidates: Vec<(u32, f32)>,
    calls: u64,
    busy: Duration,
}

impl MockEngine {
    /// A mock without a stage.
    pub fn new(config: MockConfig) -> Self {
        Self {
            config,
            spec: None,
            tables: HashMap::new(),
            kv: Vec::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
            calls: 0,
            busy: Duration::ZERO,
        }
    }

    fn update_tables(&mut self, meta: &StepMeta) {
        for sequence in &meta.released {
            self.tables.remove(sequence);
        }
        for update in &meta.tables {
            let table = self.tables.entry(update.sequence).or_default();
            table.truncate(update.first as usize);
            table.extend_from_slice(&update.blocks);
        }
    }

    /// Runs one position of a row through the stage's layers.
    fn position(&mut self, spec: &StageSpec, row: &Row, at: u32, hash: u64) -> Option<u64> {
        let block = spec.settings.kv_block_size;
        let table = self.tables.get(&row.sequence)?;
        let slot = |position: u32| {
            let id = table.get((position / block) as usize)?;
            Some((id * block + position % block) as usize)
        };
        // The whole history must have its slots before anything is read.
        let slots = (0..=at).map(slot).collect::<Option<Vec<usize>>>()?;
        let mut hash = hash;
        for (layer, kv) in spec.layers.clone().zip(&mut self.kv) {
            *kv.get_mut(*slots.last()?)? = key(layer, hash);
            hash = attend(layer, hash, slots.iter().map(|&slot| kv[slot]));
        }
        Some(hash)
    }

    fn compute(
        &mut self,
        spec: &StageSpec,
        meta: &StepMeta,
        input: StageInput<'_>,
        mut output: StageOutput<'_>,
        nan: bool,
    ) -> Result<(), StepError> {
        let hidden = spec.config.hidden as usize;
        let mut index = 0;
        for (number, row) in meta.rows.iter().enumerate() {
            for at in row.position..row.position + row.count {
                let hash = match input {
                    StageInput::Tokens(tokens) => embed(tokens[index]),
                    StageInput::Hidden(x) => decode(&x[index * hidden..][..hidden], row, at)?,
                };
                let hash = self.position(spec, row, at, hash).ok_or_else(|| {
                    StepError::Invalid(format!(
                        "sequence {} has no block for position {at}",
                        row.sequence
                    ))
                })?;
                let last = at + 1 == row.position + row.count;
                match &mut output {
                    StageOutput::Hidden(x) => {
                        encode(hash, nan, &mut x[index * hidden..][..hidden]);
                    }
                    head if matches!(row.want, Want::Sum | Want::Embed { .. }) => {
                        if last || row.want != (Want::Embed { pooling: Pooling::Last }) {
                            let mut state = vec![0.0; hidden];
                            encode(hash, nan, &mut state);
                            head.hidden(number, at, &state);
                        }
                    }
                    head if matches!(
                        row.want,
                        Want::Score { .. } | Want::Verify | Want::Follow
                    ) || (last && row.want == Want::Sample) =>
                    {
                        self.logits.fill(0.0);
                        let token = next_token(hash, spec.config.vocab) as usize;
                        self.logits[token] = if nan { f32::NAN } else { PEAK };
                        head.full(number, at, &mut self.logits, &mut self.candidates);
                    }
                    StageOutput::Logits(_) | StageOutput::Head { .. } => {}
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// Waits until the step has taken as long as it is to; what it really took counts.
    fn pause(&mut self, layers: usize, since: Instant) {
        let pause = self.config.step_latency + self.config.layer_latency * layers as u32;
        let left = pause.saturating_sub(since.elapsed());
        if self.config.busy_steps {
            while since.elapsed() < pause {
                std::hint::spin_loop();
            }
        } else if !left.is_zero() {
            std::thread::sleep(left);
        }
        // What the step stands for, not the little it takes.
        self.busy += pause;
    }
}

impl Engine for MockEngine {
    fn numerics_revision(&self) -> String {
        "mock-1".to_owned()
    }

    fn load(
        &mut self,
        spec: &StageSpec,
        _tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        let settings = &spec.settings;
        if (spec.config.hidden as usize) < BYTES || settings.kv_block_size == 0 {
            return Err(LoadError::Settings(format!(
                "the mock needs a width of at least {BYTES} and blocks of at least 1 position"
            )));
        }
        std::thread::sleep(self.config.load_latency);
        let slots = settings.kv_blocks as usize * settings.kv_block_size as usize;
        self.kv = vec![vec![0; slots]; spec.layers.len()];
        self.logits = vec![0.0; if spec.head { spec.config.vocab as usize } else { 0 }];
        self.tables.clear();
        self.spec = Some(spec.clone());
        progress(0);
        let kv_bytes = (slots * spec.layers.len() * 8) as u64;
        Ok(LoadedStage { kv_bytes, ..LoadedStage::default() })
    }

    fn step(
        &mut self,
        meta: &StepMeta,
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<(), StepError> {
        let (call, since) = (self.calls, Instant::now());
        self.calls += 1;
        let spec =
            self.spec.clone().ok_or_else(|| StepError::Invalid("nothing is loaded".into()))?;
        let poisoned = |token: u32| match input {
            StageInput::Tokens(tokens) => tokens.contains(&token),
            StageInput::Hidden(_) => false,
        };
        let poison = self.config.poison.filter(|(token, _)| poisoned(*token));
        let fault = self.config.faults.iter().find(|(n, _)| *n == call);
        let fault = poison.map(|(_, fault)| fault).or_else(|| fault.map(|(_, fault)| *fault));
        self.update_tables(meta);
        let result = match fault {
            Some(Fault::Fail) => Err(StepError::Invalid(format!("fault in step {call}"))),
            Some(Fault::Panic) => panic!("fault in step {call}"),
            Some(Fault::Hang) => {
                std::thread::sleep(HANG);
                self.compute(&spec, meta, input, output, false)
            }
            nan => self.compute(&spec, meta, input, output, nan == Some(Fault::Nan)),
        };
        self.pause(spec.layers.len(), since);
        result
    }

    fn skip(&mut self, meta: &StepMeta) {
        self.update_tables(meta);
    }

    fn profile(&mut self, _spec: &ProfileSpec, _threads: usize) -> Result<StageProfile, LoadError> {
        let MockConfig { layer_seconds, layer_rows, head_seconds, .. } = self.config;
        let layer = |rows: u32| layer_seconds * f64::from(rows.div_ceil(layer_rows.max(1)));
        let flat = StageProfile::flat(layer_seconds, head_seconds);
        Ok(StageProfile { layer_seconds: PROFILE_ROWS.map(layer), ..flat })
    }

    fn busy(&self) -> Duration {
        self.busy
    }
}

/// Spreads a hash over the activations of a position, one byte each, over and over.
fn encode(hash: u64, nan: bool, out: &mut [f32]) {
    for (x, byte) in out.iter_mut().zip(hash.to_le_bytes().iter().cycle()) {
        *x = if nan { f32::NAN } else { f32::from(*byte) };
    }
}

/// The hash of a position; every activation must be the byte that it should be.
fn decode(x: &[f32], row: &Row, position: u32) -> Result<u64, StepError> {
    let non_finite =
        || StepError::NonFinite { place: "input", layer: 0, sequence: row.sequence.0, position };
    let mut bytes = [0u8; BYTES];
    for (index, &value) in x.iter().enumerate() {
        let byte = value as u8;
        if !value.is_finite() {
            return Err(non_finite());
        }
        let changed = index >= BYTES && bytes[index % BYTES] != byte;
        if f32::from(byte) != value || changed {
            return Err(StepError::Invalid(format!("activation {value} is none of the mock's")));
        }
        bytes[index % BYTES] = byte;
    }
    Ok(u64::from_le_bytes(bytes))
}
