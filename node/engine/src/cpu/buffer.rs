//! Memory of the engine: anonymous mappings, huge pages where the system gives them, every page
//! touched when it is handed out, so that running out is an error of the load and not of a step.
//!
//! An [`Arena`] hands out [`Buf`]s, aligned to 64 bytes and zeroed; they share chunks, so that small
//! matrices lie side by side on huge pages. Memory returns when the last buffer of a chunk is gone.

use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::LoadError;

/// Chunks of this size, or of a larger buffer's.
const CHUNK_BYTES: usize = 32 << 20;
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;
const ALIGN: usize = 64;

#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory; who may touch which part is decided by the buffers.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `Mapping::new` with this size; no buffer refers to it any more.
        let unmapped = unsafe { munmap(self.start.cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Mapping {
    fn new(bytes: usize) -> Result<Self, nix::Error> {
        let len = NonZeroUsize::new(bytes).ok_or(nix::Error::EINVAL)?;
        // SAFETY: a fresh private mapping at an address of the system's choice.
        let start = unsafe {
            mmap_anonymous(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )?
        };
        // SAFETY: the range was just mapped; the advice is only a hint, and may be refused.
        let _ = unsafe { madvise(start, bytes, MmapAdvise::MADV_HUGEPAGE) };
        Ok(Self { start: start.cast(), bytes })
    }
}

/// Hands out zeroed, touched, aligned buffers.
#[derive(Debug)]
pub(crate) struct Arena {
    what: &'static str,
    chunk: Option<Arc<Mapping>>,
    used: usize,
    taken: u64,
}

impl Arena {
    /// An empty arena; `what` is for error messages.
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, chunk: None, used: 0, taken: 0 }
    }

    /// Bytes handed out.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// A zeroed buffer of `len` elements, aligned to 64 bytes.
    ///
    /// # Errors
    /// If the system gives no address space.
    pub(crate) fn take<T: Pod>(&mut self, len: usize) -> Result<Buf<T>, LoadError> {
        let failed = |bytes: usize, cause: String| LoadError::OutOfMemory {
            what: self.what,
            needed_bytes: bytes as u64,
            cause,
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|b| b.checked_next_multiple_of(ALIGN))
            .ok_or_else(|| failed(usize::MAX, "size overflows".to_owned()))?
            .max(ALIGN);
        let fits = self.chunk.as_ref().is_some_and(|c| c.bytes - self.used >= bytes);
        if !fits {
            // Room to start on a huge page.
            let chunk = Mapping::new(bytes.saturating_add(HUGE_PAGE).max(CHUNK_BYTES))
                .map_err(|e| failed(bytes, e.to_string()))?;
            self.used = chunk.start.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
            self.chunk = Some(Arc::new(chunk));
        }
        let map = Arc::clone(self.chunk.as_ref().expect("invariant: a chunk was just made"));
        // SAFETY: `used + bytes` lies within the mapping: it fits, or the chunk has room for a huge
        // page more than `bytes`.
        let start = unsafe { map.start.add(self.used) };
        for offset in (0..bytes).step_by(PAGE) {
            // SAFETY: within the mapping, and handed to nobody yet.
            unsafe { start.add(offset).write_volatile(0) };
        }
        self.used += bytes;
        self.taken += bytes as u64;
        Ok(Buf { start: start.cast(), len, _map: map, _type: PhantomData })
    }
}

/// A buffer out of an [`Arena`]; a slice in every other respect.
#[derive(Debug)]
pub(crate) struct Buf<T: Pod> {
    start: NonNull<T>,
    len: usize,
    _map: Arc<Mapping>,
    _type: PhantomData<T>,
}

// SAFETY: a buffer owns its part of the mapping alone, and elements are plain data.
unsafe impl<T: Pod + Send> Send for Buf<T> {}
// SAFETY: as above; shared access is read-only.
unsafe impl<T: Pod + Sync> Sync for Buf<T> {}

impl<T: Pod> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned and `len` elements are mapped, initialised (zeros are valid
        // for plain data) and owned by this buffer alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A slice that several threads write to, each its own part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: only `slice` gives access, and its contract keeps parts disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows the slice for as long as threads write to it.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// The part from `start`.
    ///
    /// # Safety
    /// No other thread reads or writes this part at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "invariant: part of the slice");
        // SAFETY: in bounds by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// The first element, for kernels that write strided tiles.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.start
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_apart() {
        let mut arena = Arena::new("a test");
        let mut a = arena.take::<f32>(1000).unwrap();
        let b = arena.take::<u8>(3).unwrap();
        a.fill(1.0);
        assert!(b.iter().all(|&x| x == 0));
        assert_eq!(a.as_ptr() as usize % ALIGN, 0);
        assert_eq!(b.as_ptr() as usize % ALIGN, 0);
        let big = arena.take::<u8>(CHUNK_BYTES + 1).unwrap();
        drop(arena);
        assert_eq!(big[CHUNK_BYTES], 0);
        assert_eq!(a[999], 1.0);
    }

    #[test]
    fn absurd_sizes_are_errors() {
        let mut arena = Arena::new("a test");
        for len in [usize::MAX / 4, usize::MAX / 8, usize::MAX / 16, usize::MAX] {
            assert!(matches!(
                arena.take::<u64>(len),
                Err(LoadError::OutOfMemory { what: "a test", .. })
            ));
        }
        assert_eq!(arena.taken(), 0);
    }
}
