//! Draws a simulated step, as text for a terminal or as SVG.

use super::PassKind;
use super::simulate::{Span, Timeline};
use std::fmt::Write;

/// Returns the passes that take time.
fn visible(spans: &[Span]) -> impl Iterator<Item = &Span> {
    spans.iter().filter(|span| span.end > span.start)
}

/// Draws one line per rank. A pass has its name and a width that is proportional to its time.
pub fn text(timeline: &Timeline) -> String {
    let spans = || timeline.ranks.iter().flat_map(|spans| visible(spans));
    let times = spans().map(|span| span.end - span.start);
    let shortest = times.fold(f64::INFINITY, f64::min);
    let name_lengths = spans().map(|span| span.pass.to_string().len());
    let longest_name = name_lengths.max().unwrap_or(1);
    // The shortest pass has room for the longest name and a space.
    let unit = (longest_name + 1) as f64;
    let column = |time: f64| (time / shortest * unit).round() as usize;
    let digits = timeline.ranks.len().saturating_sub(1).to_string().len();
    let mut out = String::new();
    for (rank, spans) in timeline.ranks.iter().enumerate() {
        let mut line = format!("rank {rank:digits$} |");
        let margin = line.len();
        for Span { pass, start, end } in spans {
            let from = margin + column(*start);
            let to = margin + column(*end);
            if to > from {
                let name = pass.to_string();
                let gap = from - line.len().min(from);
                let width = to - from - 1;
                let _ = write!(line, "{:gap$}{name:.<width$} ", "");
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn color(kind: PassKind, chunk: usize) -> &'static str {
    use PassKind::*;
    match (kind, chunk % 2) {
        (Forward, 0) => "#8fb8de",
        (Forward, _) => "#c5daf0",
        (Backward | BackwardInput, 0) => "#7fc29b",
        (Backward | BackwardInput, _) => "#b9e0c8",
        (BackwardWeight, 0) => "#f2c078",
        (BackwardWeight, _) => "#f8dfb5",
        (Logits, _) => "#d88c9a",
        (Normalize, _) => "#e0a3ae",
        (LogitsBackward, _) => "#e8b9c2",
        (Embed | EmbedBackward, _) => "#b8a9d9",
    }
}

const ROW_HEIGHT: f64 = 24.0;
/// Space for the names of ranks.
const MARGIN: f64 = 56.0;
/// Width of the whole step.
const WIDTH: f64 = 1400.0;
/// Distance of the first row from the upper edge.
const TOP: f64 = ROW_HEIGHT * 1.2;
/// The narrowest pass that shows its microbatch.
const MIN_LABELED_WIDTH: f64 = 11.0;

/// Draws one row per rank and a legend.
pub fn svg(timeline: &Timeline, title: &str) -> String {
    let scale = WIDTH / timeline.total.max(f64::MIN_POSITIVE);
    let rows = timeline.ranks.len() as f64;
    let width = WIDTH + MARGIN + 8.0;
    let height = ROW_HEIGHT * (rows + 3.5);
    let title = escape(title);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"4\" y=\"16\" font-size=\"13\">{title}</text>\n"
    );
    for (rank, spans) in timeline.ranks.iter().enumerate() {
        let y = TOP + ROW_HEIGHT * rank as f64;
        let text_y = y + ROW_HEIGHT * 0.65;
        let _ = writeln!(out, "<text x=\"4\" y=\"{text_y:.1}\">rank {rank}</text>");
        for span in visible(spans) {
            draw_span(&mut out, span, scale, y);
        }
    }
    draw_legend(&mut out, timeline);
    out.push_str("</svg>\n");
    out
}

/// Draws a pass into the row at `y`, `scale` wide per unit of time.
fn draw_span(out: &mut String, span: &Span, scale: f64, y: f64) {
    let Span { pass, start, end } = span;
    let x = MARGIN + start * scale;
    let width = (end - start) * scale;
    let height = ROW_HEIGHT * 0.9;
    let fill = color(pass.kind, pass.chunk);
    let _ = write!(
        out,
        "<g><title>{pass}: {start:.3} to {end:.3}</title>\
         <rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.1}\" \
         fill=\"{fill}\" stroke=\"white\" stroke-width=\"0.5\"/>"
    );
    if width > MIN_LABELED_WIDTH {
        let x = x + width / 2.0;
        let y = y + ROW_HEIGHT * 0.6;
        let label = pass.microbatch;
        let _ = write!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>"
        );
    }
    out.push_str("</g>\n");
}

fn draw_legend(out: &mut String, timeline: &Timeline) {
    let mut x = MARGIN;
    let y = TOP + ROW_HEIGHT * (timeline.ranks.len() as f64 + 0.4);
    for (kind, name) in PassKind::NAMES {
        let mut spans = timeline.ranks.iter().flatten();
        if spans.any(|span| span.pass.kind == kind) {
            let fill = color(kind, 0);
            let text_x = x + 18.0;
            let text_y = y + 11.0;
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y:.1}\" width=\"14\" height=\"14\" fill=\"{fill}\"/>\
                 <text x=\"{text_x}\" y=\"{text_y:.1}\">{name}</text>"
            );
            x += 56.0;
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::communication::with_communication;
    use crate::pipeline::schedules::ScheduleKind;
    use crate::pipeline::simulate::{Costs, simulate};

    #[test]
    fn two_ranks_two_microbatches() {
        let order = ScheduleKind::OneFOneB.order(2, 2, None).unwrap();
        let timeline = simulate(
            &with_communication(order),
            &Costs::uniform(2, 1.0, 1.0, 1.0),
        );
        let expected = "rank 0 |F0. F1.         BW0....     BW1....\n\
                        rank 1 |    F0. BW0.... F1. BW1....\n";
        assert_eq!(text(&timeline), expected);
        let picture = svg(&timeline, "1f1b <2>");
        assert_eq!(picture.matches("<g>").count(), 8);
        assert!(picture.contains("1f1b &lt;2&gt;"));
        assert!(picture.ends_with("</svg>\n"));
    }
}
