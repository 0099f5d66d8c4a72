//! Validation data: sources with a loss each.

use super::{Dataset, count_labels};
use crate::{
    Error,
    config::{Config, ValidationConfig, source_names, source_weights},
};
use dataset::{
    info::DatasetInfo,
    order::{OrderVersion, Sampler},
};

/// A source of validation data.
pub(crate) struct ValidationSource {
    pub(crate) name: String,
    pub(crate) data: Dataset,
    /// Number of windows to validate on, from the start of the source.
    pub(crate) windows: u64,
    /// Mean bytes of text per token, if they are recorded.
    pub(crate) bytes_per_token: Option<f64>,
}

impl ValidationSource {
    /// Returns the bits per byte of text that a loss in nats per token stands for.
    pub(crate) fn bits_per_byte(&self, loss: f64) -> Option<f64> {
        let bytes = self.bytes_per_token?;
        Some(loss / std::f64::consts::LN_2 / bytes)
    }

    /// Refuses a source of whose sequences no token counts.
    fn check_labels(&self) -> Result<(), Error> {
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
            "no token of the {windows} validation sequences of {} counts: the masks of \
             data.validation leave none",
            self.name
        )))
    }
}

/// Opens the validation data of a run. Labels after the token `masked_after` are ignored.
///
/// # Errors
/// If a file is missing, damaged, or shorter than one sample, or no token of a source counts.
pub(crate) fn open_validation(
    config: &Config,
    section: &ValidationConfig,
    masked_after: Option<u32>,
) -> Result<Vec<ValidationSource>, Error> {
    let sources = &config.data.validation;
    let shares = share_sequences(section.sequences, sources.len(), source_weights(sources));
    let length = config.data.sequence_length;
    let mut opened = Vec::new();
    for ((source, name), share) in sources.iter().zip(source_names(sources)).zip(shares) {
        let data = Dataset::open(
            std::slice::from_ref(source),
            length,
            config.model.vocab_size,
            config.run.seed,
        )?;
        let data = data.masked_after(masked_after);
        let info = DatasetInfo::of_tokens(&source.path)?;
        // Tokens that a mask leaves out have other lengths.
        let info = info.filter(|_| source.mask.is_none());
        let source = ValidationSource {
            name,
            windows: share.min(data.num_windows()),
            data,
            bytes_per_token: info.and_then(|info| info.bytes_per_token(&source.path)),
        };
        source.check_labels()?;
        opened.push(source);
    }
    Ok(opened)
}

/// Divides sequences among sources in proportion to their weights, or equally without. Each gets
/// at least one.
fn share_sequences(sequences: usize, sources: usize, weights: Option<Vec<f64>>) -> Vec<u64> {
    let equal = vec![1; sources];
    let blend = Sampler::new(&equal, weights.as_deref(), 0, OrderVersion::default());
    let Ok(blend) = blend else {
        return equal;
    };
    let counts = blend.counts(sequences as u64).into_iter();
    counts.map(|count| count.max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_divided_by_weight() {
        let share = share_sequences;
        assert_eq!(share(20, 2, None), [10, 10]);
        assert_eq!(share(20, 2, Some(vec![3.0, 1.0])), [15, 5]);
        assert_eq!(share(7, 1, None), [7]);
        assert_eq!(share(1, 3, None), [1, 1, 1]);
        assert_eq!(share(100, 2, Some(vec![1.0, 1e-6])), [100, 1]);
    }
}
