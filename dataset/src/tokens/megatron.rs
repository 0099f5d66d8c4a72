//! Reader of pairs of token files.

use super::layout::{
    DOCUMENTS_OFFSET, DTYPE_OFFSET, HEADER, MAGIC, SEQUENCES_OFFSET, VERSION, VERSION_OFFSET,
    Width, with_extension,
};
use crate::Error;
use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes of the index for the length of a sequence.
const LENGTH_BYTES: u64 = 4;

/// Bytes of the index for the offset of a sequence.
const OFFSET_BYTES: u64 = 8;

/// Sequences of the index that are read at once when all are checked.
const VERIFIED_AT_ONCE: u64 = 4096;

/// Bytes of the index per document boundary.
const DOCUMENT_ENTRY: u64 = 8;

fn file_len(file: &File, path: &Path) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(Error::io("cannot read", path))?;
    Ok(metadata.len())
}

/// The counts in the header of an index.
struct IndexHeader {
    width: Width,
    sequences: u64,
    documents: u64,
}

impl IndexHeader {
    /// Parses a header, or returns the reason why it is damaged.
    fn parse(bytes: &[u8; HEADER]) -> Result<IndexHeader, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("it does not begin with MMIDIDX; it is no Megatron index".into());
        }
        let number = |offset: usize| {
            let field = bytes[offset..offset + 8].try_into();
            u64::from_le_bytes(field.expect("eight bytes"))
        };
        let version = number(VERSION_OFFSET);
        if version != VERSION {
            return Err(format!("its version is {version}; only {VERSION} is known"));
        }
        let code = bytes[DTYPE_OFFSET];
        let width = Width::from_code(code)
            .ok_or_else(|| format!("dtype code {code} is not an integer type"))?;
        Ok(IndexHeader {
            width,
            sequences: number(SEQUENCES_OFFSET),
            documents: number(DOCUMENTS_OFFSET),
        })
    }

    /// Returns the length of the index in bytes, or None if it exceeds 64 bits.
    fn index_len(&self) -> Option<u64> {
        let sequences = self.sequences.checked_mul(LENGTH_BYTES + OFFSET_BYTES)?;
        let documents = self.documents.checked_mul(DOCUMENT_ENTRY)?;
        sequences.checked_add(documents)?.checked_add(HEADER as u64)
    }
}

/// An open index, of which only the header has been read.
struct Index {
    path: PathBuf,
    file: File,
    header: IndexHeader,
}

impl Index {
    fn open(prefix: &Path) -> Result<Index, Error> {
        let path = with_extension(prefix, "idx");
        let mut file = File::open(&path).map_err(Error::io("cannot open", &path))?;
        let len = file_len(&file, &path)?;
        if len < HEADER as u64 {
            let cause = format!("{len} bytes are less than its header of {HEADER}");
            return Err(damaged(&path, cause));
        }
        let mut header = [0u8; HEADER];
        file.read_exact(&mut header)
            .map_err(Error::io("cannot read", &path))?;
        let header = IndexHeader::parse(&header).map_err(|cause| damaged(&path, cause))?;
        if header.index_len().is_none_or(|needed| len < needed) {
            let cause = format!(
                "{len} bytes do not hold the {} sequences and {} document boundaries that its \
                 header announces",
                header.sequences, header.documents
            );
            return Err(damaged(&path, cause));
        }
        Ok(Index { path, file, header })
    }

    fn read_at<const N: usize>(&self, offset: u64, count: usize) -> Result<Vec<[u8; N]>, Error> {
        let mut bytes = vec![0u8; count * N];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(Error::io("cannot read", &self.path))?;
        Ok(bytes.as_chunks::<N>().0.to_vec())
    }

    /// Reads the entries of `count` sequences from `first` on.
    fn sequences(&self, first: u64, count: usize) -> Result<Vec<SequenceEntry>, Error> {
        let lengths = HEADER as u64 + first * LENGTH_BYTES;
        let offsets = HEADER as u64 + self.header.sequences * LENGTH_BYTES + first * OFFSET_BYTES;
        let lengths = self.read_at(lengths, count)?.into_iter();
        let offsets = self.read_at(offsets, count)?;
        let entries = lengths.zip(offsets).map(|(length, offset)| SequenceEntry {
            length: i32::from_le_bytes(length),
            offset: i64::from_le_bytes(offset),
        });
        Ok(entries.collect())
    }

    /// Returns the bytes of `PREFIX.bin`: the end of the last sequence.
    fn bin_bytes(&self) -> Result<u64, Error> {
        let Some(last) = self.header.sequences.checked_sub(1) else {
            return Ok(0);
        };
        let entries = self.sequences(last, 1)?;
        self.end(last, &entries[0])
    }

    /// Returns the byte after sequence `number`.
    fn end(&self, number: u64, entry: &SequenceEntry) -> Result<u64, Error> {
        let SequenceEntry { length, offset } = *entry;
        let width = self.header.width.bytes() as u64;
        let bytes = u64::try_from(length).map(|length| length * width);
        let bytes = bytes.map_err(|_| {
            let cause = format!("sequence {number} has the negative length {length}");
            damaged(&self.path, cause)
        })?;
        let start = u64::try_from(offset).ok();
        let start = start.filter(|start| start.is_multiple_of(width));
        let end = start.and_then(|start| start.checked_add(bytes));
        end.ok_or_else(|| {
            let cause = format!("sequence {number} cannot begin at byte {offset}");
            damaged(&self.path, cause)
        })
    }

    /// Reads all sequences and checks that each begins where the one before ends.
    fn verify(&self) -> Result<(), Error> {
        let mut expected = 0;
        let mut number = 0;
        while number < self.header.sequences {
            let count = (self.header.sequences - number).min(VERIFIED_AT_ONCE);
            for entry in self.sequences(number, count as usize)? {
                let end = self.end(number, &entry)?;
                if entry.offset as u64 != expected {
                    let cause = format!(
                        "sequence {number} begins at byte {}, and the one before ends at \
                         {expected}",
                        entry.offset
                    );
                    return Err(damaged(&self.path, cause));
                }
                expected = end;
                number += 1;
            }
        }
        Ok(())
    }
}

/// A sequence in the index.
struct SequenceEntry {
    /// Number of the sequence's tokens.
    length: i32,
    /// Bytes from the start of the tokens.
    offset: i64,
}

fn damaged(path: &Path, cause: String) -> Error {
    let path = path.display();
    Error::Data(format!("{path} is damaged: {cause}"))
}

/// An open pair of token files.
pub struct TokenFile {
    path: PathBuf,
    file: File,
    width: Width,
    len: u64,
}

impl TokenFile {
    /// Opens `prefix.bin` and `prefix.idx` and checks that they belong together: by the header and
    /// the last sequence of the index, however many it has. Windows are read by the number of their
    /// tokens, so the other sequences matter to nothing that is read.
    ///
    /// # Errors
    /// If one of them is missing, or damaged in what is checked.
    pub fn open(prefix: &Path) -> Result<TokenFile, Error> {
        TokenFile::of_index(&Index::open(prefix)?, prefix)
    }

    /// Opens the files as [`TokenFile::open`] does, and reads the whole index, a part at a time.
    ///
    /// # Errors
    /// If one of them is missing or damaged; the message names the first damaged sequence.
    pub fn open_verified(prefix: &Path) -> Result<TokenFile, Error> {
        let index = Index::open(prefix)?;
        let opened = TokenFile::of_index(&index, prefix)?;
        index.verify()?;
        Ok(opened)
    }

    fn of_index(index: &Index, prefix: &Path) -> Result<TokenFile, Error> {
        let path = with_extension(prefix, "bin");
        let width = index.header.width;
        let expected = index.bin_bytes()?;
        let len = expected / width.bytes() as u64;
        let file = File::open(&path).map_err(Error::io("cannot open", &path))?;
        let bytes = file_len(&file, &path)?;
        if bytes != expected {
            return Err(Error::Data(format!(
                "{} has {bytes} bytes, but its index announces {len} tokens of {} bytes = \
                 {expected}: it is truncated or belongs to another index",
                path.display(),
                width.bytes()
            )));
        }
        Ok(TokenFile {
            path,
            file,
            width,
            len,
        })
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns true if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the path of the `.bin` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the tokens `start..start + count`.
    ///
    /// # Errors
    /// If the file cannot be read there.
    pub fn read(&self, start: u64, count: usize) -> Result<Vec<i64>, Error> {
        let mut bytes = vec![0u8; count * self.width.bytes()];
        let offset = start * self.width.bytes() as u64;
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(Error::io("cannot read", &self.path))?;
        Ok(self.width.decode(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::TokenWriter;

    fn written(vocab: usize) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("text.v1");
        let mut writer = TokenWriter::create(&prefix, vocab).unwrap();
        writer.push(&[1, 2, 3]).unwrap();
        writer.push(&[]).unwrap();
        writer.push(&[(vocab - 1) as u32, 5]).unwrap();
        writer.finish().unwrap();
        (folder, prefix)
    }

    #[test]
    fn what_is_written_is_read() {
        for vocab in [1 << 16, 100_000] {
            let (_folder, prefix) = written(vocab);
            let file = TokenFile::open(&prefix).unwrap();
            assert_eq!(file.len(), 5);
            assert_eq!(file.read(0, 5).unwrap(), [1, 2, 3, vocab as i64 - 1, 5]);
            assert_eq!(file.read(2, 2).unwrap(), [3, vocab as i64 - 1]);
            assert!(file.read(4, 2).is_err());
        }
    }

    #[test]
    fn damage_is_named() {
        let (_folder, prefix) = written(1000);
        let bin = with_extension(&prefix, "bin");
        let idx = with_extension(&prefix, "idx");
        let message = |prefix: &Path| TokenFile::open(prefix).err().unwrap().to_string();
        let good = (std::fs::read(&bin).unwrap(), std::fs::read(&idx).unwrap());
        std::fs::write(&bin, &good.0[..9]).unwrap();
        assert!(
            message(&prefix).contains("text.v1.bin has 9 bytes, but its index announces 5 tokens")
        );
        std::fs::write(&bin, &good.0).unwrap();
        // Lengths are at 34, 38 and 42, offsets at 46, 54 and 62.
        let verified = |prefix: &Path| TokenFile::open_verified(prefix).map(|file| file.len());
        assert_eq!(verified(&prefix).unwrap(), 5);
        for (at, byte, found_at_once, cause) in [
            (
                45,
                0x80,
                true,
                "sequence 2 has the negative length -2147483646",
            ),
            (69, 0x80, true, "sequence 2 cannot begin at byte"),
            (62, 7, true, "sequence 2 cannot begin at byte 7"),
            (
                37,
                0x80,
                false,
                "sequence 0 has the negative length -2147483645",
            ),
            (
                38,
                1,
                false,
                "sequence 2 begins at byte 6, and the one before ends at 8",
            ),
            (
                54,
                4,
                false,
                "sequence 1 begins at byte 4, and the one before ends at 6",
            ),
        ] {
            let mut index = good.1.clone();
            index[at] = byte;
            std::fs::write(&idx, index).unwrap();
            let found = verified(&prefix).unwrap_err().to_string();
            let expected = format!("text.v1.idx is damaged: {cause}");
            assert!(found.contains(&expected), "{found}");
            let opened = TokenFile::open(&prefix);
            assert_eq!(opened.is_err(), found_at_once, "{cause}");
            if let Ok(tokens) = opened {
                assert_eq!(tokens.read(0, 5).unwrap(), [1, 2, 3, 999, 5], "{cause}");
            }
        }
        std::fs::write(&idx, &good.1[..40]).unwrap();
        assert!(
            message(&prefix)
                .contains("text.v1.idx is damaged: 40 bytes do not hold the 3 sequences")
        );
        std::fs::write(&idx, b"nonsense that is long enough to be a header").unwrap();
        assert!(message(&prefix).contains("it is no Megatron index"));
        std::fs::remove_file(&idx).unwrap();
        assert!(
            message(&prefix).contains("cannot open") && message(&prefix).contains("text.v1.idx")
        );
    }
}
