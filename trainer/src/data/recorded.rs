//! The part of a run's data that rank 0 reads for all ranks.

use super::{
    bits_per_byte::bytes_per_token, eod_token::DocumentTokens, fingerprints::DataFingerprints,
    records::Records,
};
use crate::{Error, config::Config};
use serde::{Deserialize, Serialize};

/// The tokens and sizes that are recorded of the data, and its fingerprints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RecordedData {
    pub(crate) tokens: DocumentTokens,
    pub(crate) fingerprints: DataFingerprints,
    /// Mean bytes of text per token of each source of validation data, where they are known.
    pub(crate) bytes_per_token: Vec<Option<f64>>,
    /// Lines for the user about what the records decide.
    pub(crate) lines: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

impl RecordedData {
    /// Reads the records, and parts of all files of the run.
    ///
    /// # Errors
    /// If a file cannot be read, or the records do not fit the run: every reason.
    pub(crate) fn read(config: &Config) -> Result<RecordedData, Error> {
        let records = Records::read(config);
        let check = records.check();
        if !check.problems.is_empty() {
            let problems = check.problems.join("\n  - ");
            return Err(Error::Config(format!(
                "the data does not fit the run:\n  - {problems}"
            )));
        }
        let mut lines = Vec::new();
        let needs_token = config.data.key_that_needs_eod_token().is_some();
        if needs_token && config.data.eod_token.is_none() {
            let end = records.recorded_end().map_err(Error::Config)?;
            lines.extend(end.map(|end| {
                format!(
                    "data.eod_token is {} ({:?}), as dataset.json records it",
                    end.id, end.text
                )
            }));
        }
        let validation = &records.sources()[config.data.train.len()..];
        let bytes = validation.iter().map(|source| {
            let masks_ends = config.data.eod_mask_loss;
            bytes_per_token(source.source, source.info.as_deref(), masks_ends)
        });
        Ok(RecordedData {
            tokens: DocumentTokens::of_data(config, &records)?,
            fingerprints: DataFingerprints::read(config, &records)?,
            bytes_per_token: bytes.collect(),
            lines,
            warnings: check.warnings,
        })
    }
}
