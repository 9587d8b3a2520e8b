//! Payloads as the engine takes them: token ids, or f32 whatever the wire carries.
//!
//! The engine rounds activations to the wire's type at every layer boundary, cut or not, so the
//! conversions here lose nothing. A value that does not fit (f16 ends at 65,504) is an error.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use millrace_shared::model::Dtype;
use millrace_shared::wire::data::FrameError;
use millrace_shared::wire::frame::Frame;

use crate::seam::{StageInput, StepError};

/// The payload of a checked frame. `scratch` is used where the wire carries 16 bits.
pub(super) fn read<'a>(
    frame: &'a Frame,
    tokens: bool,
    dtype: Dtype,
    scratch: &'a mut [f32],
) -> Result<StageInput<'a>, FrameError> {
    if tokens {
        return Ok(StageInput::Tokens(frame.payload_u32()?));
    }
    let values = frame.payload().len() / dtype.bytes();
    match dtype {
        Dtype::F16 => {
            cast::<f16>(frame.payload())?.convert_to_f32_slice(&mut scratch[..values]);
        }
        Dtype::Bf16 => {
            cast::<bf16>(frame.payload())?.convert_to_f32_slice(&mut scratch[..values]);
        }
        Dtype::F32 | Dtype::U32 | Dtype::Int8 => {
            return Ok(StageInput::Hidden(frame.payload_f32()?));
        }
    }
    Ok(StageInput::Hidden(&scratch[..values]))
}

/// Writes 16-bit activations.
///
/// # Errors
/// If a value does not fit.
pub(super) fn write(values: &[f32], dtype: Dtype, payload: &mut [u8]) -> Result<(), StepError> {
    let too_large = |at: usize| {
        StepError::Invalid(format!(
            "activation {} does not fit {}; use --activation-dtype f32 or bf16",
            values[at],
            dtype.as_str()
        ))
    };
    match dtype {
        Dtype::F16 => {
            let out = cast_mut::<f16>(payload).map_err(|e| StepError::Invalid(e.to_string()))?;
            out.convert_from_f32_slice(values);
            out.iter().position(|x| !x.is_finite()).map_or(Ok(()), |at| Err(too_large(at)))
        }
        _ => {
            let out = cast_mut::<bf16>(payload).map_err(|e| StepError::Invalid(e.to_string()))?;
            out.convert_from_f32_slice(values);
            out.iter().position(|x| !x.is_finite()).map_or(Ok(()), |at| Err(too_large(at)))
        }
    }
}

/// A payload that the engine writes directly.
pub(super) fn as_f32_mut(payload: &mut [u8]) -> Result<&mut [f32], FrameError> {
    cast_mut(payload)
}

fn cast<T: bytemuck::Pod>(bytes: &[u8]) -> Result<&[T], FrameError> {
    bytemuck::try_cast_slice(bytes).map_err(|e| FrameError::Inconsistent(e.to_string()))
}

fn cast_mut<T: bytemuck::Pod>(bytes: &mut [u8]) -> Result<&mut [T], FrameError> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| FrameError::Inconsistent(e.to_string()))
}
