//! What each tensor of a model becomes. Pure.

use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{TensorEntry, TensorType, embedding_name};

use super::{Options, QuantizeError, Requantise, Rounding, TYPES, default_output};

/// The matrix that makes logits; a model without one uses the embedding.
const OUTPUT: &str = "output.weight";
/// What readers of GGUF expect beside quantised tensors.
const QUANTIZATION_VERSION: u32 = 2;

/// A tensor and what it becomes.
#[derive(Clone, Debug)]
pub struct Planned {
    /// As it is in the source.
    pub from: TensorEntry,
    /// As it will be.
    pub to: TensorEntry,
}

impl Planned {
    /// Whether its bytes are copied.
    pub fn is_copy(&self) -> bool {
        self.from.dtype == self.to.dtype
    }
}

/// What a model becomes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In file order.
    pub tensors: Vec<Planned>,
    /// The directory of the new file.
    pub(super) target: Gguf,
    pub(super) rounding: Rounding,
}

impl Plan {
    /// Matrices that change.
    pub fn changed(&self) -> usize {
        self.tensors.iter().filter(|t| t.from.dims.len() > 1 && !t.is_copy()).count()
    }

    /// Bytes of the source's tensors: what [`Plan::write`] counts its progress against.
    pub fn source_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.from.bytes).sum()
    }

    /// Length of the new file.
    pub fn target_len(&self) -> u64 {
        self.target.file_len
    }
}

/// Decides what each tensor of `source` becomes. Names, order, shapes and metadata stay;
/// `general.file_type` and `general.quantization_version` say what was done.
///
/// # Errors
/// If a wanted type is none of [`TYPES`], or a matrix cannot be converted.
pub fn plan(source: &Gguf, options: &Options) -> Result<Plan, QuantizeError> {
    let output = options.output.unwrap_or_else(|| default_output(options.to));
    if let Some(wrong) = [options.to, output].into_iter().find(|t| !TYPES.contains(t)) {
        return Err(QuantizeError::Type(wrong));
    }
    let mut types = Vec::new();
    for tensor in &source.tensors {
        let head = tensor.name == embedding_name() || tensor.name == OUTPUT;
        let wanted = if head { output } else { options.to };
        types.push(target_type(tensor, wanted, options.requantise)?);
    }
    let mut metadata = source.metadata.clone();
    metadata.set("general.file_type", file_type(options.to));
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    let layout = source.tensors.iter().zip(types);
    let layout = layout.map(|(t, dtype)| (t.name.clone(), dtype, t.dims.clone()));
    let target = Gguf::lay_out(&metadata, layout)?;
    let pairs = source.tensors.iter().zip(&target.tensors);
    let tensors = pairs.map(|(from, to)| Planned { from: from.clone(), to: to.clone() }).collect();
    Ok(Plan { tensors, target, rounding: options.rounding })
}

fn target_type(
    tensor: &TensorEntry,
    wanted: TensorType,
    requantise: Requantise,
) -> Result<TensorType, QuantizeError> {
    use TensorType::{BF16, F16, F32, F64, I8, I16, I32, I64};
    let dtype = tensor.dtype;
    match tensor.dims.len() {
        1 if matches!(dtype, F16 | BF16) => return Ok(F32),
        2 => {}
        _ => return Ok(dtype),
    }
    let fits = tensor.dims[0].is_multiple_of(wanted.block_elements());
    if dtype == wanted || !fits || matches!(dtype, F64 | I8 | I16 | I32 | I64) {
        return Ok(dtype);
    }
    if matches!(dtype, F32 | F16 | BF16) {
        return Ok(wanted);
    }
    let tensor = || tensor.name.escape_debug().take(80).collect();
    match requantise {
        Requantise::Refuse => Err(QuantizeError::Quantised { tensor: tensor(), dtype }),
        Requantise::Leave => Ok(dtype),
        Requantise::Allow if dtype.is_supported() => Ok(wanted),
        Requantise::Allow => Err(QuantizeError::Unreadable { tensor: tensor(), dtype }),
    }
}

/// llama.cpp's number for a file whose matrices mostly have this type (`llama_ftype`).
fn file_type(dtype: TensorType) -> u32 {
    match dtype {
        TensorType::F16 => 1,
        TensorType::Q4_0 => 2,
        TensorType::Q4_1 => 3,
        TensorType::Q8_0 => 7,
        TensorType::BF16 => 32,
        _ => 0,
    }
}
