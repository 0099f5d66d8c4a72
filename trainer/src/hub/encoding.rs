//! The values of a folder's tensors, plain or quantized: FP8 in blocks and MXFP4.
//!
//! All are exact: a stored value times its scale in fp32.

use super::{
    config_json::ConfigJson,
    folder::{StoredTensor, TensorTable, open_file},
};
use crate::Error;
use checkpoint::with_tensor_bytes;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::json;
use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};
use tch::{Device, Kind, Tensor};

/// Elements that share a scale in MXFP4.
const MX_GROUP: u64 = 32;
/// Bytes of such a group.
const MX_BYTES: u64 = 16;
/// The values of four bits in MXFP4 (OCP Microscaling Formats, E2M1).
const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Bytes of a part of a row from which the part is read alone, and not the whole row.
const MIN_READ_BYTES: u64 = 64 << 10;

/// Takes bytes with their offset.
pub(crate) type WriteBytes<'a> = dyn Fn(&[u8], u64) -> Result<(), Error> + 'a;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 1 << 20;

/// The form of a tensor's values in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Encoding {
    Plain(Kind),
    /// FP8 (E4M3), and a scale for each block of rows and columns.
    Fp8Blocks {
        scales: StoredTensor,
        block: [u64; 2],
    },
    /// Four bits, and a scale for each 32 values of a row.
    Mxfp4 {
        scales: StoredTensor,
    },
    /// Values that moerun does not compute with.
    Other,
}

/// A tensor as the model's formulas see it.
#[derive(Debug, Clone)]
pub(crate) struct LogicalTensor {
    /// `[n]`, `[rows, columns]` or `[matrices, rows, columns]`.
    pub(crate) shape: Vec<u64>,
    data: StoredTensor,
    encoding: Encoding,
    /// True if the file has columns as rows.
    is_transposed: bool,
}

/// A part of one matrix, or of one vector, of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Region {
    /// True if the tensor consists of vectors: matrices with one column.
    pub(crate) is_vector: bool,
    pub(crate) matrix: u64,
    pub(crate) rows: Range<u64>,
    pub(crate) columns: Range<u64>,
}

/// The tensors of a folder without the scales of quantized ones.
pub(crate) struct LogicalTable {
    pub(crate) table: TensorTable,
    pub(crate) tensors: BTreeMap<String, LogicalTensor>,
    files: Vec<File>,
}

impl LogicalTable {
    /// Combines quantized tensors with their scales, and opens the files.
    ///
    /// # Errors
    /// If a quantization is incomplete or unknown.
    pub(crate) fn new(table: TensorTable, config: &ConfigJson) -> Result<LogicalTable, Error> {
        let mut tensors = BTreeMap::new();
        for (name, data) in &table.tensors {
            if is_scale(&table, name) {
                continue;
            }
            let (name, tensor) = logical(&table, name, data, config)?;
            tensors.insert(name, tensor);
        }
        let open = |name: &String| open_file(&table.folder.join(name));
        let files = table.files.iter().map(open).collect::<Result<_, _>>()?;
        Ok(LogicalTable {
            table,
            tensors,
            files,
        })
    }

    /// Returns an error about a tensor of the folder.
    pub(crate) fn error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        match self.tensors.get(name) {
            Some(tensor) => {
                let path = self.table.path(&tensor.data);
                Error::Folder(format!("{}: {name}: {reason}", path.display()))
            }
            None => self.table.error(name, reason),
        }
    }

    /// Refuses a tensor whose values moerun does not compute with.
    ///
    /// # Errors
    /// If its dtype is none of fp32, bf16, fp16, and the quantized ones.
    pub(crate) fn check_dtype(&self, name: &str, tensor: &LogicalTensor) -> Result<(), Error> {
        if tensor.encoding != Encoding::Other {
            return Ok(());
        }
        Err(self.error(
            name,
            format!(
                "its dtype {:?} is not supported: F32, BF16, F16, F8_E4M3 with block scales and \
                 MXFP4 are",
                tensor.data.dtype
            ),
        ))
    }

    /// Returns where a tensor begins: its file's index and its position.
    pub(crate) fn position(&self, tensor: &LogicalTensor) -> (usize, u64) {
        (tensor.data.file, tensor.data.start)
    }

    /// Reads a region, in host memory: `[rows, columns]`, in fp32 if the tensor is quantized and
    /// else in its own dtype. It need not be contiguous.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn read(&self, tensor: &LogicalTensor, region: &Region) -> Result<Tensor, Error> {
        let [rows, columns] = tensor.rows_and_columns(region.is_vector);
        if tensor.is_transposed {
            let stored = StoredMatrix {
                matrix: region.matrix,
                rows: columns,
                columns: rows,
            };
            let part = self.read_stored(tensor, &stored, &region.columns, &region.rows)?;
            return Ok(part.transpose(0, 1));
        }
        let stored = StoredMatrix {
            matrix: region.matrix,
            rows,
            columns,
        };
        self.read_stored(tensor, &stored, &region.rows, &region.columns)
    }

    /// Reads whole rows directly into `target`, `[rows, columns]`, if the file has them one after
    /// the other in its dtype. Returns false, and reads nothing, if not.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn read_directly(
        &self,
        tensor: &LogicalTensor,
        region: &Region,
        target: &Tensor,
    ) -> Result<bool, Error> {
        let [rows, columns] = tensor.rows_and_columns(region.is_vector);
        let has_kind = tensor.encoding == Encoding::Plain(target.kind());
        let is_in_order = !tensor.is_transposed && region.columns == (0..columns);
        let fits = target.device() == Device::Cpu && target.is_contiguous();
        if !(has_kind && is_in_order && fits) {
            return Ok(false);
        }
        let data = &tensor.data;
        let row_bytes = columns * target.kind().elt_size_in_bytes() as u64;
        let first = data.start + (region.matrix * rows + region.rows.start) * row_bytes;
        let read = with_tensor_bytes(target, |into| {
            self.files[data.file].read_exact_at(into, first)
        });
        read.map_err(Error::io("cannot read", &self.table.path(data)))?;
        Ok(true)
    }

    /// Passes the bytes of a tensor that is not quantized to `write`, with their offset.
    ///
    /// # Errors
    /// If the file cannot be read, or `write` fails.
    pub(crate) fn copy(&self, tensor: &LogicalTensor, write: &WriteBytes) -> Result<(), Error> {
        let data = &tensor.data;
        let mut buffer = vec![0; COPY_BYTES.min(data.bytes() as usize)];
        let mut done = 0;
        while done < data.bytes() {
            let count = (data.bytes() - done).min(COPY_BYTES as u64);
            let part = &mut buffer[..count as usize];
            let read = self.files[data.file].read_exact_at(part, data.start + done);
            read.map_err(Error::io("cannot read", &self.table.path(data)))?;
            write(part, done)?;
            done += count;
        }
        Ok(())
    }

    fn read_stored(
        &self,
        tensor: &LogicalTensor,
        of: &StoredMatrix,
        rows: &Range<u64>,
        columns: &Range<u64>,
    ) -> Result<Tensor, Error> {
        let data = &tensor.data;
        let file = StoredBytes {
            file: &self.files[data.file],
            path: &self.table.path(data),
            start: data.start,
        };
        match &tensor.encoding {
            Encoding::Plain(kind) => {
                let bytes = kind.elt_size_in_bytes() as u64;
                read_plain(&file, of, *kind, bytes, rows, columns)
            }
            Encoding::Fp8Blocks { scales, block } => {
                let bytes = read_plain(&file, of, Kind::Uint8, 1, rows, columns)?.contiguous();
                let blocks = [
                    rows.start / block[0]..rows.end.div_ceil(block[0]),
                    columns.start / block[1]..columns.end.div_ceil(block[1]),
                ];
                let scales = self.read_scales(scales, of, block, &blocks)?;
                Ok(decode_fp8(&bytes, &scales, &blocks, block, rows, columns))
            }
            Encoding::Mxfp4 { scales } => {
                let groups = columns.start / MX_GROUP..columns.end.div_ceil(MX_GROUP);
                let packed = StoredMatrix {
                    columns: of.columns / MX_GROUP * MX_BYTES,
                    ..*of
                };
                let bytes = groups.start * MX_BYTES..groups.end * MX_BYTES;
                let bytes = read_plain(&file, &packed, Kind::Uint8, 1, rows, &bytes)?.contiguous();
                let scaled = StoredMatrix {
                    columns: of.columns / MX_GROUP,
                    ..*of
                };
                let scale_file = StoredBytes {
                    file: &self.files[scales.file],
                    path: &self.table.path(scales),
                    start: scales.start,
                };
                let scales = read_plain(&scale_file, &scaled, Kind::Uint8, 1, rows, &groups)?;
                let values = decode_mxfp4(&bytes, &scales.contiguous());
                let first = (columns.start - groups.start * MX_GROUP) as i64;
                Ok(values.narrow(1, first, (columns.end - columns.start) as i64))
            }
            Encoding::Other => Err(Error::Folder(format!(
                "{}: a tensor of dtype {:?} cannot be read",
                file.path.display(),
                data.dtype
            ))),
        }
    }

    /// Reads the scales of these blocks in fp32.
    fn read_scales(
        &self,
        scales: &StoredTensor,
        of: &StoredMatrix,
        block: &[u64; 2],
        blocks: &[Range<u64>; 2],
    ) -> Result<Tensor, Error> {
        let file = StoredBytes {
            file: &self.files[scales.file],
            path: &self.table.path(scales),
            start: scales.start,
        };
        let grid = StoredMatrix {
            matrix: of.matrix,
            rows: of.rows.div_ceil(block[0]),
            columns: of.columns.div_ceil(block[1]),
        };
        let (kind, bytes) = match scales.dtype {
            Dtype::F32 => (Kind::Float, 4),
            Dtype::BF16 => (Kind::BFloat16, 2),
            _ => (Kind::Uint8, 1),
        };
        let read = read_plain(&file, &grid, kind, bytes, &blocks[0], &blocks[1])?.contiguous();
        if kind != Kind::Uint8 {
            return Ok(read.to_kind(Kind::Float));
        }
        let exponents = with_tensor_bytes(&read, |bytes| {
            bytes
                .iter()
                .map(|&scale| power_of_two(scale))
                .collect::<Vec<f32>>()
        });
        Ok(Tensor::from_slice(&exponents).view(read.size().as_slice()))
    }
}

impl LogicalTensor {
    /// Returns the number of matrices, and rows and columns of each. A vector has one column.
    pub(crate) fn matrices(&self) -> (u64, [u64; 2]) {
        (
            self.shape.iter().rev().skip(2).product(),
            matrix_of(&self.shape),
        )
    }

    /// Returns the rows and columns of each matrix, or of each vector.
    fn rows_and_columns(&self, is_vector: bool) -> [u64; 2] {
        if is_vector {
            [self.shape.last().copied().unwrap_or(1), 1]
        } else {
            matrix_of(&self.shape)
        }
    }

    /// Returns the dtype in the file, if the tensor is not quantized.
    pub(crate) fn plain_dtype(&self) -> Option<Dtype> {
        match self.encoding {
            Encoding::Plain(_) | Encoding::Other => Some(self.data.dtype),
            Encoding::Fp8Blocks { .. } | Encoding::Mxfp4 { .. } => None,
        }
    }

    /// Returns the dtype of the values, if the tensor is not quantized.
    pub(crate) fn plain_kind(&self) -> Option<Kind> {
        match self.encoding {
            Encoding::Plain(kind) => Some(kind),
            Encoding::Fp8Blocks { .. } | Encoding::Mxfp4 { .. } | Encoding::Other => None,
        }
    }

    /// True if the file has columns as rows.
    pub(crate) fn is_transposed(&self) -> bool {
        self.is_transposed
    }

    /// Returns the bits of a value in the file, without scales.
    pub(crate) fn bits(&self) -> u64 {
        match self.encoding {
            Encoding::Mxfp4 { .. } => 4,
            _ => self.data.dtype.bitsize() as u64,
        }
    }

    /// Returns the name of the tensor's file.
    pub(crate) fn file<'a>(&self, table: &'a TensorTable) -> &'a str {
        &table.files[self.data.file]
    }
}

/// One matrix of a tensor in its file.
#[derive(Debug, Clone, Copy)]
struct StoredMatrix {
    matrix: u64,
    rows: u64,
    columns: u64,
}

/// The bytes of a tensor in its file.
struct StoredBytes<'a> {
    file: &'a File,
    path: &'a Path,
    /// Position of the first.
    start: u64,
}

/// Returns rows and columns of each matrix of a tensor.
fn matrix_of(shape: &[u64]) -> [u64; 2] {
    match *shape {
        [] => [1, 1],
        [rows] => [rows, 1],
        [.., rows, columns] => [rows, columns],
    }
}

fn is_scale(table: &TensorTable, name: &str) -> bool {
    // A scale of a tensor that is not quantized is left over, and refused like any other tensor.
    let has_dtype = |name: &str, dtype: Dtype| {
        let tensor = table.tensors.get(name);
        tensor.is_some_and(|tensor| tensor.dtype == dtype)
    };
    let of_blocks = name.strip_suffix("_scale_inv");
    let of_groups = name
        .strip_suffix("_scales")
        .map(|base| format!("{base}_blocks"));
    of_blocks.is_some_and(|base| has_dtype(base, Dtype::F8_E4M3))
        || of_groups.is_some_and(|blocks| has_dtype(&blocks, Dtype::U8))
}

/// Returns a tensor with the name that it has without quantization.
fn logical(
    table: &TensorTable,
    name: &str,
    data: &StoredTensor,
    config: &ConfigJson,
) -> Result<(String, LogicalTensor), Error> {
    if let Some(base) = name.strip_suffix("_blocks")
        && data.dtype == Dtype::U8
    {
        let tensor = mxfp4(table, name, base, data)?;
        return Ok((base.to_string(), tensor));
    }
    let plain = |kind| Encoding::Plain(kind);
    let encoding = match data.dtype {
        Dtype::F32 => plain(Kind::Float),
        Dtype::BF16 => plain(Kind::BFloat16),
        Dtype::F16 => plain(Kind::Half),
        Dtype::F8_E4M3 => fp8_blocks(table, name, data, config)?,
        _ => Encoding::Other,
    };
    let tensor = LogicalTensor {
        shape: data.shape.clone(),
        data: data.clone(),
        encoding,
        is_transposed: false,
    };
    Ok((name.to_string(), tensor))
}

fn fp8_blocks(
    table: &TensorTable,
    name: &str,
    data: &StoredTensor,
    config: &ConfigJson,
) -> Result<Encoding, Error> {
    let quantization = config.section("quantization_config")?.ok_or_else(|| {
        config.error(
            "quantization_config",
            format!("it is missing, and {name} is quantized"),
        )
    })?;
    quantization.expect("quant_method", &[json!("fp8")])?;
    quantization.expect("fmt", &[json!("e4m3")])?;
    let block: [u64; 2] = quantization.require(&["weight_block_size"])?;
    if block.contains(&0) {
        return Err(quantization.error("weight_block_size", "a block has no rows or columns"));
    }
    let scale_name = format!("{name}_scale_inv");
    let Some(scales) = table.tensors.get(&scale_name) else {
        return Err(table.error(
            name,
            format!("it is quantized, and {scale_name} is missing"),
        ));
    };
    let [rows, columns] = matrix_of(&data.shape);
    let mut expected = data.shape.clone();
    expected.truncate(data.shape.len().saturating_sub(2));
    expected.extend([rows.div_ceil(block[0]), columns.div_ceil(block[1])]);
    let is_known = [Dtype::F32, Dtype::BF16, Dtype::F8_E8M0, Dtype::U8].contains(&scales.dtype);
    if scales.shape != expected || !is_known {
        let reason = format!(
            "its shape is {:?} and its dtype {:?}; blocks of {} x {} of {name} {:?} need {:?} in \
             F32, BF16 or F8_E8M0",
            scales.shape, scales.dtype, block[0], block[1], data.shape, expected
        );
        return Err(table.error(&scale_name, reason));
    }
    Ok(Encoding::Fp8Blocks {
        scales: scales.clone(),
        block,
    })
}

/// Returns a tensor `[matrices, columns, rows]` that is stored as
/// `[matrices, rows, columns / 32, 16]`.
fn mxfp4(
    table: &TensorTable,
    name: &str,
    base: &str,
    data: &StoredTensor,
) -> Result<LogicalTensor, Error> {
    let scale_name = format!("{base}_scales");
    let Some(scales) = table.tensors.get(&scale_name) else {
        return Err(table.error(
            name,
            format!("it is quantized, and {scale_name} is missing"),
        ));
    };
    let [matrices, rows, groups, MX_BYTES] = data.shape[..] else {
        let reason = format!("its shape {:?} is not that of MXFP4 blocks", data.shape);
        return Err(table.error(name, reason));
    };
    if table.tensors.contains_key(base) {
        return Err(table.error(name, format!("{base} is there too")));
    }
    if scales.shape != [matrices, rows, groups] || scales.dtype != Dtype::U8 {
        let reason = format!(
            "its shape is {:?} and its dtype {:?}; {name} needs {:?} in U8",
            scales.shape,
            scales.dtype,
            [matrices, rows, groups]
        );
        return Err(table.error(&scale_name, reason));
    }
    Ok(LogicalTensor {
        shape: vec![matrices, groups * MX_GROUP, rows],
        data: data.clone(),
        encoding: Encoding::Mxfp4 {
            scales: scales.clone(),
        },
        is_transposed: true,
    })
}

/// Reads rows and columns of a matrix whose elements have `bytes` bytes.
fn read_plain(
    from: &StoredBytes,
    of: &StoredMatrix,
    kind: Kind,
    bytes: u64,
    rows: &Range<u64>,
    columns: &Range<u64>,
) -> Result<Tensor, Error> {
    let count = rows.end - rows.start;
    let width = columns.end - columns.start;
    let row_bytes = of.columns * bytes;
    let first = from.start + (of.matrix * of.rows + rows.start) * row_bytes;
    let read = |into: &mut [u8], position| {
        from.file
            .read_exact_at(into, position)
            .map_err(Error::io("cannot read", from.path))
    };
    let empty = |width: u64| Tensor::f_empty([count as i64, width as i64], (kind, Device::Cpu));
    if width == of.columns || width * bytes < MIN_READ_BYTES {
        let whole = empty(of.columns)?;
        with_tensor_bytes(&whole, |into| read(into, first))?;
        return Ok(whole.narrow(1, columns.start as i64, width as i64));
    }
    let part = empty(width)?;
    with_tensor_bytes(&part, |into| {
        let mut rows = into.chunks_mut((width * bytes) as usize).zip(0..);
        rows.try_for_each(|(row, number)| {
            read(row, first + number * row_bytes + columns.start * bytes)
        })
    })?;
    Ok(part)
}

fn power_of_two(exponent: u8) -> f32 {
    // E8M0: 255 is NaN. Below 2^-126 values are subnormal, and exact.
    match exponent {
        255 => f32::NAN,
        _ => f64::from(exponent).mul_add(1.0, -127.0).exp2() as f32,
    }
}

/// Returns the values of all bytes in FP8 E4M3 (arXiv 2209.05433): sign, 4 bits of exponent with
/// bias 7, 3 bits of mantissa, no infinities.
fn fp8_values() -> [f32; 256] {
    std::array::from_fn(|byte| {
        let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
        let exponent = (byte >> 3 & 0xf) as i32;
        let mantissa = (byte & 7) as f32;
        let size = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        sign * size
    })
}

fn decode_fp8(
    bytes: &Tensor,
    scales: &Tensor,
    blocks: &[Range<u64>; 2],
    block: &[u64; 2],
    rows: &Range<u64>,
    columns: &Range<u64>,
) -> Tensor {
    let values = fp8_values();
    let width = (columns.end - columns.start) as usize;
    let grid = (blocks[1].end - blocks[1].start) as usize;
    let scales: Vec<f32> = Vec::try_from(scales.flatten(0, -1)).expect("scales are fp32");
    let result = Tensor::empty(bytes.size(), (Kind::Float, Device::Cpu));
    let decode = |number: usize, from: &[u8], into: &mut [u8]| {
        let block_row = (rows.start + number as u64) / block[0] - blocks[0].start;
        let scales = &scales[block_row as usize * grid..][..grid];
        for (column, (byte, into)) in from.iter().zip(into.chunks_exact_mut(4)).enumerate() {
            let block_column = (columns.start + column as u64) / block[1] - blocks[1].start;
            let value = values[*byte as usize] * scales[block_column as usize];
            into.copy_from_slice(&value.to_ne_bytes());
        }
    };
    with_tensor_bytes(bytes, |from| {
        with_tensor_bytes(&result, |into| {
            into.par_chunks_mut(4 * width.max(1))
                .zip(from.par_chunks(width.max(1)))
                .enumerate()
                .for_each(|(number, (into, from))| decode(number, from, into));
        });
    });
    result
}

/// Returns values in fp32, twice as many per row as bytes. The lower half of a byte comes first.
fn decode_mxfp4(bytes: &Tensor, scales: &Tensor) -> Tensor {
    let [rows, packed] = bytes.size()[..] else {
        unreachable!("rows of bytes are a matrix")
    };
    let result = Tensor::empty([rows, 2 * packed], (Kind::Float, Device::Cpu));
    let decode = |from: &[u8], scale: u8, into: &mut [u8]| {
        let scale = power_of_two(scale);
        for (byte, into) in from.iter().zip(into.chunks_exact_mut(8)) {
            let low = E2M1[usize::from(byte & 0xf)] * scale;
            let high = E2M1[usize::from(byte >> 4)] * scale;
            into[..4].copy_from_slice(&low.to_ne_bytes());
            into[4..].copy_from_slice(&high.to_ne_bytes());
        }
    };
    let group = MX_BYTES as usize;
    with_tensor_bytes(bytes, |from| {
        with_tensor_bytes(scales, |scales| {
            with_tensor_bytes(&result, |into| {
                into.par_chunks_mut(8 * group)
                    .zip(from.par_chunks(group))
                    .zip(scales.par_iter())
                    .for_each(|((into, from), &scale)| decode(from, scale, into));
            });
        });
    });
    result
}
