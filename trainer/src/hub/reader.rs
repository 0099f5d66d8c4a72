//! Slices of a model's tensors, read from a folder.

use super::{
    encoding::{LogicalTable, Region},
    mapping::{Mapping, Piece},
    rule::Run,
};
use crate::Error;
use checkpoint::{TensorSlice, advise_huge_pages};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Bytes of fp32 values that a thread reads at once: few enough to stay in its cache until they are
/// converted.
pub(super) const CHUNK_BYTES: u64 = 2 << 20;

/// Reads the tensors of a folder by the names of the model.
pub(crate) struct FolderReader {
    pub(crate) mapping: Mapping,
    pub(crate) table: LogicalTable,
}

/// A part of a matrix `[rows, columns]` of the model. A vector has one column.
struct Part {
    is_vector: bool,
    rows: Range<u64>,
    columns: Range<u64>,
}

impl FolderReader {
    /// Copies a slice of a tensor into `into`, which has its shape.
    ///
    /// # Errors
    /// If the model has no such tensor, or a file cannot be read.
    pub(crate) fn read_into(&self, slice: &TensorSlice, into: &Tensor) -> Result<(), Error> {
        let tensor = self
            .mapping
            .tensor(&slice.name)
            .ok_or_else(|| Error::Folder(format!("the folder has no tensor for {}", slice.name)))?;
        let part = Part::of(slice);
        let into = into.view([
            (part.rows.end - part.rows.start) as i64,
            (part.columns.end - part.columns.start) as i64,
        ]);
        advise_huge_pages(&into);
        let row_bytes = 4 * (part.columns.end - part.columns.start).max(1);
        let is_transposed =
            |piece: &Piece| piece.is_transposed != self.table.tensors[&piece.name].is_transposed();
        let chunk = if tensor.pieces.iter().any(is_transposed) {
            // A few rows would be a few columns of each row in the file, and read the file anew.
            part.rows.end
        } else {
            (CHUNK_BYTES / row_bytes).max(1)
        };
        let mut start = part.rows.start;
        while start < part.rows.end {
            let rows = start..(start + chunk).min(part.rows.end);
            for piece in &tensor.pieces {
                self.read_rows(piece, &part, &rows, &into)?;
            }
            start = rows.end;
        }
        Ok(())
    }

    /// Returns the dtype that holds all values of a tensor: that of the files, or fp32 if they are
    /// quantized or differ.
    pub(crate) fn kind(&self, name: &str) -> Kind {
        let pieces = self.mapping.tensor(name).map(|tensor| &tensor.pieces);
        let pieces = pieces.into_iter().flatten();
        let mut kinds = pieces.map(|piece| self.table.tensors[&piece.name].plain_kind());
        let first = kinds.next().flatten();
        let is_same = kinds.all(|kind| kind == first);
        first.filter(|_| is_same).unwrap_or(Kind::Float)
    }

    /// Returns the bytes that the values of a slice have in the files.
    pub(crate) fn stored_bytes(&self, slice: &TensorSlice) -> u64 {
        let elements: i64 = slice.shape.iter().product();
        let piece = self
            .mapping
            .tensor(&slice.name)
            .and_then(|t| t.pieces.first());
        let bits = piece.map_or(0, |piece| self.table.tensors[&piece.name].bits());
        elements as u64 * bits / 8
    }

    /// Returns the file and the position where a tensor begins, for sorting.
    pub(crate) fn position(&self, name: &str) -> Option<(usize, u64)> {
        let piece = self.mapping.tensor(name)?.pieces.first()?;
        Some(self.table.position(&self.table.tensors[&piece.name]))
    }

    /// Compares an output layer that repeats the embedding with it.
    ///
    /// # Errors
    /// If they differ, or a file cannot be read.
    pub(crate) fn check_repeated(&self, repeated: &str) -> Result<(), Error> {
        let embedding = self
            .mapping
            .tensor("embedding")
            .map(|tensor| &tensor.pieces[0].name);
        let embedding = embedding.expect("every model has an embedding");
        let [first, second] = [embedding.as_str(), repeated].map(|name| &self.table.tensors[name]);
        let differs = || {
            let reason = format!(
                "config.json says that embeddings are tied, and it differs from {embedding}: set \
                 tie_word_embeddings to false"
            );
            Err(self.table.error(repeated, reason))
        };
        if first.shape != second.shape {
            return differs();
        }
        let [rows, columns] = [first.shape[0], first.shape[1]];
        let chunk = (CHUNK_BYTES / (4 * columns.max(1))).max(1);
        for start in (0..rows).step_by(chunk as usize) {
            let region = Region {
                is_vector: false,
                matrix: 0,
                rows: start..(start + chunk).min(rows),
                columns: 0..columns,
            };
            let first = self.table.read(first, &region)?.to_kind(Kind::Float);
            if first != self.table.read(second, &region)?.to_kind(Kind::Float) {
                return differs();
            }
        }
        Ok(())
    }

    /// Copies those of `rows` that a piece has.
    fn read_rows(
        &self,
        piece: &Piece,
        part: &Part,
        rows: &Range<u64>,
        into: &Tensor,
    ) -> Result<(), Error> {
        let runs: Vec<Run> = piece
            .runs
            .iter()
            .filter_map(|run| run.within(rows))
            .collect();
        let last = |run: &Run| run.theirs + (run.count - 1) * run.step;
        let Some(first) = runs.iter().map(|run| run.theirs).min() else {
            return Ok(());
        };
        let end = runs.iter().map(last).max().map_or(first, |last| last + 1);
        let mut sides = [first..end, part.columns.clone()];
        if piece.is_transposed {
            sides.reverse();
        }
        let [rows, columns] = sides;
        let region = Region {
            is_vector: part.is_vector,
            matrix: piece.matrix,
            rows,
            columns,
        };
        let found = &self.table.tensors[&piece.name];
        if let [run] = runs[..]
            && run.step == 1
            && !piece.is_transposed
        {
            let start = (run.ours - part.rows.start) as i64;
            let target = into.narrow(0, start, run.count as i64);
            if self.table.read_directly(found, &region, &target)? {
                return Ok(());
            }
        }
        let read = self.table.read(found, &region)?;
        let read = if piece.is_transposed {
            read.transpose(0, 1)
        } else {
            read
        };
        for run in runs {
            let from = (run.theirs - first) as i64;
            let end = from + ((run.count - 1) * run.step + 1) as i64;
            let values = read.slice(0, from, end, run.step as i64);
            let target = into.narrow(0, (run.ours - part.rows.start) as i64, run.count as i64);
            tch::no_grad(|| target.shallow_clone().copy_(&values));
        }
        Ok(())
    }
}

impl Part {
    fn of(slice: &TensorSlice) -> Part {
        let range = |dim: usize| match slice.shape.get(dim) {
            Some(&size) => slice.offset[dim] as u64..(slice.offset[dim] + size) as u64,
            None => 0..1,
        };
        Part {
            is_vector: slice.shape.len() == 1,
            rows: range(0),
            columns: range(1),
        }
    }
}

impl Run {
    /// Returns the rows of a run that are among these of the model.
    fn within(&self, rows: &Range<u64>) -> Option<Run> {
        let start = self.ours.max(rows.start);
        let end = (self.ours + self.count).min(rows.end);
        (start < end).then(|| Run {
            ours: start,
            theirs: self.theirs + (start - self.ours) * self.step,
            step: self.step,
            count: end - start,
        })
    }
}
