//! Which of several texts is nearest to the first one: `embed CLIENT.toml TEXT TEXT...`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use millrace_net::client::{Client, ClientConfig};
use millrace_shared::pooling::Pooling;
use millrace_shared::wire::rpc::{EmbedRequest, Prompt};

type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let config = words.next().ok_or("usage: embed CLIENT.toml TEXT TEXT...")?;
    let texts: Vec<String> = words.collect();
    let client = Client::connect(&ClientConfig::load(config.as_ref())?).await?;
    let inputs = texts.iter().cloned().map(Prompt::Text).collect();
    let request =
        EmbedRequest { model: String::new(), inputs, pooling: Pooling::Mean, dimensions: None };
    let vectors = client.embed(request).await?;
    let first = vectors.first().ok_or("usage: embed CLIENT.toml TEXT TEXT...")?;
    for (text, other) in texts.iter().zip(&vectors).skip(1) {
        // Vectors are as long as 1, so that this is the cosine of the angle between them.
        let cosine: f32 = first.vector.iter().zip(&other.vector).map(|(a, b)| a * b).sum();
        println!("{cosine:.4}\t{text}");
    }
    client.close().await;
    Ok(())
}
