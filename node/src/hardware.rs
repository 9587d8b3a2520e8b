//! What this machine offers: cores that the process may use, memory, processor. Linux's `/proc` and
//! cgroup v2; elsewhere modest defaults.

use std::fs;

use millrace_engine::cpu::available_bytes;

/// Assumed where the system does not say how much memory is free.
const UNKNOWN_MEMORY: u64 = 4 << 30;

/// What a node tells the coordinator about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Physical cores that affinity and cgroup grant.
    pub cores: usize,
    /// Why that many, for the start line.
    pub cores_reason: String,
    /// Bytes of memory available to this process now.
    pub memory_bytes: u64,
    /// Processor.
    pub processor: String,
    /// Host name.
    pub host: String,
}

impl Hardware {
    /// Looks at the machine.
    pub fn probe() -> Self {
        let (cores, cores_reason) = cores();
        Self {
            cores,
            cores_reason,
            memory_bytes: available_bytes().unwrap_or(UNKNOWN_MEMORY),
            processor: processor(),
            host: read_trimmed("/proc/sys/kernel/hostname").unwrap_or_else(|| "localhost".into()),
        }
    }
}

fn read_trimmed(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned()).filter(|s| !s.is_empty())
}

/// Logical cores by affinity, folded to physical ones, capped by the cgroup's CPU quota.
fn cores() -> (usize, String) {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads_per_core = 1;
    if let Some(siblings) =
        read_trimmed("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    {
        threads_per_core = parse_cpu_list(&siblings).max(1);
    }
    let physical = logical.div_ceil(threads_per_core).max(1);
    let reason = if threads_per_core > 1 {
        format!("{physical} physical cores of {logical} hardware threads")
    } else {
        format!("{physical} cores granted by affinity and cgroup")
    };
    (physical, reason)
}

/// Counts the CPUs of a list such as `0-3,8`.
fn parse_cpu_list(list: &str) -> usize {
    list.split(',')
        .filter_map(|part| {
            let mut ends = part.trim().splitn(2, '-').map(|n| n.parse::<usize>().ok());
            let first = ends.next()??;
            let last = ends.next().flatten().unwrap_or(first);
            Some(last.saturating_sub(first) + 1)
        })
        .sum()
}

fn processor() -> String {
    fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|s| {
            let line = s.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0"), 1);
        assert_eq!(parse_cpu_list("0-3,8"), 5);
        assert_eq!(parse_cpu_list("0,64"), 2);
        assert_eq!(parse_cpu_list(""), 0);
    }

    #[test]
    fn probe_finds_something() {
        let h = Hardware::probe();
        assert!(h.cores >= 1);
        assert!(h.memory_bytes > 1 << 20);
    }
}
