//! Questions through the SDK, and what comes back.

use std::time::Duration;

use millrace_net::client::{Client, ClientConfig, GenerateStream};
use millrace_shared::error::Status;
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::{Grammar, SamplingParams};
use millrace_shared::wire::rpc::{
    Choices, ClusterStatus, EmbedRequest, FinishReason, GenerateEvent, GenerateRequest,
    PositionScore, Prompt, ScoreRequest, TokenLogprobs,
};

/// A whole continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The ids.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Log-probabilities of the tokens, where they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// Greedy, exactly this many tokens.
pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ignore_eos: true, ..SamplingParams::greedy() }
}

/// Sampled at temperature 0.8, exactly this many tokens.
pub fn sampled(seed: u64, max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.8, seed: Some(seed), ..greedy(max_tokens) }
}

/// Sampled at temperature 0.8, JSON of a schema that takes more than this many tokens.
pub fn constrained(seed: u64, max_tokens: u32) -> SamplingParams {
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "kind": { "enum": ["story", "report"] },
            "lines": {
                "type": "array",
                "items": { "type": "string", "minLength": 20, "maxLength": 60 },
                "minItems": max_tokens
            }
        },
        "required": ["kind", "lines"],
        "additionalProperties": false
    });
    let grammar = Some(Grammar::JsonSchema(schema.to_string()));
    SamplingParams { grammar, ignore_eos: false, ..sampled(seed, max_tokens) }
}

/// A client of its own connection.
pub async fn connect(config: &ClientConfig) -> Client {
    Client::connect(config).await.expect("the cluster is there")
}

/// Vectors of texts, in order.
///
/// # Errors
/// What the cluster says.
pub async fn embed(
    client: &Client,
    inputs: &[Prompt],
    pooling: Pooling,
) -> Result<Vec<Vec<f32>>, Status> {
    let (model, inputs) = (String::new(), inputs.to_vec());
    let request = EmbedRequest { model, inputs, pooling, dimensions: None };
    Ok(client.embed(request).await?.into_iter().map(|e| e.vector).collect())
}

/// Begins a continuation.
///
/// # Errors
/// What the cluster says.
pub async fn begin(
    client: &Client,
    prompt: Prompt,
    params: SamplingParams,
) -> Result<GenerateStream, Status> {
    let choices = Choices::default();
    client.generate(GenerateRequest { model: String::new(), prompt, params, choices }).await
}

impl Answer {
    /// Nothing yet.
    pub fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            text: String::new(),
            logprobs: Vec::new(),
            reason: FinishReason::Cancelled,
        }
    }

    /// Takes an event; checks that indices have no gaps.
    pub fn take(&mut self, event: GenerateEvent) {
        match event {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { index, token_id, text, logprobs, .. } => {
                assert_eq!(index as usize, self.tokens.len(), "indices follow each other");
                self.logprobs.extend(logprobs);
                self.tokens.push(token_id);
                self.text.push_str(&text);
            }
            GenerateEvent::Finished { reason, text, usage, .. } => {
                assert_eq!(usage.completion_tokens as usize, self.tokens.len());
                self.text.push_str(&text);
                self.reason = reason;
            }
        }
    }
}

/// The rest of a continuation; checks that indices have no gaps.
///
/// # Errors
/// What the cluster says.
pub async fn finish(stream: GenerateStream) -> Result<Answer, Status> {
    finish_from(stream, Answer::empty()).await
}

/// The rest of a continuation whose beginning was taken.
///
/// # Errors
/// What the cluster says.
pub async fn finish_from(mut stream: GenerateStream, begun: Answer) -> Result<Answer, Status> {
    let mut answer = begun;
    while let Some(event) = stream.next().await {
        answer.take(event?);
    }
    Ok(answer)
}

/// All choices of a request, in order; checks that indices have no gaps. `seen` is told each event.
///
/// # Errors
/// What the cluster says.
pub async fn choices(
    client: &Client,
    request: GenerateRequest,
    mut seen: impl FnMut(&GenerateEvent),
) -> Result<Vec<Answer>, Status> {
    let mut stream = client.generate(request).await?;
    let mut answers = Vec::new();
    while let Some(event) = stream.next().await {
        let event = event?;
        seen(&event);
        match &event {
            GenerateEvent::Started { choices, .. } => {
                answers.resize_with(*choices as usize, Answer::empty);
            }
            GenerateEvent::Token { choice, .. } | GenerateEvent::Finished { choice, .. } => {
                answers[*choice as usize].take(event);
            }
        }
    }
    Ok(answers)
}

/// Where answers that should be the same are not, for people.
pub fn difference(is: &[Answer], should: &[Answer]) -> String {
    if is.len() != should.len() {
        return format!("{} choices of {}", is.len(), should.len());
    }
    let pairs = is.iter().zip(should).enumerate().filter(|(_, (a, b))| a != b);
    let told = pairs.map(|(choice, (a, b))| {
        let at = a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b);
        let counts = (a.tokens.len(), b.tokens.len());
        format!(
            "choice {choice}: first token that differs {at:?}, tokens {counts:?}, same text {}, \
             ends {:?} and {:?}",
            a.text == b.text,
            a.reason,
            b.reason
        )
    });
    told.collect::<Vec<_>>().join("; ")
}

/// The first tokens of a continuation.
///
/// # Errors
/// What the cluster says.
pub async fn take_tokens(stream: &mut GenerateStream, tokens: usize) -> Result<Answer, Status> {
    let mut answer = Answer::empty();
    while answer.tokens.len() < tokens {
        answer.take(stream.next().await.expect("more events")?);
    }
    Ok(answer)
}

/// A whole continuation.
///
/// # Errors
/// What the cluster says.
pub async fn generate(
    client: &Client,
    prompt: Prompt,
    params: SamplingParams,
) -> Result<Answer, Status> {
    finish(begin(client, prompt, params).await?).await
}

/// Scores given tokens.
///
/// # Errors
/// What the cluster says.
pub async fn score(
    client: &Client,
    tokens: Vec<u32>,
    top_k: u8,
) -> Result<Vec<PositionScore>, Status> {
    client.score(ScoreRequest { model: String::new(), tokens, top_k }).await
}

/// Waits until nothing runs, nothing waits, and no KV block is in use.
pub async fn idle(client: &Client) -> ClusterStatus {
    until(client, "idle", |s| s.running == 0 && s.waiting == 0 && s.kv_blocks_used == 0).await
}

/// Waits until the cluster is as `wanted` says; the caller bounds the wait.
pub async fn until(
    client: &Client,
    what: &str,
    wanted: impl Fn(&ClusterStatus) -> bool,
) -> ClusterStatus {
    let mut tries = tokio::time::interval(Duration::from_millis(20));
    let looking = async {
        loop {
            tries.tick().await;
            match client.status().await {
                Ok(status) if wanted(&status) => return status,
                _ => {}
            }
        }
    };
    let found = tokio::time::timeout(crate::DEADLINE, looking).await;
    match found {
        Ok(status) => status,
        Err(_) => panic!("the cluster is not {what}: {:?}", client.status().await),
    }
}
