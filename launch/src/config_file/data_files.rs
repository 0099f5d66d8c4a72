//! Data files that a run reads.

use crate::hint::one_line;
use dataset::tokens::TokenFile;
use trainer::config::Config;

/// Returns a message for each source of data that is missing or damaged.
pub(super) fn data_file_problems(config: &Config) -> Vec<String> {
    let data = &config.data;
    // Without the section `validation` nothing reads them.
    let validation = data
        .validation
        .iter()
        .filter(|_| config.validation.is_some());
    let train = data.train.iter().enumerate();
    let train = train.map(|(index, source)| (format!("data.train[{index}].path"), source));
    let validation = validation.enumerate();
    let validation =
        validation.map(|(index, source)| (format!("data.validation[{index}].path"), source));
    let mut problems = Vec::new();
    for (key, source) in train.chain(validation) {
        // One process of the run reads the whole index, so that ranks need not.
        if let Err(error) = TokenFile::open_verified(&source.path) {
            problems.push(one_line(&format!("{key}: {error}")));
        }
    }
    problems
}
