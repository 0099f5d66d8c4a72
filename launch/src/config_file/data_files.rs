//! Data files that a run reads.

use crate::hint::one_line;
use dataset::{
    Checksums,
    tokens::{TokenFile, TokenPath},
    verify_checksums,
};
use trainer::{
    Records,
    config::{Config, SourceConfig},
    data::check_mask,
};

/// The outcome of a check of a run's data, one line each.
#[derive(Debug, Default)]
pub(crate) struct DataCheck {
    /// Sources that are missing or damaged, or do not fit the model or the other sources.
    pub(crate) problems: Vec<String>,
    /// Differences that are probably not meant.
    pub(crate) warnings: Vec<String>,
}

/// Checks the files of all sources, and their records as a run does when it starts.
pub(crate) fn check_data(config: &Config) -> DataCheck {
    let records = Records::read(config).check();
    let files = config.sources().into_iter().filter_map(|(key, source)| {
        let problem = check_tokens(config, source).err()?;
        Some(format!("{key}.path: {problem}"))
    });
    let lines = |texts: Vec<String>| texts.iter().map(|text| one_line(text)).collect();
    DataCheck {
        problems: lines(files.chain(records.problems).collect()),
        warnings: lines(records.warnings),
    }
}

/// Opens token files and their mask. One process of the run reads the whole index, so that ranks
/// need not.
fn check_tokens(config: &Config, source: &SourceConfig) -> Result<(), String> {
    let open = |path: TokenPath| {
        let file = TokenFile::open_path_verified(&path);
        file.map_err(|error| error.to_string())
    };
    let tokens = open(source.tokens())?;
    let needed = config.data.sequence_length as u64 + 1;
    if tokens.len() < needed {
        return Err(format!(
            "{} has {} tokens, fewer than one sample of data.sequence_length {} + 1",
            tokens.path().display(),
            tokens.len(),
            config.data.sequence_length
        ));
    }
    let Some(mask) = &source.mask else {
        return Ok(());
    };
    let mask = open(TokenPath::megatron(mask))?;
    check_mask(&mask, &tokens).map_err(|error| error.to_string())
}

/// The comparison of a run's data with recorded checksums.
#[derive(Default)]
pub(crate) struct CheckedData {
    /// Token files, each with its index, that are the recorded ones.
    pub(crate) verified: usize,
    /// Keys of token files without recorded checksums.
    pub(crate) unrecorded: Vec<String>,
    pub(crate) problems: Vec<String>,
}

/// Reads all data of a run, and compares it with its recorded checksums.
pub(crate) fn verify_data(config: &Config) -> CheckedData {
    let mut checked = CheckedData::default();
    for (key, source) in config.sources() {
        let mask = source.mask.as_deref().map(TokenPath::megatron);
        let files = [(key.clone(), Some(source.tokens())), (key + ".mask", mask)];
        for (key, path) in files {
            let Some(path) = path else { continue };
            match verify_checksums(&path) {
                Ok(Checksums::Match) => checked.verified += 1,
                Ok(Checksums::Missing) => checked.unrecorded.push(key),
                Err(error) => checked.problems.push(one_line(&format!("{key}: {error}"))),
            }
        }
    }
    checked
}
