//! Memory from the system: anonymous mappings on huge pages where it gives them, and mappings of
//! files.
//!
//! A mapping has pages only once they are touched: [`Mapping::populate`] does that, in the kernel
//! where it can, and says when memory runs out. Whoever touches a page first decides on which NUMA
//! node it lies, so parts are populated by the threads that will compute. A mapped file must not be
//! cut short while it is mapped: only files of the node's own are.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Size of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// Size of a page.
pub(crate) const PAGE: usize = 4096;
/// What the system does about huge pages: in general, and about those of 2 MiB.
const HUGE_PAGES: [&str; 2] = [
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled",
    "/sys/kernel/mm/transparent_hugepage/enabled",
];

/// A range of addresses that is given back when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    writable: bool,
}

// SAFETY: a mapping is plain memory; who may touch which part is decided by the buffers.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this type with this size; no buffer refers to it any more.
        let unmapped = unsafe { munmap(self.start.cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Mapping {
    /// Zeros, on huge pages if the system has them.
    ///
    /// # Errors
    /// If the system gives no address space.
    pub(crate) fn anonymous(bytes: usize) -> Result<Self, nix::Error> {
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
        Ok(Self { start: start.cast(), bytes, writable: true })
    }

    /// The first `bytes` of a file, to read. The file is at least as long and stays so.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn file(file: &File, bytes: usize) -> Result<Self, nix::Error> {
        let len = NonZeroUsize::new(bytes).ok_or(nix::Error::EINVAL)?;
        // SAFETY: a fresh mapping at an address of the system's choice, which is only read.
        let start =
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self { start: start.cast(), bytes, writable: false })
    }

    /// Where it begins; aligned to a page.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes every page of a part present; contents stay as they are. Nobody writes there meanwhile.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn populate(&self, at: usize, bytes: usize) -> Result<(), nix::Error> {
        let end = at.saturating_add(bytes).min(self.bytes);
        let at = at / PAGE * PAGE;
        if at >= end {
            return Ok(());
        }
        let advice = match self.writable {
            true => MmapAdvise::MADV_POPULATE_WRITE,
            false => MmapAdvise::MADV_POPULATE_READ,
        };
        loop {
            // SAFETY: whole pages inside the mapping; contents do not change.
            match unsafe { madvise(self.start.add(at).cast(), end - at, advice) } {
                Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
                // Kernels before 5.14.
                Err(nix::Error::EINVAL) => {
                    self.touch(at, end);
                    return Ok(());
                }
                result => return result,
            }
        }
    }

    fn touch(&self, at: usize, end: usize) {
        for offset in (at..end).step_by(PAGE) {
            // SAFETY: within the mapping; the value that is written is the one that is there, and
            // by `populate`'s contract nobody else writes.
            unsafe {
                let byte = self.start.add(offset);
                let value = byte.read_volatile();
                if self.writable {
                    byte.write_volatile(value);
                }
            }
        }
    }
}

/// Whether anonymous memory gets huge pages here, as long as there are any.
pub(crate) fn has_huge_pages() -> bool {
    let choices = HUGE_PAGES.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    huge_pages_of(&choices[0], &choices[1])
}

/// The choice in brackets; that of the size may be to do as in general. Kernels without sizes have
/// the general one alone.
fn huge_pages_of(size: &str, general: &str) -> bool {
    let on = |text: &str| text.contains("[always]") || text.contains("[madvise]");
    if size.is_empty() || size.contains("[inherit]") { on(general) } else { on(size) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn populating_keeps_what_is_there() {
        let map = Mapping::anonymous(3 * PAGE).unwrap();
        // SAFETY: inside the mapping, which nobody else uses.
        unsafe { map.start().add(PAGE + 5).write(7) };
        map.populate(PAGE + 1, PAGE).unwrap();
        map.populate(0, usize::MAX).unwrap();
        map.populate(5 * PAGE, 1).unwrap();
        map.touch(0, 3 * PAGE);
        // SAFETY: as above.
        assert_eq!(unsafe { map.start().add(PAGE + 5).read() }, 7);
    }

    #[test]
    fn a_file_is_mapped_to_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3; 5000]).unwrap();
        let map = Mapping::file(&file, 5000).unwrap();
        map.populate(0, 5000).unwrap();
        map.touch(0, 5000);
        // SAFETY: the file is that long and nobody changes it.
        assert!(unsafe { std::slice::from_raw_parts(map.start().as_ptr(), 5000) } == [3; 5000]);
        assert!(Mapping::file(&file, 0).is_err());
    }

    #[test]
    fn choices_of_the_system() {
        let general = |text| huge_pages_of("", text);
        assert!(general("always [madvise] never\n"));
        assert!(general("[always] madvise never\n"));
        assert!(!general("always madvise [never]\n"));
        assert!(!general(""));
        assert!(huge_pages_of("always [inherit] madvise never", "[always] madvise never"));
        assert!(!huge_pages_of("always inherit madvise [never]", "[always] madvise never"));
        assert!(huge_pages_of("always inherit [madvise] never", "always madvise [never]"));
    }
}
