//! Statistics of measurements, and rounding for the printed line.

use serde_json::Value;

/// Returns the largest value over the ranks of a figure in a step's metrics, such as `peak_memory`.
pub(super) fn largest_of_ranks(step: &Value, figure: &str) -> f64 {
    let largest = &step["rank_distributions"][figure]["largest"];
    largest.as_f64().unwrap_or(0.0)
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
