//! A line in the log every 10 s of how much is done, as long as something is.

use std::time::Duration;

use super::Batcher;

/// Between two lines.
pub(super) const EVERY: Duration = Duration::from_secs(10);

/// What the last line was about.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    at: Duration,
    prompt: u64,
    generated: u64,
}

impl Batcher {
    /// Says how much was done since the last time; nothing where that was nothing.
    pub(super) fn tell_pace(&mut self) {
        let (stats, now) = (self.stats(), self.now());
        let (prompt, generated) = (stats.prompt_tokens, stats.generated_tokens);
        let told = std::mem::replace(&mut self.told, Told { at: now, prompt, generated });
        let more = |now: u64, then: u64| now.saturating_sub(then) as f64;
        let (prompts, answers) = (more(prompt, told.prompt), more(generated, told.generated));
        if prompts + answers == 0.0 && stats.running + stats.waiting == 0 {
            return;
        }
        let seconds = now.saturating_sub(told.at).as_secs_f64().max(1e-3);
        let used = f64::from(stats.blocks_used) / f64::from(stats.blocks.max(1));
        tracing::info!(
            "prompts {:.1} tokens/s, answers {:.1} tokens/s, {} requests running, {} waiting, KV \
             cache {:.0}% used",
            prompts / seconds,
            answers / seconds,
            stats.running,
            stats.waiting,
            used * 100.0
        );
    }
}
