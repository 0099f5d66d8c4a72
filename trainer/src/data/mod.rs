//! Samples of training data as tensors.

pub(crate) mod bits_per_byte;
pub(crate) mod eod_token;
pub(crate) mod fingerprints;
pub(crate) mod recorded;
pub(crate) mod records;
pub(crate) mod report;
pub(crate) mod validation;

use crate::{
    Error,
    config::{SourceConfig, source_weights},
    model::IGNORED,
};
use dataset::{
    order::{Draw, OrderVersion, Sampler},
    tokens::TokenFile,
};
use tch::{Kind, Tensor};

/// The tokens of a source, and which of them count as labels.
struct Source {
    tokens: TokenFile,
    /// One value per token: 0 if it does not count.
    mask: Option<TokenFile>,
}

impl Source {
    fn open(config: &SourceConfig) -> Result<Source, Error> {
        let tokens = TokenFile::open_path(&config.tokens())?;
        let mask = config.mask.as_deref().map(TokenFile::open).transpose()?;
        if let Some(mask) = &mask {
            check_mask(mask, &tokens)?;
        }
        Ok(Source { tokens, mask })
    }
}

/// Refuses a mask that has another length than its source.
///
/// # Errors
/// If it has.
pub fn check_mask(mask: &TokenFile, tokens: &TokenFile) -> Result<(), Error> {
    if mask.len() == tokens.len() {
        return Ok(());
    }
    Err(Error::Data(format!(
        "the mask {} has {} values, but {} has {} tokens: a mask has one value per token of its \
         source",
        mask.path().display(),
        mask.len(),
        tokens.path().display(),
        tokens.len()
    )))
}

/// Several token files, read as samples of `sequence_length + 1` tokens.
pub struct Dataset {
    sources: Vec<Source>,
    /// The token after which a label is ignored.
    masked_after: Option<i64>,
    sampler: Sampler,
    weights: Option<Vec<f64>>,
    seed: u64,
    sequence_length: usize,
    vocab_size: usize,
}

impl Dataset {
    /// Opens the files of all sources.
    ///
    /// # Errors
    /// If a file is missing, damaged, or shorter than one sample, or a mask has another length than
    /// its source.
    pub fn open(
        sources: &[SourceConfig],
        sequence_length: usize,
        vocab_size: usize,
        seed: u64,
    ) -> Result<Dataset, Error> {
        let weights = source_weights(sources);
        let sources = sources
            .iter()
            .map(Source::open)
            .collect::<Result<Vec<_>, _>>()?;
        let mut windows = Vec::new();
        for Source { tokens: file, .. } in &sources {
            let count = file.len().saturating_sub(1) / sequence_length as u64;
            if count == 0 {
                return Err(Error::Data(format!(
                    "{} has {} tokens, fewer than one sample of data.sequence_length \
                     {sequence_length} + 1",
                    file.path().display(),
                    file.len()
                )));
            }
            windows.push(count);
        }
        let order = OrderVersion::default();
        let sampler = Sampler::new(&windows, weights.as_deref(), seed, order);
        Ok(Dataset {
            sources,
            masked_after: None,
            sampler: sampler.map_err(Error::Config)?,
            weights,
            seed,
            sequence_length,
            vocab_size,
        })
    }

    /// Returns the same data, whose labels after the token `end` are ignored.
    pub fn masked_after(mut self, end: Option<u32>) -> Dataset {
        self.mask_after(end);
        self
    }

    /// Ignores labels after the token `end` from now on.
    pub(crate) fn mask_after(&mut self, end: Option<u32>) {
        self.masked_after = end.map(i64::from);
    }

    /// Draws samples in the order of this version from now on.
    ///
    /// # Errors
    /// If the order cannot mix sources with these weights.
    pub(crate) fn use_order(&mut self, order: OrderVersion) -> Result<(), Error> {
        let windows = self.sampler.windows().to_vec();
        let sampler = Sampler::new(&windows, self.weights.as_deref(), self.seed, order);
        self.sampler = sampler.map_err(Error::Config)?;
        Ok(())
    }

    /// Returns the order of the samples.
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// True if some labels may be ignored.
    pub(crate) fn has_masks(&self) -> bool {
        let has_mask = |source: &Source| source.mask.is_some();
        self.masked_after.is_some() || self.sources.iter().any(has_mask)
    }

    /// Returns the number of windows in all sources.
    pub fn num_windows(&self) -> u64 {
        self.sampler.num_windows()
    }

    /// Returns the number of tokens in all files.
    pub fn num_tokens(&self) -> u64 {
        self.sources.iter().map(|source| source.tokens.len()).sum()
    }

    /// Returns inputs and labels of samples in the shuffled order, `[numbers, S]` int64 each. A
    /// label that does not count is -100.
    ///
    /// # Errors
    /// If a file cannot be read, or has a token outside of the vocabulary.
    pub fn batch(&self, numbers: impl Iterator<Item = u64>) -> Result<(Tensor, Tensor), Error> {
        self.read(numbers.map(|number| self.sampler.draw(number)))
    }

    /// Returns inputs and labels of windows in file order, for validation.
    ///
    /// # Errors
    /// The errors of [`Dataset::batch`].
    pub fn windows(&self, numbers: impl Iterator<Item = u64>) -> Result<(Tensor, Tensor), Error> {
        self.read(numbers.map(|number| self.sampler.nth_window(number)))
    }

    fn read(&self, draws: impl Iterator<Item = Draw>) -> Result<(Tensor, Tensor), Error> {
        let length = self.sequence_length;
        let mut inputs = Vec::new();
        let mut labels = Vec::new();
        for draw in draws {
            let source = &self.sources[draw.source];
            let start = draw.window * length as u64;
            let tokens = source.tokens.read(start, length + 1)?;
            self.check_vocabulary(&source.tokens, start, &tokens)?;
            inputs.extend_from_slice(&tokens[..length]);
            labels.extend(self.labels(source, start, &tokens)?);
        }
        let shape = [-1, length as i64];
        Ok((
            Tensor::from_slice(&inputs).view(shape),
            Tensor::from_slice(&labels).view(shape),
        ))
    }

    /// Returns the label of each of `tokens` but the last, of which the first is token `start` of
    /// the source.
    fn labels(&self, source: &Source, start: u64, tokens: &[i64]) -> Result<Vec<i64>, Error> {
        let mut labels = tokens[1..].to_vec();
        if let Some(end) = self.masked_after {
            for (label, input) in labels.iter_mut().zip(tokens) {
                if *input == end {
                    *label = IGNORED;
                }
            }
        }
        if let Some(mask) = &source.mask {
            let counts = mask.read(start + 1, labels.len())?;
            for (label, counts) in labels.iter_mut().zip(counts) {
                if counts == 0 {
                    *label = IGNORED;
                }
            }
        }
        Ok(labels)
    }

    /// Refuses token ids that the model does not have.
    fn check_vocabulary(&self, file: &TokenFile, start: u64, tokens: &[i64]) -> Result<(), Error> {
        let vocabulary = 0..self.vocab_size as i64;
        let is_unknown = |token: &i64| !vocabulary.contains(token);
        let Some(index) = tokens.iter().position(is_unknown) else {
            return Ok(());
        };
        Err(Error::Data(format!(
            "{}: token {} at position {} is outside of model.vocab_size {}; the data was made \
             with another tokenizer, or is damaged",
            file.path().display(),
            tokens[index],
            start + index as u64,
            self.vocab_size
        )))
    }
}

/// Returns how many of `labels` count in the loss.
pub(crate) fn count_labels(labels: &Tensor) -> u64 {
    let counted = labels.not_equal(IGNORED).sum(Kind::Int64);
    counted.int64_value(&[]) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataset::tokens::TokenWriter;
    use std::path::{Path, PathBuf};

    fn write(folder: &Path, name: &str, tokens: &[u32]) -> PathBuf {
        let prefix = folder.join(name);
        let mut writer = TokenWriter::create(&prefix, 100).unwrap();
        writer.push(tokens).unwrap();
        writer.finish().unwrap();
        prefix
    }

    fn source(path: PathBuf, mask: Option<PathBuf>) -> SourceConfig {
        SourceConfig {
            mask,
            ..SourceConfig::new(path)
        }
    }

    fn labels(data: &Dataset) -> Vec<i64> {
        let (_, labels) = data.windows(0..data.num_windows()).unwrap();
        Vec::try_from(labels.flatten(0, -1)).unwrap()
    }

    #[test]
    fn a_label_is_ignored_after_the_end_of_a_document_and_where_its_mask_is_0() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = write(folder.path(), "tokens", &[5, 0, 6, 7, 0, 8, 9]);
        let mask = write(folder.path(), "mask", &[0, 1, 1, 0, 3, 1, 0]);
        let plain = [source(tokens.clone(), None)];
        let masked = [source(tokens, Some(mask))];
        let open = |sources: &[SourceConfig]| Dataset::open(sources, 3, 100, 1).unwrap();
        let data = open(&plain);
        assert_eq!(labels(&data), [0, 6, 7, 0, 8, 9]);
        assert!(!data.has_masks());
        let data = open(&plain).masked_after(Some(0));
        assert_eq!(labels(&data), [0, IGNORED, 7, 0, IGNORED, 9]);
        assert!(data.has_masks());
        let data = open(&masked);
        assert_eq!(labels(&data), [0, 6, IGNORED, 0, 8, IGNORED]);
        let data = open(&masked).masked_after(Some(0));
        let both = [0, IGNORED, IGNORED, 0, IGNORED, IGNORED];
        assert_eq!(labels(&data), both);
        assert_eq!(count_labels(&Tensor::from_slice(&both)), 2);
    }

    #[test]
    fn a_mask_of_another_length_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = write(folder.path(), "tokens", &[1; 9]);
        let mask = write(folder.path(), "mask", &[1; 8]);
        let opened = Dataset::open(&[source(tokens, Some(mask))], 3, 100, 1);
        let message = opened.err().unwrap().to_string();
        for part in ["mask.bin has 8 values", "tokens.bin has 9 tokens"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
