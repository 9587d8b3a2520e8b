//! Decode steps as graphs: what a step asks of the device is recorded once and asked for again as one.
//!
//! A recorded step reads its inputs where they lay and repeats shapes, so decode steps are made alike:
//! rows and what they see are padded up to one of a few sizes ([`Key`]), and everything that follows from
//! positions and block tables lies in tensors of the key ([`Fixed`]), which are filled before each step.
//! A key's first step runs as it is (libraries set themselves up), the second is recorded, all others are
//! replayed: operations between the step's input and the look at its last layer then do nothing. Without
//! the shim there are no graphs; where a recording fails, the step runs again without, and so do all after it.

use millrace_engine::model::{Batch, BlockTables};
use tch::{Device, Kind, TchError, Tensor};

use crate::step::slot;

/// More rows are a matter of arithmetic: what launching them costs does not show.
const MOST_ROWS: usize = 64;
/// Each keeps its inputs, and the device what is between its operations.
const MOST_GRAPHS: usize = 32;

/// Records what is asked of a device.
pub(crate) trait Recorder: std::fmt::Debug + Send {
    /// From here on. What is asked for is not done.
    fn begin(&mut self) -> Result<(), String>;
    /// To here.
    fn end(&mut self) -> Result<Box<dyn Recording>, String>;
    /// Whether a replay does the work: a recorder of tests lets the operations run again.
    fn replays(&self) -> bool;
    /// Copies from the host to the device; may go on before it is done, if `from` is pinned.
    fn copy(&mut self, to: &Tensor, from: &Tensor) -> Result<(), String>;
    /// A buffer like this on the host, pinned where that is of use.
    fn staging(&self, like: &Tensor) -> Result<Tensor, TchError>;
}

/// What was recorded.
pub(crate) trait Recording: std::fmt::Debug + Send {
    /// Asks for all of it.
    fn replay(&mut self) -> Result<(), String>;
}

/// Records nothing: every step of a key runs again, with the key's sizes and inputs. What can be tested of
/// graphs without a GPU.
#[derive(Debug)]
pub(crate) struct Rehearsal;

impl Recorder for Rehearsal {
    fn begin(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn end(&mut self) -> Result<Box<dyn Recording>, String> {
        Ok(Box::new(Self))
    }

    fn replays(&self) -> bool {
        false
    }

    fn copy(&mut self, to: &Tensor, from: &Tensor) -> Result<(), String> {
        to.shallow_clone().f_copy_(from).map_err(|e| e.to_string())
    }

    fn staging(&self, like: &Tensor) -> Result<Tensor, TchError> {
        Tensor::f_zeros(like.size(), (like.f_kind()?, Device::Cpu))
    }
}

impl Recording for Rehearsal {
    fn replay(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// Sizes of a step: its own, or larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) rows: usize,
    pub(crate) positions: usize,
}

impl Key {
    /// The next sizes up: rows in powers of two, positions in powers of two and half-way between.
    pub(crate) fn of(rows: usize, positions: usize) -> Self {
        let power = positions.max(64).next_power_of_two();
        let between = power / 4 * 3;
        let positions = if between >= positions.max(64) { between } else { power };
        Self { rows: rows.next_power_of_two(), positions }
    }
}

/// What a stage's cache looks like to its steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Geometry {
    pub(crate) block_size: usize,
    /// A slot that no sequence has: what pads is written there and sees itself.
    pub(crate) nowhere: i64,
    /// Windows of the layers, each once.
    pub(crate) windows: Vec<usize>,
    pub(crate) hidden: i64,
}

/// Inputs of the steps of a key, each at its place in one tensor of the device.
#[derive(Debug)]
pub(crate) struct Fixed {
    key: Key,
    staging: Tensor,
    all: Tensor,
    /// Token ids.
    pub(crate) ids: Tensor,
    pub(crate) positions: Tensor,
    pub(crate) places: Tensor,
    /// By window: how many positions rows see, `rows`; their slots, `rows * positions`.
    pub(crate) seen: Vec<Seen>,
    /// Activations from another stage, `rows x hidden`.
    pub(crate) hidden: Tensor,
    hidden_staging: Tensor,
}

/// What the rows of a key see through a window.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) window: usize,
    pub(crate) longest: i64,
    pub(crate) lens: Tensor,
    pub(crate) slots: Tensor,
}

impl Fixed {
    fn new(
        key: Key,
        geometry: &Geometry,
        device: Device,
        recorder: &dyn Recorder,
    ) -> Result<Self, TchError> {
        let rows = key.rows as i64;
        let longest = |window: usize| Key::of(1, window.min(key.positions)).positions as i64;
        let seen: i64 = geometry.windows.iter().map(|&w| rows * (1 + longest(w))).sum();
        let all = Tensor::f_zeros([3 * rows + seen], (Kind::Int64, device))?;
        let mut at = 0;
        let mut take = |len: i64| {
            at += len;
            all.f_narrow(0, at - len, len)
        };
        let (ids, positions, places) = (take(rows)?, take(rows)?, take(rows)?);
        let mut seen = Vec::new();
        for &window in &geometry.windows {
            let longest = longest(window);
            let (lens, slots) = (take(rows)?, take(rows * longest)?);
            seen.push(Seen { window, longest, lens, slots });
        }
        let hidden = Tensor::f_zeros([rows, geometry.hidden], (Kind::Float, device))?;
        let (staging, hidden_staging) = (recorder.staging(&all)?, recorder.staging(&hidden)?);
        Ok(Self { key, staging, all, ids, positions, places, seen, hidden, hidden_staging })
    }

    /// Of a step; `tokens`: as many as rows, or none where activations come instead.
    fn numbers(
        &self,
        batch: &Batch,
        tables: &BlockTables,
        geometry: &Geometry,
        tokens: &[u32],
    ) -> Vec<i64> {
        let (spans, rows, size) = (&batch.spans, self.key.rows, geometry.block_size);
        let mut all = Vec::with_capacity(self.staging.numel());
        let padded = |all: &mut Vec<i64>, from: usize, with: i64| {
            all.resize(from + rows, with);
        };
        let start = all.len();
        all.extend(tokens.iter().map(|&t| i64::from(t)));
        padded(&mut all, start, 0);
        let start = all.len();
        all.extend(spans.iter().map(|s| i64::from(s.position)));
        padded(&mut all, start, 0);
        let start = all.len();
        all.extend(spans.iter().map(|s| slot(tables, s.slot, s.position as usize, size)));
        padded(&mut all, start, geometry.nowhere);
        for seen in &self.seen {
            let range = |position: u32| {
                let end = position as usize + 1;
                end.saturating_sub(seen.window)..end
            };
            let start = all.len();
            all.extend(spans.iter().map(|s| range(s.position).len() as i64));
            padded(&mut all, start, 1);
            for s in spans {
                let start = all.len();
                let own = range(s.position);
                // What pads is masked, and the sequence's own.
                let first = slot(tables, s.slot, own.start, size);
                all.extend(own.map(|p| slot(tables, s.slot, p, size)));
                all.resize(start + seen.longest as usize, first);
            }
            let rest = (rows - spans.len()) * seen.longest as usize;
            all.resize(all.len() + rest, geometry.nowhere);
        }
        all
    }
}

/// A step's turn with its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Runs as it is, with the key's inputs.
    Run,
    Record,
    Replay,
}

/// A key's inputs, and what was recorded with them.
#[derive(Debug)]
struct Graph {
    fixed: Fixed,
    recording: Option<Box<dyn Recording>>,
    /// What the recorded operations leave.
    result: Option<Tensor>,
    used: u64,
}

/// The graphs of a stage, and the step at hand.
#[derive(Debug)]
pub(crate) struct Graphs {
    recorder: Box<dyn Recorder>,
    geometry: Geometry,
    device: Device,
    all: Vec<Graph>,
    clock: u64,
    /// Index, turn, rows of the step.
    step: Option<(usize, Turn, usize)>,
    /// Between the step's input and its result.
    inside: bool,
    /// A recording has failed.
    off: bool,
}

impl Graphs {
    pub(crate) fn new(recorder: Box<dyn Recorder>, geometry: Geometry, device: Device) -> Self {
        let (all, step) = (Vec::new(), None);
        Self { recorder, geometry, device, all, clock: 0, step, inside: false, off: false }
    }

    /// Whether a step can be one of them: single positions, all of which go the whole way.
    fn takes(&self, batch: &Batch, whole: bool) -> bool {
        let rows = batch.spans.len();
        !self.off
            && (1..=MOST_ROWS).contains(&rows)
            && batch.spans.iter().all(|s| s.count == 1)
            && (!whole || batch.keep.len() == rows)
    }

    /// A step begins: fills its inputs, if it can be one of them. `whole`: the stage has the head.
    ///
    /// # Errors
    /// If the device refuses them.
    pub(crate) fn begin(
        &mut self,
        batch: &Batch,
        tables: &BlockTables,
        (tokens, whole): (&[u32], bool),
    ) -> Result<(), String> {
        (self.step, self.inside) = (None, false);
        if !self.takes(batch, whole) {
            return Ok(());
        }
        let longest = batch.spans.iter().map(|s| s.position as usize + 1).max().unwrap_or(1);
        let key = Key::of(batch.spans.len(), longest);
        let failed = |e: TchError| e.to_string();
        self.clock += 1;
        let (at, turn) = match self.all.iter().position(|g| g.fixed.key == key) {
            Some(at) if self.all[at].recording.is_some() => (at, Turn::Replay),
            Some(at) => (at, Turn::Record),
            None => {
                if self.all.len() == MOST_GRAPHS
                    && let Some(oldest) = (0..MOST_GRAPHS).min_by_key(|&i| self.all[i].used)
                {
                    self.all.swap_remove(oldest);
                }
                let fixed = Fixed::new(key, &self.geometry, self.device, &*self.recorder);
                let fixed = fixed.map_err(failed)?;
                self.all.push(Graph { fixed, recording: None, result: None, used: 0 });
                (self.all.len() - 1, Turn::Run)
            }
        };
        let graph = &mut self.all[at];
        graph.used = self.clock;
        let fixed = &mut graph.fixed;
        let numbers = fixed.numbers(batch, tables, &self.geometry, tokens);
        let numbers = Tensor::f_from_slice(&numbers).map_err(failed)?;
        fixed.staging.f_copy_(&numbers).map_err(failed)?;
        self.recorder.copy(&fixed.all, &fixed.staging)?;
        self.step = Some((at, turn, batch.spans.len()));
        Ok(())
    }

    /// The inputs of the step at hand, if it is one of them.
    pub(crate) fn fixed(&self) -> Option<&Fixed> {
        self.step.map(|(at, ..)| &self.all[at].fixed)
    }

    /// Activations for the step at hand.
    pub(crate) fn put_hidden(&mut self, rows: &[f32]) -> Result<(), String> {
        let Some((at, _, count)) = self.step else { return Ok(()) };
        let fixed = &mut self.all[at].fixed;
        let put = || {
            let from = Tensor::f_from_slice(rows)?.f_view([count as i64, -1])?;
            fixed.hidden_staging.f_narrow(0, 0, count as i64)?.f_copy_(&from)
        };
        put().map_err(|e: TchError| e.to_string())?;
        self.recorder.copy(&fixed.hidden, &fixed.hidden_staging)
    }

    /// The inputs are there: what follows is recorded, or was.
    pub(crate) fn enter(&mut self) -> Result<(), String> {
        match self.step {
            Some((_, Turn::Record, _)) => self.recorder.begin().inspect_err(|_| self.off = true)?,
            Some(_) => {}
            None => return Ok(()),
        }
        self.inside = true;
        Ok(())
    }

    /// Whether operations are to do nothing: their work will be asked for as a whole.
    pub(crate) fn skips(&self) -> bool {
        self.inside && self.recorder.replays() && matches!(self.step, Some((_, Turn::Replay, _)))
    }

    /// The last layer is through: the step's result, without what pads. `x`: what the operations have
    /// left, if they ran.
    pub(crate) fn leave(&mut self, x: &Tensor) -> Result<Tensor, String> {
        let Some((at, turn, rows)) = self.step.filter(|_| self.inside) else {
            return Ok(x.shallow_clone());
        };
        let mut result = x.shallow_clone();
        self.inside = false;
        let graph = &mut self.all[at];
        if turn == Turn::Record {
            let recording = self.recorder.end().inspect_err(|_| self.off = true)?;
            (graph.recording, graph.result) = (Some(recording), Some(x.shallow_clone()));
        }
        // What was recorded has not been done yet.
        if let (Some(recording), true) = (&mut graph.recording, turn != Turn::Run) {
            recording.replay()?;
            if let (Some(left), true) = (&graph.result, self.recorder.replays()) {
                result = left.shallow_clone();
            }
        }
        result.f_narrow(0, 0, rows as i64).map_err(|e| e.to_string())
    }

    /// The step is over. True where a recording came to nothing: the step is to run again, and no other
    /// will be recorded.
    pub(crate) fn end(&mut self) -> bool {
        let recording = matches!(self.step.take(), Some((_, Turn::Record, _)));
        let failed = recording && (self.inside || self.off);
        if std::mem::take(&mut self.inside) && recording {
            // Ends the recording whatever it is worth.
            drop(self.recorder.end());
        }
        self.off |= failed;
        failed
    }

    /// Whether operations come between the step's input and its result.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside
    }
}

#[cfg(test)]
mod tests;
