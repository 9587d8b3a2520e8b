//! What the whole workspace keeps to, as far as it can be checked without a network: which licences
//! and sources dependencies may have (`deny.toml`, which `cargo deny check` reads too), and which
//! files may hold `unsafe`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The strings of a list in `deny.toml`.
fn listed(policy: &str, list: &str) -> BTreeSet<String> {
    let start = policy.find(&format!("\n{list} = [")).unwrap();
    let body = &policy[start..];
    let body = &body[..body.find(']').unwrap()];
    body.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether an SPDX expression can be met with the allowed licences: `OR` (or the older `/`) is a
/// choice, `AND` is both; parentheses as usual.
fn permitted(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = choice(&words, &mut at, allowed);
    met && at == words.len()
}

fn choice(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(words, at, allowed);
    }
    met
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = licence(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= licence(words, at, allowed);
    }
    met
}

fn licence(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let Some(&word) = words.get(*at) else { return false };
    *at += 1;
    if word == "(" {
        let met = choice(words, at, allowed);
        *at += 1;
        return met;
    }
    let mut name = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{word} WITH {}", words.get(*at + 1).unwrap_or(&""));
        *at += 2;
    }
    allowed.contains(&name)
}

#[test]
fn expressions() {
    let allowed = ["MIT", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
    for good in ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND (GPL-3.0 OR MIT)"] {
        assert!(permitted(good, &allowed), "{good}");
    }
    assert!(permitted("Apache-2.0 WITH LLVM-exception", &allowed));
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0", "(MIT OR GPL-3.0) AND GPL-3.0", ""] {
        assert!(!permitted(bad, &allowed), "{bad}");
    }
}

#[test]
fn dependencies_have_permitted_licences_and_sources() {
    let policy = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let allowed = listed(&policy, "allow");
    assert!(allowed.contains("MIT"), "{allowed:?}");
    let mut cargo = Command::new(env!("CARGO"));
    // Fetches what only other platforms need, where nobody has yet.
    cargo.args(["metadata", "--format-version", "1", "--locked", "--all-features"]);
    let output = cargo.current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());
    for package in packages {
        let name = package["name"].as_str().unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let ours = package["source"].is_null() && dependency["source"].is_string();
            assert!(!ours || dependency["req"] != "*", "{name} takes any {}", dependency["name"]);
        }
        let Some(source) = package["source"].as_str() else { continue };
        let registry = "registry+https://github.com/rust-lang/crates.io-index";
        assert_eq!(source, registry, "{name} comes from elsewhere");
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(permitted(licence, &allowed), "{name}: {licence:?} is not in deny.toml");
    }
}

/// Where `unsafe` may stand, each place with its reason; clippy wants a reason for every block
/// (`undocumented_unsafe_blocks`).
const UNSAFE: [(&str, &str); 10] = [
    ("node/engine/src/cpu/kernels/", "vector instructions, and pointers into checked rows"),
    ("node/engine/src/cpu/pool/", "work borrowed by threads that end it before its caller goes on"),
    ("node/engine/src/cpu/buffer.rs", "aligned memory in huge pages, shared in disjoint parts"),
    ("node/engine/src/cpu/mapping.rs", "files in memory"),
    ("node/engine/src/cpu/experts.rs", "disjoint rows written by several threads"),
    ("node/engine/src/cpu/load/work.rs", "disjoint parts written by several threads"),
    ("node/engine/src/cpu/backend.rs", "disjoint rows written by several threads"),
    ("node/engine/tests/cpu_alloc.rs", "an allocator that counts, in a test"),
    ("node/torch/src/", "calls of the CUDA and torch libraries"),
    ("tests/harness/fuzz/memory.rs", "an allocator that counts, in tests"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Whether a line of code begins something unsafe.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait", "unsafe("]
        .iter()
        .any(|mark| code.contains(mark))
}

#[test]
fn unsafe_stands_where_it_may() {
    let root = root();
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 200, "{}", files.len());
    let mut used = BTreeSet::new();
    for file in files.iter().filter(|file| !file.ends_with("shared/tests/policy.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        let Some(line) = text.lines().position(is_unsafe) else { continue };
        let path = file.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        let place = UNSAFE.iter().find(|(place, _)| path.starts_with(place));
        let place = place.unwrap_or_else(|| panic!("unsafe in {path}, line {}", line + 1));
        used.insert(place.0);
    }
    let idle = UNSAFE.iter().find(|(place, _)| !used.contains(place));
    assert_eq!(idle, None, "nothing unsafe is there any more");
    for closed in ["shared", "shared/net", "coordinator", "cli", "node"] {
        let lib = root.join(closed).join("src/lib.rs");
        let main = root.join(closed).join("src/main.rs");
        let file = if lib.exists() { lib } else { main };
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{} allows it", file.display());
    }
}
