//! A model as a list of tensors that are read one at a time, as f32.
//!
//! A GGUF file, or a folder of safetensors that is not quantised. Names are GGUF's. Every value read
//! is checked to be finite, so that no method has to ask. Matrices that the file keeps without their
//! zeros are read with them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use millrace_engine::TensorSource;
use millrace_engine::cpu::dequantise_row;
use millrace_engine::model::Source as EngineSource;
use millrace_engine::quantize::BadWeight;
use millrace_engine::target::io_error;
use millrace_shared::model::gguf::{Gguf, GgufError};
use millrace_shared::model::{
    Description, FolderSource, ModelConfig, ModelFileError, ModelFiles, TensorEntry, TensorType,
    is_sparse,
};

use crate::{CompressError, Matrix};

/// Matrices that stay as they are: they are small, and choose where much else goes.
const KEPT: [&str; 3] =
    ["ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight"];

/// An open model.
#[derive(Debug)]
pub struct Source {
    /// Dimensions.
    pub config: ModelConfig,
    /// As they lie in the files, but with their zeros.
    pub tensors: Vec<TensorEntry>,
    /// Bytes of all tensors in the files.
    pub stored_bytes: u64,
    /// Where it is.
    pub path: PathBuf,
    pub(crate) kind: Kind,
    paths: Vec<PathBuf>,
    files: Vec<File>,
    /// Those that the file keeps without their zeros.
    sparse: HashMap<String, EngineSource>,
}

/// Of which format.
#[derive(Debug)]
pub(crate) enum Kind {
    Gguf(Box<Gguf>),
    Folder(Box<FolderSource>),
}

impl Source {
    /// Reads directories.
    ///
    /// # Errors
    /// If there is no sound model, or a folder's matrices are quantised.
    pub fn open(path: &Path) -> Result<Self, CompressError> {
        let model = ModelFiles::open(path)?;
        let mut sparse = HashMap::new();
        let (kind, tensors, paths) = match &model.description {
            Description::Gguf(gguf) => {
                if is_sparse(&gguf.metadata) {
                    sparse = without_zeros(&model)?;
                }
                let tensors = with_zeros(&gguf.tensors, &sparse);
                (Kind::Gguf(gguf.clone()), tensors, vec![path.to_owned()])
            }
            Description::Folder(folder) => {
                let folder = FolderSource::open(folder).map_err(ModelFileError::from)?;
                if let Some(why) = &folder.fixed {
                    let path = path.display();
                    return Err(CompressError::Settings(format!(
                        "{path} cannot be changed: {why}"
                    )));
                }
                let (tensors, paths) = (folder.tensors.clone(), folder.paths.clone());
                (Kind::Folder(Box::new(folder)), tensors, paths)
            }
        };
        let open = |path: &PathBuf| File::open(path).map_err(io_error("open", path));
        let files = paths.iter().map(open).collect::<Result<_, _>>()?;
        let stored_bytes = match &kind {
            Kind::Gguf(gguf) => gguf.tensors.iter().map(|t| t.bytes).sum(),
            Kind::Folder(_) => tensors.iter().map(|t| t.bytes).sum(),
        };
        let (config, path) = (model.config, path.to_owned());
        Ok(Self { config, tensors, stored_bytes, path, kind, paths, files, sparse })
    }

    /// Bytes of all tensors with their zeros.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, name: &str) -> Result<&TensorEntry, CompressError> {
        let found = self.tensors.iter().find(|t| t.name == name);
        found.ok_or_else(|| CompressError::Settings(format!("the model has no tensor '{name}'")))
    }

    /// The bytes of a tensor as they are.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn bytes(&self, tensor: &TensorEntry) -> Result<Vec<u8>, CompressError> {
        let file = usize::from(tensor.file);
        let mut bytes = vec![0; tensor.bytes as usize];
        if let Some(sparse) = self.sparse.get(&tensor.name) {
            sparse.open()?.read(0, &mut bytes)?;
            return Ok(bytes);
        }
        let read = self.files[file].read_exact_at(&mut bytes, tensor.offset);
        read.map_err(io_error("read", &self.paths[file]))?;
        Ok(bytes)
    }

    /// As [`Source::bytes`], of a tensor that goes into another file as it is: it is looked through.
    ///
    /// # Errors
    /// If it cannot be read, or a value is NaN or infinite. Values of types that are not known here
    /// are not looked at.
    pub(crate) fn copy(&self, tensor: &TensorEntry) -> Result<Vec<u8>, CompressError> {
        let bytes = self.bytes(tensor)?;
        let cols = tensor.dims[0] as usize;
        let row_bytes = row_bytes(tensor.dtype, cols, &tensor.name)?;
        let mut floats = vec![0f32; cols];
        for (row, raw) in bytes.chunks_exact(row_bytes.max(1)).enumerate() {
            if !dequantise_row(tensor.dtype, raw, &mut floats) {
                break;
            }
            finite(tensor, row, &floats)?;
        }
        Ok(bytes)
    }

    /// What of a model keeps it from being computed, if it is a value that is NaN or infinite.
    pub(crate) fn broken(&self) -> Option<CompressError> {
        let bad = |t: &TensorEntry| match self.copy(t) {
            Err(e @ CompressError::Weight { .. }) => Some(e),
            _ => None,
        };
        self.tensors.iter().find_map(bad)
    }

    /// All elements of a tensor of a readable type, as f32; `dims[0]` lie together.
    ///
    /// # Errors
    /// If it cannot be read, or a value is NaN or infinite.
    pub fn floats(&self, tensor: &TensorEntry) -> Result<Vec<f32>, CompressError> {
        let bytes = self.bytes(tensor)?;
        let floats = decode(tensor, &bytes)?;
        let rows = floats.chunks(tensor.dims[0].max(1) as usize).enumerate();
        for (i, row) in rows {
            finite(tensor, i, row)?;
        }
        Ok(floats)
    }

    /// A tensor as a matrix: one of three dimensions has the matrices one below the other.
    ///
    /// # Errors
    /// As [`Source::floats`].
    pub fn matrix(&self, tensor: &TensorEntry) -> Result<Matrix, CompressError> {
        let cols = tensor.dims[0] as usize;
        let rows = tensor.elements() as usize / cols.max(1);
        Ok(Matrix::new(rows, cols, self.floats(tensor)?))
    }

    /// The matrices of a tensor by their names: itself, or, of three dimensions, those of all experts,
    /// each called as it would be by itself (gate and up, where they are one, by both).
    ///
    /// # Errors
    /// As [`Source::floats`].
    pub(crate) fn matrices(
        &self,
        tensor: &TensorEntry,
    ) -> Result<Vec<(String, Matrix)>, CompressError> {
        let names = matrix_names(tensor);
        let matrices = self.matrix(tensor)?.split(names.len());
        Ok(names.into_iter().zip(matrices).collect())
    }

    /// The matrices of layers, those that methods change.
    pub fn layer_matrices(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.iter().filter(|t| is_layer_matrix(t))
    }

    /// The number after `blk.`, if a tensor belongs to a layer.
    pub fn layer_of(name: &str) -> Option<u32> {
        name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
    }

    /// The first tensor of several matrices, but for those of experts: some families' files have such.
    ///
    /// # Errors
    /// As [`Source::files`].
    pub(crate) fn joined(&self) -> Result<Option<&TensorEntry>, CompressError> {
        let apart = self.apart()?;
        let one = |t: &&TensorEntry| apart.contains(&t.name) || t.dims.len() == 3;
        Ok(self.tensors.iter().find(|t| !one(t)))
    }

    /// The names of tensors that are one matrix, or vector.
    ///
    /// # Errors
    /// As [`Source::files`].
    pub(crate) fn apart(&self) -> Result<HashSet<String>, CompressError> {
        let known = self.files()?.tensors;
        let known: HashMap<&str, &[u64]> =
            known.iter().map(|t| (t.name.as_str(), &t.dims[..])).collect();
        // A matrix of one output may be a vector in files.
        let plain = |dims: &[u64]| dims.iter().copied().filter(|n| *n > 1).collect::<Vec<_>>();
        let same =
            |t: &&TensorEntry| known.get(&*t.name).is_some_and(|d| plain(d) == plain(&t.dims));
        let apart = self.tensors.iter().filter(same);
        Ok(apart.map(|t| t.name.clone()).collect())
    }

    /// The directory as the engine reads it.
    ///
    /// # Errors
    /// If the file changed meanwhile.
    pub(crate) fn files(&self) -> Result<ModelFiles, CompressError> {
        match &self.kind {
            Kind::Gguf(gguf) => Ok(ModelFiles::of_gguf((**gguf).clone(), &self.path)?),
            Kind::Folder(_) => Ok(ModelFiles::open(&self.path)?),
        }
    }
}

/// The matrices that a file keeps without their zeros.
fn without_zeros(files: &ModelFiles) -> Result<HashMap<String, EngineSource>, CompressError> {
    let source = |t: &TensorEntry| TensorSource {
        entry: t.clone(),
        path: files.path_of(t).to_owned(),
        offset: t.offset,
    };
    let all: Vec<TensorSource> = files.tensors.iter().map(source).collect();
    let sparse = EngineSource::of_tensors(&all)?.into_iter();
    let sparse = sparse.filter(|s| matches!(s, EngineSource::Sparse(_)));
    Ok(sparse.map(|s| (s.entry().name.clone(), s)).collect())
}

/// A file's tensors as if those had their zeros.
fn with_zeros(tensors: &[TensorEntry], sparse: &HashMap<String, EngineSource>) -> Vec<TensorEntry> {
    let parts = sparse.values().filter_map(EngineSource::tensors).flatten();
    let parts: HashSet<&str> = parts.map(|t| t.name.as_str()).collect();
    let whole = tensors.iter().filter_map(|tensor| match sparse.get(&tensor.name) {
        Some(source) => {
            let dims = source.entry().dims.clone();
            let bytes = tensor.dtype.bytes_of(dims.iter().product()).unwrap_or(0);
            Some(TensorEntry { dims, bytes, ..tensor.clone() })
        }
        None => Some(tensor.clone()).filter(|t| !parts.contains(t.name.as_str())),
    });
    whole.collect()
}

/// What the matrices of a tensor are called.
pub(crate) fn matrix_names(tensor: &TensorEntry) -> Vec<String> {
    match (tensor.dims.get(2), tensor.name.strip_suffix("_exps.weight")) {
        (Some(experts), Some(stem)) => {
            (0..*experts).map(|e| format!("{stem}.{e}.weight")).collect()
        }
        _ => vec![tensor.name.clone()],
    }
}

/// Whether methods change a tensor: a matrix of a layer, but for routers.
pub fn is_layer_matrix(tensor: &TensorEntry) -> bool {
    tensor.dims.len() > 1
        && tensor.name.starts_with("blk.")
        && !KEPT.iter().any(|kept| tensor.name.ends_with(kept))
        && tensor.dtype.is_supported()
}

/// Whether a tensor is the embedding or the output matrix.
pub fn is_head(tensor: &TensorEntry) -> bool {
    tensor.name == "token_embd.weight" || tensor.name == "output.weight"
}

fn finite(tensor: &TensorEntry, row: usize, weights: &[f32]) -> Result<(), CompressError> {
    let Some(column) = weights.iter().position(|x| !x.is_finite()) else { return Ok(()) };
    let source = BadWeight::NotFinite { column, value: weights[column] };
    Err(CompressError::Weight { tensor: tensor.name.clone(), row, source })
}

/// The elements of a tensor from its bytes.
///
/// # Errors
/// If the type cannot be read here.
pub(crate) fn decode(tensor: &TensorEntry, bytes: &[u8]) -> Result<Vec<f32>, CompressError> {
    let cols = tensor.dims[0] as usize;
    let row_bytes = row_bytes(tensor.dtype, cols, &tensor.name)?;
    let mut floats = vec![0f32; tensor.elements() as usize];
    if floats.is_empty() {
        return Ok(floats);
    }
    for (row, out) in bytes.chunks_exact(row_bytes).zip(floats.chunks_exact_mut(cols)) {
        if !dequantise_row(tensor.dtype, row, out) {
            return Err(unreadable(tensor));
        }
    }
    Ok(floats)
}

fn unreadable(tensor: &TensorEntry) -> CompressError {
    let (name, dtype) = (&tensor.name, tensor.dtype.as_str());
    CompressError::Settings(format!("tensor '{name}' has type {dtype}, which cannot be read here"))
}

/// Bytes of a row of `cols` weights.
///
/// # Errors
/// If they do not fill whole blocks.
pub(crate) fn row_bytes(
    dtype: TensorType,
    cols: usize,
    name: &str,
) -> Result<usize, CompressError> {
    let bytes = dtype.bytes_of(cols as u64).ok_or_else(|| {
        let problem = format!("rows of {cols} weights do not fill blocks of {}", dtype.as_str());
        GgufError::Tensor { tensor: name.to_owned(), problem }
    })?;
    Ok(bytes as usize)
}
