//! Models side by side: size, memory, speed and quality, as a table and as one page with plots.

use std::fmt::Write;
use std::path::Path;

use millrace_shared::model::Dtype;
use serde::{Deserialize, Serialize};

use crate::CompressError;
use crate::judge::{Baseline, Judge, Quality, Speed};

/// A model and what it is worth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What it is called.
    pub name: String,
    /// Bytes of its tensors in the file.
    pub file_bytes: u64,
    /// Bytes that its method's own format would take; those of the file where it has none.
    pub format_bytes: u64,
    /// Bytes of weights in the engine's memory.
    pub memory_bytes: u64,
    /// Likelihood, and distance from the original.
    pub quality: Quality,
    /// On this machine.
    pub speed: Speed,
    /// Relative error of changed weights, and of their outputs.
    pub errors: Option<(f64, Option<f64>)>,
    /// Why it could not be made or judged.
    pub failed: Option<String>,
}

/// How models are judged.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Positions of a window.
    pub window: usize,
    /// Threads.
    pub threads: usize,
    /// Type of K and V.
    pub kv_dtype: Dtype,
}

/// The model that others are compared with.
#[derive(Debug)]
pub struct Original {
    judge: Judge,
    baseline: Baseline,
}

impl Original {
    /// Loads it, and has it read the text.
    ///
    /// # Errors
    /// If it cannot be loaded or computed.
    pub fn open(path: &Path, tokens: &[u32], terms: Terms) -> Result<Self, CompressError> {
        apart(|| {
            let mut judge = Judge::open(path, terms.window, terms.threads, terms.kv_dtype)?;
            let baseline = judge.baseline(tokens)?;
            Ok(Self { judge, baseline })
        })
    }
}

/// On a thread of its own: an engine pins the thread that it computes in, and threads that this one
/// starts later to compress would have one processor.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let done = scope.spawn(work).join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Judges a model by a text; its speed in turns with the original's.
///
/// # Errors
/// If it cannot be loaded or computed.
pub fn judge(
    name: &str,
    path: &Path,
    tokens: &[u32],
    original: Option<&mut Original>,
    terms: Terms,
) -> Result<Entry, CompressError> {
    apart(|| judge_here(name, path, tokens, original, terms))
}

fn judge_here(
    name: &str,
    path: &Path,
    tokens: &[u32],
    original: Option<&mut Original>,
    terms: Terms,
) -> Result<Entry, CompressError> {
    let mut judge = Judge::open(path, terms.window, terms.threads, terms.kv_dtype)?;
    let (beside, baseline) = match original {
        Some(Original { judge, baseline }) => (Some(judge), Some(&*baseline)),
        None => (None, None),
    };
    let quality = judge.quality(tokens, baseline, &mut |_| {})?;
    let speed = judge.speed(beside)?;
    let (file_bytes, memory_bytes) = (judge.file_bytes, judge.memory_bytes);
    Ok(Entry {
        name: name.to_owned(),
        file_bytes,
        format_bytes: file_bytes,
        memory_bytes,
        quality,
        speed,
        ..Entry::default()
    })
}

/// Which entries no other beats in both: fewer bytes and less of a loss.
pub fn front(entries: &[Entry], loss: impl Fn(&Entry) -> Option<f64>) -> Vec<usize> {
    let point = |e: &Entry| loss(e).map(|l| (e.format_bytes, l));
    let beats = |a: (u64, f64), b: (u64, f64)| a.0 <= b.0 && a.1 <= b.1 && a != b;
    (0..entries.len())
        .filter(|&i| {
            let Some(own) = point(&entries[i]) else { return false };
            !entries.iter().filter_map(point).any(|other| beats(other, own))
        })
        .collect()
}

/// Models nearer than this are the same but for rounding.
const SAME: f64 = 1e-5;
/// Nats per token above the best that a plot shows.
const TALL: f64 = 2.5;

const STYLE: &str = ":root{color-scheme:light dark;--back:#fff;--text:#1d232b;--soft:#3a4653;--line:#e3e7ec;--front:#0b6e4f;--point:#6b7c8f;--bad:#a4262c}\
@media(prefers-color-scheme:dark){:root{--back:#14181d;--text:#e4e8ee;--soft:#aeb9c5;--line:#2c343d;--front:#4cc79a;--point:#8b9aab;--bad:#ff8a8f}}\
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:var(--text);background:var(--back)}\
h1{font-size:1.6rem}h1,p{overflow-wrap:anywhere}.wide{overflow-x:auto}figure{margin:1.5rem 0}\
table{border-collapse:collapse;width:100%;font-size:13px}td,th{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}\
td:first-child,th:first-child{text-align:left}td.failed{text-align:left;white-space:normal;color:var(--bad)}tr.front td:first-child{font-weight:600;color:var(--front)}\
svg{width:100%;min-width:46rem;height:auto}line{stroke:var(--line)}circle{fill:var(--point)}circle.front{fill:var(--front)}polyline{fill:none;stroke:var(--front);stroke-width:1.5}\
svg text{font:11px system-ui,sans-serif;fill:var(--soft);stroke:var(--back);stroke-width:3px;paint-order:stroke}";

/// One page: a table, and plots of quality against size and of speed against size. Needs nothing from
/// elsewhere.
pub fn page(title: &str, entries: &[Entry], remarks: &[String]) -> String {
    let title = escape(title);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{STYLE}</style><h1>{title}</h1>"
    );
    for remark in remarks {
        let _ = write!(html, "<p>{}</p>", escape(remark));
    }
    let kl = |e: &Entry| e.quality.mean_kl.filter(|k| e.failed.is_none() && *k > SAME);
    let nll = |e: &Entry| e.failed.is_none().then_some(e.quality.mean_nll);
    let decode = |e: &Entry| {
        let ratio = e.speed.beside.map(|[_, decode]| decode);
        ratio.filter(|_| e.failed.is_none())
    };
    let on_front = front(entries, nll);
    let plain = |v: f64| format!("{v:.2}");
    // What predicts nothing would press all others into a line.
    let most = entries.iter().filter_map(nll).fold(f64::INFINITY, f64::min) + TALL;
    let shown = |e: &Entry| nll(e).filter(|n| *n <= most);
    let worse = entries.iter().filter_map(nll).filter(|n| *n > most).count();
    let above = if worse > 0 { format!("; {worse} lie above") } else { String::new() };
    let what = format!("Mean NLL on the text (nats per token, lower is better{above})");
    html += &plot(&what, entries, &shown, &on_front, &plain);
    html += &plot(
        "KL divergence from the original (logarithmic, lower is better)",
        entries,
        &|e| kl(e).map(f64::log10),
        &front(entries, kl),
        &|v| format!("{:.4}", 10f64.powf(v)),
    );
    let what = "Speed of decoding one sequence, times the original's (higher is better)";
    html += &plot(what, entries, &decode, &[], &plain);
    if entries.is_empty() {
        return html + "</html>\n";
    }
    html += &rows(entries, &on_front);
    html + "<p>Bold: no other takes fewer bytes and is better by NLL (the Pareto front). \
            Bytes are those of the method's own format; the file may be larger.</p></html>\n"
}

/// The table, the front's rows marked.
fn rows(entries: &[Entry], on_front: &[usize]) -> String {
    let mut html = "<div class=\"wide\"><table><tr><th>model<th>bytes<th>in the file<th>in memory<th>NLL<th>KL<th>same token<th>prompt tok/s<th>times<th>answer tok/s<th>times</tr>".to_owned();
    for (i, e) in entries.iter().enumerate() {
        let name = escape(&e.name);
        if let Some(why) = &e.failed {
            let _ = write!(
                html,
                "<tr><td>{name}<td class=\"failed\" colspan=\"10\">{}</tr>",
                escape(why)
            );
            continue;
        }
        let times =
            |i: usize| e.speed.beside.map_or_else(|| "–".to_owned(), |b| format!("{:.2}", b[i]));
        let class = if on_front.contains(&i) { " class=\"front\"" } else { "" };
        let optional = |x: Option<f64>| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.4}"));
        let _ = write!(
            html,
            "<tr{class}><td>{name}<td>{:.1} MB<td>{:.1} MB<td>{:.1} MB<td>{:.4}<td>{}<td>{}<td>{:.0}<td>{}<td>{:.1}<td>{}</tr>",
            e.format_bytes as f64 / 1e6,
            e.file_bytes as f64 / 1e6,
            e.memory_bytes as f64 / 1e6,
            e.quality.mean_nll,
            optional(e.quality.mean_kl),
            optional(e.quality.same_top),
            e.speed.prefill,
            times(0),
            e.speed.decode,
            times(1)
        );
    }
    html + "</table></div>"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The plane of a plot: widths and heights in its own units.
const W: f64 = 1000.0;
const H: f64 = 520.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 40.0;

/// Least and greatest, with room around them.
fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.fold(f64::NEG_INFINITY, f64::max);
    let pad = ((most - least) * 0.06).max(1e-3);
    (least - pad, most + pad)
}

/// Points over megabytes (logarithmic: sizes differ tenfold), the front joined by a line.
fn plot(
    title: &str,
    entries: &[Entry],
    y: &dyn Fn(&Entry) -> Option<f64>,
    front: &[usize],
    tick: &dyn Fn(f64) -> String,
) -> String {
    let points: Vec<(usize, f64, f64)> = entries
        .iter()
        .enumerate()
        .filter_map(|(i, e)| y(e).map(|y| (i, (e.format_bytes as f64 / 1e6).log10(), y)))
        .filter(|p| p.1.is_finite() && p.2.is_finite())
        .collect();
    // One alone has nothing beside it.
    if points.len() < 2 {
        return String::new();
    }
    let ((x0, x1), (y0, y1)) =
        (range(points.iter().map(|p| p.1)), range(points.iter().map(|p| p.2)));
    let sx = |x: f64| LEFT + (x - x0) / (x1 - x0) * (W - LEFT - 20.0);
    let sy = |y: f64| H - BOTTOM - (y - y0) / (y1 - y0) * (H - BOTTOM - 20.0);
    let mut svg = format!(
        "<figure><figcaption>{}</figcaption><div class=\"wide\"><svg viewBox=\"0 0 {W} {H}\" role=\"img\">",
        escape(title)
    );
    // As many decimals as tell neighbours apart.
    let narrowest = 10f64.powf(x0 + (x1 - x0) / 5.0) - 10f64.powf(x0);
    let decimals = (-narrowest.log10()).ceil().clamp(0.0, 3.0) as usize;
    for i in 0..=5 {
        let (x, v) = (x0 + (x1 - x0) * f64::from(i) / 5.0, y0 + (y1 - y0) * f64::from(i) / 5.0);
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{W}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{v}</text>\
             <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{:.decimals$} MB</text>",
            LEFT - 6.0,
            sy(v) + 4.0,
            sx(x),
            H - 14.0,
            10f64.powf(x),
            y = sy(v),
            v = tick(v)
        );
    }
    let mut line: Vec<_> = points.iter().filter(|p| front.contains(&p.0)).collect();
    line.sort_by(|a, b| a.1.total_cmp(&b.1));
    let line: Vec<String> = line.iter().map(|p| format!("{:.1},{:.1}", sx(p.1), sy(p.2))).collect();
    let _ = write!(svg, "<polyline points=\"{}\"/>", line.join(" "));
    let mut placed: Vec<(usize, f64, f64)> =
        points.into_iter().map(|(i, x, y)| (i, sx(x), sy(y))).collect();
    // The front is named before all others.
    placed.sort_by_key(|p| !front.contains(&p.0));
    svg + &marks(entries, &placed, front) + "</svg></div></figure>"
}

/// Points with their names beside them, as far as these find room; all tell them when pointed at.
fn marks(entries: &[Entry], points: &[(usize, f64, f64)], front: &[usize]) -> String {
    let mut svg = String::new();
    let mut taken: Vec<[f64; 4]> =
        points.iter().map(|(_, x, y)| [x - 4.0, y - 4.0, x + 4.0, y + 4.0]).collect();
    for (i, x, y) in points {
        let name = escape(&entries[*i].name);
        let class = if front.contains(i) { " class=\"front\"" } else { "" };
        let _ = write!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"{class}><title>{name}</title></circle>"
        );
        let columns = entries[*i].name.chars().count();
        if let Some((x, y)) = beside((*x, *y), columns as f64 * GLYPH, &mut taken) {
            let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\">{name}</text>");
        }
    }
    svg
}

/// Width of a letter of 11 pixels, rather too much.
const GLYPH: f64 = 6.2;

/// Where text of this width begins right, left, above or below a point, where nothing else is.
fn beside((x, y): (f64, f64), width: f64, taken: &mut Vec<[f64; 4]>) -> Option<(f64, f64)> {
    let starts = [
        (x + 7.0, y + 4.0),
        (x - 7.0 - width, y + 4.0),
        (x - width / 2.0, y - 8.0),
        (x - width / 2.0, y + 16.0),
    ];
    let start = starts.into_iter().find(|(x, y)| {
        let own = [*x, y - 9.0, x + width, y + 2.0];
        let free = |o: &[f64; 4]| own[2] < o[0] || o[2] < own[0] || own[3] < o[1] || o[3] < own[1];
        own[0] >= LEFT && own[2] <= W && own[1] >= 0.0 && taken.iter().all(free)
    })?;
    taken.push([start.0, start.1 - 9.0, start.0 + width, start.1 + 2.0]);
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, bytes: u64, nll: f64) -> Entry {
        let quality = Quality { mean_nll: nll, ..Quality::default() };
        Entry { name: name.to_owned(), format_bytes: bytes, quality, ..Entry::default() }
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let all =
            [entry("a", 10, 3.0), entry("b", 20, 2.0), entry("c", 20, 2.5), entry("d", 30, 2.0)];
        assert_eq!(front(&all, |e| Some(e.quality.mean_nll)), [0, 1]);
        assert!(front(&all, |_| None).is_empty());
    }

    #[test]
    fn names_lie_on_nothing() {
        let mut taken = vec![[496.0, 96.0, 504.0, 104.0]];
        let point = (500.0, 100.0);
        let starts = [(); 5].map(|()| beside(point, 60.0, &mut taken));
        let expected = [(507.0, 104.0), (433.0, 104.0), (470.0, 92.0), (470.0, 116.0)];
        assert_eq!(starts[..4], expected.map(Some));
        assert_eq!(starts[4], None, "all places are taken");
        assert_eq!(beside((W - 10.0, 300.0), 60.0, &mut taken).map(|s| s.0), Some(W - 77.0));
    }

    #[test]
    fn sizes_that_differ_little_are_told_apart() {
        let ticks = |bytes: [u64; 2]| {
            let page = page("T", &[entry("a", bytes[0], 3.0), entry("b", bytes[1], 2.0)], &[]);
            let found = page.split(" MB</text>").filter_map(|part| part.rsplit_once('>'));
            found.map(|(_, tick)| tick.to_owned()).take(6).collect::<Vec<_>>()
        };
        for bytes in [[95_200_000, 96_600_000], [40_000_000, 540_000_000], [9_000_000, 9_030_000]] {
            let mut all = ticks(bytes);
            assert_eq!(all.len(), 6);
            all.dedup();
            assert_eq!(all.len(), 6, "{all:?}");
        }
        assert!(!page("T", &[entry("a", 1, 3.0)], &[]).contains("<svg"));
    }

    #[test]
    fn a_page_names_all_and_trusts_no_name() {
        let mut broken = entry("<b>", 5, 1.0);
        broken.failed = Some("no & no".to_owned());
        let page = page(
            "T",
            &[entry("good", 10, 3.0), entry("other", 12, 2.0), broken],
            &["r".to_owned()],
        );
        assert!(
            page.contains("good") && page.contains("&lt;b&gt;") && page.contains("no &amp; no")
        );
        assert!(page.contains("width=device-width") && page.contains("prefers-color-scheme:dark"));
        assert!(
            !page.contains("<b>") && !page.contains("NaN") && page.matches("<svg").count() == 1
        );
    }
}
