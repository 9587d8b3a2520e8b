//! `millrace embed`: texts to vectors.

use std::io::{IsTerminal, stdin};
use std::path::Path;

use anyhow::Context;
use clap::Args;
use millrace_shared::pooling::Pooling;
use millrace_shared::wire::rpc::{EmbedRequest, Embedded, MAX_EMBED_INPUTS, Prompt};
use serde::Serialize;

use crate::error::usage;
use crate::input;
use crate::output::{self, TextOrJson};
use crate::target::{Needs, Session, TargetArgs};

/// Flags of `embed`.
#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    /// Texts to make vectors of; without any, each line of stdin is one
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// mean of all of a text's final hidden states, or that of its last token
    #[arg(long, value_name = "POOLING", default_value = "mean")]
    pooling: Pooling,
    /// Only the first N numbers of each vector, made as long as 1 again [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    dimensions: Option<u32>,
    /// text prints one vector per line; json prints {"embeddings":[{"prompt_tokens","vector"}]}
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
    #[command(flatten)]
    target: TargetArgs,
}

impl EmbedArgs {
    fn read(&self) -> anyhow::Result<Vec<String>> {
        if !self.texts.is_empty() {
            return Ok(self.texts.clone());
        }
        let nothing = || usage("there is nothing to embed: give texts, or lines on stdin");
        if stdin().is_terminal() {
            return Err(nothing());
        }
        let lines: Vec<String> = input::text(Path::new("-"))?.lines().map(str::to_owned).collect();
        match lines.iter().position(String::is_empty) {
            _ if lines.is_empty() => Err(nothing()),
            None => Ok(lines),
            Some(empty) => {
                let message = "is empty: each line is a text, and a text has at least one token";
                Err(usage(format!("line {} of stdin {message}", empty + 1)))
            }
        }
    }
}

/// What `--output json` prints.
#[derive(Debug, Serialize)]
struct Answer {
    embeddings: Vec<Vector>,
}

/// The vector of one text.
#[derive(Debug, Serialize)]
struct Vector {
    prompt_tokens: u32,
    vector: Vec<f32>,
}

impl Vector {
    fn line(&self) -> String {
        let numbers: Vec<String> = self.vector.iter().map(f32::to_string).collect();
        numbers.join(" ") + "\n"
    }
}

pub(crate) async fn run(args: EmbedArgs) -> anyhow::Result<()> {
    let texts = args.read()?;
    crate::target::with_session(&args.target, Needs::one_request(), async |session| {
        embed(session, &texts, &args).await
    })
    .await
}

async fn embed(session: &Session, texts: &[String], args: &EmbedArgs) -> anyhow::Result<()> {
    let mut embeddings = Vec::with_capacity(texts.len());
    for (number, some) in texts.chunks(MAX_EMBED_INPUTS).enumerate() {
        let request = EmbedRequest {
            model: String::new(),
            inputs: some.iter().cloned().map(Prompt::Text).collect(),
            pooling: args.pooling,
            dimensions: args.dimensions,
        };
        let found = session.embed(request).await;
        // Messages count from the first text of a request.
        let found = match number {
            0 => found?,
            n => {
                found.with_context(|| format!("after the first {} texts", n * MAX_EMBED_INPUTS))?
            }
        };
        let vector = |Embedded { prompt_tokens, vector }| Vector { prompt_tokens, vector };
        embeddings.extend(found.into_iter().map(vector));
    }
    match args.output {
        TextOrJson::Text => output::write(embeddings.iter().map(Vector::line).collect::<String>()),
        TextOrJson::Json => output::json(&Answer { embeddings }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_the_contract() {
        let vector = Vector { prompt_tokens: 2, vector: vec![0.6, -0.8, 0.0] };
        assert_eq!(vector.line(), "0.6 -0.8 0\n");
        let answer = Answer { embeddings: vec![vector] };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"embeddings":[{"prompt_tokens":2,"vector":[0.6,-0.8,0.0]}]}"#
        );
    }
}
