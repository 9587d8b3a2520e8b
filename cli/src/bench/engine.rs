//! `millrace bench engine`: tokens per second of prefill and decode, by threads, batch and depth,
//! beside what this machine could do at best, and beside the likelihood of a text.

use std::path::PathBuf;

use clap::Args;
use millrace_coordinator::models::ModelOptions;
use millrace_coordinator::text::TextModel;
use millrace_engine::Isa;
use millrace_shared::model::Dtype;
use millrace_shared::options::{DEFAULT_PREFILL_CHUNK, activation_dtype, kv_dtype};
use serde::Serialize;

use super::bound::{Limits, Run, Work};
use super::engine_rig::{Model, Rig, RigSize};
use super::median;
use super::timed::PhaseShare;
use crate::error::usage;
use crate::input;
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes, figure};

/// Longest window of a text that is scored, as in `eval nll`.
const WINDOW: u32 = 2048;

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
    /// Positions already in the KV cache, neither computed nor timed
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    pub(super) depth: Vec<u32>,
    /// Times to repeat each measurement; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) repeat: u32,
    /// Most tokens of a prompt in one step
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PREFILL_CHUNK, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(super) prefill_chunk: u32,
    /// Stored type of keys and values: f16, f32 or int8
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_dtype)]
    pub(super) kv_cache_dtype: Dtype,
    /// Type of activations between layers: f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = activation_dtype)]
    pub(super) activation_dtype: Dtype,
    /// Also print where the time of a step goes; a clock around each operation slows it a little
    #[arg(long)]
    pub(super) profile: bool,
    /// Also print the likelihood of a text [FILE: UTF-8; without it: a short text of this program's]
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub(super) nll: Option<Option<PathBuf>>,
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
    /// Nats per scored token, of the text asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    mean_nll: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scored_tokens: Option<usize>,
    limits: Vec<Limits>,
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
    /// Bytes that a step must read: weights, and keys and values of its sequences.
    bytes_per_step: u64,
    /// What this machine could do at best, and the share reached.
    bound_tokens_per_s: f64,
    share_of_bound: f64,
    /// Of the average step, with `--profile`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    phases: Vec<PhaseShare>,
}

pub(crate) fn run(args: &EngineArgs) -> anyhow::Result<()> {
    let threads = validate(args)?;
    let model = Model::open(&args.model, args.model_options)?;
    let text = text_to_score(args, &model)?;
    let windows: Vec<&[u32]> =
        text.chunks(WINDOW.min(model.files.config.context) as usize).collect();
    let scored = windows.first().map_or(0, |w| w.len() as u32);
    let size = RigSize::for_runs(args, model.files.config.context, scored)?;
    let isa = Isa::detect().map_err(anyhow::Error::msg)?;
    let mut report = Report {
        model: args.model.clone(),
        engine: args.engine.clone(),
        isa: isa.to_string(),
        numerics: String::new(),
        weight_bytes: 0,
        kv_cache_dtype: args.kv_cache_dtype.as_str(),
        activation_dtype: args.activation_dtype.as_str(),
        prefill_chunk: args.prefill_chunk,
        repeat: args.repeat,
        mean_nll: None,
        scored_tokens: None,
        limits: Vec::new(),
        results: Vec::new(),
    };
    for threads in threads {
        output::remark(&format!("loading {} with {threads} thread(s)", args.model));
        let mut rig = Rig::load(&model, &size, threads, args.profile)?;
        report.numerics = rig.numerics();
        report.weight_bytes = rig.weight_bytes();
        if report.mean_nll.is_none() && !text.is_empty() {
            (report.mean_nll, report.scored_tokens) = score(&mut rig, &windows)?;
        }
        let limits = Limits::measure(isa, threads)?;
        let tensors = &model.files.tensors;
        let work =
            Work::new(&model.files.config, tensors, report.weight_bytes, args.kv_cache_dtype);
        let mut bench = Bench { args, rig, threads, limits, work, results: &mut report.results };
        for &depth in &args.depth {
            bench.measure(depth)?;
        }
        report.limits.push(bench.limits);
    }
    print(args.output, &report)
}

/// Tokens of the text whose likelihood is asked for; none if none is.
fn text_to_score(args: &EngineArgs, model: &Model) -> anyhow::Result<Vec<u32>> {
    let Some(file) = &args.nll else { return Ok(Vec::new()) };
    let text = input::text_or_sample(file.as_deref())?;
    let tokens = TextModel::of(&model.files.description)?.tokenizer.encode(&text, true)?;
    if tokens.len() < 2 {
        return Err(usage("--nll: the text has fewer than two tokens: there is nothing to score"));
    }
    Ok(tokens)
}

/// Mean and number of the scores of windows that do not overlap.
fn score(rig: &mut Rig, windows: &[&[u32]]) -> anyhow::Result<(Option<f64>, Option<usize>)> {
    let mut nll = Vec::new();
    for window in windows {
        nll.extend(rig.score(window)?);
    }
    let mean = nll.iter().sum::<f64>() / nll.len().max(1) as f64;
    Ok((Some(mean), Some(nll.len())))
}

/// Checks the lists; returns the thread counts.
fn validate(args: &EngineArgs) -> anyhow::Result<Vec<usize>> {
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

/// Measuring one loaded rig.
struct Bench<'a> {
    args: &'a EngineArgs,
    rig: Rig,
    threads: usize,
    limits: Limits,
    work: Work,
    results: &'a mut Vec<Measurement>,
}

impl Bench<'_> {
    fn measure(&mut self, depth: u32) -> anyhow::Result<()> {
        let args = self.args;
        self.rig.take_phases();
        for &tokens in &args.prefill {
            let seconds = repeat(args.repeat, || self.rig.prefill(depth, tokens))?;
            let half = u64::from(depth + tokens / 2);
            let run = Run {
                steps: tokens.div_ceil(args.prefill_chunk).into(),
                positions: tokens.into(),
                wanted: 1,
                stored_per_step: half,
                attended: half,
            };
            self.record("prefill", depth, 1, &run, &seconds);
        }
        for &batch in &args.batch {
            let seconds = repeat(args.repeat, || self.rig.decode(depth, batch, args.decode))?;
            let (positions, half) = (u64::from(batch * args.decode), depth + args.decode / 2);
            let run = Run {
                steps: args.decode.into(),
                positions,
                wanted: positions,
                stored_per_step: u64::from(batch) * u64::from(half),
                attended: half.into(),
            };
            self.record("decode", depth, batch, &run, &seconds);
        }
        Ok(())
    }

    fn record(&mut self, test: &'static str, depth: u32, batch: u32, run: &Run, seconds: &[f64]) {
        let tokens = run.positions as f64;
        let mut rates: Vec<f64> = seconds.iter().map(|s| tokens / s).collect();
        rates.sort_by(f64::total_cmp);
        let tokens_per_s = median(&rates).unwrap_or_default();
        let bound = tokens / self.work.seconds(run, &self.limits);
        let m = Measurement {
            test,
            threads: self.threads,
            depth,
            batch,
            tokens: run.positions as u32,
            tokens_per_s,
            slowest: rates.first().copied().unwrap_or_default(),
            fastest: rates.last().copied().unwrap_or_default(),
            bytes_per_step: self.work.step_bytes(run),
            bound_tokens_per_s: bound,
            share_of_bound: tokens_per_s / bound,
            phases: self.rig.take_phases(),
        };
        output::remark(&format!(
            "{test} threads {} depth {depth} batch {batch} tokens {}: {:.1} tokens/s",
            m.threads, m.tokens, m.tokens_per_s
        ));
        self.results.push(m);
    }
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
        ("read/step", Right),
        ("bound", Right),
        ("share %", Right),
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
            bytes(m.bytes_per_step),
            figure(Some(m.bound_tokens_per_s)),
            figure(Some(m.share_of_bound * 100.0)),
        ]);
    }
    let likelihood =
        report.mean_nll.zip(report.scored_tokens).map_or_else(String::new, |(n, of)| {
            format!("likelihood: mean_nll {n:.6} nats over {of} tokens\n")
        });
    let limits: String =
        report.limits.iter().map(|l| format!("limits, {}\n", l.describe())).collect();
    output::write(format_args!(
        "{}: {} of weights, engine {} ({}), KV {}, prefill chunk {}, median of {}\n{likelihood}{limits}\n{table}",
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
