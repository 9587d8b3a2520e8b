//! Torn, foreign and stale files are found out; what is not used goes.

use std::io::{Seek, SeekFrom, Write};

use millrace_shared::model::{TensorEntry, TensorType};

use super::*;
use crate::TensorSource;
use crate::cpu::buffer::{Arena, Frozen};

fn frozen(bytes: &[u8]) -> Frozen<u8> {
    let mut buf = Arena::new("a test").take::<u8>(bytes.len()).unwrap();
    buf.copy_from_slice(bytes);
    buf.freeze()
}

fn save(store: &Store, key: Key, bytes: &[u8]) {
    let piece = Unsaved { key, data: frozen(bytes), nanos: 7 };
    drop(Saver::start(Store::new(&store.dir), vec![piece]));
}

fn source(name: &str, dims: &[u64], hash: u8) -> Source {
    let entry = TensorEntry {
        name: name.to_owned(),
        dtype: TensorType::Q4_1,
        dims: dims.to_vec(),
        file: 0,
        offset: 0,
        bytes: 0,
        hash: [hash; 32],
    };
    Source::File(TensorSource { entry, path: "/none".into(), offset: 0 })
}

#[test]
fn what_is_saved_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&dir.path().join("new/packed"));
    let (key, bytes) = ([9; 32], vec![5u8; 10_000]);
    assert!(store.open(&key, 10_000).is_none());
    save(&store, key, &bytes);
    let found = store.open(&key, 10_000).unwrap();
    assert_eq!((found.crc, found.nanos), (crc32c::crc32c(&bytes), 7));
    let mut content = vec![0; 10_000];
    found.file.read_exact_at(&mut content, HEADER_BYTES as u64).unwrap();
    assert!(content == bytes);
    assert!(!store.warned.load(Ordering::Relaxed));
    assert!(store.open(&[8; 32], 10_000).is_none());
    let files: Vec<_> = std::fs::read_dir(&store.dir).unwrap().collect();
    assert_eq!(files.len(), 1, "nothing unfinished is left");
    use std::os::unix::fs::PermissionsExt;
    let mode = files[0].as_ref().unwrap().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// What is done to a file, and its name.
type Damage = (&'static str, fn(&File));

#[test]
fn damaged_and_foreign_files_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let (key, bytes) = ([1; 32], vec![3u8; 5000]);
    let damage: [Damage; 6] = [
        ("one byte short", |f| f.set_len(HEADER_BYTES as u64 + 4999).unwrap()),
        ("empty", |f| f.set_len(0).unwrap()),
        ("longer", |f| f.set_len(HEADER_BYTES as u64 + 6000).unwrap()),
        ("magic", |f| f.write_all_at(b"x", 0).unwrap()),
        ("layout", |f| f.write_all_at(&[LAYOUT_REVISION as u8 + 1], 8).unwrap()),
        ("no header", |f| f.write_all_at(&[0; USED_BYTES], 0).unwrap()),
    ];
    for (what, damage) in damage {
        let store = Store::new(dir.path());
        save(&store, key, &bytes);
        assert!(store.open(&key, 5000).is_some(), "{what}");
        damage(&File::options().write(true).open(store.path(&key)).unwrap());
        assert!(store.open(&key, 5000).is_none(), "{what}");
        assert!(store.warned.load(Ordering::Relaxed), "{what}");
    }
    // A sound file of another piece, under this one's name.
    let store = Store::new(dir.path());
    save(&store, [2; 32], &bytes);
    std::fs::rename(store.path(&[2; 32]), store.path(&key)).unwrap();
    assert!(store.open(&key, 5000).is_none());
    assert!(store.warned.load(Ordering::Relaxed));
}

#[test]
fn another_revision_is_another_header() {
    let header = Header { key: [4; 32], bytes: 77, crc: 5, nanos: 6 };
    let mut start = [0; USED_BYTES];
    start.copy_from_slice(&header.encode()[..USED_BYTES]);
    assert_eq!(Header::decode(&start), Ok(header));
    start[8] += 1;
    let crc = crc32c::crc32c(&start[..64]);
    start[64..68].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Header::decode(&start), Err("it has another layout"));
}

#[test]
fn a_folder_that_cannot_be_used_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = File::create(dir.path().join("file")).unwrap();
    file.write_all(b"no folder").unwrap();
    let store = Store::new(&dir.path().join("file/packed"));
    assert!(store.open(&[1; 32], 10).is_none());
    save(&store, [1; 32], &[0; 10]);
    file.seek(SeekFrom::Start(0)).unwrap();
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"no folder");
}

#[test]
fn keys_tell_everything_apart() {
    let (a, b) = (source("a", &[64, 32], 1), source("b", &[64, 32], 2));
    let pair = |x, y| vec![Part::Matrices(vec![x, y])];
    let base = key(&pair(&a, &b), 8).unwrap();
    assert_eq!(key(&pair(&a, &b), 8), Some(base));
    let (wide, other) = (source("b", &[32, 64], 2), source("b", &[64, 32], 3));
    let renamed = source("c", &[64, 32], 2);
    assert_eq!(key(&pair(&a, &renamed), 8), Some(base), "content counts, not names");
    let others = [
        key(&pair(&a, &b), 16),
        key(&pair(&b, &a), 8),
        key(&pair(&a, &wide), 8),
        key(&pair(&a, &other), 8),
        key(&[Part::Matrices(vec![&a]), Part::Matrices(vec![&b])], 8),
        key(&[Part::Vector(&a, 0.0), Part::Matrices(vec![&b])], 8),
    ];
    for (i, other) in others.iter().enumerate() {
        assert!(other.is_some_and(|key| key != base), "{i}");
    }
    let unknown = source("u", &[64, 32], 0);
    assert_eq!(key(&pair(&a, &unknown), 8), None, "unknown content is not kept");
    assert_eq!(key(&[Part::Vector(&a, 0.0)], 8), None);
}
