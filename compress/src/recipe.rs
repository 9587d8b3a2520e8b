//! Recipes: steps in a TOML file, carried out one after the other, resumed where they stopped.
//!
//! Each step's result is a model of its own beside the output, `OUT.step1` and so on, with a mark
//! `OUT.step1.json`: the hash of what it was made of, and its report. A step whose mark is right is
//! not done again. The last step's result becomes the output; the others go. What was done stays in
//! `OUT.run.json` until whoever judges the output calls [`finished`].

use std::fs;
use std::path::{Path, PathBuf};

use millrace_engine::target::{TargetError, io_error, named, place};
use millrace_shared::model::ModelFiles;
use serde::{Deserialize, Serialize};

use crate::apply::{Settings, apply};
use crate::report::StepReport;
use crate::sink::check_target;
use crate::step::{Needs, Step, parse_type};
use crate::{CompressError, Source, page};

/// A recipe as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model to begin with: a path or a name.
    pub model: String,
    /// The file to make, beside the recipe unless it says otherwise.
    pub output: PathBuf,
    /// A UTF-8 text of what the model will read; without it the program's own.
    pub calibration: Option<PathBuf>,
    /// Most tokens of it that are read.
    #[serde(default = "calibration_tokens")]
    pub calibration_tokens: usize,
    /// A UTF-8 text to judge by; no part of it should be in the calibration text.
    pub evaluation: Option<PathBuf>,
    /// Type of values that have no format of their own: f16, f32 or q8_0.
    #[serde(default = "f16")]
    pub store: String,
    /// In order.
    #[serde(rename = "step")]
    pub steps: Vec<Step>,
}

fn f16() -> String {
    "f16".to_owned()
}

/// Of a calibration text, where nothing else is said.
pub const CALIBRATION_TOKENS: usize = 8192;

fn calibration_tokens() -> usize {
    CALIBRATION_TOKENS
}

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// Names the key that is not known, or the value that cannot be.
    pub fn open(path: &Path) -> Result<Self, CompressError> {
        let text = fs::read_to_string(path).map_err(io_error("read", path))?;
        let recipe: Self = toml::from_str(&text)
            .map_err(|e| CompressError::Settings(format!("{}: {e}", path.display())))?;
        if recipe.steps.is_empty() {
            let path = path.display();
            return Err(CompressError::Settings(format!("{path} has no step: write [[step]]")));
        }
        let told = |what: String| CompressError::Settings(format!("{}: {what}", path.display()));
        parse_type(&recipe.store).map_err(|e| told(format!("store: {e}")))?;
        for (i, step) in recipe.steps.iter().enumerate() {
            step.check().map_err(|e| told(format!("step {}: {e}", i + 1)))?;
        }
        Ok(recipe)
    }

    /// Whether a step looks at a calibration text.
    pub fn needs_calibration(&self) -> bool {
        self.steps.iter().any(|s| s.needs() > Needs::Nothing)
    }
}

/// Where something comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Path.
    pub path: PathBuf,
    /// BLAKE3 of its bytes; of a folder, of its weights.
    pub blake3: String,
    /// Bytes of its tensors.
    pub bytes: u64,
}

/// What a recipe did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The recipe.
    pub recipe: Recipe,
    /// The model that it began with.
    pub source: Provenance,
    /// What it made.
    pub result: Provenance,
    /// BLAKE3 of the calibration text's token ids.
    pub calibration: Option<String>,
    /// In order.
    pub steps: Vec<StepReport>,
    /// Steps that an earlier run had done.
    pub resumed: usize,
    /// Version of this program.
    pub version: String,
}

/// The mark of a finished step.
#[derive(Serialize, Deserialize)]
struct Mark {
    of: String,
    report: StepReport,
}

/// Hears how far a recipe is.
pub trait Progress {
    /// A step begins: which (from 1), of how many, what, and the bytes it reads.
    fn begin(&mut self, step: usize, of: usize, what: &str, bytes: u64);
    /// Bytes of the step done.
    fn advance(&mut self, done: u64);
}

/// Carries a recipe out; `output` is where its result goes. Where an earlier run made just that result,
/// and nobody has called [`finished`], nothing is done again.
///
/// # Errors
/// Those of its steps. The steps before are kept, the output is as it was.
pub fn run(
    recipe: &Recipe,
    model: &Path,
    output: &Path,
    settings: &Settings<'_>,
    progress: &mut dyn Progress,
) -> Result<RunReport, CompressError> {
    // What lies beside it begins with its name.
    let output = &*named(output)?;
    // Whether it may be replaced is known once it is known whose it is.
    check_target(model, output, true)?;
    let source = provenance(model)?;
    let ids: Vec<u8> = settings.calibration.iter().flat_map(|t| t.to_le_bytes()).collect();
    let calibration = recipe.needs_calibration().then(|| blake3::hash(&ids).to_hex().to_string());
    if let Some(report) = unfinished(recipe, &source, calibration.as_ref(), output) {
        return Ok(report);
    }
    if output.exists() && !settings.overwrite {
        return Err(TargetError::Exists(output.to_owned()).into());
    }
    for i in 0..recipe.steps.len() {
        let [path, mark] = step_paths(output, i);
        check_target(model, &path, true)?;
        if path.exists() && !mark.exists() {
            let path = path.display();
            return Err(CompressError::Settings(format!(
                "{path} is there and of no recipe, whose first steps go there: give the output another \
                 name, or move it"
            )));
        }
    }
    let (mut current, mut of) = (model.to_owned(), source.blake3.clone());
    let (mut steps, mut resumed, mut made) = (Vec::new(), 0, Vec::new());
    for (i, step) in recipe.steps.iter().enumerate() {
        let parts = [&of, &step.describe(), &recipe.store, calibration.as_ref().unwrap_or(&of)];
        let mut hash = blake3::Hasher::new();
        for part in parts {
            hash.update(part.as_bytes()).update(&[0]);
        }
        hash.update(env!("CARGO_PKG_VERSION").as_bytes());
        of = hash.finalize().to_hex().to_string();
        let [path, mark_path] = step_paths(output, i);
        let report = match found(&path, &mark_path, &of) {
            Some(report) => {
                resumed += 1;
                report
            }
            None => {
                // Whose the file is, is known before it is there.
                page::write(&mark_path, page::Kind::Json, b"{}")?;
                let source = Source::open(&current)?;
                let bytes = source.weight_bytes() * step.passes();
                progress.begin(i + 1, recipe.steps.len(), &step.describe(), bytes);
                let settings = Settings { known: None, overwrite: true, ..*settings };
                let report = apply(&source, &path, step, &settings, &mut |b| progress.advance(b));
                let report = report.inspect_err(|_| {
                    // Of nothing there is no mark.
                    let _ = if path.exists() { Ok(()) } else { fs::remove_file(&mark_path) };
                })?;
                let mark = Mark { of: of.clone(), report };
                let json = serde_json::to_vec(&mark).expect("invariant: reports can be written");
                page::write(&mark_path, page::Kind::Json, &json)?;
                mark.report
            }
        };
        steps.push(report);
        current.clone_from(&path);
        made.push((path, mark_path));
    }
    let result = Provenance { path: output.to_owned(), ..provenance(&current)? };
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let recipe = recipe.clone();
    let report = RunReport { recipe, source, result, calibration, steps, resumed, version };
    replace(output, &current, &report)?;
    for (path, mark) in made {
        // What is left of steps is of no use, and no harm.
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        let _ = fs::remove_file(mark);
    }
    Ok(report)
}

/// The last step's result becomes the output; what was done is written first.
fn replace(output: &Path, last: &Path, report: &RunReport) -> Result<(), TargetError> {
    let kept = beside(output, "run.json");
    let json = serde_json::to_vec(report).expect("invariant: reports can be written");
    fs::write(&kept, json).map_err(io_error("write", &kept))?;
    place(last, output)
}

/// What an earlier run did, where it made the output of this recipe and was then cut off.
fn unfinished(
    recipe: &Recipe,
    source: &Provenance,
    calibration: Option<&String>,
    output: &Path,
) -> Option<RunReport> {
    let kept: RunReport =
        serde_json::from_slice(&fs::read(beside(output, "run.json")).ok()?).ok()?;
    let same = kept.recipe == *recipe
        && kept.source.blake3 == source.blake3
        && kept.calibration.as_ref() == calibration
        && kept.version == env!("CARGO_PKG_VERSION");
    let whole = same && provenance(output).ok()?.blake3 == kept.result.blake3;
    let resumed = kept.steps.len();
    if whole { Some(RunReport { resumed, ..kept }) } else { None }
}

/// The output is judged and told of: another run of the recipe begins anew.
pub fn finished(output: &Path) {
    let Ok(output) = named(output) else { return };
    // Where it stays, the next run has less to do.
    let _ = fs::remove_file(beside(&output, "run.json"));
}

/// Where the result of a step goes, and its mark.
fn step_paths(output: &Path, step: usize) -> [PathBuf; 2] {
    [format!("step{}", step + 1), format!("step{}.json", step + 1)]
        .map(|name| beside(output, &name))
}

/// `OUT.what`: what goes with an output lies beside it, under all of its name.
pub fn beside(output: &Path, what: &str) -> PathBuf {
    let plain: PathBuf = output.components().collect();
    let mut name = plain.into_os_string();
    name.push(format!(".{what}"));
    name.into()
}

fn found(path: &Path, mark: &Path, of: &str) -> Option<StepReport> {
    let mark: Mark = serde_json::from_slice(&fs::read(mark).ok()?).ok()?;
    (mark.of == of && path.exists()).then_some(mark.report)
}

pub(crate) fn provenance(path: &Path) -> Result<Provenance, CompressError> {
    let files = ModelFiles::open(path)?;
    let mut hash = blake3::Hasher::new();
    for file in &files.paths {
        let file_read = fs::File::open(file).and_then(|f| hash.update_reader(f).map(|_| ()));
        file_read.map_err(io_error("read", file))?;
    }
    let blake3 = hash.finalize().to_hex().to_string();
    Ok(Provenance { path: path.to_owned(), blake3, bytes: files.weight_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Result<Recipe, CompressError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Recipe::open(file.path())
    }

    #[test]
    fn recipes_are_read() {
        let text = "model = \"a.gguf\"\noutput = \"b.gguf\"\n[[step]]\nmethod = \"wanda\"\nsparsity = 0.5\n\
                    [[step]]\nmethod = \"quantise\"\ntype = \"q4_k\"\n";
        let read = recipe(text).unwrap();
        assert_eq!((read.steps.len(), read.needs_calibration(), &*read.store), (2, true, "f16"));
    }

    #[test]
    fn misspelt_keys_and_empty_recipes_are_refused() {
        let head = "model = \"a\"\noutput = \"b\"\n";
        let cases = [
            (format!("{head}calibraton = \"c\"\n[[step]]\nmethod = \"binary\"\n"), "calibraton"),
            (format!("{head}[[step]]\nmethod = \"random\"\nsparsity = 0.5\nsed = 1\n"), "sed"),
            (format!("{head}step = []\n"), "no step"),
            (format!("{head}store = \"q9\"\n[[step]]\nmethod = \"binary\"\n"), "q9"),
            (
                format!(
                    "{head}[[step]]\nmethod = \"binary\"\n[[step]]\nmethod = \"wanda\"\nsparsity = 2.0\n"
                ),
                "step 2: sparsity = 2",
            ),
            ("output = \"b\"\n[[step]]\nmethod = \"binary\"\n".to_owned(), "model"),
        ];
        for (text, named) in cases {
            let error = recipe(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
