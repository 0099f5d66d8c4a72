//! `moerun data prepare`: makes token files from documents.
//!
//! The tokenizer is a given one, or a byte-level BPE that is trained on the documents.

use crate::{
    Error,
    info::DatasetInfo,
    input::{InputCounts, InputOptions, find},
    tokens::TokenWriter,
};
use rayon::prelude::*;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tokenizers::{
    AddedToken, Tokenizer, TokenizerBuilder,
    models::bpe::{BPE, BpeTrainerBuilder},
    pre_tokenizers::byte_level::ByteLevel,
};

/// Text of the end-of-document token in data that `moerun data prepare` made.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

/// Largest number of token ids.
const MAX_VOCABULARY: usize = 1 << 31;

/// Documents that are tokenized in parallel before they are written.
const BATCH: usize = 256;

/// Tokens of a byte-level BPE without any merge: 256 bytes and the end of a document.
const MIN_VOCABULARY: usize = 257;

/// Inputs, output and tokenizer of [`prepare`].
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Files and folders of documents.
    pub inputs: Vec<PathBuf>,
    /// Extensions of the files that are taken from folders, in lower case.
    pub extensions: Vec<String>,
    /// Field of JSONL objects and column of Parquet tables that holds the text.
    pub text_key: String,
    /// Folder for `train`, `valid`, `tokenizer.json` and `dataset.json`.
    pub output: PathBuf,
    /// A Hugging Face `tokenizer.json`. Without it a byte-level BPE is trained on the documents.
    pub tokenizer: Option<PathBuf>,
    /// Vocabulary size of a newly trained tokenizer.
    pub vocab_size: usize,
    /// Share of the documents for validation, chosen by their number.
    pub validation_fraction: f64,
    /// Largest number of bytes of text to read.
    pub max_bytes: Option<u64>,
}

/// The documents to prepare.
struct Corpus {
    texts: Vec<String>,
    bytes: u64,
}

/// Reads documents, tokenizes them and writes token files.
///
/// Calls `progress` with the name of the current stage, the work done in it and the total work.
///
/// # Errors
/// If an input cannot be read or holds no text, or the output cannot be written.
pub fn prepare(
    options: &PrepareOptions,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<DatasetInfo, Error> {
    if !(0.0..1.0).contains(&options.validation_fraction) {
        return Err(Error::Options(format!(
            "--validation-fraction {} is not between 0 and 1",
            options.validation_fraction
        )));
    }
    let corpus = read_corpus(options, progress)?;
    std::fs::create_dir_all(&options.output).map_err(Error::io("cannot make", &options.output))?;
    progress("tokenizer", 0, 1);
    let tokenizer = match &options.tokenizer {
        Some(path) => load_tokenizer(path)?,
        None => train_tokenizer(&corpus.texts, options.vocab_size)?,
    };
    progress("tokenizer", 1, 1);
    let info = write_tokens(options, &tokenizer, &corpus, progress)?;
    let path = options.output.join("tokenizer.json");
    tokenizer
        .save(&path, false)
        .map_err(|error| Error::Tokenizer(format!("cannot write {}: {error}", path.display())))?;
    let path = options.output.join("dataset.json");
    let text = serde_json::to_string_pretty(&info).expect("plain numbers");
    std::fs::write(&path, text + "\n").map_err(Error::io("cannot write", &path))?;
    Ok(info)
}

fn read_corpus(
    options: &PrepareOptions,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<Corpus, Error> {
    let reading = InputOptions {
        text_key: options.text_key.parse()?,
        extensions: Some(options.extensions.clone()),
        ..InputOptions::default()
    };
    let inputs = options.inputs.iter().map(|path| path.display().to_string());
    let files = find(&inputs.collect::<Vec<_>>(), &reading)?.files;
    let limit = options.max_bytes.unwrap_or(u64::MAX);
    let mut counts = InputCounts::default();
    let mut texts = Vec::new();
    let mut bytes = 0;
    for (number, file) in files.iter().enumerate() {
        if bytes >= limit {
            break;
        }
        let mut text = String::new();
        file.read(&reading, &mut counts, &mut |piece| {
            text += piece.text;
            if piece.ends_document {
                let text = std::mem::take(&mut text);
                if bytes < limit {
                    bytes += text.len() as u64;
                    texts.push(text);
                }
            }
            Ok(())
        })?;
        progress("reading", number as u64 + 1, files.len() as u64);
    }
    if texts.is_empty() {
        let inputs = options.inputs.iter().map(|path| path.display().to_string());
        return Err(Error::Data(format!(
            "{}: no text ({} files with the extensions {} were read)",
            inputs.collect::<Vec<_>>().join(", "),
            files.len(),
            options.extensions.join(", ")
        )));
    }
    Ok(Corpus { texts, bytes })
}

/// Loads a Hugging Face `tokenizer.json`.
///
/// # Errors
/// If the file is missing or is no tokenizer.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer, Error> {
    let failed = |reason: String| {
        let path = path.display();
        Error::Tokenizer(format!("cannot read the tokenizer {path}: {reason}"))
    };
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    // The library panics at some errors of syntax.
    serde_json::from_slice::<Value>(&text).map_err(|error| failed(error.to_string()))?;
    Tokenizer::from_bytes(&text).map_err(|error| failed(error.to_string()))
}

/// Trains a byte-level BPE as in GPT-2, which can encode any text.
fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<Tokenizer, Error> {
    if vocab_size < MIN_VOCABULARY {
        return Err(Error::Options(format!(
            "--vocab-size {vocab_size} is less than the 256 bytes and the end of a document \
             that every byte-level tokenizer has"
        )));
    }
    let failed = |error: tokenizers::Error| {
        Error::Tokenizer(format!("training the tokenizer failed: {error}"))
    };
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
    // Trained tokenizers have a static type; all other functions need the dynamic one.
    let json = tokenizer.to_string(false).map_err(failed)?;
    json.parse().map_err(failed)
}

/// Returns the id of the token that ends documents.
fn find_eod_token(tokenizer: &Tokenizer) -> Result<u32, Error> {
    let id = |text: &str| tokenizer.token_to_id(text);
    id(END_OF_DOCUMENT).or_else(|| id("</s>")).ok_or_else(|| {
        Error::Tokenizer(format!(
            "the tokenizer has no token {END_OF_DOCUMENT} or </s> to end documents with"
        ))
    })
}

/// Returns the number of token ids, which may have gaps.
fn vocab_size(tokenizer: &Tokenizer) -> Result<usize, Error> {
    let ids = tokenizer.get_vocab(true).into_values();
    let size = ids.max().map_or(0, |largest| largest as usize + 1);
    if size > MAX_VOCABULARY {
        let largest = size - 1;
        return Err(Error::Tokenizer(format!(
            "the tokenizer has a token with the id {largest}; ids must be below {MAX_VOCABULARY}"
        )));
    }
    Ok(size)
}

fn write_tokens(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    corpus: &Corpus,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<DatasetInfo, Error> {
    let eod_token = find_eod_token(tokenizer)?;
    let vocab_size = vocab_size(tokenizer)?;
    let texts = &corpus.texts;
    let mut train = TokenWriter::create(&options.output.join("train"), vocab_size)?;
    let mut valid = TokenWriter::create(&options.output.join("valid"), vocab_size)?;
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    let mut train_tokens = 0u64;
    let mut validation_tokens = 0u64;
    // Every n-th document, so that the same inputs always have the same split.
    let every = if options.validation_fraction > 0.0 {
        (1.0 / options.validation_fraction).round().max(2.0) as usize
    } else {
        usize::MAX
    };
    for (batch, chunk) in texts.chunks(BATCH).enumerate() {
        let encoded: Vec<Vec<u32>> = chunk
            .par_iter()
            .map(|text| encode(tokenizer, text, eod_token))
            .collect::<Result<_, Error>>()?;
        for (index, tokens) in encoded.iter().enumerate() {
            let document = batch * BATCH + index;
            if document % every == every - 1 {
                valid.push(tokens)?;
                validation_tokens += tokens.len() as u64;
                continue;
            }
            train.push(tokens)?;
            train_tokens += tokens.len() as u64;
            for &token in tokens {
                *counts.entry(token).or_default() += 1;
            }
        }
        let done = batch * BATCH + chunk.len();
        progress("tokenizing", done as u64, texts.len() as u64);
    }
    train.finish()?;
    valid.finish()?;
    Ok(DatasetInfo {
        documents: texts.len() as u64,
        bytes: corpus.bytes,
        train_tokens,
        validation_tokens,
        vocab_size,
        unigram_entropy: entropy(&counts.into_values().collect::<Vec<_>>()),
        ..DatasetInfo::default()
    })
}

/// Returns the tokens of a document with its end.
fn encode(tokenizer: &Tokenizer, text: &str, eod_token: u32) -> Result<Vec<u32>, Error> {
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|error| Error::Tokenizer(format!("a document cannot be encoded: {error}")))?;
    Ok([encoding.get_ids(), &[eod_token]].concat())
}

/// Returns the entropy of the distribution with these counts, in nats.
fn entropy(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let term = |count: u64| {
        let share = count as f64 / total;
        -share * share.ln()
    };
    counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| term(count))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::TokenFile;

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
    fn ids_of_a_given_tokenizer_may_have_gaps() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path(), &["one two", "two three"]);
        prepare(&options, &|_, _, _| ()).unwrap();
        let made = folder.path().join("out/tokenizer.json");
        let text = std::fs::read_to_string(&made).unwrap();
        let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
        let given = folder.path().join("given.json");
        options.tokenizer = Some(given.clone());
        // The id of "o", as from a vocabulary of which some tokens were removed.
        for (id, expected) in [(70_000u64, Ok(70_001)), (1 << 31, Err("2147483648"))] {
            tokenizer["model"]["vocab"]["o"] = id.into();
            std::fs::write(&given, tokenizer.to_string()).unwrap();
            match (prepare(&options, &|_, _, _| ()), expected) {
                (Ok(info), Ok(size)) => assert_eq!(info.vocab_size, size),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (other, _) => panic!("{other:?}"),
            }
        }
        let mut writer = TokenWriter::create(&folder.path().join("x"), 70_001).unwrap();
        let error = writer.push(&[70_001]).unwrap_err().to_string();
        assert!(error.contains("token 70001"), "{error}");
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
            error.contains("no text (1 files with the extensions txt were read)"),
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
