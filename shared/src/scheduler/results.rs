//! Results: what became of the rows of a micro-batch, and what they took.

use std::time::Duration;

use super::Scheduler;
use super::pipeline::IssuedRow;
use super::types::Outcome;
use crate::id::{MicroBatchId, SequenceId};
use crate::wire::MAX_VOID_ROWS;
use crate::wire::control::VoidRows;
use crate::wire::data::{ChosenToken, Failure, RowOutcome, RowResult, StageTime, Want};
use crate::wire::rpc::TokenLogprobs;

fn is_of_one(rows: &[IssuedRow]) -> bool {
    rows.windows(2).all(|pair| pair[0].sequence == pair[1].sequence)
}

/// Says of what failed whether it was alone.
fn note_alone(outcomes: &mut [Outcome], was_alone: bool) {
    for outcome in outcomes {
        if let Outcome::Failed { alone, .. } = outcome {
            *alone = was_alone;
        }
    }
}

impl Scheduler {
    /// Seconds that a micro-batch in flight should take in each stage; empty where nothing is known.
    pub fn predicted_seconds(&self, id: MicroBatchId) -> Vec<f64> {
        let Some((_, load)) = self.in_flight.load(id).filter(|_| self.cost.is_ready()) else {
            return Vec::new();
        };
        self.cost.stages().iter().map(|c| c.predict(&load)).collect()
    }

    /// What each stage spent on a micro-batch, in the order of the stages. To be told before
    /// [`Self::handle_result`], or not at all: the scheduler then goes by counts alone. Whether they
    /// say something: of rows that are void nobody knows which stages computed them.
    pub fn handle_times(&mut self, id: MicroBatchId, times: &[StageTime], now: Duration) -> bool {
        let Some((issued, load)) = self.in_flight.load(id).filter(|_| !times.is_empty()) else {
            return false;
        };
        if !self.in_flight.rows(id).iter().all(|row| self.is_live(row)) {
            return false;
        }
        self.window.observe(times, now.saturating_sub(issued));
        self.cost.observe(&load, times.iter().map(|t| t.step().as_secs_f64()));
        true
    }

    /// The last stage answered a micro-batch. Rows of sequences that ended or were preempted since
    /// are dropped and counted, answered or not; others that were not answered fail their sequence.
    pub fn handle_result(
        &mut self,
        id: MicroBatchId,
        results: &[RowResult],
        now: Duration,
    ) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let Some((issued, rows)) = self.in_flight.take(id) else {
            self.stale_dropped += results.len() as u64;
            return outcomes;
        };
        self.round_trip = now.saturating_sub(issued);
        let mut rest = results;
        let alone = is_of_one(&rows);
        for row in rows {
            // In the order of the rows; what does not match is not ours, and rows may be left out.
            let at = rest.iter().position(|r| row.is_answered_by(r));
            let result = at.map(|at| &rest[at]);
            rest = &rest[at.map_or(0, |at| at + 1)..];
            if !self.is_live(&row) {
                self.drop_stale(&row);
                continue;
            }
            let outcome = match result {
                Some(result) => result.outcome.clone(),
                None => RowOutcome::Failed("the last stage sent no result for this row".into()),
            };
            self.apply(row, outcome, &mut outcomes);
        }
        note_alone(&mut outcomes, alone);
        outcomes
    }

    /// A stage could not compute the micro-batch: every sequence in it fails, for its KV is not
    /// what later rows need.
    pub fn handle_step_failed(&mut self, id: MicroBatchId, message: &str) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let rows = self.in_flight.take(id).map_or_else(Vec::new, |(_, rows)| rows);
        let alone = is_of_one(&rows);
        for row in rows {
            if self.is_live(&row) {
                self.fail(row.sequence, message.into(), &mut outcomes);
            } else {
                self.drop_stale(&row);
            }
        }
        note_alone(&mut outcomes, alone);
        outcomes
    }

    fn drop_stale(&mut self, row: &IssuedRow) {
        if row.want == Want::Follow {
            // Guessed in vain.
            self.drafted += u64::from(row.count);
        } else {
            self.stale_dropped += 1;
        }
    }

    pub(super) fn is_live(&self, row: &IssuedRow) -> bool {
        self.sequences.get(&row.sequence).is_some_and(|s| s.epoch == row.epoch)
    }

    /// Carries out what became of a live row.
    fn apply(&mut self, row: IssuedRow, outcome: RowOutcome, outcomes: &mut Vec<Outcome>) {
        let Some(seq) = self.sequences.get_mut(&row.sequence) else { return };
        seq.rows_in_flight -= 1;
        self.prompt_tokens += u64::from(seq.count_prompt(row.end()));
        let guessed = matches!(row.want, Want::Verify | Want::Follow);
        if !matches!(outcome, RowOutcome::Failed(_)) && !guessed {
            self.confirm(row.sequence, row.position, row.end());
        }
        let Some(seq) = self.sequences.get_mut(&row.sequence) else { return };
        match (row.want, outcome) {
            (_, RowOutcome::Failed(failure)) => self.fail(row.sequence, failure, outcomes),
            (Want::None | Want::Sum, _) => {}
            (Want::Sample, RowOutcome::Token { token, logprobs }) => {
                if seq.finish_prefill() {
                    outcomes.push(Outcome::PrefillDone { sequence: row.sequence });
                }
                self.accept(&row, vec![ChosenToken { token, logprobs }], outcomes);
            }
            (Want::Verify | Want::Follow, RowOutcome::Tokens(chosen))
                if (1..=row.count as usize).contains(&chosen.len()) =>
            {
                self.accept(&row, chosen, outcomes);
            }
            (Want::Embed { .. }, RowOutcome::Embedding(vector)) => {
                outcomes.push(Outcome::PrefillDone { sequence: row.sequence });
                outcomes.push(Outcome::Embedding { sequence: row.sequence, vector });
                self.remove(row.sequence);
            }
            (Want::Score { .. }, RowOutcome::Scores(scores)) => {
                seq.scored = row.end();
                let last = seq.scored as usize == seq.tokens.len();
                if last {
                    outcomes.push(Outcome::PrefillDone { sequence: row.sequence });
                }
                outcomes.push(Outcome::Scores { sequence: row.sequence, scores, last });
                if last {
                    self.remove(row.sequence);
                }
            }
            _ => {
                let message = "the last stage answered something that was not asked for";
                self.fail(row.sequence, message.into(), outcomes);
            }
        }
    }

    /// Takes a token of the answer; whether there may be more.
    fn take_token(
        &mut self,
        sequence: SequenceId,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        outcomes: &mut Vec<Outcome>,
    ) -> bool {
        let Some(seq) = self.sequences.get_mut(&sequence) else { return false };
        let index = seq.push(token);
        let last = seq.is_complete();
        self.generated_tokens += 1;
        self.outstanding = self.outstanding.saturating_sub(1);
        self.decode_context += 1;
        outcomes.push(Outcome::Token { sequence, index, token, logprobs, last });
        if last {
            self.remove(sequence);
        }
        !last
    }

    /// Takes the tokens of a row: what was drafted and right, and one more. Where rows in flight took
    /// them for granted, those go on; else what lies in the cache behind them is void, and will be
    /// written again.
    fn accept(&mut self, row: &IssuedRow, chosen: Vec<ChosenToken>, outcomes: &mut Vec<Outcome>) {
        let Some(seq) = self.sequences.get_mut(&row.sequence) else { return };
        let (sampled, built_on) = (row.want == Want::Sample, seq.rows_in_flight > 0);
        let (drafted, right) = match row.want {
            Want::Sample => (0, 0),
            _ => (row.count as usize - 1, chosen.len() - 1),
        };
        let valid = if sampled { row.end() } else { row.position + chosen.len() as u32 };
        let tokens: Vec<u32> = chosen.iter().map(|c| c.token).collect();
        let void = VoidRows { sequence: row.sequence, epoch: seq.epoch };
        let foreseen = seq.was_foreseen(&tokens, drafted == right, valid);
        seq.acceptance.observe(drafted, right);
        if built_on && drafted == right {
            seq.acceptance.observe(1, usize::from(foreseen));
        }
        if built_on && !foreseen && self.void.len() < MAX_VOID_ROWS {
            self.void.push(void);
        }
        // What came without a row of its own is service all the same.
        let (prompt, generated) = seq.charge(valid);
        self.queue.charge(seq.flow, prompt, generated);
        // That the first one of a row that follows was right is known from the row before.
        let first = u64::from(row.want == Want::Follow);
        self.drafted += drafted as u64 + first;
        self.drafts_accepted += right as u64 + first;
        for ChosenToken { token, logprobs } in chosen {
            if !self.take_token(row.sequence, token, logprobs, outcomes) {
                return;
            }
        }
        if !sampled {
            self.confirm(row.sequence, row.position, valid);
        }
        if !foreseen {
            self.ready.push_back(row.sequence);
        }
    }

    fn fail(&mut self, sequence: SequenceId, failure: Failure, outcomes: &mut Vec<Outcome>) {
        self.remove(sequence);
        outcomes.push(Outcome::Failed { sequence, failure, alone: false });
    }
}
