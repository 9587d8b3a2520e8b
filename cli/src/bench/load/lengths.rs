//! How long prompts and answers are, and when requests come: chance with a seed.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A log-normal length is at most so many times its median.
const TAIL: u32 = 8;
/// Longest length that can be asked for.
const MOST: u32 = 1 << 20;

/// Lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Lengths {
    /// All the same.
    Fixed(u32),
    /// Any between two, both included, alike often.
    Uniform(u32, u32),
    /// Log-normal: many short ones and a few long ones.
    LogNormal {
        /// Half of them are shorter.
        median: u32,
        /// Deviation of the logarithm.
        sigma: f64,
    },
}

impl Lengths {
    /// The longest there can be.
    pub(crate) fn most(self) -> u32 {
        match self {
            Self::Fixed(n) | Self::Uniform(_, n) => n,
            Self::LogNormal { median, .. } => median.saturating_mul(TAIL),
        }
    }

    /// One of them.
    pub(super) fn draw(self, chance: &mut Chance) -> u32 {
        match self {
            Self::Fixed(n) => n,
            Self::Uniform(least, most) => {
                let span = f64::from(most - least) + 1.0;
                (least + (chance.unit() * span) as u32).min(most)
            }
            Self::LogNormal { median, sigma } => {
                let length = f64::from(median) * (sigma * chance.normal()).exp();
                (length.round() as u32).clamp(1, self.most())
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no length: use tokens (128), a range (64-256), or a median and a spread \
                 (lognormal:128:0.6)"
            )
        };
        let tokens = |text: &str| match text.parse::<u32>() {
            Ok(n) if (1..=MOST).contains(&n) => Ok(n),
            _ => Err(wrong()),
        };
        if let Some(rest) = text.strip_prefix("lognormal:") {
            let (median, sigma) = rest.split_once(':').ok_or_else(wrong)?;
            let sigma = sigma.parse().ok().filter(|s| (0.0..=3.0).contains(s)).ok_or_else(wrong)?;
            return Ok(Self::LogNormal { median: tokens(median)?, sigma });
        }
        let Some((least, most)) = text.split_once('-') else {
            return tokens(text).map(Self::Fixed);
        };
        match (tokens(least)?, tokens(most)?) {
            (least, most) if least <= most => Ok(Self::Uniform(least, most)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Uniform(least, most) => write!(f, "{least}-{most}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median}:{sigma}"),
        }
    }
}

impl Serialize for Lengths {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Chance that repeats with its seed: splitmix64. Not cryptography.
#[derive(Debug)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0, included, to 1, excluded.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Seconds until the next arrival, of a Poisson process with so many a second.
    pub(super) fn gap(&mut self, rate: f64) -> f64 {
        -(1.0 - self.unit()).ln() / rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(count: u32, mut draw: impl FnMut() -> f64) -> f64 {
        (0..count).map(|_| draw()).sum::<f64>() / f64::from(count)
    }

    #[test]
    fn lengths_are_read_and_written() {
        for text in ["128", "64-256", "lognormal:128:0.6"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
        let wrong = ["", "0", "x", "5-4", "1-", "lognormal:5", "lognormal:5:nan", "99999999"];
        for text in wrong {
            let error = text.parse::<Lengths>().unwrap_err();
            assert!(error.contains("64-256"), "{text}: {error}");
        }
    }

    #[test]
    fn lengths_are_distributed_as_they_say() {
        let mut chance = Chance::new(1);
        let uniform = Lengths::Uniform(10, 20);
        let drawn: Vec<u32> = (0..1000).map(|_| uniform.draw(&mut chance)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&10), Some(&20)));
        let skewed = Lengths::LogNormal { median: 100, sigma: 0.6 };
        let mut drawn: Vec<u32> = (0..1001).map(|_| skewed.draw(&mut chance)).collect();
        drawn.sort_unstable();
        assert!((85..=115).contains(&drawn[500]), "median {}", drawn[500]);
        assert!(drawn[1000] > 300 && drawn[1000] <= skewed.most());
    }

    #[test]
    fn arrivals_repeat_and_have_their_rate() {
        let gaps = |seed| {
            let mut chance = Chance::new(seed);
            (0..5).map(|_| chance.gap(3.0)).collect::<Vec<_>>()
        };
        assert_eq!(gaps(7), gaps(7));
        assert_ne!(gaps(7), gaps(8));
        let mut chance = Chance::new(7);
        let mean = mean(20_000, || chance.gap(50.0));
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
    }
}
