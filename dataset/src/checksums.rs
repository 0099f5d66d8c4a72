//! Comparison of token files with the checksums that `dataset.json` records.

use crate::{
    Error,
    info::DatasetInfo,
    tokens::{TokenPath, hash_file},
};

/// Result of a comparison that found no difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// The files are those that were written.
    Match,
    /// No `dataset.json` records checksums of the files.
    Missing,
}

/// Reads token files whole and compares them with their recorded checksums.
///
/// # Errors
/// If a file cannot be read, or is not the one that was recorded.
pub fn verify_checksums(path: &TokenPath) -> Result<Checksums, Error> {
    let info = DatasetInfo::of_tokens(path.path)?;
    let Some(recorded) = info.as_ref().and_then(|info| info.file(path.path)) else {
        return Ok(Checksums::Missing);
    };
    let mut compared = 0;
    for (file, expected) in path.files().iter().zip([&recorded.bin, &recorded.idx]) {
        if expected.is_empty() {
            continue;
        }
        compared += 1;
        let found = hash_file(file)?;
        if found != *expected {
            return Err(Error::Data(format!(
                "{} is not the file that dataset.json records: its BLAKE3 hash is {found} instead \
                 of {expected}. Prepare the data again, or restore the file",
                file.display()
            )));
        }
    }
    Ok(match compared {
        0 => Checksums::Missing,
        _ => Checksums::Match,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        info::{FileInfo, INFO_FILE},
        tokens::TokenWriter,
    };

    #[test]
    fn a_changed_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        let mut writer = TokenWriter::create(&prefix, 100).unwrap();
        writer.push(&[1, 2, 3]).unwrap();
        writer.finish().unwrap();
        let verify = || verify_checksums(&TokenPath::megatron(&prefix));
        assert_eq!(verify().unwrap(), Checksums::Missing);
        let bin = folder.path().join("train.bin");
        let idx = folder.path().join("train.idx");
        let file = FileInfo {
            documents: 1,
            tokens: 3,
            bytes: 3,
            bin: hash_file(&bin).unwrap(),
            idx: hash_file(&idx).unwrap(),
        };
        let info = DatasetInfo {
            files: [("train".to_string(), file)].into(),
            ..DatasetInfo::default()
        };
        let text = serde_json::to_string(&info).unwrap();
        std::fs::write(folder.path().join(INFO_FILE), text).unwrap();
        assert_eq!(verify().unwrap(), Checksums::Match);
        for path in [bin, idx] {
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            let last = bad.len() - 1;
            bad[last] ^= 1;
            std::fs::write(&path, bad).unwrap();
            let refused = verify().unwrap_err().to_string();
            let name = path.display().to_string();
            assert!(refused.starts_with(&name), "{refused}");
            std::fs::write(&path, good).unwrap();
        }
        assert_eq!(verify().unwrap(), Checksums::Match);
    }
}
