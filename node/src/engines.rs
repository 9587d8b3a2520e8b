//! Which engine a node computes with, and what that says of its machine.

use anyhow::{anyhow, ensure};
use millrace_engine::cpu::{self, CpuEngine};
use millrace_engine::mock::{self, MockConfig, MockEngine};
use millrace_engine::thread::EngineFactory;
use millrace_engine::{Engine as _, Isa};
use millrace_shared::names::env;
#[cfg(any(test, feature = "torch"))]
use millrace_shared::options::Device as At;
use millrace_shared::options::{EngineKind, TorchKept, TorchOptions};

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

/// The options of the torch engine, with what the environment says of its device; that of a machine may
/// name one for whatever engine is started there.
///
/// # Errors
/// If the environment names none.
pub(crate) fn torch_options(kind: EngineKind, given: TorchOptions) -> anyhow::Result<TorchOptions> {
    if kind != EngineKind::Torch {
        return Ok(given);
    }
    given.or_device(std::env::var(env::DEVICE).ok().as_deref()).map_err(|e| anyhow!(e))
}

/// How the torch engine keeps weights, where it is the one.
pub(crate) fn kept(config: &Config) -> Option<TorchKept> {
    let options = torch_options(config.engine, config.torch).ok()?;
    (config.engine == EngineKind::Torch).then(|| TorchKept::by(&options))
}

/// How many GPUs there are.
///
/// # Errors
/// If none can be used: why, and what to type.
#[cfg(feature = "torch")]
pub(crate) fn gpu_count() -> Result<u16, String> {
    millrace_torch::gpu_count()
}

#[cfg(not(feature = "torch"))]
pub(crate) fn gpu_count() -> Result<u16, String> {
    torch(TorchOptions::default()).map(|_| 0).map_err(|e| e.to_string())
}

/// The engine that the settings name.
///
/// # Errors
/// If it is not in this build, or its device is not there: with what to type.
pub(crate) fn of(config: &Config, mock: &MockConfig) -> anyhow::Result<Chosen> {
    choose(config.engine, torch_options(config.engine, config.torch)?, mock)
}

/// Whether options are given that the engine does not have.
///
/// # Errors
/// What to type.
pub(crate) fn check(kind: EngineKind, options: &TorchOptions) -> anyhow::Result<()> {
    ensure!(
        kind == EngineKind::Torch || options.is_default(),
        "--device, --torch-dtype and --memory-fraction are the torch engine's: add --engine torch"
    );
    Ok(())
}

fn choose(kind: EngineKind, options: TorchOptions, mock: &MockConfig) -> anyhow::Result<Chosen> {
    check(kind, &options)?;
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
    use millrace_torch::{Memory, Place, TorchEngine, numerics_revision};

    let place = Place::open(options.device(), options.dtype()).map_err(|e| anyhow!("{e}"))?;
    let memory = place.memory().filter(|_| options.device() != At::Cpu);
    let memory_bytes = memory.map(|m| options.memory_fraction.of(m.free));
    // What is free changes, and measurements are kept under this name.
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let size = memory.map_or_else(String::new, |m| format!(" ({:.1} GiB)", gib(m.total)));
    if let Some(Memory { free, total }) = memory {
        let (free, total) = (gib(free), gib(total));
        tracing::info!(
            "{}: {free:.1} of {total:.1} GiB are free{}",
            options.device(),
            place.held()
        );
    }
    let dtype = options.dtype().as_str();
    let description = format!("libtorch on {}{size}, {dtype}", options.device());
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
    use super::*;

    fn refusal(engine: EngineKind, device: At) -> String {
        let torch = TorchOptions::default().on(device);
        let chosen = choose(engine, torch, &MockConfig::default());
        chosen.err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_to_type() {
        let plain = choose(EngineKind::Cpu, TorchOptions::default(), &MockConfig::default());
        assert!(plain.is_ok());
        assert!(refusal(EngineKind::Cpu, At::Cpu).contains("add --engine torch"));
        assert!(refusal(EngineKind::Cpu, At::Cuda(0)).contains("add --engine torch"));
        let torch = refusal(EngineKind::Torch, At::Cpu);
        if cfg!(feature = "torch") {
            assert_eq!(torch, "");
            assert!(refusal(EngineKind::Torch, At::Cuda(63)).contains("--device cuda:63"));
            let several = "cuda:0,1".parse().unwrap();
            assert!(refusal(EngineKind::Torch, several).contains("millrace-node run"));
        } else {
            assert!(
                torch.contains("--features torch") && torch.contains("--engine cpu"),
                "{torch}"
            );
        }
    }
}
