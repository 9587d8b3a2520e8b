//! The engine seam: what a stage asks of whatever computes it.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use millrace_shared::model::{ModelConfig, TensorEntry, TensorType};
use millrace_shared::wire::control::{EngineSettings, ProfileSpec, StageProfile};
use millrace_shared::wire::data::StepMeta;

use crate::head::{HeadRow, HeadWant};

/// Instruction sets of the CPU engine. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the reference.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F/BW/VL/VNNI.
    Avx512,
}

impl Isa {
    /// The best this machine runs, or what `MILLRACE_CPU_PATH` says.
    ///
    /// # Errors
    /// If the variable names nothing known, or what this machine does not run.
    pub fn detect() -> Result<Self, String> {
        const NAME: &str = millrace_shared::names::env::CPU_PATH;
        match std::env::var(NAME) {
            Ok(value) => Self::choose(&value, Self::best()).map_err(|e| format!("{NAME}: {e}")),
            Err(std::env::VarError::NotPresent) => Ok(Self::best()),
            Err(e) => Err(format!("{NAME}: {e}")),
        }
    }

    /// What `value` names (empty: the best), on a machine that runs `best` and less.
    fn choose(value: &str, best: Self) -> Result<Self, String> {
        let isa = match value {
            "" => return Ok(best),
            "scalar" => Self::Scalar,
            "avx2" => Self::Avx2,
            "avx512" | "avx512-vnni" => Self::Avx512,
            other => {
                return Err(format!("'{other}' is not known (known: scalar, avx2, avx512)"));
            }
        };
        if isa > best {
            return Err(format!(
                "this machine does not run '{value}', its best is {best}; unset the variable"
            ));
        }
        Ok(isa)
    }

    /// The best this machine runs.
    #[cfg(target_arch = "x86_64")]
    pub fn best() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Scalar,
        }
    }

    /// The best this machine runs.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn best() -> Self {
        Self::Scalar
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512-vnni",
        })
    }
}

/// What a stage is and how it runs.
#[derive(Clone, Debug)]
pub struct StageSpec {
    /// The model's dimensions.
    pub config: ModelConfig,
    /// The stage's layers; may be empty for a stage that only holds the head.
    pub layers: Range<u32>,
    /// Whether input is token ids (first stage).
    pub embed: bool,
    /// Whether output is logits (last stage).
    pub head: bool,
    /// KV cache, dtypes and limits, the same on every stage of the pipeline.
    pub settings: EngineSettings,
    /// Compute threads.
    pub threads: usize,
    /// Compute threads of all stages on this host, this one's included: where they outnumber the
    /// processors, waiting threads do not spin.
    pub host_threads: usize,
    /// Instruction set.
    pub isa: Isa,
    /// Folder where packed weights are kept between loads; `None` for nowhere.
    pub packed_cache: Option<PathBuf>,
}

impl StageSpec {
    /// Whether settings make sense for engines and this machine.
    ///
    /// # Errors
    /// Naming the first that does not.
    pub fn check(&self) -> Result<(), LoadError> {
        let bad = |what: String| Err(LoadError::Settings(what));
        let s = &self.settings;
        if s.kv_block_size == 0 || 64 % s.kv_block_size != 0 {
            return bad(format!("a KV block of {} positions does not divide 64", s.kv_block_size));
        }
        if s.max_batch_tokens == 0 || s.max_num_seqs == 0 || s.max_model_len == 0 {
            return bad("batch tokens, sequences and sequence length must be at least 1".to_owned());
        }
        if self.isa > Isa::best() {
            return bad(format!("this machine does not run {}", self.isa));
        }
        if self.layers.start > self.layers.end || self.layers.end > self.config.layers {
            return bad(format!(
                "layers {:?} of a model of {} layers",
                self.layers, self.config.layers
            ));
        }
        if self.layers.is_empty() && !self.head && !self.embed {
            return bad("a stage without layers, embedding and head".to_owned());
        }
        Ok(())
    }
}

/// Where the bytes of a tensor lie on this machine; already verified against the hash.
#[derive(Clone, Debug)]
pub struct TensorSource {
    /// Name, type, dimensions. `entry.offset` is ignored: it is that of the original file.
    pub entry: TensorEntry,
    /// File that holds the bytes.
    pub path: PathBuf,
    /// Offset in that file.
    pub offset: u64,
}

/// What a loaded stage takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadedStage {
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// How the weights came.
    pub packing: PackingReport,
}

/// Where a stage's weights came from and what that took; all zero for engines that do not pack.
#[derive(Clone, Copy, Debug, Default)]
pub struct PackingReport {
    /// Bytes found packed in the cache.
    pub cached_bytes: u64,
    /// Bytes packed from the model's tensors.
    pub packed_bytes: u64,
    /// Whether cached weights are mapped files, not copies in memory.
    pub mapped: bool,
    /// From the first byte to the last.
    pub seconds: f64,
    /// What packing the cached bytes took when it was done, about, with as many threads.
    pub saved_seconds: f64,
}

/// Input of a step: rows in the order of the metadata.
#[derive(Clone, Copy, Debug)]
pub enum StageInput<'a> {
    /// Token ids, one per position (first stage).
    Tokens(&'a [u32]),
    /// Activations `positions x hidden`.
    Hidden(&'a [f32]),
}

/// Logits of one position, handed out while they are still in cache.
#[derive(Debug)]
pub struct LogitsRow<'a> {
    /// Index into `StepMeta::rows`.
    pub row: usize,
    /// Position in the sequence.
    pub position: u32,
    /// `vocab` logits; the receiver may change them.
    pub logits: &'a mut [f32],
}

/// Where the output of a step goes.
pub enum StageOutput<'a> {
    /// Activations `positions x hidden` (every stage but the last).
    Hidden(&'a mut [f32]),
    /// Logits: called once per `Sample` row (last position) and once per position of each `Score`
    /// and `Verify` row, in order (last stage). An embedding's rows get logits too.
    Logits(&'a mut dyn FnMut(LogitsRow<'_>)),
    /// As `Logits`, for rows that may want less than all of them.
    Head {
        /// For each of `StepMeta::rows`; `Full` where there is none.
        want: &'a [HeadWant],
        /// Called as that of `Logits`.
        sink: &'a mut dyn FnMut(HeadRow<'_>),
    },
}

impl fmt::Debug for StageOutput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hidden(_) => "StageOutput::Hidden",
            Self::Logits(_) => "StageOutput::Logits",
            Self::Head { .. } => "StageOutput::Head",
        })
    }
}

/// Why a stage cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor's storage type has no kernel.
    #[error(
        "tensor '{tensor}' has type {dtype}, which this engine does not compute with: {}",
        TensorType::advice()
    )]
    UnsupportedType {
        /// Name.
        tensor: String,
        /// Type.
        dtype: String,
    },
    /// The model lacks a tensor.
    #[error("the model has no tensor '{0}'")]
    MissingTensor(String),
    /// A tensor does not have the shape that the metadata implies.
    #[error("tensor '{tensor}' has shape {found:?}, the model's metadata implies {expected:?}")]
    Shape {
        /// Name.
        tensor: String,
        /// In the file.
        found: Vec<u64>,
        /// Implied.
        expected: Vec<u64>,
    },
    /// It does not fit.
    #[error(
        "the stage needs {needed_bytes} bytes for {what}, which this machine cannot give: {cause}"
    )]
    OutOfMemory {
        /// What for.
        what: &'static str,
        /// How much.
        needed_bytes: u64,
        /// What the system said.
        cause: String,
    },
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The settings make no sense for this engine.
    #[error("{0}")]
    Settings(String),
}

/// Why a step failed; the stage lives on.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A NaN or an infinity.
    #[error(
        "non-finite value after {place} of layer {layer}, sequence {sequence}, position {position}"
    )]
    NonFinite {
        /// Which operation.
        place: &'static str,
        /// Which layer.
        layer: u32,
        /// Whose.
        sequence: u64,
        /// Where in the sequence.
        position: u32,
    },
    /// A kernel panicked.
    #[error("the engine panicked: {0}")]
    Panic(String),
    /// What computes failed: memory ran out, or a device has a fault.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The frame asks for what this stage cannot do.
    #[error("{0}")]
    Invalid(String),
}

/// Computes one stage. Blocking; owned by one thread.
pub trait Engine: Send {
    /// Revision of everything in this engine that may change a token; part of the numerics id.
    fn numerics_revision(&self) -> String;

    /// Loads a stage: weights, KV cache and scratch for the largest step are allocated and touched.
    /// `progress` gets the bytes of weights done so far.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or unsupported, or memory runs out.
    fn load(
        &mut self,
        spec: &StageSpec,
        tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError>;

    /// Applies the table updates and computes the rows. Table updates are applied even where the
    /// step then fails.
    ///
    /// # Errors
    /// If the step cannot be computed; later steps are not harmed.
    fn step(
        &mut self,
        meta: &StepMeta,
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<(), StepError>;

    /// Applies only releases and table updates (a step that an earlier stage failed).
    fn skip(&mut self, meta: &StepMeta);

    /// Measures one layer and the head of a model on synthetic weights, with this many threads.
    ///
    /// # Errors
    /// If memory runs out or a type is unsupported.
    fn profile(&mut self, spec: &ProfileSpec, threads: usize) -> Result<StageProfile, LoadError>;

    /// CPU time of the engine's threads inside `step`, spinning excluded; cumulative.
    fn busy(&self) -> Duration;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_are_chosen_or_refused() {
        assert_eq!(Isa::choose("", Isa::Avx2), Ok(Isa::Avx2));
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
            assert_eq!(Isa::choose(&isa.to_string(), Isa::Avx512), Ok(isa));
        }
        assert_eq!(Isa::choose("avx512", Isa::Avx512), Ok(Isa::Avx512));
        let unknown = Isa::choose("neon", Isa::Avx512).unwrap_err();
        assert!(unknown.contains("'neon'") && unknown.contains("avx2"), "{unknown}");
        let missing = Isa::choose("avx512", Isa::Avx2).unwrap_err();
        assert!(missing.contains("does not run 'avx512'"), "{missing}");
    }
}
