//! What each tensor of a model becomes. Pure.

use std::path::{Path, PathBuf};

use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{
    Description, FolderShape, FolderSource, ModelFileError, TensorEntry, TensorType,
    embedding_name, is_sparse,
};

use super::{Options, QuantizeError, Requantise, Rounding, TYPES, default_output};

/// The matrix that makes logits; a model without one uses the embedding.
const OUTPUT: &str = "output.weight";
/// Matrices that are small, and where little changes much: what chooses experts, and positions.
const KEPT: [&str; 3] =
    ["ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight"];
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
    /// The new file up to the first tensor.
    pub(super) head: Vec<u8>,
    /// Its length.
    pub(super) len: u64,
    /// The files that tensors are read from.
    pub(super) sources: Vec<PathBuf>,
    /// Where the source is a folder, so is the copy; with this `config.json`.
    pub(super) folder: Option<(FolderSource, Vec<u8>)>,
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

    /// Whether the copy is a folder.
    pub fn is_folder(&self) -> bool {
        self.folder.is_some()
    }

    /// Every file that the copy depends on.
    pub fn files(&self) -> Vec<PathBuf> {
        let folder = self.folder.as_ref();
        folder.map_or_else(|| self.sources.clone(), |(folder, _)| folder.all_files())
    }

    /// Length of the new file of weights.
    pub fn target_len(&self) -> u64 {
        self.len
    }
}

/// [`plan`] or [`plan_folder`] of the model at a path.
///
/// # Errors
/// Those of both, or if there is no sound model.
pub fn plan_of(source: &Path, options: &Options) -> Result<Plan, QuantizeError> {
    match Description::open(source)? {
        Description::Gguf(gguf) => plan(&gguf, source, options),
        Description::Folder(folder) => plan_folder(&folder, options),
    }
}

/// Decides what each tensor of the GGUF file `source` becomes. Names, order, shapes and metadata stay;
/// `general.file_type` and `general.quantization_version` say what was done.
///
/// # Errors
/// If a wanted type is none of [`TYPES`], or a matrix cannot be converted.
pub fn plan(gguf: &Gguf, source: &Path, options: &Options) -> Result<Plan, QuantizeError> {
    if is_sparse(&gguf.metadata) {
        let why = "its matrices are kept without their zeros; `millrace compress apply IN OUT \
                   'method = \"storage\", form = \"dense\"'` gives them back"
            .to_owned();
        return Err(QuantizeError::Fixed { path: source.to_owned(), why });
    }
    let types = target_types(&gguf.tensors, options)?;
    let mut metadata = gguf.metadata.clone();
    metadata.set("general.file_type", file_type(options.to));
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    let layout = gguf.tensors.iter().zip(types);
    let layout = layout.map(|(t, dtype)| (t.name.clone(), dtype, t.dims.clone()));
    let target = Gguf::lay_out(&metadata, layout)?;
    Ok(Plan {
        tensors: pairs(&gguf.tensors, &target.tensors),
        head: target.head(),
        len: target.file_len,
        sources: vec![source.to_owned()],
        folder: None,
        rounding: options.rounding,
    })
}

/// Decides what each tensor of a folder becomes: the copy is a folder too, with the tokenizer and
/// whatever else belongs to the model. Vectors keep their types.
///
/// # Errors
/// If a wanted type is none of [`TYPES`], the folder is quantised already, or it is no sound model.
pub fn plan_folder(folder: &Path, options: &Options) -> Result<Plan, QuantizeError> {
    let source = FolderSource::open(folder).map_err(ModelFileError::from)?;
    if let Some(why) = &source.fixed {
        return Err(QuantizeError::Fixed { path: folder.to_owned(), why: why.clone() });
    }
    let mut types = target_types(&source.tensors, options)?;
    for (dtype, tensor) in types.iter_mut().zip(&source.tensors) {
        if tensor.dims.len() < 2 {
            *dtype = tensor.dtype;
        }
    }
    let slots = source.tensors.iter().zip(types);
    let slots = slots.map(|(t, dtype)| (t.name.clone(), dtype, t.dims.clone()));
    let failed = |why| QuantizeError::Fixed { path: folder.to_owned(), why };
    let (head, tensors) = source.lay_out(slots).map_err(failed)?;
    let config = source.config(true, &FolderShape::default(), None).map_err(failed)?;
    Ok(Plan {
        len: tensors.last().map_or(head.len() as u64, |t| t.offset + t.bytes),
        tensors: pairs(&source.tensors, &tensors),
        head,
        sources: source.paths.clone(),
        folder: Some((source, config)),
        rounding: options.rounding,
    })
}

fn pairs(from: &[TensorEntry], to: &[TensorEntry]) -> Vec<Planned> {
    let pair =
        |(from, to): (&TensorEntry, &TensorEntry)| Planned { from: from.clone(), to: to.clone() };
    from.iter().zip(to).map(pair).collect()
}

fn target_types(
    tensors: &[TensorEntry],
    options: &Options,
) -> Result<Vec<TensorType>, QuantizeError> {
    let output = options.output.unwrap_or_else(|| default_output(options.to));
    if let Some(wrong) = [options.to, output].into_iter().find(|t| !TYPES.contains(t)) {
        return Err(QuantizeError::Type(wrong));
    }
    let one = |tensor: &TensorEntry| {
        if KEPT.iter().any(|kept| tensor.name.ends_with(kept)) {
            return Ok(tensor.dtype);
        }
        let head = tensor.name == embedding_name() || tensor.name == OUTPUT;
        let wanted = if head { output } else { options.to };
        target_type(tensor, wanted, options.requantise)
    };
    tensors.iter().map(one).collect()
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
        // Of three dimensions: the matrices of all experts.
        2 | 3 => {}
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
