//! Formats of token files, and how the format of a path is found.

use super::{
    datatrove,
    file::TokenFile,
    layout::{Width, with_extension},
    megatron, raw,
};
use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A format of token files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenFormat {
    /// A pair of `.bin` and `.idx` files of Megatron-LM and `moerun data prepare`.
    Megatron,
    /// An array of integers without header, such as OLMo's `.npy` files.
    Raw,
    /// A `.ds` file of datatrove.
    Datatrove,
}

/// The integer type of the tokens in a file that does not record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenDtype {
    U8,
    U16,
    U32,
    U64,
}

impl TokenDtype {
    fn width(self) -> Width {
        match self {
            TokenDtype::U8 => Width::U8,
            TokenDtype::U16 => Width::U16,
            TokenDtype::U32 => Width::U32,
            TokenDtype::U64 => Width::U64,
        }
    }
}

/// A token file as a user names it.
#[derive(Debug, Clone, Copy)]
pub struct TokenPath<'a> {
    /// The file, or of a pair the path without extension.
    pub path: &'a Path,
    /// The format; by default that of the name.
    pub format: Option<TokenFormat>,
    /// The integer type; only of files that do not record it.
    pub dtype: Option<TokenDtype>,
}

impl<'a> TokenPath<'a> {
    /// Returns the path of a pair.
    pub fn megatron(path: &'a Path) -> TokenPath<'a> {
        TokenPath {
            path,
            format: Some(TokenFormat::Megatron),
            dtype: None,
        }
    }

    /// Returns the given format, or that which the name stands for. A name with another ending, or
    /// none, is that of a pair.
    pub fn format(&self) -> TokenFormat {
        let extension = self
            .path
            .extension()
            .and_then(|extension| extension.to_str());
        self.format.unwrap_or(match extension {
            Some("npy") => TokenFormat::Raw,
            Some("ds") => TokenFormat::Datatrove,
            _ => TokenFormat::Megatron,
        })
    }

    /// Returns the reason why format and dtype contradict each other.
    pub fn problem(&self) -> Option<String> {
        match (self.format(), self.dtype) {
            (TokenFormat::Megatron, Some(_)) => {
                Some("the index of a Megatron pair records its dtype: leave dtype out".into())
            }
            (TokenFormat::Raw, None) => Some(format!(
                "{} is an array without header: give its dtype, such as u16 or u32",
                self.path.display()
            )),
            (TokenFormat::Datatrove, Some(TokenDtype::U8 | TokenDtype::U64)) => {
                Some("datatrove writes u16 and u32 only: give one of them as dtype".into())
            }
            _ => None,
        }
    }

    /// Returns a warning about data next to the file that is not read.
    pub fn warning(&self) -> Option<String> {
        let loss = with_extension(self.path, "loss");
        let has_mask = self.format() == TokenFormat::Datatrove && loss.exists();
        has_mask.then(|| {
            format!(
                "{} masks the loss of some tokens and is not read: all tokens are trained on",
                loss.display()
            )
        })
    }

    /// Returns the files that hold the tokens and their boundaries, existing or not.
    pub(crate) fn files(&self) -> Vec<std::path::PathBuf> {
        match self.format() {
            TokenFormat::Megatron => ["bin", "idx"]
                .map(|extension| with_extension(self.path, extension))
                .into(),
            _ => vec![self.path.to_path_buf()],
        }
    }

    fn open(&self, is_verified: bool) -> Result<TokenFile, Error> {
        if let Some(problem) = self.problem() {
            return Err(Error::Data(problem));
        }
        let path = self.path;
        let width = self.dtype.map(TokenDtype::width);
        match (self.format(), width) {
            (TokenFormat::Raw, Some(width)) => raw::open(path, width),
            (TokenFormat::Datatrove, width) if is_verified => datatrove::open_verified(path, width),
            (TokenFormat::Datatrove, width) => datatrove::open(path, width),
            (_, _) if is_verified => megatron::open_verified(path),
            (_, _) => megatron::open(path),
        }
        .map_err(|error| self.explain(error))
    }

    /// Adds how to name the file to the error of one that is no pair.
    fn explain(&self, error: Error) -> Error {
        let is_guessed = self.format.is_none() && self.format() == TokenFormat::Megatron;
        if !is_guessed || with_extension(self.path, "idx").exists() || !self.path.is_file() {
            return error;
        }
        let path = self.path.display();
        let extension = self
            .path
            .extension()
            .and_then(|extension| extension.to_str());
        let prefix = self.path.with_extension("");
        if matches!(extension, Some("bin" | "idx")) && with_extension(&prefix, "idx").exists() {
            let prefix = prefix.display();
            return Error::Data(format!(
                "{path} is a file of a pair: name both by {prefix}, without the extension"
            ));
        }
        Error::Data(format!(
            "{path} has no index {path}.idx: if it is an array without header, give format: raw \
             and its dtype; if datatrove wrote it, format: datatrove"
        ))
    }
}

impl TokenFile {
    /// Opens the pair `prefix.bin` and `prefix.idx` and checks that they belong together.
    ///
    /// # Errors
    /// If one of them is missing, or damaged in what is checked.
    pub fn open(prefix: &Path) -> Result<TokenFile, Error> {
        TokenFile::open_path(&TokenPath::megatron(prefix))
    }

    /// Opens a pair as [`TokenFile::open`] does, and reads the whole index, a part at a time.
    ///
    /// # Errors
    /// If one of them is missing or damaged; the message names the first damaged sequence or
    /// document boundary.
    pub fn open_verified(prefix: &Path) -> Result<TokenFile, Error> {
        TokenFile::open_path_verified(&TokenPath::megatron(prefix))
    }

    /// Opens token files of any format, and checks in constant time that they are whole.
    ///
    /// # Errors
    /// If a file is missing or damaged, or its format or dtype is not known.
    pub fn open_path(path: &TokenPath) -> Result<TokenFile, Error> {
        path.open(false)
    }

    /// Opens token files as [`TokenFile::open_path`] does, and checks all boundaries of documents.
    ///
    /// # Errors
    /// The errors of [`TokenFile::open_path`]; the message names the first damaged boundary.
    pub fn open_path_verified(path: &TokenPath) -> Result<TokenFile, Error> {
        path.open(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::TokenWriter;
    use std::path::PathBuf;

    fn named(path: &Path) -> TokenPath<'_> {
        TokenPath {
            path,
            format: None,
            dtype: None,
        }
    }

    #[test]
    fn names_stand_for_formats() {
        for (name, format) in [
            ("data/train", TokenFormat::Megatron),
            ("data/v1.5", TokenFormat::Megatron),
            ("part-0.npy", TokenFormat::Raw),
            ("00000_shuffled.ds", TokenFormat::Datatrove),
        ] {
            assert_eq!(named(Path::new(name)).format(), format, "{name}");
        }
    }

    #[test]
    fn masks_of_the_loss_are_warned_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("00000.ds");
        assert_eq!(named(&path).warning(), None);
        std::fs::write(with_extension(&path, "loss"), [1]).unwrap();
        assert!(
            named(&path)
                .warning()
                .unwrap()
                .contains("00000.ds.loss masks")
        );
        assert_eq!(TokenPath::megatron(&path).warning(), None);
    }

    #[test]
    fn a_wrong_name_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { folder.path().join(name) };
        let mut writer = TokenWriter::create(&path("train"), 100).unwrap();
        writer.push(&[1, 2]).unwrap();
        writer.finish().unwrap();
        std::fs::write(path("tokens.u16"), [1, 0]).unwrap();
        std::fs::write(path("part.npy"), [1, 0]).unwrap();
        let refused = |name: &str| {
            let path = path(name);
            let opened = TokenFile::open_path(&named(&path));
            opened.err().unwrap().to_string()
        };
        assert!(refused("train.bin").contains("without the extension"));
        assert!(refused("tokens.u16").contains("give format: raw and its dtype"));
        assert!(refused("part.npy").contains("give its dtype"));
        assert!(refused("missing").contains("cannot open"));
        let path = path("tokens.u16");
        let raw = TokenPath {
            path: &path,
            format: Some(TokenFormat::Raw),
            dtype: Some(TokenDtype::U16),
        };
        assert_eq!(TokenFile::open_path(&raw).unwrap().read(0, 1).unwrap(), [1]);
        let both = TokenPath {
            dtype: Some(TokenDtype::U16),
            ..named(&path)
        };
        assert!(both.problem().unwrap().contains("leave dtype out"));
    }
}
