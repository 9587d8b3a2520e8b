//! The monotonic clock that all processes of a host share, for the hops between their engines.
//!
//! Only for measurements between engines: nothing is decided by it.

use std::sync::OnceLock;

use millrace_shared::wire::stamp::Stamp;
use nix::time::{ClockId, clock_gettime};

/// What names the clock: this boot of the machine, and the time namespace, which may shift it.
const NAMES: [&str; 2] = ["/proc/sys/kernel/random/boot_id", "/proc/self/ns/time"];

/// This moment; [`Stamp::NONE`] where the clock has no name.
pub(crate) fn now() -> Stamp {
    let clock = clock_name();
    match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(t) if clock != 0 => {
            let (seconds, nanos) = (t.tv_sec().cast_unsigned(), t.tv_nsec().cast_unsigned());
            Stamp { clock, nanos: seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos) }
        }
        _ => Stamp::NONE,
    }
}

/// A hash that is 0 only where there is no name.
fn clock_name() -> u32 {
    static NAME: OnceLock<u32> = OnceLock::new();
    *NAME.get_or_init(|| {
        let Ok(boot) = std::fs::read(NAMES[0]) else { return 0 };
        let mut hash = blake3::Hasher::new();
        hash.update(&boot);
        if let Ok(namespace) = std::fs::read_link(NAMES[1]) {
            hash.update(namespace.as_os_str().as_encoded_bytes());
        }
        let [a, b, c, d, ..] = *hash.finalize().as_bytes();
        u32::from_le_bytes([a, b, c, d]).max(1)
    })
}

#[cfg(test)]
mod tests {
    use super::now;

    #[test]
    fn moments_follow_each_other() {
        let (first, second) = (now(), now());
        assert!(second.since(first).is_some(), "{first:?} {second:?}");
    }
}
