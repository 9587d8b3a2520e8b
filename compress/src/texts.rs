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
/// Tasks, one in a line: see [`crate::tasks`].
pub const TASKS: &str = include_str!("../data/tasks.jsonl");
