//! Heat maps of layer by expert, over time: text for a terminal, SVG for everything else.

use std::fmt::Write;

/// How busy experts were in some steps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slice {
    /// The first and the last step of it that there is a line of.
    pub(super) steps: (u64, u64),
    /// Each expert's load over the mean, `[layers][E]`.
    pub(super) heat: Vec<Vec<f64>>,
}

/// Lines of (step, tokens_per_expert `[layers][E]`), put together in at most `count` slices of as many lines.
pub(super) fn slices(lines: &[(u64, Vec<Vec<u64>>)], count: usize) -> Vec<Slice> {
    let per_slice = lines.len().div_ceil(count.max(1)).max(1);
    let slice = |lines: &[(u64, Vec<Vec<u64>>)]| {
        let layers = lines[0].1.len();
        let heat = |layer: usize| {
            let experts = lines[0].1[layer].len();
            let sum = |expert: usize| {
                lines
                    .iter()
                    .map(|(_, tokens_per_expert)| tokens_per_expert[layer][expert])
                    .sum::<u64>() as f64
            };
            let sums: Vec<f64> = (0..experts).map(sum).collect();
            let mean = sums.iter().sum::<f64>() / experts as f64;
            sums.iter()
                .map(|sum| if mean > 0.0 { sum / mean } else { 0.0 })
                .collect()
        };
        Slice {
            steps: (lines[0].0, lines[lines.len() - 1].0),
            heat: (0..layers).map(heat).collect(),
        }
    };
    lines.chunks(per_slice).map(slice).collect()
}

/// Shades, from the loads over the mean at which they end.
const SHADES: [(f64, char); 5] = [
    (0.25, ' '),
    (0.75, '░'),
    (1.25, '▒'),
    (2.0, '▓'),
    (f64::INFINITY, '█'),
];

/// A column for each expert; neighbours share one, the busiest of them, where there are more than `width`.
pub(super) fn text(slices: &[Slice], width: usize) -> String {
    let mut out = String::new();
    for Slice {
        steps: (first, last),
        heat,
    } in slices
    {
        let _ = writeln!(out, "steps {first} to {last}");
        let digits = heat.len().saturating_sub(1).to_string().len();
        for (layer, experts) in heat.iter().enumerate() {
            let together = experts.len().div_ceil(width.max(1)).max(1);
            let column = |experts: &[f64]| {
                let heat = experts.iter().copied().fold(0.0, f64::max);
                SHADES
                    .iter()
                    .find(|(end, _)| heat < *end)
                    .map_or('█', |(_, shade)| *shade)
            };
            let row: String = experts.chunks(together).map(column).collect();
            let (busiest, most) = busiest(experts);
            let _ = writeln!(
                out,
                "  layer {layer:digits$} |{row}|  expert {busiest} has {most:.2} times the mean"
            );
        }
    }
    out
}

fn busiest(experts: &[f64]) -> (usize, f64) {
    let most = experts.iter().copied().fold(0.0, f64::max);
    (
        experts.iter().position(|&heat| heat == most).unwrap_or(0),
        most,
    )
}

/// A row for each layer, slices side by side.
pub(super) fn svg(slices: &[Slice], title: &str) -> String {
    let layers = slices.first().map_or(0, |slice| slice.heat.len());
    let experts = slices
        .iter()
        .flat_map(|slice| &slice.heat)
        .map(Vec::len)
        .max()
        .unwrap_or(0)
        .max(1);
    let cell = (240.0 / experts as f64).clamp(2.0, 16.0);
    let row = 18.0;
    let margin = 64.0;
    let top = 48.0;
    let panel = cell * experts as f64 + 16.0;
    let width = margin + panel * slices.len() as f64;
    let height = top + row * layers as f64 + 36.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"18\" \
         font-size=\"13\">{}</text>\n",
        escape(title)
    );
    for layer in 0..layers {
        let y = top + row * (layer as f64 + 0.7);
        let _ = writeln!(out, "<text x=\"8\" y=\"{y:.1}\">layer {layer}</text>");
    }
    for (
        number,
        Slice {
            steps: (first, last),
            heat,
        },
    ) in slices.iter().enumerate()
    {
        let left = margin + panel * number as f64;
        let _ = writeln!(
            out,
            "<text x=\"{left:.1}\" y=\"{:.1}\">steps {first} to {last}</text>",
            top - 8.0
        );
        for (layer, experts) in heat.iter().enumerate() {
            for (expert, heat) in experts.iter().enumerate() {
                let x = left + cell * expert as f64;
                let y = top + row * layer as f64;
                let _ = writeln!(
                    out,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{cell:.1}\" height=\"{:.1}\" fill=\"{}\"><title>layer {layer}, \
                     expert {expert}: {heat:.2} times the mean</title></rect>",
                    row - 2.0,
                    colour(*heat)
                );
            }
        }
    }
    let y = top + row * layers as f64 + 20.0;
    for (place, heat) in [0.0, 0.5, 1.0, 2.0, 4.0].into_iter().enumerate() {
        let x = margin + 92.0 * place as f64;
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{heat} x \
             mean</text>",
            y - 10.0,
            colour(heat),
            x + 18.0
        );
    }
    out.push_str("</svg>\n");
    out
}

/// From white, unused, over yellow, the mean, to dark red, four times the mean and more.
fn colour(heat: f64) -> String {
    let stops = [
        (0.0, [250, 250, 250]),
        (1.0, [254, 217, 118]),
        (2.0, [240, 90, 40]),
        (4.0, [120, 0, 30]),
    ];
    let heat = heat.clamp(0.0, 4.0);
    let after = stops
        .iter()
        .position(|(at, _)| heat <= *at)
        .unwrap_or(stops.len() - 1)
        .max(1);
    let (from, a) = stops[after - 1];
    let (to, b) = stops[after];
    let share = (heat - from) / (to - from);
    let mix = |channel: usize| {
        (f64::from(a[channel]) + share * f64::from(b[channel] - a[channel])).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_slices_of_loads_over_the_mean() {
        let lines = vec![
            (1, vec![vec![4, 0]]),
            (10, vec![vec![2, 2]]),
            (20, vec![vec![0, 0]]),
        ];
        let made = slices(&lines, 2);
        assert_eq!(
            made[0],
            Slice {
                steps: (1, 10),
                heat: vec![vec![1.5, 0.5]]
            }
        );
        assert_eq!(
            made[1],
            Slice {
                steps: (20, 20),
                heat: vec![vec![0.0, 0.0]]
            }
        );
        assert!(slices(&[], 3).is_empty());
    }

    #[test]
    fn text_shades_and_names_the_busiest() {
        let slice = Slice {
            steps: (1, 5),
            heat: vec![vec![0.0, 0.5, 1.0, 1.5, 2.5]],
        };
        assert_eq!(
            text(std::slice::from_ref(&slice), 80),
            "steps 1 to 5\n  layer 0 | ░▒▓█|  expert 4 has 2.50 times the mean\n"
        );
        assert!(
            text(&[slice], 2).contains("|▒█|"),
            "three share a column, and two"
        );
    }

    #[test]
    fn a_picture_has_a_cell_for_each_expert() {
        let slice = Slice {
            steps: (1, 5),
            heat: vec![vec![0.0, 1.0], vec![4.0, 9.0]],
        };
        let picture = svg(&[slice.clone(), slice], "a < b");
        assert_eq!(picture.matches("<title>").count(), 8);
        assert!(picture.contains("a &lt; b") && picture.trim_end().ends_with("</svg>"));
        assert_eq!(colour(0.0), "#fafafa");
        assert_eq!(
            (colour(1.0).as_str(), colour(9.0).as_str()),
            ("#fed976", "#78001e")
        );
    }
}
