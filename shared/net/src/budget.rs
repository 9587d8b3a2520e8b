//! How often each host may try something that costs, or that could be guessed.
//!
//! A token bucket for each host; those of a bounded number of hosts are remembered, full ones
//! first forgotten. A host is what [`crate::seats`] counts as one; loopback is one host here. Time
//! is an argument.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use tokio::time::Instant;

use crate::seats;

/// Hosts whose budgets are remembered.
pub(crate) const MAX_HOSTS: usize = 4096;

/// How much at once, and how much a second after that.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// A full bucket.
    pub burst: f64,
    /// What flows in, a second.
    pub per_second: f64,
}

/// A bucket that fills up again with time. It may owe.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn full(rate: Rate, now: Instant) -> Self {
        Self { left: rate.burst, at: now }
    }

    /// What is in it.
    pub fn level(&self, rate: Rate, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.at);
        (self.left + elapsed.as_secs_f64() * rate.per_second).min(rate.burst)
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let level = self.level(rate, now);
        let admitted = level >= 1.0;
        *self = Self { left: if admitted { level - 1.0 } else { level }, at: now };
        admitted
    }

    /// Takes this much, whether it is there or not.
    pub fn charge(&mut self, rate: Rate, amount: f64, now: Instant) {
        *self = Self { left: self.level(rate, now) - amount, at: now };
    }

    /// Milliseconds until this much is in it.
    pub fn wait_ms(&self, rate: Rate, amount: f64, now: Instant) -> u32 {
        let missing = (amount - self.level(rate, now)).max(0.0);
        // The conversion saturates.
        (missing / rate.per_second * 1e3).ceil() as u32
    }
}

/// What is left to each host.
#[derive(Debug)]
pub struct Budgets {
    rate: Rate,
    pub(crate) hosts: HashMap<IpAddr, Bucket>,
}

impl Budgets {
    /// Full buckets for everybody.
    pub fn new(rate: Rate) -> Self {
        Self { rate, hosts: HashMap::new() }
    }

    /// Takes one of this host's, if there is one.
    pub fn take_of(&mut self, from: IpAddr, now: Instant) -> bool {
        let (rate, host) = (self.rate, host(from));
        self.make_room(host, now);
        self.hosts.entry(host).or_insert_with(|| Bucket::full(rate, now)).take(rate, now)
    }

    /// Milliseconds until this host has one; 0 if it has.
    pub fn wait_ms(&self, from: IpAddr, now: Instant) -> u32 {
        self.hosts.get(&host(from)).map_or(0, |bucket| bucket.wait_ms(self.rate, 1.0, now))
    }

    /// What this host has left.
    pub fn level_of(&self, from: IpAddr, now: Instant) -> f64 {
        let bucket = self.hosts.get(&host(from));
        bucket.map_or(self.rate.burst, |bucket| bucket.level(self.rate, now))
    }

    fn make_room(&mut self, host: IpAddr, now: Instant) {
        if self.hosts.len() < MAX_HOSTS || self.hosts.contains_key(&host) {
            return;
        }
        let rate = self.rate;
        self.hosts.retain(|_, bucket| bucket.level(rate, now) < rate.burst);
        let oldest = self.hosts.iter().min_by_key(|(_, bucket)| bucket.at).map(|(h, _)| *h);
        if let Some(oldest) = oldest.filter(|_| self.hosts.len() >= MAX_HOSTS) {
            self.hosts.remove(&oldest);
        }
    }
}

fn host(addr: IpAddr) -> IpAddr {
    seats::host(addr).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RATE: Rate = Rate { burst: 2.0, per_second: 4.0 };

    #[test]
    fn buckets_fill_up_and_may_owe() {
        let start = Instant::now();
        let mut bucket = Bucket::full(RATE, start);
        assert!(bucket.take(RATE, start) && bucket.take(RATE, start) && !bucket.take(RATE, start));
        assert_eq!(bucket.wait_ms(RATE, 1.0, start), 250);
        bucket.charge(RATE, 3.0, start);
        assert_eq!(bucket.wait_ms(RATE, 1.0, start), 1000);
        let later = start + Duration::from_secs(60);
        assert_eq!(bucket.wait_ms(RATE, 1.0, later), 0);
        assert!((bucket.level(RATE, later) - 2.0).abs() < 1e-9, "no more than a full one");
    }

    #[test]
    fn budgets_are_forgotten_when_there_are_many() {
        let now = Instant::now();
        let mut budgets = Budgets::new(RATE);
        for i in 0..3 * MAX_HOSTS as u32 {
            assert!(budgets.take_of(IpAddr::from((i + (10 << 24)).to_be_bytes()), now));
        }
        assert_eq!(budgets.hosts.len(), MAX_HOSTS);
        budgets.take_of(IpAddr::from([11, 0, 0, 1]), now + Duration::from_secs(60));
        assert_eq!(budgets.hosts.len(), 1, "full buckets need not be remembered");
    }

    #[test]
    fn loopback_is_one_host() {
        let now = Instant::now();
        let mut budgets = Budgets::new(RATE);
        for last in 1..3 {
            assert!(budgets.take_of(IpAddr::from([127, 0, 0, last]), now));
        }
        assert!(!budgets.take_of(IpAddr::from([127, 0, 0, 9]), now));
        assert!(budgets.wait_ms(IpAddr::from([127, 0, 0, 1]), now) > 0);
        assert_eq!(budgets.wait_ms(IpAddr::from([10, 0, 0, 1]), now), 0);
    }
}
