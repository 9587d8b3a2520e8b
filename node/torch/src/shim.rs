//! `libmillrace_cuda.so` (`shim/graphs.cpp`): streams, graphs and copies that nobody waits for, which
//! libtorch's C interface leaves out. Opened once, after CUDA; where it is not there or of another build,
//! the engine does without.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use nix::libc;
use tch::{Kind, TchError, Tensor};

use crate::graphs::{Recorder, Recording};

/// As `millrace_shim_version` says.
const VERSION: i32 = 1;
/// Longest message.
const TEXT: usize = 512;

type CallDevice = extern "C" fn(i32, *mut c_char, usize) -> c_int;
type CallGraph = extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;
type Begin = extern "C" fn(*mut *mut c_void, *mut c_void, *mut c_char, usize) -> c_int;
type Copy2 = extern "C" fn(*mut c_void, *mut c_void, *mut c_char, usize) -> c_int;

/// Its functions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shim {
    own: CallDevice,
    wait: CallDevice,
    copy: Copy2,
    begin: Begin,
    end: CallGraph,
    replay: CallGraph,
    free: CallGraph,
}

/// Runs a function that leaves a message where it fails.
fn said(call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), String> {
    let mut text = [0 as c_char; TEXT];
    if call(text.as_mut_ptr(), TEXT) == 0 {
        return Ok(());
    }
    // SAFETY: the shim ends what it writes with a zero within the size; before, all of it is zeros.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    Err(text.lines().next().unwrap_or("CUDA refuses").to_owned())
}

impl Shim {
    /// The shim, if it is there; libtorch's CUDA must have been opened.
    pub(crate) fn get() -> Option<Self> {
        static SHIM: OnceLock<Option<Shim>> = OnceLock::new();
        *SHIM.get_or_init(|| {
            let beside = std::env::current_exe().ok();
            let beside = beside.as_deref().and_then(std::path::Path::parent);
            let name = "libmillrace_cuda.so";
            let mut places: Vec<String> = beside
                .into_iter()
                .flat_map(|folder| [folder.join(name), folder.join("libtorch/lib").join(name)])
                .map(|path| path.display().to_string())
                .collect();
            places.push(name.to_owned());
            places.iter().find_map(|place| Self::open(place))
        })
    }

    /// Opens a file, or what the system's rules find under a name.
    fn open(place: &str) -> Option<Self> {
        let place = std::ffi::CString::new(place).ok()?;
        // SAFETY: the name ends in a zero, and the library has no initialisers of its own.
        let library = unsafe { libc::dlopen(place.as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let find = |name: &CStr| {
            // SAFETY: the handle is a library's, and the name ends in a zero.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let version = find(c"millrace_shim_version")?;
        // SAFETY: its type, whatever its version.
        let version =
            unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> i32>(version) }();
        if version != VERSION {
            return None;
        }
        // SAFETY: the types that functions of these names have in this version of the shim.
        unsafe {
            Some(Self {
                own: std::mem::transmute::<*mut c_void, CallDevice>(find(c"millrace_stream_own")?),
                wait: std::mem::transmute::<*mut c_void, CallDevice>(find(
                    c"millrace_stream_wait",
                )?),
                copy: std::mem::transmute::<*mut c_void, Copy2>(find(c"millrace_copy")?),
                begin: std::mem::transmute::<*mut c_void, Begin>(find(c"millrace_graph_begin")?),
                end: std::mem::transmute::<*mut c_void, CallGraph>(find(c"millrace_graph_end")?),
                replay: std::mem::transmute::<*mut c_void, CallGraph>(find(
                    c"millrace_graph_replay",
                )?),
                free: std::mem::transmute::<*mut c_void, CallGraph>(find(c"millrace_graph_free")?),
            })
        }
    }

    /// A stream of its own for this thread.
    pub(crate) fn own_stream(self, device: usize) -> Result<(), String> {
        said(|text, size| (self.own)(device as i32, text, size))
    }

    /// Waits for all that this thread asked of the device.
    pub(crate) fn wait(self, device: usize) -> Result<(), String> {
        said(|text, size| (self.wait)(device as i32, text, size))
    }

    /// Asks for a copy.
    pub(crate) fn copy(self, to: &Tensor, from: &Tensor) -> Result<(), String> {
        let pointer = |t: &Tensor| t.as_ptr().cast::<c_void>().cast_mut();
        said(|text, size| (self.copy)(pointer(to), pointer(from), text, size))
    }
}

/// Records what this thread asks of a GPU.
#[derive(Debug)]
pub(crate) struct CudaRecorder {
    shim: Shim,
    device: tch::Device,
    /// What is being recorded.
    graph: Option<CudaGraph>,
    /// The first one: the others use its memory, since steps come one after the other.
    first: Option<std::sync::Arc<CudaGraph>>,
}

/// A graph of libtorch's.
#[derive(Debug)]
struct CudaGraph {
    shim: Shim,
    graph: *mut c_void,
}

// SAFETY: a graph is no thread's own; it is used by one at a time, the engine's.
unsafe impl Send for CudaGraph {}
// SAFETY: shared is only the first graph's memory pool, whose name is read while another is recorded.
unsafe impl Sync for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // Nothing is left to do about a failure.
        let _ = said(|text, size| (self.shim.free)(self.graph, text, size));
    }
}

impl CudaRecorder {
    pub(crate) fn new(shim: Shim, device: tch::Device) -> Self {
        Self { shim, device, graph: None, first: None }
    }
}

impl Recorder for CudaRecorder {
    fn begin(&mut self) -> Result<(), String> {
        let mut graph = std::ptr::null_mut();
        let like = self.first.as_ref().map_or(std::ptr::null_mut(), |first| first.graph);
        said(|text, size| (self.shim.begin)(&raw mut graph, like, text, size))?;
        self.graph = Some(CudaGraph { shim: self.shim, graph });
        Ok(())
    }

    fn end(&mut self) -> Result<Box<dyn Recording>, String> {
        let graph = self.graph.take().ok_or("invariant: a recording has begun")?;
        said(|text, size| (self.shim.end)(graph.graph, text, size))?;
        let graph = std::sync::Arc::new(graph);
        self.first.get_or_insert_with(|| std::sync::Arc::clone(&graph));
        Ok(Box::new(graph))
    }

    fn replays(&self) -> bool {
        true
    }

    fn copy(&mut self, to: &Tensor, from: &Tensor) -> Result<(), String> {
        self.shim.copy(to, from)
    }

    fn staging(&self, like: &Tensor) -> Result<Tensor, TchError> {
        pinned(&like.size(), like.f_kind()?, self.device)
    }
}

impl Recording for std::sync::Arc<CudaGraph> {
    fn replay(&mut self) -> Result<(), String> {
        said(|text, size| (self.shim.replay)(self.graph, text, size))
    }
}

/// Memory of the host that the device copies from and to by itself.
pub(crate) fn pinned(size: &[i64], kind: Kind, device: tch::Device) -> Result<Tensor, TchError> {
    Tensor::f_zeros(size, (kind, tch::Device::Cpu))?.f_pin_memory(device)
}
