//! Reads prompts: the operator's rules, the chat template, ids, and what is left out of those that are
//! too long. Nothing here knows of a cluster.

use std::sync::Arc;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::sampling::Grammar;
use millrace_shared::wire::rpc::{ChatMessage, Conversation, ModelCard, Prompt, ToolCall};

use crate::service::Framing;
use crate::text::rules::{Fitted, Overflow, Overlong, PromptRules, TextRules, Touched};
use crate::text::{CallForm, Matcher, TextModel};

/// Bytes of text from which tokenising takes a millisecond and more.
pub(super) const LONG_TEXT: usize = 4096;

/// The text side of the served model.
#[derive(Debug)]
pub struct Prompts {
    /// Tokenizer and chat template.
    pub text: TextModel,
    /// What `/v1/models` says.
    pub card: ModelCard,
    /// What is done to prompts and answers.
    pub rules: TextRules,
}

/// A prompt as the model reads it.
pub(super) struct Read {
    pub(super) ids: Vec<u32>,
    /// Tokens that were left out because it was too long.
    pub(super) left_out: u32,
}

/// A prompt on its way to ids.
enum Prepared {
    Ids(Vec<u32>),
    /// The request's field, and the text it became.
    Text(&'static str, String),
}

/// Bytes of text in a conversation.
fn bytes_of(conversation: &Conversation) -> usize {
    let call = |c: &ToolCall| c.name.len() + c.arguments.len();
    let turn = |m: &ChatMessage| {
        m.role.len() + m.content.len() + m.tool_calls.iter().map(call).sum::<usize>()
    };
    let tools: usize = conversation.tools.iter().map(String::len).sum();
    conversation.messages.iter().map(turn).sum::<usize>() + tools
}

impl Prompts {
    pub(super) fn check_model(&self, model: &str) -> Result<(), Status> {
        if model.is_empty() || model == self.card.id {
            return Ok(());
        }
        Err(Status {
            param: Some("model".into()),
            ..Status::new(
                ErrorCode::NotFound,
                format!("model '{model}' is not served here; served: '{}'", self.card.id),
            )
        })
    }

    pub(super) fn check_ids(&self, param: &str, ids: &[u32]) -> Result<(), Status> {
        match ids.iter().find(|&&id| id >= self.card.vocab) {
            None => Ok(()),
            Some(id) => Err(Status::invalid(
                param,
                format!("token id {id} is outside the vocabulary of {} tokens", self.card.vocab),
            )),
        }
    }

    /// What is to be tokenised; ids are checked and done.
    fn prepare(&self, prompt: &Prompt) -> Result<Prepared, Status> {
        match prompt {
            Prompt::Tokens(ids) => {
                self.check_ids("prompt", ids)?;
                Ok(Prepared::Ids(ids.clone()))
            }
            Prompt::Text(text) => Ok(Prepared::Text("prompt", text.clone())),
            Prompt::Chat(conversation) => {
                let template = self
                    .text
                    .template
                    .as_ref()
                    .map_err(|e| Status::invalid("messages", e.clone()))?;
                let text = template
                    .render(conversation, true)
                    .map_err(|e| Status::invalid("messages", e.to_string()))?;
                Ok(Prepared::Text("messages", text))
            }
        }
    }

    /// Refuses what cannot fit, before time is spent on it: a token covers a few bytes on average,
    /// so text a hundred times longer than the context is hopeless, and a message takes a token.
    pub(super) fn check_size(&self, prompt: &Prompt) -> Result<(), Status> {
        let limit = self.card.max_model_len as usize * 100;
        let (param, bytes, messages) = match prompt {
            Prompt::Tokens(ids) => ("prompt", ids.len(), 0),
            Prompt::Text(text) => ("prompt", text.len(), 0),
            Prompt::Chat(c) => ("messages", bytes_of(c), c.messages.len()),
        };
        if bytes <= limit && messages <= self.card.max_model_len as usize {
            return Ok(());
        }
        Err(Status::invalid(
            param,
            format!(
                "{bytes} bytes of text in {messages} messages cannot fit a context of {} tokens; \
                 shorten it",
                self.card.max_model_len
            ),
        ))
    }

    /// Does something with a prompt: with conversations (a template is a program, and may take its
    /// time) and what is long elsewhere, so that nobody else's answer waits for it.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        prompt: Prompt,
        work: impl FnOnce(&Self, Prompt) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        self.check_size(&prompt)?;
        let long = match &prompt {
            Prompt::Tokens(ids) => ids.len() > LONG_TEXT,
            Prompt::Text(text) => text.len() > LONG_TEXT,
            Prompt::Chat(_) => true,
        };
        if !long {
            return work(self, prompt);
        }
        let serving = Arc::clone(self);
        let working = tokio::task::spawn_blocking(move || work(&serving, prompt));
        working.await.unwrap_or_else(|e| Err(Status::internal(e.to_string())))
    }

    /// Applies the operator's rules to a prompt, but for its length.
    /// The inner error is theirs.
    pub(super) async fn ruled(
        self: &Arc<Self>,
        prompt: Prompt,
    ) -> Result<Result<(Prompt, Touched), Status>, Status> {
        if self.rules.prompt.are_none() {
            return Ok(Ok((prompt, Touched::default())));
        }
        let apply = |all: &Self, mut prompt: Prompt| {
            let text_of = |ids: &[u32]| all.text.tokenizer.decode(ids, false);
            if let Prompt::Tokens(ids) = &prompt {
                all.check_ids("prompt", ids)?;
            }
            let applied = all.rules.prompt.apply(&mut prompt, text_of);
            Ok(applied.map(|touched| (prompt, touched)))
        };
        self.with(prompt, apply).await
    }

    /// Renders, tokenises, and shortens where that is wanted; `answer` is the room that is asked for.
    pub(super) async fn read(
        self: &Arc<Self>,
        prompt: Prompt,
        answer: Option<u32>,
    ) -> Result<Read, Status> {
        self.with(prompt, move |all, prompt| {
            let ids = all.ids(&prompt, Framing::Prompt)?;
            let Some(limit) = all.limit(answer) else { return Ok(Read { ids, left_out: 0 }) };
            let (how, prompt_is) = (all.rules.prompt.overflow, Overlong { ids, limit });
            let Fitted { ids, left_out } = match &prompt {
                Prompt::Chat(conversation) => {
                    let ids_of = |shorter: &Conversation| {
                        all.ids(&Prompt::Chat(shorter.clone()), Framing::Prompt)
                    };
                    prompt_is.chat(how, conversation, ids_of)?
                }
                Prompt::Text(_) | Prompt::Tokens(_) => {
                    prompt_is.plain(how, all.text.tokenizer.bos_id())?
                }
            };
            Ok(Read { ids, left_out })
        })
        .await
    }

    /// Most tokens of a prompt, where there is such a rule: the operator's, and if prompts are
    /// shortened, what the context holds beside the answer. That is as long as it asks, or a
    /// quarter of the context, and never counts as more than half of it.
    fn limit(&self, answer: Option<u32>) -> Option<usize> {
        let PromptRules { limit, overflow, .. } = *self.rules.prompt;
        let context = self.card.max_model_len;
        let room = context - answer.unwrap_or(context / 4).clamp(1, (context / 2).max(1));
        let limit = match overflow {
            Overflow::Refuse => limit,
            _ => Some(limit.map_or(room, |limit| limit.min(room))),
        };
        limit.map(|limit| limit.max(1) as usize)
    }

    /// What the answer is read for where there are tools, and the grammar that it follows.
    pub(super) fn plan_calls(
        &self,
        prompt: &Prompt,
        asked: Option<Grammar>,
    ) -> Result<(Option<CallForm>, Option<Grammar>), Status> {
        match (prompt, &self.text.template) {
            (Prompt::Chat(conversation), Ok(template)) => {
                template.plan_calls(conversation, asked, &self.text.tokenizer)
            }
            // Without a template, the conversation is refused anyway.
            _ => Ok((None, asked)),
        }
    }

    /// Compiles a grammar, elsewhere: the first one takes some tenths of a second.
    pub(super) async fn matcher(
        &self,
        grammar: Option<&Grammar>,
    ) -> Result<Option<Matcher>, Status> {
        let Some(grammar) = grammar.cloned() else { return Ok(None) };
        let tokenizer = Arc::clone(&self.text.tokenizer);
        let compiling =
            tokio::task::spawn_blocking(move || tokenizer.grammars()?.compile(&grammar));
        let compiled = compiling.await.map_err(|e| Status::internal(e.to_string()))?;
        compiled.map(Some).map_err(|e| Status::invalid("grammar", e.to_string()))
    }

    pub(super) fn ids(&self, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status> {
        let tokenizer = &self.text.tokenizer;
        let (param, ids) = match (self.prepare(prompt)?, framing) {
            (Prepared::Ids(ids), _) => return Ok(ids),
            (Prepared::Text(param, text), Framing::Prompt) => {
                (param, tokenizer.encode_prompt(&text))
            }
            (Prepared::Text(param, text), Framing::Bare) => (param, tokenizer.encode(&text, true)),
        };
        ids.map_err(|e| Status::invalid(param, e.to_string()))
    }
}
