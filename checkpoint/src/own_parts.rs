//! The parts of a snapshot that one rank restores in the layout that saved them: its own, and those
//! of its companions.
//!
//! A rank of another layout needs the headers of all parts, to find out where each slice is. With
//! the same layout the header of a rank's own part names the few others that it needs.

use crate::{
    Checkpoint, Error, TensorSlice,
    format::ImageHeader,
    manifest::{FileEntry, Manifest, TensorEntry},
    slice::SliceEntry,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
};

/// Gives the parts of a snapshot by rank.
pub trait PartSource: Send {
    /// Returns the header of a rank's part.
    ///
    /// # Errors
    /// If the part cannot be read, or is damaged.
    fn header(&mut self, rank: usize) -> Result<ImageHeader, Error>;

    /// Opens a rank's part.
    ///
    /// # Errors
    /// If the part cannot be read.
    fn open(&mut self, rank: usize) -> Result<File, Error>;
}

/// The parts with everything that a rank held when it saved.
pub struct OwnParts {
    /// The rank itself, then its companions.
    ranks: Vec<usize>,
    /// The slices in the rank's own part.
    own: BTreeSet<TensorSlice>,
    /// The slices in all of these parts.
    saved: BTreeSet<TensorSlice>,
    /// A checkpoint from which slices can be read that are in one of the parts. The manifest lists
    /// no others.
    pub checkpoint: Checkpoint,
}

impl OwnParts {
    /// Reads the headers of a rank's part and of those of its companions. Errors call the snapshot
    /// `name`.
    ///
    /// # Errors
    /// If one cannot be read, or two have the same slice.
    pub fn read(
        name: &str,
        step: u64,
        rank: usize,
        mut source: Box<dyn PartSource>,
    ) -> Result<OwnParts, Error> {
        let own = source.header(rank)?;
        let own_slices = own.slices.iter().cloned().collect();
        let others: BTreeSet<usize> = own.companions.iter().copied().collect();
        let mut ranks = vec![rank];
        let mut headers = vec![own];
        for other in others.into_iter().filter(|&other| other != rank) {
            headers.push(source.header(other)?);
            ranks.push(other);
        }
        let mut saved = BTreeSet::new();
        for slice in headers.iter().flat_map(|header| &header.slices) {
            if !saved.insert(slice.clone()) {
                let reason = format!("{} is in two parts", slice.key());
                return Err(Error::mismatch(Path::new(name), reason));
            }
        }
        let manifest = manifest(step, &ranks, &headers);
        let opened = ranks.clone();
        let open = Box::new(move |file: usize| source.open(opened[file]));
        Ok(OwnParts {
            ranks,
            own: own_slices,
            saved,
            checkpoint: Checkpoint::of_images(PathBuf::from(name), manifest, headers, open),
        })
    }

    /// Returns the ranks whose parts these are.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// True if the rank's own part has only slices that it holds now, and each slice that it holds
    /// is in one of the parts. If that is so for all ranks, the snapshot has exactly their tensors.
    pub fn have_exactly<'a>(&self, held: impl IntoIterator<Item = &'a TensorSlice>) -> bool {
        let held: BTreeSet<&TensorSlice> = held.into_iter().collect();
        let is_held = |slice: &TensorSlice| held.contains(slice);
        self.own.iter().all(is_held) && held.iter().all(|&slice| self.saved.contains(slice))
    }
}

/// Lists the slices in these parts. A tensor of which other ranks have slices is incomplete.
fn manifest(step: u64, ranks: &[usize], headers: &[ImageHeader]) -> Manifest {
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    for (file, header) in headers.iter().enumerate() {
        for slice in &header.slices {
            let entry = tensors.entry(slice.name.clone());
            let entry = entry.or_insert_with(|| TensorEntry {
                shape: slice.global_shape.clone(),
                slices: Vec::new(),
            });
            entry.slices.push(SliceEntry {
                file,
                offset: slice.offset.clone(),
                shape: slice.shape.clone(),
            });
        }
    }
    let files = ranks.iter().map(|rank| FileEntry {
        name: format!("part {rank}"),
        bytes: 0,
        crc32c: 0,
    });
    let state = headers.first().map(|header| header.state.clone());
    Manifest::new(step, state.unwrap_or_default(), files.collect(), tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageLayout, checksum::crc32c};
    use serde_json::json;
    use std::io::{Seek, SeekFrom, Write};
    use tch::{Device, Kind, Tensor};

    /// Rows of a matrix of four rows, two columns.
    fn rows(name: &str, first: i64, count: i64) -> TensorSlice {
        TensorSlice {
            name: name.into(),
            global_shape: vec![4, 2],
            offset: vec![first, 0],
            shape: vec![count, 2],
        }
    }

    /// Images of floats in memory. The values are those of a count over the tensor.
    struct Images(Vec<(ImageLayout, Vec<TensorSlice>)>);

    impl Images {
        /// Ranks 0 and 1 are replicas of half the rows, and rank 2 has the other half.
        fn new() -> Images {
            let image = |slices: Vec<TensorSlice>, companions: &[usize]| {
                let held: Vec<_> = slices.iter().map(|s| (s.clone(), Kind::Float)).collect();
                let layout = ImageLayout::plan(&held, 2, companions, &json!({"n": 5})).unwrap();
                (layout, slices)
            };
            Images(vec![
                image(vec![rows("a", 0, 2)], &[1]),
                image(vec![rows("b", 0, 2)], &[0]),
                image(vec![rows("a", 2, 2), rows("b", 2, 2)], &[]),
            ])
        }
    }

    impl PartSource for Images {
        fn header(&mut self, rank: usize) -> Result<ImageHeader, Error> {
            let header = self.0[rank].0.encode_header(&json!({"n": 5}))?;
            ImageHeader::read(&header, Path::new("x"))
        }

        fn open(&mut self, rank: usize) -> Result<File, Error> {
            let (layout, slices) = &self.0[rank];
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&layout.encode_header(&json!({"n": 5}))?)
                .unwrap();
            for (slice, &offset) in slices.iter().zip(layout.offsets()) {
                file.seek(SeekFrom::Start(offset)).unwrap();
                let first = slice.offset[0] * 2 + i64::from(crc32c(slice.name.as_bytes()) % 9);
                for value in first..first + slice.shape[0] * 2 {
                    file.write_all(&(value as f32).to_le_bytes()).unwrap();
                }
            }
            Ok(file)
        }
    }

    fn own_parts(rank: usize) -> OwnParts {
        OwnParts::read("x", 7, rank, Box::new(Images::new())).unwrap()
    }

    #[test]
    fn a_rank_reads_what_it_held_from_its_part_and_its_companions() {
        let mut parts = own_parts(1);
        assert_eq!(parts.ranks(), [1, 0]);
        let held = [rows("a", 0, 2), rows("b", 0, 2)];
        assert!(parts.have_exactly(&held));
        assert_eq!(parts.checkpoint.manifest().state, json!({"n": 5}));
        for slice in &held {
            let first = f64::from(crc32c(slice.name.as_bytes()) % 9);
            let expected = Tensor::arange(4, (Kind::Float, Device::Cpu)) + first;
            let values = parts.checkpoint.tensor(slice).unwrap().view(-1);
            assert_eq!(values, expected, "{}", slice.name);
        }
    }

    #[test]
    fn other_slices_than_those_saved_are_noticed() {
        let parts = own_parts(0);
        let a = rows("a", 0, 2);
        let b = rows("b", 0, 2);
        assert!(parts.have_exactly([&a, &b]));
        // Other ranks may hold what only the companion's part has.
        assert!(parts.have_exactly([&a]));
        assert!(
            !parts.have_exactly([&b]),
            "its own slice is not held any more"
        );
        assert!(
            !parts.have_exactly([&a, &rows("b", 0, 4)]),
            "a larger slice"
        );
        assert!(!parts.have_exactly([&a, &rows("c", 0, 2)]), "a new tensor");
    }

    #[test]
    fn a_slice_in_two_parts_is_refused() {
        let mut images = Images::new();
        images.0[1] = Images::new().0.remove(0);
        let error = OwnParts::read("x", 7, 0, Box::new(images)).err().unwrap();
        assert!(error.to_string().contains("is in two parts"), "{error}");
    }
}
