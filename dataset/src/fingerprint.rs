//! Fingerprints of token files, by which a run that resumes notices other contents.

use crate::{
    Error,
    info::DatasetInfo,
    tokens::{TokenFile, TokenPath},
};
use serde::{Deserialize, Serialize};

/// Parts of a file that are read.
const SAMPLES: u64 = 32;

/// Bytes of a part.
const SAMPLE_BYTES: u64 = 4096;

/// The contents of token files, wherever they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Tokens in the whole file.
    pub tokens: u64,
    /// BLAKE3 hash of the size and of evenly spaced parts of the tokens, in hexadecimal digits.
    pub sample: String,
    /// BLAKE3 hash of all tokens as `dataset.json` records it, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded: Option<String>,
}

impl Fingerprint {
    /// Reads some parts of the files, at most 128 KiB. `info` is their record, if there is one.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn of(path: &TokenPath, info: Option<&DatasetInfo>) -> Result<Fingerprint, Error> {
        let file = TokenFile::open_path(path)?;
        let recorded = info.and_then(|info| Some(info.file(path.path)?.bin.clone()));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&file.bytes().to_le_bytes());
        for offset in offsets(file.bytes()) {
            let count = SAMPLE_BYTES.min(file.bytes() - offset);
            hasher.update(&file.read_bytes(offset, count as usize)?);
        }
        Ok(Fingerprint {
            tokens: file.len(),
            sample: hasher.finalize().to_hex().to_string(),
            recorded,
        })
    }

    /// Returns true unless the contents differ. A checksum counts if both have one.
    pub fn matches(&self, other: &Fingerprint) -> bool {
        let recorded = self.recorded.as_ref().zip(other.recorded.as_ref());
        self.tokens == other.tokens
            && self.sample == other.sample
            && recorded.is_none_or(|(one, other)| one == other)
    }
}

/// Returns the starts of the parts of a file of `bytes` bytes: the first and the last, and others
/// between them.
fn offsets(bytes: u64) -> Vec<u64> {
    let last = bytes.saturating_sub(SAMPLE_BYTES);
    if last <= SAMPLE_BYTES * SAMPLES {
        return (0..bytes).step_by(SAMPLE_BYTES as usize).collect();
    }
    let offset =
        |index: u64| (u128::from(last) * u128::from(index) / u128::from(SAMPLES - 1)) as u64;
    (0..SAMPLES).map(offset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        info::{FileInfo, INFO_FILE},
        tokens::TokenWriter,
    };
    use std::path::Path;

    fn write(prefix: &Path, tokens: &[u32]) {
        let mut writer = TokenWriter::create(prefix, 70_000).unwrap();
        writer.push(tokens).unwrap();
        writer.finish().unwrap();
    }

    fn fingerprint(prefix: &Path) -> Fingerprint {
        let info = DatasetInfo::of_tokens(prefix).unwrap();
        Fingerprint::of(&TokenPath::megatron(prefix), info.as_ref()).unwrap()
    }

    #[test]
    fn contents_count_and_places_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        let mut tokens: Vec<u32> = (0..2000).collect();
        write(&prefix, &tokens);
        write(&other.path().join("moved"), &tokens);
        let first = fingerprint(&prefix);
        assert!(first.matches(&fingerprint(&other.path().join("moved"))));
        tokens[1234] = 9;
        write(&prefix, &tokens);
        assert!(!first.matches(&fingerprint(&prefix)));
        tokens.pop();
        write(&prefix, &tokens);
        assert!(!first.matches(&fingerprint(&prefix)));
    }

    #[test]
    fn recorded_checksums_are_compared_if_both_exist() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        write(&prefix, &[1, 2, 3]);
        let plain = fingerprint(&prefix);
        let with_checksum = |bin: &str| {
            let file = FileInfo {
                documents: 1,
                tokens: 3,
                bytes: 3,
                bin: bin.into(),
                idx: String::new(),
            };
            let info = DatasetInfo {
                files: [("train".to_string(), file)].into(),
                ..DatasetInfo::default()
            };
            let text = serde_json::to_string(&info).unwrap();
            std::fs::write(folder.path().join(INFO_FILE), text).unwrap();
            fingerprint(&prefix)
        };
        let one = with_checksum("1");
        assert!(plain.matches(&one) && one.matches(&plain) && one.matches(&one));
        assert!(!one.matches(&with_checksum("2")));
    }

    #[test]
    fn parts_cover_small_files_and_span_large_ones() {
        assert_eq!(offsets(0), [0; 0]);
        assert_eq!(offsets(10), [0]);
        assert_eq!(offsets(8193), [0, 4096, 8192]);
        let bytes = 1 << 40;
        let large = offsets(bytes);
        assert_eq!(large.len(), 32);
        assert_eq!((large[0], large[31]), (0, bytes - SAMPLE_BYTES));
        assert!(large.is_sorted());
    }
}
