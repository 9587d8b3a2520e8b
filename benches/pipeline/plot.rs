//! Two plain SVG plots, for every table of pipelines.

use std::fmt::Write;

const COLOURS: [&str; 4] = ["#0b6e4f", "#2563a8", "#c26a00", "#a3195b"];

/// A line of the first plot.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) dashed: bool,
    /// One per number of stages, 0..1.
    pub(crate) values: Vec<f64>,
}

/// A bar of the second.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) value: f64,
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, content: &str) {
    let _ = write!(out, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}'>{content}</text>");
}

fn page(width: u32, height: u32, body: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' \
         font-family='sans-serif' font-size='12'><rect width='100%' height='100%' fill='white'/>\
         {body}</svg>\n"
    )
}

/// Efficiency over the number of stages.
pub(crate) fn lines(title: &str, stages: &[u32], series: &[Series]) -> String {
    let step = 360.0 / stages.len().saturating_sub(1).max(1) as f64;
    let x = |i: usize| 60.0 + step * i as f64;
    let y = |v: f64| 340.0 - 300.0 * ((v - 0.4) / 0.6).clamp(0.0, 1.0);
    let mut out = String::new();
    text(&mut out, (240.0, 20.0), "middle", title);
    for tenth in 4..=10 {
        let v = f64::from(tenth) / 10.0;
        let line = y(v);
        let _ = write!(out, "<path d='M60 {line:.1}H420' stroke='#ddd'/>");
        text(&mut out, (54.0, line + 4.0), "end", &format!("{}%", tenth * 10));
    }
    for (i, n) in stages.iter().enumerate() {
        text(&mut out, (x(i), 358.0), "middle", &n.to_string());
    }
    text(&mut out, (240.0, 376.0), "middle", "stages");
    for (n, s) in series.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let dash = if s.dashed { " stroke-dasharray='5 3'" } else { "" };
        let points: Vec<String> =
            s.values.iter().enumerate().map(|(i, &v)| format!("{:.1},{:.1}", x(i), y(v))).collect();
        let points = points.join(" ");
        let style = format!("fill='none' stroke='{colour}' stroke-width='2'{dash}");
        let _ = write!(out, "<polyline points='{points}' {style}/>");
        let at = 50.0 + 20.0 * n as f64;
        let _ = write!(out, "<path d='M445 {at}H475' {style}/>");
        text(&mut out, (482.0, at + 4.0), "start", &s.name);
    }
    page(640, 390, &out)
}

/// One panel of bars below the other.
pub(crate) fn bars(panels: &[(&str, Vec<Bar>)]) -> String {
    let mut out = String::new();
    let mut top = 30.0;
    for (title, bars) in panels {
        text(&mut out, (190.0, top - 8.0), "start", title);
        let most = bars.iter().map(|b| b.value).fold(f64::MIN_POSITIVE, f64::max);
        for (i, bar) in bars.iter().enumerate() {
            let y = top + 22.0 * i as f64;
            let width = 340.0 * (bar.value / most).clamp(0.0, 1.0);
            let colour = COLOURS[usize::from(i > 0)];
            text(&mut out, (182.0, y + 13.0), "end", &bar.name);
            let _ = write!(
                out,
                "<rect x='190' y='{y:.1}' width='{width:.1}' height='17' fill='{colour}'/>"
            );
            text(&mut out, (196.0 + width, y + 13.0), "start", &format!("{:.0}", bar.value));
        }
        top += 22.0 * bars.len() as f64 + 40.0;
    }
    page(620, top as u32, &out)
}
