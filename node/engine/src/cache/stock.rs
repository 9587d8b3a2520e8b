//! What lies in the cache, and the one rule by which it goes.
//!
//! Only what has the names that are given here is of the cache; links are not followed.
//!
//! A thing is what goes as a whole: a model with all its files, a fetched tensor, packed weights of a
//! layer, a quantised copy, remembered hashes. Nothing goes that a process of this machine uses. Of
//! what can be made again here, everything goes that was not used for 60 days, and what nobody
//! finished at once. Where there is a limit, it holds for all things together, and the longest unused
//! go first, models included; where there is none, fetched things stay, and what can be made again is
//! kept up to the larger of 32 GiB and three times what was just made.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::uses::Uses;

/// Bytes of what can be made again that are kept where no limit is set.
const KEEP_BYTES: u64 = 32 << 30;
/// What has just been made fits so many times at least.
const KEEP_TIMES: u64 = 3;
/// What can be made again goes when it was not used for so long.
const KEEP_UNUSED: Duration = Duration::from_hours(60 * 24);
/// Unfinished files of that age have no writer any more.
const ABANDONED: Duration = Duration::from_hours(1);
/// Folders of a repository.
const MAX_DEPTH: usize = 5;

/// What a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A model that was fetched.
    Model,
    /// A download that was cut off; it can go on.
    Unfinished,
    /// A tensor from a coordinator.
    Tensor,
    /// Weights as the engine wants them.
    Packed,
    /// A copy of a model with smaller weights.
    Quantized,
    /// Hashes of files and measurements of this machine.
    Known,
    /// What nobody finished and nobody can go on with.
    Leftover,
}

impl Kind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 7] = [
        Self::Model,
        Self::Unfinished,
        Self::Tensor,
        Self::Packed,
        Self::Quantized,
        Self::Known,
        Self::Leftover,
    ];

    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Unfinished => "unfinished downloads",
            Self::Tensor => "fetched tensors",
            Self::Packed => "packed weights",
            Self::Quantized => "quantised copies",
            Self::Known => "hashes, measurements",
            Self::Leftover => "leftovers",
        }
    }

    /// Whether it takes no network to have it again.
    pub fn can_be_made_again(self) -> bool {
        matches!(self, Self::Packed | Self::Quantized | Self::Known | Self::Leftover)
    }
}

/// Something that goes as a whole.
#[derive(Clone, Debug)]
pub struct Thing {
    /// What it is.
    pub kind: Kind,
    /// Its files; the first one names it.
    pub files: Vec<PathBuf>,
    /// Of all its files.
    pub bytes: u64,
    /// When it was made or used last, whichever is later; now where it is in use.
    pub last_used: SystemTime,
    /// A process uses it, or is writing it.
    pub in_use: bool,
}

/// How much goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Bytes of all things.
    pub limit: Option<u64>,
    /// How long anything may be unused.
    pub unused: Option<Duration>,
    /// Bytes of what can be made again.
    pub made_limit: Option<u64>,
    /// How long what can be made again may be unused.
    pub made_unused: Option<Duration>,
}

impl Rule {
    /// The rule that holds by itself, after so many bytes were made.
    pub fn usual(limit: Option<u64>, just_made: u64) -> Self {
        let keep = KEEP_BYTES.max(KEEP_TIMES.saturating_mul(just_made));
        Self {
            limit,
            unused: None,
            made_limit: limit.is_none().then_some(keep),
            made_unused: Some(KEEP_UNUSED),
        }
    }

    /// Which of the things go.
    pub(super) fn choose(&self, mut things: Vec<Thing>, now: SystemTime) -> Vec<Thing> {
        things.sort_by_key(|t| t.last_used);
        let mut gone = Vec::new();
        for (limit, unused, made_only) in
            [(self.made_limit, self.made_unused, true), (self.limit, self.unused, false)]
        {
            let counts = |t: &Thing| !made_only || t.kind.can_be_made_again();
            let mut total: u64 = things.iter().filter(|t| counts(t)).map(|t| t.bytes).sum();
            let (go, stay) = things.into_iter().partition::<Vec<_>, _>(|t| {
                let age = now.duration_since(t.last_used).unwrap_or_default();
                let too_old = unused.is_some_and(|unused| age > unused);
                let too_old = too_old || t.kind == Kind::Leftover;
                let too_much = limit.is_some_and(|limit| total > limit);
                let goes = counts(t) && !t.in_use && (too_old || too_much);
                total -= if goes { t.bytes } else { 0 };
                goes
            });
            gone.extend(go);
            things = stay;
        }
        gone
    }
}

/// Everything in a cache folder.
pub(super) fn things(cache: &Path, uses: &Uses) -> Vec<Thing> {
    let mut stock = Stock { cache, uses, now: SystemTime::now(), things: Vec::new() };
    let models = cache.join("models");
    for folder in folders(&models).filter(|f| has_name(f, is_content)) {
        stock.group(Kind::Model, files(&folder));
    }
    // Where models are elsewhere, that is not the cache's.
    let hub = Some(models.join("hub")).filter(|_| is_folder(&models));
    for repo in hub.iter().flat_map(|hub| folders(hub)).filter(|f| has_name(f, is_repo)) {
        for snapshot in folders(&repo.join("snapshots")) {
            stock.snapshot(&snapshot);
        }
    }
    for (folder, kind) in [
        ("tensors", Kind::Tensor),
        ("packed", Kind::Packed),
        ("quantized", Kind::Quantized),
        ("hashes", Kind::Known),
        ("profiles", Kind::Known),
    ] {
        let folder = cache.join(folder);
        if !is_folder(&folder) {
            continue;
        }
        // A copy of a folder is one.
        for copy in folders(&folder).filter(|_| kind == Kind::Quantized) {
            stock.group(kind, files(&copy));
        }
        for file in files(&folder).into_iter().filter(|(p, _)| p.parent() == Some(&folder)) {
            stock.group(kind, vec![file]);
        }
    }
    stock.things
}

struct Stock<'a> {
    cache: &'a Path,
    uses: &'a Uses,
    now: SystemTime,
    things: Vec<Thing>,
}

type FileMeta = (PathBuf, Metadata);

impl Stock<'_> {
    /// Each GGUF file with its parts is a model; all else together is one.
    fn snapshot(&mut self, folder: &Path) {
        let mut rest = Vec::new();
        let mut by_name = std::collections::BTreeMap::<String, Vec<FileMeta>>::new();
        for file in files(folder) {
            let name = file.0.to_string_lossy().into_owned();
            match name.strip_suffix(".gguf") {
                None => rest.push(file),
                Some(stem) => by_name.entry(without_part(stem)).or_default().push(file),
            }
        }
        for files in by_name.into_values() {
            self.group(Kind::Model, files);
        }
        self.group(Kind::Model, rest);
    }

    fn group(&mut self, kind: Kind, files: Vec<FileMeta>) {
        let mut unfinished = std::collections::BTreeMap::<PathBuf, Vec<FileMeta>>::new();
        let mut whole = Vec::new();
        for file in files {
            // A file, or all that is in a folder.
            let inside = file.0.ancestors().take_while(|a| *a != self.cache);
            match inside.filter(|a| a.extension().is_some_and(|e| e == "part")).last() {
                Some(part) => unfinished.entry(part.to_owned()).or_default().push(file),
                None => whole.push(file),
            }
        }
        for files in unfinished.into_values() {
            let resumable = kind == Kind::Model;
            self.add(if resumable { Kind::Unfinished } else { Kind::Leftover }, files);
        }
        if whole.iter().any(|(path, _)| !is_hidden(path)) {
            self.add(kind, whole);
        }
    }

    fn add(&mut self, kind: Kind, mut files: Vec<FileMeta>) {
        files.sort_by_key(|(path, meta)| (is_hidden(path), std::cmp::Reverse(meta.len())));
        let (mut last_used, mut in_use) = (SystemTime::UNIX_EPOCH, false);
        for (path, meta) in &files {
            last_used = last_used.max(meta.modified().unwrap_or(self.now));
            let relative = path.strip_prefix(self.cache).unwrap_or(path);
            match self.uses.of(relative) {
                None => {}
                Some(None) => in_use = true,
                Some(Some(time)) => last_used = last_used.max(time),
            }
        }
        let age = self.now.duration_since(last_used).unwrap_or_default();
        in_use |= matches!(kind, Kind::Unfinished | Kind::Leftover) && age < ABANDONED;
        self.things.push(Thing {
            kind,
            bytes: files.iter().map(|(_, meta)| meta.len()).sum(),
            files: files.into_iter().map(|(path, _)| path).collect(),
            last_used: if in_use { self.now } else { last_used },
            in_use,
        });
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))
}

/// `name-00002-of-00003` is a part of `name`.
fn without_part(stem: &str) -> String {
    let number = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let parts = stem.rsplit_once("-of-").filter(|(_, count)| number(count));
    let whole = parts.and_then(|(rest, _)| rest.rsplit_once('-')).filter(|(_, n)| number(n));
    whole.map_or(stem, |(whole, _)| whole).to_owned()
}

fn has_name(folder: &Path, is_ours: impl Fn(&str) -> bool) -> bool {
    folder.file_name().and_then(|n| n.to_str()).is_some_and(is_ours)
}

/// The folder of a model of the catalogue: the beginning of its SHA-256.
fn is_content(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The folder of a repository: `models--owner--name`.
fn is_repo(name: &str) -> bool {
    name.strip_prefix("models--").is_some_and(|name| name.contains("--"))
}

/// Whether it is a folder, and no link to one.
fn is_folder(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn folders(of: &Path) -> impl Iterator<Item = PathBuf> {
    let of = Some(of).filter(|of| is_folder(of));
    let entries = of.and_then(|of| std::fs::read_dir(of).ok()).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path())
}

/// The files below a folder. Links count as themselves: what they lead to is not the cache's.
fn files(folder: &Path) -> Vec<FileMeta> {
    fn collect(folder: &Path, depth: usize, found: &mut Vec<FileMeta>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() && depth > 1 {
                collect(&entry.path(), depth - 1, found);
            } else if !meta.is_dir() {
                found.push((entry.path(), meta));
            }
        }
    }
    let mut found = Vec::new();
    collect(folder, MAX_DEPTH, &mut found);
    found
}
