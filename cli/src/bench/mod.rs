//! `millrace bench`: the engine alone, or a whole pipeline under load.

mod bound;
mod engine;
mod engine_rig;
mod load;
mod serve;
mod serve_load;
mod serve_mixed;
mod serve_prefix;
mod timed;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// The engine alone: no network, no scheduler, one stage with the whole model
    Engine(engine::EngineArgs),
    /// A whole pipeline under load: clients in a closed loop, or requests that come at random times
    Serve(Box<serve::ServeArgs>),
}

pub(crate) async fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Engine(args) => engine::run(&args),
        BenchCommand::Serve(args) => serve::run(*args).await,
    }
}

/// The middle value; the mean of the two middle ones of an even number. `None` of nothing.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) =
        (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

/// Token ids that look like a text to an engine: a fixed pseudo-random walk through the vocabulary,
/// another one for every `stream`. Not cryptography: splitmix64.
fn pseudo_tokens(stream: u64, count: usize, vocab: u32) -> Vec<u32> {
    let mut state = stream.wrapping_mul(0xD1B5_4A32_D192_ED03).wrapping_add(0x1234_5678);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..count).map(|_| (next() % u64::from(vocab.max(1))) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn pseudo_tokens_repeat_and_differ() {
        let a = pseudo_tokens(1, 100, 49152);
        assert_eq!(a, pseudo_tokens(1, 100, 49152));
        assert_ne!(a, pseudo_tokens(2, 100, 49152));
        assert!(a.iter().all(|&t| t < 49152));
    }
}
