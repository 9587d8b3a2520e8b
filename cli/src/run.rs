//! `millrace run`: one command from nothing to an answer. Fetches the model, starts coordinator and
//! nodes in this process (they talk over QUIC on loopback), streams the answer, or chats.
//!
//! Ctrl-C stops the answer; a chat goes on then.

use clap::Args;
use millrace_coordinator::models::ModelOptions;
use millrace_engine::cache::set_limit;
use millrace_shared::options::{CacheOptions, EngineOptions};

use crate::chat::{Conversation, Ended, converse, history};
use crate::error::Interrupted;
use crate::sampling::{self, SamplingArgs};
use crate::serving;
use crate::target::Session;

/// Flags of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// GGUF file, folder of a model, catalogue name such as smollm2:135m, or org/name:file of the hub
    #[arg(value_name = "MODEL")]
    model: String,
    /// What to ask; without it, a chat begins
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,
    /// Stages to cut the model into, each a node of its own [default: 1, the fastest on one machine; 2 shows the pipeline]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    stages: Option<u32>,
    /// Most tokens of an answer
    #[arg(long, short = 'n', value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Randomness: 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.2, allow_negative_numbers = true, value_parser = sampling::temperature)]
    temperature: f32,
    /// What the model is told before everything else [default: what its template says]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model_options: ModelOptions,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

pub(crate) async fn run(args: RunArgs) -> anyhow::Result<()> {
    args.cache.cache_limit.into_iter().for_each(set_limit);
    let stages = serving::stages(args.stages, &args.engine, serving::DEFAULT_STAGES)?;
    let mut options =
        serving::private_cluster(&args.model, args.model_options, stages, &args.engine)?;
    options.kv_cache_tokens = serving::kv_cache_for(&options, 1);
    let session = Session::start(options).await?;
    let params = args.sampling.params(args.temperature, Some(args.max_tokens));
    let mut talk = Conversation::new(&session, params);
    talk.note = Some(match stages {
        1 => "1 stage".to_owned(),
        n => format!("{n} stages over QUIC"),
    });
    talk.system(args.system.as_deref());
    let result = match &args.prompt {
        Some(prompt) => once(&mut talk, prompt).await,
        None => converse(&mut talk, history(false)).await,
    };
    session.close().await;
    result
}

async fn once(talk: &mut Conversation<'_>, prompt: &str) -> anyhow::Result<()> {
    match talk.ask(prompt).await? {
        Ended::Complete => Ok(()),
        Ended::Interrupted => Err(Interrupted.into()),
    }
}
