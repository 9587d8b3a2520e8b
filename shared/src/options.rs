//! Engine options: the same flags on every command that starts an engine or a plan.

mod torch;

use std::fmt;
use std::str::FromStr;

use crate::model::Dtype;
use crate::partition::LayerRange;
pub use torch::{Device, Devices, Fraction, INT4_GROUP, Role, TorchDtype, TorchKept, TorchOptions};

/// Micro-batches in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatches {
    /// As many as measurements ask for, beginning with one more than there are stages.
    Auto,
    /// Exactly this many.
    Fixed(u32),
}

impl MicroBatches {
    /// The most that a pipeline of this many stages may have: enough that links may take as long as
    /// the stages.
    pub fn limit(self, stages: u32) -> u32 {
        match self {
            Self::Auto => 2 * stages.max(1) + 2,
            Self::Fixed(n) => n,
        }
    }

    /// The number to begin with, where measurements decide: one more than there are stages, so that
    /// the hop between them is hidden.
    pub fn measured_from(self, stages: u32) -> Option<u32> {
        match self {
            Self::Auto => Some(stages.max(1) + 1),
            Self::Fixed(_) => None,
        }
    }
}

impl FromStr for MicroBatches {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if s == "auto" {
            return Ok(Self::Auto);
        }
        match s.parse() {
            Ok(n @ 1..=1024) => Ok(Self::Fixed(n)),
            _ => Err(format!("'{s}' is neither 'auto' nor a number from 1 to 1024")),
        }
    }
}

/// Whose computed beginnings of prompts are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PrefixCache {
    /// Everybody's.
    #[default]
    On,
    /// Those of the same API key: nobody can tell by the time of an answer what others asked.
    PerKey,
    /// Nobody's.
    Off,
}

impl From<bool> for PrefixCache {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

impl FromStr for PrefixCache {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "on" => Ok(Self::On),
            "per-key" => Ok(Self::PerKey),
            "off" => Ok(Self::Off),
            _ => Err(format!("'{s}' is none of on, per-key, off")),
        }
    }
}

/// How quickly an idle processor must wake up while requests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WakeLatency {
    /// As the machine needs it.
    #[default]
    Auto,
    /// The system's own affair.
    Off,
    /// Within so many microseconds.
    Micros(u32),
}

impl FromStr for WakeLatency {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match (s, s.parse()) {
            ("auto", _) => Ok(Self::Auto),
            ("off", _) => Ok(Self::Off),
            (_, Ok(micros @ 0..=1_000_000)) => Ok(Self::Micros(micros)),
            _ => Err(format!("'{s}' is none of auto, off and microseconds from 0 to 1000000")),
        }
    }
}

/// Which engine computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// The CPU engine.
    #[default]
    Cpu,
    /// The engine over libtorch: GPUs, and processors.
    Torch,
    /// The deterministic mock: tokens are hashes. For tests of everything around the engine.
    Mock,
}

impl EngineKind {
    /// As flags and messages spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Torch => "torch",
            Self::Mock => "mock",
        }
    }
}

impl FromStr for EngineKind {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "torch" => Ok(Self::Torch),
            "mock" => Ok(Self::Mock),
            _ => Err(format!("unknown engine '{s}': use cpu, torch or mock")),
        }
    }
}

/// What is done about a better cut while requests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Replan {
    /// It is made.
    Auto,
    /// The operator is told.
    #[default]
    Propose,
    /// Nobody looks.
    Off,
}

impl FromStr for Replan {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "propose" => Ok(Self::Propose),
            "off" => Ok(Self::Off),
            _ => Err(format!("'{s}' is none of auto, propose, off")),
        }
    }
}

/// Layers that a node must have: `NAME=FIRST-LAST`, both of them included, or `NAME=LAYER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The node's name, or its id.
    pub node: String,
    /// The layers.
    pub layers: LayerRange,
}

impl FromStr for Pin {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "'{s}' does not pin layers: write NAME=FIRST-LAST, such as gpu-1=0-11 for the \
                 layers 0 to 11"
            )
        };
        let (node, layers) = s.rsplit_once('=').filter(|(n, _)| !n.is_empty()).ok_or_else(wrong)?;
        let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        let (first, last) = (number(first)?, number(last)?);
        let end = last.checked_add(1).filter(|_| first <= last).ok_or_else(wrong)?;
        Ok(Self { node: node.to_owned(), layers: LayerRange { first, end } })
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}-{}", self.node, self.layers.first, self.layers.end - 1)
    }
}

/// The KV cache's type from a flag.
///
/// # Errors
/// If it is none of f16, f32 and int8.
pub fn kv_dtype(s: &str) -> Result<Dtype, String> {
    match s.parse() {
        Ok(d @ (Dtype::F16 | Dtype::F32 | Dtype::Int8)) => Ok(d),
        _ => Err(format!("the KV cache cannot be stored as '{s}': use f16, f32 or int8")),
    }
}

/// The activations' type from a flag.
///
/// # Errors
/// If it is none of f32, bf16 and f16.
pub fn activation_dtype(s: &str) -> Result<Dtype, String> {
    match s.parse() {
        Ok(d @ (Dtype::F32 | Dtype::Bf16 | Dtype::F16)) => Ok(d),
        _ => Err(format!("activations cannot be '{s}': use f32, bf16 or f16")),
    }
}

/// Bytes from a flag: `20G`, `512MiB`, `1000000`; units are powers of 1024.
///
/// # Errors
/// If it is no such size, or nothing.
pub fn byte_size(s: &str) -> Result<u64, String> {
    let wrong = || format!("'{s}' is not a size such as 8GiB, 512MiB or 1000000");
    let unit_at = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let n: u64 = s[..unit_at].parse().map_err(|_| wrong())?;
    let scale = match s[unit_at..].trim() {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1_u64 << 40,
        _ => return Err(wrong()),
    };
    n.checked_mul(scale).filter(|&b| b > 0).ok_or_else(wrong)
}

/// How much a program keeps in the cache folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct CacheOptions {
    /// Most bytes of the cache folder, such as 20G: fetched models and tensors, packed weights and
    /// quantised copies together; the longest unused go first, nothing that is in use
    /// [default: what was fetched stays, and 32 GiB or more of the rest]
    #[cfg_attr(feature = "clap", arg(long, value_name = "SIZE", env = crate::names::env::CACHE_LIMIT, value_parser = byte_size, help_heading = "Resources"))]
    pub cache_limit: Option<u64>,
}

/// `auto` or `off` from a flag.
///
/// # Errors
/// If it is neither.
pub fn auto_off(s: &str) -> Result<bool, String> {
    match s {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{s}' is neither 'auto' nor 'off'")),
    }
}

/// The options. Those that may change a token are part of the numerics id.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[cfg_attr(feature = "clap", command(next_help_heading = "Engine"))]
pub struct EngineOptions {
    /// Compute threads per stage [default: the cores this process may use, shared among its stages]
    #[cfg_attr(feature = "clap", arg(long, short = 't', value_name = "N", env = crate::names::env::THREADS))]
    pub threads: Option<usize>,
    /// Layers at which to cut the model, for example 5,17 for three stages [default: planned]
    #[cfg_attr(feature = "clap", arg(long, value_name = "L,L,…", value_delimiter = ','))]
    pub cuts: Option<Vec<u32>>,
    /// Most prompt tokens of a request in one micro-batch
    #[cfg_attr(feature = "clap", arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PREFILL_CHUNK, value_parser = clap::value_parser!(u32).range(1..=65536)))]
    pub prefill_chunk: u32,
    /// Micro-batches in flight: a number, or auto
    #[cfg_attr(feature = "clap", arg(long, value_name = "N|auto", default_value = "auto"))]
    pub micro_batches: MicroBatches,
    /// Reuse what the cache holds of a prompt's beginning: on, per-key (only what the same API key computed,
    /// so that nobody's answer is faster for what others asked) or off; answers are the same
    #[cfg_attr(feature = "clap", arg(long, value_name = "on|per-key|off", default_value = "on"))]
    pub prefix_cache: PrefixCache,
    /// Check guesses of several tokens at once where the pipeline has time: auto or off; answers are the same
    #[cfg_attr(feature = "clap", arg(long, value_name = "auto|off", default_value = "auto", action = clap::ArgAction::Set, value_parser = auto_off))]
    pub speculate: bool,
    /// Stored type of keys and values: f16, f32 or int8 (half of f16's memory, a little less exact)
    #[cfg_attr(feature = "clap", arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_dtype))]
    pub kv_cache_dtype: Dtype,
    /// Type of activations between layers: f32, bf16 or f16
    #[cfg_attr(feature = "clap", arg(long, value_name = "TYPE", default_value = "f32", value_parser = activation_dtype))]
    pub activation_dtype: Dtype,
    /// Keep idle processors from sleeping deeper than these microseconds away while requests run: auto, off
    /// or a number; needs write access to /dev/cpu_dma_latency
    #[cfg_attr(feature = "clap", arg(long, value_name = "auto|off|N", default_value = "auto", env = crate::names::env::WAKE_LATENCY))]
    pub wake_latency: WakeLatency,
    /// Engine: cpu; torch, in builds that have it; or mock for tests
    #[cfg_attr(feature = "clap", arg(long, value_name = "ENGINE", default_value = "cpu"))]
    pub engine: EngineKind,
    /// Of the torch engine.
    #[cfg_attr(feature = "clap", command(flatten))]
    pub torch: TorchOptions,
}

/// 64 positions already saturate a CPU stage; more only lengthens the pipeline's bubbles.
pub const DEFAULT_PREFILL_CHUNK: u32 = 64;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: None,
            cuts: None,
            prefill_chunk: DEFAULT_PREFILL_CHUNK,
            micro_batches: MicroBatches::Auto,
            prefix_cache: PrefixCache::On,
            speculate: true,
            kv_cache_dtype: Dtype::F16,
            activation_dtype: Dtype::F32,
            wake_latency: WakeLatency::Auto,
            engine: EngineKind::Cpu,
            torch: TorchOptions::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_say_what_they_take() {
        assert_eq!((auto_off("auto"), auto_off("off")), (Ok(true), Ok(false)));
        assert_eq!("per-key".parse(), Ok(PrefixCache::PerKey));
        assert!("true".parse::<PrefixCache>().is_err_and(|e| e.contains("on, per-key, off")));
        assert!(auto_off("on").is_err_and(|e| e.contains("'auto' nor 'off'")));
    }

    #[test]
    fn wake_latencies() {
        assert_eq!("auto".parse(), Ok(WakeLatency::Auto));
        assert_eq!("off".parse(), Ok(WakeLatency::Off));
        assert_eq!("0".parse(), Ok(WakeLatency::Micros(0)));
        for bad in ["", "on", "-1", "1000001", "2us"] {
            let error = bad.parse::<WakeLatency>().expect_err(bad);
            assert!(error.contains("auto, off"), "{error}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(byte_size("8GiB"), Ok(8 << 30));
        assert_eq!(byte_size("20G"), Ok(20 << 30));
        assert_eq!(byte_size("1000"), Ok(1000));
        for bad in ["many", "0", "", "99999999999999TiB", "1.5G"] {
            assert!(byte_size(bad).is_err_and(|e| e.contains("such as 8GiB")), "{bad}");
        }
    }

    #[test]
    fn pins_include_both_ends() {
        let pin = |s: &str| s.parse::<Pin>().map(|p| (p.node, p.layers.first, p.layers.end));
        assert_eq!(pin("gpu-1=0-11"), Ok(("gpu-1".into(), 0, 12)));
        assert_eq!(pin("a=b=7"), Ok(("a=b".into(), 7, 8)));
        assert_eq!("x=3-5".parse::<Pin>().unwrap().to_string(), "x=3-5");
        for bad in ["", "x", "x=", "=1-2", "x=5-3", "x=a-b", "x=1-2-3", "x=0-4294967295"] {
            assert!(pin(bad).is_err_and(|e| e.contains("NAME=FIRST-LAST")), "{bad}");
        }
    }

    #[test]
    fn each_place_has_its_types() {
        assert_eq!(kv_dtype("int8"), Ok(Dtype::Int8));
        assert_eq!(activation_dtype("bf16"), Ok(Dtype::Bf16));
        for bad in ["bf16", "u32", "f8", ""] {
            assert!(kv_dtype(bad).is_err_and(|e| e.ends_with("use f16, f32 or int8")), "{bad}");
        }
        for bad in ["int8", "u32", "f8"] {
            assert!(activation_dtype(bad).is_err_and(|e| e.ends_with("use f32, bf16 or f16")));
        }
    }
}
