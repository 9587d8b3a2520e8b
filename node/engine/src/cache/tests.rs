use std::process::Command;
use std::time::Duration;

use super::*;

fn hours(n: u64) -> SystemTime {
    SystemTime::now() - Duration::from_hours(n)
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn cache(&self) -> Cache {
        Cache::new(self.0.path())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of 1000 bytes that was made so many hours ago.
    fn file(&self, name: &str, age: u64) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, [0; 1000]).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(hours(age)).unwrap();
        path
    }

    /// Everything that is left, uses aside.
    fn left(&self) -> Vec<String> {
        let things = self.cache().things();
        let name = |p: &PathBuf| p.strip_prefix(self.0.path()).unwrap().display().to_string();
        let mut left: Vec<String> = things.iter().flat_map(|t| &t.files).map(name).collect();
        left.sort();
        left
    }
}

const DAY: u64 = 24;

#[test]
fn without_a_limit_what_was_fetched_stays() {
    let folder = Folder::new();
    folder.file("packed/old.pack", 61 * DAY);
    folder.file("packed/new.pack", 59 * DAY);
    folder.file("quantized/old.gguf", 90 * DAY);
    folder.file("quantized/folder/model.safetensors", 90 * DAY);
    folder.file("quantized/folder/config.json", 90 * DAY);
    folder.file("tensors/old", 90 * DAY);
    folder.file("models/0123456789abcdef/old.gguf", 90 * DAY);
    folder.file("hashes/old", 90 * DAY);
    let gone = folder.cache().prune(&Rule::usual(None, 0), false);
    assert_eq!(gone.len(), 4);
    assert!(!folder.at("quantized/folder").exists());
    assert_eq!(
        folder.left(),
        ["models/0123456789abcdef/old.gguf", "packed/new.pack", "tensors/old"]
    );
    // The larger of 32 GiB and three times what was made.
    assert_eq!(Rule::usual(None, 0).made_limit, Some(32 << 30));
    assert_eq!(Rule::usual(None, 20 << 30).made_limit, Some(60 << 30));
    assert_eq!(Rule::usual(Some(5), 20 << 30).made_limit, None);
}

#[test]
fn a_limit_is_for_everything_and_the_longest_unused_go_first() {
    let folder = Folder::new();
    folder.file("models/0123456789abcdef/a.gguf", 5);
    folder.file("models/0123456789abcdef/.lock", 5);
    folder.file("tensors/b", 4);
    folder.file("packed/c.pack", 3);
    folder.file("quantized/d.gguf", 2);
    let snapshot = "models/hub/models--o--n/snapshots/abc";
    for part in ["e-00001-of-00002.gguf", "e-00002-of-00002.gguf"] {
        folder.file(&format!("{snapshot}/{part}"), 1);
    }
    let rule = Rule { limit: Some(4500), ..Rule::default() };
    let would = folder.cache().prune(&rule, true);
    assert_eq!(would.iter().map(|t| t.bytes).sum::<u64>(), 3000);
    assert_eq!(folder.left().len(), 7, "a trial removes nothing");
    folder.cache().prune(&rule, false);
    let parts = [1, 2].map(|i| format!("{snapshot}/e-0000{i}-of-00002.gguf"));
    assert_eq!(folder.left(), [&parts[0], &parts[1], "packed/c.pack", "quantized/d.gguf"]);
    assert!(!folder.at("models/0123456789abcdef").exists());
    // Parts go together, and their folders with them.
    folder.cache().prune(&Rule { unused: Some(Duration::ZERO), ..Rule::default() }, false);
    assert!(folder.left().is_empty());
    assert!(!folder.at("models/hub/models--o--n").exists());
}

#[test]
fn what_is_used_stays_and_is_remembered() {
    let folder = Folder::new();
    let old: Vec<PathBuf> =
        (0..3).map(|i| folder.file(&format!("tensors/{i}"), 100 * DAY + i)).collect();
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    let held = folder.cache().hold(&old[..2]);
    let again = folder.cache().hold(&old[..2]);
    folder.cache().prune(&nothing, false);
    assert_eq!(folder.left(), ["tensors/0", "tensors/1"]);
    drop(held);
    folder.cache().prune(&nothing, false);
    assert_eq!(folder.left().len(), 2, "two uses of the same");
    drop(again);
    // The file is old, its use is not, and is known without a use that lasts.
    let month = Rule { unused: Some(Duration::from_hours(30 * DAY)), ..Rule::default() };
    folder.cache().prune(&month, false);
    assert_eq!(folder.left().len(), 2);
    let modified = std::fs::metadata(&old[0]).unwrap().modified().unwrap();
    assert!(modified < hours(99 * DAY), "the file itself keeps its times");
    folder.cache().prune(&nothing, false);
    assert!(folder.left().is_empty());
    folder.cache().prune(&nothing, false);
    assert_eq!(std::fs::read_dir(folder.at("uses")).unwrap().count(), 1, "the gate alone");
}

/// A use of a folder, of a file in it, and of what is not there yet.
#[test]
fn uses_of_folders() {
    let folder = Folder::new();
    let snapshot = "models/hub/models--o--n/snapshots/abc";
    folder.file(&format!("{snapshot}/config.json"), 100);
    folder.file(&format!("{snapshot}/model.safetensors"), 100);
    let _folder = folder.cache().hold(&[folder.at(snapshot)]);
    let _packed = folder.cache().hold(&[folder.at("packed/later.pack")]);
    folder.file("packed/later.pack", 100);
    folder.file("packed/other.pack", 100);
    // What is not in the cache is not its concern.
    let _other = folder.cache().hold(&[PathBuf::from("/etc/passwd")]);
    folder.cache().prune(&Rule { limit: Some(0), ..Rule::default() }, false);
    assert_eq!(folder.left().len(), 3);
    assert!(folder.at("packed/later.pack").exists());
}

/// Another process holds it; when that is killed, it goes.
#[test]
fn other_processes_count() {
    let folder = Folder::new();
    let path = folder.file("tensors/0", 100);
    drop(folder.cache().hold(std::slice::from_ref(&path)));
    let uses = std::fs::read_dir(folder.at("uses")).unwrap().flatten();
    let list = uses.map(|e| e.path()).find(|p| p.file_name().unwrap() != ".gate").unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "exec 9<\"$1\"; flock --shared 9; echo held; read wait", "sh"])
        .arg(&list)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 5];
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    assert!(folder.cache().things()[0].in_use);
    folder.cache().prune(&nothing, false);
    assert!(path.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    folder.cache().prune(&nothing, false);
    assert!(!path.exists());
}

#[test]
fn downloads_that_go_on_stay() {
    let folder = Folder::new();
    folder.file("models/0123456789abcdef/a.gguf.part", 0);
    folder.file("models/4567456745674567/b.gguf.part", 2);
    folder.file("packed/c.1.part", 2);
    folder.cache().prune(&Rule { limit: Some(0), ..Rule::default() }, false);
    assert_eq!(folder.left(), ["models/0123456789abcdef/a.gguf.part"]);
    // Nobody but the rule's limit asks those to go that can go on.
    folder.file("models/4567456745674567/b.gguf.part", 2000);
    folder.file("packed/c.1.part", 2);
    folder.cache().tidy(0);
    assert_eq!(
        folder.left(),
        ["models/0123456789abcdef/a.gguf.part", "models/4567456745674567/b.gguf.part"]
    );
}

#[test]
fn a_part_gets_its_name_or_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new").join("file");
    drop(Part::create(&path).unwrap());
    assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 0);
    Part::create(&path).unwrap().finish().unwrap();
    assert!(path.exists());
    assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
}

/// All begin the same use at once; the last one alone keeps it.
#[test]
fn uses_that_begin_together_are_one() {
    let folder = Folder::new();
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    for i in 0..20 {
        let path = folder.file(&format!("tensors/{i}"), 100);
        let begin = std::sync::Barrier::new(3);
        let hold = || {
            begin.wait();
            folder.cache().hold(std::slice::from_ref(&path))
        };
        let mut held: Vec<InUse> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(hold)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let last = held.remove(i % 3);
        drop(held);
        folder.cache().prune(&nothing, false);
        assert!(path.exists(), "round {i}");
        drop(last);
    }
}

#[test]
fn a_copy_that_is_written_stays_whole() {
    let folder = Folder::new();
    folder.file("quantized/.tmpabc.part/config.json", 2);
    folder.file("quantized/.tmpabc.part/model.safetensors", 0);
    folder.file("quantized/.tmpold.part/config.json", 2);
    folder.file("models/0123456789abcdef/.tmp.part/wheel.whl", 0);
    folder.cache().prune(&Rule { limit: Some(0), ..Rule::default() }, false);
    let left = [
        "models/0123456789abcdef/.tmp.part/wheel.whl",
        "quantized/.tmpabc.part/config.json",
        "quantized/.tmpabc.part/model.safetensors",
    ];
    assert_eq!(folder.left(), left);
    assert!(!folder.at("quantized/.tmpold.part").exists());
}

#[test]
fn what_is_not_of_the_cache_stays() {
    let (folder, elsewhere) = (Folder::new(), Folder::new());
    let foreign = [
        folder.file("models/mine/notes.gguf", 1000),
        folder.file("models/hub/mine/snapshots/abc/notes.gguf", 1000),
        folder.file("packed/mine/notes", 1000),
        elsewhere.file("packed/notes", 1000),
        elsewhere.file("0123456789abcdef/a.gguf", 1000),
    ];
    std::os::unix::fs::symlink(elsewhere.at("packed"), folder.at("tensors")).unwrap();
    let own = folder.at("models/0123456789abcdef");
    std::os::unix::fs::symlink(elsewhere.at("0123456789abcdef"), own).unwrap();
    let all = Rule { limit: Some(0), unused: Some(Duration::ZERO), ..Rule::default() };
    folder.cache().prune(&all, false);
    folder.cache().remove(&foreign);
    folder.cache().remove(&[folder.at("tensors/notes")]);
    assert!(foreign.iter().all(|path| path.exists()), "{foreign:?}");
    // Nor where all models are elsewhere.
    let other = Folder::new();
    std::os::unix::fs::symlink(elsewhere.0.path(), other.at("models")).unwrap();
    let model = elsewhere.file("hub/models--o--n/snapshots/abc/a.gguf", 1000);
    other.cache().prune(&all, false);
    assert!(foreign.iter().chain([&model]).all(|path| path.exists()));
}

/// Nobody can tell what is in use: nothing goes.
#[test]
fn what_cannot_be_told_stays() {
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    let folder = Folder::new();
    folder.file("tensors/0", 100);
    // A folder where a list should be; then a file where the folder of lists should be.
    std::fs::create_dir_all(folder.at("uses/0123")).unwrap();
    assert!(folder.cache().prune(&nothing, false).is_empty());
    std::fs::remove_dir_all(folder.at("uses")).unwrap();
    std::fs::write(folder.at("uses"), "").unwrap();
    assert!(folder.cache().prune(&nothing, false).is_empty());
    assert_eq!(folder.left(), ["tensors/0"]);
    std::fs::remove_file(folder.at("uses")).unwrap();
    // A damaged list of nobody is none.
    std::fs::create_dir(folder.at("uses")).unwrap();
    std::fs::write(folder.at("uses/0123"), [0xff]).unwrap();
    assert_eq!(folder.cache().prune(&nothing, false).len(), 1);
}

/// Somebody waits for the lock that somebody has.
#[test]
fn locks_that_are_held_stay() {
    let folder = Folder::new();
    folder.file("models/0123456789abcdef/a.gguf", 100);
    let lock = folder.file("models/0123456789abcdef/.lock", 100);
    let held = File::open(&lock).unwrap();
    held.lock().unwrap();
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    folder.cache().prune(&nothing, false);
    assert!(lock.exists());
    assert!(folder.left().is_empty());
}
