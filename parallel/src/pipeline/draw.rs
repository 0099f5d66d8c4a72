//! A simulated step as a picture: text for a terminal, SVG for everything else.

use super::PassKind;
use super::simulate::{Span, Timeline};
use std::fmt::Write;

/// One line a rank; a pass is as wide as its time, and named.
pub fn text(timeline: &Timeline) -> String {
    let spans = || {
        timeline
            .ranks
            .iter()
            .flatten()
            .filter(|span| span.end > span.start)
    };
    let shortest = spans()
        .map(|span| span.end - span.start)
        .fold(f64::INFINITY, f64::min);
    let longest_name = spans()
        .map(|span| span.pass.to_string().len())
        .max()
        .unwrap_or(1);
    // The shortest pass has room for the longest name and a space.
    let column = |time: f64| (time / shortest * (longest_name + 1) as f64).round() as usize;
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
                let _ = write!(
                    line,
                    "{:gap$}{name:.<width$} ",
                    "",
                    gap = from - line.len().min(from),
                    width = to - from - 1
                );
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The colour of a pass.
fn colour(kind: PassKind, chunk: usize) -> &'static str {
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

/// A picture with a row for each rank and a legend.
pub fn svg(timeline: &Timeline, title: &str) -> String {
    let row = 24.0;
    let margin = 56.0;
    let width = 1400.0;
    let scale = width / timeline.total.max(f64::MIN_POSITIVE);
    let height = row * (timeline.ranks.len() as f64 + 3.5);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"4\" y=\"16\" font-size=\"13\">{}</text>\n",
        width + margin + 8.0,
        escape(title)
    );
    let top = row * 1.2;
    for (rank, spans) in timeline.ranks.iter().enumerate() {
        let y = top + row * rank as f64;
        let _ = writeln!(
            out,
            "<text x=\"4\" y=\"{:.1}\">rank {rank}</text>",
            y + row * 0.65
        );
        for Span { pass, start, end } in spans.iter().filter(|span| span.end > span.start) {
            let x = margin + start * scale;
            let w = (end - start) * scale;
            let fill = colour(pass.kind, pass.chunk);
            let _ = write!(
                out,
                "<g><title>{pass}: {start:.3} to {end:.3}</title><rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{w:.2}\" \
                 height=\"{:.1}\" fill=\"{fill}\" stroke=\"white\" stroke-width=\"0.5\"/>",
                row * 0.9
            );
            if w > 11.0 {
                let tx = x + w / 2.0;
                let ty = y + row * 0.6;
                let _ = write!(
                    out,
                    "<text x=\"{tx:.1}\" y=\"{ty:.1}\" text-anchor=\"middle\">{}</text>",
                    pass.microbatch
                );
            }
            out.push_str("</g>\n");
        }
    }
    let mut x = margin;
    let y = top + row * (timeline.ranks.len() as f64 + 0.4);
    for (kind, name) in PassKind::NAMES {
        if timeline
            .ranks
            .iter()
            .flatten()
            .any(|span| span.pass.kind == kind)
        {
            let fill = colour(kind, 0);
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y:.1}\" width=\"14\" height=\"14\" fill=\"{fill}\"/><text x=\"{}\" y=\"{:.1}\">{name}</text>",
                x + 18.0,
                y + 11.0
            );
            x += 56.0;
        }
    }
    out.push_str("</svg>\n");
    out
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
        assert!(picture.contains("1f1b &lt;2&gt;") && picture.ends_with("</svg>\n"));
    }
}
