//! How people name a model of the hub: `org/name, org/name@revision or org/name:file`.

use std::fmt;

/// A model of the hub, as it was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit; `None` for the main branch.
    pub revision: Option<String>,
    /// A file of the repository, or the name of a quantisation.
    pub file: Option<String>,
}

impl HubName {
    /// `None` where the text cannot be such a name: it may be a path or a catalogue name.
    pub fn parse(text: &str) -> Option<Self> {
        let (head, file) = match text.split_once(':') {
            Some((head, file)) => (head, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = match head.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (head, None),
        };
        let (owner, name) = repo.split_once('/')?;
        let word = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_alphanumeric())
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !s.contains("..")
        };
        let is_file = [".gguf", ".safetensors"].iter().any(|e| name.to_lowercase().ends_with(e));
        let sound = word(owner) && word(name) && !is_file;
        let sound = sound && revision.is_none_or(|r| r.split('/').all(word));
        (sound && file.is_none_or(is_relative)).then(|| Self {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }

    /// The revision, the main branch unless another was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// Whether a path of a repository stays below the folder that it is joined to.
pub(super) fn is_relative(path: &str) -> bool {
    let sound = |part: &str| !part.is_empty() && part != "." && part != "..";
    path.split('/').all(sound) && !path.contains(['\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let parse = |s: &str| HubName::parse(s).map(|n| (n.repo, n.revision, n.file));
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(parse("org/name"), Some(("org/name".into(), None, None)));
        let full = parse("Qwen/Qwen2.5-0.5B-Instruct-GGUF@v1:Q4_K_M");
        let repo = "Qwen/Qwen2.5-0.5B-Instruct-GGUF";
        assert_eq!(full, Some((repo.into(), some("v1"), some("Q4_K_M"))));
        assert_eq!(parse("a/b:sub/f.gguf").unwrap().2, some("sub/f.gguf"));
        assert_eq!(parse("a/b@refs/pr/1").unwrap().1, some("refs/pr/1"));
        for other in [
            "smollm2:135m",
            "./a/b",
            "a/b/c",
            "a/b.gguf",
            "/a/b",
            "a/",
            "../b",
            "a/..",
            "a/b:",
            "a/b:../c",
            "a/b:/c",
            "a/b@",
            "a/b@../c",
            "a b/c",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
        for text in ["a/b", "a/b@c", "a/b:d", "a/b@c:d"] {
            assert_eq!(HubName::parse(text).unwrap().to_string(), text);
        }
    }
}
