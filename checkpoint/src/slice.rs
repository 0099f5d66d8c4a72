//! Which part of a global tensor a rank's tensor is.

use serde::{Deserialize, Serialize};

/// A slice of a global tensor. Ranks that share out a tensor hold different slices of it, which together are the whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorSlice {
    /// The tensor's global name.
    pub name: String,
    /// Its shape.
    pub global: Vec<i64>,
    /// Where the slice begins, in each dim.
    pub offset: Vec<i64>,
    /// Its size, in each dim.
    pub shape: Vec<i64>,
}

impl TensorSlice {
    /// All of a tensor.
    pub fn whole(name: impl Into<String>, shape: &[i64]) -> TensorSlice {
        TensorSlice {
            name: name.into(),
            global: shape.to_vec(),
            offset: vec![0; shape.len()],
            shape: shape.to_vec(),
        }
    }

    /// The name of the slice in a file: the tensor's, with the offset where it is not the whole.
    pub(crate) fn key(&self) -> String {
        key(&self.name, &self.global, &self.offset, &self.shape)
    }

    /// The slice that this one and the one at `offset` of size `shape` have in common: where it begins in the global
    /// tensor, and its size. None where they have nothing in common.
    pub(crate) fn overlap(&self, offset: &[i64], shape: &[i64]) -> Option<(Vec<i64>, Vec<i64>)> {
        let mut begin = Vec::new();
        let mut size = Vec::new();
        for dim in 0..self.offset.len() {
            let from = self.offset[dim].max(offset[dim]);
            let to = (self.offset[dim] + self.shape[dim]).min(offset[dim] + shape[dim]);
            if from >= to {
                return None;
            }
            begin.push(from);
            size.push(to - from);
        }
        Some((begin, size))
    }
}

/// See [`TensorSlice::key`].
pub(crate) fn key(name: &str, global: &[i64], offset: &[i64], shape: &[i64]) -> String {
    if global == shape {
        return name.to_string();
    }
    let offset: Vec<String> = offset.iter().map(i64::to_string).collect();
    format!("{name}@{}", offset.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_overlap_in_every_dim_or_not_at_all() {
        let slice = TensorSlice {
            name: "w".into(),
            global: vec![4, 6],
            offset: vec![2, 0],
            shape: vec![2, 3],
        };
        assert_eq!(slice.key(), "w@2,0");
        assert_eq!(
            slice.overlap(&[0, 2], &[3, 4]),
            Some((vec![2, 2], vec![1, 1]))
        );
        assert_eq!(slice.overlap(&[0, 0], &[2, 6]), None);
        let whole = TensorSlice::whole("s", &[]);
        assert_eq!(
            (whole.key().as_str(), whole.overlap(&[], &[])),
            ("s", Some((vec![], vec![])))
        );
    }
}
