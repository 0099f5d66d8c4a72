//! Rows of Parquet files. Only the columns of the text are read.

use super::{
    document::{Documents, Place},
    fields::{Row, Value, take_row},
    options::TextKey,
};
use crate::{Error, quiet_panic::without_panic};
use bytes::Bytes;
use parquet::{
    basic::{ConvertedType, LogicalType, Type},
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, ByteArrayType},
    errors::{ParquetError, Result as ParquetResult},
    file::{
        metadata::{ParquetMetaData, RowGroupMetaData},
        reader::{ChunkReader, FileReader, Length, RowGroupReader, SerializedFileReader},
    },
    schema::types::{ColumnDescriptor, SchemaDescriptor},
};
use std::{
    fs::File,
    io::{BufRead, BufReader},
};

/// Largest number of bytes of an unpacked page of Parquet. Files with larger pages are refused.
pub const MAX_PAGE: usize = 1 << 30;

/// Largest ratio of the unpacked size of a large page to its size on disk. No text is packed
/// better, but a damaged header may claim it.
const MAX_RATIO: usize = 1024;

/// Largest unpacked size of a page for which the ratio does not matter.
const SMALL_PAGE: usize = 32 << 20;

/// Most columns that a message names.
const MAX_NAMES: usize = 40;

/// A file with the columns that hold the text.
struct Table {
    reader: SerializedFileReader<Pages>,
    columns: Vec<usize>,
}

impl Table {
    fn open(file: File, key: &TextKey) -> Result<Self, String> {
        let reader = catch_panic(|| SerializedFileReader::new(Pages(file))).map_err(damaged)?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let columns = key.paths().iter().map(|path| find_column(schema, path));
        let columns: Vec<usize> = columns.collect::<Result<_, _>>()?;
        if !has_valid_extents(reader.metadata(), &columns) {
            return Err("the Parquet data is damaged: a row group has an invalid size".into());
        }
        Ok(Self { reader, columns })
    }
}

/// Calls the library, which panics at some damage, and returns an error instead.
fn catch_panic<T>(call: impl FnOnce() -> ParquetResult<T>) -> ParquetResult<T> {
    without_panic(call).unwrap_or_else(|_| {
        Err(ParquetError::General(
            "its contents are inconsistent".into(),
        ))
    })
}

fn damaged(error: ParquetError) -> String {
    format!("the Parquet data is damaged: {error}")
}

/// True if no size or offset is negative, and the row groups have the rows of the file.
///
/// The library panics at negative offsets.
fn has_valid_extents(metadata: &ParquetMetaData, columns: &[usize]) -> bool {
    let groups = metadata.row_groups();
    let is_valid = |group: &RowGroupMetaData| {
        let mut chunks = columns.iter().map(|&column| group.columns().get(column));
        group.num_rows() >= 0
            && chunks.all(|chunk| {
                chunk.is_some_and(|chunk| {
                    let start = chunk.dictionary_page_offset();
                    start.unwrap_or(chunk.data_page_offset()) >= 0 && chunk.compressed_size() >= 0
                })
            })
    };
    let rows = groups
        .iter()
        .map(RowGroupMetaData::num_rows)
        .map(i128::from)
        .sum::<i128>();
    groups.iter().all(is_valid) && rows == metadata.file_metadata().num_rows().into()
}

/// Checks that a file can be opened and has the columns. Returns the cause if not.
pub(super) fn check(file: File, key: &TextKey) -> Result<(), String> {
    Table::open(file, key).map(drop)
}

/// Passes on the documents of a file, in the order of its rows.
pub(super) fn read(file: File, key: &TextKey, documents: &mut Documents) -> Result<(), Error> {
    let failed = |documents: &Documents, error| documents.error(Place::File, damaged(error));
    let table = Table::open(file, key).map_err(|cause| documents.error(Place::File, cause))?;
    let Table { reader, columns } = table;
    let mut number = 0;
    for group in 0..reader.num_row_groups() {
        let group =
            catch_panic(|| reader.get_row_group(group)).map_err(|e| failed(documents, e))?;
        let mut readers = columns
            .iter()
            .map(|&column| catch_panic(|| Cells::new(&*group, column)))
            .collect::<ParquetResult<Vec<_>>>()
            .map_err(|e| failed(documents, e))?;
        for _ in 0..group.metadata().num_rows() {
            number += 1;
            for cells in &mut readers {
                cells
                    .advance()
                    .map_err(|error| documents.error(Place::Row(number), damaged(error)))?;
            }
            let row = Row {
                values: readers.iter().map(Cells::value).collect(),
                non_finite: false,
            };
            take_row(documents, Place::Row(number), &row, push_bytes)?;
        }
    }
    Ok(())
}

fn push_bytes(documents: &mut Documents, bytes: &[u8]) -> Result<(), Error> {
    documents.bytes(bytes)
}

/// Returns the number of the column with this path.
fn find_column(schema: &SchemaDescriptor, path: &str) -> Result<usize, String> {
    let columns = schema.columns();
    let names = || {
        let names = columns
            .iter()
            .take(MAX_NAMES)
            .map(|column| column.path().string());
        let mut names = names.collect::<Vec<_>>().join(", ");
        if columns.len() > MAX_NAMES {
            names += &format!(" and {} more", columns.len() - MAX_NAMES);
        }
        names
    };
    let found = columns
        .iter()
        .position(|column| column.path().string() == path);
    let found = found.ok_or_else(|| {
        format!(
            "no column {path:?}, only {} (choose one with --text-key)",
            names()
        )
    })?;
    match find_unfit(&columns[found]) {
        None => Ok(found),
        Some(kind) => Err(format!(
            "the column {path:?} holds {kind}, not text; there are {} (choose one with --text-key)",
            names()
        )),
    }
}

/// Returns the kind of a column that holds no text.
fn find_unfit(column: &ColumnDescriptor) -> Option<String> {
    if column.max_rep_level() > 0 {
        return Some("lists".into());
    }
    let is_text = matches!(
        column.logical_type_ref(),
        None | Some(LogicalType::String | LogicalType::Enum | LogicalType::Json)
    );
    let is_number = column.converted_type() == ConvertedType::DECIMAL;
    match column.physical_type() {
        Type::BYTE_ARRAY if is_text && !is_number => None,
        Type::BYTE_ARRAY => Some("bytes of another type".into()),
        other => Some(other.to_string()),
    }
}

/// Cells of a column of a row group. One page is held at a time.
struct Cells {
    reader: ColumnReaderImpl<ByteArrayType>,
    max_level: i16,
    levels: Vec<i16>,
    values: Vec<ByteArray>,
}

impl Cells {
    fn new(group: &dyn RowGroupReader, column: usize) -> ParquetResult<Self> {
        let ColumnReader::ByteArrayColumnReader(reader) = group.get_column_reader(column)? else {
            return Err(ParquetError::General("a row group has other types".into()));
        };
        Ok(Self {
            reader,
            max_level: group
                .metadata()
                .column(column)
                .column_descr()
                .max_def_level(),
            levels: Vec::new(),
            values: Vec::new(),
        })
    }

    fn advance(&mut self) -> ParquetResult<()> {
        self.levels.clear();
        self.values.clear();
        let levels = (self.max_level > 0).then_some(&mut self.levels);
        let values = &mut self.values;
        let read = catch_panic(|| self.reader.read_records(1, levels, None, values))?;
        if read.0 == 1 {
            Ok(())
        } else {
            Err(ParquetError::EOF("a column has too few rows".into()))
        }
    }

    fn value(&self) -> Value<'_> {
        match self.values.first() {
            Some(value) => Value::Text(value.data()),
            None => Value::Null,
        }
    }
}

/// A Parquet file that refuses pages which would not fit in memory.
struct Pages(File);

impl Length for Pages {
    fn len(&self) -> u64 {
        Length::len(&self.0)
    }
}

impl ChunkReader for Pages {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let mut reader = self.0.get_read(start)?;
        let Some([unpacked, packed]) = find_page_sizes(reader.fill_buf()?) else {
            return Ok(reader);
        };
        let limit = MAX_PAGE.min(packed.saturating_mul(MAX_RATIO).max(SMALL_PAGE));
        if unpacked <= limit {
            return Ok(reader);
        }
        Err(ParquetError::General(format!(
            "a page of {} MiB does not fit in the {} MiB that it may take; write smaller pages",
            unpacked >> 20,
            limit >> 20
        )))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        // The library reserves the memory before it reads.
        if start.saturating_add(length as u64) > Length::len(self) {
            return Err(ParquetError::EOF("a part lies after the file's end".into()));
        }
        self.0.get_bytes(start, length)
    }
}

/// Returns the unpacked and the packed size of a page whose header starts with these bytes.
///
/// A header is a struct of Thrift's compact protocol. Its first three fields are `i32`: the type of
/// the page and these sizes. Numbers are zigzag-encoded.
fn find_page_sizes(header: &[u8]) -> Option<[usize; 2]> {
    const NEXT_FIELD_I32: u8 = 0x15;
    let mut rest = match header {
        [NEXT_FIELD_I32, 0..=6, rest @ ..] => rest,
        _ => return None,
    };
    let mut sizes = [0; 2];
    for size in &mut sizes {
        rest = rest.strip_prefix(&[NEXT_FIELD_I32])?;
        let len = 1 + rest.iter().take(5).position(|byte| byte & 0x80 == 0)?;
        let digits = rest[..len].iter().rev();
        let zigzag = digits.fold(0u64, |all, byte| (all << 7) | u64::from(byte & 0x7F));
        *size = usize::try_from(zigzag >> 1).ok()?;
        rest = &rest[len..];
    }
    Some(sizes)
}
