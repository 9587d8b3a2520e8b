//! The screen, for 80 columns and more. Colours only underline what the words say already.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline};

use super::view::{Stage, View};

/// Columns of a stage's bar at 80 columns.
const BAR: usize = 17;

pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let stages = (view.stages.len() as u16).saturating_add(1);
    let [head, kv, caches, _, table, curve, keys] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(stages),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(heading(view)), head);
    frame.render_widget(Paragraph::new(kv_line(view, kv.width)), kv);
    frame.render_widget(Paragraph::new(cache_line(view)), caches);
    frame.render_widget(Paragraph::new(stage_lines(view, table.width)), table);
    draw_curve(frame, view, curve);
    let keys_line = Line::from(if view.watched { " q ends" } else { "" })
        .style(Style::new().add_modifier(Modifier::DIM));
    frame.render_widget(Paragraph::new(keys_line), keys);
}

fn bold(text: String) -> Span<'static> {
    Span::styled(text, Style::new().add_modifier(Modifier::BOLD))
}

fn red(text: String) -> Span<'static> {
    Span::styled(text, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD))
}

fn heading(view: &View) -> Vec<Line<'static>> {
    let s = &view.status;
    let state = match (&view.trouble, s.ready) {
        (Some(why), _) => red(format!("no answer: {why}")),
        (None, true) => Span::styled("serves", Style::new().fg(Color::Green)),
        (None, false) => red(format!("does not serve: {}", s.detail)),
    };
    let first = Line::from(vec![
        bold(format!(" {} ", if view.model.is_empty() { "millrace" } else { &view.model })),
        Span::raw(format!("at {}, {} nodes, epoch {}: ", view.address, s.nodes, s.epoch)),
        state,
    ]);
    let second = Line::from(vec![
        Span::raw(" tokens/s "),
        bold(format!("{:.1}", view.rates.tokens)),
        Span::raw(format!(", of prompts {:.1}    requests ", view.rates.prompts)),
        bold(s.running.to_string()),
        Span::raw(" running, "),
        bold(s.waiting.to_string()),
        Span::raw(" waiting"),
    ]);
    vec![first, second]
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

fn kv_line(view: &View, width: u16) -> Line<'static> {
    let s = &view.status;
    let share = f64::from(s.kv_blocks_used) / f64::from(s.kv_blocks.max(1));
    let colour = if share > 0.95 { Color::Red } else { Color::Cyan };
    let columns = BAR + usize::from(width.saturating_sub(80) / 2);
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

fn cache_line(view: &View) -> Line<'static> {
    let share =
        |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", s * 100.0));
    Line::from(format!(
        " prompts found in the prefix cache {}, drafts accepted {}, {} preempted",
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

fn stage_lines(view: &View, width: u16) -> Vec<Line<'static>> {
    let columns = BAR + usize::from(width.saturating_sub(80) / 2);
    let names = 10 + usize::from(width.saturating_sub(80) / 4);
    let head = format!(
        " {:<2} {:<names$} {:<13} {:<bar$} {:>5} {:>7} {:>3} {:>9}",
        "",
        "node",
        "layers",
        "busy",
        "idle",
        "steps/s",
        "cpu",
        "next hop",
        bar = columns + 5,
    );
    let mut lines = vec![Line::from(head).style(Style::new().add_modifier(Modifier::DIM))];
    let slowest = view.stages.iter().filter_map(|s| s.busy).fold(0.0, f64::max);
    for (index, stage) in view.stages.iter().enumerate() {
        lines.push(stage_line(index, stage, (names, columns, slowest)));
    }
    lines
}

fn stage_line(
    index: usize,
    stage: &Stage,
    (names, columns, slowest): (usize, usize, f64),
) -> Line<'static> {
    let busy = stage.busy.unwrap_or(0.0);
    let colour = if busy > 0.0 && busy >= slowest { Color::Yellow } else { Color::Green };
    let percent =
        |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", s * 100.0));
    let hop = stage.round_trip.map_or_else(|| "-".to_owned(), |s| format!("{:.2} ms", s * 1e3));
    Line::from(vec![
        Span::raw(format!(
            " {index:<2} {:<names$} {:<13} ",
            fit(&stage.node, names),
            fit(&stage.layers, 13)
        )),
        Span::styled(bar(busy, columns), Style::new().fg(colour).bg(Color::DarkGray)),
        Span::raw(format!(
            "{:>5} {:>5} {:>7.1} {:>3} {hop:>9}",
            percent(stage.busy),
            percent(stage.busy.map(|b| 1.0 - b)),
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
        view.miss("it is gone".to_owned());
        assert!(screen(&view, 80).contains("no answer: it is gone"));
        view.stages[1].node = "a-very-long-name-of-a-node".to_owned();
        assert!(screen(&view, 80).contains("a-very-lo… 10-19"));
        assert!(screen(&view, 160).contains("a-very-long-name-of-a-node"));
        for tiny in [1, 20] {
            screen(&view, tiny);
        }
    }

    #[test]
    fn bars() {
        assert_eq!(bar(0.5, 4), "██  ");
        assert_eq!(bar(1.0, 3), "███");
        assert_eq!(bar(0.0, 2), "  ");
        assert_eq!(bar(0.0625, 2), "▏ ");
    }
}
