//! Whole pairs of token files: their documents in order, every field checked.

use super::{
    file::damaged,
    layout::{HEADER, Width, with_extension},
    megatron::Index,
    writer::{TokenWriter, WrittenPair},
};
use crate::Error;
use std::{
    fs::File,
    io::{BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes of the index for the length of a sequence.
const LENGTH_BYTES: u64 = 4;

/// Bytes of the index for an offset, and for a document boundary.
const WORD_BYTES: u64 = 8;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// A pair of token files that is read from beginning to end, with bounded memory.
pub struct TokenPair {
    bin: PathBuf,
    idx: PathBuf,
    width: Width,
    sequences: u64,
}

/// Tokens of a document, or a part of them.
pub struct TokenPart<'a> {
    /// Number of the document in the pair.
    pub document: u64,
    /// Its next tokens. Empty for an empty document.
    pub tokens: &'a [u32],
    /// The tokens as they are in the file.
    bytes: &'a [u8],
    /// True for the last part of a document.
    pub ends_document: bool,
}

impl TokenPair {
    /// Reads the header of `prefix.idx` and checks the sizes of both files.
    ///
    /// # Errors
    /// If a file is missing or its size does not fit the header.
    pub fn open(prefix: &Path) -> Result<TokenPair, Error> {
        let bin = with_extension(prefix, "bin");
        let idx = with_extension(prefix, "idx");
        let Index { header, len, .. } = Index::open(prefix)?;
        if header.sequences.checked_add(1) != Some(header.documents) {
            return Err(Error::Data(format!(
                "{}: {} sequences and {} document boundaries: only files with one sequence per \
                 document are supported",
                idx.display(),
                header.sequences,
                header.documents
            )));
        }
        if header.index_len() != Some(len) {
            let cause = format!(
                "it has {len} bytes, which are not those of the {} sequences that its header \
                 announces",
                header.sequences
            );
            return Err(damaged(&idx, cause));
        }
        Ok(TokenPair {
            bin,
            idx,
            width: header.width,
            sequences: header.sequences,
        })
    }

    /// Returns the number of documents.
    pub fn documents(&self) -> u64 {
        self.sequences
    }

    /// Returns the integer type of the tokens, as in `dataset.json`.
    pub fn dtype(&self) -> &'static str {
        self.width.name()
    }

    /// Returns the document that contains a token, and the number of its first token.
    ///
    /// # Errors
    /// If the index cannot be read, or has no such token.
    pub fn document_of(&self, token: u64) -> Result<(u64, u64), Error> {
        let file = File::open(&self.idx).map_err(Error::io("cannot open", &self.idx))?;
        let wanted = token * self.width.bytes() as u64;
        // The last document that begins at or before the token.
        let mut low = 0;
        let mut high = self.sequences;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.offset(&file, middle)? <= wanted {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let document = low
            .checked_sub(1)
            .ok_or_else(|| Error::Data(format!("{} has no token {token}", self.idx.display())))?;
        let start = self.offset(&file, document)? / self.width.bytes() as u64;
        Ok((document, start))
    }

    /// Returns the numbers of a document's first token and of the token after its last one.
    ///
    /// # Errors
    /// If the index cannot be read, or has no such document.
    pub fn span(&self, document: u64) -> Result<(u64, u64), Error> {
        if document >= self.sequences {
            return Err(Error::Options(format!(
                "{} has no document {document}: it has {}",
                self.idx.display(),
                self.sequences
            )));
        }
        let file = File::open(&self.idx).map_err(Error::io("cannot open", &self.idx))?;
        let mut length = [0u8; 4];
        file.read_exact_at(&mut length, HEADER as u64 + document * LENGTH_BYTES)
            .map_err(Error::io("cannot read", &self.idx))?;
        let start = self.offset(&file, document)? / self.width.bytes() as u64;
        let length = u64::try_from(i32::from_le_bytes(length)).map_err(|_| {
            damaged(
                &self.idx,
                format!("the length of document {document} is negative"),
            )
        })?;
        Ok((start, start.saturating_add(length)))
    }

    fn offset(&self, file: &File, sequence: u64) -> Result<u64, Error> {
        let mut offset = [0u8; 8];
        let at = HEADER as u64 + self.sequences * LENGTH_BYTES + sequence * WORD_BYTES;
        file.read_exact_at(&mut offset, at)
            .map_err(Error::io("cannot read", &self.idx))?;
        Ok(u64::from_le_bytes(offset))
    }

    /// Reads the whole pair, checks every field, and passes the tokens of all documents to `take`.
    ///
    /// # Errors
    /// If the pair is damaged; the message names the first damaged place. Errors of `take`.
    pub fn read(
        &self,
        take: &mut dyn FnMut(TokenPart) -> Result<(), Error>,
    ) -> Result<WrittenPair, Error> {
        let mut lengths = Column::open(&self.idx, HEADER as u64)?;
        let offsets = HEADER as u64 + self.sequences * LENGTH_BYTES;
        let mut pointers = Column::open(&self.idx, offsets)?;
        let mut boundaries = Column::open(&self.idx, offsets + self.sequences * WORD_BYTES)?;
        let mut tokens = Tokens::open(&self.bin, self.width)?;
        let first = i64::from_le_bytes(boundaries.next()?);
        if first != 0 {
            let cause = format!("document boundary 0 is {first} instead of 0");
            return Err(damaged(&self.idx, cause));
        }
        for document in 0..self.sequences {
            let length = i32::from_le_bytes(lengths.next()?);
            let length = u64::try_from(length).map_err(|_| {
                let cause = format!("sequence {document} has the negative length {length}");
                damaged(&self.idx, cause)
            })?;
            let pointer = i64::from_le_bytes(pointers.next()?);
            let expected = tokens.position * self.width.bytes() as u64;
            if u64::try_from(pointer) != Ok(expected) {
                let cause = format!(
                    "sequence {document} begins at byte {pointer}, and the one before ends at \
                     {expected}"
                );
                return Err(damaged(&self.idx, cause));
            }
            let boundary = i64::from_le_bytes(boundaries.next()?);
            if u64::try_from(boundary) != Ok(document + 1) {
                let number = document + 1;
                let cause = format!("document boundary {number} is {boundary} instead of {number}");
                return Err(damaged(&self.idx, cause));
            }
            tokens.pass(document, length, take)?;
        }
        Ok(WrittenPair {
            documents: self.sequences,
            tokens: tokens.position,
            bin: tokens.finish()?,
            idx: hash_file(&self.idx)?,
        })
    }

    /// Returns a writer of tokens of this pair's width.
    ///
    /// # Errors
    /// If the files cannot be created.
    pub fn writer_like(&self, prefix: &Path) -> Result<TokenWriter, Error> {
        TokenWriter::with_width(prefix, self.width, usize::MAX)
    }

    /// Appends all documents to a writer of the same width.
    ///
    /// # Errors
    /// If the pair is damaged, or the disk is full.
    pub fn append_to(
        &self,
        writer: &mut TokenWriter,
        look: &mut dyn FnMut(&TokenPart),
    ) -> Result<WrittenPair, Error> {
        self.read(&mut |part| {
            look(&part);
            writer.append_encoded(part.bytes)?;
            if part.ends_document {
                writer.end_document()
            } else {
                Ok(())
            }
        })
    }
}

/// Returns the BLAKE3 hash of a file, in hexadecimal digits.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file(path: &Path) -> Result<String, Error> {
    let file = File::open(path).map_err(Error::io("cannot open", path))?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(file)
        .map_err(Error::io("cannot read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// A column of the index, entry by entry.
struct Column<'a> {
    path: &'a Path,
    reader: BufReader<File>,
}

impl Column<'_> {
    fn open(path: &Path, offset: u64) -> Result<Column<'_>, Error> {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
        file.seek(SeekFrom::Start(offset))
            .map_err(Error::io("cannot read", path))?;
        let reader = BufReader::with_capacity(BUFFER, file);
        Ok(Column { path, reader })
    }

    fn next<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut entry = [0u8; N];
        self.reader
            .read_exact(&mut entry)
            .map_err(Error::io("cannot read", self.path))?;
        Ok(entry)
    }
}

/// The tokens of a `.bin` file, in order.
struct Tokens<'a> {
    path: &'a Path,
    file: File,
    width: Width,
    /// Number of the next token.
    position: u64,
    hasher: blake3::Hasher,
    bytes: Vec<u8>,
    decoded: Vec<u32>,
}

impl Tokens<'_> {
    fn open(path: &Path, width: Width) -> Result<Tokens<'_>, Error> {
        Ok(Tokens {
            path,
            file: File::open(path).map_err(Error::io("cannot open", path))?,
            width,
            position: 0,
            hasher: blake3::Hasher::new(),
            bytes: Vec::new(),
            decoded: Vec::new(),
        })
    }

    /// Passes the next `length` tokens.
    fn pass(
        &mut self,
        document: u64,
        length: u64,
        take: &mut dyn FnMut(TokenPart) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut left = length;
        loop {
            let count = left.min((BUFFER / self.width.bytes()) as u64);
            left -= count;
            self.load(document, count as usize)?;
            take(TokenPart {
                document,
                tokens: &self.decoded,
                bytes: &self.bytes,
                ends_document: left == 0,
            })?;
            if left == 0 {
                return Ok(());
            }
        }
    }

    fn load(&mut self, document: u64, count: usize) -> Result<(), Error> {
        self.bytes.resize(count * self.width.bytes(), 0);
        self.file.read_exact(&mut self.bytes).map_err(|cause| {
            if cause.kind() == std::io::ErrorKind::UnexpectedEof {
                let cause = format!("it ends inside of document {document}");
                return damaged(self.path, cause);
            }
            Error::io("cannot read", self.path)(cause)
        })?;
        self.hasher.update(&self.bytes);
        self.decoded.clear();
        for (index, token) in self.width.decode(&self.bytes).into_iter().enumerate() {
            let token = u32::try_from(token).map_err(|_| {
                let number = self.position + index as u64;
                let cause = format!("token {number}, in document {document}, is {token}");
                damaged(self.path, cause)
            })?;
            self.decoded.push(token);
        }
        self.position += count as u64;
        Ok(())
    }

    /// Checks that nothing is left, and returns the hash.
    fn finish(&mut self) -> Result<String, Error> {
        let rest = self.file.read(&mut [0u8; 1]);
        if rest.map_err(Error::io("cannot read", self.path))? != 0 {
            let bytes = self.position * self.width.bytes() as u64;
            let cause = format!("it has more than the {bytes} bytes that its index announces");
            return Err(damaged(self.path, cause));
        }
        Ok(self.hasher.finalize().to_hex().to_string())
    }
}
