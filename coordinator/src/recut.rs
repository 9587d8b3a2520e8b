//! A new cut, for people: what serves, what would, what it brings and costs.

use std::fmt::Write as _;

use millrace_shared::wire::admin::RecutReport;

const BAR: usize = 24;

/// Two tables with bars, and a line on gain and price.
pub fn render(report: &RecutReport) -> String {
    let all = || report.current.iter().chain(&report.proposed);
    let slowest = all().map(|s| s.seconds).fold(0.0, f64::max).max(1e-12);
    let name = all().map(|s| s.node.chars().count()).max().unwrap_or(0).max(4);
    let mut text = format!("  why: {}\n", report.reason);
    for (title, stages) in [("now", &report.current), ("then", &report.proposed)] {
        let _ = writeln!(text, "  {title}");
        for stage in stages {
            let layers = match (stage.first_layer, stage.end_layer) {
                (first, end) if first < end => format!("{first}-{}", end - 1),
                _ => "none".to_owned(),
            };
            let layers = format!("{layers}{}", if stage.head { " + head" } else { "" });
            let bar = "#".repeat((stage.seconds / slowest * BAR as f64).round() as usize);
            let _ = writeln!(
                text,
                "    {:<name$}  {layers:<12}  {bar:<BAR$}  {:>8.2} ms",
                stage.node,
                stage.seconds * 1e3
            );
        }
    }
    let _ = write!(
        text,
        "  throughput x{:.2}; {:.1} MB of weights to take over; a pause of about {:.1} s{}",
        report.gain,
        report.bytes_to_move as f64 / 1e6,
        report.pause_seconds,
        if report.beside { "" } else { " and the time to load, for memory does not hold both" }
    );
    text
}
