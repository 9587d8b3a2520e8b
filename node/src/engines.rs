//! Which engine a node computes with, and what that says of its machine.

use anyhow::{anyhow, ensure};
use millrace_engine::cpu::{self, CpuEngine};
use millrace_engine::mock::{self, MockConfig, MockEngine};
use millrace_engine::thread::EngineFactory;
use millrace_engine::{Engine as _, Isa};
use millrace_shared::options::{EngineKind, TorchOptions};

use crate::Config;
use crate::hardware::Hardware;

/// An engine to be made on a thread of its own.
pub(crate) struct Chosen {
    /// Revision of its numerics.
    pub(crate) numerics: String,
    pub(crate) factory: EngineFactory,
    /// The device and its free memory, where that is not this machine's processor.
    device: Option<Device>,
}

/// What computes beside the processor's own kernels.
struct Device {
    description: String,
    memory_bytes: Option<u64>,
}

impl Chosen {
    /// What the machine offers with this engine.
    pub(crate) fn hardware(&self, mut hardware: Hardware, isa: Isa) -> Hardware {
        match &self.device {
            None => hardware.processor = format!("{}, {isa}", hardware.processor),
            Some(device) => {
                hardware.processor = format!("{}, {}", hardware.processor, device.description);
                if let Some(bytes) = device.memory_bytes {
                    hardware.memory_bytes = bytes;
                }
            }
        }
        hardware
    }
}

/// The engine that the settings name.
///
/// # Errors
/// If it is not in this build, or its device is not there: with what to type.
pub(crate) fn of(config: &Config, mock: &MockConfig) -> anyhow::Result<Chosen> {
    choose(config.engine, config.torch, mock)
}

fn choose(kind: EngineKind, options: TorchOptions, mock: &MockConfig) -> anyhow::Result<Chosen> {
    ensure!(
        kind == EngineKind::Torch || options.is_default(),
        "--device, --torch-dtype and --memory-fraction are the torch engine's: add --engine torch"
    );
    Ok(match kind {
        EngineKind::Cpu => Chosen {
            numerics: cpu::numerics_revision(),
            factory: Box::new(|| Box::new(CpuEngine::new())),
            device: None,
        },
        EngineKind::Torch => torch(options)?,
        EngineKind::Mock => Chosen {
            numerics: MockEngine::new(mock.clone()).numerics_revision(),
            factory: mock::factory(mock.clone()),
            device: None,
        },
    })
}

#[cfg(feature = "torch")]
fn torch(options: TorchOptions) -> anyhow::Result<Chosen> {
    use millrace_shared::options::Device as At;
    use millrace_torch::{Place, TorchEngine, numerics_revision};

    let place = Place::open(options.device, options.dtype()).map_err(|e| anyhow!("{e}"))?;
    let memory = place.memory().filter(|_| options.device != At::Cpu);
    let memory_bytes = memory.map(|m| options.memory_fraction.of(m.free));
    // What is free changes, and measurements are kept under this name.
    let gib = |bytes: u64| format!(" ({:.1} GiB)", bytes as f64 / f64::from(1 << 30));
    let size = memory.map_or_else(String::new, |m| gib(m.total));
    let dtype = options.dtype().as_str();
    let description = format!("libtorch on {}{size}, {dtype}", options.device);
    Ok(Chosen {
        numerics: numerics_revision(&options),
        factory: Box::new(move || Box::new(TorchEngine::new(options))),
        device: Some(Device { description, memory_bytes }),
    })
}

#[cfg(not(feature = "torch"))]
fn torch(_: TorchOptions) -> anyhow::Result<Chosen> {
    Err(anyhow!(
        "this program was built without the torch engine. With it: env=$(deploy/libtorch.sh) && \
         eval \"$env\" && cargo build --release --features torch (here: --engine cpu)"
    ))
}

#[cfg(test)]
mod tests {
    use millrace_shared::options::Device as At;

    use super::*;

    fn refusal(engine: EngineKind, device: At) -> String {
        let torch = TorchOptions { device, ..TorchOptions::default() };
        let chosen = choose(engine, torch, &MockConfig::default());
        chosen.err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_to_type() {
        assert_eq!(refusal(EngineKind::Cpu, At::Cpu), "");
        assert!(refusal(EngineKind::Cpu, At::Cuda(0)).contains("add --engine torch"));
        let torch = refusal(EngineKind::Torch, At::Cpu);
        if cfg!(feature = "torch") {
            assert_eq!(torch, "");
            assert!(refusal(EngineKind::Torch, At::Cuda(63)).contains("--device cuda:63"));
        } else {
            assert!(
                torch.contains("--features torch") && torch.contains("--engine cpu"),
                "{torch}"
            );
        }
    }
}
