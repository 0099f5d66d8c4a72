//! `dataset.json`: the record of how token files were made, which lies in their folder.

use crate::{Error, input::InputCounts};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    rc::Rc,
};

/// Name of the record in the folder of the token files.
pub const INFO_FILE: &str = "dataset.json";

/// The record of a data set. Those of older versions lack some fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DatasetInfo {
    /// Number of documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Training tokens, with those that mark the beginning and end of documents.
    pub train_tokens: u64,
    /// Validation tokens, with those that mark the beginning and end of documents.
    pub validation_tokens: u64,
    /// Vocabulary size of the tokenizer: the largest token id plus one.
    pub vocab_size: usize,
    /// Entropy of the frequencies of training tokens, in nats: the loss of a model that knows
    /// nothing but these frequencies.
    pub unigram_entropy: f64,
    /// Token that ends each document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos: Option<SpecialToken>,
    /// Token that begins each document, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<SpecialToken>,
    /// BLAKE3 hash of the tokenizer, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_hash: Option<String>,
    /// The pairs of token files, by their name without ending.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, FileInfo>,
    /// Integer type of the tokens, such as `uint16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// The encoder of the tokenizer that was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder: Option<String>,
    /// The files that were read, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputInfo>,
    /// Everything that reading left out, replaced or noticed.
    #[serde(default)]
    pub counts: InputCounts,
    /// Documents whose text is a single token.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub one_token_documents: u64,
    /// Documents with text of which the tokenizer leaves no token. They were not written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub documents_without_tokens: u64,
    /// Documents that the tokenizer cannot encode. They were not written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub documents_not_tokenized: u64,
    /// Of a part: BLAKE3 hash of the command without the part, in hexadecimal digits. The parts of
    /// a corpus have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corpus: Option<String>,
    /// Options of the command that made the data set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<OptionsInfo>,
    /// Version of this record. Files of earlier versions have none.
    #[serde(default)]
    pub version: u32,
}

/// Version of the record that this program writes.
pub const INFO_VERSION: u32 = 1;

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Options of `moerun data prepare` that decide on the tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OptionsInfo {
    /// Fields or columns of the text.
    pub text_key: String,
    /// Separation of the documents in text files: `file`, `line`, `blank-line` or `separator`.
    pub split: String,
    /// The text that separates documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Extensions of the files from folders. Without them: all that are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extensions: Option<Vec<String>>,
    /// True if invalid text was an error.
    pub strict: bool,
    /// True if hidden files were read.
    pub hidden: bool,
    /// True if special tokens in the text of documents were read as such.
    pub special_tokens: bool,
    /// Vocabulary size that was asked of a trained tokenizer; none for a given tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_vocab_size: Option<usize>,
    /// Fraction of documents for validation.
    pub validation_fraction: f64,
    /// Limit of the text, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Number of shards, or `input` for one per input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<String>,
    /// This part of the work among machines, such as `0/2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<String>,
}

impl DatasetInfo {
    /// Reads the record in the folder of `tokens`, the path of token files. Returns None if there
    /// is no record, or if it does not list these files.
    ///
    /// # Errors
    /// If the record cannot be read.
    pub fn of_tokens(tokens: &Path) -> Result<Option<DatasetInfo>, Error> {
        let info = DatasetInfo::of_folder(folder_of(tokens))?;
        Ok(info.filter(|info| info.applies_to(tokens)))
    }

    fn of_folder(folder: &Path) -> Result<Option<DatasetInfo>, Error> {
        let path = folder.join(INFO_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(Error::io("cannot read", &path)(error)),
        };
        let info = serde_json::from_slice(&bytes).map_err(|error| {
            Error::Data(format!(
                "{} is no record of a data set: {error}; repair it, or move it to another folder",
                path.display()
            ))
        })?;
        Ok(Some(info))
    }

    fn applies_to(&self, tokens: &Path) -> bool {
        // Earlier versions did not list the files.
        self.files.is_empty() || self.file(tokens).is_some()
    }

    /// Returns the record of the token files at `tokens`, if it lists them.
    pub fn file(&self, tokens: &Path) -> Option<&FileInfo> {
        self.files.get(tokens.file_name()?.to_str()?)
    }

    /// Returns the mean bytes of text per token of the files at `tokens`; None if there are no
    /// tokens.
    pub fn bytes_per_token(&self, tokens: &Path) -> Option<f64> {
        let file = self.file(tokens);
        let bytes = file.map_or(self.bytes, |file| file.bytes);
        let all = self.train_tokens + self.validation_tokens;
        let count = file.map_or(all, |file| file.tokens);
        (bytes > 0 && count > 0).then(|| bytes as f64 / count as f64)
    }
}

/// The folder of token files.
fn folder_of(tokens: &Path) -> &Path {
    tokens.parent().unwrap_or(Path::new(""))
}

/// The records of several folders, each of which is read once: that of many inputs is long.
#[derive(Debug, Default)]
pub struct InfoCache {
    folders: BTreeMap<PathBuf, Option<Rc<DatasetInfo>>>,
}

impl InfoCache {
    /// Returns the record of token files as [`DatasetInfo::of_tokens`] does.
    ///
    /// # Errors
    /// If the record cannot be read.
    pub fn of_tokens(&mut self, tokens: &Path) -> Result<Option<Rc<DatasetInfo>>, Error> {
        let folder = folder_of(tokens);
        let info = match self.folders.get(folder) {
            Some(info) => info.clone(),
            None => {
                let info = DatasetInfo::of_folder(folder)?.map(Rc::new);
                self.folders.insert(folder.to_path_buf(), info.clone());
                info
            }
        };
        Ok(info.filter(|info| info.applies_to(tokens)))
    }
}

/// A special token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SpecialToken {
    pub id: u32,
    pub text: String,
}

/// A pair of token files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileInfo {
    /// Number of documents.
    pub documents: u64,
    /// Number of tokens, with those that mark the beginning and end of documents.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// BLAKE3 hash of the `.bin` file, in hexadecimal digits.
    pub bin: String,
    /// BLAKE3 hash of the `.idx` file, in hexadecimal digits.
    pub idx: String,
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InputInfo {
    pub path: String,
    /// Bytes of text, after decompression.
    pub bytes: u64,
    /// Documents of the file that have text.
    pub documents: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, tokens: u64) -> FileInfo {
        FileInfo {
            documents: 1,
            tokens,
            bytes,
            bin: String::new(),
            idx: String::new(),
        }
    }

    #[test]
    fn a_record_is_that_of_the_files_it_lists() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str| DatasetInfo::of_tokens(&folder.path().join(name));
        assert_eq!(read("train").unwrap(), None);
        let mut info = DatasetInfo {
            bytes: 300,
            train_tokens: 80,
            validation_tokens: 20,
            ..DatasetInfo::default()
        };
        let write = |info: &DatasetInfo| {
            let text = serde_json::to_string(info).unwrap();
            std::fs::write(folder.path().join(INFO_FILE), text).unwrap();
        };
        write(&info);
        let per_token = |name: &str| {
            let info = read(name).unwrap();
            info.and_then(|info| info.bytes_per_token(Path::new(name)))
        };
        assert_eq!(per_token("train"), Some(3.0));
        info.files.insert("train".into(), file(100, 50));
        info.files.insert("empty".into(), file(0, 0));
        write(&info);
        assert_eq!(per_token("train"), Some(2.0));
        assert_eq!(per_token("empty"), None);
        assert_eq!(read("other").unwrap(), None);
        let mut cache = InfoCache::default();
        let mut cached = |name: &str| cache.of_tokens(&folder.path().join(name));
        assert_eq!(cached("train").unwrap().as_deref(), Some(&info));
        assert_eq!(cached("other").unwrap(), None);
        std::fs::write(folder.path().join(INFO_FILE), "{}").unwrap();
        let refused = read("train").unwrap_err().to_string();
        assert!(refused.contains("is no record of a data set"), "{refused}");
        // The record was read before, and is not read again.
        assert_eq!(cached("empty").unwrap().as_deref(), Some(&info));
    }
}
