//! `millrace run`: one command from nothing to an answer. Fetches the model, starts coordinator and
//! nodes in this process (they talk over QUIC on loopback), streams the answer, or chats.
//!
//! Ctrl-C ends the answer; a second one, or one at the chat's prompt, ends the program.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use millrace_coordinator::models::ModelOptions;
use millrace_engine::cache::set_limit;
use millrace_shared::options::{CacheOptions, EngineOptions};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{
    ChatMessage, Choices, FinishReason, GenerateEvent, GenerateRequest, Prompt,
};
use tokio::sync::mpsc;

use crate::error::Interrupted;
use crate::generate::Rates;
use crate::output;
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
    let mut talk = Conversation {
        session: &session,
        params: args.sampling.params(args.temperature, Some(args.max_tokens)),
        stages,
        messages: Vec::new(),
    };
    if let Some(system) = &args.system {
        talk.say("system", system);
    }
    let result = match &args.prompt {
        Some(prompt) => once(&mut talk, prompt).await,
        None => chat(&mut talk).await,
    };
    session.close().await;
    result
}

/// How an answer came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Complete,
    Interrupted,
}

struct Conversation<'a> {
    session: &'a Session,
    params: SamplingParams,
    stages: u32,
    messages: Vec<ChatMessage>,
}

impl Conversation<'_> {
    fn say(&mut self, role: &str, content: &str) {
        self.messages.push(ChatMessage { role: role.to_owned(), content: content.to_owned() });
    }

    /// Asks, streams the answer to stdout, remembers both. An answer that failed leaves no trace.
    async fn ask(&mut self, prompt: &str) -> anyhow::Result<Ended> {
        let before = self.messages.len();
        self.say("user", prompt);
        let mut answer = String::new();
        let result = self.stream(&mut answer).await;
        match &result {
            Ok(_) => self.say("assistant", &answer),
            Err(_) => self.messages.truncate(before),
        }
        result
    }

    async fn stream(&self, answer: &mut String) -> anyhow::Result<Ended> {
        let request = GenerateRequest {
            model: String::new(),
            prompt: Prompt::Chat(self.messages.clone()),
            params: self.params.clone(),
            choices: Choices::default(),
        };
        let mut events = self.session.generate(request).await?;
        let mut tokens = 0;
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                _ = tokio::signal::ctrl_c() => {
                    // Dropping the stream cancels the request.
                    output::write("\n")?;
                    output::remark(&format!("[interrupted after {tokens} tokens]"));
                    return Ok(Ended::Interrupted);
                }
            };
            match event {
                Some(GenerateEvent::Started { .. }) => {}
                Some(GenerateEvent::Token { text, .. }) => {
                    tokens += 1;
                    answer.push_str(&text);
                    output::stream(&text)?;
                }
                Some(GenerateEvent::Finished { reason, text, usage, timings, .. }) => {
                    answer.push_str(&text);
                    output::stream(&format!("{text}\n"))?;
                    output::remark(&self.summary(reason, tokens, Rates::new(usage, timings)));
                }
                None => return Ok(Ended::Complete),
            }
        }
    }

    fn summary(&self, reason: FinishReason, tokens: u32, rates: Rates) -> String {
        let mut parts = vec![format!("{tokens} tokens")];
        parts.extend(rates.decode_tokens_per_s.map(|r| format!("{r:.1} tokens/s")));
        parts.extend(rates.ttft_ms.map(|ms| format!("first after {:.2} s", ms / 1e3)));
        parts.push(match self.stages {
            1 => "1 stage".to_owned(),
            n => format!("{n} stages over QUIC"),
        });
        if reason == FinishReason::Length {
            parts.push("cut off: --max-tokens sets the limit".to_owned());
        }
        format!("[{}]", parts.join(", "))
    }
}

async fn once(talk: &mut Conversation<'_>, prompt: &str) -> anyhow::Result<()> {
    match talk.ask(prompt).await? {
        Ended::Complete => Ok(()),
        Ended::Interrupted => Err(Interrupted.into()),
    }
}

async fn chat(talk: &mut Conversation<'_>) -> anyhow::Result<()> {
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        output::remark("Type a message. /clear forgets the conversation; /exit or Ctrl-D ends it;");
        output::remark("Ctrl-C stops an answer.");
    }
    let keep = talk.messages.len();
    let mut lines = stdin_lines()?;
    loop {
        if interactive {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => return Err(Interrupted.into()),
        };
        match line.transpose()?.as_deref().map(str::trim) {
            None | Some("/exit" | "/quit" | "/bye") => return Ok(()),
            Some("") => {}
            Some("/clear") => talk.messages.truncate(keep),
            Some(command) if command.starts_with('/') => {
                output::remark("unknown command: there are /clear and /exit");
            }
            // Whether it was interrupted or not, the next turn goes on from what was said.
            Some(prompt) => match talk.ask(prompt).await {
                Ok(Ended::Complete | Ended::Interrupted) => {}
                Err(e) if e.is::<output::StdoutError>() => return Err(e),
                Err(e) if interactive => output::remark(&format!("error: {e:#}")),
                Err(e) => return Err(e),
            },
        }
    }
}

/// Lines of stdin, read by a thread of their own: reading must not hold up the cluster, which lives
/// on this thread, and must not hold up the end of the program.
fn stdin_lines() -> std::io::Result<mpsc::Receiver<std::io::Result<String>>> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    })?;
    Ok(lines)
}
