//! Models of the hub, against a stand-in on loopback that redirects large files, knows ranges, cuts
//! connections, is busy, and refuses.
#![allow(clippy::unwrap_used)]

mod hub_common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hub_common::{COMMIT, Hub, Reply, Script, folder_repo, gguf, gguf_repo, settings};
use millrace_coordinator::models::{
    ModelError, NoProgress, Progress, Settings, Token, header_with, pull_with, resolve_with,
};
use millrace_engine::cache::{Cache, Rule};
use millrace_shared::model::ModelFiles;

const REPO: &str = "org/tiny-GGUF";
const FOLDER: &str = "org/tiny";

fn get(name: &str, settings: &Settings) -> Result<PathBuf, ModelError> {
    pull_with(name, settings, &mut NoProgress)
}

fn message(name: &str, settings: &Settings) -> String {
    get(name, settings).unwrap_err().to_string()
}

/// Names of what is below a folder, locks, uses and references left out.
fn below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true if path.ends_with("uses") => {}
            true => names.extend(below(&path)),
            false => names.push(entry.file_name().into_string().unwrap()),
        }
    }
    names.retain(|n| n != ".lock" && n != "main");
    names.sort();
    names
}

#[derive(Default)]
struct Recorder {
    total: u64,
    last: u64,
    begun: usize,
}

impl Progress for Recorder {
    fn begin(&mut self, _: &str, total: Option<u64>) {
        (self.total, self.begun) = (total.unwrap(), self.begun + 1);
    }
    fn advance(&mut self, done: u64) {
        assert!(done >= self.last, "{done} after {}", self.last);
        self.last = done;
    }
    fn end(&mut self) {}
}

#[test]
fn a_quantisation_through_a_redirect() {
    let (hub, cache) = (Hub::start(gguf_repo(), Script::default()), tempfile::tempdir().unwrap());
    let mut settings = settings(cache.path(), &hub.url);
    settings.token = Some(Token("hf_secret".to_owned()));
    assert!(!format!("{settings:?}").contains("hf_secret"));
    let path = get("org/tiny-GGUF:q8_0", &settings).unwrap();
    assert_eq!(fs::read(&path).unwrap(), gguf(2));
    assert!(path.ends_with(format!("snapshots/{COMMIT}/tiny-Q8_0.gguf")), "{path:?}");
    // The token is for the hub alone.
    let log = hub.log();
    assert!(log.iter().all(|r| r.authorised != r.path.starts_with("/cdn/")), "{log:?}");
    assert_eq!(log.len(), 3);
    // It is here now: nothing is asked for the file again, and nothing at all where it is used.
    assert_eq!(get("org/tiny-GGUF:q8_0", &settings).unwrap(), path);
    assert_eq!(hub.log().len(), 4);
    let used = resolve_with(&[], "org/tiny-GGUF:Q8_0", &settings, &mut NoProgress).unwrap();
    assert_eq!((used, hub.log().len()), (path, 4));
}

#[test]
fn a_split_file_is_refused_before_it_is_fetched() {
    let mut repo = gguf_repo();
    for i in [1, 2] {
        repo.insert(format!("F16/tiny-F16-0000{i}-of-00002.gguf"), (gguf(10 + i), true));
    }
    let (hub, cache) = (Hub::start(repo, Script::default()), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let text = message("org/tiny-GGUF:f16", &settings);
    assert!(text.contains("llama-gguf-split --merge") && text.contains("F16-00001"), "{text}");
    assert_eq!(hub.log().len(), 1, "the list alone");
    assert!(below(cache.path()).is_empty());
}

/// Whenever somebody tidies up, what has arrived so far is in use.
#[test]
fn what_arrives_is_in_use() {
    struct Tidier(PathBuf);
    impl Progress for Tidier {
        fn begin(&mut self, _: &str, _: Option<u64>) {}
        fn advance(&mut self, _: u64) {
            let all = Rule { limit: Some(0), unused: Some(Duration::ZERO), ..Rule::default() };
            assert!(Cache::new(&self.0).prune(&all, false).is_empty());
        }
        fn end(&mut self) {}
    }
    let hub = Hub::start(folder_repo(), Script::default());
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(cache.path(), &hub.url);
    let path = pull_with(FOLDER, &settings, &mut Tidier(cache.path().to_owned())).unwrap();
    assert_eq!(below(&path).len(), 5);
    ModelFiles::open(&path).unwrap();
}

/// It went all the same: what is left is no model.
#[test]
fn half_of_what_arrived_is_no_success() {
    struct Remover(PathBuf);
    impl Progress for Remover {
        fn begin(&mut self, _: &str, _: Option<u64>) {}
        fn advance(&mut self, _: u64) {
            let snapshots = self.0.join("models/hub/models--org--tiny/snapshots");
            let _ = fs::remove_file(snapshots.join(COMMIT).join("config.json"));
        }
        fn end(&mut self) {}
    }
    let hub = Hub::start(folder_repo(), Script::default());
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(cache.path(), &hub.url);
    let result = pull_with(FOLDER, &settings, &mut Remover(cache.path().to_owned()));
    let text = result.unwrap_err().to_string();
    assert!(text.contains("config.json went while"), "{text}");
}

#[test]
fn several_quantisations_are_listed() {
    let (hub, cache) = (Hub::start(gguf_repo(), Script::default()), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let text = message(REPO, &settings);
    for part in ["several", "tiny-Q8_0.gguf", "tiny-Q5_0.gguf", "MB"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    let text = message("org/tiny-GGUF:Q3_K", &settings);
    assert!(text.contains("no 'Q3_K'") && text.contains("tiny-Q8_0.gguf"), "{text}");
}

#[test]
fn a_folder_without_other_formats() {
    let hub = Hub::start(folder_repo(), Script::default());
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(cache.path(), &hub.url);
    let mut recorder = Recorder::default();
    let path = pull_with(FOLDER, &settings, &mut recorder).unwrap();
    let files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(below(&path), files);
    let bytes: u64 = files.iter().map(|f| fs::metadata(path.join(f)).unwrap().len()).sum();
    assert_eq!((recorder.total, recorder.last, recorder.begun), (bytes, bytes, 1));
    let model = ModelFiles::open(&path).unwrap();
    // Of a model that is not here, the directory alone is fetched.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Settings { cache: elsewhere.path().to_owned(), ..settings };
    let directory = header_with(FOLDER, &other, &mut NoProgress).unwrap();
    assert_eq!(directory.tensors, model.tensors);
    assert_eq!(directory.config, model.config);
    assert!(below(elsewhere.path()).is_empty());
}

#[test]
fn the_header_of_a_file_alone() {
    let (hub, cache) = (Hub::start(gguf_repo(), Script::default()), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let files = header_with("org/tiny-GGUF:Q5_0", &settings, &mut NoProgress).unwrap();
    assert_eq!(files.config.layers, 1);
    assert!(below(cache.path()).is_empty());
}

/// The connection is cut at a third and at two thirds; then the process ends, and another goes on.
#[test]
fn what_was_cut_off_goes_on() {
    let whole = gguf(2);
    let third = whole.len() / 3;
    let cuts = vec![("/cdn/", Reply::Cut(third)), ("/cdn/", Reply::Cut(third))];
    let (hub, cache) = (Hub::start(gguf_repo(), Script::new(cuts)), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let path = get("org/tiny-GGUF:Q8_0", &settings).unwrap();
    assert_eq!(fs::read(&path).unwrap(), whole);
    let ranges: Vec<u64> = hub.log().iter().filter_map(|r| r.range).collect();
    // Each is asked of the hub and of where that redirects.
    let third = third as u64;
    assert_eq!(ranges, [third, third, 2 * third, 2 * third]);
}

#[test]
fn what_was_killed_goes_on_in_the_next_process() {
    let whole = gguf(2);
    // Cut once, then nothing more comes: as far as this process gets.
    let dead = std::iter::repeat_n(("/cdn/", Reply::Cut(0)), 2);
    let cuts = std::iter::once(("/cdn/", Reply::Cut(1000))).chain(dead).collect();
    let (hub, cache) = (Hub::start(gguf_repo(), Script::new(cuts)), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let text = message("org/tiny-GGUF:Q8_0", &settings);
    assert!(text.contains("broke off after 1000 bytes") && text.contains("goes on"), "{text}");
    assert_eq!(below(cache.path()), ["tiny-Q8_0.gguf.part"]);
    let before = hub.log().len();
    let path = get("org/tiny-GGUF:Q8_0", &settings).unwrap();
    assert_eq!(fs::read(&path).unwrap(), whole);
    let ranges: Vec<u64> = hub.log()[before..].iter().filter_map(|r| r.range).collect();
    assert_eq!(ranges, [1000, 1000]);
    assert_eq!(below(cache.path()), ["tiny-Q8_0.gguf"]);
}

#[test]
fn what_lies_there_is_not_trusted() {
    let (hub, cache) = (Hub::start(gguf_repo(), Script::default()), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let path = get("org/tiny-GGUF:Q8_0", &settings).unwrap();
    let part = path.with_file_name("tiny-Q8_0.gguf.part");
    // The beginning of something else: it does not fit, and all is fetched again.
    for wrong in [vec![7; 1000], vec![7; 10_000_000]] {
        fs::remove_file(&path).unwrap();
        fs::write(&part, wrong).unwrap();
        assert_eq!(get("org/tiny-GGUF:Q8_0", &settings).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), gguf(2));
    }
}

#[test]
fn damage_is_refused() {
    let mut wrong = gguf(2);
    wrong[5000] ^= 1;
    let again = std::iter::repeat_n(("/cdn/", Reply::Body(wrong)), 2);
    let (hub, cache) =
        (Hub::start(gguf_repo(), Script::new(again.collect())), tempfile::tempdir().unwrap());
    let settings = settings(cache.path(), &hub.url);
    let text = message("org/tiny-GGUF:Q8_0", &settings);
    assert!(text.contains("SHA-256") && text.contains("instead of"), "{text}");
    assert!(below(cache.path()).is_empty(), "nothing wrong stays");
    let short = vec![("/cdn/", Reply::Body(vec![0; 10]))];
    let hub = Hub::start(gguf_repo(), Script::new(short));
    let text = message("org/tiny-GGUF:Q8_0", &self::settings(cache.path(), &hub.url));
    assert!(text.contains("10 bytes instead of"), "{text}");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let busy = vec![
        ("/api/", Reply::Status(429, "Retry-After: 0\r\n")),
        ("/api/", Reply::Status(503, "")),
        ("/cdn/", Reply::Status(500, "")),
        ("/org/", Reply::Status(429, "")),
    ];
    let (hub, cache) = (Hub::start(gguf_repo(), Script::new(busy)), tempfile::tempdir().unwrap());
    let path = get("org/tiny-GGUF:Q8_0", &settings(cache.path(), &hub.url)).unwrap();
    assert_eq!(fs::read(path).unwrap(), gguf(2));
    let busy = std::iter::repeat_n(("/api/", Reply::Status(503, "")), 9).collect();
    let hub = Hub::start(gguf_repo(), Script::new(busy));
    let other = tempfile::tempdir().unwrap();
    let text = message(REPO, &settings(other.path(), &hub.url));
    assert!(text.contains("busy") && text.contains("503"), "{text}");
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let gated = "X-Error-Code: GatedRepo\r\n";
    for (reply, token, parts) in [
        (Reply::Status(401, gated), false, &["gated", "/org/tiny-GGUF", "HF_TOKEN"][..]),
        (Reply::Status(403, gated), true, &["gated", "licence", "may read it"]),
        (Reply::Status(401, ""), false, &["does not exist, is private or is gated"]),
        (Reply::Status(404, "X-Error-Code: RevisionNotFound\r\n"), false, &["no such revision"]),
        (Reply::Status(404, ""), false, &["there is nothing (404)"]),
        (Reply::Status(418, "X-Error-Message: a teapot\r\n"), false, &["418 a teapot"]),
    ] {
        let hub = Hub::start(gguf_repo(), Script::new(vec![("/api/", reply)]));
        let token = token.then(|| Token("x".to_owned()));
        let settings = Settings { token, ..settings(cache.path(), &hub.url) };
        let text = message(REPO, &settings);
        for part in parts {
            assert!(text.contains(part), "'{part}' is not in: {text}");
        }
        assert_eq!(hub.log().len(), 1, "asked once");
    }
}

#[test]
fn files_of_other_tools_are_used_where_they_lie() {
    let (hub, cache) = (Hub::start(gguf_repo(), Script::default()), tempfile::tempdir().unwrap());
    let theirs = tempfile::tempdir().unwrap();
    let repo = theirs.path().join("models--org--tiny-GGUF");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &repo.join("blobs"), &repo.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(repo.join("blobs/x"), gguf(2)).unwrap();
    std::os::unix::fs::symlink("../../blobs/x", snapshot.join("tiny-Q8_0.gguf")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    let settings =
        Settings { hub_caches: vec![theirs.path().to_owned()], ..settings(cache.path(), &hub.url) };
    let there = snapshot.join("tiny-Q8_0.gguf");
    assert_eq!(get("org/tiny-GGUF:Q8_0", &settings).unwrap(), there);
    assert_eq!(hub.log().len(), 1, "the list alone");
    // Without the hub too, by branch and by commit, and where it is the only one.
    let offline = Settings { offline: true, ..settings.clone() };
    let nobody = Settings { hub_url: "http://127.0.0.1:9".to_owned(), ..settings };
    for without in [offline, nobody] {
        for name in [REPO, "org/tiny-GGUF:Q8_0", &format!("org/tiny-GGUF@{COMMIT}:Q8_0")] {
            assert_eq!(get(name, &without).unwrap(), there, "{name}");
        }
        assert!(message("models/x", &without).contains("nor is there such a file"));
        let text = message("org/tiny-GGUF:Q5_0", &without);
        assert!(text.contains("org/tiny-GGUF:Q5_0"), "{text}");
    }
    assert_eq!(hub.log().len(), 1);
    assert!(below(cache.path()).is_empty());
}

#[test]
fn half_a_folder_is_no_model() {
    let cut = std::iter::repeat_n(("/cdn/", Reply::Cut(0)), 3).collect();
    let hub = Hub::start(folder_repo(), Script::new(cut));
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(cache.path(), &hub.url);
    assert!(message(FOLDER, &settings).contains("broke off"));
    let offline = Settings { offline: true, ..settings.clone() };
    assert!(message(FOLDER, &offline).contains("HF_HUB_OFFLINE"));
    let path = resolve_with(&[], FOLDER, &settings, &mut NoProgress).unwrap();
    assert_eq!(get(FOLDER, &offline).unwrap(), path);
}

#[test]
fn hostile_lists_stay_in_the_cache() {
    let mut repo = gguf_repo();
    repo.insert("../../../evil-Q8_0.gguf".to_owned(), (gguf(2), true));
    repo.insert("/evil-Q8_0.gguf".to_owned(), (gguf(2), true));
    let (hub, cache) = (Hub::start(repo, Script::default()), tempfile::tempdir().unwrap());
    let path = get("org/tiny-GGUF:Q8_0", &settings(cache.path(), &hub.url)).unwrap();
    assert!(path.ends_with("tiny-Q8_0.gguf") && path.starts_with(cache.path()));
}
