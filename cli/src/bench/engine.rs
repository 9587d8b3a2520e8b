//! `millrace bench engine`: tokens per second of prefill and decode, by threads, batch and depth.

use clap::Args;
use millrace_coordinator::models::ModelOptions;
use millrace_engine::Isa;
use millrace_shared::model::Dtype;
use millrace_shared::options::DEFAULT_PREFILL_CHUNK;
use serde::Serialize;

use super::engine_rig::{Model, Rig, RigSize};
use super::median;
use super::timed::PhaseShare;
use crate::error::usage;
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes, figure};

/// Flags of `bench engine`.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Path of a GGUF file or catalogue name
    #[arg(long, short, value_name = "MODEL")]
    pub(super) model: String,
    #[command(flatten)]
    pub(super) model_options: ModelOptions,
    /// Compute threads, one run each [default: the cores this process may use]
    #[arg(long, short = 't', value_name = "N,…", value_delimiter = ',')]
    pub(super) threads: Vec<usize>,
    /// Prompt lengths to prefill, tokens
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "128,512")]
    pub(super) prefill: Vec<u32>,
    /// Steps to decode, tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(super) decode: u32,
    /// Sequences decoded together
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,16,32")]
    pub(super) batch: Vec<u32>,
    /// Positions already in the KV cache, not timed
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    pub(super) depth: Vec<u32>,
    /// Times to repeat each measurement; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) repeat: u32,
    /// Most tokens of a prompt in one step
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PREFILL_CHUNK, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(super) prefill_chunk: u32,
    /// Stored type of keys and values: f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(super) kv_cache_dtype: Dtype,
    /// Type of activations between layers: f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub(super) activation_dtype: Dtype,
    /// Also print where the time of a step goes; a clock around each operation slows it a little
    #[arg(long)]
    pub(super) profile: bool,
    /// Engine to measure: cpu
    #[arg(long, value_name = "ENGINE", default_value = "cpu", value_parser = ["cpu"])]
    pub(super) engine: String,
    /// Print a table, or one JSON object
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(super) output: TableOrJson,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    engine: String,
    isa: String,
    numerics: String,
    weight_bytes: u64,
    kv_cache_dtype: &'static str,
    activation_dtype: &'static str,
    prefill_chunk: u32,
    repeat: u32,
    results: Vec<Measurement>,
}

/// One line of the result. `tokens` counts those of all sequences; rates are medians.
#[derive(Debug, Serialize)]
struct Measurement {
    test: &'static str,
    threads: usize,
    depth: u32,
    batch: u32,
    tokens: u32,
    tokens_per_s: f64,
    slowest: f64,
    fastest: f64,
    /// Of the average step, with `--profile`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    phases: Vec<PhaseShare>,
}

pub(crate) fn run(args: &EngineArgs) -> anyhow::Result<()> {
    let threads = validate(args)?;
    let model = Model::open(&args.model, args.model_options)?;
    let size = RigSize::for_runs(args, model.config.context)?;
    let mut report = Report {
        model: args.model.clone(),
        engine: args.engine.clone(),
        isa: Isa::detect().map_err(anyhow::Error::msg)?.to_string(),
        numerics: String::new(),
        weight_bytes: 0,
        kv_cache_dtype: args.kv_cache_dtype.as_str(),
        activation_dtype: args.activation_dtype.as_str(),
        prefill_chunk: args.prefill_chunk,
        repeat: args.repeat,
        results: Vec::new(),
    };
    for threads in threads {
        output::remark(&format!("loading {} with {threads} thread(s)", args.model));
        let mut rig = Rig::load(&model, &size, threads, args.profile)?;
        report.numerics = rig.numerics();
        report.weight_bytes = rig.weight_bytes();
        for &depth in &args.depth {
            measure(args, &mut rig, threads, depth, &mut report.results)?;
        }
    }
    print(args.output, &report)
}

/// Checks the lists; returns the thread counts.
fn validate(args: &EngineArgs) -> anyhow::Result<Vec<usize>> {
    if args.kv_cache_dtype == Dtype::Bf16 {
        return Err(usage("--kv-cache-dtype bf16: the cache holds f16 or f32"));
    }
    if args.prefill.contains(&0) || args.batch.contains(&0) || args.decode == 0 {
        return Err(usage("--prefill, --batch and --decode must be at least 1"));
    }
    if args.threads.iter().any(|&t| t == 0 || t > 1024) {
        return Err(usage("--threads takes numbers from 1 to 1024, for example --threads 1,2"));
    }
    if args.threads.is_empty() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        return Ok(vec![cores]);
    }
    Ok(args.threads.clone())
}

fn measure(
    args: &EngineArgs,
    rig: &mut Rig,
    threads: usize,
    depth: u32,
    results: &mut Vec<Measurement>,
) -> anyhow::Result<()> {
    let mut record = |test, batch, tokens: u32, seconds: Vec<f64>, phases| {
        let mut rates: Vec<f64> = seconds.iter().map(|s| f64::from(tokens) / s).collect();
        rates.sort_by(f64::total_cmp);
        let m = Measurement {
            test,
            threads,
            depth,
            batch,
            tokens,
            tokens_per_s: median(&rates).unwrap_or_default(),
            slowest: rates.first().copied().unwrap_or_default(),
            fastest: rates.last().copied().unwrap_or_default(),
            phases,
        };
        output::remark(&format!(
            "{test} threads {threads} depth {depth} batch {batch} tokens {tokens}: {:.1} tokens/s",
            m.tokens_per_s
        ));
        results.push(m);
    };
    rig.fill(depth)?;
    rig.take_phases();
    for &tokens in &args.prefill {
        let seconds = repeat(args.repeat, || rig.prefill(tokens))?;
        record("prefill", 1, tokens, seconds, rig.take_phases());
    }
    for &batch in &args.batch {
        let seconds = repeat(args.repeat, || rig.decode(batch, args.decode))?;
        record("decode", batch, batch * args.decode, seconds, rig.take_phases());
    }
    Ok(())
}

fn repeat(times: u32, mut once: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<Vec<f64>> {
    (0..times).map(|_| once()).collect()
}

fn print(format: TableOrJson, report: &Report) -> anyhow::Result<()> {
    if format == TableOrJson::Json {
        return output::json(report);
    }
    let mut table = Table::new(&[
        ("test", Left),
        ("threads", Right),
        ("depth", Right),
        ("batch", Right),
        ("tokens", Right),
        ("tokens/s", Right),
        ("slowest", Right),
        ("fastest", Right),
    ]);
    for m in &report.results {
        table.row([
            m.test.to_owned(),
            m.threads.to_string(),
            m.depth.to_string(),
            m.batch.to_string(),
            m.tokens.to_string(),
            figure(Some(m.tokens_per_s)),
            figure(Some(m.slowest)),
            figure(Some(m.fastest)),
        ]);
    }
    output::write(format_args!(
        "{}: {} of weights, engine {} ({}), KV {}, prefill chunk {}, median of {}\n\n{table}",
        report.model,
        bytes(report.weight_bytes),
        report.engine,
        report.isa,
        report.kv_cache_dtype,
        report.prefill_chunk,
        report.repeat
    ))?;
    report.results.iter().filter(|m| !m.phases.is_empty()).try_for_each(print_phases)
}

/// Where the time of the average step of a measurement went.
fn print_phases(m: &Measurement) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        ("phase", Left),
        ("calls", Right),
        ("us", Right),
        ("share %", Right),
        ("GMAC/s", Right),
        ("GB/s", Right),
    ]);
    for p in &m.phases {
        table.row([
            p.phase.name().to_owned(),
            figure(Some(p.calls)),
            figure(Some(p.micros)),
            figure(Some(p.share * 100.0)),
            figure(p.gmac_per_s),
            figure(p.gb_per_s),
        ]);
    }
    output::write(format_args!(
        "\n{}, {} thread(s), depth {}, batch {}, {} tokens: the average step\n\n{table}",
        m.test, m.threads, m.depth, m.batch, m.tokens
    ))
}
