//! Data files that a run reads.

use crate::hint::one_line;
use dataset::{
    Checksums,
    info::DatasetInfo,
    tokens::{TokenFile, TokenPath},
    verify_checksums,
};
use std::path::Path;
use trainer::{
    config::{Config, SourceConfig},
    recorded_eod_token,
};

/// Returns a message for each source of data that is missing or damaged, or does not fit the model
/// or the other sources.
pub(crate) fn data_file_problems(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    let mut tokenizers = Tokenizers::default();
    let mut sources_are_read = true;
    for (key, source) in config.sources() {
        if let Err(problem) = check_tokens(config, source) {
            problems.push(format!("{key}.path: {problem}"));
        }
        match DatasetInfo::of_tokens(&source.path) {
            Ok(Some(info)) => {
                problems.extend(vocabulary_problem(config, &key, &info));
                problems.extend(tokenizers.problem(&key, &info));
            }
            Ok(None) => {}
            Err(error) => {
                sources_are_read = false;
                problems.push(format!("{key}.path: {error}"));
            }
        }
    }
    if sources_are_read && let Err(error) = recorded_eod_token(config) {
        problems.push(error.to_string());
    }
    problems.iter().map(|problem| one_line(problem)).collect()
}

/// Opens token files and their mask. One process of the run reads the whole index, so that ranks
/// need not.
fn check_tokens(config: &Config, source: &SourceConfig) -> Result<(), String> {
    let tokens = TokenFile::open_path_verified(&source.tokens());
    let tokens = tokens.map_err(|error| error.to_string())?;
    let needed = config.data.sequence_length as u64 + 1;
    if tokens.len() < needed {
        return Err(format!(
            "{} has {} tokens, fewer than one sample of data.sequence_length {} + 1",
            tokens.path().display(),
            tokens.len(),
            config.data.sequence_length
        ));
    }
    Ok(())
}

fn vocabulary_problem(config: &Config, key: &str, info: &DatasetInfo) -> Option<String> {
    let vocab_size = config.model.vocab_size;
    (info.vocab_size > vocab_size).then(|| {
        format!(
            "model.vocab_size {vocab_size} is less than the {} of the data of {key}, which its \
             dataset.json records",
            info.vocab_size
        )
    })
}

/// The tokenizer of the first source that records one.
#[derive(Default)]
struct Tokenizers {
    first: Option<RecordedTokenizer>,
}

struct RecordedTokenizer {
    key: String,
    hash: String,
}

impl Tokenizers {
    /// Returns a message if the source has another tokenizer than an earlier one.
    fn problem(&mut self, key: &str, info: &DatasetInfo) -> Option<String> {
        let hash = info.tokenizer_hash.as_ref()?;
        let Some(first) = &self.first else {
            self.first = Some(RecordedTokenizer {
                key: key.to_string(),
                hash: hash.clone(),
            });
            return None;
        };
        (first.hash != *hash).then(|| {
            format!(
                "{key} was made with another tokenizer than {}, as their dataset.json record: \
                 prepare all sources with the same tokenizer",
                first.key
            )
        })
    }
}

/// The comparison of a run's data with recorded checksums.
#[derive(Default)]
pub(crate) struct CheckedData {
    /// Sources whose files are those that were recorded.
    pub(crate) verified: usize,
    /// Keys of sources without recorded checksums.
    pub(crate) unrecorded: Vec<String>,
    pub(crate) problems: Vec<String>,
}

/// Reads all data of a run, and compares it with its recorded checksums.
pub(crate) fn verify_data(config: &Config) -> CheckedData {
    let mut checked = CheckedData::default();
    for (key, source) in config.sources() {
        let mask: Option<&Path> = source.mask.as_deref();
        let paths = [Some(source.tokens()), mask.map(TokenPath::megatron)];
        for path in paths.iter().flatten() {
            match verify_checksums(path) {
                Ok(Checksums::Match) => checked.verified += 1,
                Ok(Checksums::Missing) => checked.unrecorded.push(key.clone()),
                Err(error) => checked.problems.push(one_line(&format!("{key}: {error}"))),
            }
        }
    }
    checked
}
