//! Kinds of machines with nominal figures, for plans before there is a machine.
//!
//! A table. The figures are the makers' memory bandwidth and dense 16-bit rate (multiply-adds: half
//! the operations a second), of which `REACHED` is counted on; for processors, what a core of a
//! present server does with 4-bit weights. Everything that is planned with them is an estimate, and
//! reports say so.

use millrace_shared::cluster_file::{ClusterFile, Limits, NodeEntry};
use millrace_shared::options::{TorchDtype, TorchKept};

/// A kind of accelerator: name, memory (GB), bandwidth (GB/s), multiply-adds (10^12/s).
type Row = (&'static str, u64, f64, f64);

const ACCELERATORS: &[Row] = &[
    ("h200-141g", 141, 4800.0, 495.0),
    ("h100-80g", 80, 3350.0, 495.0),
    ("a100-80g", 80, 2039.0, 156.0),
    ("a100-40g", 40, 1555.0, 156.0),
    ("mi300x-192g", 192, 5300.0, 653.0),
    ("l40s-48g", 48, 864.0, 181.0),
    ("l4-24g", 24, 300.0, 60.0),
    ("a10-24g", 24, 600.0, 62.0),
    ("t4-16g", 16, 320.0, 32.0),
    ("rtx5090-32g", 32, 1792.0, 105.0),
    ("rtx4090-24g", 24, 1008.0, 82.0),
    ("rtx3090-24g", 24, 936.0, 35.0),
];
/// Share of the makers' bandwidth and rate that is counted on.
const REACHED: (f64, f64) = (0.7, 0.4);
/// Seconds that launching the operations of a layer takes on an accelerator.
const LAUNCH: f64 = 50e-6;
/// Memory bandwidth of a core, and the most of a processor, bytes a second.
const CORE_BANDWIDTH: (f64, f64) = (12e9, 200e9);
/// Multiply-adds a second of a core.
const CORE_RATE: f64 = 80e9;
/// Seconds that passing work to a processor's threads takes in a layer.
const HAND_OVER: f64 = 5e-6;

/// Machines such as `3xh100-80g,5xcpu-32c-128g`.
///
/// # Errors
/// Names the part that is no kind, and the kinds there are.
pub fn parse(text: &str) -> Result<ClusterFile, String> {
    let mut node: Vec<NodeEntry> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (count, kind) = match part.split_once('x') {
            Some((n, kind)) if n.chars().all(|c| c.is_ascii_digit()) && !n.is_empty() => {
                let count = n.parse().ok().filter(|n| (1..=1024).contains(n));
                let wrong = || format!("'{part}': the number of machines must be from 1 to 1024");
                (count.ok_or_else(wrong)?, kind)
            }
            _ => (1, part),
        };
        let mut entry = kind_of(kind).ok_or_else(|| unknown(kind))?;
        if node.iter().any(|n| n.name == entry.name) {
            return Err(format!("'{kind}' is there twice: write the sum, such as 4x{kind}"));
        }
        entry.count = (count > 1).then_some(count);
        node.push(entry);
    }
    let file = ClusterFile { node, ..ClusterFile::default() };
    file.validate().map_err(|_| format!("'{text}' names no machine; {}", known()))?;
    Ok(file)
}

fn unknown(kind: &str) -> String {
    format!("there is no kind '{kind}'; {}", known())
}

fn known() -> String {
    let names: Vec<&str> = ACCELERATORS.iter().map(|row| row.0).collect();
    format!(
        "kinds are {} and cpu-Nc-Mg (N cores, M GB of memory), with the number of machines before \
         them: 3xh100-80g,5xcpu-32c-128g",
        names.join(", ")
    )
}

fn kind_of(kind: &str) -> Option<NodeEntry> {
    let (memory, limits, torch) = match ACCELERATORS.iter().find(|row| row.0 == kind) {
        Some(&(_, memory, bandwidth, rate)) => {
            let limits = Limits {
                memory_bytes_per_second: bandwidth * 1e9 * REACHED.0,
                multiply_adds_per_second: rate * 1e12 * REACHED.1,
                layer_overhead_seconds: LAUNCH,
            };
            // As `--device cuda` keeps weights where nothing else is said.
            (memory, limits, Some(TorchKept { dtype: TorchDtype::Bf16, gpu: true }))
        }
        None => {
            let (memory, limits) = processor(kind)?;
            (memory, limits, None)
        }
    };
    Some(NodeEntry {
        name: kind.to_owned(),
        hardware: Some("nominal figures".to_owned()),
        memory_bytes: memory * 1_000_000_000,
        limits: Some(limits),
        torch,
        ..NodeEntry::default()
    })
}

/// `cpu-32c-128g`.
fn processor(kind: &str) -> Option<(u64, Limits)> {
    let (cores, memory) = kind.strip_prefix("cpu-")?.split_once('-')?;
    let number = |text: &str, unit| text.strip_suffix(unit)?.parse::<u32>().ok();
    let cores = number(cores, 'c').filter(|n| (1..=1024).contains(n))?;
    let memory = number(memory, 'g').filter(|n| (1..=65_536).contains(n))?;
    let limits = Limits {
        memory_bytes_per_second: (f64::from(cores) * CORE_BANDWIDTH.0).min(CORE_BANDWIDTH.1),
        multiply_adds_per_second: f64::from(cores) * CORE_RATE,
        layer_overhead_seconds: HAND_OVER,
    };
    Some((u64::from(memory), limits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted() {
        let file = parse("3xh100-80g, 5xcpu-32c-128g,rtx4090-24g").unwrap();
        let all: Vec<_> = file.node.iter().map(|n| (n.name.as_str(), n.count)).collect();
        let expected = [("h100-80g", Some(3)), ("cpu-32c-128g", Some(5)), ("rtx4090-24g", None)];
        assert_eq!(all, expected);
        assert_eq!(file.node[1].memory_bytes, 128_000_000_000);
        for (bad, says) in [
            ("3xh100", "no kind 'h100'"),
            ("cpu-0c-1g", "no kind"),
            ("", "names no machine"),
            ("0xl4-24g", "from 1 to 1024"),
            ("l4-24g,2xl4-24g", "twice"),
        ] {
            let message = parse(bad).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }
}
