//! Options of the torch engine: where it computes, and in what.

mod devices;
mod kept;

use std::fmt;
use std::str::FromStr;

pub use devices::Devices;
pub use kept::{INT4_GROUP, Role, TorchKept};
use serde::{Deserialize, Serialize};

/// Where the torch engine computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU, by its number.
    Cuda(u16),
    /// Several: `millrace-node run` starts a node for each, and no engine ever sees them together.
    Several(Devices),
}

impl FromStr for Device {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Devices::parse(s)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Several(devices) => devices.fmt(f),
        }
    }
}

/// What the torch engine keeps matrices as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TorchDtype {
    /// 32-bit floats.
    F32,
    /// IEEE halves.
    F16,
    /// bfloat16.
    Bf16,
    /// Integers of 8 bits with a scale for each output.
    Int8,
    /// Integers of 4 bits with a scale and a zero for each 32 inputs.
    Int4,
    /// 8-bit floats (E4M3), activations too.
    Fp8,
}

impl TorchDtype {
    /// All of them, as flags spell them.
    const ALL: [(Self, &'static str); 6] = [
        (Self::F32, "f32"),
        (Self::F16, "f16"),
        (Self::Bf16, "bf16"),
        (Self::Int8, "int8"),
        (Self::Int4, "int4"),
        (Self::Fp8, "fp8"),
    ];

    /// Where none is asked for.
    pub fn default_on(device: Device) -> Self {
        match device {
            Device::Cpu => Self::F32,
            Device::Cuda(_) | Device::Several(_) => Self::Bf16,
        }
    }

    /// As flags and messages spell it.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(dtype, _)| *dtype == self).map_or("", |(_, name)| name)
    }
}

impl FromStr for TorchDtype {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == s);
        found.map(|(dtype, _)| *dtype).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(_, name)| *name).collect();
            format!("'{s}' is none of {}", names.join(", "))
        })
    }
}

/// A part of something, in thousandths: more than none, at most all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fraction(u16);

impl Fraction {
    /// This part of `bytes`.
    pub fn of(self, bytes: u64) -> u64 {
        (u128::from(bytes) * u128::from(self.0) / 1000) as u64
    }
}

impl FromStr for Fraction {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let part = s.parse::<f64>().ok().filter(|part| (0.001..=1.0).contains(part));
        part.map(|part| Self((part * 1000.0).round() as u16))
            .ok_or_else(|| format!("'{s}' is no part such as 0.9 (0.001 to 1)"))
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}

/// The options of the torch engine; others have no use for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[cfg_attr(feature = "clap", command(next_help_heading = "Engine"))]
pub struct TorchOptions {
    /// Where the torch engine computes: cpu or cuda:N; with millrace-node run also cuda:all or cuda:0,2, a
    /// node for each [default: cpu; other engines leave $MILLRACE_DEVICE alone] [env: MILLRACE_DEVICE]
    #[cfg_attr(feature = "clap", arg(long, value_name = "DEVICE"))]
    pub device: Option<Device>,
    /// What the torch engine keeps matrices as: f32, f16, bf16, int8, int4 or fp8 [default: f32 on cpu, bf16 on cuda]
    #[cfg_attr(feature = "clap", arg(long, value_name = "TYPE"))]
    pub torch_dtype: Option<TorchDtype>,
    /// Most of the device's free memory that a stage of the torch engine takes
    #[cfg_attr(feature = "clap", arg(long, value_name = "PART", default_value = "0.9"))]
    pub memory_fraction: Fraction,
}

impl TorchOptions {
    /// What matrices are kept as.
    pub fn dtype(&self) -> TorchDtype {
        self.torch_dtype.unwrap_or_else(|| TorchDtype::default_on(self.device()))
    }

    /// Where is computed.
    pub fn device(&self) -> Device {
        self.device.unwrap_or_default()
    }

    /// On this device.
    pub fn on(self, device: Device) -> Self {
        Self { device: Some(device), ..self }
    }

    /// These, with the device that the environment names where no flag does.
    ///
    /// # Errors
    /// If that is no device.
    pub fn or_device(self, environment: Option<&str>) -> Result<Self, String> {
        match (self.device, environment.filter(|text| !text.is_empty())) {
            (None, Some(text)) => match text.parse() {
                Ok(device) => Ok(self.on(device)),
                Err(e) => Err(format!("{}: {e}", crate::names::env::DEVICE)),
            },
            _ => Ok(self),
        }
    }

    /// Whether all of them are what they are where nobody says anything.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for TorchOptions {
    fn default() -> Self {
        Self { device: None, torch_dtype: None, memory_fraction: Fraction(900) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        for (text, device) in
            [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:9", Device::Cuda(9))]
        {
            assert_eq!(text.parse(), Ok(device));
        }
        assert_eq!(Device::Cuda(2).to_string(), "cuda:2");
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda0", "cuda:-1", "cuda:70000", "cpu:0", "0"] {
            assert!(bad.parse::<Device>().is_err_and(|e| e.contains("use cpu, cuda:0")), "{bad}");
        }
    }

    #[test]
    fn dtypes_and_parts() {
        assert_eq!("int4".parse(), Ok(TorchDtype::Int4));
        assert!("q4".parse::<TorchDtype>().is_err_and(|e| e.contains("f32, f16, bf16, int8")));
        let options = TorchOptions::default().on(Device::Cuda(0));
        assert_eq!(
            (options.dtype(), TorchOptions::default().dtype().as_str()),
            (TorchDtype::Bf16, "f32")
        );
        assert_eq!(
            "0.5".parse::<Fraction>().map(|f| (f.of(1000), f.to_string())),
            Ok((500, "0.5".to_owned()))
        );
        let from = |flag: Option<Device>, env| {
            let options = TorchOptions { device: flag, ..TorchOptions::default() };
            options.or_device(env).map(|o| o.device())
        };
        assert_eq!(from(None, Some("cuda:1")), Ok(Device::Cuda(1)));
        assert_eq!(from(Some(Device::Cpu), Some("cuda:1")), Ok(Device::Cpu));
        assert_eq!((from(None, None), from(None, Some(""))), (Ok(Device::Cpu), Ok(Device::Cpu)));
        assert!(from(None, Some("gpu")).is_err_and(|e| e.starts_with("MILLRACE_DEVICE: 'gpu'")));
        for bad in ["0", "1.1", "-1", "NaN", "much", ""] {
            assert!(bad.parse::<Fraction>().is_err_and(|e| e.contains("such as 0.9")), "{bad}");
        }
    }
}
