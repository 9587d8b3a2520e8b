//! `millrace eval kl | tasks | speed | compare`: models judged on this machine's CPU engine, without a
//! cluster. The work is millrace-compress's.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use millrace_compress::compare::{Entry, Original, Terms, judge};
use millrace_compress::judge::{Judge, Speed};
use millrace_compress::tasks::{Codec, Score, Task};
use millrace_compress::{CompressError, tasks, texts};
use millrace_coordinator::text::TextModel;
use millrace_shared::model::{Description, Dtype};
use serde::Serialize;

use crate::compress::{Bar, check_page, failed, judged_by, short, threads};
use crate::error::usage;
use crate::{compress, input, output};

/// Flags that all have.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Positions of a window
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    context: u32,
    /// Type of K and V: f32, f16 or int8
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv_dtype: Dtype,
    /// Threads [default: the cores this process may use]
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Common {
    fn terms(&self) -> Terms {
        let threads = threads(self.threads);
        Terms { window: self.context as usize, threads, kv_dtype: self.kv_dtype }
    }

    fn open(&self, model: &str) -> anyhow::Result<(PathBuf, Judge)> {
        let path = input::model(model)?;
        let t = self.terms();
        let judge = Judge::open(&path, t.window, t.threads, t.kv_dtype).map_err(failed)?;
        Ok((path, judge))
    }
}

/// Flags of `eval kl` and `eval compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The original, then models to compare with it: paths or catalogue names
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
    /// UTF-8 text to judge by [default: held-out documents of this program's]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Also write a page with plots
    #[arg(long, value_name = "FILE.html")]
    html: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// Flags of `eval tasks`.
#[derive(Debug, Args)]
pub(crate) struct TasksArgs {
    /// Path or catalogue name
    #[arg(value_name = "MODEL")]
    model: String,
    /// JSONL: {"prompt", "choices", "answer": number from 0} or {"prompt", "answer": "text"} [default:
    /// sixty easy ones of this program's, in four sets]
    #[arg(long, short, value_name = "FILE", conflicts_with = "set")]
    file: Option<PathBuf>,
    /// One of this program's sets alone: facts, words, reading or sequences
    #[arg(long, value_name = "NAME")]
    set: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Flags of `eval speed`.
#[derive(Debug, Args)]
pub(crate) struct SpeedArgs {
    /// Path or catalogue name
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    common: Common,
}

pub(super) fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let text = match &args.file {
        Some(path) => input::text(path)?,
        None => texts::HELD_OUT.to_owned(),
    };
    check_page(args.html.as_deref())?;
    // Before any work: models that there are.
    let paths: Vec<PathBuf> =
        args.models.iter().map(|name| input::model(name)).collect::<Result<_, _>>()?;
    let terms = args.common.terms();
    let tokens = judged_by(&paths[0], &text, terms.window)?;
    let mut bar = Bar::default();
    bar.judging(&args.models[0]);
    let mut original = Original::open(&paths[0], &tokens, terms).map_err(failed)?;
    let mut entries: Vec<Entry> = Vec::new();
    for (name, path) in args.models.iter().zip(&paths) {
        bar.judging(name);
        // Models of the same name in several folders are told apart by all of it.
        let alike = paths.iter().filter(|other| short(other) == short(path)).count();
        let told = if alike > 1 { name.clone() } else { short(path) };
        let judged = judge(&told, path, &tokens, Some(&mut original), terms);
        entries.push(judged.map_err(failed).with_context(|| name.clone())?);
    }
    bar.end();
    compress::write_page(args.html.as_deref(), "Models compared", &entries)?;
    if args.common.json { output::json(&entries) } else { compress::print_entries(&entries) }
}

/// What `eval tasks --json` prints.
#[derive(Serialize)]
struct Sets {
    right: usize,
    of: usize,
    sets: Vec<Set>,
}

#[derive(Serialize)]
struct Set {
    name: String,
    #[serde(flatten)]
    score: Score,
}

/// Names and tasks.
fn sets(args: &TasksArgs) -> anyhow::Result<Vec<(String, Vec<Task>)>> {
    if let Some(path) = &args.file {
        let all = tasks::parse(&input::text(path)?).map_err(failed)?;
        return Ok(vec![(short(path), all)]);
    }
    let wanted = |name: &str| args.set.as_ref().is_none_or(|set| set == name);
    let mut found = Vec::new();
    for (name, text) in texts::TASKS.into_iter().filter(|(name, _)| wanted(name)) {
        found.push((name.to_owned(), tasks::parse(text).map_err(failed)?));
    }
    if found.is_empty() {
        return Err(usage("--set: there are facts, words, reading and sequences"));
    }
    Ok(found)
}

pub(super) fn tasks(args: &TasksArgs) -> anyhow::Result<()> {
    let sets = sets(args)?;
    let (path, mut judge) = args.common.open(&args.model)?;
    let tokenizer = TextModel::of(&Description::open(&path)?)?.tokenizer;
    let encode = |text: &str| {
        tokenizer.encode(text, true).map_err(|e| CompressError::settings(e.to_string()))
    };
    let prompt = |text: &str| {
        tokenizer.encode_prompt(text).map_err(|e| CompressError::settings(e.to_string()))
    };
    let decode = |ids: &[u32]| tokenizer.decode(ids, true);
    let codec = Codec { prompt: &prompt, encode: &encode, decode: &decode };
    let mut all = Sets { right: 0, of: 0, sets: Vec::new() };
    for (name, tasks) in sets {
        let score = tasks::run(&mut judge, &tasks, &codec).map_err(failed)?;
        (all.right, all.of) = (all.right + score.right, all.of + score.of);
        all.sets.push(Set { name, score });
    }
    if args.common.json {
        return output::json(&all);
    }
    for Set { name, score } in &all.sets {
        output::write(format_args!("{name}: {} of {} right\n", score.right, score.of))?;
    }
    output::write(format_args!("{} of {} tasks right\n", all.right, all.of))
}

pub(super) fn speed(args: &SpeedArgs) -> anyhow::Result<()> {
    let (_, mut judge) = args.common.open(&args.model)?;
    let speed: Speed = judge.speed(None).map_err(failed)?;
    if args.common.json {
        return output::json(&speed);
    }
    output::write(format_args!(
        "{:.1} tokens/s of a prompt of 128, {:.1} tokens/s of an answer, one sequence\n",
        speed.prefill, speed.decode
    ))
}
