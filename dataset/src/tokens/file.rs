//! An open file of tokens, whatever its format: an array of integers.

use super::layout::Width;
use crate::Error;
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// An open file of tokens.
pub struct TokenFile {
    path: PathBuf,
    file: File,
    width: Width,
    bytes: u64,
}

impl TokenFile {
    /// Opens a file that holds nothing but integers of this width.
    pub(super) fn open_array(path: &Path, width: Width) -> Result<TokenFile, Error> {
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        let bytes = file_len(&file, path)?;
        Ok(TokenFile {
            path: path.to_path_buf(),
            file,
            width,
            bytes,
        })
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> u64 {
        self.bytes / self.width.bytes() as u64
    }

    /// Returns true if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the size of the file of tokens in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the path of the file of tokens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the tokens `start..start + count`.
    ///
    /// # Errors
    /// If the file cannot be read there.
    pub fn read(&self, start: u64, count: usize) -> Result<Vec<i64>, Error> {
        let width = self.width.bytes();
        let bytes = self.read_bytes(start * width as u64, count * width)?;
        Ok(self.width.decode(&bytes))
    }

    /// Reads bytes from `offset` on.
    pub(crate) fn read_bytes(&self, offset: u64, count: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0u8; count];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(Error::io("cannot read", &self.path))?;
        Ok(bytes)
    }
}

pub(super) fn file_len(file: &File, path: &Path) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(Error::io("cannot read", path))?;
    Ok(metadata.len())
}

pub(super) fn damaged(path: &Path, cause: String) -> Error {
    let path = path.display();
    Error::Data(format!("{path} is damaged: {cause}"))
}
