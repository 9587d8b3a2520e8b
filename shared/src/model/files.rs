//! The files of a model, whatever their format: dimensions, tensors under canonical names, and where
//! each lies.
//!
//! Two formats: one GGUF file, or a folder as Hugging Face keeps it. What comes after (hashing, plans,
//! loading) knows no format: a tensor is a range of bytes of one of the files.

use std::path::{Path, PathBuf};

use super::folder::{self, FolderError};
use super::gguf::{Gguf, GgufError, Value};
use super::{ModelConfig, TensorEntry, TensorType};

/// Why there is no model at a path.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// A GGUF file that is not sound.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A folder that is not sound.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

/// What else the files say: tokenizer, chat template, what to call it.
#[derive(Clone, Debug)]
pub enum Description {
    /// In the metadata of the file.
    Gguf(Box<Gguf>),
    /// In JSON files of this folder.
    Folder(PathBuf),
}

impl Description {
    /// Of the model at a path, whose tensors do not matter.
    ///
    /// # Errors
    /// If a GGUF file is not sound.
    pub fn open(path: &Path) -> Result<Self, ModelFileError> {
        Ok(match folder::model_folder(path) {
            Some(folder) => Self::Folder(folder),
            None => Self::Gguf(Box::new(Gguf::open(path)?)),
        })
    }
}

/// The directory of a model.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// Dimensions.
    pub config: ModelConfig,
    /// Tensors under canonical names, by file and place in it.
    pub tensors: Vec<TensorEntry>,
    /// The files with tensors.
    pub paths: Vec<PathBuf>,
    /// The rest.
    pub description: Description,
}

impl ModelFiles {
    /// Reads the directory of the model at a path: a GGUF file, or a folder with `config.json` and
    /// safetensors files (or one of these files).
    ///
    /// # Errors
    /// If it is no sound model of a known family.
    pub fn open(path: &Path) -> Result<Self, ModelFileError> {
        if let Some(folder) = folder::model_folder(path) {
            let (config, tensors, paths) = folder::open(&folder)?;
            let description = Description::Folder(folder);
            return Ok(Self { config, tensors, paths, description });
        }
        let in_file = |e| GgufError::InFile { path: path.to_owned(), source: Box::new(e) };
        Ok(Self::of_gguf(Gguf::open(path)?, path).map_err(in_file)?)
    }

    /// Of a GGUF file whose directory was read.
    ///
    /// # Errors
    /// If it is no sound model of a known family.
    pub fn of_gguf(gguf: Gguf, path: &Path) -> Result<Self, GgufError> {
        let parts = gguf.metadata.get("split.count").and_then(Value::as_u64).unwrap_or(1);
        if parts > 1 {
            return Err(GgufError::BadValue {
                key: "split.count".to_owned(),
                problem: format!(
                    "the model is split into {parts} files, which are not read as one; join them with 'llama-gguf-split --merge FIRST.gguf WHOLE.gguf'"
                ),
            });
        }
        let config = gguf.config()?;
        let mut tensors = gguf.tensors.clone();
        let sparse = super::sparse::with_zeros(&config, &gguf.metadata, &mut tensors)?;
        let tensors = super::split::split(&config, tensors, &sparse)
            .map_err(|(tensor, problem)| GgufError::Tensor { tensor, problem })?;
        let (paths, description) = (vec![path.to_owned()], Description::Gguf(Box::new(gguf)));
        Ok(Self { config, tensors, paths, description })
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// The file that a tensor is in.
    pub fn path_of(&self, tensor: &TensorEntry) -> &Path {
        &self.paths[usize::from(tensor.file)]
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// Checks that the engine has a kernel for each tensor's type.
    ///
    /// # Errors
    /// Names the first tensor with another type.
    pub fn check_supported_types(&self) -> Result<(), GgufError> {
        match self.tensors.iter().find(|t| !t.dtype.is_supported() && !t.is_part()) {
            None => Ok(()),
            Some(t) => Err(GgufError::Tensor {
                tensor: t.name.clone(),
                problem: format!(
                    "type {} is not supported: {}",
                    t.dtype.as_str(),
                    TensorType::advice()
                ),
            }),
        }
    }
}
