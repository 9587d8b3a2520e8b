//! The reference values in `tests/testdata`, and the rule by which an engine is held to them.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use millrace_shared::wire::rpc::PositionScore;

/// A margin at which the arg-max of an engine with quantised activations is certain.
pub const CERTAIN: f32 = 0.6;
/// Farthest that one logit may be from the reference.
const LOGIT_LIMIT: f32 = 0.45;
/// Farthest that logits may be on average over all cases.
const LOGIT_MEAN_LIMIT: f32 = 0.1;
/// Farthest that a logit of f32 may be from the reference.
const EXACT_LIMIT: f32 = 1e-3;
/// Farthest that a mean likelihood may be, in nats.
const NLL_LIMIT: f32 = 0.015;
/// Logits to ask for, so that the reference's best ten are among them.
pub const TOP: u8 = 64;

/// A text and its ids.
#[derive(Debug, Deserialize)]
pub struct Tokens {
    /// Special tokens are parsed, none are added.
    pub text: String,
    /// As the model's own tokenizer has them.
    pub ids: Vec<u32>,
}

/// One prompt and what an exact forward pass makes of it.
#[derive(Debug, Deserialize)]
pub struct Reference {
    /// For messages.
    pub name: String,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// The largest logits after the prompt.
    pub top_logits: Vec<(u32, f32)>,
    /// The greedy continuation; end-of-text does not stop it.
    pub greedy: Vec<u32>,
    /// First minus second logit at each step of it.
    pub greedy_margin: Vec<f32>,
    /// Nats per token over prompt tokens 1.., given what is before them.
    pub mean_nll: Option<f32>,
}

impl Reference {
    /// Prompt and continuation.
    pub fn forced(&self) -> Vec<u32> {
        [&self.token_ids[..], &self.greedy].concat()
    }

    /// Steps of the continuation before the first uncertain one.
    pub fn certain_steps(&self) -> usize {
        let uncertain = self.greedy_margin.iter().position(|&m| m < CERTAIN);
        uncertain.unwrap_or(self.greedy.len())
    }
}

/// Tokenizer fixtures.
pub fn tokens() -> Vec<Tokens> {
    load("smollm2-tokens.json")
}

/// Forward-pass fixtures.
pub fn references() -> Vec<Reference> {
    load("smollm2-reference.json")
}

fn load<T: DeserializeOwned>(name: &str) -> T {
    let path = format!("{}/tests/testdata/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Holds the scores of every case's [`Reference::forced`] tokens to the rule; `who` was scored.
pub fn check(who: &str, cases: &[Reference], scores: &[Vec<PositionScore>]) {
    let mut deviations = Vec::new();
    for (case, scores) in cases.iter().zip(scores) {
        let at = format!("{who}, {}", case.name);
        assert_eq!(scores.len(), case.token_ids.len() + case.greedy.len(), "{at}");
        let last = case.token_ids.len() - 1;
        check_arg_max(&at, case, &scores[last..]);
        deviations.extend(check_logits(&at, case, &scores[last]));
        if let Some(expected) = case.mean_nll {
            let nll: f32 = scores[..last].iter().map(|s| -s.next_logprob.expect("scored")).sum();
            let nll = nll / last as f32;
            assert!((nll - expected).abs() <= NLL_LIMIT, "{at}: mean nll {nll}, not {expected}");
        }
    }
    let mean = deviations.iter().sum::<f32>() / deviations.len() as f32;
    let worst = deviations.iter().copied().fold(0.0, f32::max);
    eprintln!("{who}: logits deviate by {mean:.4} on average, {worst:.4} at most");
    assert!(mean <= LOGIT_MEAN_LIMIT, "{who}: logits deviate by {mean} on average");
}

/// Holds them to the rule for engines that compute in f32: every logit, and every step.
pub fn check_exact(who: &str, cases: &[Reference], scores: &[Vec<PositionScore>]) {
    let mut worst = 0f32;
    for (case, scores) in cases.iter().zip(scores) {
        let at = format!("{who}, {}", case.name);
        let last = case.token_ids.len() - 1;
        for (step, (expected, score)) in case.greedy.iter().zip(&scores[last..]).enumerate() {
            assert_eq!(score.top_logits[0].0, *expected, "{at}, step {step}");
        }
        for (id, expected) in &case.top_logits {
            let own = scores[last].top_logits.iter().find(|(own, _)| own == id);
            let own = own.unwrap_or_else(|| panic!("{at}: {id} is not among the best {TOP}")).1;
            worst = worst.max((own - expected).abs());
        }
    }
    eprintln!("{who}: logits deviate by {worst:.6} at most");
    assert!(worst <= EXACT_LIMIT, "{who}: a logit deviates by {worst}");
}

fn check_arg_max(at: &str, case: &Reference, scores: &[PositionScore]) {
    let steps = case.greedy.iter().zip(&case.greedy_margin).zip(scores);
    for (step, ((expected, margin), score)) in steps.enumerate() {
        if *margin >= CERTAIN {
            assert_eq!(score.top_logits[0].0, *expected, "{at}, step {step}, margin {margin}");
        }
    }
}

/// Deviations of the reference's logits, the common offset removed.
fn check_logits(at: &str, case: &Reference, score: &PositionScore) -> Vec<f32> {
    let difference = |&(id, expected): &(u32, f32)| {
        let own = score.top_logits.iter().find(|(own, _)| *own == id);
        own.unwrap_or_else(|| panic!("{at}: token {id} is not among the best {TOP}")).1 - expected
    };
    let differences: Vec<f32> = case.top_logits.iter().map(difference).collect();
    let offset = differences.iter().sum::<f32>() / differences.len() as f32;
    let deviations: Vec<f32> = differences.iter().map(|d| (d - offset).abs()).collect();
    for (deviation, (id, _)) in deviations.iter().zip(&case.top_logits) {
        assert!(*deviation <= LOGIT_LIMIT, "{at}: the logit of {id} deviates by {deviation}");
    }
    deviations
}
