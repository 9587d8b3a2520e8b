//! Writes a model tensor by tensor, in any order, into a [`Target`]: what was there stays until
//! [`Sink::finish`].

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use millrace_engine::target::{Target, TargetError, io_error, named, parent};
use millrace_shared::model::gguf::{Gguf, Metadata, Value};
use millrace_shared::model::{
    FolderShape, FolderSource, SPARSE_SHAPES, SPARSE_TENSORS, TensorEntry, TensorType,
};

use crate::source::Kind;
use crate::{CompressError, Source};

/// A tensor to be written: name, type, dimensions (fastest first).
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// GGUF's name.
    pub name: String,
    /// Type.
    pub dtype: TensorType,
    /// Dimensions.
    pub dims: Vec<u64>,
}

impl Slot {
    /// As a tensor is.
    pub fn like(tensor: &TensorEntry) -> Self {
        let (name, dtype, dims) = (tensor.name.clone(), tensor.dtype, tensor.dims.clone());
        Self { name, dtype, dims }
    }

    /// As it is, of another type.
    pub fn of_type(tensor: &TensorEntry, dtype: TensorType) -> Self {
        Self { dtype, ..Self::like(tensor) }
    }
}

/// A model that is being written.
#[derive(Debug)]
pub struct Sink {
    target: Target,
    entries: Vec<TensorEntry>,
    written: Vec<bool>,
    len: u64,
}

/// What else is different in a model: whatever its format, or keys of GGUF files.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Dimensions.
    pub shape: FolderShape,
    /// Keys of GGUF's metadata.
    pub keys: Vec<(&'static str, Value)>,
}

impl Sink {
    /// Makes room for these tensors, and writes everything but them.
    ///
    /// # Errors
    /// If the target is there and may not be replaced or is the source, the disk is too small, the
    /// tensors cannot be laid out, or a change cannot be made.
    pub fn create(
        source: &Source,
        path: &Path,
        overwrite: bool,
        slots: &[Slot],
        changes: &Changes,
    ) -> Result<Self, CompressError> {
        let (target, head, entries, len) = match &source.kind {
            Kind::Gguf(gguf) => {
                let (head, entries, len) = lay_out(&gguf.metadata, slots, changes)?;
                (Target::file(&source.path, path, overwrite, len)?, head, entries, len)
            }
            Kind::Folder(folder) => {
                let (head, entries, len) = lay_out_folder(folder, slots)?;
                let own = is_own(slots);
                let floats = (!own).then(|| most_floats(slots)).flatten();
                let config = folder.config(own, &changes.shape, floats);
                let config = config.map_err(CompressError::Settings)?;
                let ours = (overwrite, &is_model as &dyn Fn(&Path) -> bool);
                let target = Target::folder(folder, path, ours, &config, len)?;
                (target, head, entries, len)
            }
        };
        target.weights().write_all_at(&head, 0).map_err(io_error("write", path))?;
        let written = vec![false; entries.len()];
        Ok(Self { target, entries, written, len })
    }

    /// Writes the bytes of tensor `index` of those given.
    ///
    /// # Errors
    /// If the disk is full.
    ///
    /// # Panics
    /// If there are not as many bytes as the tensor takes.
    pub fn put(&mut self, index: usize, bytes: &[u8]) -> Result<(), CompressError> {
        let entry = &self.entries[index];
        assert_eq!(bytes.len() as u64, entry.bytes, "bytes of {}", entry.name);
        let written = self.target.weights().write_all_at(bytes, entry.offset);
        written.map_err(io_error("write", self.target.path()))?;
        self.written[index] = true;
        Ok(())
    }

    /// Gives the model its name, once all of it is on the disk; the bytes of its weights' file.
    ///
    /// # Errors
    /// If a tensor is missing, or the disk is full.
    pub fn finish(self) -> Result<u64, CompressError> {
        if let Some(missing) = self.written.iter().position(|w| !w) {
            let name = &self.entries[missing].name;
            return Err(CompressError::Settings(format!("tensor '{name}' was not written")));
        }
        let sized = self.target.weights().set_len(self.len);
        sized.map_err(io_error("write", self.target.path()))?;
        self.target.finish()?;
        Ok(self.len)
    }
}

/// A model's folder: one that has nothing else in it, which would go with it.
fn is_model(folder: &Path) -> bool {
    let inner = |entry: std::io::Result<fs::DirEntry>| entry.is_ok_and(|e| e.path().is_dir());
    folder.join(FolderSource::config_name()).is_file()
        && !fs::read_dir(folder).is_ok_and(|mut all| all.any(inner))
}

/// Before any work: whether a model made of `source` can be put at `path`. A file takes the place of a
/// file alone, a folder that of a model's folder alone, and nothing that of the source.
///
/// # Errors
/// Says which of these it is, or that the folder it is to lie in is not there.
pub(crate) fn check_target(
    source: &Path,
    path: &Path,
    overwrite: bool,
) -> Result<(), CompressError> {
    let path = &*named(path)?;
    let refused = |why: &str| {
        let path = path.display();
        Err(CompressError::Settings(format!("{path} {why}: give the result another name")))
    };
    let folder = parent(path);
    if !folder.is_dir() {
        let folder = folder.display();
        return Err(CompressError::Settings(format!("there is no folder {folder}: make it first")));
    }
    let Ok(there) = fs::metadata(path) else { return Ok(()) };
    let own = fs::metadata(source).map_err(io_error("read", source))?;
    if (own.dev(), own.ino()) == (there.dev(), there.ino()) {
        return Err(TargetError::SameFile(path.to_owned()).into());
    }
    let whole = |path: &Path| path.canonicalize().map_err(io_error("read", path));
    if whole(source)?.starts_with(whole(path)?) {
        return refused("has the model in it that is to be read");
    }
    match (own.is_dir(), there.is_dir()) {
        (false, true) => return refused("is a folder, which a file does not replace"),
        (true, false) => return refused("is no folder, and a folder does not replace it"),
        (true, true) if !is_model(path) => {
            return refused("is a folder without a model, or with more, which is not replaced");
        }
        (false, false) if !there.is_file() => return refused("is no ordinary file"),
        _ => {}
    }
    if overwrite { Ok(()) } else { Err(TargetError::Exists(path.to_owned()).into()) }
}

/// The file up to the first tensor, where tensors lie, and its length.
type Layout = (Vec<u8>, Vec<TensorEntry>, u64);

fn lay_out(
    metadata: &Metadata,
    slots: &[Slot],
    changes: &Changes,
) -> Result<Layout, CompressError> {
    let mut metadata = metadata.clone();
    // What is written has its zeros, unless the changes say otherwise.
    metadata.remove(&[SPARSE_TENSORS, SPARSE_SHAPES]);
    for (key, value) in &changes.keys {
        metadata.set(*key, value.clone());
    }
    if !changes.shape.dimensions.is_empty() {
        let Some(Value::Str(arch)) = metadata.get("general.architecture").cloned() else {
            return Err(CompressError::settings("the file does not name its architecture"));
        };
        for (key, n) in &changes.shape.dimensions {
            let key = format!("{arch}.{key}");
            if let Some(Value::Array(_)) = metadata.get(&key) {
                return Err(CompressError::Settings(format!(
                    "'{key}' differs from layer to layer"
                )));
            }
            metadata.set(key, *n);
        }
    }
    metadata.set("general.quantization_version", 2u32);
    metadata.set("general.file_type", file_type(slots));
    let tensors = slots.iter().map(|s| (s.name.clone(), s.dtype, s.dims.clone()));
    let file = Gguf::lay_out(&metadata, tensors)?;
    Ok((file.head(), file.tensors, file.file_len))
}

/// llama.cpp's number for a file whose weights mostly have one type (`llama_ftype`).
fn file_type(slots: &[Slot]) -> u32 {
    const KNOWN: [(TensorType, u32); 8] = [
        (TensorType::F16, 1),
        (TensorType::Q4_0, 2),
        (TensorType::Q4_1, 3),
        (TensorType::Q8_0, 7),
        (TensorType::Q5_0, 8),
        (TensorType::Q4_K, 14),
        (TensorType::Q6_K, 18),
        (TensorType::BF16, 32),
    ];
    let weights = |dtype: TensorType| -> u64 {
        let of_type = slots.iter().filter(|s| s.dtype == dtype);
        of_type.map(|s| s.dims.iter().product::<u64>()).sum()
    };
    let most = KNOWN.iter().max_by_key(|(dtype, _)| weights(*dtype));
    most.filter(|(dtype, _)| weights(*dtype) > weights(TensorType::F32)).map_or(0, |(_, n)| *n)
}

fn lay_out_folder(folder: &FolderSource, slots: &[Slot]) -> Result<Layout, CompressError> {
    let slots = slots.iter().map(|s| (s.name.clone(), s.dtype, s.dims.clone()));
    let (head, entries) = folder.lay_out(slots).map_err(CompressError::Settings)?;
    let len = entries.last().map_or(head.len() as u64, |t| t.offset + t.bytes);
    Ok((head, entries, len))
}

/// The type of floats that most weights have: libraries read all as the one that is stated.
fn most_floats(slots: &[Slot]) -> Option<TensorType> {
    let weights = |dtype: &TensorType| -> u64 {
        let of_type = slots.iter().filter(|s| s.dtype == *dtype);
        of_type.map(|s| s.dims.iter().product::<u64>()).sum()
    };
    [TensorType::F32, TensorType::F16, TensorType::BF16].into_iter().max_by_key(weights)
}

/// Whether only this engine reads a folder with these tensors; any library reads matrices of floats.
fn is_own(slots: &[Slot]) -> bool {
    !slots.iter().all(|s| s.dtype.is_float() && !s.name.ends_with("_in.weight"))
}
