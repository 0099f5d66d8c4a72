//! `moerun data verify`: reads token files whole and checks everything that is known about them.

use super::{
    merge::check_recorded,
    read_info,
    staging::{TOKENIZER_FILE, is_pair},
};
use crate::{
    Error,
    info::{DatasetInfo, FileInfo, INFO_FILE},
    tokenizer::load_tokenizer,
    tokens::{TokenPair, TokenPart, hash_file, pair_prefix},
};
use std::path::{Path, PathBuf};

/// A pair without a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Path of the pair, without ending.
    pub prefix: PathBuf,
    pub documents: u64,
    pub tokens: u64,
    /// The checks that could not be made, and why.
    pub unchecked: Vec<String>,
}

/// Checks a data set's folder, or a pair that is named without ending or by one of its files: index
/// pointers, document boundaries, token ids, and, as far as `dataset.json` has them, counts, ends
/// of documents and checksums. In a folder, also the sums of `dataset.json` and the tokenizer.
///
/// # Errors
/// If a file is missing or damaged; the message names the first damaged place.
pub fn verify(path: &Path) -> Result<Vec<Verified>, Error> {
    let path = &*pair_prefix(path);
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().unwrap_or(Path::new(""))
    };
    let has_info = folder.join(INFO_FILE).exists();
    let info = has_info.then(|| read_info(folder)).transpose()?;
    let vocab_size = vocabulary(folder, info.as_ref())?;
    let prefixes = if path.is_dir() {
        pairs(path, info.as_ref())?
    } else {
        vec![path.into()]
    };
    if path.is_dir()
        && let Some(info) = &info
    {
        check_sums(path, info)?;
        check_tokenizer(path, info)?;
    }
    let known = Known { info, vocab_size };
    prefixes.iter().map(|prefix| known.verify(prefix)).collect()
}

/// Checks that the totals of a record are the sums of its files.
fn check_sums(folder: &Path, info: &DatasetInfo) -> Result<(), Error> {
    if info.files.is_empty() {
        return Ok(());
    }
    let sum = |kind: &str, count: fn(&FileInfo) -> u64| -> u64 {
        let files = info.files.iter();
        let files = files.filter(|(name, _)| name.starts_with(kind));
        files.map(|(_, file)| count(file)).sum()
    };
    for (name, recorded, found) in [
        ("documents", info.documents, sum("", |file| file.documents)),
        ("bytes", info.bytes, sum("", |file| file.bytes)),
        (
            "train_tokens",
            info.train_tokens,
            sum("train", |file| file.tokens),
        ),
        (
            "validation_tokens",
            info.validation_tokens,
            sum("valid", |file| file.tokens),
        ),
    ] {
        if recorded != found {
            return Err(Error::Data(format!(
                "{} is damaged: {name} is {recorded}, and the sum of its files is {found}",
                folder.join(INFO_FILE).display()
            )));
        }
    }
    Ok(())
}

/// Checks that the tokenizer of a folder is the one that its record names.
fn check_tokenizer(folder: &Path, info: &DatasetInfo) -> Result<(), Error> {
    let Some(recorded) = &info.tokenizer_hash else {
        return Ok(());
    };
    let path = folder.join(TOKENIZER_FILE);
    if hash_file(&path)? == *recorded {
        return Ok(());
    }
    // The file may have been written in another form.
    let json = load_tokenizer(&path)?.to_string(false);
    let json = json.map_err(|error| Error::Tokenizer(error.to_string()))?;
    if blake3::hash(json.as_bytes()).to_hex().as_str() == recorded {
        return Ok(());
    }
    Err(Error::Data(format!(
        "{} is not the tokenizer that {INFO_FILE} records: its hash differs",
        path.display()
    )))
}

/// Returns the pairs of a folder: those of its record, or else those with the usual names.
pub(super) fn pairs(folder: &Path, info: Option<&DatasetInfo>) -> Result<Vec<PathBuf>, Error> {
    let recorded = info
        .map(|info| info.files.keys().cloned())
        .into_iter()
        .flatten();
    let mut names: Vec<String> = recorded.collect();
    if names.is_empty() {
        let failed = || Error::io("cannot read", folder);
        for entry in std::fs::read_dir(folder).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".idx"));
            names.extend(stem.filter(|stem| is_pair(stem)).map(String::from));
        }
    }
    names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    if names.is_empty() {
        return Err(Error::Data(format!(
            "{} has no token files: give the folder of a data set, or the path of a pair without \
             its ending",
            folder.display()
        )));
    }
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

/// Returns the size of the vocabulary, if it is known.
fn vocabulary(folder: &Path, info: Option<&DatasetInfo>) -> Result<Option<usize>, Error> {
    if let Some(info) = info {
        return Ok(Some(info.vocab_size));
    }
    let path = folder.join(TOKENIZER_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let largest = load_tokenizer(&path)?.get_vocab(true).into_values().max();
    Ok(Some(largest.map_or(0, |id| id as usize + 1)))
}

/// Facts about a folder's pairs.
struct Known {
    info: Option<DatasetInfo>,
    vocab_size: Option<usize>,
}

impl Known {
    fn verify(&self, prefix: &Path) -> Result<Verified, Error> {
        let name = prefix
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        let recorded = self.info.as_ref().and_then(|info| info.files.get(name));
        // Ends are known only for pairs that the record describes.
        let eos = self
            .info
            .as_ref()
            .and_then(|info| info.eos.as_ref())
            .filter(|_| recorded.is_some());
        let vocab_size = self.vocab_size.filter(|_| self.describes(name));
        let mut position = 0;
        let read = TokenPair::open(prefix)?.read(&mut |part| {
            if let Some(size) = vocab_size {
                check_ids(prefix, &part, position, size)?;
            }
            position += part.tokens.len() as u64;
            let is_ended = |id: u32| part.tokens.last() == Some(&id);
            match eos {
                Some(eos) if part.ends_document && !is_ended(eos.id) => Err(Error::Data(format!(
                    "{}.bin is damaged: document {} does not end with the token {} ({:?})",
                    prefix.display(),
                    part.document,
                    eos.id,
                    eos.text
                ))),
                _ => Ok(()),
            }
        })?;
        let mut unchecked = Vec::new();
        match recorded {
            Some(recorded) => check_recorded(&read, recorded, prefix)?,
            None => unchecked.push(format!("checksums: no {INFO_FILE} lists this pair")),
        }
        if vocab_size.is_none() {
            unchecked.push(format!(
                "token ids: no {INFO_FILE} or {TOKENIZER_FILE} describes this pair"
            ));
        }
        Ok(Verified {
            prefix: prefix.to_path_buf(),
            documents: read.documents,
            tokens: read.tokens,
            unchecked,
        })
    }

    /// True if the folder's record or tokenizer belongs to this pair.
    fn describes(&self, name: &str) -> bool {
        let files = self.info.as_ref().map(|info| &info.files);
        files.is_none_or(|files| files.is_empty() || files.contains_key(name))
    }
}

fn check_ids(prefix: &Path, part: &TokenPart, position: u64, size: usize) -> Result<(), Error> {
    let is_wrong = |&token: &u32| token as usize >= size;
    let Some(index) = part.tokens.iter().position(is_wrong) else {
        return Ok(());
    };
    Err(Error::Data(format!(
        "{}.bin is damaged: token {}, in document {}, is {}, which is not in the vocabulary of \
         {size}",
        prefix.display(),
        position + index as u64,
        part.document,
        part.tokens[index]
    )))
}
