//! Validation data: sources with a loss each.

use super::{Dataset, bits_per_byte::bits_per_byte, count_labels};
use crate::{
    Error,
    config::{Config, ValidationConfig, source_names, source_weights},
};
use dataset::order::{OrderVersion, Sampler};

/// A source of validation data.
pub(crate) struct ValidationSource {
    pub(crate) name: String,
    pub(crate) data: Dataset,
    /// Number of windows to validate on, from the start of the source.
    pub(crate) windows: u64,
    /// The source's share of `validation.sequences`, which may be more than it has windows.
    pub(crate) share: u64,
    /// Mean bytes of text per token, if they are recorded.
    pub(crate) bytes_per_token: Option<f64>,
}

impl ValidationSource {
    /// Returns the bits per byte of text that a loss in nats per token stands for.
    pub(crate) fn bits_per_byte(&self, loss: f64) -> Option<f64> {
        Some(bits_per_byte(loss, self.bytes_per_token?))
    }

    /// Returns a warning if the source has fewer windows than its share.
    pub(crate) fn lacking_windows(&self) -> Option<String> {
        (self.windows < self.share).then(|| {
            format!(
                "validation of {} reads all its {} windows, fewer than its share of {} of \
                 validation.sequences",
                self.name, self.windows, self.share
            )
        })
    }

    /// Refuses a source of whose sequences no token counts.
    ///
    /// # Errors
    /// If none does, or a file cannot be read.
    pub(crate) fn check_labels(&self) -> Result<(), Error> {
        if !self.data.has_masks() {
            return Ok(());
        }
        let windows = self.windows;
        for window in 0..windows {
            let (_, labels) = self.data.windows(window..window + 1)?;
            if count_labels(&labels) > 0 {
                return Ok(());
            }
        }
        Err(Error::Data(format!(
            "no token of the {windows} validation sequences counts: the masks of data.validation \
             leave none in {}",
            self.name
        )))
    }
}

/// Opens the validation data of a run. The bytes per token are not known yet.
///
/// # Errors
/// If a file is missing, damaged, or shorter than one sample, or the sources cannot be mixed by
/// their weights.
pub(crate) fn open_validation(
    config: &Config,
    section: &ValidationConfig,
) -> Result<Vec<ValidationSource>, Error> {
    let sources = &config.data.validation;
    let shares = share_sequences(section.sequences, sources.len(), source_weights(sources))?;
    let length = config.data.sequence_length;
    let mut opened = Vec::new();
    for ((source, name), share) in sources.iter().zip(source_names(sources)).zip(shares) {
        let data = Dataset::open(
            std::slice::from_ref(source),
            length,
            config.model.vocab_size,
            config.run.seed,
        )?;
        opened.push(ValidationSource {
            name,
            windows: share.min(data.num_windows()),
            share,
            data,
            bytes_per_token: None,
        });
    }
    Ok(opened)
}

/// Divides sequences among sources in proportion to their weights, or equally without. Each gets
/// at least one.
fn share_sequences(
    sequences: usize,
    sources: usize,
    weights: Option<Vec<f64>>,
) -> Result<Vec<u64>, Error> {
    let equal = vec![1; sources];
    let blend = Sampler::new(&equal, weights.as_deref(), 0, OrderVersion::default());
    let blend = blend.map_err(|error| Error::Config(format!("data.validation: {error}")))?;
    let counts = blend.counts(sequences as u64).into_iter();
    Ok(counts.map(|count| count.max(1)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::SourceConfig, optim::schedule::tests::config};
    use dataset::tokens::TokenWriter;

    #[test]
    fn sequences_are_divided_by_weight() {
        let share =
            |sequences, sources, weights| share_sequences(sequences, sources, weights).unwrap();
        assert_eq!(share(20, 2, None), [10, 10]);
        assert_eq!(share(20, 2, Some(vec![3.0, 1.0])), [15, 5]);
        assert_eq!(share(7, 1, None), [7]);
        assert_eq!(share(1, 3, None), [1, 1, 1]);
        assert_eq!(share(100, 2, Some(vec![1.0, 1e-6])), [100, 1]);
        let refused = share_sequences(4, 2, Some(vec![1.0, -1.0])).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("data.validation: the weight -1")
        );
    }

    #[test]
    fn a_source_without_enough_windows_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let source = |name: &str, tokens: usize| {
            let prefix = folder.path().join(name);
            let mut writer = TokenWriter::create(&prefix, 8).unwrap();
            writer.push(&vec![1; tokens]).unwrap();
            writer.finish().unwrap();
            SourceConfig::new(prefix)
        };
        let mut config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        config.data.validation = vec![source("short", 8 * 3 + 1), source("long", 8 * 20 + 1)];
        let section = ValidationConfig {
            every: 1,
            sequences: 10,
            at_start: false,
        };
        let opened = open_validation(&config, &section).unwrap();
        let windows: Vec<u64> = opened.iter().map(|source| source.windows).collect();
        assert_eq!(windows, [3, 5]);
        let warnings: Vec<_> = opened
            .iter()
            .map(|source| source.lacking_windows())
            .collect();
        let expected = "validation of short reads all its 3 windows, fewer than its share of 5 of \
                        validation.sequences";
        assert_eq!(warnings, [Some(expected.to_string()), None]);
    }
}
