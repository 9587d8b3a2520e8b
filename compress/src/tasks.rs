//! Tasks in JSONL: a choice by likelihood, or an exact answer.
//!
//! A line is `{"prompt": .., "choices": [..], "answer": 0}`: right if the choice of that number has
//! the greatest mean log-probability of its tokens. Or `{"prompt": .., "answer": " text"}`: right if the
//! greedy continuation begins with that text, white space before it aside.

use serde::{Deserialize, Serialize};

use crate::CompressError;
use crate::judge::Judge;

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// What comes before.
    pub prompt: String,
    /// What may follow.
    #[serde(default)]
    pub choices: Vec<String>,
    /// What should.
    pub answer: Answer,
}

/// What is right.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// A choice, from 0.
    Choice(usize),
    /// A text.
    Exact(String),
}

/// How many were right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Right.
    pub right: usize,
    /// All.
    pub of: usize,
}

/// Reads a file of tasks.
///
/// # Errors
/// Names the line that cannot be.
pub fn parse(text: &str) -> Result<Vec<Task>, CompressError> {
    let mut tasks = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let bad = |what: String| CompressError::Settings(format!("task in line {}: {what}", i + 1));
        let task: Task = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        match &task.answer {
            Answer::Choice(n) if *n >= task.choices.len() => {
                return Err(bad(format!("there is no choice {n}: choices count from 0")));
            }
            Answer::Exact(_) if !task.choices.is_empty() => {
                return Err(bad("with choices, the answer is the number of one".to_owned()));
            }
            Answer::Exact(text) if text.is_empty() => {
                return Err(bad("the answer is empty".to_owned()));
            }
            _ => tasks.push(task),
        }
    }
    if tasks.is_empty() {
        return Err(CompressError::settings("the file has no task"));
    }
    Ok(tasks)
}

/// How texts become tokens, and tokens text.
pub struct Codec<'a> {
    /// Token ids of a prompt, with what the model's prompts begin with.
    pub prompt: &'a dyn Fn(&str) -> Result<Vec<u32>, CompressError>,
    /// Token ids of what follows it.
    pub encode: &'a dyn Fn(&str) -> Result<Vec<u32>, CompressError>,
    /// Text of token ids.
    pub decode: &'a dyn Fn(&[u32]) -> String,
}

/// Tries all tasks.
///
/// # Errors
/// If a task does not fit the model's window, or the model fails.
pub fn run(judge: &mut Judge, tasks: &[Task], codec: &Codec<'_>) -> Result<Score, CompressError> {
    let mut score = Score { right: 0, of: tasks.len() };
    for task in tasks {
        let prompt = (codec.prompt)(&task.prompt)?;
        let right = match &task.answer {
            Answer::Exact(text) => continues(judge, &prompt, text, codec)?,
            Answer::Choice(answer) => choice(judge, &prompt, &task.choices, codec)? == *answer,
        };
        score.right += usize::from(right);
    }
    Ok(score)
}

/// Whether the greedy continuation begins with a text, however it is cut into tokens.
fn continues(
    judge: &mut Judge,
    prompt: &[u32],
    text: &str,
    codec: &Codec<'_>,
) -> Result<bool, CompressError> {
    let wanted = text.trim_start();
    // A token has a byte at least, but for few; white space may come first.
    let most = wanted.len() + 2;
    let said = |ids: &[u32]| (codec.decode)(ids).trim_start().to_owned();
    let answer = judge.greedy(prompt, most, &|ids| said(ids).len() >= wanted.len())?;
    Ok(said(&answer).starts_with(wanted))
}

/// The place of the choice with the greatest mean log-probability of its tokens.
fn choice(
    judge: &mut Judge,
    prompt: &[u32],
    choices: &[String],
    codec: &Codec<'_>,
) -> Result<usize, CompressError> {
    let mut best = (f64::INFINITY, 0);
    for (i, choice) in choices.iter().enumerate() {
        let choice = (codec.encode)(choice)?;
        let tokens = [prompt, &choice].concat();
        let nll = judge.continuation(&tokens, prompt.len())? / choice.len().max(1) as f64;
        if nll < best.0 {
            best = (nll, i);
        }
    }
    Ok(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tasks_that_come_along_are_sound() {
        for (name, text) in crate::texts::TASKS {
            let tasks = parse(text).unwrap();
            assert!(tasks.len() >= 12, "{name}");
            let mut prompts: Vec<&str> = tasks.iter().map(|t| &*t.prompt).collect();
            prompts.sort_unstable();
            prompts.dedup();
            assert_eq!(prompts.len(), tasks.len(), "{name}");
            // Who always takes the same place has not half of them right.
            for place in 0..4 {
                let there = tasks.iter().filter(|t| t.answer == Answer::Choice(place)).count();
                assert!(there * 2 <= tasks.len(), "{name}: {place}");
            }
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let good = r#"{"prompt": "a", "choices": ["b"], "answer": 0}"#;
        for (bad, named) in [
            (r#"{"prompt": "a", "choices": ["b"], "answer": 1}"#, "no choice 1"),
            (r#"{"prompt": "a", "choices": ["b"], "answer": "b"}"#, "number"),
            (r#"{"prompt": "a", "anwser": "b"}"#, "anwser"),
            (r#"{"prompt": "a", "answer": ""}"#, "empty"),
        ] {
            let error = parse(&format!("{good}\n\n{bad}")).unwrap_err().to_string();
            assert!(error.contains("line 3") && error.contains(named), "{error}");
        }
        assert!(parse("\n").is_err());
    }
}
