//! Memory of the engine: aligned buffers on mappings of the system.
//!
//! An [`Arena`] hands out [`Buf`]s, aligned to 64 bytes and zeroed; they share chunks, so that small
//! ones lie side by side on huge pages. [`Arena::touch`] makes their pages present, spread over the
//! stage's threads, so that running out is an error of the load and not of a step. A [`Frozen`] is
//! read by many and written by nobody. Memory returns when the last buffer of a mapping is gone.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;

use super::mapping::{HUGE_PAGE, Mapping};
use super::pool::Pool;
use crate::LoadError;

/// Chunks of this size, or of a larger buffer's.
const CHUNK_BYTES: usize = 32 << 20;
/// What a thread touches at a time.
const TOUCH_BYTES: usize = 4 * HUGE_PAGE;
/// Alignment of every buffer.
pub(crate) const ALIGN: usize = 64;

/// Hands out zeroed, aligned buffers.
#[derive(Debug)]
pub(crate) struct Arena {
    what: &'static str,
    chunk: Option<Arc<Mapping>>,
    used: usize,
    taken: u64,
    /// Parts of mappings that nobody has touched: where, and how many bytes.
    untouched: Vec<(Arc<Mapping>, usize, usize)>,
}

impl Arena {
    /// An empty arena; `what` is for error messages.
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, chunk: None, used: 0, taken: 0, untouched: Vec::new() }
    }

    /// Bytes handed out.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// A zeroed buffer of `len` elements, aligned to 64 bytes; the first of a mapping starts on a huge
    /// page.
    ///
    /// # Errors
    /// If the system gives no address space.
    pub(crate) fn take<T: Pod>(&mut self, len: usize) -> Result<Buf<T>, LoadError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|b| b.checked_next_multiple_of(ALIGN))
            .ok_or_else(|| self.failed(usize::MAX, "size overflows"))?
            .max(ALIGN);
        let fits = self.chunk.as_ref().is_some_and(|c| c.bytes() - self.used >= bytes);
        if !fits {
            // Room to start on a huge page, and to end on one.
            let size = bytes.saturating_add(2 * HUGE_PAGE).max(CHUNK_BYTES);
            let chunk = Mapping::anonymous(size).map_err(|e| self.failed(bytes, e))?;
            self.used = chunk.start().as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
            self.chunk = Some(Arc::new(chunk));
        }
        let map = Arc::clone(self.chunk.as_ref().expect("invariant: a chunk was just made"));
        let at = self.used;
        self.used += bytes;
        self.taken += bytes as u64;
        self.untouched.push((Arc::clone(&map), at, bytes));
        // SAFETY: `at + bytes` lies within the mapping: it fits, or the chunk has room for a huge
        // page more than `bytes`.
        let start = unsafe { map.start().add(at) };
        Ok(Buf { start: start.cast(), len, map, _type: PhantomData })
    }

    /// Makes every page that was handed out present; the threads of the pool share the work.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn touch(&mut self, pool: &mut Pool) -> Result<(), LoadError> {
        let mut parts: Vec<(&Mapping, usize, usize)> = Vec::new();
        for (map, at, bytes) in &self.untouched {
            let (mut at, end) = (*at, at + bytes);
            while at < end {
                // Up to a huge page's end: nobody works on half of one.
                let stop = (at + TOUCH_BYTES) / HUGE_PAGE * HUGE_PAGE;
                let base = map.start().as_ptr().align_offset(HUGE_PAGE) % HUGE_PAGE;
                let stop = (stop + base).min(end);
                parts.push((map, at, stop - at));
                at = stop;
            }
        }
        let failure = std::sync::Mutex::new(None);
        pool.each(parts.len(), &|_, part| {
            let (map, at, bytes) = parts[part];
            if let Err(error) = map.populate(at, bytes)
                && let Ok(mut failure) = failure.lock()
            {
                failure.get_or_insert(error);
            }
        });
        if let Ok(Some(error)) = failure.into_inner() {
            return Err(self.failed(self.taken as usize, error));
        }
        self.untouched.clear();
        Ok(())
    }

    fn failed(&self, bytes: usize, cause: impl ToString) -> LoadError {
        let (needed_bytes, cause) = (bytes as u64, cause.to_string());
        LoadError::OutOfMemory { what: self.what, needed_bytes, cause }
    }
}

/// A buffer out of an [`Arena`]; a slice in every other respect.
#[derive(Debug)]
pub(crate) struct Buf<T: Pod> {
    start: NonNull<T>,
    len: usize,
    map: Arc<Mapping>,
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

impl<T: Pod> Buf<T> {
    /// Done with writing.
    pub(crate) fn freeze(self) -> Frozen<T> {
        Frozen { start: self.start, len: self.len, map: self.map, _type: PhantomData }
    }
}

/// A slice of a mapping that is only read; parts of it share the mapping.
#[derive(Clone, Debug)]
pub(crate) struct Frozen<T: Pod> {
    start: NonNull<T>,
    len: usize,
    map: Arc<Mapping>,
    _type: PhantomData<T>,
}

// SAFETY: nobody writes to it, and elements are plain data.
unsafe impl<T: Pod + Send> Send for Frozen<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for Frozen<T> {}

impl<T: Pod> Deref for Frozen<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned, `len` elements are mapped and initialised, and nobody writes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Frozen<u8> {
    /// All of a mapped file from `at` on.
    pub(crate) fn file(map: Arc<Mapping>, at: usize) -> Self {
        let len = map.bytes().checked_sub(at).expect("invariant: part of the mapping");
        // SAFETY: inside the mapping.
        Self { start: unsafe { map.start().add(at) }, len, map, _type: PhantomData }
    }

    /// `len` elements from byte `at` on, which suits their alignment.
    pub(crate) fn part<T: Pod>(&self, at: usize, len: usize) -> Frozen<T> {
        let bytes = len.checked_mul(size_of::<T>()).expect("invariant: part of the slice");
        assert!(at <= self.len && bytes <= self.len - at, "invariant: part of the slice");
        // SAFETY: in bounds by the assertion.
        let start = unsafe { self.start.add(at) }.cast::<T>();
        assert!(start.is_aligned(), "invariant: aligned");
        Frozen { start, len, map: Arc::clone(&self.map), _type: PhantomData }
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
        assert_eq!(big.as_ptr() as usize % HUGE_PAGE, 0);
        arena.touch(&mut Pool::new(2, 2)).unwrap();
        assert!(arena.untouched.is_empty());
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

    #[test]
    fn parts_of_what_is_frozen() {
        let mut buf = Arena::new("a test").take::<u8>(64 + 8).unwrap();
        buf[64..68].copy_from_slice(&1.5f32.to_le_bytes());
        let frozen = buf.freeze();
        let part = frozen.part::<f32>(64, 2);
        drop(frozen);
        assert_eq!(part[..], [1.5, 0.0]);
    }
}
