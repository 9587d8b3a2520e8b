//! Runs under load as one SVG page: how latencies are distributed, and tokens and requests over time.

use std::fmt::Write;

use super::report::{Level, Report};

const COLOURS: [&str; 6] = ["#0b6e4f", "#2563a8", "#c26a00", "#a3195b", "#6b4fa0", "#555555"];
const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 220.0;

/// A picture of its own within the page.
struct Panel<'a> {
    title: &'a str,
    x_unit: &'a str,
    /// By run: points (x, y).
    lines: Vec<Vec<(f64, f64)>>,
    /// Where on x a bound is drawn.
    bound: Option<f64>,
    /// Powers of ten along x.
    log: bool,
    /// Highest y, where it is not that of the points.
    top: Option<f64>,
}

/// The page.
pub(super) fn page(report: &Report) -> String {
    let lines = |of: fn(&Level) -> Vec<(f64, f64)>| report.results.iter().map(of).collect();
    let panels = [
        Panel {
            title: "share of requests with their first token",
            x_unit: "ms",
            lines: lines(|l| l.ttft_curve.clone()),
            bound: Some(report.slo_ttft_ms),
            log: true,
            top: Some(1.0),
        },
        Panel {
            title: "share of times between tokens",
            x_unit: "ms",
            lines: lines(|l| l.gap_curve.clone()),
            bound: Some(report.slo_itl_ms),
            log: true,
            top: Some(1.0),
        },
        Panel {
            title: "tokens a second",
            x_unit: "s",
            lines: lines(|l| by_second(l.tokens_by_second.iter().map(|n| *n as f64))),
            bound: None,
            log: false,
            top: None,
        },
        Panel {
            title: "requests under way",
            x_unit: "s",
            lines: lines(|l| by_second(l.in_flight_by_second.iter().map(|n| f64::from(*n)))),
            bound: None,
            log: false,
            top: None,
        },
    ];
    let mut body = String::new();
    let heading = format!(
        "{}, {} stage(s), over {}: {} tokens in, {} out",
        escaped(&report.model),
        report.stages,
        report.over.to_uppercase(),
        report.prompt_tokens,
        report.max_tokens
    );
    text(&mut body, (20.0, 24.0), "start", &heading);
    for (n, level) in report.results.iter().enumerate() {
        let y = 44.0 + 16.0 * n as f64;
        let colour = COLOURS[n % COLOURS.len()];
        let _ = write!(body, "<path d='M20 {y}H44' stroke='{colour}' stroke-width='2'/>");
        let legend = format!(
            "{}: {:.2} requests/s, {:.1} tokens/s, {:.1}% good, {} refused, {} failed",
            level.name(),
            level.requests_per_s,
            level.tokens_per_s,
            level.good_share * 100.0,
            level.refused,
            level.failed
        );
        text(&mut body, (52.0, y + 4.0), "start", &legend);
    }
    let top = 70.0 + 16.0 * report.results.len() as f64;
    for (n, panel) in panels.iter().enumerate() {
        let x = 60.0 + (WIDTH + 80.0) * (n % 2) as f64;
        let y = top + (HEIGHT + 70.0) * (n / 2) as f64;
        panel.draw(&mut body, (x, y));
    }
    let height = top + 2.0 * (HEIGHT + 70.0);
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='980' height='{height:.0}' \
         font-family='sans-serif' font-size='12'><rect width='100%' height='100%' fill='white'/>\
         {body}</svg>\n"
    )
}

fn by_second(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    values.enumerate().map(|(second, value)| (second as f64, value)).collect()
}

impl Panel<'_> {
    fn draw(&self, out: &mut String, (left, top): (f64, f64)) {
        let points = || self.lines.iter().flatten();
        let bottom = top + HEIGHT;
        let most_y = points().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
        let most_y = self.top.unwrap_or(most_y);
        let xs = || points().map(|p| p.0).chain(self.bound);
        let scale = |x: f64| if self.log { x.max(1e-3).log10() } else { x };
        let (mut low, mut high) = (0.0, xs().map(scale).fold(1e-3, f64::max));
        if self.log {
            low = xs().map(scale).fold(f64::MAX, f64::min).floor();
            high = high.ceil().max(low + 1.0);
        }
        let x = |value: f64| left + WIDTH * (scale(value) - low) / (high - low);
        let y = |value: f64| bottom - HEIGHT * (value / most_y).clamp(0.0, 1.0);
        text(out, (left, top - 8.0), "start", self.title);
        for part in 0..=4 {
            let value = most_y * f64::from(part) / 4.0;
            let line = y(value);
            let _ = write!(out, "<path d='M{left:.1} {line:.1}h{WIDTH}' stroke='#ddd'/>");
            text(out, (left - 6.0, line + 4.0), "end", &short(value));
        }
        let marks: Vec<f64> = match self.log {
            true => (low as i32..=high as i32).map(|power| 10f64.powi(power)).collect(),
            false => (0..=4).map(|part| high * f64::from(part) / 4.0).collect(),
        };
        for mark in marks {
            text(out, (x(mark), bottom + 16.0), "middle", &short(mark));
        }
        text(out, (left + WIDTH, bottom + 32.0), "end", self.x_unit);
        if let Some(bound) = self.bound {
            let at = x(bound);
            let _ = write!(
                out,
                "<path d='M{at:.1} {top:.1}v{HEIGHT}' stroke='#b00' stroke-dasharray='4 3'/>"
            );
        }
        for (n, line) in self.lines.iter().enumerate() {
            let points: Vec<String> =
                line.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
            let _ = write!(
                out,
                "<polyline points='{}' fill='none' stroke='{}' stroke-width='1.5'/>",
                points.join(" "),
                COLOURS[n % COLOURS.len()]
            );
        }
    }
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, content: &str) {
    let _ = write!(out, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}'>{content}</text>");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A number with about three digits.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.1}").trim_end_matches(".0").to_owned(),
        v => format!("{v:.3}").trim_end_matches('0').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_draws_every_run() {
        let panel = Panel {
            title: "t",
            x_unit: "ms",
            lines: vec![vec![(1.0, 0.0), (10.0, 1.0)], vec![(2.0, 0.5)], Vec::new()],
            bound: Some(100.0),
            log: true,
            top: Some(1.0),
        };
        let mut out = String::new();
        panel.draw(&mut out, (0.0, 0.0));
        assert_eq!(out.matches("<polyline").count(), 3);
        assert!(out.contains("points='0.0,220.0 200.0,0.0'"), "{out}");
        assert!(!out.contains("NaN") && !out.contains("inf"), "{out}");
    }

    #[test]
    fn numbers_and_names() {
        assert_eq!(["0", "0.25", "1", "2.5", "1000"], [0.0, 0.25, 1.0, 2.5, 1000.0].map(short)[..]);
        assert_eq!(escaped("a<b&c>"), "a&lt;b&amp;c&gt;");
    }
}
