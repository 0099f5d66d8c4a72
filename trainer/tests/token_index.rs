//! The cost of opening a data set does not grow with its documents: bytes read and held are
//! counted, in a process without other work.

use dataset::tokens::TokenFile;
use std::{fs::File, os::unix::fs::FileExt, path::Path};
use trainer::{config::SourceConfig, data::Dataset};

const DOCUMENTS: u64 = 100_000_000;
const TOKENS_PER_DOCUMENT: u64 = 600;

/// Writes an index and tokens of which only the ends are on disk.
fn write_sparse(folder: &Path) {
    let index = File::create(folder.join("text.idx")).unwrap();
    let mut header = b"MMIDIDX\x00\x00".to_vec();
    header.extend(1u64.to_le_bytes());
    header.push(8);
    header.extend(DOCUMENTS.to_le_bytes());
    header.extend((DOCUMENTS + 1).to_le_bytes());
    index
        .set_len(34 + 12 * DOCUMENTS + 8 * (DOCUMENTS + 1))
        .unwrap();
    index.write_all_at(&header, 0).unwrap();
    let length = (TOKENS_PER_DOCUMENT as i32).to_le_bytes();
    index
        .write_all_at(&length, 34 + 4 * (DOCUMENTS - 1))
        .unwrap();
    let bytes = 2 * TOKENS_PER_DOCUMENT;
    let offset = ((DOCUMENTS - 1) * bytes).to_le_bytes();
    let at = 34 + 4 * DOCUMENTS + 8 * (DOCUMENTS - 1);
    index.write_all_at(&offset, at).unwrap();
    let tokens = File::create(folder.join("text.bin")).unwrap();
    tokens.set_len(DOCUMENTS * bytes).unwrap();
}

/// Bytes that this thread has read from files.
fn bytes_read() -> u64 {
    let counters = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let read = counters
        .lines()
        .find_map(|line| line.strip_prefix("rchar: "));
    read.unwrap().parse().unwrap()
}

#[test]
fn of_a_hundred_million_documents_only_the_last_is_read() {
    let folder = tempfile::tempdir().unwrap();
    write_sparse(folder.path());
    let prefix = folder.path().join("text");
    let source = SourceConfig::new(&prefix);
    let read_before = bytes_read();
    let held_before = parallel::peak_resident().unwrap();
    let tokens = TokenFile::open(&prefix).unwrap();
    let data = Dataset::open(&[source], 4096, 100, 1).unwrap();
    let held = parallel::peak_resident().unwrap() - held_before;
    let read = bytes_read() - read_before;
    assert_eq!(tokens.len(), DOCUMENTS * TOKENS_PER_DOCUMENT);
    assert_eq!(data.num_tokens(), tokens.len());
    assert!(read < 64 << 10, "{read} bytes read");
    assert!(held < 1 << 20, "{held} bytes held");
    let last = tokens.read(tokens.len() - 2, 2).unwrap();
    assert_eq!(last, [0, 0]);
}
