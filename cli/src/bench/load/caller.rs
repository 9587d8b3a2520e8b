//! One client under load, over QUIC or HTTP, and what it hears of an answer.

use std::cell::RefCell;
use std::time::Instant;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};

use super::http;
use super::tally::Tally;
use crate::target::{self, Session};

/// What is asked for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: u32,
}

/// Why there is no whole answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The cluster has too much to do, and said so: 429, `RESOURCE_EXHAUSTED`.
    Refused(String),
    /// Anything else.
    Failed(String),
}

pub(super) fn refused(why: String) -> Failure {
    Failure::Refused(why)
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        match e.downcast_ref::<Status>() {
            Some(status) if status.code == ErrorCode::ResourceExhausted => {
                Self::Refused(status.message.clone())
            }
            _ => Self::Failed(format!("{e:#}")),
        }
    }
}

/// What was heard of one answer so far.
#[derive(Debug)]
pub(super) struct Heard<'a> {
    tally: &'a RefCell<Tally>,
    /// When the request was due: where the client itself is late, that counts too.
    due: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: u64,
    expected: u32,
    ended: bool,
}

impl<'a> Heard<'a> {
    pub(super) fn new(tally: &'a RefCell<Tally>, due: Instant, expected: u32) -> Self {
        Self { tally, due, first: None, last: None, tokens: 0, expected, ended: false }
    }

    /// More text.
    pub(super) fn text(&mut self) {
        let now = Instant::now();
        let mut tally = self.tally.borrow_mut();
        match self.last {
            Some(last) => tally.gap(now - last),
            None => self.first = Some(now),
        }
        self.last = Some(now);
        self.tokens += 1;
        tally.token();
    }

    /// How many tokens the answer has had, where one piece of text may stand for several.
    pub(super) fn count(&mut self, tokens: u64) {
        self.tally.borrow_mut().more_tokens(tokens.saturating_sub(self.tokens));
        self.tokens = tokens;
    }

    /// The answer is complete.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        self.ended = true;
        if self.tokens == u64::from(self.expected) {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "an answer has {} tokens instead of {}: is the context of the model long enough for \
             --prompt-tokens and --max-tokens together?",
            self.tokens, self.expected
        )))
    }

    /// Counts the request.
    pub(super) fn close(self, result: Result<(), Failure>) {
        let mut tally = self.tally.borrow_mut();
        match (result, self.first.zip(self.last)) {
            (Ok(()), Some((first, last))) if self.ended => {
                let pace =
                    (last - first) / u32::try_from(self.tokens.max(2) - 1).unwrap_or(u32::MAX);
                tally.answered(first - self.due, pace, last - self.due);
            }
            (Ok(()), _) => tally.failed("an answer broke off".to_owned()),
            (Err(Failure::Refused(why)), _) => tally.refused(why),
            (Err(Failure::Failed(why)), _) => tally.failed(why),
        }
    }
}

/// A client with a connection of its own.
#[derive(Debug)]
pub(super) enum Caller {
    Quic(Box<target::Caller>),
    Http(http::Connection),
}

impl Caller {
    /// # Errors
    /// If the cluster cannot be reached.
    pub(super) async fn connect(
        session: &Session,
        http: Option<&http::Place>,
    ) -> anyhow::Result<Self> {
        Ok(match http {
            Some(place) => Self::Http(http::Connection::open(place).await?),
            None => Self::Quic(Box::new(session.caller().await?)),
        })
    }

    /// Asks, and hears the whole answer. Whether the caller can be used again.
    pub(super) async fn ask(&mut self, ask: Ask, mut heard: Heard<'_>) -> bool {
        let result = match self {
            Self::Http(connection) => connection.ask(&ask, &mut heard).await,
            Self::Quic(caller) => over_quic(caller, ask, &mut heard).await,
        };
        let again = !matches!(result, Err(Failure::Failed(_)));
        heard.close(result);
        again
    }
}

async fn over_quic(
    caller: &target::Caller,
    ask: Ask,
    heard: &mut Heard<'_>,
) -> Result<(), Failure> {
    let params = SamplingParams {
        max_tokens: Some(ask.max_tokens),
        ignore_eos: true,
        ..SamplingParams::greedy()
    };
    let request = GenerateRequest {
        model: String::new(),
        prompt: Prompt::Tokens(ask.prompt),
        params,
        choices: Choices::default(),
    };
    let mut events = caller.generate(request).await?;
    while let Some(event) = events.next().await? {
        match event {
            GenerateEvent::Token { .. } => heard.text(),
            GenerateEvent::Finished { .. } => heard.end()?,
            GenerateEvent::Started { .. } => {}
        }
    }
    Ok(())
}
