//! Every method at two settings, on one model: what `millrace compress table` prints.
//!
//! Each variant is written to a folder for temporary files, judged, and removed, so the disk holds one
//! at a time. A variant that cannot be made is told with its reason, and the others go on.

use std::path::Path;

use millrace_engine::target::io_error;
use millrace_shared::model::{Dtype, ModelFiles, TensorType};
use serde::{Deserialize, Serialize};

use crate::apply::{Settings, apply};
use crate::compare::{Entry, Original, Terms, judge};
use crate::recipe::provenance;
use crate::{Calibration, CompressError, Needs, Source, Step, calibrate, page};

/// A name and the steps that make it.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What it is called.
    pub name: String,
    /// One or more.
    pub steps: Vec<Step>,
}

/// Most memory for products of inputs that many methods share.
const KNOWN_BYTES: u64 = 2 << 30;

impl Variant {
    /// What it is known by where it is kept.
    fn key(&self) -> String {
        let steps: Vec<String> = self.steps.iter().map(Step::describe).collect();
        format!("{}: {}", self.name, steps.join("; "))
    }
}

/// Name and steps, as TOML. `BYTES * x` is that part of the model's own tensors, `HIDDEN * x` of its
/// width, in multiples of 32.
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
    ("mixed 93 %", &["method = 'mixed', bytes = BYTES * 0.93"]),
    ("mixed 85 %", &["method = 'mixed', bytes = BYTES * 0.85"]),
    ("int8 row", &["method = 'int8'"]),
    ("int8 tensor", &["method = 'int8', per = 'tensor'"]),
    ("int8 row affine", &["method = 'int8', affine = true"]),
    ("int8 tensor affine", &["method = 'int8', per = 'tensor', affine = true"]),
    ("fixed 8.6 saturate", &["method = 'fixed-point', bits = 8, fraction_bits = 6"]),
    ("fixed 8.6 wrap", &["method = 'fixed-point', bits = 8, fraction_bits = 6, wrap = true"]),
    ("fixed 8.6 mod 251", &["method = 'fixed-point', bits = 8, fraction_bits = 6, modulo = 251"]),
    ("fixed 8.8 saturate", &["method = 'fixed-point', bits = 8, fraction_bits = 8"]),
    ("fixed 8.8 wrap", &["method = 'fixed-point', bits = 8, fraction_bits = 8, wrap = true"]),
    ("fixed 8.8 mod 251", &["method = 'fixed-point', bits = 8, fraction_bits = 8, modulo = 251"]),
    ("binary row", &["method = 'binary'"]),
    ("binary tensor", &["method = 'binary', per = 'tensor'"]),
    ("magnitude 20 %", &["method = 'magnitude', sparsity = 0.2"]),
    ("magnitude 50 %", &["method = 'magnitude', sparsity = 0.5"]),
    ("magnitude global 20 %", &["method = 'magnitude', sparsity = 0.2, global = true"]),
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
    ("wanda tiles 50 %", &["method = 'wanda', sparsity = 0.5, pattern = 'tile'"]),
    ("wanda tiles 75 %", &["method = 'wanda', sparsity = 0.75, pattern = 'tile'"]),
    (
        "wanda 50 % as bitmask",
        &["method = 'wanda', sparsity = 0.5", "method = 'storage', form = 'bitmask'"],
    ),
    (
        "wanda 2:4 as bitmask",
        &[
            "method = 'wanda', sparsity = 0.5, pattern = '2:4'",
            "method = 'storage', form = 'bitmask'",
        ],
    ),
    (
        "wanda 75 % as csr",
        &["method = 'wanda', sparsity = 0.75", "method = 'storage', form = 'csr'"],
    ),
    (
        "wanda 90 % as csr",
        &["method = 'wanda', sparsity = 0.9", "method = 'storage', form = 'csr'"],
    ),
    (
        "wanda tiles 50 % as tiles",
        &[
            "method = 'wanda', sparsity = 0.5, pattern = 'tile'",
            "method = 'storage', form = 'tiles'",
        ],
    ),
    (
        "wanda tiles 75 % as tiles",
        &[
            "method = 'wanda', sparsity = 0.75, pattern = 'tile'",
            "method = 'storage', form = 'tiles'",
        ],
    ),
    (
        "wanda tiles 50 % + q8_0 as tiles",
        &[
            "method = 'wanda', sparsity = 0.5, pattern = 'tile'",
            "method = 'quantise', type = 'q8_0'",
            "method = 'storage', form = 'tiles'",
        ],
    ),
    ("svd 80 %", &["method = 'low-rank', size = 0.8"]),
    ("svd 50 %", &["method = 'low-rank', size = 0.5"]),
    ("svd aware 80 %", &["method = 'low-rank', size = 0.8, aware = true"]),
    ("svd aware 50 %", &["method = 'low-rank', size = 0.5, aware = true"]),
    ("svd energy 95 %", &["method = 'low-rank', energy = 0.95"]),
    ("svd aware energy 95 %", &["method = 'low-rank', energy = 0.95, aware = true"]),
    ("svd aware, 93 % of bytes", &["method = 'low-rank', bytes = BYTES * 0.93, aware = true"]),
    ("drop 2 layers", &["method = 'drop-layers', count = 2"]),
    ("drop 6 layers", &["method = 'drop-layers', count = 6"]),
    ("merge 2 pairs", &["method = 'merge-layers', count = 2"]),
    ("merge 6 pairs", &["method = 'merge-layers', count = 6"]),
    ("drop 1 KV head", &["method = 'drop-heads', count = 1"]),
    ("drop 2 KV heads", &["method = 'drop-heads', count = 2"]),
    ("drop 10 % channels", &["method = 'drop-channels', fraction = 0.1"]),
    ("drop 30 % channels", &["method = 'drop-channels', fraction = 0.3"]),
    ("width 89 %", &["method = 'width', hidden = HIDDEN * 0.89"]),
    ("width 67 %", &["method = 'width', hidden = HIDDEN * 0.67"]),
    (
        "wanda 20 % + q4_k gptq",
        &["method = 'wanda', sparsity = 0.2", "method = 'quantise', type = 'q4_k', gptq = true"],
    ),
];

/// All variants of a model whose names contain a word; all of them without.
///
/// # Errors
/// If none does, or there is no such model.
pub fn variants(model: &Path, only: Option<&str>) -> Result<Vec<Variant>, CompressError> {
    let files = ModelFiles::open(model)?;
    let sizes = [("BYTES", files.weight_bytes(), 1), ("HIDDEN", files.config.hidden.into(), 32)];
    let mut found = Vec::new();
    for (name, steps) in VARIANTS.iter().filter(|v| only.is_none_or(|word| v.0.contains(word))) {
        let of_model = |step: &&str| Step::parse(&sized(step, &sizes));
        let steps = steps.iter().map(of_model).collect::<Result<_, _>>()?;
        found.push(Variant { name: (*name).to_owned(), steps });
    }
    match found.is_empty() {
        true => Err(CompressError::settings("no method has that in its name")),
        false => Ok(found),
    }
}

/// A step with sizes of a model: each by its name, and what it is a multiple of.
fn sized(step: &str, sizes: &[(&str, u64, u64)]) -> String {
    for &(name, size, grain) in sizes {
        let Some((before, rest)) = step.split_once(&format!("{name} * ")) else { continue };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        let part: f64 = part.parse().expect("invariant: variants state numbers");
        let n = (size as f64 * part / grain as f64).round() as u64 * grain;
        return format!("{before}{n}{after}");
    }
    step.to_owned()
}

/// What was done, kept in a file so that another run goes on with it.
#[derive(Serialize, Deserialize)]
struct State {
    /// Of everything that entries depend on, but for the speed of the machine.
    of: String,
    /// Steps, and what came of them.
    done: Vec<(String, Entry)>,
}

impl State {
    /// What the file has, if that is of the same model, texts and settings.
    ///
    /// # Errors
    /// If it is no such file.
    fn open(path: Option<&Path>, of: String) -> Result<Self, CompressError> {
        let empty = Self { of, done: Vec::new() };
        let Some(path) = path else { return Ok(empty) };
        page::check(path, page::Kind::Json)?;
        let Some(bytes) = std::fs::read(path).ok().filter(|bytes| !bytes.is_empty()) else {
            return Ok(empty);
        };
        let kept: Self = serde_json::from_slice(&bytes).map_err(|e| {
            let path = path.display();
            CompressError::Settings(format!(
                "{path} is there and has no table ({e}): name another file, or remove it"
            ))
        })?;
        Ok(if kept.of == empty.of { kept } else { empty })
    }

    fn has(&self, key: &str) -> bool {
        self.done.iter().any(|(known, _)| known == key)
    }

    fn add(&mut self, path: Option<&Path>, key: &str, entry: &Entry) -> Result<(), CompressError> {
        self.done.push((key.to_owned(), entry.clone()));
        let Some(path) = path else { return Ok(()) };
        let json = serde_json::to_vec(self).expect("invariant: entries can be written");
        page::write(path, page::Kind::Json, &json)
    }
}

/// What entries depend on.
fn key(
    model: &Path,
    text: &[u32],
    settings: &Settings<'_>,
    terms: Terms,
) -> Result<String, CompressError> {
    let source = provenance(model)?.blake3;
    let ids = |ids: &[u32]| ids.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
    let mut hash = blake3::Hasher::new();
    hash.update(source.as_bytes()).update(&ids(settings.calibration)).update(&[0]);
    hash.update(&ids(text)).update(settings.store.as_str().as_bytes());
    hash.update(format!("{} {}", terms.window, terms.kv_dtype.as_str()).as_bytes());
    hash.update(env!("CARGO_PKG_VERSION").as_bytes());
    Ok(hash.finalize().to_hex().to_string())
}

/// Makes and judges variants of a model; the model itself comes first, and once more with a KV cache of
/// eight bits. Entries are kept in the file `state`; those that are there already are not made again.
/// `each` hears of each entry, and how many there will be.
///
/// # Errors
/// If the model itself cannot be judged, or the state not be written.
pub fn survey(
    model: &Path,
    variants: &[Variant],
    text: &[u32],
    settings: &Settings<'_>,
    (terms, state): (Terms, Option<&Path>),
    each: &mut dyn FnMut(&Entry, usize),
) -> Result<Vec<Entry>, CompressError> {
    let at = std::env::temp_dir();
    let folder = tempfile::tempdir().map_err(io_error("make a folder in", &at))?;
    let mut kept = State::open(state, key(model, text, settings, terms)?)?;
    let left = variants.iter().filter(|v| !kept.has(&v.key()));
    let seen = known(model, left, settings)?;
    let settings = &Settings { known: seen.as_ref(), ..*settings };
    let mut original = Original::open(model, text, terms)?;
    let eight = Terms { kv_dtype: Dtype::Int8, ..terms };
    let of = variants.len() + 2;
    let mut entries = Vec::new();
    let mut add = |key: &str, make: &mut dyn FnMut() -> Result<Entry, CompressError>| {
        let found = kept.done.iter().find(|(known, _)| known == key).map(|(_, e)| e.clone());
        let entry = match found {
            Some(entry) => entry,
            None => {
                let entry = make()?;
                // What failed may do better another time.
                if entry.failed.is_none() {
                    kept.add(state, key, &entry)?;
                }
                entry
            }
        };
        each(&entry, of);
        entries.push(entry);
        Ok::<_, CompressError>(())
    };
    for (name, terms) in [("original", terms), ("original, int8 KV", eight)] {
        add(name, &mut || judge(name, model, text, Some(&mut original), terms))?;
    }
    for variant in variants {
        add(&variant.key(), &mut || {
            let made = make(model, variant, folder.path(), settings).and_then(|(path, made)| {
                let judged = judge(&variant.name, &path, text, Some(&mut original), terms);
                let _ = std::fs::remove_file(&path);
                let judged = judged?;
                let format_bytes = made.format_bytes.min(judged.file_bytes);
                Ok(Entry { format_bytes, errors: made.errors, ..judged })
            });
            Ok(made.unwrap_or_else(|e| Entry {
                name: variant.name.clone(),
                failed: Some(e.to_string()),
                ..Entry::default()
            }))
        })?;
    }
    Ok(entries)
}

/// What many methods ask, found once: where one asks, and memory is not too dear.
fn known<'a>(
    model: &Path,
    left: impl Iterator<Item = &'a Variant>,
    settings: &Settings<'_>,
) -> Result<Option<Calibration>, CompressError> {
    let source = Source::open(model)?;
    let needs = left.filter_map(|v| v.steps.first()).map(Step::needs).max();
    // One of each input, experts' too.
    let sees = |name: &str| !["attn_k", "attn_v", "ffn_up"].iter().any(|of| name.starts_with(of));
    let matrices = source.config.layer_matrices();
    let inputs = matrices.iter().filter(|(name, _)| source.config.features.ungated || sees(name));
    let bytes: u64 = inputs.map(|(_, [cols, _])| 4 * cols * cols).sum();
    let bytes = bytes.saturating_mul(source.config.layers.into());
    match needs {
        None | Some(Needs::Nothing) => Ok(None),
        Some(Needs::Products) if bytes > KNOWN_BYTES => Ok(None),
        Some(needs) => {
            let full = needs == Needs::Products;
            let (tokens, threads) = (settings.calibration, settings.threads);
            calibrate(&source, tokens, threads, full, &mut |_| {}).map(Some)
        }
    }
}

/// What making a variant told.
struct Made {
    format_bytes: u64,
    /// Of weights and of outputs, against the original: where one step alone loses something.
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
    let mut lossy = 0;
    for (i, step) in variant.steps.iter().enumerate() {
        let source = Source::open(&current)?;
        let target = folder.join(format!("{i}.gguf"));
        // Shapes that change, and factors, are stored in eight bits, which costs next to nothing.
        let store = if step.is_structural() { TensorType::Q8_0 } else { settings.store };
        // Of the model itself alone.
        let known = settings.known.filter(|_| i == 0);
        let settings = Settings { store, known, overwrite: true, ..*settings };
        let report = apply(&source, &target, step, &settings, &mut |_| {})?;
        if i > 0 {
            let _ = std::fs::remove_file(&current);
        }
        made.format_bytes = report.bytes_format;
        if report.error() > 0.0 {
            lossy += 1;
            made.errors = Some((report.error(), report.output_error()));
        }
        current = target;
    }
    // Each step's is against the model before it: together they say nothing of the original.
    made.errors = made.errors.filter(|_| lossy == 1);
    Ok((current, made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_a_sound_step() {
        let sizes = [("BYTES", 1000, 1), ("HIDDEN", 576, 32)];
        for (name, steps) in VARIANTS {
            for step in *steps {
                let step = Step::parse(&sized(step, &sizes));
                assert!(step.is_ok(), "{name}: {step:?}");
            }
        }
        let of = |step: &str| sized(step, &sizes);
        assert_eq!(of("bytes = BYTES * 0.93, aware = true"), "bytes = 930, aware = true");
        assert_eq!(of("hidden = HIDDEN * 0.89"), "hidden = 512");
        assert_eq!(of("sparsity = 0.5"), "sparsity = 0.5");
    }
}
