//! Who may begin a handshake at an endpoint: places and paces, in all and for each host.
//!
//! Strangers get less than members, of whom a host has several (its nodes, each with a connection to
//! each neighbour); but whoever comes to the cluster endpoint is a stranger, too, until it has
//! shown its certificate, so both are bounded. Nothing here reads packets; [`crate::endpoint`] asks
//! before it does any work for an attempt, and carries the verdict out.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use crate::budget::{Bucket, Budgets, Rate};
use crate::seats::{self, Seat, Seats};

/// What an endpoint admits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections in all; more are refused.
    connections: usize,
    /// Connections from which on a newcomer has to show that its address is its own (QUIC Retry:
    /// one more round trip) before any work is done for it.
    retry_above: usize,
    /// Connections of one host; more are refused.
    per_host: usize,
    /// Handshakes of one host, at once and a second after that. Each costs a signature; loopback is
    /// not counted.
    of_host: Rate,
    /// Those of all hosts, this one included.
    of_all: Rate,
}

/// For clients and joining nodes. Handshakes take at most about a fifth of a core.
pub(crate) const PUBLIC: Limits = Limits {
    connections: 1024,
    retry_above: 64,
    per_host: 64,
    of_host: Rate { burst: 64.0, per_second: 16.0 },
    of_all: Rate { burst: 512.0, per_second: 256.0 },
};

/// For members: a large host with a node for each of its processors or accelerators, all of which
/// come back at once after the coordinator was restarted, stays below.
pub(crate) const MEMBERS: Limits = Limits {
    connections: 1024,
    retry_above: 64,
    per_host: 256,
    of_host: Rate { burst: 256.0, per_second: 64.0 },
    of_all: Rate { burst: 1024.0, per_second: 256.0 },
};

/// What is done with an attempt.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It may shake hands, and has this place until it is dropped.
    Welcome(Seat),
    /// It has to show that its address is its own.
    Retry,
    /// It is turned away, for this reason.
    Refuse(&'static str),
}

/// The places and paces of one endpoint.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    seats: Seats,
    pace: Mutex<(Budgets, Bucket)>,
}

impl Admission {
    /// Nobody is there.
    pub(crate) fn new(limits: Limits) -> Self {
        let all = Bucket::full(limits.of_all, Instant::now());
        let pace = Mutex::new((Budgets::new(limits.of_host), all));
        Self { limits, seats: Seats::new(limits.per_host), pace }
    }

    /// Judges one more attempt of this host while so many connections are open; `proven`: the
    /// address is its own, or it cannot be asked to show it.
    pub(crate) fn judge(&self, ip: IpAddr, open: usize, proven: bool, now: Instant) -> Verdict {
        // Whoever only pretends to be at this address must not use up its owner's places.
        if !proven && self.is_tight(ip, open, now) {
            return Verdict::Retry;
        }
        if !self.takes_pace(ip, now) {
            return Verdict::Refuse("too many handshakes");
        }
        match self.seats.take(ip).filter(|_| open < self.limits.connections) {
            Some(seat) => Verdict::Welcome(seat),
            None => Verdict::Refuse("too many connections"),
        }
    }

    /// Whether so many come that each has to show that it is one.
    fn is_tight(&self, ip: IpAddr, open: usize, now: Instant) -> bool {
        let limits = &self.limits;
        let pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        open >= limits.retry_above
            || self.seats.taken(ip) >= limits.per_host / 2
            || pace.1.level(limits.of_all, now) < limits.of_all.burst / 2.0
            || pace.0.level_of(ip, now) < limits.of_host.burst / 2.0
    }

    /// One more handshake from this host.
    fn takes_pace(&self, ip: IpAddr, now: Instant) -> bool {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = seats::host(ip).is_some();
        (!counted || pace.0.take_of(ip, now)) && pace.1.take(self.limits.of_all, now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// How many of so many attempts of a host are welcome, and their places.
    fn welcome(at: &Admission, from: u8, attempts: usize, now: Instant) -> Vec<Seat> {
        let judged = (0..attempts).map(|_| at.judge(ip(from), 0, true, now));
        let seats = judged.filter_map(|verdict| match verdict {
            Verdict::Welcome(seat) => Some(seat),
            Verdict::Retry | Verdict::Refuse(_) => None,
        });
        seats.collect()
    }

    #[test]
    fn a_host_has_its_share_of_either_endpoint() {
        let now = Instant::now();
        for (limits, share) in [(PUBLIC, 64), (MEMBERS, 256)] {
            let admission = Admission::new(limits);
            let held = welcome(&admission, 1, 500, now);
            assert_eq!(held.len(), share, "{limits:?}");
            // A minute later the pace would allow more: now it is the places that do not.
            let later = now + Duration::from_secs(60);
            assert!(welcome(&admission, 1, 1, later).is_empty());
            assert_eq!(welcome(&admission, 2, 1, later).len(), 1, "others have theirs");
            drop(held);
            assert_eq!(welcome(&admission, 1, 1, later).len(), 1, "places are given back");
        }
    }

    #[test]
    fn handshakes_that_end_at_once_are_paced() {
        let now = Instant::now();
        let admission = Admission::new(MEMBERS);
        let done: usize = (0..500).map(|_| welcome(&admission, 1, 1, now).len()).sum();
        assert_eq!(done, 256);
        let second = now + Duration::from_secs(1);
        let done: usize = (0..500).map(|_| welcome(&admission, 1, 1, second).len()).sum();
        assert_eq!(done, 64);
    }

    #[test]
    fn all_hosts_together_are_paced_and_counted() {
        let now = Instant::now();
        let admission = Admission::new(MEMBERS);
        let done: usize = (0..40).map(|host| welcome(&admission, host, 50, now).len()).sum();
        assert_eq!(done, 1024);
        let later = now + Duration::from_secs(60);
        assert!(matches!(admission.judge(ip(1), 1024, true, later), Verdict::Refuse(_)));
    }

    #[test]
    fn who_comes_in_numbers_shows_its_address_first() {
        let now = Instant::now();
        let admission = Admission::new(MEMBERS);
        assert!(matches!(admission.judge(ip(1), 0, false, now), Verdict::Welcome(_)));
        assert!(matches!(admission.judge(ip(1), 64, false, now), Verdict::Retry));
        let _held = welcome(&admission, 1, 130, now);
        assert!(matches!(admission.judge(ip(1), 0, false, now), Verdict::Retry));
        assert!(matches!(admission.judge(ip(2), 0, false, now), Verdict::Welcome(_)));
    }

    #[test]
    fn loopback_has_no_share() {
        let admission = Admission::new(PUBLIC);
        let now = Instant::now();
        let own = IpAddr::from([127, 0, 0, 1]);
        let held: Vec<_> = (0..300).map(|_| admission.judge(own, 0, true, now)).collect();
        assert!(held.iter().all(|verdict| matches!(verdict, Verdict::Welcome(_))));
    }
}
