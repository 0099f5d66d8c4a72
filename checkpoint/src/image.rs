//! The image of a rank's state: a safetensors file in memory, planned once and filled repeatedly.
//!
//! The header has a fixed length, so that tensors keep their offsets from snapshot to snapshot.
//! Its metadata holds the state of the run, the slices, the number of tensors of all ranks, and the
//! ranks whose images have the rest of what the writer held.

use crate::{
    Error, TensorSlice,
    format::{COMPANIONS_KEY, LENGTH_BYTES, SLICES_KEY, STATE_KEY, TENSORS_KEY, dtype_of},
};
use serde::Serialize;
use serde_json::{Value, json};
use std::{cmp::Reverse, path::Path};
use tch::Kind;

/// The length of a header is a multiple of this, which aligns the tensors.
const ALIGNMENT: usize = 4096;

/// The layout of an image: its header and the offsets of its tensors.
pub struct ImageLayout {
    /// The header's entries for all tensors, each as `,"NAME":{...}`.
    entries: String,
    /// The slices as JSON.
    slices: String,
    /// The number of tensors in the whole checkpoint.
    tensors: usize,
    /// The ranks whose images have the other slices that the writer holds.
    companions: Vec<usize>,
    /// The length of the header with its padding, including the bytes that say the length.
    header_len: usize,
    offsets: Vec<u64>,
    bytes: u64,
}

/// A tensor in the header of a safetensors file.
#[derive(Serialize)]
struct Entry {
    dtype: safetensors::Dtype,
    shape: Vec<i64>,
    data_offsets: (u64, u64),
}

impl Entry {
    fn new(slice: &TensorSlice, kind: Kind, start: u64) -> Result<Entry, Error> {
        let unsupported = || {
            let reason = format!("values of dtype {kind:?} cannot be saved");
            Error::mismatch(Path::new(&slice.name), reason)
        };
        let dtype = dtype_of(kind).ok_or_else(unsupported)?;
        let values = slice.shape.iter().product::<i64>() as u64;
        let end = start + values * kind.elt_size_in_bytes() as u64;
        Ok(Entry {
            dtype,
            shape: slice.shape.clone(),
            data_offsets: (start, end),
        })
    }
}

impl ImageLayout {
    /// Lays out slices of these dtypes. `tensors` is the number of tensors of all ranks,
    /// `companions` are the ranks whose images have the other slices that the writer holds, and
    /// `state` is an example of the states that headers will hold.
    ///
    /// # Errors
    /// If a dtype cannot be saved.
    pub fn plan(
        held: &[(TensorSlice, Kind)],
        tensors: usize,
        companions: &[usize],
        state: &Value,
    ) -> Result<ImageLayout, Error> {
        let mut order: Vec<usize> = (0..held.len()).collect();
        // The widest values come first, which aligns all.
        order.sort_by_key(|&index| Reverse(held[index].1.elt_size_in_bytes()));
        let mut end = 0;
        let mut offsets = vec![0; held.len()];
        let mut entries = String::new();
        let mut slices = Vec::with_capacity(held.len());
        for index in order {
            let (slice, kind) = &held[index];
            let entry = Entry::new(slice, *kind, end)?;
            (offsets[index], end) = entry.data_offsets;
            let name = json!(slice.key());
            let entry = serde_json::to_string(&entry).expect("plain data");
            entries += &format!(",{name}:{entry}");
            slices.push(slice);
        }
        let mut layout = ImageLayout {
            entries,
            slices: serde_json::to_string(&slices).expect("plain data"),
            tensors,
            companions: companions.to_vec(),
            header_len: 0,
            offsets,
            bytes: 0,
        };
        let len = layout.header_json(state).len();
        // The numbers of the state gain some digits during a run.
        let room = LENGTH_BYTES + len + len / 4 + ALIGNMENT;
        layout.header_len = room.next_multiple_of(ALIGNMENT);
        for offset in &mut layout.offsets {
            *offset += layout.header_len as u64;
        }
        layout.bytes = layout.header_len as u64 + end;
        Ok(layout)
    }

    /// Returns where each tensor begins, in the order in which they were given.
    pub fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Returns the length of the image.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn header_json(&self, state: &Value) -> String {
        let mut metadata = json!({
            STATE_KEY: state.to_string(),
            SLICES_KEY: self.slices,
            TENSORS_KEY: self.tensors.to_string(),
        });
        if !self.companions.is_empty() {
            metadata[COMPANIONS_KEY] = json!(self.companions).to_string().into();
        }
        format!("{{\"__metadata__\":{metadata}{}}}", self.entries)
    }

    /// Returns the first bytes of the image, up to the first tensor.
    ///
    /// # Errors
    /// If the state outgrew the room in the header.
    pub fn encode_header(&self, state: &Value) -> Result<Vec<u8>, Error> {
        let json_len = self.header_len - LENGTH_BYTES;
        let mut header = (json_len as u64).to_le_bytes().to_vec();
        header.extend(self.header_json(state).as_bytes());
        if header.len() > self.header_len {
            let reason = format!(
                "the header of {} bytes does not fit into {}",
                header.len(),
                self.header_len
            );
            return Err(Error::mismatch(Path::new("snapshot"), reason));
        }
        header.resize(self.header_len, b' ');
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImageHeader;

    fn layout() -> ImageLayout {
        let held = [
            (TensorSlice::whole("bytes", &[3]), Kind::Uint8),
            (TensorSlice::whole("model/w", &[2, 2]), Kind::Float),
        ];
        ImageLayout::plan(&held, 2, &[], &json!({"step": 9})).unwrap()
    }

    #[test]
    fn a_header_names_the_companions_of_its_writer() {
        let layout = ImageLayout::plan(&[], 5, &[3, 70], &json!({})).unwrap();
        let header = layout.encode_header(&json!({})).unwrap();
        let read = ImageHeader::read(&header, Path::new("x")).unwrap();
        assert_eq!(read.companions, [3, 70]);
    }

    #[test]
    fn headers_of_longer_states_have_the_same_length() {
        let layout = layout();
        let state = json!({"step": 1000000, "note": "\"quoted\""});
        let header = layout.encode_header(&state).unwrap();
        let start = header.len() as u64;
        assert_eq!(layout.offsets(), [start + 16, start]);
        assert_eq!(layout.bytes(), start + 19);
        let read = ImageHeader::read(&header, Path::new("x")).unwrap();
        assert_eq!(read.state, state);
        assert_eq!(read.tensors, 2);
        assert!(read.companions.is_empty());
        assert_eq!(read.index.data_start, start);
        let names: Vec<&str> = read
            .slices
            .iter()
            .map(|slice| slice.name.as_str())
            .collect();
        assert_eq!(names, ["model/w", "bytes"]);
    }

    #[test]
    fn headers_that_are_too_long_or_damaged_are_refused() {
        let long = json!({"step": 1, "long": "x".repeat(9000)});
        let error = layout().encode_header(&long).unwrap_err().to_string();
        assert!(error.contains("does not fit"), "{error}");
        assert!(ImageHeader::read(b"12345678{}", Path::new("x")).is_err());
        assert!(ImageHeader::read(b"1234", Path::new("x")).is_err());
    }

    #[test]
    fn bytes_are_those_of_format_2() {
        let header = layout().encode_header(&json!({"step": 9})).unwrap();
        let expected = concat!(
            r#"{"__metadata__":{"state":"{\"step\":9}","#,
            r#""places":"[{\"name\":\"model/w\",\"global\":[2,2],"#,
            r#"\"offset\":[0,0],\"shape\":[2,2]},{\"name\":\"bytes\",\"global\":[3],"#,
            r#"\"offset\":[0],\"shape\":[3]}]","tensors":"2"},"#,
            r#""model/w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"#,
            r#""bytes":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}"#,
        );
        let text = std::str::from_utf8(&header[LENGTH_BYTES..]).unwrap();
        assert_eq!(text.trim_end(), expected);
    }
}
