//! Who holds memory of a GPU, by `nvidia-smi`: for messages alone. What it does not say within its time
//! is left out.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// `nvidia-smi` takes up to a few seconds where the driver is not kept loaded.
const LIMIT: Duration = Duration::from_secs(5);
/// The longest output that is looked at.
const MOST: u64 = 64 << 10;
/// So many are named, the largest first.
const NAMED: usize = 4;

/// Processes with memory of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holders(Vec<Holder>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
    /// `None` where the driver does not tell.
    mebibytes: Option<u64>,
}

impl Holders {
    /// Asks `program` for those of the GPU with this bus address.
    pub(crate) fn of(program: &str, bus_id: &str) -> Self {
        let child = Command::new(program)
            .args(["--id", bus_id, "--query-compute-apps=pid,used_memory,process_name"])
            .arg("--format=csv,noheader,nounits")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else { return Self::default() };
        let (sender, receiver) = mpsc::channel();
        let output = child.stdout.take();
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = output.map(|out| out.take(MOST).read_to_string(&mut text));
            let _ = sender.send(if matches!(read, Some(Ok(_))) { text } else { String::new() });
        });
        let text = receiver.recv_timeout(LIMIT).unwrap_or_default();
        // It has said all it had to say, or takes too long.
        let _ = child.kill();
        let _ = child.wait();
        Self::parse(&text, std::process::id())
    }

    /// Its lines: number, memory in MiB, name. This process is left out.
    fn parse(text: &str, own: u32) -> Self {
        let one = |line: &str| {
            let mut fields = line.splitn(3, ',').map(str::trim);
            let pid = fields.next()?.parse().ok().filter(|&pid| pid != own)?;
            let mebibytes = fields.next()?.parse().ok();
            let path = fields.next()?;
            let name = path.rsplit('/').next().unwrap_or(path);
            let name = name.chars().filter(|c| !c.is_control()).take(40).collect();
            Some(Holder { pid, name, mebibytes })
        };
        let mut all: Vec<Holder> = text.lines().filter_map(one).collect();
        all.sort_by_key(|h| std::cmp::Reverse(h.mebibytes));
        Self(all)
    }

    /// `; python3 (process 4711) holds 17.9 GiB`, or nothing.
    pub(crate) fn text(&self) -> String {
        let one = |h: &Holder| {
            let size = h.mebibytes.map_or_else(
                || "some".to_owned(),
                |mebibytes| format!("{:.1} GiB", mebibytes as f64 / 1024.0),
            );
            format!("; {} (process {}) holds {size}", h.name, h.pid)
        };
        let mut text: String = self.0.iter().take(NAMED).map(one).collect();
        if let Some(rest) = self.0.len().checked_sub(NAMED).filter(|&rest| rest > 0) {
            text += &format!("; and {rest} more processes hold some");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const SAMPLE: &str = "\
4711, 18330, /usr/bin/python3
99, 2048, /opt/other server/bin/serve, v2
5, [N/A], [Not Found]
12, 70000, VLLM::EngineCore
No running processes found
";

    #[test]
    fn who_holds_memory() {
        let all = Holders::parse(SAMPLE, 99);
        assert_eq!(
            all.text(),
            "; VLLM::EngineCore (process 12) holds 68.4 GiB; python3 (process 4711) holds 17.9 GiB; \
             [Not Found] (process 5) holds some"
        );
        let with_own = Holders::parse(SAMPLE, 1);
        assert!(with_own.text().contains("; serve, v2 (process 99) holds 2.0 GiB"));
        let many: String = (10..17).map(|pid| format!("{pid}, 1024, a\n")).collect();
        assert!(Holders::parse(&many, 1).text().ends_with("; and 3 more processes hold some"));
        for nothing in ["", "\n", "No running processes found", "x, y", "1, 2"] {
            assert_eq!(Holders::parse(nothing, 1).text(), "", "{nothing}");
        }
    }

    #[test]
    fn it_is_asked_about_one_gpu() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("nvidia-smi");
        std::fs::write(&program, "#!/bin/sh\n[ \"$2\" = 0000:01:00.0 ] && echo 7, 1024, a/b\n")
            .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let of = |id: &str| Holders::of(&program.display().to_string(), id).text();
        assert_eq!(of("0000:01:00.0"), "; b (process 7) holds 1.0 GiB");
        assert_eq!(of("0000:02:00.0"), "");
        assert_eq!(Holders::of("/no/such/program", "0").text(), "");
    }
}
