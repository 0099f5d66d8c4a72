//! Writer of pairs of token files.

use super::layout::{HEADER, MAGIC, VERSION, Width, with_extension};
use crate::Error;
use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Largest number of token ids: longer documents do not fit the index.
const MAX_DOCUMENT: u64 = i32::MAX as u64;

/// Contents of a finished pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenPair {
    pub documents: u64,
    pub tokens: u64,
    /// BLAKE3 hash of the `.bin` file, in hexadecimal digits.
    pub bin: String,
    /// BLAKE3 hash of the `.idx` file, in hexadecimal digits.
    pub idx: String,
}

/// Writes a pair of token files, document by document.
///
/// Memory does not depend on the number or the length of documents: lengths wait in the file
/// `PREFIX.lengths`, which [`TokenWriter::finish`] removes.
pub struct TokenWriter {
    prefix: PathBuf,
    bin: HashedFile,
    lengths: BufWriter<File>,
    width: Width,
    vocab_size: usize,
    documents: u64,
    tokens: u64,
    /// Tokens of the document that has not ended.
    open: u64,
    /// The end of the last document, if the current one may be dropped.
    mark: Option<Mark>,
    encoded: Vec<u8>,
}

impl TokenWriter {
    /// Creates `prefix.bin`. A token takes two bytes if `vocab_size` allows it, otherwise four.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(prefix: &Path, vocab_size: usize) -> Result<TokenWriter, Error> {
        let width = if vocab_size <= 1 << 16 {
            Width::U16
        } else {
            Width::I32
        };
        TokenWriter::with_width(prefix, width, vocab_size)
    }

    pub(super) fn with_width(
        prefix: &Path,
        width: Width,
        vocab_size: usize,
    ) -> Result<TokenWriter, Error> {
        let path = with_extension(prefix, "lengths");
        let lengths = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(Error::io("cannot write", &path))?;
        Ok(TokenWriter {
            prefix: prefix.to_path_buf(),
            bin: HashedFile::create(with_extension(prefix, "bin"))?,
            lengths: BufWriter::new(lengths),
            width,
            vocab_size,
            documents: 0,
            tokens: 0,
            open: 0,
            mark: None,
            encoded: Vec::new(),
        })
    }

    /// Appends the tokens of one document.
    ///
    /// # Errors
    /// If the disk is full, the document has 2^31 tokens or more, or one is not in the vocabulary.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.append(tokens)?;
        self.end_document()
    }

    /// Appends tokens to the current document, which [`TokenWriter::end_document`] ends.
    ///
    /// # Errors
    /// If the disk is full, the document has 2^31 tokens or more, or one is not in the vocabulary.
    pub fn append(&mut self, tokens: &[u32]) -> Result<(), Error> {
        if let Some(token) = tokens
            .iter()
            .find(|&&token| token as usize >= self.vocab_size)
        {
            return Err(Error::Data(format!(
                "token {token} for {} is not in the vocabulary of {}",
                self.bin.path.display(),
                self.vocab_size
            )));
        }
        let mut encoded = std::mem::take(&mut self.encoded);
        encoded.clear();
        match self.width {
            Width::U16 => {
                encoded.extend(
                    tokens
                        .iter()
                        .flat_map(|&token| (token as u16).to_le_bytes()),
                );
            }
            _ => encoded.extend(tokens.iter().flat_map(|token| token.to_le_bytes())),
        }
        let appended = self.append_encoded(&encoded);
        self.encoded = encoded;
        appended
    }

    /// Appends tokens of the file's own width.
    pub(super) fn append_encoded(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.open += (bytes.len() / self.width.bytes()) as u64;
        if self.open > MAX_DOCUMENT {
            return Err(Error::Data(format!(
                "a document of {} tokens is too long for {}: split it",
                self.open,
                self.bin.path.display()
            )));
        }
        self.bin.write(bytes)
    }

    /// Begins a document that [`TokenWriter::drop_document`] can drop later.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn begin_document(&mut self) -> Result<(), Error> {
        self.mark = Some(self.bin.mark()?);
        Ok(())
    }

    /// Drops the tokens of the current document, which [`TokenWriter::begin_document`] began.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn drop_document(&mut self) -> Result<(), Error> {
        if let Some(mark) = self.mark.take() {
            self.bin.return_to(mark)?;
            self.open = 0;
        }
        Ok(())
    }

    /// Ends the current document, which may be empty.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn end_document(&mut self) -> Result<(), Error> {
        let length = (self.open as i32).to_le_bytes();
        self.lengths
            .write_all(&length)
            .map_err(|cause| self.lengths_failed(cause))?;
        self.documents += 1;
        self.tokens += self.open;
        self.open = 0;
        self.mark = None;
        Ok(())
    }

    fn lengths_failed(&self, cause: std::io::Error) -> Error {
        Error::io("cannot write", &with_extension(&self.prefix, "lengths"))(cause)
    }

    /// Writes the index and syncs both files to disk.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn finish(mut self) -> Result<WrittenPair, Error> {
        debug_assert_eq!(self.open, 0, "the last document has not ended");
        self.lengths
            .flush()
            .map_err(|cause| self.lengths_failed(cause))?;
        let mut index = HashedFile::create(with_extension(&self.prefix, "idx"))?;
        index.write(MAGIC)?;
        index.write(&VERSION.to_le_bytes())?;
        index.write(&[self.width.code()])?;
        index.write(&self.documents.to_le_bytes())?;
        index.write(&(self.documents + 1).to_le_bytes())?;
        debug_assert_eq!(index.len, HEADER as u64);
        self.each_length(&mut |length| index.write(&length.to_le_bytes()))?;
        let width = self.width.bytes() as i64;
        let mut offset = 0i64;
        self.each_length(&mut |length| {
            let written = index.write(&offset.to_le_bytes());
            offset += i64::from(length) * width;
            written
        })?;
        for document in 0..=self.documents as i64 {
            index.write(&document.to_le_bytes())?;
        }
        let written = WrittenPair {
            documents: self.documents,
            tokens: self.tokens,
            bin: self.bin.finish()?,
            idx: index.finish()?,
        };
        let path = with_extension(&self.prefix, "lengths");
        std::fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
        Ok(written)
    }

    fn each_length(&mut self, take: &mut dyn FnMut(i32) -> Result<(), Error>) -> Result<(), Error> {
        let path = with_extension(&self.prefix, "lengths");
        let file = self.lengths.get_mut();
        file.rewind().map_err(Error::io("cannot read", &path))?;
        let mut reader = BufReader::new(file);
        let mut length = [0u8; 4];
        for _ in 0..self.documents {
            reader
                .read_exact(&mut length)
                .map_err(Error::io("cannot read", &path))?;
            take(i32::from_le_bytes(length))?;
        }
        Ok(())
    }
}

/// A state of a file to return to.
struct Mark {
    hasher: blake3::Hasher,
    len: u64,
}

/// A file that is hashed as it is written.
struct HashedFile {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    len: u64,
}

impl HashedFile {
    /// Bytes that are hashed and written at once.
    const BUFFER: usize = 256 << 10;

    fn create(path: PathBuf) -> Result<HashedFile, Error> {
        let file = File::create(&path).map_err(Error::io("cannot write", &path))?;
        Ok(HashedFile {
            path,
            file,
            hasher: blake3::Hasher::new(),
            buffer: Vec::with_capacity(HashedFile::BUFFER),
            len: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.len += bytes.len() as u64;
        if self.buffer.len() + bytes.len() > HashedFile::BUFFER {
            self.flush()?;
        }
        if bytes.len() > HashedFile::BUFFER {
            self.hasher.update(bytes);
            return self.write_through(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let buffer = std::mem::take(&mut self.buffer);
        self.hasher.update(&buffer);
        self.write_through(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    fn write_through(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .map_err(Error::io("cannot write", &self.path))
    }

    fn mark(&mut self) -> Result<Mark, Error> {
        self.flush()?;
        Ok(Mark {
            hasher: self.hasher.clone(),
            len: self.len,
        })
    }

    /// Drops everything that was written after the mark.
    fn return_to(&mut self, mark: Mark) -> Result<(), Error> {
        self.buffer.clear();
        self.file
            .set_len(mark.len)
            .and_then(|()| self.file.seek(SeekFrom::Start(mark.len)))
            .map_err(Error::io("cannot write", &self.path))?;
        self.hasher = mark.hasher;
        self.len = mark.len;
        Ok(())
    }

    /// Syncs the file to disk and returns its hash.
    fn finish(mut self) -> Result<String, Error> {
        self.flush()?;
        self.file
            .sync_all()
            .map_err(Error::io("cannot write", &self.path))?;
        Ok(self.hasher.finalize().to_hex().to_string())
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
        let written = writer.finish().unwrap();
        assert!(!with_extension(&prefix, "lengths").exists());
        let index = std::fs::read(with_extension(&prefix, "idx")).unwrap();
        let mut expected = b"MMIDIDX\x00\x00".to_vec();
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 8]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        for value in [0i64, 6, 6, 0, 1, 2, 3] {
            expected.extend(value.to_le_bytes());
        }
        assert_eq!(index, expected);
        let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex().to_string();
        let bin = std::fs::read(with_extension(&prefix, "bin")).unwrap();
        let expected = WrittenPair {
            documents: 3,
            tokens: 5,
            bin: hash(&bin),
            idx: hash(&index),
        };
        assert_eq!(written, expected);
    }

    #[test]
    fn a_dropped_document_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        let mut writer = TokenWriter::create(&plain, 10).unwrap();
        writer.push(&[1, 2]).unwrap();
        writer.push(&[3]).unwrap();
        let plain = writer.finish().unwrap();
        let other = folder.path().join("other");
        let mut writer = TokenWriter::create(&other, 10).unwrap();
        writer.push(&[1, 2]).unwrap();
        writer.begin_document().unwrap();
        for _ in 0..3 {
            writer.append(&[7; 200_000]).unwrap();
            writer.append(&[8]).unwrap();
        }
        writer.drop_document().unwrap();
        writer.drop_document().unwrap();
        writer.push(&[3]).unwrap();
        assert_eq!(writer.finish().unwrap(), plain);
        let bytes = std::fs::read(with_extension(&other, "bin")).unwrap();
        assert_eq!(blake3::hash(&bytes).to_hex().to_string(), plain.bin);
    }

    #[test]
    fn a_document_may_come_in_parts() {
        let folder = tempfile::tempdir().unwrap();
        let tokens: Vec<u32> = (0..200_000).collect();
        let whole = folder.path().join("whole");
        let mut writer = TokenWriter::create(&whole, 200_000).unwrap();
        writer.push(&tokens).unwrap();
        let whole = writer.finish().unwrap();
        let parts = folder.path().join("parts");
        let mut writer = TokenWriter::create(&parts, 200_000).unwrap();
        for part in tokens.chunks(7_001) {
            writer.append(part).unwrap();
        }
        writer.end_document().unwrap();
        assert_eq!(writer.finish().unwrap(), whole);
    }
}
