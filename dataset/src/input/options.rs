//! Options of finding and reading documents.

use crate::Error;
use std::{fmt, path::PathBuf, str::FromStr};

/// Options of [`find`](super::find()) and [`InputFile::read`](super::InputFile::read).
#[derive(Debug, Clone)]
pub struct InputOptions {
    /// Fields of JSON objects and columns of Parquet tables that hold the text.
    pub text_key: TextKey,
    /// Documents of a text file.
    pub split: Split,
    /// Extensions of the files that are taken from folders. Without them: all that are known.
    /// Those that are unknown are read as text.
    pub extensions: Option<Vec<String>>,
    /// True if input that is not valid text is an error.
    pub strict: bool,
    /// True if hidden files in folders are read.
    pub hidden: bool,
    /// The folder of the result, which is left out of the folders that contain it.
    pub output: Option<PathBuf>,
}

impl Default for InputOptions {
    fn default() -> Self {
        Self {
            text_key: TextKey::default(),
            split: Split::File,
            extensions: None,
            strict: false,
            hidden: false,
            output: None,
        }
    }
}

impl InputOptions {
    /// True if the user names this extension.
    pub(super) fn lists(&self, extension: &str) -> bool {
        let listed = self.extensions.as_deref().unwrap_or_default();
        let bare = |listed: &str| listed.trim_start_matches('.').to_lowercase();
        listed.iter().any(|listed| bare(listed) == extension)
    }
}

/// Paths of the fields that hold the text, in the order of their texts in the document.
///
/// `a.b` is the field `b` of the object `a`, or a field with the name `a.b`. Several paths are
/// separated by commas: their texts are joined by blank lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextKey(Vec<String>);

impl Default for TextKey {
    fn default() -> Self {
        Self(vec!["text".into()])
    }
}

impl TextKey {
    /// Returns the paths, at least one.
    pub fn paths(&self) -> &[String] {
        &self.0
    }
}

impl FromStr for TextKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let paths: Vec<_> = text.split(',').map(|path| path.trim().into()).collect();
        if paths.iter().any(String::is_empty) {
            return Err(Error::Options(format!(
                "--text-key {text:?} has an empty name; names are separated by commas"
            )));
        }
        Ok(Self(paths))
    }
}

impl fmt::Display for TextKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// Ways to find the documents of a text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Split {
    /// The file is one document.
    File,
    /// Each line is a document, without its line end.
    Line,
    /// Documents are separated by empty lines. Spaces, tabs and CR do not count as contents.
    BlankLine,
    /// This text separates documents. A line end on either side of it belongs to it.
    Separator(String),
}
