//! `moerun data prepare`: documents become token files, with a tokenizer that is trained on them or given.

use super::{END_OF_DOCUMENT, TokenWriter, documents};
use crate::Error;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// What to prepare.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Files and folders.
    pub inputs: Vec<PathBuf>,
    /// Extensions taken from folders, in lower case.
    pub extensions: Vec<String>,
    /// Field of JSONL objects, column of Parquet tables.
    pub text_key: String,
    /// Where `train`, `valid`, `tokenizer.json` and `dataset.json` go.
    pub output: PathBuf,
    /// A Hugging Face `tokenizer.json`; otherwise a byte-level BPE is trained on the documents.
    pub tokenizer: Option<PathBuf>,
    /// Vocabulary of a tokenizer that is trained.
    pub vocab_size: usize,
    /// Share of the documents kept for validation, chosen by their number.
    pub validation_fraction: f64,
    /// Use no more than this many bytes of text.
    pub max_bytes: Option<u64>,
}

/// What was prepared; written as `dataset.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// Documents read.
    pub documents: u64,
    /// Bytes of text read.
    pub bytes: u64,
    /// Tokens for training, ends of documents included.
    pub train_tokens: u64,
    /// Tokens for validation.
    pub validation_tokens: u64,
    /// Size of the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Entropy of the single-token distribution of the training tokens, in nats: the loss of a model that knows
    /// frequencies and nothing else.
    pub unigram_entropy: f64,
}

/// Reads, tokenises and writes. `progress` is told (what, done, of).
///
/// # Errors
/// When an input cannot be read, holds no text, or the output cannot be written.
pub fn prepare(
    options: &PrepareOptions,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<DatasetInfo, Error> {
    if !(0.0..1.0).contains(&options.validation_fraction) {
        return Err(Error::Config(format!(
            "--validation-fraction {} is not between 0 and 1",
            options.validation_fraction
        )));
    }
    let files = documents::files(&options.inputs, &options.extensions)?;
    let mut texts = Vec::new();
    let mut bytes = 0u64;
    let limit = options.max_bytes.unwrap_or(u64::MAX);
    for (number, path) in files.iter().enumerate() {
        if bytes >= limit {
            break;
        }
        documents::read(path, &options.text_key, &mut |text| {
            if !text.trim().is_empty() && bytes < limit {
                bytes += text.len() as u64;
                texts.push(text);
            }
            Ok(())
        })?;
        progress("reading", number as u64 + 1, files.len() as u64);
    }
    if texts.is_empty() {
        return Err(Error::Data(format!(
            "{} hold no text ({} files with the extensions {} were read)",
            options
                .inputs
                .iter()
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
                .join(", "),
            files.len(),
            options.extensions.join(", ")
        )));
    }
    std::fs::create_dir_all(&options.output).map_err(Error::io("cannot make", &options.output))?;
    progress("tokenizer", 0, 1);
    let tokenizer = match &options.tokenizer {
        Some(path) => load_tokenizer(path)?,
        None => train_tokenizer(&texts, options.vocab_size)?,
    };
    progress("tokenizer", 1, 1);
    let end = tokenizer
        .token_to_id(END_OF_DOCUMENT)
        .or_else(|| tokenizer.token_to_id("</s>"))
        .ok_or_else(|| {
            Error::Data(format!(
                "the tokenizer has no token {END_OF_DOCUMENT} or </s> to end documents with"
            ))
        })?;
    let vocab_size = tokenizer.get_vocab_size(true);
    let prepared = write(
        options, &tokenizer, &texts, end, vocab_size, bytes, progress,
    )?;
    let path = options.output.join("tokenizer.json");
    tokenizer
        .save(&path, false)
        .map_err(|e| Error::Data(format!("cannot write {}: {e}", path.display())))?;
    let path = options.output.join("dataset.json");
    let text = serde_json::to_string_pretty(&prepared).expect("plain numbers");
    std::fs::write(&path, text + "\n").map_err(Error::io("cannot write", &path))?;
    Ok(prepared)
}

/// Loads a Hugging Face `tokenizer.json`.
///
/// # Errors
/// When the file is missing or not a tokenizer.
pub(crate) fn load_tokenizer(path: &Path) -> Result<Tokenizer, Error> {
    Tokenizer::from_file(path)
        .map_err(|e| Error::Data(format!("cannot read the tokenizer {}: {e}", path.display())))
}

/// A byte-level BPE (as GPT-2's), so any text can be encoded.
fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<Tokenizer, Error> {
    if vocab_size < 257 {
        return Err(Error::Config(format!(
            "--vocab-size {vocab_size} is less than the 256 bytes and the end of a document that every byte-level \
             tokenizer has"
        )));
    }
    let failed = |e: tokenizers::Error| Error::Data(format!("training the tokenizer failed: {e}"));
    let byte_level = ByteLevel::new(false, true, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(failed)?;
    tokenizer
        .train(&mut trainer, texts.iter().map(String::as_str))
        .map_err(failed)?;
    // From the statically typed form to the one that every other function uses.
    let json = tokenizer.to_string(false).map_err(failed)?;
    json.parse().map_err(failed)
}

fn write(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    texts: &[String],
    end: u32,
    vocab_size: usize,
    bytes: u64,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<DatasetInfo, Error> {
    let mut train = TokenWriter::create(&options.output.join("train"), vocab_size)?;
    let mut valid = TokenWriter::create(&options.output.join("valid"), vocab_size)?;
    let mut counts = vec![0u64; vocab_size];
    let mut train_tokens = 0u64;
    let mut validation_tokens = 0u64;
    // Every n-th document, so that the same inputs always give the same split.
    let every = if options.validation_fraction > 0.0 {
        (1.0 / options.validation_fraction).round().max(2.0) as usize
    } else {
        usize::MAX
    };
    const BATCH: usize = 256;
    for (batch, chunk) in texts.chunks(BATCH).enumerate() {
        let encoded: Vec<Vec<u32>> = chunk
            .par_iter()
            .map(|text| {
                let encoding = tokenizer.encode_fast(text.as_str(), false);
                let encoding = encoding
                    .map_err(|e| Error::Data(format!("a document cannot be encoded: {e}")))?;
                Ok([encoding.get_ids(), &[end]].concat())
            })
            .collect::<Result<_, Error>>()?;
        for (index, tokens) in encoded.iter().enumerate() {
            if (batch * BATCH + index) % every == every - 1 {
                valid.push(tokens)?;
                validation_tokens += tokens.len() as u64;
            } else {
                train.push(tokens)?;
                train_tokens += tokens.len() as u64;
                for &token in tokens {
                    counts[token as usize] += 1;
                }
            }
        }
        progress(
            "tokenizing",
            (batch * BATCH + chunk.len()) as u64,
            texts.len() as u64,
        );
    }
    train.finish()?;
    valid.finish()?;
    Ok(DatasetInfo {
        documents: texts.len() as u64,
        bytes,
        train_tokens,
        validation_tokens,
        vocab_size,
        unigram_entropy: entropy(&counts),
    })
}

/// Entropy in nats of the distribution that `counts` are in proportion to.
fn entropy(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let of = |count: u64| {
        let share = count as f64 / total;
        -share * share.ln()
    };
    counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| of(count))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TokenFile;

    fn options(folder: &Path, texts: &[&str]) -> PrepareOptions {
        let inputs = folder.join("in");
        std::fs::create_dir_all(&inputs).unwrap();
        for (number, text) in texts.iter().enumerate() {
            std::fs::write(inputs.join(format!("{number:03}.txt")), text).unwrap();
        }
        PrepareOptions {
            inputs: vec![inputs],
            extensions: vec!["txt".into()],
            text_key: "text".into(),
            output: folder.join("out"),
            tokenizer: None,
            vocab_size: 300,
            validation_fraction: 0.25,
            max_bytes: None,
        }
    }

    #[test]
    fn documents_come_back_out_of_the_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let texts = [
            "the cat sat on the mat, the cat",
            "héllo \u{1F600} wörld",
            "  indented\n\ttabs",
            "held out",
        ];
        let prepared = prepare(&options(folder.path(), &texts), &|_, _, _| {}).unwrap();
        assert_eq!((prepared.documents, prepared.vocab_size <= 300), (4, true));
        let tokenizer = load_tokenizer(&folder.path().join("out/tokenizer.json")).unwrap();
        let decode = |name: &str| {
            let file = TokenFile::open(&folder.path().join("out").join(name)).unwrap();
            let ids: Vec<u32> = file
                .read(0, file.len() as usize)
                .unwrap()
                .iter()
                .map(|&t| t as u32)
                .collect();
            tokenizer.decode(&ids, false).unwrap()
        };
        assert_eq!(
            decode("train"),
            texts[..3]
                .iter()
                .map(|text| format!("{text}{END_OF_DOCUMENT}"))
                .collect::<String>()
        );
        assert_eq!(decode("valid"), format!("held out{END_OF_DOCUMENT}"));
        assert!(prepared.unigram_entropy > 1.0 && prepared.unigram_entropy < 300f64.ln());
    }

    #[test]
    fn nothing_to_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = prepare(&options(folder.path(), &["   \n"]), &|_, _, _| {})
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("hold no text (1 files with the extensions txt were read)"),
            "{error}"
        );
        let small = PrepareOptions {
            vocab_size: 100,
            ..options(folder.path(), &["text"])
        };
        assert!(
            prepare(&small, &|_, _, _| {})
                .unwrap_err()
                .to_string()
                .contains("--vocab-size 100")
        );
    }

    #[test]
    fn entropy_of_a_fair_coin_is_ln_two() {
        assert!((entropy(&[5, 0, 5]) - 2f64.ln()).abs() < 1e-12);
    }
}
