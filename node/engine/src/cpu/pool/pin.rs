//! Which processor each thread runs on.
//!
//! Threads that spin for each other must not share a processor while another idles, which schedulers
//! allow for milliseconds. So a stage's threads are pinned, to processors that no other stage of this
//! host holds: a lease is a bound abstract socket, which ends with its process whatever happens. The
//! stages of one process hold theirs together. Where too few are free, the system decides.
//!
//! Processors are taken core by core before second hardware threads, and node by node, so that a
//! stage's threads lie near the memory that they touched at load.

use std::cell::RefCell;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, PoisonError};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Processors held by this process.
#[derive(Debug)]
pub(super) struct Pins {
    /// What the process may use, best first.
    allowed: Vec<usize>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    cpus: Vec<(usize, UnixDatagram)>,
    /// Slots of pools that exist.
    pools: Vec<usize>,
}

/// Where the members of one pool run: as many as it has members, or none. Caller first.
#[derive(Debug, Default)]
pub(super) struct Places {
    pub(super) cpus: Vec<usize>,
    slot: usize,
}

impl Pins {
    /// For the processors that the calling thread may use.
    pub(super) fn of_process() -> Self {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let mut allowed: Vec<usize> =
            (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect();
        allowed.sort_by_key(|&cpu| (sibling_index(cpu), numa_node(cpu), cpu));
        Self { allowed, held: Mutex::default() }
    }

    /// Places for a pool of `members`; none where not enough processors are free.
    pub(super) fn take(&self, members: usize) -> Places {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let before = held.cpus.len();
        for &cpu in &self.allowed {
            if held.cpus.len() >= members {
                break;
            }
            if held.cpus.iter().all(|(c, _)| *c != cpu)
                && let Some(lease) = lease(cpu)
            {
                held.cpus.push((cpu, lease));
            }
        }
        let slot = (0..).find(|s| !held.pools.contains(s)).unwrap_or(0);
        held.pools.push(slot);
        let n = held.cpus.len();
        let cpus = if n >= members {
            (0..members).map(|m| held.cpus[(slot + m) % n].0).collect()
        } else {
            // What does not suffice is left to others.
            held.cpus.truncate(before);
            Vec::new()
        };
        Places { cpus, slot }
    }

    /// The pool is gone; with the last one the leases go.
    pub(super) fn give_back(&self, places: &Places) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.pools.retain(|&slot| slot != places.slot);
        if held.pools.is_empty() {
            held.cpus.clear();
        }
    }
}

/// Host-wide, as far as network namespaces let processes see each other.
fn lease(cpu: usize) -> Option<UnixDatagram> {
    let name = SocketAddr::from_abstract_name(format!("millrace-cpu-{cpu}")).ok()?;
    UnixDatagram::bind_addr(&name).ok()
}

/// Pins the calling thread.
pub(super) fn pin(cpu: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only)
}

/// A thread that calls pools: where it is pinned, and where it ran before.
#[derive(Debug)]
struct Caller {
    cpu: usize,
    before: CpuSet,
    /// Pools that it has called and that exist.
    pools: usize,
}

thread_local! {
    static CALLER: RefCell<Option<Caller>> = const { RefCell::new(None) };
}

/// Pins the calling thread as the caller of a pool; `first` if that pool has not been called by it yet.
/// A thread that calls several pools in turns moves from place to place: on one processor with a
/// worker of the pool it would wait for it.
pub(super) fn pin_caller(cpu: usize, first: bool) {
    CALLER.with_borrow_mut(|caller| {
        if let Some(caller) = caller {
            caller.pools += usize::from(first);
            if caller.cpu != cpu && pin(cpu).is_ok() {
                caller.cpu = cpu;
            }
        } else if let Ok(before) = sched_getaffinity(Pid::from_raw(0))
            && pin(cpu).is_ok()
        {
            *caller = Some(Caller { cpu, before, pools: 1 });
        }
    });
}

/// A pool that the calling thread has called is gone; with the last one the thread runs where it did.
pub(super) fn unpin_caller() {
    CALLER.with_borrow_mut(|caller| {
        if let Some(Caller { before, pools, .. }) = caller {
            *pools -= 1;
            if *pools == 0 {
                let _ = sched_setaffinity(Pid::from_raw(0), before);
                *caller = None;
            }
        }
    });
}

/// How many hardware threads of the same core come before this one.
fn sibling_index(cpu: usize) -> usize {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    let list = std::fs::read_to_string(path).unwrap_or_default();
    let before = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else {
            return 0;
        };
        (first..=last).filter(|&c| c < cpu).count()
    };
    list.trim().split(',').map(before).sum()
}

/// Which memory is near.
fn numa_node(cpu: usize) -> usize {
    let entries = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{cpu}"));
    let number = |name: &str| name.strip_prefix("node")?.parse().ok();
    entries
        .into_iter()
        .flatten()
        .filter_map(|e| number(e.ok()?.file_name().to_str()?))
        .next()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leases are host-wide, so another process of these tests may hold some.
    #[test]
    fn pools_of_a_process_rotate_over_its_processors() {
        let pins = Pins::of_process();
        let (a, b) = (pins.take(1), pins.take(1));
        assert_ne!(a.slot, b.slot);
        if let ([a], [b]) = (a.cpus.as_slice(), b.cpus.as_slice()) {
            assert_eq!(a, b, "one processor was leased for pools of one member");
        }
        pins.give_back(&a);
        let c = pins.take(1);
        assert_eq!(c.slot, a.slot);
        let held = pins.held.lock().unwrap().cpus.len();
        let many = pins.take(pins.allowed.len() + 1);
        assert!(many.cpus.is_empty());
        assert_eq!(pins.held.lock().unwrap().cpus.len(), held, "kept what it could not use");
        for places in [&b, &c, &many] {
            pins.give_back(places);
        }
        assert!(pins.held.lock().unwrap().cpus.is_empty());
    }

    #[test]
    fn a_lease_is_exclusive_and_ends() {
        let none = CpuSet::count() + 7;
        let first = lease(none).unwrap();
        assert!(lease(none).is_none());
        drop(first);
        assert!(lease(none).is_some());
    }

    #[test]
    fn pinning_and_back() {
        std::thread::spawn(|| {
            let pins = Pins::of_process();
            let [first, last] = [pins.allowed[0], *pins.allowed.last().unwrap()];
            // Two pools in turns; each finds the thread at its own place.
            for (cpu, new) in [(first, true), (last, true), (first, false), (last, false)] {
                pin_caller(cpu, new);
                assert_eq!(Pins::of_process().allowed, [cpu]);
            }
            unpin_caller();
            assert_eq!(Pins::of_process().allowed, [last]);
            unpin_caller();
            assert_eq!(Pins::of_process().allowed, pins.allowed);
        })
        .join()
        .unwrap();
    }
}
