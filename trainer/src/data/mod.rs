//! Training data: token files, the order of samples, and the preparation of token files from text.

mod documents;
mod prepare;
mod sampler;
mod tokens;

pub(crate) use prepare::load_tokenizer;
pub use prepare::{DatasetInfo, PrepareOptions, prepare};
pub use sampler::{Draw, Sampler};
pub use tokens::{TokenFile, TokenWriter};

use crate::{Error, config::SourceConfig};
use tch::Tensor;

/// Text of the end-of-document token in data that `moerun data prepare` made.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

/// Several token files, read as samples of `sequence_length + 1` tokens.
pub struct Dataset {
    files: Vec<TokenFile>,
    sampler: Sampler,
    sequence_length: usize,
    vocab_size: usize,
}

impl Dataset {
    /// Opens the files of all sources.
    ///
    /// # Errors
    /// If a file is missing, damaged, or shorter than one sample.
    pub fn open(
        sources: &[SourceConfig],
        sequence_length: usize,
        vocab_size: usize,
        seed: u64,
    ) -> Result<Dataset, Error> {
        let files = sources
            .iter()
            .map(|source| TokenFile::open(&source.path))
            .collect::<Result<Vec<_>, _>>()?;
        let mut windows = Vec::new();
        for file in &files {
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
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let sampler = Sampler::new(&windows, &weights, seed).map_err(Error::Config)?;
        Ok(Dataset {
            files,
            sampler,
            sequence_length,
            vocab_size,
        })
    }

    /// Returns the number of windows in all sources.
    pub fn num_windows(&self) -> u64 {
        self.sampler.num_windows()
    }

    /// Returns the number of tokens in all files.
    pub fn num_tokens(&self) -> u64 {
        self.files.iter().map(TokenFile::len).sum()
    }

    /// Returns inputs and labels of samples in the shuffled order, `[numbers, S]` int64 each.
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
            let file = &self.files[draw.source];
            let start = draw.window * length as u64;
            let tokens = file.read(start, length + 1)?;
            self.check_vocabulary(file, start, &tokens)?;
            inputs.extend_from_slice(&tokens[..length]);
            labels.extend_from_slice(&tokens[1..]);
        }
        let shape = [-1, length as i64];
        Ok((
            Tensor::from_slice(&inputs).view(shape),
            Tensor::from_slice(&labels).view(shape),
        ))
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
