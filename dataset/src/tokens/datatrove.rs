//! Reader of the token files of datatrove, which Nanotron's Nanoset reads.
//!
//! - `NAME.ds`: u16 or u32 tokens, little-endian, without header
//! - `NAME.ds.index`: a u64 for each document, the number of tokens up to its end
//! - `NAME.ds.metadata`: text; its first line is the name of the tokenizer, `|`, and the bytes of a
//!   token, and its second line the number of tokens
//!
//! The index and the metadata may be missing.

use super::{
    file::{TokenFile, damaged},
    layout::{Width, with_extension},
};
use crate::Error;
use std::{
    fs::File,
    io::{BufReader, ErrorKind, Read},
    path::Path,
};

/// Bytes of the index for a document.
const INDEX_ENTRY: u64 = 8;

/// Bytes of metadata that are read.
const MAX_METADATA: u64 = 4096;

/// The contents of the metadata.
struct Metadata {
    width: Width,
    /// Number of tokens in the file.
    tokens: Option<u64>,
}

/// Opens the file. `width` is needed if there is no metadata.
pub(super) fn open(path: &Path, width: Option<Width>) -> Result<TokenFile, Error> {
    let metadata = read_metadata(path)?;
    let recorded = metadata.as_ref().map(|metadata| metadata.width);
    let width = match (width, recorded) {
        (Some(given), Some(recorded)) if given != recorded => {
            return Err(Error::Data(format!(
                "{} has tokens of {} bytes by its metadata, and dtype has {}: leave dtype out",
                path.display(),
                recorded.bytes(),
                given.bytes()
            )));
        }
        (Some(width), _) | (None, Some(width)) => width,
        (None, None) => {
            let path = path.display();
            return Err(Error::Data(format!(
                "{path} has no {path}.metadata, so its dtype is unknown: give dtype: u16 or u32"
            )));
        }
    };
    let opened = TokenFile::open_array(path, width)?;
    let announced = metadata.and_then(|metadata| metadata.tokens);
    let is_whole = opened.bytes().is_multiple_of(width.bytes() as u64);
    match announced {
        Some(tokens) if tokens != opened.len() || !is_whole => Err(damaged(
            path,
            format!(
                "its metadata announces {tokens} tokens of {} bytes, and it has {} bytes",
                width.bytes(),
                opened.bytes()
            ),
        )),
        None if !is_whole => Err(damaged(
            path,
            format!(
                "{} bytes are no whole number of tokens of {} bytes",
                opened.bytes(),
                width.bytes()
            ),
        )),
        _ => Ok(opened),
    }
}

/// Opens the file as [`open`] does, and checks the index if there is one.
pub(super) fn open_verified(path: &Path, width: Option<Width>) -> Result<TokenFile, Error> {
    let opened = open(path, width)?;
    let index = with_extension(path, "index");
    let file = match File::open(&index) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(opened),
        Err(error) => return Err(Error::io("cannot open", &index)(error)),
    };
    let len = super::file::file_len(&file, &index)?;
    if !len.is_multiple_of(INDEX_ENTRY) {
        let cause = format!("{len} bytes are no whole number of documents");
        return Err(damaged(&index, cause));
    }
    let mut file = BufReader::new(file);
    let mut last = 0;
    for number in 0..len / INDEX_ENTRY {
        let mut end = [0u8; INDEX_ENTRY as usize];
        file.read_exact(&mut end)
            .map_err(Error::io("cannot read", &index))?;
        let end = u64::from_le_bytes(end);
        if end < last {
            let cause =
                format!("document {number} ends at token {end}, and the one before at {last}");
            return Err(damaged(&index, cause));
        }
        last = end;
    }
    if last == opened.len() {
        return Ok(opened);
    }
    let cause = format!(
        "its documents end at token {last}, and {} has {}",
        path.display(),
        opened.len()
    );
    Err(damaged(&index, cause))
}

fn read_metadata(path: &Path) -> Result<Option<Metadata>, Error> {
    let path = with_extension(path, "metadata");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("cannot open", &path)(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_METADATA)
        .read_to_end(&mut text)
        .map_err(Error::io("cannot read", &path))?;
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    let size = lines.next().and_then(|line| line.rsplit('|').next());
    let width = match size.map(str::trim) {
        Some("2") => Width::U16,
        Some("4") => Width::U32,
        _ => {
            let cause = "its first line does not end with |2 or |4, the bytes of a token";
            return Err(damaged(&path, cause.into()));
        }
    };
    let tokens = lines.next().and_then(|line| line.trim().parse().ok());
    Ok(Some(Metadata { width, tokens }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("00000_tokens.ds");
        let metadata = with_extension(&path, "metadata");
        let index = with_extension(&path, "index");
        std::fs::write(&path, [1, 0, 2, 0, 3, 0, 9, 1]).unwrap();
        let refused = |width| open_verified(&path, width).err().unwrap().to_string();
        assert!(refused(None).contains("give dtype: u16 or u32"));
        let opened = open_verified(&path, Some(Width::U16)).unwrap();
        assert_eq!(opened.read(1, 3).unwrap(), [2, 3, 265]);

        std::fs::write(&metadata, "gpt2|2\n4\n4 tokens").unwrap();
        assert_eq!(open_verified(&path, None).unwrap().len(), 4);
        assert!(refused(Some(Width::U32)).contains("leave dtype out"));
        let ends = |ends: &[u64]| {
            let bytes: Vec<u8> = ends.iter().flat_map(|end| end.to_le_bytes()).collect();
            std::fs::write(&index, bytes).unwrap();
        };
        ends(&[1, 4]);
        assert_eq!(open_verified(&path, None).unwrap().len(), 4);
        ends(&[3, 1]);
        assert!(refused(None).contains("document 1 ends at token 1, and the one before at 3"));
        ends(&[1, 3]);
        assert!(refused(None).contains("its documents end at token 3"));
        ends(&[1, 4]);
        std::fs::write(&metadata, "Unknown Tokenizer|4|4\n4\n").unwrap();
        assert!(refused(None).contains("announces 4 tokens of 4 bytes, and it has 8 bytes"));
        std::fs::write(&metadata, "something\n").unwrap();
        assert!(refused(None).contains("metadata is damaged"));
    }
}
