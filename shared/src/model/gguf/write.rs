//! Writes GGUF files (version 3, little-endian).
//!
//! Two ways: [`GgufWriter`] holds a small file in memory; for one of any size, [`Gguf::lay_out`]
//! decides where everything goes, [`Gguf::head`] gives the bytes up to the first tensor, and the
//! caller writes each tensor at its offset, with zeros between. Both give the same bytes.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{self, Write};

use super::value::{Array, Metadata, Value};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, Gguf, GgufError, tensor_bytes};
use crate::model::{TensorEntry, TensorType};

struct Tensor<'a> {
    name: String,
    dtype: TensorType,
    dims: Vec<u64>,
    data: Cow<'a, [u8]>,
}

/// Builds a small GGUF file.
#[derive(Default)]
pub struct GgufWriter<'a> {
    metadata: Metadata,
    tensors: Vec<Tensor<'a>>,
}

impl std::fmt::Debug for GgufWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GgufWriter")
            .field("keys", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key. The alignment is always 32: `general.alignment` is ignored.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        let key = key.into();
        if key != ALIGNMENT_KEY {
            self.metadata.set(key, value);
        }
        self
    }

    /// Adds a tensor with its data as stored; `dims` fastest first.
    ///
    /// # Errors
    /// If the data is not as long as type and shape imply, or the name is taken.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dtype: TensorType,
        dims: &[u64],
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<&mut Self, GgufError> {
        let (name, data) = (name.into(), data.into());
        let bad = |problem: String| GgufError::Tensor { tensor: name.clone(), problem };
        let bytes = tensor_bytes(dtype, dims).map_err(bad)?;
        if bytes != data.len() as u64 {
            return Err(bad(format!("{} bytes given, its shape takes {bytes}", data.len())));
        }
        if self.tensors.iter().any(|t| t.name == name) {
            return Err(bad("the name appears twice".to_owned()));
        }
        self.tensors.push(Tensor { name, dtype, dims: dims.to_vec(), data });
        Ok(self)
    }

    /// The whole file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write_to(&mut out).expect("invariant: writing to memory cannot fail");
        out
    }

    /// Writes the whole file.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_to(&self, mut out: impl Write) -> io::Result<()> {
        let tensors = self.tensors.iter().map(|t| (t.name.clone(), t.dtype, t.dims.clone()));
        let file = Gguf::lay_out(&self.metadata, tensors)
            .expect("invariant: tensors are checked when they are added");
        out.write_all(&file.head())?;
        for t in &self.tensors {
            out.write_all(&t.data)?;
            let fill = t.data.len().next_multiple_of(DEFAULT_ALIGNMENT as usize) - t.data.len();
            out.write_all(&[0u8; DEFAULT_ALIGNMENT as usize][..fill])?;
        }
        out.flush()
    }
}

impl Gguf {
    /// The directory of a file to be written: tensors (name, type, dimensions fastest first) in the
    /// order given, each aligned to 32 bytes; `general.alignment` is left out. `file_len` counts
    /// zeros up to the alignment after the last tensor.
    ///
    /// # Errors
    /// If a tensor's rows do not fill whole blocks of its type, or a name appears twice.
    pub fn lay_out(
        metadata: &Metadata,
        tensors: impl IntoIterator<Item = (String, TensorType, Vec<u64>)>,
    ) -> Result<Self, GgufError> {
        let mut kept = Metadata::default();
        for (key, value) in metadata.iter().filter(|&(key, _)| key != ALIGNMENT_KEY) {
            kept.set(key, value.clone());
        }
        let mut names = BTreeSet::new();
        let mut entries = Vec::new();
        let mut end = 0u64;
        for (name, dtype, dims) in tensors {
            let bad = |problem: String| GgufError::Tensor { tensor: name.clone(), problem };
            let bytes = tensor_bytes(dtype, &dims).map_err(bad)?;
            if !names.insert(name.clone()) {
                return Err(bad("the name appears twice".to_owned()));
            }
            let after =
                end.checked_add(bytes).and_then(|e| e.checked_next_multiple_of(DEFAULT_ALIGNMENT));
            let after = after.ok_or_else(|| bad("the file would be too long".to_owned()))?;
            entries.push(TensorEntry {
                name,
                dtype,
                dims,
                file: 0,
                offset: end,
                bytes,
                hash: [0; 32],
            });
            end = after;
        }
        let mut file =
            Self { version: 3, metadata: kept, tensors: entries, data_offset: 0, file_len: 0 };
        // Offsets have the same length whatever they say.
        file.data_offset = file.head().len() as u64;
        file.file_len = file.data_offset.saturating_add(end);
        for t in &mut file.tensors {
            t.offset += file.data_offset;
        }
        Ok(file)
    }

    /// The first `data_offset` bytes of the file that [`Gguf::lay_out`] decided on: the directory,
    /// and zeros up to the first tensor.
    pub fn head(&self) -> Vec<u8> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_str(&mut head, key);
            head.extend(value.type_number().to_le_bytes());
            put_value(&mut head, value);
        }
        for t in &self.tensors {
            put_str(&mut head, &t.name);
            head.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| head.extend(d.to_le_bytes()));
            head.extend((t.dtype as u32).to_le_bytes());
            head.extend((t.offset - self.data_offset).to_le_bytes());
        }
        pad(&mut head);
        head
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::Str(v) => put_str(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.type_number().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(v) => v.iter().for_each(|x| out.push(u8::from(*x))),
        Array::Str(v) => v.iter().for_each(|x| put_str(out, x)),
        Array::Nested(v) => v.iter().for_each(|x| put_array(out, x)),
        Array::U64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}
