//! Slices of global tensors, which say what part of a tensor a rank holds.

use serde::{Deserialize, Serialize};

/// A hyper-rectangle of a global tensor. The slices of all ranks together cover the tensor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorSlice {
    /// The global name of the tensor.
    pub name: String,
    /// The shape of the whole tensor. The serialized name is that of format 2.
    #[serde(rename = "global")]
    pub global_shape: Vec<i64>,
    /// The first index of the slice in each dim.
    pub offset: Vec<i64>,
    /// The size of the slice in each dim.
    pub shape: Vec<i64>,
}

/// A slice of a tensor in one file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// The number of the shard.
    pub file: usize,
    /// The first index of the slice in each dim.
    pub offset: Vec<i64>,
    /// The size of the slice in each dim.
    pub shape: Vec<i64>,
}

impl SliceEntry {
    /// Returns the slice of the tensor with this name and shape.
    pub(crate) fn of_tensor(&self, name: &str, global_shape: &[i64]) -> TensorSlice {
        TensorSlice {
            name: name.to_string(),
            global_shape: global_shape.to_vec(),
            offset: self.offset.clone(),
            shape: self.shape.clone(),
        }
    }
}

impl TensorSlice {
    /// Returns the slice that covers a whole tensor.
    pub fn whole(name: impl Into<String>, shape: &[i64]) -> TensorSlice {
        TensorSlice {
            name: name.into(),
            global_shape: shape.to_vec(),
            offset: vec![0; shape.len()],
            shape: shape.to_vec(),
        }
    }

    /// Returns the name of the slice in a file: `NAME`, or `NAME@OFFSETS` for a proper part.
    pub(crate) fn key(&self) -> String {
        if self.global_shape == self.shape {
            return self.name.clone();
        }
        let offset: Vec<String> = self.offset.iter().map(i64::to_string).collect();
        format!("{}@{}", self.name, offset.join(","))
    }

    /// Returns the slice that two slices of one tensor have in common, if any.
    pub(crate) fn overlap(&self, other: &TensorSlice) -> Option<TensorSlice> {
        let mut offset = Vec::with_capacity(self.offset.len());
        let mut shape = Vec::with_capacity(self.offset.len());
        for dim in 0..self.offset.len() {
            let start = self.offset[dim].max(other.offset[dim]);
            let end = self.end(dim).min(other.end(dim));
            if start >= end {
                return None;
            }
            offset.push(start);
            shape.push(end - start);
        }
        Some(TensorSlice {
            name: self.name.clone(),
            global_shape: self.global_shape.clone(),
            offset,
            shape,
        })
    }

    fn end(&self, dim: usize) -> i64 {
        self.offset[dim] + self.shape[dim]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(offset: &[i64], shape: &[i64]) -> TensorSlice {
        TensorSlice {
            name: "w".into(),
            global_shape: vec![4, 6],
            offset: offset.to_vec(),
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn slices_overlap_in_every_dim_or_not_at_all() {
        let lower_left = slice(&[2, 0], &[2, 3]);
        assert_eq!(lower_left.key(), "w@2,0");
        let middle = slice(&[0, 2], &[3, 4]);
        let common = slice(&[2, 2], &[1, 1]);
        assert_eq!(lower_left.overlap(&middle), Some(common));
        assert_eq!(lower_left.overlap(&slice(&[0, 0], &[2, 6])), None);
        let scalar = TensorSlice::whole("s", &[]);
        assert_eq!(scalar.key(), "s");
        assert_eq!(scalar.overlap(&scalar), Some(scalar.clone()));
    }

    #[test]
    fn serialized_names_are_those_of_format_2() {
        let json = serde_json::to_string(&slice(&[2, 0], &[2, 3])).unwrap();
        let expected = r#"{"name":"w","global":[4,6],"offset":[2,0],"shape":[2,3]}"#;
        assert_eq!(json, expected);
    }
}
