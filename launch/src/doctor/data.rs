//! Checks of an experiment's data.

use super::finding::Finding;
use crate::config_file::{data_file_problems, verify_data};
use trainer::config::Config;

const LABEL: &str = "data";

/// Checks that the data exists, is whole, and fits the model.
pub(super) fn files(config: &Config) -> Finding {
    let problems = data_file_problems(config);
    if problems.is_empty() {
        let count = config.sources().len();
        let plural = if count == 1 { "" } else { "s" };
        return Finding::ok(LABEL, format!("{count} source{plural} can be read"));
    }
    let fix = "correct section data, or prepare the data again with 'moerun data prepare'";
    Finding::fail(LABEL, problems.join("; "), fix)
}

/// Reads all data and compares it with the recorded checksums.
pub(super) fn checksums(config: &Config) -> Finding {
    let checked = verify_data(config);
    if !checked.problems.is_empty() {
        let fix = "restore the files, or prepare the data again";
        return Finding::fail("checksums", checked.problems.join("; "), fix);
    }
    let verified = format!("{} files match their checksums", checked.verified);
    if checked.unrecorded.is_empty() {
        return Finding::ok("checksums", verified);
    }
    Finding::warn(
        "checksums",
        format!(
            "{verified}; no dataset.json records those of {}",
            checked.unrecorded.join(", ")
        ),
        "'moerun data prepare' records them",
    )
}
