//! A plan for people: a table with a picture of the stages, then what follows from it in a line each.

use std::fmt;

use super::report::{PlanReport, PromiseReport, StageReport};

/// Characters of the slowest stage's bar.
const BAR: usize = 24;

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} layers, {} in memory; for {}, {} streams of {} tokens",
            self.model,
            self.layers,
            bytes(self.weight_bytes),
            self.objective,
            self.streams,
            self.context
        )?;
        if self.estimated {
            writeln!(f, "estimates from nominal figures, not measured: nodes marked with ~")?;
        }
        self.table(f)?;
        self.speed(f)?;
        self.room(f)?;
        self.advice(f)
    }
}

impl PlanReport {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |s: &StageReport| format!("{}{}", if s.estimated { "~" } else { "" }, s.node);
        let wide = |w: usize, texts: &mut dyn Iterator<Item = String>| {
            texts.map(|t| t.chars().count()).fold(w, usize::max)
        };
        let (a, b) = (
            wide(4, &mut self.stages.iter().map(name)),
            wide(6, &mut self.stages.iter().map(layers)),
        );
        writeln!(
            f,
            "  stage  {:<a$}  {:<b$}  {:>9}  {:<BAR$}  {:>10}  {:>9}  {:>9}",
            "node", "layers", "time", "", "memory", "free", "disk"
        )?;
        let slowest = self.stages.iter().map(|s| s.seconds).fold(0.0, f64::max);
        for s in &self.stages {
            let used = s.weight_bytes + s.kv_bytes;
            let line = format!(
                "  {:<5}  {:<a$}  {:<b$}  {:>9}  {:<BAR$}  {:>10}  {:>9}  {:>9}  {}",
                s.stage,
                name(s),
                layers(s),
                time(s.seconds),
                bar(s.seconds / slowest.max(f64::MIN_POSITIVE)),
                bytes(used),
                bytes(s.free_bytes),
                bytes(s.disk_bytes),
                match (s.slowest && self.stages.len() > 1, s.disk_fits, s.pinned) {
                    (_, Some(false), _) => "◀ its disk is too full",
                    (true, _, true) => "◀ slowest, pinned",
                    (true, _, false) => "◀ slowest",
                    (false, _, true) => "pinned",
                    _ => "",
                }
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }

    fn speed(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  predicted: {:.1} tokens/s ({} streams, {} micro-batches of {} rows in flight, {} \
             between tokens, stages {:.0} % busy); {:.1} tokens/s for one stream",
            self.tokens_per_second,
            self.streams,
            self.micro_batches,
            self.rows,
            time(self.inter_token_seconds),
            self.efficiency * 100.0,
            self.one_stream_tokens_per_second
        )?;
        if self.refused_to_split {
            writeln!(
                f,
                "  not split: one node alone is better for {} than any cut",
                self.objective
            )?;
        } else if let Some(alone) = self.alone.as_ref().filter(|_| self.stages.len() > 1) {
            writeln!(f, "  {} alone: {:.1} tokens/s", alone.node, alone.tokens_per_second)?;
        }
        if self.gap > 0.000_5 {
            writeln!(
                f,
                "  not proved the best: at most {:.1} % from it (too many unlike nodes to try all)",
                self.gap * 100.0
            )?;
        }
        Ok(())
    }

    fn room(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  KV cache: room for {} tokens, {} streams of {}",
            self.kv_tokens, self.kv_streams, self.context
        )?;
        writeln!(
            f,
            "  start: about {} from nothing, {} with weights on disk",
            time(self.cold_start_seconds),
            time(self.warm_start_seconds)
        )?;
        if let Some(promise) = &self.promise {
            writeln!(f, "  {}", promised(promise))?;
        }
        if let (Some(hour), Some(million)) = (self.price_per_hour, self.price_per_million_tokens) {
            writeln!(f, "  price: {hour:.2} an hour, {million:.2} per million tokens")?;
        }
        Ok(())
    }

    fn advice(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for out in &self.left_out {
            writeln!(f, "  left out: {}: {}", out.node, out.reason)?;
        }
        for (i, help) in self.improvements.iter().enumerate() {
            writeln!(
                f,
                "  {} {}: {:.1} tokens/s ({:+.0} %)",
                if i == 0 { "would help most:" } else { "            then:" },
                help.change,
                help.tokens_per_second,
                help.gain * 100.0
            )?;
        }
        Ok(())
    }
}

fn promised(p: &PromiseReport) -> String {
    let (ttft, itl) = (time(p.ttft_seconds), time(p.itl_seconds));
    if p.streams == 0 {
        return format!(
            "first token within {ttft} and {itl} between tokens: not even for one stream with a \
             prompt of {} tokens",
            p.prompt_tokens
        );
    }
    format!(
        "first token within {ttft} and {itl} between tokens: up to {} streams, {:.1} tokens/s \
         (expected {} and {}, prompts of {} tokens)",
        p.streams,
        p.tokens_per_second,
        time(p.expected_ttft_seconds),
        time(p.expected_itl_seconds),
        p.prompt_tokens
    )
}

/// `embed, 0-12` or `13-29, head`.
fn layers(s: &StageReport) -> String {
    let mut parts = Vec::new();
    if s.embed {
        parts.push("embed".to_owned());
    }
    match s.end_layer - s.first_layer {
        0 => {}
        1 => parts.push(s.first_layer.to_string()),
        _ => parts.push(format!("{}-{}", s.first_layer, s.end_layer - 1)),
    }
    if s.head {
        parts.push("head".to_owned());
    }
    parts.join(", ")
}

/// A bar of so much of [`BAR`] characters, in eighths.
fn bar(share: f64) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * BAR as f64 * 8.0).round() as usize;
    format!("{}{}", "█".repeat(eighths / 8), PARTS[eighths % 8])
}

/// Seconds for people: `1.92 ms`.
fn time(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "never".to_owned(),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.1} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.01 => format!("{:.1} ms", s * 1e3),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

/// Bytes for people: `98.4 MB`.
fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n >= 1e12 => format!("{:.1} TB", n / 1e12),
        n if n >= 1e9 => format!("{:.1} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.0} kB", n / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        assert_eq!(bar(1.0).chars().count(), BAR);
        assert_eq!(bar(0.5), "█".repeat(BAR / 2));
        assert_eq!(bar(1.0 / 24.0 / 2.0), "▌");
        let all = [0.000_05, 0.001_92, 0.0222, 0.2878, 1.25, 250.0, f64::INFINITY].map(time);
        let expected = ["50 µs", "1.92 ms", "22.2 ms", "288 ms", "1.2 s", "250 s", "never"];
        assert_eq!(all, expected);
        assert_eq!([98_362_432, 12_000, 5_000_000_000].map(bytes), ["98.4 MB", "12 kB", "5.0 GB"]);
    }
}
