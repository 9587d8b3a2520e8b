//! One stage as frames see it: a frame in, the next frame out.
//!
//! The runner owns the engine and, on the last stage, what sampling needs of each open sequence. It
//! checks everything a neighbour may have got wrong before the engine sees it. Three kinds of
//! trouble stay apart: a frame that breaks the rules is a [`StageError`] (its edge is closed); a
//! step that the engine cannot compute becomes a frame with `failed` set, which later stages pass
//! on, so that block tables stay in step; a row that cannot be sampled fails alone.
//!
//! Not here: threads and queues.

mod check;
mod payload;
mod sequences;
mod void;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use millrace_shared::id::{Epoch, PipelineId, StageIndex};
use millrace_shared::model::Dtype;
use millrace_shared::wire::control::{ProfileSpec, StageProfile, VoidRows};
use millrace_shared::wire::data::{
    Failure, FrameError, FrameHeader, FrameKind, MaskMeta, OpenMeta, ResultMeta, RowOutcome,
    StageTime, StepMeta,
};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;

use crate::clock;
use crate::head::{HeadRow, HeadWant};
use crate::seam::{
    Engine, LoadError, LoadedStage, StageInput, StageOutput, StageSpec, StepError, TensorSource,
};
use sequences::Sequences;
use void::Void;

/// Which stage of which pipeline this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagePlace {
    /// Pipeline.
    pub pipeline: PipelineId,
    /// Epoch of the assignment; frames of any other are refused as stale.
    pub epoch: Epoch,
    /// Place in the pipeline, 0 first.
    pub stage: StageIndex,
}

/// Why a stage refuses a frame.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// No assignment is loaded.
    #[error("no stage is loaded")]
    NotLoaded,
    /// The frame belongs to another pipeline or epoch.
    #[error(
        "frame of pipeline {pipeline} epoch {epoch}, the stage is at pipeline {own_pipeline} epoch {own_epoch}"
    )]
    Stale {
        /// Of the frame.
        pipeline: PipelineId,
        /// Of the frame.
        epoch: Epoch,
        /// Of the stage.
        own_pipeline: PipelineId,
        /// Of the stage.
        own_epoch: Epoch,
    },
    /// The frame breaks a rule of the wire.
    #[error("bad frame: {0}")]
    Frame(#[from] FrameError),
    /// The frame does not fit this stage.
    #[error("bad frame: {0}")]
    Mismatch(String),
    /// More sequences are open than the deployment allows.
    #[error("{open} sequences are open at the last stage, the limit is {limit}")]
    TooManySequences {
        /// With the refused ones.
        open: usize,
        /// Limit.
        limit: usize,
    },
    /// A fault of the stage itself, outside the engine's step.
    #[error("the stage panicked: {0}")]
    Panic(String),
    /// The engine thread is shutting down.
    #[error("the engine thread has stopped")]
    Closed,
}

impl StageError {
    /// The frame came too late (or too early) to matter: drop it, its sender did nothing wrong.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Stale { .. } | Self::NotLoaded | Self::Closed)
    }

    /// The sender broke the rules: close its connection.
    pub fn is_bad_frame(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Mismatch(_) | Self::TooManySequences { .. })
    }
}

struct Loaded {
    spec: StageSpec,
    place: StagePlace,
    sequences: Sequences,
    /// What the step's rows want of the head.
    wants: Vec<HeadWant>,
    void: Void,
}

/// An engine with a stage in it.
pub struct StageRunner {
    engine: Box<dyn Engine>,
    loaded: Option<Loaded>,
    /// Activations as f32, where the wire carries 16 bits.
    input: Vec<f32>,
    output: Vec<f32>,
    steps: u64,
}

impl std::fmt::Debug for StageRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageRunner")
            .field("place", &self.loaded.as_ref().map(|l| l.place))
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

impl StageRunner {
    /// A runner without a stage.
    pub fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, loaded: None, input: Vec::new(), output: Vec::new(), steps: 0 }
    }

    /// Loads a stage in place of any other; all sequences are forgotten. `progress` gets the bytes
    /// of weights done so far.
    ///
    /// # Errors
    /// If the engine cannot load it (or panics); no stage is loaded then.
    pub fn load(
        &mut self,
        spec: &StageSpec,
        place: StagePlace,
        tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        self.loaded = None;
        if !matches!(spec.settings.activation_dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
            return Err(LoadError::Settings(format!(
                "activations cannot be {}: use f32, f16 or bf16",
                spec.settings.activation_dtype.as_str()
            )));
        }
        let done = guarded(|| self.engine.load(spec, tensors, progress)).map_err(|panic| {
            LoadError::Settings(format!("the engine panicked while loading: {panic}"))
        })??;
        let width = if spec.settings.activation_dtype == Dtype::F32 {
            0
        } else {
            spec.settings.max_batch_tokens as usize * spec.config.hidden as usize
        };
        self.input = vec![0.0; if spec.embed { 0 } else { width }];
        self.output = vec![0.0; if spec.head { 0 } else { width }];
        let sequences = Sequences::new(spec, place.stage.0);
        let (wants, void) = (Vec::new(), Void::default());
        self.loaded = Some(Loaded { spec: spec.clone(), place, sequences, wants, void });
        Ok(done)
    }

    /// Gives the stage up. The engine keeps its memory until the next load.
    pub fn unload(&mut self) {
        self.loaded = None;
    }

    /// Registers sequences at the last stage; opening one again replaces it. One whose parameters
    /// or tokens are out of range is registered as such: its rows fail, nothing else does.
    ///
    /// # Errors
    /// If this is not the last stage, the epoch is another, or too many sequences are open.
    pub fn open(&mut self, epoch: Epoch, opens: OpenMeta) -> Result<(), StageError> {
        let loaded = self.loaded.as_mut().ok_or(StageError::NotLoaded)?;
        loaded.check_place(loaded.place.pipeline, epoch)?;
        if !loaded.spec.head {
            return Err(StageError::Mismatch("sequences are opened at the last stage only".into()));
        }
        loaded.sequences.open(opens)
    }

    /// Notes which tokens may come next in constrained sequences.
    ///
    /// # Errors
    /// If this is not the last stage, or the epoch is another.
    pub fn mask(&mut self, epoch: Epoch, masks: MaskMeta) -> Result<(), StageError> {
        let loaded = self.loaded.as_mut().ok_or(StageError::NotLoaded)?;
        loaded.check_place(loaded.place.pipeline, epoch)?;
        if !loaded.spec.head {
            return Err(StageError::Mismatch("masks are for the last stage only".into()));
        }
        loaded.sequences.mask(masks);
        Ok(())
    }

    /// Rows of an epoch that nobody wants any more: frames that come lose them. Of another epoch
    /// than the stage's they mean nothing.
    pub fn void(&mut self, epoch: Epoch, rows: &[VoidRows]) {
        if let Some(loaded) = self.loaded.as_mut().filter(|l| l.place.epoch == epoch) {
            rows.iter().for_each(|&rows| loaded.void.note(rows));
        }
    }

    /// Rows of the stage that were left out so far.
    pub fn rows_left_out(&self) -> u64 {
        self.loaded.as_ref().map_or(0, |l| l.void.left_out)
    }

    /// [`Self::run_after`] without having waited.
    ///
    /// # Errors
    /// The same.
    pub fn run(&mut self, frame: &Frame) -> Result<Frame, StageError> {
        self.run_after(frame, StageTime::default())
    }

    /// Computes a `Step` or `Activations` frame and returns the next frame, sealed: `Activations`,
    /// or `Results` from the last stage. The frame says what the step took, and what it spent
    /// `before`: hop and queue.
    ///
    /// # Errors
    /// If the frame breaks the rules or is stale. A step that fails is *not* an error: see above.
    pub fn run_after(&mut self, frame: &Frame, before: StageTime) -> Result<Frame, StageError> {
        let loaded = self.loaded.as_mut().ok_or(StageError::NotLoaded)?;
        let header = *frame.header();
        loaded.check_place(header.pipeline, header.epoch)?;
        let meta = check::step(&loaded.spec, frame)?;
        self.steps += 1;
        for &sequence in &meta.released {
            loaded.void.forget(sequence);
            if loaded.spec.head {
                loaded.sequences.release(sequence);
            }
        }
        let smaller = match meta.failed {
            None => loaded.void.leave_out(frame, &meta)?,
            Some(_) => None,
        };
        let (smaller, meta) = match smaller {
            Some((frame, meta)) => (Some(frame), meta),
            None => (None, meta),
        };
        let frame = smaller.as_ref().unwrap_or(frame);
        if meta.failed.is_some() || meta.rows.is_empty() {
            return self.pass_on(&header, meta);
        }
        if loaded.spec.head {
            self.run_last(frame, meta, before)
        } else {
            self.run_inner(frame, meta, before)
        }
    }

    /// Measures one layer and the head of a model.
    ///
    /// # Errors
    /// If the engine cannot (or panics).
    pub fn profile(
        &mut self,
        spec: &ProfileSpec,
        threads: usize,
    ) -> Result<StageProfile, LoadError> {
        guarded(|| self.engine.profile(spec, threads)).map_err(|panic| {
            LoadError::Settings(format!("the engine panicked while measuring: {panic}"))
        })?
    }

    /// CPU time of the engine's threads inside steps; cumulative.
    pub fn busy(&self) -> Duration {
        self.engine.busy()
    }

    /// Frames run, failed ones included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn run_inner(
        &mut self,
        frame: &Frame,
        mut meta: StepMeta,
        before: StageTime,
    ) -> Result<Frame, StageError> {
        let begin = Instant::now();
        let Some(loaded) = &self.loaded else { return Err(StageError::NotLoaded) };
        let dtype = loaded.spec.settings.activation_dtype;
        let values = meta.positions() * loaded.spec.config.hidden as usize;
        let header = FrameHeader {
            kind: FrameKind::Activations,
            dtype,
            rows: meta.positions() as u32,
            ready: Stamp::NONE,
            ..*frame.header()
        };
        meta.times.push(StageTime::default());
        let mut next = Frame::build(header, &meta, values * dtype.bytes())?;
        let input = payload::read(frame, loaded.spec.embed, dtype, &mut self.input)?;
        let engine = self.engine.as_mut();
        let computed = if dtype == Dtype::F32 {
            let output = payload::as_f32_mut(next.payload_mut())?;
            step(engine, &meta, input, StageOutput::Hidden(output))
        } else {
            let output = &mut self.output[..values];
            step(engine, &meta, input, StageOutput::Hidden(output))
                .and_then(|()| payload::write(&self.output[..values], dtype, next.payload_mut()))
        };
        match computed {
            Ok(()) => {
                let ready = clock::now();
                if let Some(time) = meta.times.last_mut() {
                    *time = before.with_step(begin.elapsed());
                }
                next.replace_meta(&meta)?;
                Ok(next.stamped(ready).seal())
            }
            Err(cause) => {
                let failed = loaded.describe(&cause);
                tracing::warn!(error = failed.message, micro_batch = header.micro_batch.0);
                let meta = StepMeta { failed: Some(failed), ..meta };
                Ok(Frame::build(FrameHeader { rows: 0, ..header }, &meta, 0)?.seal())
            }
        }
    }

    fn run_last(
        &mut self,
        frame: &Frame,
        mut meta: StepMeta,
        before: StageTime,
    ) -> Result<Frame, StageError> {
        let begin = Instant::now();
        let Some(loaded) = &mut self.loaded else { return Err(StageError::NotLoaded) };
        let dtype = loaded.spec.settings.activation_dtype;
        let input = payload::read(frame, loaded.spec.embed, dtype, &mut self.input)?;
        let mut outcomes = loaded.sequences.begin(&meta);
        let computed = {
            let Loaded { sequences, wants, .. } = loaded;
            sequences.wants(&meta, wants);
            let outcomes = &mut outcomes;
            let mut take = |row: HeadRow<'_>| sequences.take(&meta, outcomes, row);
            let output = StageOutput::Head { want: wants, sink: &mut take };
            step(self.engine.as_mut(), &meta, input, output)
        };
        match computed {
            Ok(()) => {
                let outcomes = sequences::finish(&meta, outcomes);
                meta.times.push(before.with_step(begin.elapsed()));
                results(frame.header(), &meta, outcomes.into_iter())
            }
            Err(cause) => {
                let failed = loaded.describe(&cause);
                loaded.sequences.spoil(&meta);
                tracing::warn!(error = failed.message, micro_batch = frame.header().micro_batch.0);
                meta.times.clear();
                results(frame.header(), &meta, std::iter::repeat(RowOutcome::Failed(failed)))
            }
        }
    }

    /// A step that an earlier stage failed, or one without rows: tables are kept in step, the
    /// failure travels on.
    fn pass_on(&mut self, header: &FrameHeader, meta: StepMeta) -> Result<Frame, StageError> {
        let Some(loaded) = &self.loaded else { return Err(StageError::NotLoaded) };
        if let Err(panic) = guarded(|| self.engine.skip(&meta)) {
            tracing::error!(panic, "the engine panicked while it skipped a step");
        }
        if !loaded.spec.head {
            let dtype = loaded.spec.settings.activation_dtype;
            let (kind, ready) = (FrameKind::Activations, Stamp::NONE);
            let header = FrameHeader { kind, dtype, rows: 0, ready, ..*header };
            return Ok(Frame::build(header, &meta, 0)?.seal());
        }
        let cause = meta.failed.clone().unwrap_or_default();
        let meta = StepMeta { times: Vec::new(), ..meta };
        results(header, &meta, std::iter::repeat(RowOutcome::Failed(cause)))
    }
}

impl Loaded {
    fn check_place(&self, pipeline: PipelineId, epoch: Epoch) -> Result<(), StageError> {
        let StagePlace { pipeline: own_pipeline, epoch: own_epoch, .. } = self.place;
        if pipeline == own_pipeline && epoch == own_epoch {
            return Ok(());
        }
        Err(StageError::Stale { pipeline, epoch, own_pipeline, own_epoch })
    }

    fn describe(&self, cause: &StepError) -> Failure {
        let (stage, layers) = (self.place.stage, &self.spec.layers);
        let message = format!("stage {stage}, layers {}..{}: {cause}", layers.start, layers.end);
        Failure::of_stage(stage.0, message)
    }
}

/// A step whose panic is an error of that step. Tables are applied in either case.
fn step(
    engine: &mut dyn Engine,
    meta: &StepMeta,
    input: StageInput<'_>,
    output: StageOutput<'_>,
) -> Result<(), StepError> {
    match guarded(|| engine.step(meta, input, output)) {
        Ok(result) => result,
        Err(panic) => {
            // How far it got is unknown; applying the same updates again changes nothing.
            if let Err(again) = guarded(|| engine.skip(meta)) {
                tracing::error!(panic = again, "the engine panicked while it skipped a step");
            }
            Err(StepError::Panic(panic))
        }
    }
}

fn results(
    header: &FrameHeader,
    meta: &StepMeta,
    outcomes: impl Iterator<Item = RowOutcome>,
) -> Result<Frame, StageError> {
    let rows = meta.rows.iter().zip(outcomes).map(|(row, outcome)| row.result(outcome)).collect();
    let (kind, dtype, ready) = (FrameKind::Results, Dtype::F32, Stamp::NONE);
    let header = FrameHeader { kind, dtype, rows: 0, ready, ..*header };
    Ok(Frame::build(header, &ResultMeta { rows, times: meta.times.clone() }, 0)?.seal())
}

/// Runs something that may panic; the panic's message is the error.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // Whatever the panic left half done belongs to the engine, which promises to live on, or to one
    // step's buffers, which are written anew.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned())
    })
}
