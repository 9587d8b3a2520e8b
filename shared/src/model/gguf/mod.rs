//! The directory of a GGUF file: metadata and the list of tensors; never the tensors' data.
//!
//! Files are untrusted. Every count, length and offset is checked against the length of the file
//! and against plain limits before memory is allocated for it; a file that passes has tensors that
//! lie inside the file, behind the directory, aligned, in whole blocks, and apart from each other.
//! What the tensors must look like for a model is the engine's business; [`Gguf::config`] only
//! derives and checks the dimensions.

mod config;
mod error;
mod magic;
mod reader;
mod rope;
mod value;
mod write;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

pub use config::gemma_scale;
pub use error::GgufError;
pub use value::{Array, Metadata, Value};
pub use write::GgufWriter;

use self::reader::Reader;
use super::{TensorEntry, TensorType};

/// Most keys.
const MAX_KEYS: u64 = 1 << 16;
/// Most tensors.
const MAX_TENSORS: u64 = 1 << 17;
/// Most dimensions of a tensor (ggml's own limit).
const MAX_DIMS: u32 = 4;
/// Alignment where the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The key that names another one.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Largest alignment.
const MAX_ALIGNMENT: u64 = 1 << 16;

/// The directory of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values in file order.
    pub metadata: Metadata,
    /// Tensors in file order; offsets count from the first byte of the file.
    pub tensors: Vec<TensorEntry>,
    /// Where the tensors' data begins.
    pub data_offset: u64,
    /// Length of the file.
    pub file_len: u64,
}

impl Gguf {
    /// Reads the directory of a file.
    ///
    /// # Errors
    /// If the file cannot be read or is not a sound GGUF file; the error names the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let read = || {
            let io = |source| GgufError::Io { at: 0, source };
            let file = File::open(path).map_err(io)?;
            let meta = file.metadata().map_err(io)?;
            if meta.is_dir() {
                return Err(io(std::io::ErrorKind::IsADirectory.into()));
            }
            Self::read(BufReader::with_capacity(1 << 18, file), meta.len())
        };
        read().map_err(|e| GgufError::InFile { path: path.to_owned(), source: Box::new(e) })
    }

    /// Reads the directory from the first bytes of a file that is `file_len` bytes long. Reads
    /// many small pieces: wrap a file in a `BufReader`.
    ///
    /// # Errors
    /// If it is not a sound GGUF file.
    pub fn read(mut source: impl Read, file_len: u64) -> Result<Self, GgufError> {
        check_magic(&mut source, file_len)?;
        let mut r = Reader::new(source, 4, file_len);
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            if matches!(version.swap_bytes(), 2 | 3) {
                return Err(r.malformed("the file is big-endian; convert it to little-endian"));
            }
            return Err(GgufError::Version(version));
        }
        let tensor_count = r.u64()?;
        let key_count = r.u64()?;
        r.limit("number of tensors", tensor_count, MAX_TENSORS)?;
        r.limit("number of keys", key_count, MAX_KEYS)?;
        r.what = format!("the directory of {key_count} keys and {tensor_count} tensors");
        // A key takes at least 13 bytes, a tensor 32.
        r.need(13 * key_count + 32 * tensor_count)?;

        let metadata = read_metadata(&mut r, key_count)?;
        let alignment = alignment(&metadata)?;
        let mut tensors = read_tensors(&mut r, tensor_count)?;
        let data_offset = r.at.next_multiple_of(alignment);
        place_tensors(&mut tensors, data_offset, alignment, file_len)?;
        Ok(Self { version, metadata, tensors, data_offset, file_len })
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name)
    }

    fn wrong_type(key: &str, found: &Value, expected: &'static str) -> GgufError {
        GgufError::WrongType { key: key.to_owned(), found: found.type_name(), expected }
    }

    /// A string, `None` where the key is absent.
    ///
    /// # Errors
    /// If the key has another type.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(v) => Err(Self::wrong_type(key, v, "a string")),
        }
    }

    /// A non-negative integer of any width that fits, `None` where the key is absent.
    ///
    /// # Errors
    /// If the key has another type or does not fit.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let Some(v) = self.metadata.get(key) else { return Ok(None) };
        let n = v.as_u64().ok_or_else(|| Self::wrong_type(key, v, "a non-negative integer"))?;
        let n = n.try_into().map_err(|_| GgufError::BadValue {
            key: key.to_owned(),
            problem: format!("{n} does not fit into 32 bits"),
        })?;
        Ok(Some(n))
    }

    /// A float, `None` where the key is absent.
    ///
    /// # Errors
    /// If the key has another type.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        let Some(v) = self.metadata.get(key) else { return Ok(None) };
        v.as_f32().map(Some).ok_or_else(|| Self::wrong_type(key, v, "a float"))
    }

    /// A bool, `None` where the key is absent.
    ///
    /// # Errors
    /// If the key has another type.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(v) => Err(Self::wrong_type(key, v, "a bool")),
        }
    }

    /// An array of strings, `None` where the key is absent.
    ///
    /// # Errors
    /// If the key has another type.
    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Str(v))) => Ok(Some(v)),
            Some(v) => Err(Self::wrong_type(key, v, "an array of strings")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// If the key is absent or has another type.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.opt_str(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// If the key is absent, has another type or does not fit.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.opt_u32(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
    }

    /// A float.
    ///
    /// # Errors
    /// If the key is absent or has another type.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.opt_f32(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
    }

    /// An array of strings.
    ///
    /// # Errors
    /// If the key is absent or has another type.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        self.opt_strings(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
    }
}

fn check_magic(source: &mut impl Read, file_len: u64) -> Result<(), GgufError> {
    let io = |source| GgufError::Io { at: 0, source };
    let mut head = Vec::new();
    source.take(4.min(file_len)).read_to_end(&mut head).map_err(io)?;
    if head == b"GGUF" {
        return Ok(());
    }
    source.take(60).read_to_end(&mut head).map_err(io)?;
    Err(GgufError::Magic { looks_like: magic::looks_like(&head) })
}

fn read_metadata<R: Read>(r: &mut Reader<R>, count: u64) -> Result<Metadata, GgufError> {
    let mut metadata = Metadata::default();
    for i in 0..count {
        r.what = format!("the name of key {} of {count}", i + 1);
        let key = r.name()?;
        r.what = format!("key '{}'", clip(&key));
        let value = r.value()?;
        metadata
            .insert(key, value)
            .map_err(|key| r.malformed(format!("key '{}' appears twice", clip(&key))))?;
    }
    Ok(metadata)
}

/// Names are untrusted too: an error shows at most 80 characters of one.
fn clip(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    const KEY: &str = ALIGNMENT_KEY;
    let Some(v) = metadata.get(KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    match v.as_u64() {
        Some(n) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n),
        Some(n) => Err(GgufError::BadValue {
            key: KEY.to_owned(),
            problem: format!("{n} is not a power of two up to {MAX_ALIGNMENT}"),
        }),
        None => Err(Gguf::wrong_type(KEY, v, "a non-negative integer")),
    }
}

/// Reads the entries; their offsets still count from the start of the data.
fn read_tensors<R: Read>(r: &mut Reader<R>, count: u64) -> Result<Vec<TensorEntry>, GgufError> {
    let mut tensors = Vec::new();
    let mut names = BTreeSet::new();
    for i in 0..count {
        r.what = format!("the name of tensor {} of {count}", i + 1);
        let name = r.name()?;
        r.what = format!("tensor '{}'", clip(&name));
        let rank = r.u32()?;
        if rank == 0 || rank > MAX_DIMS {
            return Err(r.malformed(format!("{rank} dimensions; 1 to {MAX_DIMS} are possible")));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.push(r.u64()?);
        }
        let kind = r.u32()?;
        let offset = r.u64()?;
        let bad = |problem: String| GgufError::Tensor { tensor: clip(&name), problem };
        let dtype = TensorType::from_ggml(kind)
            .ok_or_else(|| bad(format!("unknown ggml type number {kind}")))?;
        let bytes = tensor_bytes(dtype, &dims).map_err(bad)?;
        if !names.insert(name.clone()) {
            return Err(bad("the name appears twice".to_owned()));
        }
        tensors.push(TensorEntry { name, dtype, dims, file: 0, offset, bytes, hash: [0; 32] });
    }
    Ok(tensors)
}

/// Bytes of a tensor whose rows (first dimension) fill whole blocks.
pub(super) fn tensor_bytes(dtype: TensorType, dims: &[u64]) -> Result<u64, String> {
    if dims.contains(&0) {
        return Err(format!("shape {dims:?} has no elements"));
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let elements = elements.ok_or_else(|| format!("shape {dims:?} overflows"))?;
    if dims.first().is_some_and(|d| !d.is_multiple_of(dtype.block_elements())) {
        return Err(format!(
            "rows of {} elements are no multiple of the {} elements of a {} block",
            dims[0],
            dtype.block_elements(),
            dtype.as_str()
        ));
    }
    dtype.bytes_of(elements).ok_or_else(|| format!("shape {dims:?} overflows"))
}

/// Turns offsets into file offsets, and checks that tensors are aligned, inside the file, apart.
fn place_tensors(
    tensors: &mut [TensorEntry],
    data_offset: u64,
    alignment: u64,
    file_len: u64,
) -> Result<(), GgufError> {
    for t in tensors.iter_mut() {
        let bad = |problem: String| GgufError::Tensor { tensor: clip(&t.name), problem };
        if !t.offset.is_multiple_of(alignment) {
            return Err(bad(format!("offset {} is not aligned to {alignment} bytes", t.offset)));
        }
        let start = data_offset.checked_add(t.offset);
        let end = start.and_then(|s| s.checked_add(t.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => t.offset = start,
            _ => {
                return Err(bad(format!(
                    "its {} bytes at offset {} of the data (which begins at byte {data_offset}) end outside the file of {file_len} bytes; the file is truncated or damaged",
                    t.bytes, t.offset
                )));
            }
        }
    }
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].bytes > pair[1].offset {
            return Err(GgufError::Tensor {
                tensor: clip(&pair[1].name),
                problem: format!("it overlaps tensor '{}'", clip(&pair[0].name)),
            });
        }
    }
    Ok(())
}
