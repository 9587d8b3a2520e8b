//! Devices: whether one is there, and how much memory it has.
//!
//! A program that was linked against a libtorch for processors has no CUDA until it loads
//! `libtorch_cuda.so` itself, before libtorch looks for it the first time: a process that is to use GPUs
//! opens one before anything else of libtorch. So one program serves both, as long as that library is
//! found (`LD_LIBRARY_PATH`).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use millrace_engine::LoadError;
use millrace_engine::cpu::available_bytes;
use millrace_shared::options::{Device, TorchDtype, TorchKept};
use nix::libc;
use tch::Kind;

use crate::holders::Holders;

/// CUDA's half of libtorch.
const LIBRARY: &CStr = c"libtorch_cuda.so";

/// Where is computed, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: tch::Device,
    /// What matrices are kept as.
    pub dtype: TorchDtype,
    /// What is multiplied with them, and comes out.
    pub compute: Kind,
}

impl Place {
    /// A device that is there.
    ///
    /// # Errors
    /// If it is not: what is, and what to type.
    pub fn open(device: Device, dtype: TorchDtype) -> Result<Self, LoadError> {
        let compute = match (dtype, device) {
            (TorchDtype::F32, _) | (TorchDtype::Int8 | TorchDtype::Int4, Device::Cpu) => {
                Kind::Float
            }
            (TorchDtype::F16, _) => Kind::Half,
            _ => Kind::BFloat16,
        };
        let device = match device {
            Device::Cpu => tch::Device::Cpu,
            Device::Cuda(index) => {
                cuda(index).map_err(LoadError::Settings)?;
                tch::Device::Cuda(usize::from(index))
            }
            Device::Several(several) => {
                return Err(LoadError::Settings(format!(
                    "--device {several}: several are for millrace-node run, which starts a node for \
                     each; name one here"
                )));
            }
        };
        Ok(Self { device, dtype, compute })
    }

    /// How weights are kept there.
    pub fn kept(&self) -> TorchKept {
        TorchKept { dtype: self.dtype, gpu: self.device.is_cuda() }
    }

    /// Memory of the device; `None` where it does not say.
    pub fn memory(&self) -> Option<Memory> {
        match self.device {
            tch::Device::Cuda(index) => cuda_memory(index),
            _ => available_bytes().map(|free| Memory { free, total: free }),
        }
    }
}

impl Place {
    /// Who holds memory of the GPU, to be put after what is free; empty where nobody does or can tell.
    pub fn held(&self) -> String {
        match self.device {
            tch::Device::Cuda(index) => {
                bus_id(index).map_or_else(String::new, |id| Holders::of("nvidia-smi", &id).text())
            }
            _ => String::new(),
        }
    }
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What nobody holds.
    pub free: u64,
    /// All of it (of a processor: what is free).
    pub total: u64,
}

/// Whether there is a GPU of this number.
fn cuda(index: u16) -> Result<(), String> {
    const OTHERWISE: &str = "or use --device cpu";
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref().map_err(|e| {
        format!(
            "--device cuda:{index}: {e}; put the lib folder of a PyTorch 2.11 with CUDA on \
             LD_LIBRARY_PATH (deploy/libtorch.sh --python python3 prints it), {OTHERWISE}"
        )
    })?;
    match tch::Cuda::device_count() {
        n if n > i64::from(index) => Ok(()),
        0 => Err(format!(
            "--device cuda:{index}: no GPU that CUDA can use (see nvidia-smi and \
             CUDA_VISIBLE_DEVICES), {OTHERWISE}"
        )),
        1 => Err(format!("--device cuda:{index}: there is one GPU: use --device cuda:0")),
        n => Err(format!(
            "--device cuda:{index}: there are {n} GPUs: use --device cuda:0 to cuda:{}",
            n - 1
        )),
    }
}

/// How many GPUs this process may use, by CUDA's driver alone: no memory is taken on any.
///
/// # Errors
/// If there is no driver, or it refuses.
pub fn gpu_count() -> Result<u16, String> {
    // SAFETY: the name ends in a zero; the driver's initialisers are its own business.
    let driver = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
    if driver.is_null() {
        return Err("there is no NVIDIA driver here (libcuda.so.1), use --device cpu".to_owned());
    }
    let find = |name: &CStr| {
        // SAFETY: the handle is a library's, and the name ends in a zero.
        let found = unsafe { libc::dlsym(driver, name.as_ptr()) };
        (!found.is_null()).then_some(found).ok_or("the NVIDIA driver is too old: CUDA 13 needs 580")
    };
    let (init, count) = (find(c"cuInit")?, find(c"cuDeviceGetCount")?);
    // SAFETY: these are their types in every release of the driver.
    let (init, count) = unsafe {
        (
            std::mem::transmute::<*mut c_void, extern "C" fn(u32) -> c_int>(init),
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_int) -> c_int>(count),
        )
    };
    let mut n: c_int = 0;
    match (init(0), count(&mut n)) {
        (0, 0) => Ok(u16::try_from(n).unwrap_or(0)),
        // No device, or all of them hidden.
        (100, _) => Ok(0),
        (error, _) => Err(format!("the NVIDIA driver refuses (error {error}): see nvidia-smi")),
    }
}

/// Makes CUDA known to libtorch.
fn load() -> Result<(), String> {
    // Whether it is there already is nothing to ask: libtorch would remember the answer.
    // SAFETY: the name ends in a zero; the library's initialisers are libtorch's own, and register its
    // kernels under locks.
    let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: called right after a failure on this thread; what it returns lives until the next one.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return Err("libtorch_cuda.so cannot be loaded".to_owned());
    }
    // SAFETY: not null, and ends in a zero.
    let message = unsafe { CStr::from_ptr(message.cast::<c_char>()) };
    Err(message.to_string_lossy().into_owned())
}

/// A function of the CUDA runtime that libtorch has brought.
fn runtime(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends in a zero; the default handle searches what is loaded already.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// The bus address of a GPU: its name for `nvidia-smi`, which numbers them in its own way.
fn bus_id(index: usize) -> Option<String> {
    let find = runtime(c"cudaDeviceGetPCIBusId")?;
    // SAFETY: this is its type in every release of the CUDA runtime.
    let find = unsafe {
        std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_char, c_int, c_int) -> c_int>(find)
    };
    let mut text = [0 as c_char; 32];
    let found = find(text.as_mut_ptr(), text.len() as c_int, c_int::try_from(index).ok()?) == 0;
    // SAFETY: where it succeeds it has written a text that ends in a zero, within the length.
    found.then(|| unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
}

/// Free and total bytes of a GPU, by the CUDA runtime that libtorch has brought.
fn cuda_memory(index: usize) -> Option<Memory> {
    let (set, info) = (runtime(c"cudaSetDevice")?, runtime(c"cudaMemGetInfo")?);
    // SAFETY: these are their types in every release of the CUDA runtime.
    let (set, info) = unsafe {
        (
            std::mem::transmute::<*mut c_void, extern "C" fn(c_int) -> c_int>(set),
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut usize, *mut usize) -> c_int>(
                info,
            ),
        )
    };
    let (mut free, mut total) = (0usize, 0usize);
    let fine = set(c_int::try_from(index).ok()?) == 0 && info(&mut free, &mut total) == 0;
    fine.then_some(Memory { free: free as u64, total: total as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_refused_with_what_to_type() {
        let refused = Place::open(Device::Cuda(63), TorchDtype::Bf16).unwrap_err().to_string();
        assert!(refused.contains("--device cuda:63"), "{refused}");
        assert!(
            refused.contains("--device cpu") || refused.contains("--device cuda:0"),
            "{refused}"
        );
    }

    #[test]
    fn processors_compute_in_what_their_kernels_take() {
        for (dtype, compute) in [
            (TorchDtype::F32, Kind::Float),
            (TorchDtype::Bf16, Kind::BFloat16),
            (TorchDtype::Int4, Kind::Float),
            (TorchDtype::Fp8, Kind::BFloat16),
        ] {
            assert_eq!(Place::open(Device::Cpu, dtype).unwrap().compute, compute);
        }
    }
}
