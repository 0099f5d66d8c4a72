//! Lines about the sources of training data: their windows, shares and epochs.

use super::Dataset;
use crate::config::{Config, source_names};
use dataset::order::Sampler;

/// Sources that are listed.
const LISTED: usize = 32;

/// Lines for the user about the training data of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DataReport {
    /// One line per source.
    pub lines: Vec<String>,
    /// Sources that are repeated more often than `data.max_epochs` or lack sequences, and records
    /// that differ from the configuration.
    pub warnings: Vec<String>,
}

impl DataReport {
    /// Describes the sources over a run that draws `samples` samples.
    pub(crate) fn new(config: &Config, data: &Dataset, samples: u64) -> DataReport {
        let names = source_names(&config.data.train);
        describe(&names, data.sampler(), samples, config.data.max_epochs)
    }
}

fn describe(names: &[String], sampler: &Sampler, samples: u64, max_epochs: f64) -> DataReport {
    let epochs = sampler.epochs(samples);
    let shares = sampler.shares();
    let mut report = DataReport::default();
    for (index, name) in names.iter().enumerate() {
        let times = epochs[index];
        report.lines.push(format!(
            "data {name}: {} windows, {:.4}% of the samples, {times:.2} epochs in this run",
            sampler.windows()[index],
            shares[index] * 100.0,
        ));
        if times > max_epochs {
            report.warnings.push(format!(
                "the run repeats the source {name} {times:.1} times, more than data.max_epochs \
                 {max_epochs}"
            ));
        }
    }
    for lines in [&mut report.lines, &mut report.warnings] {
        let more = lines.len().saturating_sub(LISTED);
        if more > 0 {
            lines.truncate(LISTED);
            lines.push(format!("and {more} more sources"));
        }
    }
    report
}

/// Returns the epochs of each source after `samples` samples, in one line.
pub(crate) fn epochs_line(config: &Config, data: &Dataset, samples: u64) -> String {
    let epochs = data.sampler().epochs(samples);
    let names = source_names(&config.data.train);
    let each = names.iter().zip(epochs).take(LISTED);
    let each: Vec<String> = each
        .map(|(name, epochs)| format!("{name} {epochs:.3}"))
        .collect();
    format!("epochs so far: {}", each.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataset::order::OrderVersion;

    #[test]
    fn each_source_has_a_line_and_repeated_ones_a_warning() {
        let sampler = Sampler::new(&[100, 10], Some(&[0.5, 0.5]), 1, OrderVersion::Exact).unwrap();
        let names = ["wiki".to_string(), "code".to_string()];
        let report = describe(&names, &sampler, 100, 4.0);
        assert_eq!(
            report.lines,
            [
                "data wiki: 100 windows, 50.0000% of the samples, 0.50 epochs in this run",
                "data code: 10 windows, 50.0000% of the samples, 5.00 epochs in this run",
            ]
        );
        assert_eq!(report.warnings.len(), 1);
        assert!(report.warnings[0].contains("the source code 5.0 times"));
        assert!(describe(&names, &sampler, 100, 5.0).warnings.is_empty());
    }

    #[test]
    fn many_sources_are_summarized() {
        let names: Vec<String> = (0..100).map(|index| format!("source{index}")).collect();
        let sampler = Sampler::new(&[1; 100], None, 1, OrderVersion::Exact).unwrap();
        let report = describe(&names, &sampler, 10_000, 4.0);
        assert_eq!((report.lines.len(), report.warnings.len()), (33, 33));
        assert_eq!(report.lines[32], "and 68 more sources");
        assert_eq!(report.warnings[32], "and 68 more sources");
    }
}
