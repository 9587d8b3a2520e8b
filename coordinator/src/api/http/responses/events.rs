//! A response as it grows: its output items, and the events that tell of them.
//!
//! A function of the request's note and its events from the first on, which are one of the token
//! log: every reading gives the same events with the same `sequence_number`, so that whoever comes
//! back is told what follows the last number that it saw.

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent, ToolCall, Usage};
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use crate::text::tools::Piece;

/// Something that an answer is made of.
#[derive(Clone, Debug)]
enum Item {
    Message(String),
    Call(ToolCall),
}

/// How the answer stands.
#[derive(Clone, Debug, PartialEq)]
enum Standing {
    Going,
    Ended(FinishReason),
    Failed { code: &'static str, message: String },
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Growing {
    id: RequestId,
    /// Seconds since 1970.
    created: u64,
    model: String,
    said: Map<String, Value>,
    items: Vec<Item>,
    /// Whether the last item may go on.
    open: bool,
    standing: Standing,
    usage: Option<Usage>,
    /// Number of the next event.
    sequence: u64,
    /// Events up to this one are not told.
    after: Option<u64>,
    out: String,
}

/// The name of a response.
pub(super) fn name_of(id: RequestId) -> String {
    format!("resp_{}", id.0.simple())
}

impl Growing {
    /// Before the first event; those up to `after` are not told.
    pub(super) fn new(
        id: RequestId,
        created: u64,
        model: String,
        said: Map<String, Value>,
        after: Option<u64>,
    ) -> Self {
        Self {
            id,
            created,
            model,
            said,
            items: Vec::new(),
            open: false,
            standing: Standing::Going,
            usage: None,
            sequence: 0,
            after,
            out: String::new(),
        }
    }

    /// Whether nothing more comes.
    pub(super) fn is_over(&self) -> bool {
        self.standing != Standing::Going
    }

    /// What is to be sent of the events so far.
    pub(super) fn take_out(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    /// What was said, and what was called.
    pub(super) fn said(self) -> (String, Vec<ToolCall>) {
        let (mut text, mut calls) = (String::new(), Vec::new());
        for item in self.items {
            match item {
                Item::Message(more) => text.push_str(&more),
                Item::Call(call) => calls.push(call),
            }
        }
        (text, calls)
    }

    /// Takes what happened.
    pub(super) fn take(&mut self, event: Result<GenerateEvent, Status>) {
        match event {
            Ok(GenerateEvent::Started { .. }) => {
                for kind in ["response.created", "response.in_progress"] {
                    let response = self.response();
                    self.emit(kind, json!({ "response": response }));
                }
            }
            Ok(GenerateEvent::Token { text, calls, .. }) => self.grow(Piece { text, calls }),
            Ok(GenerateEvent::Finished { reason, text, calls, usage, .. }) => {
                self.grow(Piece { text, calls });
                if self.items.is_empty() && reason != FinishReason::Cancelled {
                    self.begin(Item::Message(String::new()));
                }
                self.standing = Standing::Ended(reason);
                self.usage = Some(usage);
                self.close();
                self.end(match reason {
                    FinishReason::Stop | FinishReason::ToolCalls => "response.completed",
                    FinishReason::Length
                    | FinishReason::Cancelled
                    | FinishReason::ContentFilter => "response.incomplete",
                });
            }
            Err(status) => {
                let error = ApiError::from(status);
                let (code, message) = (error.stable_code(), error.message().to_owned());
                self.standing = Standing::Failed { code, message };
                self.open = false;
                self.end("response.failed");
            }
        }
    }

    fn end(&mut self, kind: &str) {
        let response = self.response();
        self.emit(kind, json!({ "response": response }));
    }

    fn grow(&mut self, piece: Piece) {
        if !piece.text.is_empty() {
            if !(self.open && matches!(self.items.last(), Some(Item::Message(_)))) {
                self.begin(Item::Message(String::new()));
            }
            self.say(&piece.text);
        }
        for call in piece.calls {
            if !call.id.is_empty() {
                let (id, name) = (call.id, call.name);
                self.begin(Item::Call(ToolCall { id, name, arguments: String::new() }));
            }
            if let Some(Item::Call(of)) =
                self.items.last_mut().filter(|_| !call.arguments.is_empty())
            {
                of.arguments.push_str(&call.arguments);
                let at = self.place();
                let more = json!({"delta": call.arguments});
                self.emit("response.function_call_arguments.delta", with(at, more));
            }
        }
    }

    fn say(&mut self, more: &str) {
        if let Some(Item::Message(text)) = self.items.last_mut() {
            text.push_str(more);
        }
        let delta = json!({"content_index": 0, "delta": more, "logprobs": []});
        let at = self.place();
        self.emit("response.output_text.delta", with(at, delta));
    }

    /// Where the last item is.
    fn place(&self) -> Value {
        let index = self.items.len().saturating_sub(1);
        json!({"item_id": self.item_id(index), "output_index": index})
    }

    fn begin(&mut self, item: Item) {
        self.close();
        let is_message = matches!(item, Item::Message(_));
        self.items.push(item);
        self.open = true;
        let index = self.items.len() - 1;
        let mut item = self.item(index, "in_progress");
        if is_message {
            item["content"] = json!([]);
        }
        self.emit("response.output_item.added", json!({"output_index": index, "item": item}));
        if is_message {
            let part = json!({"content_index": 0, "part": part("")});
            let at = self.place();
            self.emit("response.content_part.added", with(at, part));
        }
    }

    /// The last item is complete.
    fn close(&mut self) {
        if !std::mem::replace(&mut self.open, false) {
            return;
        }
        let index = self.items.len() - 1;
        let at = self.place();
        match self.items[index].clone() {
            Item::Message(text) => {
                let done = json!({"content_index": 0, "text": text, "logprobs": []});
                self.emit("response.output_text.done", with(at.clone(), done));
                let part = json!({"content_index": 0, "part": part(&text)});
                self.emit("response.content_part.done", with(at, part));
            }
            Item::Call(call) => {
                let done = json!({"name": call.name, "arguments": call.arguments});
                self.emit("response.function_call_arguments.done", with(at, done));
            }
        }
        let item = self.item(index, self.item_status());
        self.emit("response.output_item.done", json!({"output_index": index, "item": item}));
    }

    fn item_status(&self) -> &'static str {
        match self.standing {
            Standing::Going | Standing::Ended(FinishReason::Stop | FinishReason::ToolCalls) => {
                "completed"
            }
            Standing::Ended(_) | Standing::Failed { .. } => "incomplete",
        }
    }

    fn item_id(&self, index: usize) -> String {
        let kind = match self.items.get(index) {
            Some(Item::Call(_)) => "fc",
            Some(Item::Message(_)) | None => "msg",
        };
        format!("{kind}_{}{index:02x}", self.id.0.simple())
    }

    fn item(&self, index: usize, status: &str) -> Value {
        let id = self.item_id(index);
        match &self.items[index] {
            Item::Message(text) => json!({
                "id": id, "type": "message", "status": status, "role": "assistant",
                "content": [part(text)],
            }),
            Item::Call(call) => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call.id,
                "name": call.name, "arguments": call.arguments,
            }),
        }
    }

    /// The response as it stands.
    pub(super) fn response(&self) -> Value {
        let (status, error, incomplete) = match &self.standing {
            Standing::Going => ("in_progress", Value::Null, Value::Null),
            Standing::Ended(FinishReason::Stop | FinishReason::ToolCalls) => {
                ("completed", Value::Null, Value::Null)
            }
            Standing::Ended(FinishReason::Length) => {
                ("incomplete", Value::Null, json!({"reason": "max_output_tokens"}))
            }
            Standing::Ended(FinishReason::ContentFilter) => {
                ("incomplete", Value::Null, json!({"reason": "content_filter"}))
            }
            Standing::Ended(FinishReason::Cancelled) => ("cancelled", Value::Null, Value::Null),
            Standing::Failed { code, message } => {
                ("failed", json!({"code": code, "message": message}), Value::Null)
            }
        };
        let last = self.items.len().saturating_sub(1);
        let status_of = |index| match self.standing {
            Standing::Going if self.open && index == last => "in_progress",
            _ if index < last => "completed",
            _ => self.item_status(),
        };
        let output: Vec<Value> =
            (0..self.items.len()).map(|index| self.item(index, status_of(index))).collect();
        let mut response = json!({
            "id": name_of(self.id),
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": output,
            "usage": self.usage.map(usage),
        });
        if let Some(fields) = response.as_object_mut() {
            fields.extend(self.said.clone());
        }
        response
    }

    fn emit(&mut self, kind: &str, mut event: Value) {
        let number = self.sequence;
        self.sequence += 1;
        if self.after.is_some_and(|after| number <= after) {
            return;
        }
        event["type"] = json!(kind);
        event["sequence_number"] = json!(number);
        // JSON has no raw line breaks, so one line holds it.
        self.out.push_str(&format!("event: {kind}\ndata: {event}\n\n"));
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn with(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
    })
}
