//! Models that are being written: whatever ends the writer, what was there stays and nothing else is
//! left.

#![allow(clippy::unwrap_used)]

#[path = "families/case.rs"]
mod case;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use case::Case;
use millrace_engine::target::{Target, TargetError};
use millrace_shared::model::{FolderSource, TensorType};

/// Where a child of these tests is to write.
const WRITER: &str = "MILLRACE_TEST_WRITER";
const NEEDED: u64 = 1000;

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Begins both kinds of targets in a folder, and writes something.
fn begin(dir: &Path) -> [Target; 2] {
    let source = FolderSource::open(&dir.join("source")).unwrap();
    let file = Target::file(&source.paths[0], &dir.join("file"), true, NEEDED).unwrap();
    let ours = |path: &Path| path.join("config.json").is_file();
    let folder = Target::folder(&source, &dir.join("folder"), (true, &ours), b"{}", NEEDED);
    let targets = [file, folder.unwrap()];
    for target in &targets {
        target.weights().write_all(b"half of it").unwrap();
    }
    targets
}

/// A folder with a model in it, and, if asked for, what is to be replaced.
fn home(there: bool) -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let model = Case::read("llama").folder(TensorType::BF16, 1);
    copy(model.path(), &home.path().join("source"));
    if there {
        fs::write(home.path().join("file"), "old").unwrap();
        copy(model.path(), &home.path().join("folder"));
        fs::write(home.path().join("folder/old.txt"), "old").unwrap();
    }
    let path = home.path().to_owned();
    (home, path)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// Alone it is a writer that gives up; as a child it waits for its end.
#[test]
fn who_gives_up_leaves_nothing() {
    if let Some(dir) = std::env::var_os(WRITER) {
        let _targets = begin(Path::new(&dir));
        println!("written");
        let _ = std::io::stdin().lines().next();
        return;
    }
    let (_home, dir) = home(true);
    let before = names(&dir);
    drop(begin(&dir));
    assert_eq!(names(&dir), before);
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "old");
}

#[test]
fn a_killed_writer_leaves_nothing() {
    for there in [false, true] {
        let (_home, dir) = home(there);
        let before = (names(&dir), there.then(|| names(&dir.join("folder"))));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "who_gives_up_leaves_nothing", "--nocapture"])
            .env(WRITER, &dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let written = lines.map_while(Result::ok).any(|line| line.ends_with("written"));
        assert!(written, "the child has written");
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!((names(&dir), there.then(|| names(&dir.join("folder")))), before);
    }
}

#[test]
fn what_is_whole_takes_its_place() {
    for there in [false, true] {
        let (_home, dir) = home(there);
        let [file, folder] = begin(&dir);
        file.finish().unwrap();
        folder.finish().unwrap();
        assert_eq!(names(&dir), ["file", "folder", "source"]);
        assert_eq!(fs::read(dir.join("file")).unwrap(), b"half of it");
        let weights = dir.join("folder").join(FolderSource::weights_name());
        assert_eq!(fs::read(&weights).unwrap(), b"half of it");
        assert_eq!(fs::read(dir.join("folder/config.json")).unwrap(), b"{}");
        assert!(!dir.join("folder/old.txt").exists());
        for path in [dir.join("file"), weights] {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o700, 0o600, "{mode:o}");
            assert_eq!(mode & !0o100_644, 0, "{mode:o}");
        }
    }
}

/// What came meanwhile is somebody else's.
#[test]
fn nothing_is_replaced_unasked() {
    let (_home, dir) = home(false);
    let source = FolderSource::open(&dir.join("source")).unwrap();
    let target = Target::file(&source.paths[0], &dir.join("file"), false, NEEDED).unwrap();
    fs::write(dir.join("file"), "new").unwrap();
    let refused = target.finish().unwrap_err();
    assert!(matches!(&refused, TargetError::Exists(at) if at.ends_with("file")), "{refused}");
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "new");
    assert_eq!(names(&dir), ["file", "source"]);
    let ours = |_: &Path| true;
    let target =
        Target::folder(&source, &dir.join("folder/."), (false, &ours), b"{}", NEEDED).unwrap();
    // What goes along is known from the beginning on.
    let known = source.others.iter().map(|path| path.file_name().unwrap()).collect::<Vec<_>>();
    assert!(!known.is_empty());
    fs::create_dir(dir.join("folder")).unwrap();
    fs::write(dir.join("folder/new"), "new").unwrap();
    let refused = target.finish().unwrap_err();
    assert!(matches!(&refused, TargetError::Exists(at) if at.ends_with("folder")), "{refused}");
    assert_eq!(fs::read_to_string(dir.join("folder/new")).unwrap(), "new");
    assert_eq!(names(&dir), ["file", "folder", "source"]);
    let target =
        Target::folder(&source, &dir.join("other"), (false, &ours), b"{}", NEEDED).unwrap();
    source.others.iter().for_each(|path| fs::remove_file(path).unwrap());
    target.finish().unwrap();
    assert!(known.iter().all(|name| dir.join("other").join(name).is_file()));
}
