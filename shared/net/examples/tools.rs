//! A function of this program that the model calls: `tools CLIENT.toml`.
//!
//! The first answer must be a call, which a grammar sees to; its result goes back as a turn of the role
//! `tool`, and the second answer is text.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use millrace_net::client::{Client, ClientConfig};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::chat::{ChatMessage, Conversation, ToolCall, ToolChoice};
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Asks, and puts the pieces of calls together.
async fn ask(client: &Client, chat: &Conversation) -> Result<(String, Vec<ToolCall>), Failure> {
    let request = GenerateRequest {
        model: String::new(),
        prompt: Prompt::Chat(chat.clone()),
        params: SamplingParams { max_tokens: Some(100), ..SamplingParams::greedy() },
        choices: Choices::default(),
    };
    let (mut said, mut called) = (String::new(), Vec::<ToolCall>::new());
    let mut answer = client.generate(request).await?;
    while let Some(event) = answer.next().await.transpose()? {
        let (text, calls) = match event {
            GenerateEvent::Token { text, calls, .. }
            | GenerateEvent::Finished { text, calls, .. } => (text, calls),
            GenerateEvent::Started { .. } => continue,
        };
        said.push_str(&text);
        for piece in calls {
            called.resize_with((piece.call as usize + 1).max(called.len()), ToolCall::default);
            let call = &mut called[piece.call as usize];
            call.id.push_str(&piece.id);
            call.name.push_str(&piece.name);
            call.arguments.push_str(&piece.arguments);
        }
    }
    Ok((said, called))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let config = std::env::args().nth(1).ok_or("usage: tools CLIENT.toml")?;
    let client = Client::connect(&ClientConfig::load(config.as_ref())?).await?;
    let weather = json!({
        "name": "weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": { "city": { "enum": ["Paris", "Rome", "Oslo"] } },
            "required": ["city"], "additionalProperties": false
        }
    });
    let mut chat = Conversation {
        messages: vec![ChatMessage::new("user", "What is the weather in Paris?")],
        tools: vec![weather.to_string()],
        tool_choice: ToolChoice::Required,
        single_call: true,
    };
    let (_, calls) = ask(&client, &chat).await?;
    let call = calls.first().ok_or("no call")?.clone();
    let arguments: Value = serde_json::from_str(&call.arguments)?;
    println!("{}({arguments})", call.name);

    let result = json!({ "city": arguments["city"], "celsius": 21, "sky": "clear" });
    chat.messages
        .push(ChatMessage { tool_calls: vec![call.clone()], ..ChatMessage::new("assistant", "") });
    let answer = ChatMessage::new("tool", result.to_string());
    chat.messages.push(ChatMessage { tool_call_id: Some(call.id), ..answer });
    chat.tool_choice = ToolChoice::None;
    let (said, _) = ask(&client, &chat).await?;
    println!("{said}");
    client.close().await;
    Ok(())
}
