//! Writing a folder's tensors: each is put together from the model's and written to its place.

use super::{
    encoding::{LogicalTable, LogicalTensor, Region},
    mapping::{MappedTensor, Mapping, TheirTensor},
    reader::CHUNK_BYTES,
    rule::Run,
    shards::{NewFile, NewTensor},
    values::ModelValues,
};
use crate::Error;
use checkpoint::{TensorSlice, with_tensor_bytes};
use rayon::prelude::*;
use safetensors::Dtype;
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};

/// The sources of a folder's tensors.
pub(crate) struct Sources<'a> {
    pub(crate) mapping: &'a Mapping,
    pub(crate) values: &'a dyn ModelValues,
    /// The folder that the model came from, for tensors that it carries through.
    pub(crate) before: Option<&'a LogicalTable>,
    /// Name of the tensor that a repeated one repeats.
    pub(crate) repeated: &'a str,
}

/// A file that is being written.
struct OpenFile<'a> {
    path: PathBuf,
    file: File,
    plan: &'a NewFile,
    /// Tensors that are still to be written.
    left: AtomicUsize,
}

/// Writes all files into a folder, and calls `progress` with the bytes that are done.
///
/// # Errors
/// If a tensor cannot be read, or a file cannot be written.
pub(crate) fn write_files(
    folder: &Path,
    files: &[NewFile],
    sources: &Sources,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), Error> {
    let open = files.iter().map(|plan| OpenFile::create(folder, plan));
    let open = open.collect::<Result<Vec<_>, Error>>()?;
    let tensors = open.iter().flat_map(|file| {
        let tensors = file.plan.tensors.iter();
        tensors.map(move |(tensor, position)| (file, tensor, *position))
    });
    let tensors: Vec<_> = tensors.collect();
    let done = AtomicU64::new(0);
    tensors
        .into_par_iter()
        .try_for_each(|(file, tensor, position)| {
            sources.write(tensor, &Place { file, position })?;
            file.count_tensor()?;
            let bytes = tensor.bytes();
            progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes);
            Ok(())
        })
}

impl OpenFile<'_> {
    fn create<'a>(folder: &Path, plan: &'a NewFile) -> Result<OpenFile<'a>, Error> {
        let path = folder.join(&plan.name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(Error::io("cannot create", &path))?;
        let written = file.write_all_at(&plan.header, 0);
        let written = written.and_then(|()| file.set_len(plan.len));
        written.map_err(Error::io("cannot write", &path))?;
        Ok(OpenFile {
            path,
            file,
            plan,
            left: AtomicUsize::new(plan.tensors.len()),
        })
    }

    /// Counts a tensor that is written. After the last one the file goes to the disk, while other
    /// threads write the next file.
    fn count_tensor(&self) -> Result<(), Error> {
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(());
        }
        let synced = self.file.sync_all();
        synced.map_err(Error::io("cannot write", &self.path))
    }
}

/// The place of a tensor in a file.
struct Place<'a> {
    file: &'a OpenFile<'a>,
    /// Position of the first byte.
    position: u64,
}

impl Place<'_> {
    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let written = self.file.file.write_all_at(bytes, self.position + offset);
        written.map_err(Error::io("cannot write", &self.file.path))
    }
}

impl Sources<'_> {
    fn write(&self, tensor: &NewTensor, place: &Place) -> Result<(), Error> {
        let name = &tensor.name;
        if let Some(theirs) = self.mapping.theirs.get(name) {
            return self.write_mapped(tensor, theirs, place);
        }
        if let Some(before) = self.before
            && let Some(carried) = before.tensors.get(name)
        {
            if carried.plain_dtype() == Some(tensor.dtype) {
                return before.copy(carried, &|bytes, offset| place.write(bytes, offset));
            }
            let chunks = before.regions(carried, CHUNK_BYTES);
            let mut offset = 0;
            for region in chunks {
                let values = before.read(carried, &region)?;
                offset += write_values(&values, tensor.dtype, place, offset)?;
            }
            return Ok(());
        }
        let theirs = &self.mapping.theirs[self.repeated];
        self.write_mapped(tensor, theirs, place)
    }

    /// Writes a tensor that the model has. Matrices whose rows keep their order are written in
    /// pieces; others are put together first.
    fn write_mapped(
        &self,
        tensor: &NewTensor,
        theirs: &TheirTensor,
        place: &Place,
    ) -> Result<(), Error> {
        let columns = theirs.columns();
        let row_bytes = columns * tensor.dtype.bitsize() as u64 / 8;
        let matrix_bytes = theirs.rows() * row_bytes;
        for matrix in 0..theirs.matrices() {
            let start = matrix * matrix_bytes;
            let pieces: Vec<_> = theirs.pieces_of(self.mapping, matrix).collect();
            let is_ordered = |run: &Run| run.step == 1;
            let mut runs = pieces.iter().flat_map(|(_, piece)| &piece.runs);
            if !theirs.is_transposed && runs.all(is_ordered) {
                for (ours, piece) in &pieces {
                    for run in &piece.runs {
                        self.write_run(ours, run, tensor.dtype, place, start, row_bytes)?;
                    }
                }
                continue;
            }
            let whole = Tensor::empty(
                [theirs.rows() as i64, columns as i64],
                (kind_of(tensor.dtype), Device::Cpu),
            );
            for (ours, piece) in &pieces {
                let values = self.rows(ours, 0, ours.shape[0])?;
                for run in &piece.runs {
                    let from = values.narrow(0, run.ours as i64, run.count as i64);
                    let first = run.theirs as i64;
                    let end = first + ((run.count - 1) * run.step + 1) as i64;
                    let mut into = whole.slice(0, first, end, run.step as i64);
                    tch::no_grad(|| into.copy_(&from));
                }
            }
            let stored = if theirs.is_transposed {
                whole.transpose(0, 1)
            } else {
                whole
            };
            write_values(&stored, tensor.dtype, place, start)?;
        }
        Ok(())
    }

    fn write_run(
        &self,
        ours: &MappedTensor,
        run: &Run,
        dtype: Dtype,
        place: &Place,
        start: u64,
        row_bytes: u64,
    ) -> Result<(), Error> {
        let columns = ours.shape.get(1).copied().unwrap_or(1);
        let chunk = (CHUNK_BYTES / (4 * columns.max(1))).max(1);
        let mut done = 0;
        while done < run.count {
            let count = chunk.min(run.count - done);
            let values = self.rows(ours, run.ours + done, count)?;
            let offset = start + (run.theirs + done) * row_bytes;
            write_values(&values, dtype, place, offset)?;
            done += count;
        }
        Ok(())
    }

    /// Returns rows of a tensor of the model as a matrix.
    fn rows(&self, ours: &MappedTensor, first: u64, count: u64) -> Result<Tensor, Error> {
        let global_shape: Vec<i64> = ours.shape.iter().map(|&size| size as i64).collect();
        let mut slice = TensorSlice::whole(&ours.name, &global_shape);
        slice.offset[0] = first as i64;
        slice.shape[0] = count as i64;
        let values = self.values.values(&slice, ours.is_selection_bias)?;
        Ok(values.view([count as i64, -1]))
    }
}

fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        _ => Kind::Float,
    }
}

/// Writes values in a dtype, and returns their length.
fn write_values(values: &Tensor, dtype: Dtype, place: &Place, offset: u64) -> Result<u64, Error> {
    let values = values.to_kind(kind_of(dtype)).contiguous();
    with_tensor_bytes(&values, |bytes| {
        place.write(bytes, offset)?;
        Ok(bytes.len() as u64)
    })
}

impl LogicalTable {
    /// Returns the regions of a tensor in the order of its values, of at most `bytes` in fp32 each.
    fn regions(&self, tensor: &LogicalTensor, bytes: u64) -> Vec<Region> {
        let is_vector = tensor.shape.len() < 2;
        let (matrices, [rows, columns]) = tensor.matrices();
        let chunk = (bytes / (4 * columns.max(1))).max(1);
        let mut regions = Vec::new();
        for matrix in 0..matrices {
            for start in (0..rows).step_by(chunk as usize) {
                regions.push(Region {
                    is_vector,
                    matrix,
                    rows: start..(start + chunk).min(rows),
                    columns: 0..columns,
                });
            }
        }
        regions
    }
}
