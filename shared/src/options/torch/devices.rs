//! Several devices of one machine, as `--device` names them: `cuda:all`, `cuda:0,2`, `cuda:1,cpu`.
//!
//! `cpu,cpu` is two nodes that share the processor: of use where there is no GPU to try it with.

use std::fmt;

use super::Device;

/// GPUs have numbers below this, here and in CUDA's own limit of visible ones.
const GPUS: u16 = 64;
/// Most nodes on one processor.
const CPUS: u8 = 16;

/// More than one device, or all GPUs there are: GPUs in the order of their numbers, then processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Devices {
    /// A bit for each GPU; `None` for all that are there.
    gpus: Option<u64>,
    cpus: u8,
}

impl Devices {
    /// A device, or several separated by commas.
    pub(super) fn parse(text: &str) -> Result<Device, String> {
        let wrong = || {
            format!(
                "'{text}' is no device: use cpu, cuda:0, cuda:1, … (several: cuda:all, cuda:0,2)"
            )
        };
        if text == "cuda" {
            return Ok(Device::Cuda(0));
        }
        let (mut gpus, mut all, mut cpus) = (Vec::new(), false, 0u8);
        // A bare number goes on with what came before it.
        let mut numbers = false;
        for part in text.split(',').map(str::trim) {
            let number = part.strip_prefix("cuda:");
            match number.or_else(|| Some(part).filter(|_| numbers)) {
                _ if part == "cpu" => (cpus, numbers) = (cpus.saturating_add(1), false),
                Some("all") if gpus.is_empty() && !all => (all, numbers) = (true, false),
                Some(number) if !all => {
                    let number: u16 = number.parse().map_err(|_| wrong())?;
                    if gpus.contains(&number) {
                        return Err(format!("'{text}' names cuda:{number} twice"));
                    }
                    gpus.push(number);
                    numbers = true;
                }
                _ => return Err(wrong()),
            }
        }
        match (&gpus[..], cpus) {
            (&[one], 0) => Ok(Device::Cuda(one)),
            ([], 1) if !all => Ok(Device::Cpu),
            _ if cpus > CPUS || gpus.iter().any(|&g| g >= GPUS) => {
                Err(format!("'{text}': at most cuda:{} and cpu {CPUS} times", GPUS - 1))
            }
            _ => {
                let bits = gpus.iter().fold(0, |bits, g| bits | 1 << g);
                Ok(Device::Several(Self { gpus: (!all).then_some(bits), cpus }))
            }
        }
    }

    /// One by one; `count` says how many GPUs there are, where all are meant.
    ///
    /// # Errors
    /// That of `count`, or that there is none.
    pub fn list(self, count: impl FnOnce() -> Result<u16, String>) -> Result<Vec<Device>, String> {
        let gpus: Vec<u16> = match self.gpus {
            Some(bits) => (0..GPUS).filter(|g| bits & 1 << g != 0).collect(),
            None => (0..count()?.min(GPUS)).collect(),
        };
        if gpus.is_empty() && self.gpus.is_none() {
            return Err("there is no GPU that CUDA can use (see nvidia-smi and \
                        CUDA_VISIBLE_DEVICES), or use --device cpu"
                .to_owned());
        }
        let cpus = (0..self.cpus).map(|_| Device::Cpu);
        Ok(gpus.into_iter().map(Device::Cuda).chain(cpus).collect())
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        match self.gpus {
            None => parts.push("cuda:all".to_owned()),
            Some(bits) => {
                let numbers = (0..GPUS).filter(|g| bits & 1 << g != 0).map(|g| g.to_string());
                let numbers = numbers.collect::<Vec<_>>().join(",");
                parts.extend((!numbers.is_empty()).then(|| format!("cuda:{numbers}")));
            }
        }
        parts.extend((0..self.cpus).map(|_| "cpu".to_owned()));
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Vec<Device>, String> {
        match text.parse::<Device>()? {
            Device::Several(devices) => {
                assert_eq!(devices.to_string().parse(), Ok(Device::Several(devices)), "{text}");
                devices.list(|| Ok(3))
            }
            one => Ok(vec![one]),
        }
    }

    #[test]
    fn lists_of_devices() {
        use Device::{Cpu, Cuda};
        for (text, expected) in [
            ("cuda:all", &[Cuda(0), Cuda(1), Cuda(2)][..]),
            ("cuda:2,0", &[Cuda(0), Cuda(2)]),
            ("cuda:0,cuda:2", &[Cuda(0), Cuda(2)]),
            ("cuda:1, 63", &[Cuda(1), Cuda(63)]),
            ("cpu,cpu", &[Cpu, Cpu]),
            ("cpu,cuda:1", &[Cuda(1), Cpu]),
            ("cuda:all,cpu", &[Cuda(0), Cuda(1), Cuda(2), Cpu]),
            ("cuda:5", &[Cuda(5)]),
        ] {
            assert_eq!(list(text).as_deref(), Ok(expected), "{text}");
        }
        for bad in ["cuda:0,", "cuda:0,1,1", "0,1", "cpu,0", "cuda:all,1", "cuda:64,0", "cuda:0,x"]
        {
            assert!(list(bad).is_err(), "{bad}");
        }
        assert!(list("cuda:1,1").is_err_and(|e| e.contains("cuda:1 twice")));
        let Ok(Device::Several(all)) = "cuda:all".parse() else { panic!("several") };
        assert!(all.list(|| Ok(0)).is_err_and(|e| e.contains("no GPU") && e.contains("cpu")));
    }
}
