//! Heat maps of experts and layers over time, as text and as SVG.

use std::fmt::Write;
use trainer::RoutingLine;

/// The load of experts in a part of the run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slice {
    first_step: u64,
    last_step: u64,
    /// Load of each expert over the mean, `[layers][E]`.
    heat: Vec<Vec<f64>>,
}

/// Sums lines in at most `count` slices, each of an equal number of lines.
pub(super) fn slices(lines: &[RoutingLine], count: usize) -> Vec<Slice> {
    let per_slice = lines.len().div_ceil(count.max(1)).max(1);
    lines.chunks(per_slice).map(slice).collect()
}

fn slice(lines: &[RoutingLine]) -> Slice {
    let layers = lines[0].tokens_per_expert.len();
    Slice {
        first_step: lines[0].step,
        last_step: lines[lines.len() - 1].step,
        heat: (0..layers).map(|layer| heat(lines, layer)).collect(),
    }
}

fn heat(lines: &[RoutingLine], layer: usize) -> Vec<f64> {
    let experts = lines[0].tokens_per_expert[layer].len();
    let sum = |expert: usize| {
        let tokens = lines
            .iter()
            .map(|line| line.tokens_per_expert[layer][expert] as f64);
        tokens.sum::<f64>()
    };
    let sums: Vec<f64> = (0..experts).map(sum).collect();
    let mean = sums.iter().sum::<f64>() / experts as f64;
    sums.iter()
        .map(|sum| if mean > 0.0 { sum / mean } else { 0.0 })
        .collect()
}

/// Shades, each with the load over the mean below which it is used.
const SHADES: [(f64, char); 5] = [
    (0.25, ' '),
    (0.75, '░'),
    (1.25, '▒'),
    (2.0, '▓'),
    (f64::INFINITY, '█'),
];

/// Draws rows of layers with a column for each expert.
///
/// If there are more than `width`, neighbours share a column, which shows the busiest of them.
pub(super) fn text(slices: &[Slice], width: usize) -> String {
    let mut out = String::new();
    for slice in slices {
        let _ = writeln!(out, "steps {} to {}", slice.first_step, slice.last_step);
        let digits = slice.heat.len().saturating_sub(1).to_string().len();
        for (layer, experts) in slice.heat.iter().enumerate() {
            let per_column = experts.len().div_ceil(width.max(1)).max(1);
            let row: String = experts.chunks(per_column).map(shade).collect();
            let (busiest, most) = busiest(experts);
            let _ = writeln!(
                out,
                "  layer {layer:digits$} |{row}|  expert {busiest} has {most:.2} times the mean"
            );
        }
    }
    out
}

fn shade(experts: &[f64]) -> char {
    let (_, heat) = busiest(experts);
    let shade = SHADES.iter().find(|(end, _)| heat < *end);
    shade.map_or('█', |(_, shade)| *shade)
}

/// Returns the most loaded expert and its load.
fn busiest(experts: &[f64]) -> (usize, f64) {
    let most = experts.iter().copied().fold(0.0, f64::max);
    let index = experts.iter().position(|&heat| heat == most);
    (index.unwrap_or(0), most)
}

const MARGIN: f64 = 64.0;
const TOP: f64 = 48.0;
const ROW: f64 = 18.0;

/// Draws slices side by side, with a row for each layer.
pub(super) fn svg(slices: &[Slice], title: &str) -> String {
    let layers = slices.first().map_or(0, |slice| slice.heat.len());
    let all_layers = slices.iter().flat_map(|slice| &slice.heat);
    let experts = all_layers.map(Vec::len).max().unwrap_or(0).max(1);
    let cell = (240.0 / experts as f64).clamp(2.0, 16.0);
    let panel = cell * experts as f64 + 16.0;
    let width = MARGIN + panel * slices.len() as f64;
    let bottom = TOP + ROW * layers as f64;
    let height = bottom + 36.0;
    let title = escape(title);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" \
         height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\" font-size=\"13\">{title}</text>\n"
    );
    for layer in 0..layers {
        let y = TOP + ROW * (layer as f64 + 0.7);
        let _ = writeln!(out, "<text x=\"8\" y=\"{y:.1}\">layer {layer}</text>");
    }
    for (index, slice) in slices.iter().enumerate() {
        draw_slice(&mut out, slice, MARGIN + panel * index as f64, cell);
    }
    draw_legend(&mut out, bottom + 20.0);
    out.push_str("</svg>\n");
    out
}

fn draw_slice(out: &mut String, slice: &Slice, left: f64, cell: f64) {
    let first = slice.first_step;
    let last = slice.last_step;
    let y = TOP - 8.0;
    let _ = writeln!(
        out,
        "<text x=\"{left:.1}\" y=\"{y:.1}\">steps {first} to {last}</text>"
    );
    let height = ROW - 2.0;
    for (layer, experts) in slice.heat.iter().enumerate() {
        for (expert, &heat) in experts.iter().enumerate() {
            let x = left + cell * expert as f64;
            let y = TOP + ROW * layer as f64;
            let colour = colour(heat);
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{cell:.1}\" height=\"{height:.1}\" \
                 fill=\"{colour}\"><title>layer {layer}, expert {expert}: {heat:.2} times the \
                 mean</title></rect>"
            );
        }
    }
}

fn draw_legend(out: &mut String, y: f64) {
    for (index, heat) in [0.0, 0.5, 1.0, 2.0, 4.0].into_iter().enumerate() {
        let x = MARGIN + 92.0 * index as f64;
        let top = y - 10.0;
        let colour = colour(heat);
        let text_x = x + 18.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"12\" height=\"12\" \
             fill=\"{colour}\"/><text x=\"{text_x:.1}\" y=\"{y:.1}\">{heat} x mean</text>"
        );
    }
}

/// Returns the colour of a load: white is unused, yellow the mean, dark red four times the mean.
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
        let line = |step, tokens_per_expert| RoutingLine {
            step,
            tokens_per_expert,
            layers: Vec::new(),
        };
        let lines = [
            line(1, vec![vec![4, 0]]),
            line(10, vec![vec![2, 2]]),
            line(20, vec![vec![0, 0]]),
        ];
        let made = slices(&lines, 2);
        assert_eq!(
            made[0],
            Slice {
                first_step: 1,
                last_step: 10,
                heat: vec![vec![1.5, 0.5]]
            }
        );
        assert_eq!(
            made[1],
            Slice {
                first_step: 20,
                last_step: 20,
                heat: vec![vec![0.0, 0.0]]
            }
        );
        assert!(slices(&[], 3).is_empty());
    }

    #[test]
    fn text_shades_and_names_the_busiest() {
        let slice = Slice {
            first_step: 1,
            last_step: 5,
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
            first_step: 1,
            last_step: 5,
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
