//! An answer that outlives the program that asked for it:
//! `resume CLIENT.toml PROMPT` asks and prints the request's name; `resume CLIENT.toml NAME NEXT` hears it
//! from its token NEXT on, 0 first.
//!
//! Within one program nothing of this is needed: a stream whose connection is lost, also by a restart of
//! the coordinator, attaches again by itself, and every event comes once.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use millrace_net::client::{Client, ClientConfig};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};

type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (config, asked) =
        words.split_first().ok_or("usage: resume CLIENT.toml PROMPT|NAME NEXT")?;
    let client = Client::connect(&ClientConfig::load(config.as_ref())?).await?;
    let mut answer = match asked {
        [prompt] => {
            let request = GenerateRequest {
                model: String::new(),
                prompt: Prompt::Text(prompt.clone()),
                params: SamplingParams {
                    max_tokens: Some(200),
                    ignore_eos: true,
                    ..SamplingParams::greedy()
                },
                choices: Choices::default(),
            };
            client.generate(request).await?
        }
        [name, next] => client.attach(name.parse::<RequestId>()?, &[next.parse()?]).await?,
        _ => return Err("usage: resume CLIENT.toml PROMPT|NAME NEXT".into()),
    };
    eprintln!("{}", answer.request_id());
    while let Some(event) = answer.next().await.transpose()? {
        match event {
            GenerateEvent::Started { .. } => {}
            // The index that follows the last one printed is the NEXT to go on with.
            GenerateEvent::Token { index, token_id, text, .. } => {
                println!("{index}\t{token_id}\t{text:?}");
            }
            GenerateEvent::Finished { reason, .. } => eprintln!("{reason:?}"),
        }
    }
    client.close().await;
    Ok(())
}
