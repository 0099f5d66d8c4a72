//! `moerun data show`: a window or a document as text.

use super::{read_info, staging::TOKENIZER_FILE, verify::pairs};
use crate::{
    Error,
    info::INFO_FILE,
    tokenizer::load_tokenizer,
    tokens::{TokenFile, TokenPair, pair_prefix},
};
use std::path::{Path, PathBuf};

/// Most tokens that are shown.
pub const MAX_SHOWN: usize = 1 << 20;

/// The tokens to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// Window `number` of `length` tokens, as training without shuffling would read it.
    Window { number: u64, length: usize },
    /// All of a document, or its first [`MAX_SHOWN`] tokens.
    Document(u64),
}

/// Tokens with their documents.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// The pair that has them.
    pub prefix: PathBuf,
    /// Number of the first token.
    pub start: u64,
    /// The documents, in order; the first and the last may be incomplete.
    pub documents: Vec<ShownDocument>,
}

/// A document, or the part of it that is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct ShownDocument {
    /// Number of the document in the pair.
    pub number: u64,
    /// Its text, special tokens included.
    pub text: String,
    /// Number of its tokens that are shown.
    pub tokens: usize,
    /// True if its first token is among them.
    pub begins: bool,
    /// True if its last token is among them.
    pub ends: bool,
}

/// Decodes tokens of a pair, or of the first pair of a folder, with the tokenizer of their folder
/// or the given one.
///
/// # Errors
/// If there is no such window or document, or a file is missing or damaged.
pub fn show(path: &Path, selection: Selection, tokenizer: Option<&Path>) -> Result<Shown, Error> {
    let prefix = if path.is_dir() {
        let has_info = path.join(INFO_FILE).exists();
        let info = has_info.then(|| read_info(path)).transpose()?;
        pairs(path, info.as_ref())?.swap_remove(0)
    } else {
        pair_prefix(path)
    };
    let folder = prefix.parent().unwrap_or(Path::new(""));
    let own = folder.join(TOKENIZER_FILE);
    let tokenizer = load_tokenizer(tokenizer.unwrap_or(&own))?;
    let pair = TokenPair::open(&prefix)?;
    let file = TokenFile::open(&prefix)?;
    let (start, count) = match selection {
        Selection::Document(number) => {
            let (start, end) = pair.span(number)?;
            (start, end.saturating_sub(start).min(MAX_SHOWN as u64))
        }
        Selection::Window { number, length } => {
            let start = number.saturating_mul(length as u64);
            if start >= file.len() {
                return Err(Error::Options(format!(
                    "{} has no window {number} of {length} tokens: it has {}",
                    prefix.display(),
                    file.len().div_ceil(length as u64)
                )));
            }
            (start, (file.len() - start).min(length as u64))
        }
    };
    let tokens = file.read(start, count as usize)?;
    let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
    let mut documents = Vec::new();
    let mut position = start;
    let end = start + count;
    while position < end {
        let (number, first) = pair.document_of(position)?;
        let (_, last) = pair.span(number)?;
        let until = last.min(end);
        if until <= position {
            return Err(Error::Data(format!(
                "{}.idx is damaged: check it with moerun data verify",
                prefix.display()
            )));
        }
        let part = &tokens[(position - start) as usize..(until - start) as usize];
        let text = tokenizer
            .decode(part, false)
            .map_err(|error| Error::Tokenizer(format!("tokens cannot be decoded: {error}")))?;
        documents.push(ShownDocument {
            number,
            text,
            tokens: part.len(),
            begins: first == position,
            ends: until == last,
        });
        position = until;
    }
    Ok(Shown {
        prefix,
        start,
        documents,
    })
}
