//! Asks one question and prints the answer while it comes: `chat CLIENT.toml QUESTION`.
//!
//! Ctrl-C stops the answer: what is dropped is cancelled at once.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write;
use std::time::Duration;

use millrace_net::client::{Client, ClientConfig};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::chat::ChatMessage;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};

type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let (Some(config), Some(question)) = (words.next(), words.next()) else {
        return Err("usage: chat CLIENT.toml QUESTION".into());
    };
    let client = Client::connect(&ClientConfig::load(config.as_ref())?).await?;
    let turns = vec![
        ChatMessage::new("system", "Answer in one sentence."),
        ChatMessage::new("user", question),
    ];
    let request = GenerateRequest {
        model: String::new(),
        prompt: Prompt::Chat(turns.into()),
        params: SamplingParams { max_tokens: Some(100), ..SamplingParams::greedy() },
        choices: Choices::default(),
    };
    let mut answer = client.with_deadline(Duration::from_secs(60)).generate(request).await?;
    loop {
        let event = tokio::select! {
            event = answer.next() => event,
            _ = tokio::signal::ctrl_c() => break,
        };
        match event.transpose()? {
            Some(GenerateEvent::Started { .. }) => {}
            Some(GenerateEvent::Token { text, .. }) => {
                print!("{text}");
                std::io::stdout().flush()?;
            }
            Some(GenerateEvent::Finished { text, usage, timings, .. }) => {
                println!("{text}");
                eprintln!("{usage:?}\n{timings:?}");
            }
            None => break,
        }
    }
    drop(answer);
    client.close().await;
    Ok(())
}
