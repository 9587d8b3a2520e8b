//! Renders conversations with chat templates as a server does: for `benches/peers/templates.py`.
//!
//! stdin: `[{"template", "bos", "eos", "messages", "tools", "add_generation_prompt"}]`, messages and
//! tools as OpenAI's API has them (contents are text, arguments JSON). stdout, in order:
//! `[{"text"} | {"error"}]`.

use std::error::Error;
use std::io;

use millrace_coordinator::text::ChatTemplate;
use millrace_shared::wire::rpc::{ChatMessage, Conversation, ToolCall};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    template: String,
    bos: String,
    eos: String,
    messages: Vec<Message>,
    tools: Vec<Tool>,
    add_generation_prompt: bool,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
    #[serde(default)]
    tool_calls: Vec<Call>,
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
struct Call {
    id: String,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    arguments: Value,
}

#[derive(Deserialize)]
struct Tool {
    function: Value,
}

impl From<Message> for ChatMessage {
    fn from(message: Message) -> Self {
        let Message { role, content, tool_calls, tool_call_id } = message;
        let call = |Call { id, function: Function { name, arguments } }| ToolCall {
            id,
            name,
            arguments: arguments.to_string(),
        };
        Self { role, content, tool_calls: tool_calls.into_iter().map(call).collect(), tool_call_id }
    }
}

fn rendered(case: Case) -> Result<String, Box<dyn Error>> {
    let template = ChatTemplate::new(&case.template, case.bos, case.eos)?;
    let conversation = Conversation {
        messages: case.messages.into_iter().map(Into::into).collect(),
        tools: case.tools.iter().map(|tool| tool.function.to_string()).collect(),
        ..Conversation::default()
    };
    Ok(template.render(&conversation, case.add_generation_prompt)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let cases: Vec<Case> = serde_json::from_reader(io::stdin().lock())?;
    let told = |case| match rendered(case) {
        Ok(text) => json!({ "text": text }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    let all: Vec<Value> = cases.into_iter().map(told).collect();
    serde_json::to_writer(io::stdout().lock(), &all)?;
    Ok(())
}
