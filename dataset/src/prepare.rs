//! `moerun data prepare`: makes token files from documents.
//!
//! The tokenizer is a given one, or a byte-level BPE that is trained on the documents.

pub use crate::tokenizer::{END_OF_DOCUMENT, load_tokenizer};

use crate::{
    Error, documents,
    info::DatasetInfo,
    tokenizer::{DocumentTokenizer, TokenizerOptions, train},
    tokens::TokenWriter,
};
use rayon::prelude::*;
use std::{collections::BTreeMap, path::PathBuf};

/// Documents that are tokenized in parallel before they are written.
const BATCH: usize = 256;

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
        Some(path) => DocumentTokenizer::load(path, &TokenizerOptions::default())?.0,
        None => train(corpus.texts.iter(), options.vocab_size)?.0,
    };
    progress("tokenizer", 1, 1);
    let info = write_tokens(options, &tokenizer, &corpus, progress)?;
    let path = options.output.join("tokenizer.json");
    tokenizer.save(&path)?;
    let path = options.output.join("dataset.json");
    let text = serde_json::to_string_pretty(&info).expect("plain numbers");
    std::fs::write(&path, text + "\n").map_err(Error::io("cannot write", &path))?;
    Ok(info)
}

fn read_corpus(
    options: &PrepareOptions,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<Corpus, Error> {
    let files = documents::files(&options.inputs, &options.extensions)?;
    let limit = options.max_bytes.unwrap_or(u64::MAX);
    let mut texts = Vec::new();
    let mut bytes = 0;
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

fn write_tokens(
    options: &PrepareOptions,
    tokenizer: &DocumentTokenizer,
    corpus: &Corpus,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<DatasetInfo, Error> {
    let vocab_size = tokenizer.vocab_size();
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
            .map(|text| encode(tokenizer, text))
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
fn encode(tokenizer: &DocumentTokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let mut ids = Vec::new();
    tokenizer.encode(text, &mut ids)?;
    ids.push(tokenizer.eos().id);
    Ok(ids)
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
    use std::path::Path;

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
