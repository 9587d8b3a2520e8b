//! Stage plane: a 64-byte header, rkyv metadata, and a raw payload at a 64-byte offset.
//!
//! The receiver reads the header, checks every length against limits, then reads metadata and
//! payload straight into a 64-byte aligned buffer: metadata is validated in place, the payload is
//! never deserialised. A frame that fails any check closes its connection.

use std::time::Duration;

use rkyv::{Archive, Deserialize, Serialize};

use super::rpc::{PositionScore, TokenLogprobs};
use super::stamp::Stamp;
use crate::id::{Epoch, MicroBatchId, PipelineId, SequenceId};
use crate::model::Dtype;
use crate::pooling::Pooling;
use crate::sampling::{SamplingParams, TokenMask};

/// `MLRF`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"MLRF");
/// Bytes of the header; also the alignment of payloads.
pub const HEADER_BYTES: usize = 64;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Rows with token ids ([`StepMeta`]); coordinator to first stage. Payload: `u32` ids.
    Step = 1,
    /// Rows with activations ([`StepMeta`]); stage to stage. Payload: `rows x hidden`.
    Activations = 2,
    /// Results ([`ResultMeta`]); last stage to coordinator. No payload.
    Results = 3,
    /// Opened sequences ([`OpenMeta`]); coordinator to last stage. No payload.
    Sequences = 4,
    /// What may come next ([`MaskMeta`]); on the edge of `Sequences`. No payload.
    Masks = 5,
}

/// Why a header is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not ours.
    #[error("bad magic {0:#010x}: not a Millrace frame")]
    Magic(u32),
    /// Another version.
    #[error("frame of wire version {0}, this build speaks {ours}", ours = super::WIRE_VERSION)]
    Version(u16),
    /// Unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u16),
    /// Unknown dtype.
    #[error("unknown activation dtype {0}")]
    Dtype(u8),
    /// A length is over its limit.
    #[error("{what} of {len} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Announced length.
        len: u64,
        /// Limit.
        limit: u64,
    },
    /// The checksum does not match.
    #[error("frame checksum {found:#010x} does not match {expected:#010x}")]
    Checksum {
        /// In the header.
        expected: u32,
        /// Computed.
        found: u32,
    },
    /// The metadata does not validate.
    #[error("malformed frame metadata: {0}")]
    Metadata(String),
    /// The parts do not fit together.
    #[error("inconsistent frame: {0}")]
    Inconsistent(String),
}

/// The fixed part of every frame. CRC32C covers header (with the field zero), metadata and payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What follows.
    pub kind: FrameKind,
    /// Type of payload elements.
    pub dtype: Dtype,
    /// Pipeline.
    pub pipeline: PipelineId,
    /// Epoch; stale frames are dropped.
    pub epoch: Epoch,
    /// Micro-batch; 0 where there is none.
    pub micro_batch: MicroBatchId,
    /// Rows of payload.
    pub rows: u32,
    /// Bytes of metadata, without padding.
    pub meta_len: u32,
    /// Bytes of payload.
    pub payload_len: u64,
    /// CRC32C.
    pub crc: u32,
    /// When the sending engine had the payload ready.
    pub ready: Stamp,
}

impl FrameHeader {
    /// Offset of the payload from the start of the frame: a multiple of 64.
    pub fn payload_offset(&self) -> usize {
        (HEADER_BYTES + self.meta_len as usize).next_multiple_of(HEADER_BYTES)
    }

    /// Bytes of the whole frame.
    pub fn frame_len(&self) -> usize {
        self.payload_offset() + self.payload_len as usize
    }

    /// The 64 bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0u8; HEADER_BYTES];
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&super::WIRE_VERSION.to_le_bytes());
        b[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        b[8] = self.dtype as u8;
        b[12..16].copy_from_slice(&self.pipeline.0.to_le_bytes());
        b[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        b[24..32].copy_from_slice(&self.micro_batch.0.to_le_bytes());
        b[32..36].copy_from_slice(&self.rows.to_le_bytes());
        b[36..40].copy_from_slice(&self.meta_len.to_le_bytes());
        b[40..48].copy_from_slice(&self.payload_len.to_le_bytes());
        b[48..52].copy_from_slice(&self.crc.to_le_bytes());
        b[52..56].copy_from_slice(&self.ready.clock.to_le_bytes());
        b[56..64].copy_from_slice(&self.ready.nanos.to_le_bytes());
        b
    }

    /// Reads and checks the 64 bytes; lengths are within the limits afterwards.
    ///
    /// # Errors
    /// If anything in it is not ours or too long.
    pub fn decode(b: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | (u64::from(u32_at(i + 4)) << 32);
        if u32_at(0) != MAGIC {
            return Err(FrameError::Magic(u32_at(0)));
        }
        if u16_at(4) != super::WIRE_VERSION {
            return Err(FrameError::Version(u16_at(4)));
        }
        if b[9..12].iter().any(|&x| x != 0) {
            return Err(FrameError::Inconsistent("reserved header bytes are not zero".into()));
        }
        let kind = match u16_at(6) {
            1 => FrameKind::Step,
            2 => FrameKind::Activations,
            3 => FrameKind::Results,
            4 => FrameKind::Sequences,
            5 => FrameKind::Masks,
            other => return Err(FrameError::Kind(other)),
        };
        let dtype = Dtype::from_wire(b[8]).ok_or(FrameError::Dtype(b[8]))?;
        let header = Self {
            kind,
            dtype,
            pipeline: PipelineId(u32_at(12)),
            epoch: Epoch(u64_at(16)),
            micro_batch: MicroBatchId(u64_at(24)),
            rows: u32_at(32),
            meta_len: u32_at(36),
            payload_len: u64_at(40),
            crc: u32_at(48),
            ready: Stamp { clock: u32_at(52), nanos: u64_at(56) },
        };
        let limit = |what, len: u64, limit: usize| {
            if len > limit as u64 {
                Err(FrameError::TooLong { what, len, limit: limit as u64 })
            } else {
                Ok(())
            }
        };
        limit("frame metadata", u64::from(header.meta_len), super::MAX_FRAME_META_BYTES)?;
        limit("frame payload", header.payload_len, super::MAX_FRAME_PAYLOAD_BYTES)?;
        Ok(header)
    }

    /// The checksum of this header (its own field as zero) and what follows it.
    pub fn checksum(&self, rest: &[u8]) -> u32 {
        let zeroed = Self { crc: 0, ..*self };
        crc32c::crc32c_append(crc32c::crc32c(&zeroed.encode()), rest)
    }
}

/// What a row wants of the last stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Want {
    /// Nothing: a prefill chunk that is not the last.
    None,
    /// A token after the last position.
    Sample,
    /// The score of every position, with this many top logits (at most 64).
    Score {
        /// How many logits.
        top_k: u8,
    },
    /// A token after the first position, and after every further one as long as the token of that
    /// position (a draft, in [`StepMeta::drafts`]) is the one that was chosen after the position
    /// before it. At most 64 positions.
    Verify,
    /// The same where the first position, too, holds a draft: the token that may be chosen after the
    /// row before, which is still under way. Nothing is wanted where it was not.
    Follow,
    /// Nothing yet, but the hidden state of every position counts: they are added to the sequence's
    /// sum.
    Sum,
    /// The sequence's embedding, which ends with the row's last position. At most
    /// [`MAX_EMBEDDINGS`] in a micro-batch.
    Embed {
        /// Of which hidden states; those of a mean were added by the rows before.
        pooling: Pooling,
    },
}

/// Most embeddings of a micro-batch: results are vectors as wide as the model.
pub const MAX_EMBEDDINGS: usize = 64;

/// A run of consecutive positions of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Row {
    /// The sequence.
    pub sequence: SequenceId,
    /// The sequence's own epoch; results of an older one are dropped.
    pub sequence_epoch: u32,
    /// First position.
    pub position: u32,
    /// How many positions, at least 1.
    pub count: u32,
    /// What to do at the last stage.
    pub want: Want,
}

impl Row {
    /// How many of its positions are drafts.
    pub fn drafts(&self) -> usize {
        match self.want {
            Want::Verify => self.count.saturating_sub(1) as usize,
            Want::Follow => self.count as usize,
            Want::None | Want::Sample | Want::Score { .. } => 0,
            Want::Sum | Want::Embed { .. } => 0,
        }
    }

    /// The answer to this row.
    pub fn result(&self, outcome: RowOutcome) -> RowResult {
        RowResult {
            sequence: self.sequence,
            sequence_epoch: self.sequence_epoch,
            position: self.position,
            count: self.count,
            outcome,
        }
    }
}

/// New blocks of a sequence; applied before the rows. `first = 0` starts the table anew.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct TableUpdate {
    /// The sequence.
    pub sequence: SequenceId,
    /// Index in its table of the first of `blocks`; the table is cut there.
    pub first: u32,
    /// Block ids.
    pub blocks: Vec<u32>,
}

/// Metadata of `Step` and `Activations` frames. Every stage passes it on unchanged but for its time,
/// so that block tables stay in step even where a stage failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct StepMeta {
    /// What to compute, in order; payload rows are in the same order.
    pub rows: Vec<Row>,
    /// Applied before the rows.
    pub tables: Vec<TableUpdate>,
    /// Sequences that ended: forget their tables; applied before `tables`.
    pub released: Vec<SequenceId>,
    /// Set by a stage whose step failed: later stages only apply the tables, and the last one
    /// reports it. The payload is empty then.
    pub failed: Option<Failure>,
    /// Token ids of all positions but the first of every row that wants `Verify`, and of all
    /// positions of those that want `Follow`, in order.
    pub drafts: Vec<u32>,
    /// What each stage so far spent, in order; every stage that computes adds its own.
    pub times: Vec<StageTime>,
}

impl StepMeta {
    /// Positions in all rows.
    pub fn positions(&self) -> usize {
        self.rows.iter().map(|r| r.count as usize).sum()
    }

    /// The drafts of row `index`; empty where it has none.
    pub fn drafts_of(&self, index: usize) -> &[u32] {
        let Some((row, before)) = self.rows.get(..=index).and_then(<[Row]>::split_last) else {
            return &[];
        };
        let first: usize = before.iter().map(Row::drafts).sum();
        self.drafts.get(first..first + row.drafts()).unwrap_or(&[])
    }

    /// Checks what rkyv cannot: counts, limits, that every row says something sensible.
    ///
    /// # Errors
    /// If a row is empty, scores or verifies too much, positions overflow, drafts are missing, or there
    /// are too many embeddings.
    pub fn validate(&self, max_positions: usize) -> Result<(), FrameError> {
        let mut total = 0usize;
        let (mut drafts, mut embeddings) = (0usize, 0usize);
        for row in &self.rows {
            if row.count == 0 || row.position.checked_add(row.count).is_none() {
                return Err(FrameError::Inconsistent(format!(
                    "row of sequence {} has {} positions from {}",
                    row.sequence, row.count, row.position
                )));
            }
            if matches!(row.want, Want::Score { top_k } if top_k > 64 || row.count > 64) {
                return Err(FrameError::Inconsistent(format!(
                    "row of sequence {} scores more than 64 logits or positions",
                    row.sequence
                )));
            }
            if matches!(row.want, Want::Verify | Want::Follow) && row.count > 64 {
                return Err(FrameError::Inconsistent(format!(
                    "row of sequence {} verifies more than 64 positions",
                    row.sequence
                )));
            }
            embeddings += usize::from(matches!(row.want, Want::Embed { .. }));
            drafts += row.drafts();
            total += row.count as usize;
        }
        if embeddings > MAX_EMBEDDINGS {
            return Err(FrameError::Inconsistent(format!(
                "{embeddings} embeddings of a micro-batch, at most {MAX_EMBEDDINGS}"
            )));
        }
        if drafts != self.drafts.len() {
            return Err(FrameError::Inconsistent(format!(
                "{} drafts for rows that verify {drafts}",
                self.drafts.len()
            )));
        }
        if total > max_positions {
            return Err(FrameError::Inconsistent(format!(
                "{total} positions in a micro-batch, the stage allows {max_positions}"
            )));
        }
        Ok(())
    }
}

/// Why something was not computed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Failure {
    /// The stage whose computing failed; `None` where no computing is to blame (a row that asks for
    /// what cannot be, an answer that is missing).
    pub stage: Option<u16>,
    /// For people.
    pub message: String,
}

impl Failure {
    /// Of a stage's computing.
    pub fn of_stage(stage: u16, message: String) -> Self {
        Self { stage: Some(stage), message }
    }
}

impl<T: Into<String>> From<T> for Failure {
    fn from(message: T) -> Self {
        Self { stage: None, message: message.into() }
    }
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum RowOutcome {
    /// Nothing was wanted.
    Done,
    /// A token.
    Token {
        /// The id.
        token: u32,
        /// Where asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// Scores, one per position.
    Scores(Vec<PositionScore>),
    /// This row failed; others of the micro-batch may not have.
    Failed(Failure),
    /// The tokens of a row that verifies: its accepted drafts, and one more.
    Tokens(Vec<ChosenToken>),
    /// An embedding as wide as the model, with a length of 1.
    Embedding(Vec<f32>),
}

/// A token of a row that verifies.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct ChosenToken {
    /// The id.
    pub token: u32,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Result of one row.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct RowResult {
    /// The sequence.
    pub sequence: SequenceId,
    /// Its epoch when the row was issued.
    pub sequence_epoch: u32,
    /// First position of the row.
    pub position: u32,
    /// How many positions.
    pub count: u32,
    /// What became of it.
    pub outcome: RowOutcome,
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}

/// What a stage spent on a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct StageTime {
    /// From the arrival of the frame to the begin of its step, microseconds.
    pub wait_micros: u32,
    /// Inside the step, by the clock on the wall, microseconds.
    pub step_micros: u32,
    /// From the output that was ready at the stage before to the input here, microseconds: framing,
    /// both actors, the network and, where the engine was idle, its wake-up. 0 where nobody knows:
    /// at the first stage, and where the two do not share a clock.
    pub hop_micros: u32,
}

impl StageTime {
    /// From durations; what is too long for the field (an hour and more) is cut off.
    pub fn new(wait: Duration, step: Duration) -> Self {
        Self { wait_micros: micros(wait), step_micros: micros(step), hop_micros: 0 }
    }

    /// The same with a step of this length.
    #[must_use]
    pub fn with_step(self, step: Duration) -> Self {
        Self { step_micros: micros(step), ..self }
    }

    /// The same with the hop to this stage.
    #[must_use]
    pub fn with_hop(self, hop: Option<Duration>) -> Self {
        Self { hop_micros: hop.map_or(0, |d| micros(d).max(1)), ..self }
    }

    /// The hop to this stage, where it is known.
    pub fn hop(&self) -> Option<Duration> {
        (self.hop_micros > 0).then(|| Duration::from_micros(self.hop_micros.into()))
    }

    /// Time in the queue.
    pub fn wait(&self) -> Duration {
        Duration::from_micros(self.wait_micros.into())
    }

    /// Time in the step.
    pub fn step(&self) -> Duration {
        Duration::from_micros(self.step_micros.into())
    }
}

/// Metadata of `Results` frames.
#[derive(Clone, Debug, Default, PartialEq, Archive, Serialize, Deserialize)]
pub struct ResultMeta {
    /// One per row of the step, in order.
    pub rows: Vec<RowResult>,
    /// What each stage spent, in order; empty where one of them failed.
    pub times: Vec<StageTime>,
}

/// A sequence, told to the last stage once, before its first row.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct SequenceOpen {
    /// The sequence.
    pub sequence: SequenceId,
    /// Prompt ids (after a recovery: prompt and everything emitted).
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// How to sample.
    pub params: SamplingParams,
    /// The random stream: `hash(seed, choice)`.
    pub seed: u64,
    /// Every token waits for a [`RowMask`]. (`params` come without their grammar.)
    pub constrained: bool,
}

/// Metadata of `Sequences` frames.
#[derive(Clone, Debug, Default, PartialEq, Archive, Serialize, Deserialize)]
pub struct OpenMeta {
    /// The sequences.
    pub opens: Vec<SequenceOpen>,
}

/// Which tokens may follow one position of a constrained sequence.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct RowMask {
    /// The sequence.
    pub sequence: SequenceId,
    /// The position after which a token is chosen.
    pub position: u32,
    /// The tokens.
    pub allowed: TokenMask,
}

/// Metadata of `Masks` frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct MaskMeta {
    /// At most one for each sequence.
    pub masks: Vec<RowMask>,
}

/// Returned on a stage stream by the receiver: this many more frames may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Credit(pub u32);
