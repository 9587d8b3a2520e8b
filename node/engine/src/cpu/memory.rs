//! How much memory this process may still take: of the machine, and of the control groups that it
//! runs in, each of which may set a limit. Only for an error message in time; the system decides.

use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Bytes that are free; `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    [meminfo_available(), cgroup_available(Path::new(CGROUPS), &groups)].into_iter().flatten().min()
}

fn meminfo_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least that a group of this process, or a parent of one, has left. `groups` are lines
/// `number:controllers:path`.
fn cgroup_available(root: &Path, groups: &str) -> Option<u64> {
    let group = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        match controllers {
            "" => left(root, path, "memory.max", "memory.current", "inactive_file"),
            c if c.split(',').any(|c| c == "memory") => left(
                &root.join("memory"),
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            _ => None,
        }
    };
    groups.lines().filter_map(group).min()
}

/// What `path` below `mount` and all its parents leave. In a container, `path` may not be visible:
/// then only the parents that are count.
fn left(mount: &Path, path: &str, max: &str, current: &str, cache: &str) -> Option<u64> {
    let own: PathBuf = mount.join(path.trim_start_matches('/'));
    let one = |dir: &Path| {
        let limit = number(&dir.join(max))?;
        let used = number(&dir.join(current))?;
        // The page cache gives way.
        let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let value = |l: &str| l.strip_prefix(cache)?.strip_prefix(' ')?.trim().parse::<u64>().ok();
        let cache = stat.lines().find_map(value).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cache)))
    };
    own.ancestors().take_while(|dir| dir.starts_with(mount)).filter_map(one).min()
}

/// A file of one number; `max` is none.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(dir: &Path, names: [&str; 2], max: &str, current: &str, stat: &str) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(names[0]), format!("{max}\n")).unwrap();
        std::fs::write(dir.join(names[1]), format!("{current}\n")).unwrap();
        std::fs::write(dir.join("memory.stat"), stat).unwrap();
    }

    #[test]
    fn the_tightest_parent_counts() {
        let root = tempfile::tempdir().unwrap();
        let names = ["memory.max", "memory.current"];
        let slice = root.path().join("a");
        group(&slice, names, "1000", "700", "anon 600\ninactive_file 100\n");
        group(&slice.join("b"), names, "max", "500", "");
        group(&slice.join("b/c"), names, "5000", "100", "");
        let available = |groups: &str| cgroup_available(root.path(), groups);
        assert_eq!(available("0::/a/b/c\n"), Some(400));
        assert_eq!(available("0::/a/b/not-visible\n"), Some(400));
        assert_eq!(available("0::/\n"), None);
        group(root.path(), names, "350", "0", "");
        assert_eq!(available("0::/a/b/c\n"), Some(350));
        assert_eq!(available("0::/../outside\n"), Some(350));
    }

    #[test]
    fn groups_of_the_first_version() {
        let root = tempfile::tempdir().unwrap();
        let names = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
        group(&root.path().join("memory/x"), names, "900", "800", "total_inactive_file 300\n");
        let groups = "5:cpu,cpuacct:/y\n4:hugetlb,memory:/x/deeper\n0::/\n";
        assert_eq!(cgroup_available(root.path(), groups), Some(400));
    }

    #[test]
    fn this_machine_says_something() {
        assert!(available_bytes().is_some_and(|free| free > 0));
    }
}
