//! `millrace doctor --bundle FILE`: what all members of a cluster know of the last minute, in one zip
//! file, to be sent to somebody who helps.
//!
//! Members hand over neither prompts nor tokens nor secrets; the key that asked is looked for all the
//! same. A member that does not answer has its error in the file instead.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, CollectedFile};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::output;
use crate::table;
use crate::target::RunningArgs;

/// Collects and writes. A file that is there already stays.
///
/// # Errors
/// If the cluster cannot be asked, or the file cannot be written.
pub(crate) async fn write(running: &RunningArgs, path: &Path) -> anyhow::Result<()> {
    let mut open = OpenOptions::new();
    open.write(true).create_new(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut open, 0o600);
    let file = open.open(path).with_context(|| path.display().to_string())?;
    let result = fill(running, file).await;
    if result.is_err() {
        let _ = std::fs::remove_file(path);
    }
    let (files, missing) = result?;
    let bytes = std::fs::metadata(path)?.len();
    output::write(format_args!("{}: {files} files, {}\n", path.display(), table::bytes(bytes)))?;
    anyhow::ensure!(missing.is_empty(), "these did not answer: {}", missing.join(", "));
    Ok(())
}

/// How many files there are, and whose are missing.
async fn fill(running: &RunningArgs, file: File) -> anyhow::Result<(usize, Vec<String>)> {
    let secret = running.secret()?;
    let mut zip = Zip { writer: ZipWriter::new(file), secret, files: 0 };
    let own = collected(running.admin(AdminRequest::Collect { node: None }).await?)?;
    zip.add("coordinator", own)?;
    let nodes = match running.admin(AdminRequest::Nodes).await? {
        AdminReply::Nodes(nodes) => nodes,
        other => anyhow::bail!("the cluster's answer makes no sense: {other:?}"),
    };
    let mut missing = Vec::new();
    for node in nodes {
        let folder = format!("nodes/{}-{}", plain(&node.name), node.id);
        let asked = AdminRequest::Collect { node: Some(node.id.to_string()) };
        match running.admin(asked).await.and_then(collected) {
            Ok(files) => zip.add(&folder, files)?,
            Err(e) => {
                let bytes = format!("{e:#}\n").into_bytes();
                zip.add(&folder, vec![CollectedFile { name: "error.txt".to_owned(), bytes }])?;
                missing.push(node.name);
            }
        }
    }
    let about = format!("millrace {}\n", env!("CARGO_PKG_VERSION")).into_bytes();
    zip.add("client", vec![CollectedFile { name: "about.txt".to_owned(), bytes: about }])?;
    zip.writer.finish()?;
    Ok((zip.files, missing))
}

fn collected(reply: AdminReply) -> anyhow::Result<Vec<CollectedFile>> {
    match reply {
        AdminReply::Collected(files) => Ok(files),
        other => Err(anyhow::anyhow!("the cluster's answer makes no sense: {other:?}")),
    }
}

/// A name that may be part of a path.
fn plain(name: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    name.chars().take(64).map(keep).collect()
}

struct Zip {
    writer: ZipWriter<File>,
    /// What must not be in it.
    secret: String,
    files: usize,
}

impl Zip {
    fn add(&mut self, folder: &str, files: Vec<CollectedFile>) -> anyhow::Result<()> {
        for file in files {
            let name: String = file
                .name
                .chars()
                .filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c))
                .collect();
            self.writer.start_file(format!("{folder}/{name}"), SimpleFileOptions::default())?;
            self.writer.write_all(&without(&self.secret, file.bytes))?;
            self.files += 1;
        }
        Ok(())
    }
}

/// The same bytes with stars in the place of a secret.
fn without(secret: &str, bytes: Vec<u8>) -> Vec<u8> {
    if secret.is_empty() || !bytes.windows(secret.len()).any(|w| w == secret.as_bytes()) {
        return bytes;
    }
    String::from_utf8_lossy(&bytes).replace(secret, "***").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_odd_names_do_not_get_in() {
        assert_eq!(without("sk-1", b"a sk-1 b".to_vec()), b"a *** b");
        assert_eq!(without("", b"a".to_vec()), b"a");
        assert_eq!(plain("../gpu b"), "___gpu_b");
    }
}
