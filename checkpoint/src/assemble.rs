//! Combining shards: every element of every tensor has to be there exactly once.

use crate::{
    Error, TensorSlice,
    manifest::{FileEntry, Manifest, TensorEntry},
    slice::SliceEntry,
    tiling::check_tiling,
};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// The files and tensors of a complete checkpoint.
pub(crate) struct Contents {
    files: Vec<FileEntry>,
    tensors: BTreeMap<String, TensorEntry>,
}

impl Contents {
    /// Combines files and the slices in each, and checks that they hold `expected` tensors. Errors
    /// name `path`.
    ///
    /// # Errors
    /// If a tensor is missing, incomplete, or in several files.
    pub(crate) fn assemble<'a>(
        path: &Path,
        shards: impl Iterator<Item = (FileEntry, &'a [TensorSlice])>,
        expected: usize,
    ) -> Result<Contents, Error> {
        let refused = |reason| Error::mismatch(path, reason);
        let mut files = Vec::new();
        let mut tensors = HashMap::new();
        for (file, slices) in shards {
            for slice in slices {
                add_slice(&mut tensors, files.len(), slice).map_err(refused)?;
            }
            files.push(file);
        }
        let named = tensors.into_iter();
        let contents = Contents {
            files,
            tensors: named
                .map(|(name, entry)| (name.to_string(), entry))
                .collect(),
        };
        contents.check_complete(expected).map_err(refused)?;
        Ok(contents)
    }

    fn check_complete(&self, expected: usize) -> Result<(), String> {
        for (name, entry) in &self.tensors {
            check_tiling(&entry.shape, &entry.slices)
                .map_err(|reason| format!("{name} {reason}"))?;
        }
        let found = self.tensors.len();
        if found != expected {
            return Err(format!(
                "{found} tensors were written, {expected} are expected"
            ));
        }
        Ok(())
    }

    pub(crate) fn into_manifest(self, step: u64, state: serde_json::Value) -> Manifest {
        Manifest::new(step, state, self.files, self.tensors)
    }
}

/// Adds a slice that is stored in file `file`.
fn add_slice<'a>(
    tensors: &mut HashMap<&'a str, TensorEntry>,
    file: usize,
    slice: &'a TensorSlice,
) -> Result<(), String> {
    let name = slice.name.as_str();
    let entry = tensors.entry(name).or_insert_with(|| TensorEntry {
        shape: slice.global_shape.clone(),
        slices: Vec::new(),
    });
    if entry.shape != slice.global_shape {
        return Err(format!(
            "{name} has shape {:?} in shard {file}, {:?} in others",
            slice.global_shape, entry.shape
        ));
    }
    entry.slices.push(SliceEntry {
        file,
        offset: slice.offset.clone(),
        shape: slice.shape.clone(),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const RANKS: usize = 4096;
    /// Experts of a layer, each on 64 ranks.
    const EXPERTS: usize = 64;
    const LAYERS: usize = 60;
    const KINDS: [&str; 3] = ["model", "exp_avg", "exp_avg_sq"];

    /// Returns the slices of a rank: rows of the matrices of each layer, and of one expert, as
    /// 4,096 ranks save them that shard the optimizer: a million slices in all.
    fn slices_of(rank: usize) -> Vec<TensorSlice> {
        let rows = |name: String, parts: usize, part: usize, cuts_columns: bool| {
            let parts = parts as i64;
            let mut slice = TensorSlice::whole(name, &[2 * parts, 4 * parts]);
            let dim = usize::from(cuts_columns);
            slice.shape[dim] /= parts;
            slice.offset[dim] = part as i64 * slice.shape[dim];
            slice
        };
        let mut slices = Vec::new();
        for kind in KINDS {
            for layer in 0..LAYERS {
                let name = format!("{kind}/layers.{layer}");
                slices.push(rows(format!("{name}.attention.query"), RANKS, rank, false));
                let name = format!("{name}.moe.experts.{}.down", rank % EXPERTS);
                let replicas = RANKS / EXPERTS;
                slices.push(rows(name, replicas, rank / EXPERTS, true));
            }
        }
        slices
    }

    #[test]
    fn an_index_of_4096_ranks_is_assembled_in_a_moment() {
        let ranks: Vec<Vec<TensorSlice>> = (0..RANKS).map(slices_of).collect();
        let files = || {
            ranks.iter().map(|slices| {
                let file = FileEntry {
                    name: "shard".into(),
                    bytes: 1 << 40,
                    crc32c: 0,
                };
                (file, slices.as_slice())
            })
        };
        let tensors = KINDS.len() * LAYERS * (1 + EXPERTS);
        let mut fastest = f64::INFINITY;
        for _ in 0..3 {
            let begun = Instant::now();
            let contents = Contents::assemble(Path::new("x"), files(), tensors).unwrap();
            fastest = fastest.min(begun.elapsed().as_secs_f64());
            assert_eq!(contents.tensors.len(), tensors);
        }
        let slices = ranks.iter().map(Vec::len).sum::<usize>();
        println!("{slices} slices of {RANKS} ranks: {fastest:.2} s");
        assert!(slices > 1_000_000 && fastest < LIMIT, "{fastest}");
        let missing = files().filter(|(_, slices)| slices[0].offset[0] != 4000);
        let refused = Contents::assemble(Path::new("x"), missing, tensors)
            .err()
            .unwrap();
        assert!(
            refused.to_string().contains("and none at [4000, 0]"),
            "{refused}"
        );
    }

    /// Seconds. Tests without optimization, and on a loaded machine, take longer.
    const LIMIT: f64 = if cfg!(debug_assertions) { 30.0 } else { 2.0 };
}
