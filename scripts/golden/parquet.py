#!/usr/bin/env python3
"""Writes small Parquet files with every type, nesting and compression that text comes in.

usage: scripts/golden/parquet.py [FOLDER]     (default: dataset/tests/golden/parquet)

Each file holds the texts of TEXTS in a column `text`, unless its name says otherwise. The tests are
in dataset/src/input/tests/parquet.rs.
Made with pyarrow 26.0.1.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ["one", None, "zwei: größer", "", "three\nlines\n", "one"]
IDS = pa.array(range(len(TEXTS)), pa.int64())


def write(name, text, **options):
    table = pa.table({"id": IDS, "text": text})
    pq.write_table(table, FOLDER / f"{name}.parquet", **options)


FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "dataset/tests/golden/parquet")
FOLDER.mkdir(parents=True, exist_ok=True)

write("large-string", pa.array(TEXTS, pa.large_string()))
write("binary", pa.array([text and text.encode() for text in TEXTS], pa.binary()))
write("dictionary", pa.array(TEXTS).dictionary_encode())
write("row-groups", pa.array(TEXTS), row_group_size=2, data_page_version="2.0")
write("delta", pa.array(TEXTS), use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
for codec in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]:
    write(codec, pa.array(TEXTS), compression=codec, use_dictionary=False)

nested = pa.array([{"text": text, "n": 1} for text in TEXTS[:-1]] + [None])
pq.write_table(pa.table({"doc": nested, "id": IDS}), FOLDER / "nested.parquet")

required = pa.schema([pa.field("text", pa.string(), nullable=False)])
table = pa.table({"text": ["a", "b"]}, required)
pq.write_table(table, FOLDER / "required.parquet")

lists = pa.table({"texts": pa.array([["a", "b"], []], pa.list_(pa.string())), "id": [1, 2]})
pq.write_table(lists, FOLDER / "lists.parquet")
