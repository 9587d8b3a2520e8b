//! `millrace-node probe`: what this machine offers, as text and as an entry of a cluster's
//! description, for `millrace plan`.
//!
//! Times are measured for the model that is named, else for a made-up one of ordinary size; from
//! either follow limits, by which plans estimate other models.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use clap::Args;
use millrace_engine::Engine as _;
use millrace_engine::cpu::{CpuEngine, packed_bytes};
use millrace_shared::cluster_file::{ClusterFile, Limits, Measured, NodeEntry, shape_key};
use millrace_shared::dirs;
use millrace_shared::model::{
    Family, Features, ModelConfig, ModelFiles, RopeConfig, RopeScaling, RopeStyle, TensorType,
    head_name, typical_name,
};
use millrace_shared::wire::control::{PROFILE_ROWS, ProfileSpec, StageProfile};

use crate::hardware::Hardware;

/// Bytes that are written and read to see how fast the cache folder is.
const DISK_SAMPLE: usize = 64 << 20;

/// Flags of `probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Measure a layer and the head of this GGUF file; only its header is read
    #[arg(long, short, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Write a [[node]] entry for 'millrace plan --cluster', measured [default: print what there is]
    #[arg(long, short, value_name = "FILE.toml")]
    output: Option<PathBuf>,
    /// Name of the entry [default: the host's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Compute threads [default: every physical core granted]
    #[arg(long, short = 't', value_name = "N", env = millrace_shared::names::env::THREADS)]
    threads: Option<usize>,
}

/// What this machine offers, as a table; with `--output` or `--model` also measured.
///
/// # Errors
/// If the model cannot be read or measured, or the file cannot be written.
pub fn probe(args: &ProbeArgs) -> anyhow::Result<String> {
    let h = Hardware::probe();
    let mut text = format!(
        "host       {}\nprocessor  {}, {}\nthreads    {} ({})\nmemory     {:.1} GiB available\nnumerics   {}",
        h.host,
        h.processor,
        millrace_engine::Isa::detect().map_or_else(|e| e, |isa| isa.to_string()),
        h.cores,
        h.cores_reason,
        h.memory_bytes as f64 / f64::from(1 << 30),
        millrace_engine::cpu::numerics_revision(),
    );
    if args.model.is_none() && args.output.is_none() {
        return Ok(text);
    }
    let spec = spec(args.model.as_deref())?;
    let threads = args.threads.unwrap_or(h.cores).max(1);
    let profile = CpuEngine::new().profile(&spec, threads).context("cannot measure the model")?;
    let entry = entry(args, &h, (&spec, &profile, threads));
    text.push_str(&measured(&spec, &profile, threads));
    let file = ClusterFile { node: vec![entry], ..ClusterFile::default() };
    let entry = toml::to_string(&file).context("the entry")?;
    match &args.output {
        None => text.push_str(&format!("\n\n{entry}")),
        Some(path) => {
            fs::write(path, entry).with_context(|| format!("cannot write {}", path.display()))?;
            text.push_str(&format!("\nwritten to {}", path.display()));
        }
    }
    Ok(text.trim_end().to_owned())
}

fn measured(spec: &ProfileSpec, profile: &StageProfile, threads: usize) -> String {
    let shape = shape_key(&spec.config, spec.layer_type, spec.head_type);
    let mut text = format!("\nmeasured   {shape}; {threads} threads");
    for (i, rows) in PROFILE_ROWS.iter().enumerate() {
        text.push_str(&format!(
            "\n           {rows:>2} rows: a layer {:.3} ms, the head {:.3} ms",
            profile.layer_seconds[i] * 1e3,
            profile.head_seconds[i] * 1e3
        ));
    }
    text
}

fn spec(model: Option<&Path>) -> anyhow::Result<ProfileSpec> {
    let Some(path) = model else {
        let (layer_type, head_type) = (TensorType::Q4_0, TensorType::Q8_0);
        return Ok(ProfileSpec { config: usual(), layer_type, head_type, sharing: 1 });
    };
    let files = ModelFiles::open(path)?;
    files.check_supported_types().with_context(|| path.display().to_string())?;
    let dtype = |name: &str| {
        let tensor = files.tensor(name).ok_or_else(|| anyhow!("{}: no {name}", path.display()));
        tensor.map(|t| t.dtype)
    };
    Ok(ProfileSpec {
        layer_type: dtype(typical_name(&files.config))?,
        head_type: dtype(head_name(&files.config))?,
        config: files.config.clone(),
        sharing: 1,
    })
}

/// A model of a billion parameters.
fn usual() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        layers: 16,
        hidden: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        ffn: 8192,
        vocab: 32_000,
        context: 8192,
        rms_eps: 1e-5,
        rope: RopeConfig {
            base: 500_000.0,
            dim: 64,
            style: RopeStyle::Interleaved,
            scaling: RopeScaling::Linear(1.0),
        },
        tied_head: false,
        rope_factors: false,
        features: Features::default(),
    }
}

fn entry(
    args: &ProbeArgs,
    h: &Hardware,
    (spec, profile, threads): (&ProfileSpec, &StageProfile, usize),
) -> NodeEntry {
    let cache = dirs::cache(&|name: &str| std::env::var_os(name));
    NodeEntry {
        name: args.name.clone().unwrap_or_else(|| h.host.clone()),
        hardware: Some(h.processor.clone()),
        threads: Some(threads as u32),
        memory_bytes: h.memory_bytes,
        disk_free_bytes: cache.as_deref().and_then(free_bytes),
        disk_bytes_per_second: cache.as_deref().and_then(disk_speed),
        limits: Some(limits(spec, profile)),
        measured: vec![Measured::new(spec, profile)],
        ..NodeEntry::default()
    }
}

/// What one row says of the memory, and many of the arithmetic.
fn limits(spec: &ProfileSpec, profile: &StageProfile) -> Limits {
    let matrices: Vec<[u64; 2]> =
        spec.config.row_matrices().into_iter().map(|(_, dims)| dims).collect();
    let bytes = matrices.iter().filter_map(|&[i, o]| packed_bytes(spec.layer_type, o, i));
    let work: u64 = matrices.iter().map(|[i, o]| i * o).sum();
    let last = PROFILE_ROWS.len() - 1;
    let many = f64::from(PROFILE_ROWS[last]);
    Limits {
        memory_bytes_per_second: bytes.sum::<u64>() as f64 / profile.layer_seconds[0].max(1e-9),
        multiply_adds_per_second: many * work as f64 / profile.layer_seconds[last].max(1e-9),
        layer_overhead_seconds: 0.0,
    }
}

/// Free space where the folder is, or will be.
fn free_bytes(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|p| p.exists())?;
    let stat = nix::sys::statvfs::statvfs(there).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}

/// Writes a file and reads it back as often as weights are: what the system has in memory counts.
fn disk_speed(folder: &Path) -> Option<f64> {
    let there = folder.ancestors().find(|p| p.exists())?;
    let path = there.join(format!("probe-{}.part", uuid::Uuid::now_v7().simple()));
    let speed = || {
        fs::write(&path, vec![1u8; DISK_SAMPLE]).ok()?;
        let start = Instant::now();
        let read = fs::read(&path).ok()?.len();
        Some(read as f64 / start.elapsed().as_secs_f64().max(1e-9))
    };
    let speed = speed();
    let _ = fs::remove_file(&path);
    speed
}
