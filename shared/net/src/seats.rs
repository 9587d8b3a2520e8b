//! How many connections each address has at an endpoint.
//!
//! One host must not take all of the endpoint's places. A host is an IPv4 address or an IPv6 /64,
//! which is the least that one subscriber gets. Loopback is not counted: those are the operator's
//! own programs. A [`Seat`] is given up when it is dropped.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// The seats of one endpoint. Clones share them.
#[derive(Clone, Debug)]
pub struct Seats {
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    per_host: usize,
}

/// One connection's place.
#[derive(Debug)]
pub struct Seat {
    seats: Seats,
    /// `None` where it is not counted.
    host: Option<IpAddr>,
}

impl Seats {
    /// At most `per_host` seats for each host.
    pub fn new(per_host: usize) -> Self {
        Self { taken: Arc::default(), per_host }
    }

    /// Seats that this host has.
    pub fn taken(&self, addr: IpAddr) -> usize {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        host(addr).and_then(|host| taken.get(&host).copied()).unwrap_or(0)
    }

    /// One more seat for this host; `None` if it has all it may have.
    pub fn take(&self, addr: IpAddr) -> Option<Seat> {
        let host = host(addr);
        if let Some(host) = host {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let count = taken.entry(host).or_default();
            if *count >= self.per_host {
                return None;
            }
            *count += 1;
        }
        Some(Seat { seats: self.clone(), host })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(host) = self.host else { return };
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&host) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&host);
            }
        }
    }
}

/// What an address is counted as; `None` for loopback.
pub fn host(addr: IpAddr) -> Option<IpAddr> {
    let addr = addr.to_canonical();
    if addr.is_loopback() {
        return None;
    }
    Some(match addr {
        IpAddr::V4(_) => addr,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_their_own_seats_and_get_them_back() {
        let addr = |text: &str| text.parse::<IpAddr>().unwrap();
        let seats = Seats::new(2);
        let first = seats.take(addr("10.0.0.1")).unwrap();
        let _second = seats.take(addr("::ffff:10.0.0.1")).unwrap();
        assert!(seats.take(addr("10.0.0.1")).is_none());
        assert_eq!(seats.taken(addr("10.0.0.1")), 2);
        assert!(seats.take(addr("10.0.0.2")).is_some());
        drop(first);
        assert!(seats.take(addr("10.0.0.1")).is_some());
        // One /64 is one host.
        let _v6 = [seats.take(addr("2001:db8::1")), seats.take(addr("2001:db8::2"))];
        assert!(seats.take(addr("2001:db8::3")).is_none());
        assert!(seats.take(addr("2001:db8:0:1::3")).is_some());
        let own: Vec<_> = (0..9).map(|_| seats.take(addr("127.0.0.1"))).collect();
        assert!(own.iter().all(Option::is_some), "loopback is not counted");
    }
}
