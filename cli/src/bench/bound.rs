//! The fastest that a measurement could be on this machine: a step must read its weights and the keys
//! and values of its sequences once, and multiply. The limits are measured beside the speeds.

use millrace_engine::Isa;
use millrace_engine::cpu::limits::{self, Peak};
use millrace_shared::model::{Dtype, ModelConfig, TensorEntry, TensorType, head_name};
use serde::Serialize;

/// What one thread count can do at best.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Limits {
    threads: usize,
    /// Bytes from memory per second, all threads together.
    bandwidth_bytes_per_s: f64,
    /// Multiplications with additions of bytes and of f32 per second, all threads together; of
    /// instruction sets that have a measurement.
    int8_macs_per_s: Option<f64>,
    float_macs_per_s: Option<f64>,
}

impl Limits {
    /// Takes a good half second.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn measure(isa: Isa, threads: usize) -> anyhow::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(threads) as f64;
        let peak = limits::peak(isa);
        let macs = |one: fn(&Peak) -> f64| peak.as_ref().map(|p| one(p) * cores);
        Ok(Self {
            threads,
            bandwidth_bytes_per_s: limits::read_bandwidth(threads, limits::uncached_bytes())?,
            int8_macs_per_s: macs(|p| p.int8),
            float_macs_per_s: macs(|p| p.float),
        })
    }

    pub(super) fn describe(&self) -> String {
        let giga = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{:.0}", x / 1e9));
        format!(
            "{} thread(s): memory {:.1} GB/s, products of bytes {} GMAC/s, of f32 {} GMAC/s",
            self.threads,
            self.bandwidth_bytes_per_s / 1e9,
            giga(self.int8_macs_per_s),
            giga(self.float_macs_per_s)
        )
    }
}

/// What a step costs.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// Bytes of weights that every step reads: of a tied embedding once, of another nothing.
    weight_bytes: u64,
    layer: Macs,
    head: Macs,
    kv_bytes_per_position: u64,
    /// Of attention, per query and stored position.
    attention: Macs,
}

#[derive(Clone, Copy, Debug, Default)]
struct Macs {
    int8: u64,
    float: u64,
}

impl Macs {
    fn of<'a>(tensors: impl Iterator<Item = &'a TensorEntry>) -> Self {
        tensors.filter(|t| t.dims.len() == 2).fold(Self::default(), |sum, t| match t.dtype {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => {
                Self { float: sum.float + t.elements(), ..sum }
            }
            _ => Self { int8: sum.int8 + t.elements(), ..sum },
        })
    }
}

/// A run of equal steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) steps: u64,
    /// Positions computed, of all sequences and steps.
    pub(super) positions: u64,
    /// Positions whose logits are wanted.
    pub(super) wanted: u64,
    /// Stored positions that each step reads, of all sequences, on average.
    pub(super) stored_per_step: u64,
    /// Stored positions that each computed position attends to, on average.
    pub(super) attended: u64,
}

impl Work {
    /// `loaded` are the bytes of all weights in memory.
    pub(super) fn new(
        config: &ModelConfig,
        tensors: &[TensorEntry],
        loaded: u64,
        kv: Dtype,
    ) -> Self {
        let bytes = |name: &str| tensors.iter().find(|t| t.name == name).map_or(0, |t| t.bytes);
        let unread = if config.tied_head { 0 } else { bytes("token_embd.weight") };
        let layers = u64::from(config.layers);
        let attention = 2 * layers * u64::from(config.heads) * u64::from(config.head_dim);
        Self {
            weight_bytes: loaded.saturating_sub(unread),
            layer: Macs::of(tensors.iter().filter(|t| t.name.starts_with("blk."))),
            head: Macs::of(tensors.iter().filter(|t| t.name == head_name(config))),
            kv_bytes_per_position: layers * config.kv_bytes_per_position(kv),
            attention: match kv {
                Dtype::Int8 => Macs { int8: attention, float: 0 },
                _ => Macs { int8: 0, float: attention },
            },
        }
    }

    /// Bytes that one step reads.
    pub(super) fn step_bytes(&self, run: &Run) -> u64 {
        self.weight_bytes + self.kv_bytes_per_position * run.stored_per_step
    }

    /// Least seconds of a run: reading and multiplying at once, each at its limit.
    pub(super) fn seconds(&self, run: &Run, limits: &Limits) -> f64 {
        let reading = (run.steps * self.step_bytes(run)) as f64 / limits.bandwidth_bytes_per_s;
        let (p, w) = (run.positions, run.wanted);
        let total = |of: fn(&Macs) -> u64| {
            p * (of(&self.layer) + run.attended * of(&self.attention)) + w * of(&self.head)
        };
        let (int8, float) = (total(|m| m.int8), total(|m| m.float));
        let at = |macs: u64, rate: Option<f64>| rate.map_or(0.0, |rate| macs as f64 / rate);
        reading.max(at(int8, limits.int8_macs_per_s) + at(float, limits.float_macs_per_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_reading_and_multiplying_bounds() {
        let limits = Limits {
            threads: 1,
            bandwidth_bytes_per_s: 10.0,
            int8_macs_per_s: Some(100.0),
            float_macs_per_s: Some(50.0),
        };
        let work = Work {
            weight_bytes: 80,
            layer: Macs { int8: 100, float: 0 },
            head: Macs { int8: 50, float: 0 },
            kv_bytes_per_position: 2,
            attention: Macs { int8: 0, float: 1 },
        };
        let one = Run { steps: 1, positions: 1, wanted: 1, stored_per_step: 10, attended: 10 };
        assert_eq!(work.step_bytes(&one), 100);
        assert_eq!(work.seconds(&one, &limits), 10.0);
        let many = Run { positions: 20, wanted: 20, ..one };
        assert_eq!(work.seconds(&many, &limits), 30.0 + 4.0);
        let unknown = Limits { int8_macs_per_s: None, float_macs_per_s: None, ..limits };
        assert_eq!(work.seconds(&many, &unknown), 10.0);
    }
}
