//! Every method at two settings, on one model: what `millrace compress table` prints.
//!
//! Each variant is written to a folder for temporary files, judged, and removed, so the disk holds one
//! at a time. A variant that cannot be made is told with its reason, and the others go on.

use std::path::Path;

use millrace_shared::model::TensorType;

use crate::apply::{Settings, apply};
use crate::compare::{Entry, Terms, judge};
use crate::judge::Judge;
use crate::{CompressError, Source, Step};

/// A name and the steps that make it.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What it is called.
    pub name: String,
    /// One or more.
    pub steps: Vec<Step>,
}

/// Name and steps, as TOML.
const VARIANTS: &[(&str, &[&str])] = &[
    ("same weights, float activations", &["method = 'quantise', type = 'f32', output = 'f32'"]),
    ("q8_0", &["method = 'quantise', type = 'q8_0'"]),
    ("q6_k", &["method = 'quantise', type = 'q6_k'"]),
    ("q6_k imatrix", &["method = 'quantise', type = 'q6_k', importance = true"]),
    ("q4_k", &["method = 'quantise', type = 'q4_k'"]),
    ("q4_k imatrix", &["method = 'quantise', type = 'q4_k', importance = true"]),
    ("q4_1", &["method = 'quantise', type = 'q4_1'"]),
    ("q4_1 imatrix", &["method = 'quantise', type = 'q4_1', importance = true"]),
    ("q4_0", &["method = 'quantise', type = 'q4_0'"]),
    ("q4_0 imatrix", &["method = 'quantise', type = 'q4_0', importance = true"]),
    ("q4_0 gptq", &["method = 'quantise', type = 'q4_0', gptq = true"]),
    ("q4_k gptq", &["method = 'quantise', type = 'q4_k', gptq = true"]),
    ("mixed 90 MB", &["method = 'mixed', bytes = 90000000"]),
    ("mixed 110 MB", &["method = 'mixed', bytes = 110000000"]),
    ("int8 row", &["method = 'int8'"]),
    ("int8 tensor", &["method = 'int8', per = 'tensor'"]),
    ("int8 row affine", &["method = 'int8', affine = true"]),
    ("int8 tensor affine", &["method = 'int8', per = 'tensor', affine = true"]),
    ("fixed 8.6 saturate", &["method = 'fixed-point', bits = 8, fraction_bits = 6"]),
    ("fixed 8.6 wrap", &["method = 'fixed-point', bits = 8, fraction_bits = 6, wrap = true"]),
    ("fixed 8.8 saturate", &["method = 'fixed-point', bits = 8, fraction_bits = 8"]),
    ("fixed 8.8 wrap", &["method = 'fixed-point', bits = 8, fraction_bits = 8, wrap = true"]),
    ("binary", &["method = 'binary'"]),
    ("magnitude 20 %", &["method = 'magnitude', sparsity = 0.2"]),
    ("magnitude 50 %", &["method = 'magnitude', sparsity = 0.5"]),
    ("magnitude global 50 %", &["method = 'magnitude', sparsity = 0.5, global = true"]),
    ("magnitude > 0.05", &["method = 'magnitude', threshold = 0.05"]),
    ("magnitude > 0.1", &["method = 'magnitude', threshold = 0.1"]),
    ("signed > 0", &["method = 'signed-threshold', theta = 0.0"]),
    ("signed > -0.1", &["method = 'signed-threshold', theta = -0.1"]),
    ("clip 0.25", &["method = 'clip', min = -0.25, max = 0.25"]),
    ("clip 0.5", &["method = 'clip', min = -0.5, max = 0.5"]),
    ("random 5 %", &["method = 'random', sparsity = 0.05, seed = 1"]),
    ("random 50 %", &["method = 'random', sparsity = 0.5, seed = 1"]),
    ("wanda 20 %", &["method = 'wanda', sparsity = 0.2"]),
    ("wanda 50 %", &["method = 'wanda', sparsity = 0.5"]),
    ("sparsegpt 20 %", &["method = 'sparsegpt', sparsity = 0.2"]),
    ("sparsegpt 50 %", &["method = 'sparsegpt', sparsity = 0.5"]),
    ("magnitude 2:4", &["method = 'magnitude', sparsity = 0.5, pattern = '2:4'"]),
    ("wanda 2:4", &["method = 'wanda', sparsity = 0.5, pattern = '2:4'"]),
    ("sparsegpt 2:4", &["method = 'sparsegpt', sparsity = 0.5, pattern = '2:4'"]),
    ("wanda blocks 20 %", &["method = 'wanda', sparsity = 0.2, pattern = 'block'"]),
    ("wanda blocks 50 %", &["method = 'wanda', sparsity = 0.5, pattern = 'block'"]),
    ("svd 80 %", &["method = 'low-rank', size = 0.8"]),
    ("svd 50 %", &["method = 'low-rank', size = 0.5"]),
    ("svd aware 80 %", &["method = 'low-rank', size = 0.8, aware = true"]),
    ("svd aware 50 %", &["method = 'low-rank', size = 0.5, aware = true"]),
    ("drop 2 layers", &["method = 'drop-layers', count = 2"]),
    ("drop 6 layers", &["method = 'drop-layers', count = 6"]),
    ("merge 2 pairs", &["method = 'merge-layers', count = 2"]),
    ("merge 6 pairs", &["method = 'merge-layers', count = 6"]),
    ("drop 1 KV head", &["method = 'drop-heads', count = 1"]),
    ("drop 10 % channels", &["method = 'drop-channels', fraction = 0.1"]),
    ("drop 30 % channels", &["method = 'drop-channels', fraction = 0.3"]),
    ("width 512", &["method = 'width', hidden = 512"]),
    ("width 384", &["method = 'width', hidden = 384"]),
    (
        "wanda 20 % + q4_k gptq",
        &["method = 'wanda', sparsity = 0.2", "method = 'quantise', type = 'q4_k', gptq = true"],
    ),
];

/// All variants whose names contain a word; all of them without.
///
/// # Errors
/// If none does.
pub fn variants(only: Option<&str>) -> Result<Vec<Variant>, CompressError> {
    let mut found = Vec::new();
    for (name, steps) in VARIANTS.iter().filter(|v| only.is_none_or(|word| v.0.contains(word))) {
        let steps = steps.iter().map(|s| Step::parse(s)).collect::<Result<_, _>>()?;
        found.push(Variant { name: (*name).to_owned(), steps });
    }
    match found.is_empty() {
        true => Err(CompressError::settings("no method has that in its name")),
        false => Ok(found),
    }
}

/// Makes and judges variants of a model; the model itself comes first, and once more with a KV cache of
/// eight bits. `each` hears of each entry.
///
/// # Errors
/// If the model itself cannot be judged.
pub fn survey(
    model: &Path,
    variants: &[Variant],
    text: &[u32],
    settings: &Settings<'_>,
    terms: Terms,
    each: &mut dyn FnMut(&Entry),
) -> Result<Vec<Entry>, CompressError> {
    use millrace_shared::model::Dtype;
    let folder = tempfile::tempdir().map_err(|source| CompressError::Io {
        what: "make a folder in",
        path: std::env::temp_dir(),
        source,
    })?;
    let baseline =
        Judge::open(model, terms.window, terms.threads, terms.kv_dtype)?.baseline(text)?;
    let mut entries = Vec::new();
    let mut add = |entry: Entry| {
        each(&entry);
        entries.push(entry);
    };
    add(judge("original", model, text, Some(&baseline), terms)?);
    let eight = Terms { kv_dtype: Dtype::Int8, ..terms };
    add(judge("original, int8 KV", model, text, Some(&baseline), eight)?);
    for variant in variants {
        let made = make(model, variant, folder.path(), settings).and_then(|(path, made)| {
            let judged = judge(&variant.name, &path, text, Some(&baseline), terms);
            let _ = std::fs::remove_file(&path);
            let judged = judged?;
            let format_bytes = made.format_bytes.min(judged.file_bytes);
            Ok(Entry { format_bytes, errors: made.errors, ..judged })
        });
        add(made.unwrap_or_else(|e| Entry {
            name: variant.name.clone(),
            failed: Some(e.to_string()),
            ..Entry::default()
        }));
    }
    Ok(entries)
}

/// What making a variant told.
struct Made {
    format_bytes: u64,
    errors: Option<(f64, Option<f64>)>,
}

fn make(
    model: &Path,
    variant: &Variant,
    folder: &Path,
    settings: &Settings<'_>,
) -> Result<(std::path::PathBuf, Made), CompressError> {
    let mut current = model.to_owned();
    let mut made = Made { format_bytes: u64::MAX, errors: None };
    for (i, step) in variant.steps.iter().enumerate() {
        let source = Source::open(&current)?;
        let target = folder.join(format!("{i}.gguf"));
        // Shapes that change are stored in eight bits, which costs next to nothing: the table is
        // about the shape.
        let store = if step.is_structural() { TensorType::Q8_0 } else { settings.store };
        let settings = Settings { store, overwrite: true, ..*settings };
        let report = apply(&source, &target, step, &settings, &mut |_| {})?;
        if i > 0 {
            let _ = std::fs::remove_file(&current);
        }
        made.format_bytes = report.bytes_format;
        made.errors = (!step.is_structural()).then(|| (report.error(), report.output_error()));
        current = target;
    }
    Ok((current, made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_a_sound_step() {
        let all = variants(None).unwrap();
        assert_eq!(all.len(), VARIANTS.len());
        assert!(variants(Some("wanda")).unwrap().len() >= 5);
        assert!(variants(Some("no such")).is_err());
    }
}
