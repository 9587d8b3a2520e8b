//! Primitive reads from an untrusted file: every length is checked against what is left of the file
//! and against a limit before memory is taken for it, and every error says where it happened.

use std::io::Read;

use super::GgufError;
use super::value::{Array, TYPE_NAMES, Value};

/// Longest key.
const MAX_KEY_BYTES: u64 = 65_535;
/// Longest string value (chat templates are the long ones).
const MAX_STRING_BYTES: u64 = 16 << 20;
/// Longest array (vocabularies have a few hundred thousand entries).
const MAX_ARRAY: u64 = 16 << 20;
/// Deepest nesting of arrays.
const MAX_NESTING: u32 = 4;
/// Longest directory (metadata and tensor entries) before the data.
const MAX_DIRECTORY_BYTES: u64 = 512 << 20;
/// Strings up to this many bytes are allocated at once, longer ones grow with what is really read.
const EAGER_BYTES: u64 = 64 << 10;

/// Counts bytes, and knows what is being read.
pub(super) struct Reader<R> {
    inner: R,
    pub(super) at: u64,
    file_len: u64,
    /// For errors: `key 'x'`, `tensor 3 of 7`.
    pub(super) what: String,
}

macro_rules! primitive {
    ($($name:ident: $t:ty),*) => { $(
        pub(super) fn $name(&mut self) -> Result<$t, GgufError> {
            let mut b = [0u8; size_of::<$t>()];
            self.fill(&mut b)?;
            Ok(<$t>::from_le_bytes(b))
        }
    )* };
}

macro_rules! array {
    ($self:ident, $count:ident, $variant:ident, $read:ident) => {{
        let mut v = Vec::new();
        for _ in 0..$count {
            v.push($self.$read()?);
        }
        Array::$variant(v)
    }};
}

impl<R: Read> Reader<R> {
    pub(super) fn new(inner: R, at: u64, file_len: u64) -> Self {
        Self { inner, at, file_len, what: "the header".to_owned() }
    }

    pub(super) fn left(&self) -> u64 {
        self.file_len.saturating_sub(self.at)
    }

    pub(super) fn malformed(&self, problem: impl Into<String>) -> GgufError {
        GgufError::Malformed { what: self.what.clone(), at: self.at, problem: problem.into() }
    }

    /// Fails unless `bytes` more are in the file and in the directory's limit.
    pub(super) fn need(&self, bytes: u64) -> Result<(), GgufError> {
        if bytes > self.left() {
            return Err(self.truncated(bytes));
        }
        let end = self.at.saturating_add(bytes);
        self.limit("end of the directory", end, MAX_DIRECTORY_BYTES)
    }

    pub(super) fn limit(
        &self,
        field: &'static str,
        value: u64,
        limit: u64,
    ) -> Result<(), GgufError> {
        if value <= limit {
            return Ok(());
        }
        Err(GgufError::Limit { what: self.what.clone(), field, value, limit })
    }

    fn truncated(&self, needed: u64) -> GgufError {
        GgufError::Truncated { at: self.at, what: self.what.clone(), needed, left: self.left() }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), GgufError> {
        let n = buf.len() as u64;
        self.need(n)?;
        self.inner.read_exact(buf).map_err(|e| self.io(e, n))?;
        self.at += n;
        Ok(())
    }

    fn io(&self, source: std::io::Error, needed: u64) -> GgufError {
        if source.kind() == std::io::ErrorKind::UnexpectedEof {
            // The file is shorter than its length promised: it changed meanwhile.
            return GgufError::Truncated { at: self.at, what: self.what.clone(), needed, left: 0 };
        }
        GgufError::Io { at: self.at, source }
    }

    primitive!(u8: u8, i8: i8, u16: u16, i16: i16, u32: u32, i32: i32, f32: f32, u64: u64,
        i64: i64, f64: f64);

    fn bool(&mut self) -> Result<bool, GgufError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            n => Err(self.malformed(format!("a bool must be 0 or 1, found {n}"))),
        }
    }

    fn bounded_string(&mut self, field: &'static str, limit: u64) -> Result<String, GgufError> {
        let n = self.u64()?;
        self.need(n)?;
        self.limit(field, n, limit)?;
        let mut bytes;
        if n <= EAGER_BYTES {
            bytes = vec![0; n as usize];
            self.inner.read_exact(&mut bytes).map_err(|e| self.io(e, n))?;
        } else {
            bytes = Vec::new();
            let got = (&mut self.inner).take(n).read_to_end(&mut bytes);
            let got = got.map_err(|e| self.io(e, n))? as u64;
            if got < n {
                return Err(self.io(std::io::ErrorKind::UnexpectedEof.into(), n));
            }
        }
        let text = String::from_utf8(bytes)
            .map_err(|e| self.malformed(format!("string is not valid UTF-8: {e}")))?;
        self.at += n;
        Ok(text)
    }

    /// A key or a tensor name.
    pub(super) fn name(&mut self) -> Result<String, GgufError> {
        self.bounded_string("length of the name", MAX_KEY_BYTES)
    }

    fn string(&mut self) -> Result<String, GgufError> {
        self.bounded_string("length of the string", MAX_STRING_BYTES)
    }

    /// A value with its type before it.
    pub(super) fn value(&mut self) -> Result<Value, GgufError> {
        Ok(match self.u32()? {
            0 => Value::U8(self.u8()?),
            1 => Value::I8(self.i8()?),
            2 => Value::U16(self.u16()?),
            3 => Value::I16(self.i16()?),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(self.i32()?),
            6 => Value::F32(self.f32()?),
            7 => Value::Bool(self.bool()?),
            8 => Value::Str(self.string()?),
            9 => Value::Array(self.array(1)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(self.i64()?),
            12 => Value::F64(self.f64()?),
            n => return Err(self.malformed(format!("unknown value type {n}"))),
        })
    }

    fn array(&mut self, depth: u32) -> Result<Array, GgufError> {
        if depth > MAX_NESTING {
            return Err(self.malformed(format!("arrays nest deeper than {MAX_NESTING}")));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        // Fewest bytes that one element takes in the file, by type.
        const LEAST: [u64; TYPE_NAMES.len()] = [1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8];
        let Some(least) = LEAST.get(kind as usize) else {
            return Err(self.malformed(format!("unknown type {kind} of array elements")));
        };
        self.need(count.saturating_mul(*least))?;
        self.limit("length of the array", count, MAX_ARRAY)?;
        Ok(match kind {
            0 => array!(self, count, U8, u8),
            1 => array!(self, count, I8, i8),
            2 => array!(self, count, U16, u16),
            3 => array!(self, count, I16, i16),
            4 => array!(self, count, U32, u32),
            5 => array!(self, count, I32, i32),
            6 => array!(self, count, F32, f32),
            7 => array!(self, count, Bool, bool),
            8 => array!(self, count, Str, string),
            9 => {
                let mut v = Vec::new();
                for _ in 0..count {
                    v.push(self.array(depth + 1)?);
                }
                Array::Nested(v)
            }
            10 => array!(self, count, U64, u64),
            11 => array!(self, count, I64, i64),
            _ => array!(self, count, F64, f64),
        })
    }
}
