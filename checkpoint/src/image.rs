//! The image of a rank's state: a safetensors file in memory, planned once and filled again and again.
//!
//! The header has a fixed room, so that tensors keep their slices from snapshot to snapshot. In its metadata are what the
//! run wants to know again (`state`), which slice each tensor is (`slices`), and how many tensors all ranks have (`tensors`).

use crate::read::{parse_metadata, read_header};
use crate::{Error, TensorSlice};
use safetensors::tensor::Metadata;
use serde::Serialize;
use serde_json::json;
use std::path::Path;
use tch::Kind;

/// Where everything is in an image.
pub struct ImageLayout {
    /// `"name": {...}, ...` of all tensors.
    entries: String,
    slices: String,
    /// Names in the whole checkpoint.
    tensors: usize,
    /// Length of the header with its padding, and eight bytes for its length.
    head: usize,
    offsets: Vec<u64>,
    bytes: u64,
}

#[derive(Serialize)]
struct Entry {
    dtype: safetensors::Dtype,
    shape: Vec<i64>,
    data_offsets: (u64, u64),
}

impl ImageLayout {
    /// Lays `held` out, whose state is now `state`; all ranks together have `tensors` tensors.
    ///
    /// # Errors
    /// When a dtype is not one that is saved.
    pub fn plan(
        held: &[(TensorSlice, Kind)],
        tensors: usize,
        state: &serde_json::Value,
    ) -> Result<ImageLayout, Error> {
        let mut order: Vec<usize> = (0..held.len()).collect();
        // Wide values first: then all are aligned.
        order.sort_by_key(|&index| std::cmp::Reverse(held[index].1.elt_size_in_bytes()));
        let mut next = 0u64;
        let mut offsets = vec![0; held.len()];
        let mut entries = Vec::new();
        let mut slices = Vec::new();
        for index in order {
            let (slice, kind) = &held[index];
            let dtype = crate::write::dtype_of(*kind).ok_or_else(|| {
                Error::mismatch(
                    Path::new(&slice.name),
                    format!("it has a dtype that is not saved: {kind:?}"),
                )
            })?;
            let len = slice.shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
            offsets[index] = next;
            let entry = Entry {
                dtype,
                shape: slice.shape.clone(),
                data_offsets: (next, next + len),
            };
            entries.push(format!(
                "{}:{}",
                json!(slice.key()),
                serde_json::to_string(&entry).expect("plain data")
            ));
            slices.push(slice);
            next += len;
        }
        let entries: String = entries
            .into_iter()
            .flat_map(|entry| [",".to_string(), entry])
            .collect();
        let slices = serde_json::to_string(&slices).expect("plain data");
        let mut image = ImageLayout {
            entries,
            slices,
            tensors,
            head: 0,
            offsets,
            bytes: next,
        };
        let len = image.header(state).len();
        // The state's numbers grow by some digits.
        image.head = (8 + len + len / 4 + 4096).next_multiple_of(4096);
        image
            .offsets
            .iter_mut()
            .for_each(|offset| *offset += image.head as u64);
        image.bytes += image.head as u64;
        Ok(image)
    }

    /// Where each tensor begins, in the order in which they were given.
    pub fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Length of the image.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn header(&self, state: &serde_json::Value) -> String {
        let metadata = json!({"state": state.to_string(), "slices": self.slices, "tensors": self.tensors.to_string()});
        format!("{{\"__metadata__\":{metadata}{}}}", self.entries)
    }

    /// Its first bytes, up to the first tensor.
    ///
    /// # Errors
    /// When the state has become too long for the room that it has.
    pub fn head(&self, state: &serde_json::Value) -> Result<Vec<u8>, Error> {
        let mut head = ((self.head - 8) as u64).to_le_bytes().to_vec();
        head.extend(self.header(state).as_bytes());
        if head.len() > self.head {
            return Err(Error::mismatch(
                Path::new("snapshot"),
                format!(
                    "its header of {} bytes does not fit into {}",
                    head.len(),
                    self.head
                ),
            ));
        }
        head.resize(self.head, b' ');
        Ok(head)
    }
}

/// What an image's header says.
pub struct ImageHeader {
    /// What the run wants to know again.
    pub state: serde_json::Value,
    /// Which slice each tensor is.
    pub slices: Vec<TensorSlice>,
    /// How many tensors there are in the whole checkpoint.
    pub tensors: usize,
    /// Where each is.
    pub(crate) metadata: Metadata,
    /// Where the data begins.
    pub(crate) data_start: u64,
}

impl ImageHeader {
    /// Reads what [`ImageLayout::head`] gave.
    ///
    /// # Errors
    /// When it is something else.
    pub fn read(bytes: &[u8], what: &Path) -> Result<ImageHeader, Error> {
        let damaged = |reason: String| Error::damaged(what, reason);
        let header = bytes
            .get(8..)
            .ok_or_else(|| damaged("it has no header".into()))?;
        let metadata = parse_metadata(header, what)?;
        let text = |key: &str| {
            let value = metadata
                .metadata()
                .as_ref()
                .and_then(|values| values.get(key));
            value.ok_or_else(|| damaged(format!("its header has no {key}")))
        };
        let json = |e: serde_json::Error| damaged(e.to_string());
        let tensors = text("tensors")?
            .parse()
            .map_err(|_| damaged("its number of tensors is none".into()))?;
        Ok(ImageHeader {
            state: serde_json::from_str(text("state")?).map_err(json)?,
            slices: serde_json::from_str(text("slices").or_else(|_| text("places"))?)
                .map_err(json)?,
            tensors,
            metadata,
            data_start: bytes.len() as u64,
        })
    }

    pub(crate) fn from_file(path: &Path) -> Result<ImageHeader, Error> {
        ImageHeader::read(&read_header(path)?.0, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_keeps_its_room() {
        let held = [
            (TensorSlice::whole("bytes", &[3]), Kind::Uint8),
            (TensorSlice::whole("model/w", &[2, 2]), Kind::Float),
        ];
        let image = ImageLayout::plan(&held, 2, &json!({"step": 9})).unwrap();
        let head = image
            .head(&json!({"step": 1000000, "note": "\"quoted\""}))
            .unwrap();
        assert_eq!(
            (image.offsets()[1], image.offsets()[0]),
            (head.len() as u64, head.len() as u64 + 16)
        );
        assert_eq!(image.bytes(), head.len() as u64 + 19);
        let read = ImageHeader::read(&head, Path::new("x")).unwrap();
        assert_eq!(
            (read.state["note"].as_str(), read.tensors, read.data_start),
            (Some("\"quoted\""), 2, head.len() as u64)
        );
        assert_eq!(
            read.slices
                .iter()
                .map(|slice| slice.name.as_str())
                .collect::<Vec<_>>(),
            ["model/w", "bytes"]
        );
        let long = "x".repeat(9000);
        assert!(
            image
                .head(&json!({"step": 1, "long": long}))
                .unwrap_err()
                .to_string()
                .contains("does not fit")
        );
        assert!(ImageHeader::read(b"12345678{}", Path::new("x")).is_err());
    }
}
