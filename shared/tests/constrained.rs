//! Constrained sequences: the token after every position waits for a mask, so nothing is guessed.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use millrace_shared::id::SequenceId;
use millrace_shared::scheduler::{Kind, NewSequence, Outcome, Policy, Scheduler, SchedulerConfig};
use millrace_shared::wire::data::{ChosenToken, Row, RowOutcome, Want};

/// What a model that says the same thing for ever answers.
fn answer(row: &Row) -> RowOutcome {
    match row.want {
        Want::Sample => RowOutcome::Token { token: 7, logprobs: None },
        Want::Verify | Want::Follow => {
            let tokens = usize::from(row.want == Want::Verify) + row.drafts();
            let chosen = ChosenToken { token: 7, logprobs: None };
            RowOutcome::Tokens(vec![chosen; tokens])
        }
        Want::None | Want::Score { .. } | Want::Sum | Want::Embed { .. } => RowOutcome::Done,
    }
}

/// Runs one sequence; the wants of its rows, and how many tokens it got.
fn run(kind: Kind) -> (Vec<Want>, u32) {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 64,
        block_size: 16,
        max_num_seqs: 4,
        max_waiting: 4,
        max_in_flight: 4,
        prefill_chunk: 32,
        max_batch_tokens: 64,
        max_model_len: 256,
        policy: Policy::DEFAULT,
    });
    let new = NewSequence {
        id: SequenceId(1),
        prompt: vec![7; 20],
        max_new_tokens: 60,
        kind,
        submitted: Duration::ZERO,
        deadline: None,
        client: 0,
        priority: Default::default(),
    };
    scheduler.handle_submit(new).unwrap();
    let (mut wants, mut tokens) = (Vec::new(), 0);
    for tick in 0..200 {
        let now = Duration::from_millis(tick);
        let steps: Vec<_> = std::iter::from_fn(|| scheduler.poll_step(now)).collect();
        for step in steps {
            wants.extend(step.meta.rows.iter().map(|row| row.want));
            let rows: Vec<_> = step.meta.rows.iter().map(|row| row.result(answer(row))).collect();
            let outcomes = scheduler.handle_result(step.id, &rows, now);
            let is_token = |o: &&Outcome| matches!(o, Outcome::Token { .. });
            tokens += outcomes.iter().filter(is_token).count() as u32;
        }
    }
    (wants, tokens)
}

#[test]
fn nothing_is_guessed() {
    let guesses =
        |wants: &[Want]| wants.iter().filter(|w| matches!(w, Want::Verify | Want::Follow)).count();
    let (wants, tokens) = run(Kind::Generate);
    assert!(guesses(&wants) > 0 && tokens == 60, "{tokens} tokens by {wants:?}");
    let (wants, tokens) = run(Kind::Constrained);
    assert_eq!((guesses(&wants), tokens), (0, 60), "{wants:?}");
    assert_eq!(wants.iter().filter(|w| **w == Want::Sample).count(), 60);
}
