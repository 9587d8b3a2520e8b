//! A moment by a host's clock, in the header of a frame: when its sender had the output ready.
//!
//! Clocks of different machines are not comparable: a stamp says which clock it was read from, and
//! [`Stamp::since`] answers only where both are of the same. Nothing reads a clock here.

use std::time::Duration;

/// A hop of this length or more is none: a stamp from a clock that only looks the same.
const LONGEST: Duration = Duration::from_secs(60);

/// See the module's documentation. All zero: no stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Which clock: a hash of what names it; 0 where there is no stamp.
    pub clock: u32,
    /// Nanoseconds since that clock's own beginning.
    pub nanos: u64,
}

impl Stamp {
    /// No moment.
    pub const NONE: Self = Self { clock: 0, nanos: 0 };

    /// Time from `earlier` to this; `None` where either is no stamp, the clocks differ or make no
    /// sense.
    pub fn since(self, earlier: Self) -> Option<Duration> {
        if self.clock == 0 || self.clock != earlier.clock {
            return None;
        }
        let passed = Duration::from_nanos(self.nanos.checked_sub(earlier.nanos)?);
        (passed < LONGEST).then_some(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_clock_measures() {
        let at = |clock, nanos| Stamp { clock, nanos };
        assert_eq!(at(7, 1500).since(at(7, 500)), Some(Duration::from_micros(1)));
        assert_eq!(at(7, 1500).since(at(8, 500)), None, "another machine");
        assert_eq!(at(7, 500).since(at(7, 1500)), None, "backwards");
        assert_eq!(Stamp::NONE.since(Stamp::NONE), None);
        assert_eq!(at(7, u64::MAX).since(at(7, 0)), None, "centuries");
    }
}
