//! Texts that come with the program: one to calibrate on, one to judge by, and small tasks.
//!
//! The calibration text is the project's own (stories, explanations, part of its handbook) with two
//! excerpts in the public domain (the Declaration of Independence, 1776; Austen, 1813). The held-out
//! documents are others of the project's own, Lincoln's address at Gettysburg (1863) and the beginning
//! of Carroll's "Alice" (1865); no calibration reads them.

/// What models are calibrated on where nothing else is said.
pub const CALIBRATION: &str = include_str!("../data/calibration.txt");
/// What models are judged by where nothing else is said.
pub const HELD_OUT: &str = include_str!("../data/heldout.txt");
/// Sets of tasks by name, all the project's own: see [`crate::tasks`]. `facts`, `words` and `reading` have
/// choices, `sequences` exact answers.
pub const TASKS: [(&str, &str); 4] = [
    ("facts", include_str!("../data/tasks/facts.jsonl")),
    ("words", include_str!("../data/tasks/words.jsonl")),
    ("reading", include_str!("../data/tasks/reading.jsonl")),
    ("sequences", include_str!("../data/tasks/sequences.jsonl")),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn held_out_documents_are_in_no_calibration() {
        // Not even a part of a sentence.
        let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
        let (own, held_out) = (words(CALIBRATION), words(HELD_OUT));
        let seen: HashSet<&[&str]> = own.windows(8).collect();
        assert!(own.len() > 3000 && held_out.len() > 500);
        let shared = held_out.windows(8).find(|part| seen.contains(part));
        assert_eq!(shared, None);
    }
}
