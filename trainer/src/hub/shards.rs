//! The files of a folder that is to be written: which tensors are in which file, and where.

use crate::config::Dtype;
use safetensors::Dtype as StoredDtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Length of a file's header is a multiple of this.
const ALIGNMENT: usize = 8;

/// A tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: StoredDtype,
    pub(crate) shape: Vec<u64>,
    /// The file that had the tensor before, which it stays with.
    pub(crate) file: Option<String>,
}

/// A file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewFile {
    pub(crate) name: String,
    /// The tensors in the order of the file, each with its position.
    pub(crate) tensors: Vec<(NewTensor, u64)>,
    /// First bytes, up to the first tensor.
    pub(crate) header: Vec<u8>,
    /// Length of the file.
    pub(crate) len: u64,
}

impl NewTensor {
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bitsize() as u64 / 8
    }
}

/// Returns the files of `tensors`, each of at most `max_bytes` unless one tensor has more. If all
/// tensors have a file, they stay in it.
pub(crate) fn plan_files(tensors: Vec<NewTensor>, max_bytes: u64) -> Vec<NewFile> {
    let have_files = tensors.iter().all(|tensor| tensor.file.is_some());
    let groups: Vec<(String, Vec<NewTensor>)> = if have_files {
        let mut by_file: BTreeMap<String, Vec<NewTensor>> = BTreeMap::new();
        for tensor in tensors {
            let file = tensor.file.clone().unwrap_or_default();
            by_file.entry(file).or_default().push(tensor);
        }
        by_file.into_iter().collect()
    } else {
        let groups = fill(tensors, max_bytes);
        let count = groups.len();
        let name = |number: usize| match count {
            1 => super::folder::SINGLE_FILE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let numbered = groups.into_iter().enumerate();
        numbered
            .map(|(number, group)| (name(number), group))
            .collect()
    };
    let files = groups
        .into_iter()
        .map(|(name, tensors)| file_of(name, tensors));
    files.collect()
}

/// Divides tensors into groups of at most `max_bytes`, in their order.
fn fill(tensors: Vec<NewTensor>, max_bytes: u64) -> Vec<Vec<NewTensor>> {
    let mut groups: Vec<Vec<NewTensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        match groups.last_mut() {
            Some(group) if filled + bytes <= max_bytes => {
                filled += bytes;
                group.push(tensor);
            }
            _ => {
                filled = bytes;
                groups.push(vec![tensor]);
            }
        }
    }
    groups
}

fn file_of(name: String, tensors: Vec<NewTensor>) -> NewFile {
    let mut entries = Map::new();
    // Old versions of transformers need it.
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    let mut starts = Vec::new();
    for tensor in &tensors {
        let start = end;
        end += tensor.bytes();
        starts.push(start);
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end],
        });
        entries.insert(tensor.name.clone(), entry);
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    let data = header.len() as u64;
    let positions = starts.into_iter().map(|start| data + start);
    NewFile {
        name,
        tensors: tensors.into_iter().zip(positions).collect(),
        len: data + end,
        header,
    }
}

/// Returns the text of the index of several files.
pub(crate) fn index_text(files: &[NewFile]) -> String {
    let mut weight_map = BTreeMap::new();
    let mut parameters = 0;
    let mut bytes = 0;
    for file in files {
        for (tensor, _) in &file.tensors {
            weight_map.insert(&tensor.name, &file.name);
            parameters += tensor.elements();
            bytes += tensor.bytes();
        }
    }
    let index = json!({
        "metadata": {"total_parameters": parameters, "total_size": bytes},
        "weight_map": weight_map,
    });
    serde_json::to_string_pretty(&index).expect("an index is plain data") + "\n"
}

/// Returns the dtype of a file.
pub(crate) fn stored_dtype(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::Fp32 => StoredDtype::F32,
        Dtype::Bf16 => StoredDtype::BF16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::TensorIndex;
    use proptest::prelude::*;
    use std::io::Write;

    proptest! {
        #[test]
        fn files_have_each_tensor_once_and_are_readable(
            sizes in prop::collection::vec((1u64..9, 1u64..9, any::<bool>()), 1..20),
            max_bytes in 1u64..600,
        ) {
            let tensor = |(number, (rows, columns, is_wide)): (usize, (u64, u64, bool))| NewTensor {
                name: format!("t{number}"),
                dtype: if is_wide { StoredDtype::F32 } else { StoredDtype::BF16 },
                shape: vec![rows, columns],
                file: None,
            };
            let tensors: Vec<NewTensor> = sizes.into_iter().enumerate().map(tensor).collect();
            let files = plan_files(tensors.clone(), max_bytes);
            let planned = files.iter().flat_map(|file| &file.tensors);
            prop_assert_eq!(planned.map(|(t, _)| t.clone()).collect::<Vec<_>>(), tensors);
            for file in &files {
                let bytes: u64 = file.tensors.iter().map(|(tensor, _)| tensor.bytes()).sum();
                prop_assert!(bytes <= max_bytes || file.tensors.len() == 1);
                let mut written = tempfile::tempfile().unwrap();
                written.write_all(&file.header).unwrap();
                written.set_len(file.len).unwrap();
                let index = TensorIndex::from_file(&written, file.name.as_ref()).unwrap();
                for (tensor, position) in &file.tensors {
                    let info = index.metadata().info(&tensor.name).unwrap();
                    prop_assert_eq!(index.data_start() + info.data_offsets.0 as u64, *position);
                    prop_assert_eq!(info.dtype, tensor.dtype);
                }
            }
        }
    }
}
