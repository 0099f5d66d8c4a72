//! Checks of an experiment's data.

use super::finding::Finding;
use crate::config_file::{DataCheck, check_data, verify_data};
use trainer::config::Config;

const LABEL: &str = "data";

/// Checks that the data exists, is whole, and fits the model.
pub(super) fn files(config: &Config) -> Finding {
    let DataCheck { problems, warnings } = check_data(config);
    if !problems.is_empty() {
        let fix = "correct section data, or prepare the data again with 'moerun data prepare'";
        return Finding::fail(LABEL, problems.join("; "), fix);
    }
    if !warnings.is_empty() {
        let fix = "correct section data if this is not meant";
        return Finding::warn(LABEL, warnings.join("; "), fix);
    }
    let count = config.sources().len();
    let plural = if count == 1 { "" } else { "s" };
    Finding::ok(LABEL, format!("{count} source{plural} can be read"))
}

/// Reads all data and compares it with the recorded checksums.
pub(super) fn checksums(config: &Config) -> Finding {
    let checked = verify_data(config);
    if !checked.problems.is_empty() {
        let fix = "restore the files, or prepare the data again";
        return Finding::fail("checksums", checked.problems.join("; "), fix);
    }
    let verified = match checked.verified {
        1 => "1 token file is the recorded one".to_string(),
        count => format!("{count} token files are the recorded ones"),
    };
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
