//! Reader of Megatron-LM's indexed data sets: pairs of token files.

use super::file::{TokenFile, damaged, file_len};
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

/// The counts in the header of an index.
pub(super) struct IndexHeader {
    pub(super) width: Width,
    pub(super) sequences: u64,
    /// Number of document boundaries.
    pub(super) documents: u64,
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
    pub(super) fn index_len(&self) -> Option<u64> {
        let sequences = self.sequences.checked_mul(LENGTH_BYTES + OFFSET_BYTES)?;
        let documents = self.documents.checked_mul(DOCUMENT_ENTRY)?;
        sequences.checked_add(documents)?.checked_add(HEADER as u64)
    }
}

/// An open index, of which only the header has been read.
pub(super) struct Index {
    path: PathBuf,
    file: File,
    pub(super) header: IndexHeader,
    /// Bytes of the file.
    pub(super) len: u64,
}

impl Index {
    pub(super) fn open(prefix: &Path) -> Result<Index, Error> {
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
        Ok(Index {
            path,
            file,
            header,
            len,
        })
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

    /// Reads the whole index and checks it.
    fn verify(&self) -> Result<(), Error> {
        self.verify_sequences()?;
        self.verify_documents()
    }

    /// Reads all sequences and checks that each begins where the one before ends.
    fn verify_sequences(&self) -> Result<(), Error> {
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

    /// Reads all document boundaries and checks that they divide the sequences: from 0 to their
    /// number, in ascending order.
    fn verify_documents(&self) -> Result<(), Error> {
        let sequences = self.header.sequences;
        let start = HEADER as u64 + sequences * (LENGTH_BYTES + OFFSET_BYTES);
        let mut number = 0;
        let mut last = 0;
        while number < self.header.documents {
            let count = (self.header.documents - number).min(VERIFIED_AT_ONCE);
            let entries = self.read_at(start + number * DOCUMENT_ENTRY, count as usize)?;
            for boundary in entries.into_iter().map(i64::from_le_bytes) {
                let is_first_wrong = number == 0 && boundary != 0;
                if is_first_wrong || boundary < last || boundary as u64 > sequences {
                    let cause = format!(
                        "document boundary {number} is at sequence {boundary}, after {last} and \
                         with {sequences} sequences"
                    );
                    return Err(damaged(&self.path, cause));
                }
                last = boundary;
                number += 1;
            }
        }
        if last as u64 == sequences {
            return Ok(());
        }
        let cause = format!("its documents end at sequence {last} of {sequences}");
        Err(damaged(&self.path, cause))
    }

    /// Opens the tokens that the index describes.
    fn open_tokens(&self, prefix: &Path) -> Result<TokenFile, Error> {
        let path = with_extension(prefix, "bin");
        let width = self.header.width;
        let expected = self.bin_bytes()?;
        let len = expected / width.bytes() as u64;
        let opened = TokenFile::open_array(&path, width)?;
        if opened.len() == len && opened.bytes() == expected {
            return Ok(opened);
        }
        Err(Error::Data(format!(
            "{} has {} bytes, but its index announces {len} tokens of {} bytes = {expected}: it \
             is truncated or belongs to another index",
            path.display(),
            opened.bytes(),
            width.bytes()
        )))
    }
}

/// A sequence in the index.
struct SequenceEntry {
    /// Number of the sequence's tokens.
    length: i32,
    /// Bytes from the start of the tokens.
    offset: i64,
}

/// Opens a pair and checks that both files belong together: by the header and the last sequence of
/// the index, however many it has. Windows are read by the number of their tokens, so the other
/// sequences matter to nothing that is read.
pub(super) fn open(prefix: &Path) -> Result<TokenFile, Error> {
    Index::open(prefix)?.open_tokens(prefix)
}

/// Opens a pair as [`open`] does, and reads and checks the whole index, a part at a time.
pub(super) fn open_verified(prefix: &Path) -> Result<TokenFile, Error> {
    let index = Index::open(prefix)?;
    let opened = index.open_tokens(prefix)?;
    index.verify()?;
    Ok(opened)
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
            let file = open(&prefix).unwrap();
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
        let message = |prefix: &Path| open(prefix).err().unwrap().to_string();
        let good = (std::fs::read(&bin).unwrap(), std::fs::read(&idx).unwrap());
        std::fs::write(&bin, &good.0[..9]).unwrap();
        assert!(
            message(&prefix).contains("text.v1.bin has 9 bytes, but its index announces 5 tokens")
        );
        std::fs::write(&bin, &good.0).unwrap();
        // Lengths are at 34, 38 and 42, offsets at 46, 54 and 62.
        let verified = |prefix: &Path| open_verified(prefix).map(|file| file.len());
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
            // Document boundaries are at 70, 78, 86 and 94.
            (
                70,
                1,
                false,
                "document boundary 0 is at sequence 1, after 0 and with 3 sequences",
            ),
            (
                78,
                9,
                false,
                "document boundary 1 is at sequence 9, after 0 and with 3 sequences",
            ),
            (
                86,
                0,
                false,
                "document boundary 2 is at sequence 0, after 1 and with 3 sequences",
            ),
            (
                101,
                0x80,
                false,
                "document boundary 3 is at sequence -9223372036854775805, after 2",
            ),
            (94, 2, false, "its documents end at sequence 2 of 3"),
        ] {
            let mut index = good.1.clone();
            index[at] = byte;
            std::fs::write(&idx, index).unwrap();
            let found = verified(&prefix).unwrap_err().to_string();
            let expected = format!("text.v1.idx is damaged: {cause}");
            assert!(found.contains(&expected), "{found}");
            let opened = open(&prefix);
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
