//! Speed of the encoder in use, compared with the library's fastest batch call.

use super::DocumentTokenizer;
use crate::Error;
use rayon::prelude::*;
use std::time::Instant;

/// Seconds of both encoders for the same documents, one number per round.
#[derive(Debug, Clone, Default)]
pub struct Speed {
    /// Bytes of all documents together.
    pub bytes: u64,
    /// Tokens of all documents together.
    pub tokens: u64,
    /// Seconds of the encoder in use, on the threads of the current rayon pool.
    pub ours: Vec<f64>,
    /// Seconds of `encode_batch_fast` on the same threads.
    pub library: Vec<f64>,
}

impl Speed {
    /// Returns the median speeds in MB/s: ours, and the library's.
    pub fn megabytes_per_second(&self) -> [f64; 2] {
        [&self.ours, &self.library].map(|seconds| {
            let mut sorted = seconds.clone();
            sorted.sort_by(f64::total_cmp);
            let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
            self.bytes as f64 / 1e6 / median
        })
    }
}

/// Measures both encoders in alternation, after a first round that compares all ids.
///
/// # Errors
/// If a document cannot be encoded, or the ids differ.
pub fn measure(
    tokenizer: &DocumentTokenizer,
    documents: &[&str],
    rounds: usize,
) -> Result<Speed, Error> {
    let ours = || {
        let encode = |text: &&str| {
            let mut ids = Vec::new();
            tokenizer.encode(text, &mut ids).map(|()| ids)
        };
        documents
            .par_iter()
            .map(encode)
            .collect::<Result<Vec<_>, Error>>()
    };
    let library = || {
        let encodings = tokenizer
            .library()
            .encode_batch_fast(documents.to_vec(), false);
        encodings.map_err(|error| Error::Tokenizer(error.to_string()))
    };
    let mut speed = Speed {
        bytes: documents.iter().map(|text| text.len() as u64).sum(),
        ..Speed::default()
    };
    for (number, both) in ours()?.iter().zip(library()?).enumerate() {
        if both.0 != both.1.get_ids() {
            return Err(Error::Tokenizer(format!(
                "the ids of document {number} differ"
            )));
        }
        speed.tokens += both.0.len() as u64;
    }
    for _ in 0..rounds {
        // The results are freed after the time is taken.
        let start = Instant::now();
        let ids = ours()?;
        speed.ours.push(start.elapsed().as_secs_f64());
        drop(ids);
        let start = Instant::now();
        let encodings = library()?;
        speed.library.push(start.elapsed().as_secs_f64());
        drop(encodings);
    }
    Ok(speed)
}
