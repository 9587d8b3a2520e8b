//! Tasks in JSONL: a choice by likelihood, or an exact answer.
//!
//! A line is `{"prompt": .., "choices": [..], "answer": 0}`: right if the choice of that number has
//! the greatest mean log-probability of its tokens. Or `{"prompt": .., "answer": " text"}`: right if the
//! greedy continuation begins with that text.

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

/// Tries all tasks. `encode` gives a text's token ids.
///
/// # Errors
/// If a task does not fit the model's window, or the model fails.
pub fn run(
    judge: &mut Judge,
    tasks: &[Task],
    encode: &dyn Fn(&str) -> Result<Vec<u32>, CompressError>,
) -> Result<Score, CompressError> {
    let mut score = Score { right: 0, of: tasks.len() };
    for task in tasks {
        let prompt = encode(&task.prompt)?;
        let right = match &task.answer {
            Answer::Exact(text) => {
                let wanted = encode(text)?;
                judge.greedy(&prompt, wanted.len(), &|_| false)? == wanted
            }
            Answer::Choice(answer) => {
                let mut best = (f64::INFINITY, 0);
                for (i, choice) in task.choices.iter().enumerate() {
                    let choice = encode(choice)?;
                    let tokens = [&prompt[..], &choice].concat();
                    let nll =
                        judge.continuation(&tokens, prompt.len())? / choice.len().max(1) as f64;
                    if nll < best.0 {
                        best = (nll, i);
                    }
                }
                best.1 == *answer
            }
        };
        score.right += usize::from(right);
    }
    Ok(score)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tasks_that_come_along_are_sound() {
        assert_eq!(parse(crate::texts::TASKS).unwrap().len(), 20);
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
