//! `moerun bench scale`: quantities that grow with the number of ranks, measured on ranks of this
//! machine and on simulated runs.

mod cluster;
mod metadata;
mod reference;

use super::figures::round;
use crate::{cli::ScaleArgs, open_files::RunSize};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::{process::ExitCode, time::Instant};

pub(crate) fn run(args: &ScaleArgs) -> Result<ExitCode> {
    cluster::start_up(args)?;
    metadata::messages(&args.ranks)?;
    metadata::restart(&args.ranks)?;
    plan(&args.ranks)?;
    open_files(&args.ranks)?;
    Ok(ExitCode::SUCCESS)
}

/// The origin of a value.
#[derive(Clone, Copy)]
enum Origin {
    /// Real ranks, or a real run of the function.
    Measured,
    /// Real components with made-up ranks.
    Simulated,
    /// The formula of the quantity, with the constants of the launcher.
    Computed,
}

impl Origin {
    fn name(self) -> &'static str {
        match self {
            Origin::Measured => "measured",
            Origin::Simulated => "simulated",
            Origin::Computed => "computed",
        }
    }
}

/// A value at one number of ranks.
#[derive(Clone, Copy)]
struct Point {
    ranks: usize,
    value: f64,
}

impl Point {
    /// Returns the exponent of the power law through both points, if there is one.
    fn exponent_from(self, before: Point) -> Option<f64> {
        let growth = (self.value / before.value).ln();
        let exponent = growth / (self.ranks as f64 / before.ranks as f64).ln();
        exponent.is_finite().then_some(exponent)
    }
}

/// One quantity at growing numbers of ranks.
struct Series {
    quantity: &'static str,
    /// The expected growth, in N ranks and K keepers.
    formula: &'static str,
    unit: &'static str,
    last: Option<Point>,
}

impl Series {
    fn new(quantity: &'static str, formula: &'static str, unit: &'static str) -> Series {
        Series {
            quantity,
            formula,
            unit,
            last: None,
        }
    }

    /// Prints a line, with the exponent of the growth since the last one.
    fn print(&mut self, ranks: usize, value: f64, origin: Origin) {
        let point = Point { ranks, value };
        let exponent = self.last.and_then(|last| point.exponent_from(last));
        let line = json!({
            "bench": "scale",
            "quantity": self.quantity,
            "formula": self.formula,
            "ranks": ranks,
            "value": round(value, 6),
            "unit": self.unit,
            "origin": origin.name(),
            "exponent": exponent.map(|exponent| round(exponent, 2)),
        });
        println!("{line}");
        self.last = Some(point);
    }
}

/// Measures `moerun plan mesh` without its start.
fn plan(sizes: &[usize]) -> Result<()> {
    let mut seconds = Series::new("time of plan mesh", "N + places x layers", "s");
    let mut lines = Series::new(
        "lines of plan mesh",
        "stages x ends of ZeRO groups",
        "lines",
    );
    for &ranks in sizes {
        let config = reference::config(ranks)?;
        let begun = Instant::now();
        let problems = config.problems(ranks);
        if let Some(problem) = problems.first() {
            return Err(anyhow!("the reference job on {ranks} ranks: {problem}"));
        }
        let equal = config.memory(ranks).map_err(|error| anyhow!(error))?;
        seconds.print(ranks, begun.elapsed().as_secs_f64(), Origin::Measured);
        lines.print(ranks, equal.len() as f64, Origin::Measured);
    }
    Ok(())
}

/// Prints the files that a run of the reference job is refused without.
fn open_files(sizes: &[usize]) -> Result<()> {
    let mut launcher = Series::new("open files of the launcher", "2 N + 4 K", "files");
    let mut rank = Series::new("open files of a rank, at most", "N + groups", "files");
    for &ranks in sizes {
        let config = reference::config(ranks)?;
        let size = RunSize::new(&config, ranks, reference::RANKS_PER_MACHINE);
        launcher.print(ranks, size.launcher().files as f64, Origin::Computed);
        rank.print(ranks, size.rank().files as f64, Origin::Computed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_is_that_of_the_power_law() {
        let point = |ranks: usize, value: f64| Point { ranks, value };
        let square = point(400, 16e4).exponent_from(point(100, 1e4));
        assert!((square.unwrap() - 2.0).abs() < 1e-9);
        assert_eq!(point(400, 5.0).exponent_from(point(100, 5.0)), Some(0.0));
        assert_eq!(point(100, 5.0).exponent_from(point(100, 4.0)), None);
        assert_eq!(point(400, 5.0).exponent_from(point(100, 0.0)), None);
    }
}
