//! The manifest, which lists the files of a checkpoint and the tensors in them.

use crate::{Error, checksum::crc32c, run_folder::is_plain_name, slice::SliceEntry, tiling};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The version of the format that this code writes and reads.
pub(crate) const FORMAT: u32 = 2;

/// The name of the manifest in the folder of a checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The key of the manifest's own checksum: the CRC-32C of the other keys as compact JSON. Earlier
/// versions ignore the key.
const CHECKSUM_KEY: &str = "crc32c";

/// The contents of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
// A damaged name of the checksum's key must not turn the manifest into one without a checksum.
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the format.
    pub format: u32,
    /// Optimizer steps that were done.
    pub step: u64,
    /// Whatever the writer needs when it resumes, such as its configuration.
    pub state: Value,
    /// The shards, in the order of their numbers.
    pub files: Vec<FileEntry>,
    /// The tensors by their global names.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// A manifest that was read.
pub(crate) struct ParsedManifest {
    pub(crate) manifest: Manifest,
    /// The checksum, which manifests of earlier versions lack.
    pub(crate) checksum: Option<u32>,
}

impl Manifest {
    /// Returns the number of elements of the tensors that `counts` selects by name.
    pub fn elements(&self, counts: impl Fn(&str) -> bool) -> u64 {
        let counted = self.tensors.iter().filter(|(name, _)| counts(name));
        counted
            .map(|(_, entry)| entry.shape.iter().map(|&size| size as u64).product::<u64>())
            .sum()
    }

    /// Returns the text of the manifest with its checksum.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut value = serde_json::to_value(self).expect("plain data");
        let checksum = checksum_of(&value);
        value[CHECKSUM_KEY] = checksum.into();
        serde_json::to_vec_pretty(&value).expect("plain data")
    }

    /// Parses the text of the manifest `path`, and checks it against its checksum and itself.
    ///
    /// # Errors
    /// If it is damaged, of another format, names a file outside of its folder, or does not hold
    /// every element of every tensor once.
    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<ParsedManifest, Error> {
        let damaged = |reason: String| Error::damaged(path, reason);
        let invalid = |error: serde_json::Error| Error::damaged(path, error.to_string());
        let mut value: Value = serde_json::from_slice(text).map_err(invalid)?;
        let checksum = take_checksum(&mut value).map_err(damaged)?;
        check_format(&value, path)?;
        let manifest: Manifest = serde_json::from_value(value).map_err(invalid)?;
        manifest.check().map_err(damaged)?;
        Ok(ParsedManifest { manifest, checksum })
    }

    /// Checks names, numbers of files, and that the slices of each tensor cover it exactly once.
    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut bytes = 0u64;
        for FileEntry {
            name,
            bytes: of_file,
            ..
        } in &self.files
        {
            // Names reach the terminal.
            if !is_plain_name(name) || name == MANIFEST || has_control(name) {
                return Err(format!("{name:?} is no name of a shard in this folder"));
            }
            if !names.insert(name) {
                return Err(format!("{name} is listed twice"));
            }
            bytes = bytes.saturating_add(*of_file);
        }
        let mut elements = 0u64;
        for (name, entry) in &self.tensors {
            if has_control(name) {
                return Err(format!("{name:?} is no name of a tensor"));
            }
            let mut slices = entry.slices.iter();
            if let Some(slice) = slices.find(|slice| slice.file >= self.files.len()) {
                let file = slice.file;
                return Err(format!(
                    "{name} has a slice in shard {file}, which is not listed"
                ));
            }
            tiling::check_tiling(&entry.shape, &entry.slices)
                .map_err(|reason| format!("{name} {reason}"))?;
            let of_tensor = tiling::elements(&entry.shape).unwrap_or(0);
            elements = elements.saturating_add(of_tensor.unsigned_abs());
        }
        // Each element has at least one byte. Memory is reserved by the elements.
        if elements > bytes {
            return Err(format!(
                "{elements} values cannot be in shards of {bytes} bytes"
            ));
        }
        Ok(())
    }
}

fn has_control(name: &str) -> bool {
    name.chars().any(char::is_control)
}

fn checksum_of(value: &Value) -> u32 {
    crc32c(&serde_json::to_vec(value).expect("plain data"))
}

/// Removes the checksum and compares it with the rest. Returns `None` if there is none.
fn take_checksum(value: &mut Value) -> Result<Option<u32>, String> {
    let keys = value.as_object_mut();
    let Some(saved) = keys.and_then(|keys| keys.shift_remove(CHECKSUM_KEY)) else {
        return Ok(None);
    };
    let found = checksum_of(value);
    if saved.as_u64() == Some(u64::from(found)) {
        return Ok(Some(found));
    }
    Err(format!("its checksum is {found}, it says {saved}"))
}

fn check_format(manifest: &Value, path: &Path) -> Result<(), Error> {
    let supported = u64::from(FORMAT);
    // A manifest without the key fails to parse, with a message that says so.
    let format = manifest["format"].as_u64().unwrap_or(supported);
    if format == supported {
        return Ok(());
    }
    let age = if format > supported { "newer" } else { "older" };
    let reason = format!("format {format} is {age} than {FORMAT}, which this version reads");
    Err(Error::mismatch(path, reason))
}

/// A tensor and the slices in which it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorEntry {
    pub shape: Vec<i64>,
    /// Disjoint slices that cover the tensor. The serialized name is that of format 2.
    #[serde(rename = "pieces")]
    pub slices: Vec<SliceEntry>,
}

/// A shard of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileEntry {
    /// The file's name in the folder of the checkpoint.
    pub name: String,
    pub bytes: u64,
    /// The CRC-32C of the whole file.
    pub crc32c: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn manifest(state: Value) -> Manifest {
        let manifest = json!({
            "format": FORMAT,
            "step": 7,
            "state": state,
            "files": [{"name": "a", "bytes": 24, "crc32c": 1}],
            "tensors": {"w": {
                "shape": [2, 3],
                "pieces": [{"file": 0, "offset": [0, 0], "shape": [2, 3]}],
            }},
        });
        serde_json::from_value(manifest).unwrap()
    }

    fn parse(value: &Value) -> Result<ParsedManifest, Error> {
        Manifest::parse(&serde_json::to_vec(value).unwrap(), Path::new("m"))
    }

    fn refusal(value: &Value) -> String {
        parse(value).err().expect("refused").to_string()
    }

    /// Returns the manifest as an earlier version writes it, changed at `pointer`.
    fn without_checksum(pointer: &str, to: Value) -> Value {
        let mut value = serde_json::to_value(manifest(Value::Null)).unwrap();
        *value.pointer_mut(pointer).unwrap() = to;
        value
    }

    proptest! {
        #[test]
        fn any_state_has_a_matching_checksum(numbers in prop::collection::vec(any::<f64>(), 9)) {
            let manifest = manifest(json!({"numbers": numbers, "text": "\u{e9}\n"}));
            let parsed = Manifest::parse(&manifest.encode(), Path::new("m")).unwrap();
            prop_assert!(parsed.checksum.is_some());
            prop_assert_eq!(&parsed.manifest.state, &manifest.state);
        }
    }

    #[test]
    fn a_checksum_covers_every_key() {
        let good: Value = serde_json::from_slice(&manifest(json!({"x": 1})).encode()).unwrap();
        assert!(parse(&good).unwrap().checksum.is_some());
        for (pointer, to) in [
            ("/step", json!(8)),
            ("/format", json!(3)),
            ("/state/x", json!(2)),
            ("/files/0/name", json!("b")),
            ("/tensors/w/pieces/0/offset/0", json!(1)),
            ("/crc32c", json!(null)),
        ] {
            let mut changed = good.clone();
            *changed.pointer_mut(pointer).unwrap() = to;
            let refused = refusal(&changed);
            assert!(
                refused.contains("m is damaged: its checksum is"),
                "{pointer}: {refused}"
            );
        }
        let renamed = good.to_string().replace("crc32c\":", "crc32b\":");
        let refused = Manifest::parse(renamed.as_bytes(), Path::new("m")).err();
        assert!(refused.is_some_and(|error| error.is_damage()));
    }

    #[test]
    fn one_without_a_checksum_is_checked_against_itself() {
        let old = without_checksum("/step", json!(7));
        assert_eq!(parse(&old).unwrap().checksum, None);
        for (pointer, to, reason) in [
            ("/tensors/w/pieces/0/offset/0", json!(1), "not inside"),
            ("/tensors/w/pieces/0/shape/0", json!(1), "3 of 6 values"),
            ("/tensors/w/pieces/0/shape", json!([-2, 3]), "not inside"),
            (
                "/tensors/w/pieces/0/file",
                json!(8),
                "shard 8, which is not listed",
            ),
            ("/tensors/w/pieces", json!([]), "0 of 6 values"),
            (
                "/tensors/w/shape",
                json!([1u64 << 62, 9]),
                "impossible shape",
            ),
            (
                "/files/0/bytes",
                json!(5),
                "6 values cannot be in shards of 5 bytes",
            ),
            ("/files/0/name", json!("/dev/zero"), "no name of a shard"),
            ("/files/0/name", json!("../a"), "no name of a shard"),
            (
                "/files/0/name",
                json!("manifest.json"),
                "no name of a shard",
            ),
        ] {
            let refused = refusal(&without_checksum(pointer, to));
            assert!(refused.contains(reason), "{pointer}: {refused}");
        }
        let twice = json!([
            {"name": "a", "bytes": 24, "crc32c": 1},
            {"name": "a", "bytes": 0, "crc32c": 0},
        ]);
        assert!(refusal(&without_checksum("/files", twice)).contains("a is listed twice"));
    }
}
