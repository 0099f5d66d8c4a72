//! Writer of pairs of token files.

use super::layout::{HEADER, MAGIC, VERSION, Width, with_extension};
use crate::Error;
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// Writes a pair of token files, document by document.
pub struct TokenWriter {
    prefix: PathBuf,
    bin: BufWriter<File>,
    width: Width,
    vocab_size: usize,
    lengths: Vec<i32>,
}

impl TokenWriter {
    /// Creates `prefix.bin`. A token takes two bytes if `vocab_size` allows it, otherwise four.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(prefix: &Path, vocab_size: usize) -> Result<TokenWriter, Error> {
        let path = with_extension(prefix, "bin");
        let bin = BufWriter::new(File::create(&path).map_err(Error::io("cannot write", &path))?);
        let width = if vocab_size <= 1 << 16 {
            Width::U16
        } else {
            Width::I32
        };
        Ok(TokenWriter {
            prefix: prefix.to_path_buf(),
            bin,
            width,
            vocab_size,
            lengths: Vec::new(),
        })
    }

    /// Appends the tokens of one document.
    ///
    /// # Errors
    /// If the disk is full, the document has 2^31 tokens or more, or one is not in the vocabulary.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let path = with_extension(&self.prefix, "bin");
        if let Some(token) = tokens
            .iter()
            .find(|&&token| token as usize >= self.vocab_size)
        {
            return Err(Error::Data(format!(
                "token {token} for {} is not in the vocabulary of {}",
                path.display(),
                self.vocab_size
            )));
        }
        let length = i32::try_from(tokens.len()).map_err(|_| {
            Error::Data(format!(
                "a document of {} tokens is too long for {}",
                tokens.len(),
                path.display()
            ))
        })?;
        let bytes: Vec<u8> = match self.width {
            Width::U16 => tokens
                .iter()
                .flat_map(|&token| (token as u16).to_le_bytes())
                .collect(),
            _ => tokens
                .iter()
                .flat_map(|&token| token.to_le_bytes())
                .collect(),
        };
        self.bin
            .write_all(&bytes)
            .map_err(Error::io("cannot write", &path))?;
        self.lengths.push(length);
        Ok(())
    }

    /// Writes the index and syncs both files to disk.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn finish(self) -> Result<(), Error> {
        let path = with_extension(&self.prefix, "bin");
        let bin = self
            .bin
            .into_inner()
            .map_err(|e| Error::io("cannot write", &path)(e.into_error()))?;
        bin.sync_all().map_err(Error::io("cannot write", &path))?;
        let path = with_extension(&self.prefix, "idx");
        let mut index = Vec::with_capacity(HEADER + self.lengths.len() * 20);
        index.extend_from_slice(MAGIC);
        index.extend_from_slice(&VERSION.to_le_bytes());
        index.push(self.width.code());
        index.extend_from_slice(&(self.lengths.len() as u64).to_le_bytes());
        index.extend_from_slice(&(self.lengths.len() as u64 + 1).to_le_bytes());
        for length in &self.lengths {
            index.extend_from_slice(&length.to_le_bytes());
        }
        let mut offset = 0i64;
        for &length in &self.lengths {
            index.extend_from_slice(&offset.to_le_bytes());
            offset += i64::from(length) * self.width.bytes() as i64;
        }
        for document in 0..=self.lengths.len() as i64 {
            index.extend_from_slice(&document.to_le_bytes());
        }
        let mut file = File::create(&path).map_err(Error::io("cannot write", &path))?;
        file.write_all(&index)
            .and_then(|()| file.sync_all())
            .map_err(Error::io("cannot write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_megatrons_byte_for_byte() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("text.v1");
        let mut writer = TokenWriter::create(&prefix, 1000).unwrap();
        for document in [&[1, 2, 3][..], &[], &[999, 5]] {
            writer.push(document).unwrap();
        }
        writer.finish().unwrap();
        let index = std::fs::read(with_extension(&prefix, "idx")).unwrap();
        let mut expected = b"MMIDIDX\x00\x00".to_vec();
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 8]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        for value in [0i64, 6, 6, 0, 1, 2, 3] {
            expected.extend(value.to_le_bytes());
        }
        assert_eq!(index, expected);
    }
}
