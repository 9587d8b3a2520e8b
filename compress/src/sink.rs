//! Writes a model tensor by tensor, in any order, into a file that has another name until it is whole.
//!
//! What was at the target stays there until [`Sink::finish`]: a full disk, an error or a kill leave
//! it alone, and what was written goes away.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use millrace_shared::model::gguf::{Gguf, Metadata, Value};
use millrace_shared::model::{FolderSource, TensorEntry, TensorType};
use tempfile::{NamedTempFile, TempDir};

use crate::error::io_error;
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
    part: Part,
    target: PathBuf,
    entries: Vec<TensorEntry>,
    written: Vec<bool>,
    overwrite: bool,
    len: u64,
}

#[derive(Debug)]
enum Part {
    File(NamedTempFile),
    Folder(TempDir, File),
}

impl Sink {
    /// Makes room for these tensors, and writes everything but them. `changes` to metadata are made
    /// in GGUF files; a folder keeps its shapes.
    ///
    /// # Errors
    /// If the target is there and may not be replaced or is the source, the disk is too small, or the
    /// tensors cannot be laid out.
    pub fn create(
        source: &Source,
        target: &Path,
        overwrite: bool,
        slots: &[Slot],
        changes: &[(&str, Value)],
    ) -> Result<Self, CompressError> {
        check_target(&source.path, target, overwrite)?;
        let parent = match target.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let (head, entries, len) = match &source.kind {
            Kind::Gguf(gguf) => lay_out(&gguf.metadata, slots, changes)?,
            Kind::Folder(folder) => lay_out_folder(folder, slots, changes)?,
        };
        check_space(parent, len)?;
        let mut builder = tempfile::Builder::new();
        builder.suffix(".part");
        let part = match &source.kind {
            Kind::Gguf(_) => {
                builder.permissions(fs::Permissions::from_mode(0o644));
                let file = builder.tempfile_in(parent);
                Part::File(file.map_err(io_error("make a file in", parent))?)
            }
            Kind::Folder(folder) => {
                builder.permissions(fs::Permissions::from_mode(0o755));
                let made =
                    builder.tempdir_in(parent).map_err(io_error("make a folder in", parent))?;
                let file = begin_folder(folder, made.path(), slots)?;
                Part::Folder(made, file)
            }
        };
        let written = vec![false; entries.len()];
        let sink = Self { part, target: target.to_owned(), entries, written, overwrite, len };
        sink.file().write_all_at(&head, 0).map_err(io_error("write", target))?;
        Ok(sink)
    }

    fn file(&self) -> &File {
        match &self.part {
            Part::File(file) => file.as_file(),
            Part::Folder(_, file) => file,
        }
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
        let written = self.file().write_all_at(bytes, entry.offset);
        written.map_err(io_error("write", &self.target))?;
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
        let (len, target) = (self.len, &self.target);
        let file = self.file();
        let sized = file.set_len(len).and_then(|()| file.sync_all());
        sized.map_err(io_error("write", target))?;
        match self.part {
            Part::File(file) => {
                let kept = if self.overwrite {
                    file.persist(target)
                } else {
                    file.persist_noclobber(target)
                };
                match kept {
                    Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => {
                        return Err(CompressError::Exists(target.clone()));
                    }
                    kept => kept.map_err(|e| io_error("write", target)(e.error))?,
                };
            }
            Part::Folder(made, _) => {
                if target.exists() {
                    fs::remove_dir_all(target).map_err(io_error("replace", target))?;
                }
                fs::rename(made.path(), target).map_err(io_error("write", target))?;
                let _ = made.keep();
            }
        }
        // A folder that cannot be synced is not worth failing for.
        let parent = match target.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let _ = File::open(parent).and_then(|f| f.sync_all());
        Ok(len)
    }
}

/// The file up to the first tensor, where tensors lie, and its length.
type Layout = (Vec<u8>, Vec<TensorEntry>, u64);

fn lay_out(
    metadata: &Metadata,
    slots: &[Slot],
    changes: &[(&str, Value)],
) -> Result<Layout, CompressError> {
    let mut metadata = metadata.clone();
    for (key, value) in changes {
        metadata.set(*key, value.clone());
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

fn lay_out_folder(
    folder: &FolderSource,
    slots: &[Slot],
    changes: &[(&str, Value)],
) -> Result<Layout, CompressError> {
    let same = slots.len() == folder.tensors.len()
        && slots.iter().zip(&folder.tensors).all(|(s, t)| s.dims == t.dims && s.name == t.name);
    if !same || !changes.is_empty() {
        return Err(CompressError::settings(
            "steps that change the shape of a model need a GGUF file: convert the folder first",
        ));
    }
    let types: Vec<TensorType> = slots.iter().map(|s| s.dtype).collect();
    let (head, entries) = folder.lay_out(&types);
    let len = entries.last().map_or(head.len() as u64, |t| t.offset + t.bytes);
    Ok((head, entries, len))
}

fn begin_folder(folder: &FolderSource, to: &Path, slots: &[Slot]) -> Result<File, CompressError> {
    for path in &folder.others {
        let name = path.file_name().unwrap_or_default();
        fs::copy(path, to.join(name)).map_err(io_error("copy", path))?;
    }
    let config = to.join(FolderSource::config_name());
    let floats = |s: &Slot| matches!(s.dtype, TensorType::F32 | TensorType::F16 | TensorType::BF16);
    let mut bytes = folder.config.clone();
    if slots.iter().all(floats) {
        // Other libraries read it like any folder of floats.
        let mut json: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|e| CompressError::Settings(format!("config.json: {e}")))?;
        if let Some(map) = json.as_object_mut() {
            map.remove("quantization_config");
        }
        bytes = serde_json::to_vec_pretty(&json).expect("invariant: JSON can be written");
    }
    fs::write(&config, &bytes).map_err(io_error("write", &config))?;
    let weights = to.join(FolderSource::weights_name());
    File::create_new(&weights).map_err(io_error("write", &weights))
}

fn check_target(source: &Path, target: &Path, overwrite: bool) -> Result<(), CompressError> {
    let Ok(there) = fs::metadata(target) else { return Ok(()) };
    let own = fs::metadata(source).map_err(io_error("read", source))?;
    if (own.dev(), own.ino()) == (there.dev(), there.ino()) {
        let path = target.display();
        return Err(CompressError::Settings(format!(
            "{path} would be read and written at once: give the result another name"
        )));
    }
    if !overwrite || (there.is_dir() && !target.join(FolderSource::config_name()).is_file()) {
        return Err(CompressError::Exists(target.to_owned()));
    }
    Ok(())
}

fn check_space(folder: &Path, needed: u64) -> Result<(), CompressError> {
    // Where the file system does not say, writing will.
    let Ok(stat) = nix::sys::statvfs::statvfs(folder) else { return Ok(()) };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if free >= needed {
        return Ok(());
    }
    Err(CompressError::NoSpace { folder: folder.to_owned(), free, needed })
}
