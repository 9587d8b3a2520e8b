//! Which files of a repository are the model: pure, from the list of its files.
//!
//! A GGUF file where one is asked for or the repository has nothing else, by its name or by that of
//! its quantisation; else the configuration, tokenizer and safetensors files, without the copies in
//! other formats that many repositories have.

use super::HubFile;

/// What is fetched where a repository has several quantisations and none is named.
const PREFERRED: &str = "Q4_K_M";
/// What a folder needs beside its weights, as far as a repository has it.
const DESCRIPTIONS: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The files of a model, small ones first, so that whole weights mean a whole model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::models) enum Choice {
    /// One GGUF file, or the parts of one in order.
    Gguf(Vec<HubFile>),
    /// A folder.
    Folder(Vec<HubFile>),
}

impl Choice {
    pub(in crate::models) fn files(&self) -> &[HubFile] {
        match self {
            Self::Gguf(files) | Self::Folder(files) => files,
        }
    }
}

/// GGUF files that are one model together: one, or the parts of a split one.
struct Variant {
    name: String,
    files: Vec<HubFile>,
}

impl Variant {
    fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|f| f.bytes).sum()
    }
}

/// Chooses among the files of a repository.
///
/// # Errors
/// Says what there is, where nothing or more than one thing can be meant.
pub(in crate::models) fn choose(files: &[HubFile], wanted: Option<&str>) -> Result<Choice, String> {
    let variants = variants(files);
    if let Some(wanted) = wanted {
        return by_name(files, variants, wanted);
    }
    let folder = folder(files);
    if !folder.is_empty() {
        return Ok(Choice::Folder(folder));
    }
    let preferred = |v: &&Variant| is_quantisation(&v.name, PREFERRED);
    let mut meant: Vec<&Variant> = variants.iter().collect();
    if meant.len() > 1 {
        meant.retain(preferred);
    }
    match (meant.as_slice(), variants.is_empty()) {
        ([one], _) => Ok(Choice::Gguf(one.files.clone())),
        (_, true) => Err(format!(
            "it has neither GGUF nor safetensors files{}",
            match files.len() {
                0 => "; it is empty".to_owned(),
                n => format!(" among its {n} files"),
            }
        )),
        _ => {
            Err(format!("it has several; name one as org/name:QUANTISATION.\n{}", list(&variants)))
        }
    }
}

/// All models among the files of a repository.
pub(super) fn all(files: &[HubFile]) -> Vec<Choice> {
    let mut all: Vec<Choice> = variants(files).into_iter().map(|v| Choice::Gguf(v.files)).collect();
    let folder = folder(files);
    if !folder.is_empty() {
        all.push(Choice::Folder(folder));
    }
    all
}

/// What names a GGUF file among those of its repository: the quantisation where its name ends with
/// one, else the name.
pub(super) fn short_name(path: &str) -> String {
    let whole = stem(path).map(|stem| part_of(stem).map_or(stem, |(whole, _, _)| whole));
    let last = whole.and_then(|stem| stem.rsplit(['-', '.', '/']).next()).unwrap_or(path);
    let upper = last.to_ascii_uppercase();
    let kinds = ["IQ", "TQ", "Q", "BF", "F", "MXFP"];
    let is_kind = |kind: &&str| {
        upper.strip_prefix(*kind).is_some_and(|s| s.starts_with(|c: char| c.is_ascii_digit()))
    };
    if kinds.iter().any(is_kind) { upper } else { path.to_owned() }
}

fn by_name(files: &[HubFile], variants: Vec<Variant>, wanted: &str) -> Result<Choice, String> {
    let base = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let same = |a: &str| a.eq_ignore_ascii_case(wanted);
    let named = |v: &Variant| {
        v.files.iter().any(|f| same(&f.path) || same(&base(&f.path))) || same(&v.name)
    };
    let mut meant: Vec<&Variant> = variants.iter().filter(|v| named(v)).collect();
    if meant.is_empty() {
        meant = variants.iter().filter(|v| is_quantisation(&v.name, wanted)).collect();
    }
    match meant.as_slice() {
        [one] => Ok(Choice::Gguf(one.files.clone())),
        [] if variants.is_empty() => {
            let hint = match folder(files).is_empty() {
                true => "",
                false => "; it is a folder of safetensors files: leave the file's name out",
            };
            Err(format!("it has no GGUF files{hint}"))
        }
        [] => Err(format!("it has no '{wanted}'. It has:\n{}", list(&variants))),
        _ => Err(format!("'{wanted}' may be several:\n{}", list(&variants))),
    }
}

/// The GGUF files that can be models on their own; projectors of images and matrices of importance
/// cannot.
fn variants(files: &[HubFile]) -> Vec<Variant> {
    let mut variants: Vec<Variant> = Vec::new();
    for file in files {
        let Some(stem) = stem(&file.path) else { continue };
        let base = stem.rsplit('/').next().unwrap_or(stem).to_ascii_lowercase();
        if base.contains("mmproj") || base.contains("imatrix") {
            continue;
        }
        let name = part_of(stem).map_or(stem, |(whole, _, _)| whole).to_owned();
        match variants.iter_mut().find(|v| v.name == name && part_of(stem).is_some()) {
            Some(variant) => variant.files.push(file.clone()),
            None => variants.push(Variant { name, files: vec![file.clone()] }),
        }
    }
    for variant in &mut variants {
        variant.files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    variants.sort_by_key(Variant::bytes);
    variants
}

fn stem(path: &str) -> Option<&str> {
    let at = path.len().checked_sub(5)?;
    path.get(at..).filter(|end| end.eq_ignore_ascii_case(".gguf")).map(|_| &path[..at])
}

/// `name-00002-of-00003` is part 2 of 3 of `name`.
fn part_of(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (whole, part) = rest.rsplit_once('-')?;
    let number = |s: &str| (s.len() == 5).then(|| s.parse().ok()).flatten();
    Some((whole, number(part)?, number(count)?))
}

/// Whether a file of this name, without its ending, is of that quantisation: the name's last words.
fn is_quantisation(stem: &str, wanted: &str) -> bool {
    let at = stem.len().checked_sub(wanted.len());
    let Some((before, end)) = at.and_then(|at| stem.split_at_checked(at)) else { return false };
    end.eq_ignore_ascii_case(wanted)
        && before.chars().next_back().is_none_or(|c| matches!(c, '-' | '.' | '/' | '_'))
}

fn list(variants: &[Variant]) -> String {
    let row = |v: &Variant| {
        let parts = match v.files.len() {
            1 => String::new(),
            n => format!("  in {n} parts"),
        };
        let size = match v.bytes() {
            0 => String::new(),
            bytes => format!("{:>9.1} MB  ", bytes as f64 / 1e6),
        };
        format!("  {size}{}.gguf{parts}", v.name)
    };
    variants.iter().map(row).collect::<Vec<_>>().join("\n")
}

/// Description, then weights; empty where the repository is no such folder.
fn folder(files: &[HubFile]) -> Vec<HubFile> {
    let find = |name: &str| files.iter().find(|f| f.path == name);
    let weights: Vec<&HubFile> = match (find(INDEX), find(ONE_FILE)) {
        (None, Some(one)) => vec![one],
        (index, _) => {
            let shard = |f: &&HubFile| {
                let stem = f.path.strip_suffix(".safetensors");
                stem.and_then(part_of).is_some_and(|(whole, _, _)| whole == "model")
            };
            index.into_iter().chain(files.iter().filter(shard)).collect()
        }
    };
    if find("config.json").is_none() || weights.is_empty() {
        return Vec::new();
    }
    DESCRIPTIONS.iter().filter_map(|name| find(name)).chain(weights).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<HubFile> {
        let file = |(i, path): (usize, &&str)| HubFile {
            path: (*path).to_owned(),
            bytes: Some(1_000_000 * (i as u64 + 1)),
            sha256: None,
        };
        paths.iter().enumerate().map(file).collect()
    }

    fn paths(choice: Result<Choice, String>) -> Vec<String> {
        choice.unwrap().files().iter().map(|f| f.path.clone()).collect()
    }

    #[test]
    fn a_quantisation_by_its_name() {
        let repo = files(&[
            "README.md",
            "M-Q2_K.gguf",
            "M-Q4_K_M.gguf",
            "M-Q4_K_S.gguf",
            "M.q8_0.gguf",
            "mmproj-M-f16.gguf",
            "F16/M-F16-00001-of-00002.gguf",
            "F16/M-F16-00002-of-00002.gguf",
        ]);
        let get = |wanted: Option<&str>| paths(choose(&repo, wanted));
        assert_eq!(get(None), ["M-Q4_K_M.gguf"]);
        assert_eq!(get(Some("q4_k_m")), ["M-Q4_K_M.gguf"]);
        assert_eq!(get(Some("Q8_0")), ["M.q8_0.gguf"]);
        assert_eq!(get(Some("M-Q2_K.gguf")), ["M-Q2_K.gguf"]);
        let parts = ["F16/M-F16-00001-of-00002.gguf", "F16/M-F16-00002-of-00002.gguf"];
        assert_eq!(get(Some("F16")), parts);
        assert_eq!(get(Some("M-F16-00001-of-00002.gguf")), parts);
        let error = choose(&repo, Some("Q4_K")).unwrap_err();
        assert!(error.contains("no 'Q4_K'") && error.contains("M-Q4_K_M.gguf"), "{error}");
        assert!(error.contains("2.0 MB") && error.contains("in 2 parts"), "{error}");
        assert!(!error.contains("mmproj"), "{error}");
    }

    #[test]
    fn short_names() {
        for (path, short) in [
            ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
            ("smollm2-1.7b-instruct-q4_k_m.gguf", "Q4_K_M"),
            ("F16/M-F16-00001-of-00002.gguf", "F16"),
            ("M.IQ4_XS.gguf", "IQ4_XS"),
            ("model.gguf", "model.gguf"),
            ("Llama-Quick.gguf", "Llama-Quick.gguf"),
        ] {
            assert_eq!(short_name(path), short);
        }
    }

    #[test]
    fn one_or_a_list() {
        assert_eq!(paths(choose(&files(&["a-Q8_0.gguf", "x.txt"]), None)), ["a-Q8_0.gguf"]);
        let error = choose(&files(&["a-Q8_0.gguf", "a-Q4_0.gguf"]), None).unwrap_err();
        assert!(error.contains("several") && error.contains("a-Q4_0.gguf"), "{error}");
        let error = choose(&files(&["a-Q8_0.gguf", "b-Q8_0.gguf"]), Some("Q8_0")).unwrap_err();
        assert!(error.contains("may be several"), "{error}");
        assert!(choose(&files(&["pytorch_model.bin"]), None).unwrap_err().contains("neither"));
    }

    #[test]
    fn a_folder_without_its_copies() {
        let repo = files(&[
            "consolidated.safetensors",
            "config.json",
            "pytorch_model.bin",
            "model-00002-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "tokenizer.json",
            "original/params.json",
            "model-Q4_0.gguf",
        ]);
        let all = paths(choose(&repo, None));
        assert_eq!(all[..2], ["config.json", "tokenizer.json"]);
        assert_eq!(all.len(), 5);
        assert!(all[3..].iter().all(|p| p.starts_with("model-0000")));
        assert_eq!(paths(choose(&repo, Some("Q4_0"))), ["model-Q4_0.gguf"]);
        let one = files(&["config.json", "model.safetensors", "model-00001-of-00001.safetensors"]);
        assert_eq!(paths(choose(&one, None)), ["config.json", "model.safetensors"]);
        assert!(choose(&one, Some("Q4_0")).unwrap_err().contains("leave the file's name out"));
    }
}
