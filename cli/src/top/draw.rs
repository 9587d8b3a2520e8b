//! The screen, for 60 columns and more. Colours only underline what the words say already.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline};

use super::view::{Stage, View};

/// Columns of a stage's bar at 80 columns.
const BAR: usize = 17;
/// Columns of the share that is idle, which narrow screens do without.
const IDLE: usize = 6;

/// Columns at which everything has room.
const WIDE: u16 = 80;
/// Most lines that say why the cluster does not serve.
const WORDS: usize = 4;

pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let width = frame.area().width;
    let (heading, rates) = (heading(view, width), rate_lines(view, width));
    let stages = (view.stages.len() as u16).saturating_add(1);
    let [head, rest] =
        Layout::vertical([Constraint::Length(heading.len() as u16), Constraint::Min(0)])
            .areas(frame.area());
    let [flow, kv, caches, _, table, curve, keys] = Layout::vertical([
        Constraint::Length(rates.len() as u16),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(stages),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(rest);
    frame.render_widget(Paragraph::new(heading), head);
    frame.render_widget(Paragraph::new(rates), flow);
    frame.render_widget(Paragraph::new(kv_line(view, kv.width)), kv);
    frame.render_widget(Paragraph::new(cache_line(view, width)), caches);
    frame.render_widget(Paragraph::new(stage_lines(view, table)), table);
    draw_curve(frame, view, curve);
    let keys_line = Line::from(if view.watched { " q ends" } else { "" })
        .style(Style::new().add_modifier(Modifier::DIM));
    frame.render_widget(Paragraph::new(keys_line), keys);
    if view.trouble.is_some() {
        // These figures are of a while ago.
        frame.buffer_mut().set_style(rest, Style::new().add_modifier(Modifier::DIM));
    }
}

fn bold(text: String) -> Span<'static> {
    Span::styled(text, Style::new().add_modifier(Modifier::BOLD))
}

fn red(text: String) -> Span<'static> {
    Span::styled(text, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD))
}

/// Whose figures these are and how it goes, on one line where that has room.
fn heading(view: &View, width: u16) -> Vec<Line<'static>> {
    let s = &view.status;
    let state = match (&view.trouble, s.ready) {
        (Some((why, None)), _) => red(format!("no answer: {why}")),
        (Some((why, Some(age))), _) => {
            red(format!("no answer; what is below is {} s old: {why}", age.as_secs()))
        }
        (None, true) => Span::styled("serves", Style::new().fg(Color::Green)),
        (None, false) => red(format!("does not serve: {}", s.detail)),
    };
    let name = bold(format!(" {} ", if view.model.is_empty() { "millrace" } else { &view.model }));
    let nodes = if s.nodes == 1 { "node" } else { "nodes" };
    let place = match view.trouble {
        Some((_, None)) => format!("at {}: ", view.address),
        _ => format!("at {}, {} {nodes}, epoch {}: ", view.address, s.nodes, s.epoch),
    };
    let room = usize::from(width).saturating_sub(1);
    let whole = [&name, &state].map(|s| s.content.chars().count()).iter().sum::<usize>();
    if whole + place.chars().count() <= room {
        return vec![Line::from(vec![name, Span::raw(place), state])];
    }
    let mut lines = vec![Line::from(vec![name, Span::raw(place)])];
    let words = wrap(&state.content, room.saturating_sub(1), WORDS);
    lines.extend(words.into_iter().map(|w| Line::from(Span::styled(format!(" {w}"), state.style))));
    lines
}

/// Lines of at most so many columns, as many as there may be; what has no room is left out.
fn wrap(text: &str, columns: usize, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![String::new()];
    for word in text.split_whitespace() {
        let is_full = lines.len() >= most;
        let last = lines.last_mut().expect("invariant: there is a line from the beginning");
        if last.is_empty() {
            word.clone_into(last);
        } else if last.chars().count() + 1 + word.chars().count() <= columns {
            last.push(' ');
            last.push_str(word);
        } else if is_full {
            last.push_str(" …");
            break;
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.iter().map(|line| fit(line, columns)).collect()
}

/// Tokens and requests; on two lines where one has no room.
fn rate_lines(view: &View, width: u16) -> Vec<Line<'static>> {
    let s = &view.status;
    let tokens = [
        Span::raw(" tokens/s "),
        bold(format!("{:.1}", view.rates.tokens)),
        Span::raw(format!(", of prompts {:.1}", view.rates.prompts)),
    ];
    let requests = [
        bold(s.running.to_string()),
        Span::raw(" running, "),
        bold(s.waiting.to_string()),
        Span::raw(" waiting"),
    ];
    let all = tokens.iter().chain(&requests).map(|s| s.content.chars().count()).sum::<usize>();
    if all + "    requests ".len() <= usize::from(width) {
        let gap = Span::raw("    requests ");
        return vec![tokens.into_iter().chain([gap]).chain(requests).collect()];
    }
    let below = [Span::raw(" requests ")].into_iter().chain(requests).collect();
    vec![tokens.into_iter().collect(), below]
}

/// So many columns, filled by a share, in eighths.
fn bar(share: f64, columns: usize) -> String {
    const PARTS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let eighths = (share.clamp(0.0, 1.0) * columns as f64 * 8.0).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    if eighths / 8 < columns {
        text.push(PARTS[eighths % 8]);
        text.push_str(&" ".repeat(columns - eighths / 8 - 1));
    }
    text
}

/// Columns of bars on a screen of so many.
fn bar_columns(width: u16) -> usize {
    let missing = usize::from(WIDE.saturating_sub(width)).saturating_sub(IDLE);
    (BAR + usize::from(width.saturating_sub(WIDE) / 2)).saturating_sub(missing).max(4)
}

fn kv_line(view: &View, width: u16) -> Line<'static> {
    let s = &view.status;
    let share = f64::from(s.kv_blocks_used) / f64::from(s.kv_blocks.max(1));
    let colour = if share > 0.95 { Color::Red } else { Color::Cyan };
    let columns = bar_columns(width);
    Line::from(vec![
        Span::raw(" KV cache "),
        Span::styled(bar(share, columns), Style::new().fg(colour).bg(Color::DarkGray)),
        Span::raw(format!(
            " {:.0} %, {} of {} blocks of {}",
            share * 100.0,
            s.kv_blocks_used,
            s.kv_blocks,
            s.kv_block_size
        )),
    ])
}

fn cache_line(view: &View, width: u16) -> Line<'static> {
    let share =
        |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", s * 100.0));
    let found = if width < WIDE { "" } else { "prompts found in the " };
    Line::from(format!(
        " {found}prefix cache {}, drafts accepted {}, {} preempted",
        share(view.rates.cached),
        share(view.rates.accepted),
        view.status.preemptions
    ))
}

/// At most so many characters.
fn fit(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

fn stage_lines(view: &View, area: Rect) -> Vec<Line<'static>> {
    let width = area.width;
    let shape = Shape {
        names: 10 + usize::from(width.saturating_sub(WIDE) / 4),
        bar: bar_columns(width),
        idle: width >= WIDE,
        slowest: view.stages.iter().filter_map(|s| s.busy).fold(0.0, f64::max),
    };
    let head = format!(
        " {:<2} {:<names$} {:<13} {:<bar$}{} {:>7} {:>3} {:>9}",
        "",
        "node",
        "layers",
        "busy",
        if shape.idle { "  idle" } else { "" },
        "steps/s",
        "cpu",
        "next hop",
        names = shape.names,
        bar = shape.bar + 5,
    );
    let mut lines = vec![Line::from(head).style(Style::new().add_modifier(Modifier::DIM))];
    let room = usize::from(area.height).saturating_sub(1);
    let seen = if view.stages.len() > room { room.saturating_sub(1) } else { room };
    let stages = view.stages.iter().enumerate().take(seen);
    lines.extend(stages.map(|(index, stage)| stage_line(index, stage, &shape)));
    if view.stages.len() > room {
        let more = view.stages.len() - seen;
        lines.push(Line::from(format!(" … and {more} more: a higher window shows them")));
    }
    lines
}

/// How wide the columns of stages are.
struct Shape {
    names: usize,
    bar: usize,
    /// Whether there is room for the share that is idle.
    idle: bool,
    /// The share of the stage that is busiest.
    slowest: f64,
}

fn stage_line(index: usize, stage: &Stage, shape: &Shape) -> Line<'static> {
    let names = shape.names;
    let busy = stage.busy.unwrap_or(0.0);
    let colour = if busy > 0.0 && busy >= shape.slowest { Color::Yellow } else { Color::Green };
    let percent =
        |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", s * 100.0));
    let idle = percent(stage.busy.map(|b| 1.0 - b));
    let hop = stage.round_trip.map_or_else(|| "-".to_owned(), |s| format!("{:.2} ms", s * 1e3));
    Line::from(vec![
        Span::raw(format!(
            " {index:<2} {:<names$} {:<13} ",
            fit(&stage.node, names),
            fit(&stage.layers, 13)
        )),
        Span::styled(bar(busy, shape.bar), Style::new().fg(colour).bg(Color::DarkGray)),
        Span::raw(format!(
            "{:>5}{} {:>7.1} {:>3} {hop:>9}",
            percent(stage.busy),
            if shape.idle { format!(" {idle:>5}") } else { String::new() },
            stage.steps,
            stage.threads,
        )),
    ])
}

fn draw_curve(frame: &mut Frame<'_>, view: &View, area: Rect) {
    if area.height < 3 || view.curve.is_empty() {
        return;
    }
    let [title, graph] = Layout::vertical([Constraint::Length(2), Constraint::Min(1)]).areas(area);
    let most = view.curve.iter().max().copied().unwrap_or(0);
    let text = format!("\n tokens/s, latest on the right, at most {most}");
    frame.render_widget(Paragraph::new(text), title);
    let room = usize::from(graph.width.saturating_sub(2));
    let seen = view.curve.len().saturating_sub(room);
    let mut bars = vec![0; room.saturating_sub(view.curve.len())];
    bars.extend(view.curve.iter().skip(seen));
    let inner = Rect { x: graph.x + 1, width: graph.width.saturating_sub(2), ..graph };
    frame.render_widget(Sparkline::default().data(bars).style(Style::new().fg(Color::Cyan)), inner);
}

/// A screen as text, without what is empty at its end.
pub(super) fn text(screen: &Buffer) -> String {
    let width = usize::from(screen.area.width.max(1));
    let rows = screen.content.chunks(width);
    let rows = rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>());
    let mut lines: Vec<String> = rows.map(|row| row.trim_end().to_owned()).collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::view::tests::after_two_looks;
    use super::*;

    fn screen(view: &View, width: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 24)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        text(terminal.backend().buffer())
    }

    #[test]
    fn everything_fits_on_80_columns() {
        let mut view = after_two_looks();
        let text = screen(&view, 80);
        for part in [
            "smollm2:135m at 10.0.0.1:8001, 4 nodes, epoch 3: serves",
            "tokens/s 1200.0, of prompts 500.0",
            "12 running, 3 waiting",
            "43 %, 220 of 512 blocks of 16",
            "prefix cache 40 %, drafts accepted -, 0 preempted",
            "next hop",
            "0  gpu-0      embed, 0-9",
            "90 %  10 %   100.0   4   0.31 ms",
            "40 %  60 %   100.0   4         -",
            "q ends",
        ] {
            assert!(text.contains(part), "'{part}' is not in:\n{text}");
        }
        view.stages[1].node = "a-very-long-name-of-a-node".to_owned();
        assert!(screen(&view, 80).contains("a-very-lo… 10-19"));
        assert!(screen(&view, 160).contains("a-very-long-name-of-a-node"));
        for tiny in [1, 20] {
            screen(&view, tiny);
        }
    }

    #[test]
    fn narrow_screens_lose_no_figure_but_the_idle_share() {
        let text = screen(&after_two_looks(), 60);
        for part in [
            "smollm2:135m at 10.0.0.1:8001, 4 nodes, epoch 3: serves",
            "tokens/s 1200.0, of prompts 500.0",
            "requests 12 running, 3 waiting",
            "43 %, 220 of 512 blocks of 16",
            "prefix cache 40 %, drafts accepted -, 0 preempted",
            "90 %   100.0   4   0.31 ms",
            "40 %   100.0   4         -",
        ] {
            assert!(text.contains(part), "'{part}' is not in:\n{text}");
        }
    }

    #[test]
    fn why_nothing_is_served_is_told_whole_and_old_figures_are_said_to_be() {
        let mut view = after_two_looks();
        view.status.ready = false;
        view.status.detail = "node gpu-b was lost (no heartbeat) 0.4 s ago; it waits for a node \
                              that has room for the layers 10-19"
            .to_owned();
        let words = |view: &View| {
            let text = screen(view, 80);
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert!(words(&view).contains(&format!("does not serve: {}", view.status.detail)));
        let later = Instant::now() + Duration::from_secs(60);
        view.miss(later, "it is gone".to_owned());
        let text = words(&view);
        assert!(text.contains("s old: it is gone"), "{text}");
        // Nobody has seen this one.
        let mut view = View::new("10.0.0.1:8001", "");
        view.miss(later, "it is gone".to_owned());
        assert!(screen(&view, 80).contains("millrace at 10.0.0.1:8001: no answer: it is gone"));
    }

    #[test]
    fn stages_that_have_no_room_are_counted() {
        let mut view = after_two_looks();
        view.stages = (0..40).flat_map(|_| view.stages.first().cloned()).collect();
        let text = screen(&view, 80);
        let rows = text.lines().filter(|line| line.contains("gpu-0")).count();
        assert!(rows > 10, "{text}");
        assert!(text.contains(&format!("… and {} more", 40 - rows)), "{text}");
    }

    #[test]
    fn words_are_wrapped() {
        assert_eq!(wrap("a bc def", 4, 3), ["a bc", "def"]);
        assert_eq!(wrap("a bc def", 4, 1), ["a b…"]);
        assert_eq!(wrap("abcdef", 4, 3), ["abc…"]);
    }

    #[test]
    fn bars() {
        assert_eq!(bar(0.5, 4), "██  ");
        assert_eq!(bar(1.0, 3), "███");
        assert_eq!(bar(0.0, 2), "  ");
        assert_eq!(bar(0.0625, 2), "▏ ");
    }
}
