//! Fetches a file so that a fetch that was cut off goes on where it ended, in this process or the
//! next.
//!
//! What arrives goes into `NAME.part` beside the target. It gets its name when length and SHA-256 are
//! what was announced, and is thrown away when they are not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::client::{Answer, Hub, HubError, text};

const CHUNK: usize = 1 << 18;
/// Tries in a row that bring no byte.
const STALLED_TRIES: u32 = 3;
/// Most bytes of a file whose length nobody announces: no weights are.
const MAX_UNANNOUNCED: u64 = 64 << 20;

/// A file to fetch.
pub(in crate::models) struct Wanted<'a> {
    pub(in crate::models) url: String,
    /// Length, where it is known.
    pub(in crate::models) bytes: Option<u64>,
    /// SHA-256 in hexadecimal, where it is known.
    pub(in crate::models) sha256: Option<&'a str>,
    pub(in crate::models) target: &'a Path,
    /// Nobody else writes it at the same time.
    pub(in crate::models) alone: bool,
}

/// The unfinished file and the hash of what is in it.
struct Part {
    file: File,
    hasher: Sha256,
    len: u64,
}

/// Where the part of a file lies.
pub(in crate::models) fn part_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    target.with_file_name(name)
}

/// As [`part_of`], of this download alone: others may write there too.
fn own_part_of(target: &Path) -> PathBuf {
    let part = part_of(target);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.unwrap_or_default().as_nanos();
    part.with_extension(format!("{}-{nanos}.part", std::process::id()))
}

impl Part {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut hasher = Sha256::new();
        let len = io::copy(&mut file, &mut hasher)?;
        Ok(Self { file, hasher, len })
    }

    /// Forgets what is there.
    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hasher, self.len) = (Sha256::new(), 0);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }
}

/// How reading an answer ended.
enum End {
    Whole,
    Broken(String),
}

impl Hub<'_> {
    /// Fetches a file; `progress` gets its bytes so far, those of earlier fetches included.
    ///
    /// # Errors
    /// If the hub does not give it, it is not what was announced, or it cannot be written.
    pub(in crate::models) fn download(
        &self,
        wanted: &Wanted<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), HubError> {
        let part_path = match wanted.alone {
            true => part_of(wanted.target),
            false => own_part_of(wanted.target),
        };
        let mut part = Part::open(&part_path).map_err(|e| cannot_write(&part_path, &e))?;
        let resumed = part.len > 0;
        let mut result = self.fill(wanted, &mut part, progress);
        if resumed && matches!(result, Ok(Err(_))) {
            // The beginning was of another file, or is damaged: once more from nothing.
            part.clear().map_err(|e| cannot_write(&part_path, &e))?;
            result = self.fill(wanted, &mut part, progress);
        }
        if result.is_err() && (part.len == 0 || !wanted.alone) {
            let _ = fs::remove_file(&part_path);
        }
        if let Err(problem) = result? {
            let _ = fs::remove_file(&part_path);
            return Err(HubError::Refused(format!("{}: {problem}", wanted.url)));
        }
        let kept = part.file.sync_all().and_then(|()| fs::rename(&part_path, wanted.target));
        kept.map_err(|e| cannot_write(wanted.target, &e))?;
        // Not every system can sync a folder; the file itself is safe either way.
        let folder = wanted.target.parent().map(File::open);
        let _ = folder.map(|f| f.and_then(|f| f.sync_all()));
        Ok(())
    }

    /// Fills a part up; the inner error says why what came is not the wanted file.
    fn fill(
        &self,
        wanted: &Wanted<'_>,
        part: &mut Part,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Result<(), String>, HubError> {
        let (mut tries, mut expected) = (0, wanted.bytes);
        let mut sha256 = wanted.sha256.map(str::to_owned);
        while expected != Some(part.len) || part.len == 0 {
            let before = part.len;
            let range = (before > 0).then_some((before, None));
            let end = match self.get(&wanted.url, range, None) {
                Ok(mut answer) => {
                    sha256 = sha256.or_else(|| answer.sha256.take());
                    let total = match place(part, &answer) {
                        Ok(total) => total,
                        Err(problem) => return Ok(Err(problem)),
                    };
                    if let (Some(total), Some(expected)) = (total, expected)
                        && total != expected
                    {
                        let text =
                            format!("the file there has {total} bytes instead of {expected}");
                        return Ok(Err(text));
                    }
                    expected = expected.or(total);
                    let read = copy(answer, part, expected, progress);
                    let end = read.map_err(|e| cannot_write(wanted.target, &e))?;
                    if expected.is_none() && part.len > MAX_UNANNOUNCED {
                        return Ok(Err(
                            "nobody says how long it is, and it does not end".to_owned()
                        ));
                    }
                    end
                }
                Err(HubError::Unreachable(problem)) if before > 0 => End::Broken(problem),
                Err(error) => return Err(error),
            };
            let End::Broken(problem) = end else { break };
            tries = if part.len > before { 1 } else { tries + 1 };
            if tries >= STALLED_TRIES {
                return Err(HubError::Unreachable(format!(
                    "{}: it broke off after {} bytes: {problem}; the same command goes on from there",
                    wanted.url, part.len
                )));
            }
            std::thread::sleep(self.pause(tries));
        }
        if let Some(expected) = expected
            && part.len != expected
        {
            return Ok(Err(format!("it is longer than the expected {expected} bytes")));
        }
        let found = hex(&part.hasher.clone().finalize());
        match sha256 {
            Some(wanted) if !wanted.eq_ignore_ascii_case(&found) => {
                Ok(Err(format!("its SHA-256 is {found} instead of {wanted}")))
            }
            _ => Ok(Ok(())),
        }
    }
}

/// Makes the part ready for what an answer brings, and says how long the file is by it.
fn place(part: &mut Part, answer: &Answer) -> Result<Option<u64>, String> {
    let headers = answer.response.headers();
    let number = |name: &str| text(headers, name).and_then(|v| v.parse::<u64>().ok());
    match answer.response.status().as_u16() {
        206 => {
            // "bytes 100-199/200", or "/*" where the server does not know.
            let range = text(headers, "content-range").unwrap_or_default();
            let range = range.trim_start_matches("bytes").trim();
            let (span, total) = range.split_once('/').unwrap_or((range, "*"));
            let from = span.split('-').next().and_then(|s| s.parse::<u64>().ok());
            if from != Some(part.len) {
                return Err(format!("bytes from {} were asked for, '{span}' came", part.len));
            }
            Ok(total.parse().ok())
        }
        200 => {
            part.clear().map_err(|e| e.to_string())?;
            Ok(number("content-length"))
        }
        _ => Err(format!("the server has no bytes after {}", part.len)),
    }
}

/// Reads an answer into the part; the outer error is of writing.
fn copy(
    answer: Answer,
    part: &mut Part,
    expected: Option<u64>,
    progress: &mut dyn FnMut(u64),
) -> io::Result<End> {
    let mut body = answer.response.into_body().into_reader();
    let mut buffer = vec![0u8; CHUNK];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Ok(End::Broken(e.to_string())),
        };
        part.append(&buffer[..n])?;
        progress(part.len);
        if part.len > expected.unwrap_or(MAX_UNANNOUNCED) {
            break;
        }
    }
    Ok(match expected {
        Some(expected) if part.len < expected => {
            End::Broken(format!("it ended before {expected} bytes"))
        }
        _ => End::Whole,
    })
}

fn cannot_write(path: &Path, error: &io::Error) -> HubError {
    HubError::Refused(format!("cannot write {}: {error}", path.display()))
}

pub(in crate::models) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
