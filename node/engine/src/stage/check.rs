//! What a neighbour may have got wrong, found before the engine sees the frame.

use millrace_shared::model::Dtype;
use millrace_shared::wire::data::{FrameKind, StepMeta};
use millrace_shared::wire::frame::Frame;

use super::StageError;
use crate::seam::StageSpec;

/// Checks kind, dtype, counts, block ids, payload length and token ids of a frame for this stage.
///
/// # Errors
/// Names the first thing that is wrong.
pub(super) fn step(spec: &StageSpec, frame: &Frame) -> Result<StepMeta, StageError> {
    let header = frame.header();
    let (kind, dtype, width) = if spec.embed {
        (FrameKind::Step, Dtype::U32, 1)
    } else {
        let dtype = spec.settings.activation_dtype;
        (FrameKind::Activations, dtype, spec.config.hidden as usize)
    };
    if header.kind != kind {
        return mismatch(format!("this stage takes {kind:?} frames, got {:?}", header.kind));
    }
    let meta: StepMeta = frame.meta()?;
    meta.validate(spec.settings.max_batch_tokens as usize)?;
    tables(spec, &meta)?;
    if meta.failed.is_some() {
        if !frame.payload().is_empty() {
            return mismatch("a failed step has no payload".to_owned());
        }
        return Ok(meta);
    }
    if header.dtype != dtype {
        return mismatch(format!(
            "payload of type {}, this stage takes {}",
            header.dtype.as_str(),
            dtype.as_str()
        ));
    }
    let expected = meta.positions() * width * dtype.bytes();
    if frame.payload().len() != expected {
        return mismatch(format!(
            "payload of {} bytes, {} positions take {expected}",
            frame.payload().len(),
            meta.positions()
        ));
    }
    if spec.embed {
        let vocab = spec.config.vocab;
        if let Some(id) = frame.payload_u32()?.iter().find(|&&id| id >= vocab) {
            return mismatch(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
    }
    Ok(meta)
}

fn tables(spec: &StageSpec, meta: &StepMeta) -> Result<(), StageError> {
    let blocks = spec.settings.kv_blocks;
    for update in &meta.tables {
        let end = u64::from(update.first) + update.blocks.len() as u64;
        if end > u64::from(blocks) {
            return mismatch(format!(
                "block table of sequence {} would have {end} blocks, the stage has {blocks}",
                update.sequence
            ));
        }
        if let Some(id) = update.blocks.iter().find(|&&id| id >= blocks) {
            return mismatch(format!(
                "sequence {} was given block {id}, the stage has {blocks}",
                update.sequence
            ));
        }
    }
    let limit = spec.settings.max_model_len;
    match meta.rows.iter().find(|row| row.position + row.count > limit) {
        Some(row) => mismatch(format!(
            "sequence {} would have {} positions, the limit is {limit}",
            row.sequence,
            row.position + row.count
        )),
        None => Ok(()),
    }
}

fn mismatch<T>(message: String) -> Result<T, StageError> {
    Err(StageError::Mismatch(message))
}
