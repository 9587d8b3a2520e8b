//! `millrace chat`, and the chat of `millrace run`: questions are typed into a line editor, answers
//! stream to stdout, everything else goes to stderr.
//!
//! Ctrl-C stops an answer and never the program; Ctrl-D or /exit end it. The line editor blocks, so
//! it has a thread of its own, which reads one line when asked: while an answer streams, the
//! terminal is nobody's.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use millrace_shared::dirs;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{
    ChatMessage, Choices, FinishReason, GenerateEvent, GenerateRequest, Prompt, Usage,
};

use crate::editor::{Editor, Typed};
use crate::error::Interrupted;
use crate::generate::Rates;
use crate::output;
use crate::sampling::{self, SamplingArgs};
use crate::target::{Needs, Session, TargetArgs};

/// How often the status line counts on.
const STATUS: Duration = Duration::from_millis(200);

const HELP: &str = "\
/help             this list
/clear            forget the conversation
/undo             forget the last question and its answer
/retry            ask the last question again
/system TEXT      what the model is told before everything else; alone: nothing
/set NAME VALUE   temperature, max-tokens, top-p, top-k, min-p, seed; alone: show
/save FILE        write the conversation as text
/exit             end (or Ctrl-D)
A line that ends in \\ goes on in the next; Alt-Enter begins a new line;
\"\"\" begins and ends a block.
Ctrl-C stops an answer. Arrow keys and Ctrl-R find earlier lines.";

/// Flags of `chat`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ChatArgs {
    /// Most tokens of an answer
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Randomness: 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.2, allow_negative_numbers = true, value_parser = sampling::temperature)]
    temperature: f32,
    /// What the model is told before everything else [default: what its template says]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Keep no history of typed lines
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    target: TargetArgs,
}

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let session = Session::open(&args.target, Needs::one_request()).await?;
    let params = args.sampling.params(args.temperature, Some(args.max_tokens));
    let result = async {
        let model = session.model().await?;
        let mut talk = Conversation::new(&session, params);
        talk.context = Some(model.max_model_len);
        talk.system(args.system.as_deref());
        output::remark(&format!("{}, {} tokens of context", model.id, model.max_model_len));
        converse(&mut talk, history(args.no_history)).await
    }
    .await;
    session.close().await;
    result
}

/// Where typed lines are kept; nowhere where there is no home.
pub(crate) fn history(none: bool) -> Option<PathBuf> {
    let dir = dirs::data(&|name| std::env::var_os(name)).filter(|_| !none)?;
    Some(dir.join("chat_history"))
}

/// How an answer came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Complete,
    Interrupted,
}

/// What was said so far, and how to go on.
pub(crate) struct Conversation<'a> {
    session: &'a Session,
    params: SamplingParams,
    messages: Vec<ChatMessage>,
    /// Said after the rates of an answer.
    pub(crate) note: Option<String>,
    /// Longest conversation, tokens.
    pub(crate) context: Option<u32>,
}

impl<'a> Conversation<'a> {
    pub(crate) fn new(session: &'a Session, params: SamplingParams) -> Self {
        Self { session, params, messages: Vec::new(), note: None, context: None }
    }

    /// Replaces what the model is told before everything else.
    pub(crate) fn system(&mut self, text: Option<&str>) {
        self.messages.retain(|m| m.role != "system");
        let message = |content: &str| ChatMessage::new("system", content);
        if let Some(text) = text.filter(|t| !t.is_empty()) {
            self.messages.insert(0, message(text));
        }
    }

    fn say(&mut self, role: &str, content: &str) {
        self.messages.push(ChatMessage::new(role, content));
    }

    fn clear(&mut self) {
        self.messages.retain(|m| m.role == "system");
    }

    /// Takes the last question and its answer back; returns the question.
    fn undo(&mut self) -> Option<String> {
        let at = self.messages.iter().rposition(|m| m.role == "user")?;
        self.messages.drain(at..).next().map(|m| m.content)
    }

    /// Asks, streams the answer to stdout, remembers both. An answer that failed leaves no trace.
    pub(crate) async fn ask(&mut self, prompt: &str) -> anyhow::Result<Ended> {
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
            prompt: Prompt::Chat(self.messages.clone().into()),
            params: self.params.clone(),
            choices: Choices::default(),
        };
        let mut status = Status::begin();
        let mut events = self.session.generate(request).await?;
        let mut tokens = 0;
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                () = tokio::time::sleep(STATUS) => { status.show(); continue }
                _ = tokio::signal::ctrl_c() => {
                    status.erase();
                    // Dropping the stream cancels the request.
                    output::stream("\n")?;
                    output::remark(&format!("[stopped after {tokens} tokens]"));
                    return Ok(Ended::Interrupted);
                }
            };
            match event {
                Some(GenerateEvent::Started { .. }) => {}
                Some(GenerateEvent::Token { text, .. }) => {
                    tokens += 1;
                    answer.push_str(&text);
                    if !text.is_empty() {
                        status.erase();
                        output::stream(&text)?;
                    }
                }
                Some(GenerateEvent::Finished { reason, text, usage, timings, .. }) => {
                    status.erase();
                    answer.push_str(&text);
                    output::stream(&format!("{text}\n"))?;
                    output::remark(&self.summary(
                        reason,
                        tokens,
                        (usage, Rates::new(usage, timings)),
                    ));
                }
                None => return Ok(Ended::Complete),
            }
        }
    }

    fn summary(&self, reason: FinishReason, tokens: u32, (usage, rates): (Usage, Rates)) -> String {
        let mut parts = vec![format!("{tokens} tokens")];
        parts.extend(rates.decode_tokens_per_s.map(|r| format!("{r:.1} tokens/s")));
        parts.extend(rates.ttft_ms.map(|ms| format!("first after {:.2} s", ms / 1e3)));
        let used = usage.prompt_tokens + usage.completion_tokens;
        parts.extend(self.context.map(|all| format!("{used} of {all} in context")));
        parts.extend(self.note.clone());
        if reason == FinishReason::Length {
            parts.push("cut off: --max-tokens or the context sets the limit".to_owned());
        }
        format!("[{}]", parts.join(", "))
    }

    /// `/set`.
    fn set(&mut self, words: &str) -> Result<String, String> {
        let (name, value) = words.split_once(' ').map_or((words, ""), |(n, v)| (n, v.trim()));
        let p = &mut self.params;
        let wrong = |_| format!("'{value}' does not fit {name}");
        match name {
            "" => {}
            "temperature" => p.temperature = sampling::temperature(value)?,
            "max-tokens" => p.max_tokens = Some(value.parse().map_err(|_| wrong(()))?),
            "top-p" => p.top_p = value.parse().map_err(|_| wrong(()))?,
            "top-k" => p.top_k = value.parse().map_err(|_| wrong(()))?,
            "min-p" => p.min_p = value.parse().map_err(|_| wrong(()))?,
            "seed" => p.seed = Some(value.parse().map_err(|_| wrong(()))?),
            other => return Err(format!("there is no setting '{other}': see /help")),
        }
        let seed = p.seed.map_or_else(|| "drawn".to_owned(), |s| s.to_string());
        let most = p.max_tokens.map_or_else(|| "as many as fit".to_owned(), |n| n.to_string());
        Ok(format!(
            "temperature {}, max-tokens {most}, top-p {}, top-k {}, min-p {}, seed {seed}",
            p.temperature, p.top_p, p.top_k, p.min_p
        ))
    }

    fn save(&self, file: &str) -> Result<String, String> {
        if file.is_empty() {
            return Err("name a file: /save FILE".to_owned());
        }
        let turn = |m: &ChatMessage| format!("{}:\n{}\n\n", m.role, m.content);
        let text: String = self.messages.iter().map(turn).collect();
        std::fs::write(file, text).map_err(|e| format!("{file}: {e}"))?;
        Ok(format!("{} turns in {file}", self.messages.len()))
    }
}

/// What is shown until the first text of an answer comes; nothing where stderr is no terminal.
struct Status {
    since: Instant,
    shown: bool,
    wanted: bool,
}

impl Status {
    fn begin() -> Self {
        Self { since: Instant::now(), shown: false, wanted: std::io::stderr().is_terminal() }
    }

    fn show(&mut self) {
        if self.wanted {
            let seconds = self.since.elapsed().as_secs_f64();
            eprint!("\r\x1b[K\x1b[2m[waiting, {seconds:.1} s; Ctrl-C stops it]\x1b[0m");
            self.shown = true;
        }
    }

    /// For good: from now on the line belongs to the answer.
    fn erase(&mut self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
        (self.shown, self.wanted) = (false, false);
    }
}

/// What a typed line asks for.
enum Turn<'a> {
    Ask(String),
    Say(Result<String, String>),
    End,
    Unknown(&'a str),
}

fn turn<'a>(talk: &mut Conversation<'_>, text: &'a str) -> Turn<'a> {
    let Some(command) = text.strip_prefix('/') else { return Turn::Ask(text.to_owned()) };
    let (name, rest) = command.split_once(' ').map_or((command, ""), |(n, r)| (n, r.trim()));
    let said = match name {
        "exit" | "quit" | "bye" => return Turn::End,
        "help" => Ok(HELP.to_owned()),
        "clear" => {
            talk.clear();
            Ok("forgotten".to_owned())
        }
        "undo" => talk
            .undo()
            .map(|_| "forgotten".to_owned())
            .ok_or_else(|| "nothing was asked yet".into()),
        "retry" => match talk.undo() {
            Some(question) => return Turn::Ask(question),
            None => Err("nothing was asked yet".to_owned()),
        },
        "system" => {
            talk.system(Some(rest));
            Ok("told".to_owned())
        }
        "set" => talk.set(rest),
        "save" => talk.save(rest),
        _ => return Turn::Unknown(name),
    };
    Turn::Say(said)
}

/// Reads, asks, answers, until Ctrl-D or /exit.
///
/// # Errors
/// If the cluster fails where nobody types, or stdout is closed.
pub(crate) async fn converse(
    talk: &mut Conversation<'_>,
    history: Option<PathBuf>,
) -> anyhow::Result<()> {
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        output::remark(
            "Type a message; /help lists commands. Ctrl-C stops an answer, Ctrl-D ends.",
        );
    }
    // What a script pipes in is nobody's history.
    let mut editor = Editor::start(history.filter(|_| interactive))?;
    loop {
        let text = match editor.line().await? {
            Typed::Text(text) => text,
            Typed::Interrupt if interactive => {
                output::remark("(Ctrl-D or /exit ends the chat)");
                continue;
            }
            Typed::Interrupt => return Err(Interrupted.into()),
            Typed::End => return Ok(()),
        };
        let question = match turn(talk, text.trim()) {
            Turn::Ask(question) if question.is_empty() => continue,
            Turn::Ask(question) => question,
            Turn::End => return Ok(()),
            Turn::Say(Ok(said)) => {
                output::remark(&said);
                continue;
            }
            Turn::Say(Err(wrong)) => {
                output::remark(&format!("error: {wrong}"));
                continue;
            }
            Turn::Unknown(name) => {
                output::remark(&format!("there is no command /{name}: /help lists them"));
                continue;
            }
        };
        // Whether it was stopped or not, the next turn goes on from what was said.
        match talk.ask(&question).await {
            Ok(Ended::Complete | Ended::Interrupted) => {}
            Err(e) if e.is::<output::StdoutError>() => return Err(e),
            Err(e) if interactive => output::remark(&format!("error: {e:#}")),
            Err(e) => return Err(e),
        }
    }
}
