//! Matrices without their zeros, as GGUF files keep them.
//!
//! The tensor `NAME.weight` holds what is not zero, two more say where it lies, and two keys of the
//! metadata name the matrices and their shapes. All go through a matrix row by row:
//!
//! | form | `NAME.weight` | what lies where |
//! |---|---|---|
//! | csr | values `[n]` | `NAME.columns` `[n]`, `NAME.row_starts` `[rows + 1]` |
//! | bitmask | values `[n]` | `NAME.bitmask` `[columns / 8, rows]`, lowest bit first, and `NAME.row_starts` |
//! | tiles | rows of tiles `[width, n]` | `NAME.tile_columns`, `NAME.tile_starts` `[rows / 16 + 1]` |
//!
//! Values have any type of floats; tiles have any type, since 16 rows of a tile are blocks of it. Starts
//! are I32, columns I16 where that suffices.

use std::collections::{HashMap, HashSet};

use super::gguf::{Array, GgufError, Metadata, Value};
use super::{ModelConfig, TensorEntry, TensorType};

/// The key with the names of sparse matrices.
pub const SPARSE_TENSORS: &str = "millrace.sparse.tensors";
/// The key with their shapes: inputs and outputs of each.
pub const SPARSE_SHAPES: &str = "millrace.sparse.shapes";
/// Rows of a tile.
pub const TILE_ROWS: u64 = 16;

/// How zeros are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SparseForm {
    /// A column for each value.
    Csr,
    /// A bit for each weight.
    Bitmask,
    /// Whole tiles: 16 rows of one block, or of 32 columns where blocks are shorter.
    Tiles,
}

impl SparseForm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Csr, Self::Bitmask, Self::Tiles];

    /// As recipes and tables spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Csr => "csr",
            Self::Bitmask => "bitmask",
            Self::Tiles => "tiles",
        }
    }

    /// Ends of the names of the two other tensors: where values lie, and where rows begin.
    pub fn parts(self) -> [&'static str; 2] {
        match self {
            Self::Csr => ["columns", "row_starts"],
            Self::Bitmask => ["bitmask", "row_starts"],
            Self::Tiles => ["tile_columns", "tile_starts"],
        }
    }

    /// Columns of a tile of that type; 1 for the other forms.
    pub fn width(self, dtype: TensorType) -> u64 {
        match self {
            Self::Tiles => dtype.block_elements().max(32),
            _ => 1,
        }
    }

    /// The form of the matrix `NAME.weight`, by what else there is.
    pub fn of(name: &str, has: impl Fn(&str) -> bool) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.is_of(name, &has))
    }

    fn is_of(self, name: &str, has: impl Fn(&str) -> bool) -> bool {
        let stem = name.strip_suffix("weight");
        stem.is_some_and(|stem| has(&format!("{stem}{}", self.parts()[0])))
    }

    /// Type and dimensions of the tensors of a matrix `[columns, rows]`, of which `kept` values (or
    /// tiles, of `tile_rows` rows in all) are there: what is kept, where it lies, where rows begin.
    pub fn shapes(
        self,
        dtype: TensorType,
        [columns, rows]: [u64; 2],
        (kept, tile_rows): (u64, u64),
    ) -> [(TensorType, Vec<u64>); 3] {
        let index = |places: u64| if places <= 1 << 15 { TensorType::I16 } else { TensorType::I32 };
        let starts = |rows: u64| (TensorType::I32, vec![rows + 1]);
        match self {
            Self::Csr => [(dtype, vec![kept]), (index(columns), vec![kept]), starts(rows)],
            Self::Bitmask => {
                let mask = (TensorType::I8, vec![columns.div_ceil(8), rows]);
                [(dtype, vec![kept]), mask, starts(rows)]
            }
            Self::Tiles => {
                let width = self.width(dtype);
                let places = (index(columns / width), vec![kept]);
                [(dtype, vec![width, tile_rows]), places, starts(rows.div_ceil(TILE_ROWS))]
            }
        }
    }
}

/// Which matrices among some tensors are kept without their zeros, and how.
#[derive(Clone, Debug)]
pub struct SparseForms<'a>(HashSet<&'a str>);

impl<'a> SparseForms<'a> {
    /// Of all tensors of a model, or of a stage.
    pub fn of_tensors(tensors: impl IntoIterator<Item = &'a TensorEntry>) -> Self {
        let parts = tensors.into_iter().filter(|t| t.is_part());
        Self(parts.map(|t| t.name.as_str()).collect())
    }

    /// How a tensor is kept; `None` with its zeros.
    pub fn of(&self, tensor: &TensorEntry) -> Option<SparseForm> {
        SparseForm::of(&tensor.name, |part| self.0.contains(part))
    }
}

/// What of a matrix is kept.
#[derive(Clone, Debug)]
pub struct Places {
    form: SparseForm,
    dtype: TensorType,
    shape: [u64; 2],
    /// Columns (of tiles) of each row (of tiles), ascending.
    rows: Vec<Vec<u32>>,
}

impl Places {
    /// Of a matrix `[columns, rows]` whose rows lie one after the other; `zero` says whether bytes of one
    /// row, as wide as [`SparseForm::width`], are zeros alone. Something is always kept. `None` where the
    /// form has nothing for the type or the width.
    ///
    /// # Panics
    /// If there are not as many bytes as the shape says.
    pub fn find(
        form: SparseForm,
        dtype: TensorType,
        shape: [u64; 2],
        bytes: &[u8],
        zero: impl Fn(&[u8]) -> bool,
    ) -> Option<Self> {
        let [columns, rows] = shape;
        let width = form.width(dtype);
        let single = width == 1;
        if !columns.is_multiple_of(width) || (single && !dtype.is_float()) {
            return None;
        }
        let (line, row_bytes) =
            (dtype.bytes_of(width)? as usize, dtype.bytes_of(columns)? as usize);
        assert_eq!(bytes.len(), row_bytes * rows as usize, "bytes of a matrix");
        let height = if single { 1 } else { TILE_ROWS as usize };
        let there = |tile_row: &[u8], column: usize| {
            tile_row.chunks_exact(row_bytes).any(|row| !zero(&row[column * line..][..line]))
        };
        let kept = |tile_row: &[u8]| -> Vec<u32> {
            let columns = 0..(columns / width) as usize;
            columns.filter(|&c| there(tile_row, c)).map(|c| c as u32).collect()
        };
        let mut rows: Vec<Vec<u32>> = bytes.chunks(height * row_bytes).map(kept).collect();
        if rows.iter().all(Vec::is_empty) {
            rows.first_mut()?.push(0);
        }
        Some(Self { form, dtype, shape, rows })
    }

    /// Type and dimensions of the three tensors.
    pub fn shapes(&self) -> [(TensorType, Vec<u64>); 3] {
        let kept = self.rows.iter().map(|r| r.len() as u64).sum();
        let rows = self.rows.iter().enumerate().map(|(i, r)| self.height(i) * r.len() as u64);
        self.form.shapes(self.dtype, self.shape, (kept, rows.sum()))
    }

    /// Bytes of the three tensors.
    pub fn bytes(&self) -> u64 {
        let of = |(dtype, dims): &(TensorType, Vec<u64>)| {
            dtype.bytes_of(dims.iter().product()).unwrap_or(u64::MAX)
        };
        self.shapes().iter().map(of).fold(0, u64::saturating_add)
    }

    /// Rows of the matrix in row `i` of tiles.
    fn height(&self, i: usize) -> u64 {
        match self.form {
            SparseForm::Tiles => (self.shape[1] - i as u64 * TILE_ROWS).min(TILE_ROWS),
            _ => 1,
        }
    }

    /// The three tensors of the matrix that they were found in; `None` where its starts do not fit I32.
    pub fn encode(&self, bytes: &[u8]) -> Option<[Vec<u8>; 3]> {
        let [columns, _] = self.shape;
        let line = self.dtype.bytes_of(self.form.width(self.dtype))? as usize;
        let row_bytes = self.dtype.bytes_of(columns)? as usize;
        let [_, (index_type, _), _] = self.shapes();
        let (mut values, mut index) = (Vec::new(), Vec::new());
        let mut starts = 0i32.to_le_bytes().to_vec();
        let (mut first, mut kept) = (0, 0i32);
        for (i, places) in self.rows.iter().enumerate() {
            let height = self.height(i) as usize;
            let rows = &bytes[first..first + height * row_bytes];
            first += rows.len();
            for &place in places {
                let part = |row: &'_ [u8]| row[place as usize * line..][..line].to_vec();
                rows.chunks_exact(row_bytes).for_each(|row| values.extend(part(row)));
            }
            match (self.form, index_type) {
                (SparseForm::Bitmask, _) => {
                    let mut mask = vec![0u8; columns.div_ceil(8) as usize];
                    places.iter().for_each(|&c| mask[c as usize / 8] |= 1 << (c % 8));
                    index.extend(mask);
                }
                (_, TensorType::I16) => {
                    places.iter().for_each(|&c| index.extend((c as u16).to_le_bytes()));
                }
                _ => places.iter().for_each(|&c| index.extend(c.to_le_bytes())),
            }
            kept = kept.checked_add(i32::try_from(places.len()).ok()?)?;
            starts.extend(kept.to_le_bytes());
        }
        Some([values, index, starts])
    }
}

/// What the metadata says of sparse matrices `[columns, rows]`.
pub fn sparse_keys(matrices: &[(String, [u64; 2])]) -> [(&'static str, Value); 2] {
    let names: Vec<String> = matrices.iter().map(|(name, _)| name.clone()).collect();
    let shapes: Vec<u64> = matrices.iter().flat_map(|(_, shape)| *shape).collect();
    [
        (SPARSE_TENSORS, Value::Array(Array::Str(names))),
        (SPARSE_SHAPES, Value::Array(Array::U64(shapes))),
    ]
}

/// Whether a file says that it has any.
pub fn is_sparse(metadata: &Metadata) -> bool {
    metadata.get(SPARSE_TENSORS).is_some()
}

/// Names that the parts of sparse matrices may have.
pub(super) fn sparse_parts(metadata: &Metadata) -> HashSet<String> {
    let Some(Value::Array(Array::Str(names))) = metadata.get(SPARSE_TENSORS) else {
        return HashSet::new();
    };
    let stems = names.iter().filter_map(|name| name.strip_suffix("weight"));
    let ends = SparseForm::ALL.iter().flat_map(|form| form.parts());
    stems.flat_map(|stem| ends.clone().map(move |end| format!("{stem}{end}"))).collect()
}

/// Gives sparse matrices the shapes that they have with their zeros; their names.
///
/// # Errors
/// If keys or tensors do not fit each other, or the family's matrices do not lie row by row.
pub(super) fn with_zeros(
    config: &ModelConfig,
    metadata: &Metadata,
    tensors: &mut [TensorEntry],
) -> Result<HashSet<String>, GgufError> {
    let (names, shapes) = match (metadata.get(SPARSE_TENSORS), metadata.get(SPARSE_SHAPES)) {
        (None, None) => return Ok(HashSet::new()),
        (Some(Value::Array(Array::Str(names))), Some(Value::Array(Array::U64(shapes))))
            if shapes.len() == 2 * names.len() =>
        {
            (names, shapes)
        }
        _ => {
            return Err(GgufError::BadValue {
                key: SPARSE_TENSORS.to_owned(),
                problem: format!(
                    "it is to be an array of names, and '{SPARSE_SHAPES}' one of two u64 for each"
                ),
            });
        }
    };
    let places: HashMap<String, usize> =
        tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    let matrices: HashMap<String, [u64; 2]> = config.layer_matrices().into_iter().collect();
    let mut parts = sparse_parts(metadata);
    for (name, shape) in names.iter().zip(shapes.as_chunks::<2>().0) {
        let bad = |problem: String| GgufError::Tensor { tensor: name.clone(), problem };
        let whole = config.features.transposed || !name.starts_with("blk.");
        // Of one form alone.
        let mut forms = SparseForm::ALL
            .into_iter()
            .filter(|form| form.is_of(name, |part| places.contains_key(part)));
        let form = forms.next().filter(|_| !whole && forms.next().is_none());
        let (Some(&at), Some(form)) = (places.get(name), form) else {
            return Err(bad("it cannot be a matrix without its zeros".to_owned()));
        };
        let find = |part: &str| {
            let stem = name.strip_suffix("weight").unwrap_or(name);
            let part = format!("{stem}{part}");
            let found = places.get(&part).map(|&i| &tensors[i]);
            found.ok_or_else(|| bad(format!("there is no '{part}' beside it")))
        };
        // Nobody allocates by what a file says alone.
        if !can_be(&matrices, name, *shape) {
            return Err(bad(format!("no matrix of the model has the shape {shape:?}")));
        }
        let [index, starts] = form.parts();
        check(form, *shape, [&tensors[at], find(index)?, find(starts)?]).map_err(|part| {
            bad(format!("'{part}' does not fit its shape {shape:?} as {}", form.as_str()))
        })?;
        parts.remove(&find(index)?.name);
        parts.remove(&find(starts)?.name);
        tensors[at].dims = shape.to_vec();
    }
    match tensors.iter().find(|t| parts.contains(&t.name)) {
        None => {}
        Some(stray) => {
            let problem = "its matrix is kept in another form".to_owned();
            return Err(GgufError::Tensor { tensor: stray.name.clone(), problem });
        }
    }
    Ok(names.iter().cloned().collect())
}

/// Whether the model has a matrix of that name and shape, `[columns, rows]`: whole, or a factor of no
/// more than its columns' rank.
fn can_be(matrices: &HashMap<String, [u64; 2]>, name: &str, [columns, rows]: [u64; 2]) -> bool {
    let stem = name.strip_prefix("blk.").and_then(|name| name.split_once('.'));
    let Some(stem) = stem.and_then(|(_, name)| name.strip_suffix(".weight")) else { return false };
    match stem.strip_suffix("_in") {
        Some(first) => matrices.get(first).is_some_and(|m| columns == m[0] && rows <= m[0]),
        None => matrices.get(stem).is_some_and(|m| columns <= m[0] && rows == m[1]),
    }
}

/// Whether the tensors of a matrix have shapes that fit each other; else the name of one that does not.
fn check(form: SparseForm, shape: [u64; 2], parts: [&TensorEntry; 3]) -> Result<(), String> {
    let [values, index, _] = parts;
    let (dtype, [columns, rows]) = (values.dtype, shape);
    let kept = match form {
        SparseForm::Bitmask => values.elements(),
        _ => index.elements(),
    };
    let all = columns.checked_mul(rows).filter(|&n| n < 1 << 40);
    if all.is_none_or(|all| all == 0 || kept > all) {
        return Err(values.name.clone());
    }
    let tile_rows = values.dims.get(1).copied().unwrap_or(0);
    let tiles = form == SparseForm::Tiles;
    let fits = !tiles || {
        // Of the last row of tiles all are lower by as much; how many there are is seen when they are read.
        let lower = rows.next_multiple_of(TILE_ROWS) - rows;
        let width = form.width(dtype);
        let missing = kept.saturating_mul(TILE_ROWS).checked_sub(tile_rows);
        columns.is_multiple_of(width)
            && missing.is_some_and(|missing| match lower {
                0 => missing == 0,
                _ => missing.is_multiple_of(lower) && missing / lower <= columns / width,
            })
    };
    if !fits || !(dtype.is_float() || tiles && dtype.is_supported()) {
        return Err(values.name.clone());
    }
    let expected = form.shapes(dtype, shape, (kept, tile_rows));
    for (part, (dtype, dims)) in parts.into_iter().zip(expected) {
        if part.dtype != dtype || part.dims != dims {
            return Err(part.name.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, (dtype, dims): (TensorType, Vec<u64>)) -> TensorEntry {
        let bytes = dtype.bytes_of(dims.iter().product()).unwrap();
        TensorEntry { name: name.to_owned(), dtype, dims, file: 0, offset: 0, bytes, hash: [0; 32] }
    }

    #[test]
    fn parts_fit_or_are_named() {
        for (form, dtype) in [
            (SparseForm::Csr, TensorType::F16),
            (SparseForm::Bitmask, TensorType::F32),
            (SparseForm::Tiles, TensorType::Q8_0),
            (SparseForm::Tiles, TensorType::Q4_K),
        ] {
            let shape = [512, 40];
            let shapes = form.shapes(dtype, shape, (3, 3 * 16 - 8));
            let [index, starts] = form.parts();
            let mut parts: Vec<TensorEntry> = ["weight", index, starts]
                .into_iter()
                .zip(shapes)
                .map(|(end, shape)| entry(&format!("blk.0.ffn_up.{end}"), shape))
                .collect();
            let checked =
                |parts: &[TensorEntry]| check(form, shape, [&parts[0], &parts[1], &parts[2]]);
            checked(&parts).unwrap();
            let has = |name: &str| parts.iter().any(|p| p.name == name);
            assert_eq!(SparseForm::of("blk.0.ffn_up.weight", has), Some(form));
            assert_eq!(SparseForm::of("blk.0.ffn_down.weight", has), None);
            assert!(parts[1].is_part() && parts[2].is_part() && !parts[0].is_part());
            for i in 1..3 {
                let good = parts[i].dims.clone();
                parts[i].dims[0] -= 1;
                assert!(checked(&parts).is_err(), "{form:?} part {i}");
                parts[i].dims = good;
            }
            parts[0].dtype = TensorType::I64;
            assert!(checked(&parts).is_err(), "{form:?} of another type");
        }
    }
}
