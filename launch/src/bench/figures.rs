//! Statistics of measurements, and rounding for the printed line.

use serde_json::Value;

/// Returns the largest value over the ranks of a figure in a step's metrics, such as `peak_memory`:
/// they list it for each rank, or have its distribution.
pub(super) fn largest_of_ranks(step: &Value, figure: &str) -> f64 {
    let listed = step[format!("rank_{figure}")].as_array();
    let listed = listed.into_iter().flatten().filter_map(Value::as_f64);
    let distributed = step["rank_distributions"][figure]["largest"].as_f64();
    listed.chain(distributed).fold(0.0, f64::max)
}

/// Returns the upper median. Panics without values.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(super) fn round(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}

/// Returns bytes in MiB, with one decimal.
pub(super) fn mib(bytes: f64) -> f64 {
    round(bytes / f64::from(1 << 20), 1)
}
