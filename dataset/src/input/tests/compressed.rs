//! Compressed files: all members are read, and damage is an error.

use super::{assert_refused, read_one};
use crate::input::InputOptions;
use flate2::Compression;
use std::io::Write;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    liblzma::encode_all(bytes, 0).unwrap()
}

type Compress = fn(&[u8]) -> Vec<u8>;

const ALL: [(&str, Compress); 4] = [("gz", gzip), ("zst", zstd), ("bz2", bzip2), ("xz", xz)];

#[test]
fn all_members_are_read() {
    let rows = |range: std::ops::Range<u32>| {
        let rows: Vec<_> = range
            .map(|n| format!("{{\"text\":\"row {n}\"}}\n"))
            .collect();
        rows.concat().into_bytes()
    };
    let expected: Vec<_> = (0..20).map(|n| format!("row {n}")).collect();
    for (suffix, compress) in ALL {
        // A row spans the second and third member. The last is empty.
        let whole = rows(0..20);
        let members = [&whole[..32], &whole[32..100], &whole[100..], b""];
        let file: Vec<u8> = members.iter().flat_map(|member| compress(member)).collect();
        // The first bytes tell the compression, whatever the suffix.
        for name in [
            format!("docs.jsonl.{suffix}"),
            "docs.jsonl".into(),
            format!("x.{suffix}"),
        ] {
            let read = read_one(&name, &file, &InputOptions::default()).unwrap();
            assert_eq!(read.texts, expected, "{name}");
        }
    }
    let skippable = [b"\x50\x2A\x4D\x18\x02\0\0\0ab", &zstd(b"text")[..]].concat();
    let read = read_one("a.txt.zst", &skippable, &InputOptions::default()).unwrap();
    assert_eq!(read.texts, ["text"]);
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let options = InputOptions::default();
    // Incompressible, so that the cut lies in the data and not only in a checksum.
    let mut state = 1u32;
    let mut text = String::new();
    for _ in 0..100_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push(char::from(b'a' + (state >> 24) as u8 % 26));
    }
    for (suffix, compress) in ALL {
        let name = format!("a.txt.{suffix}");
        let file = compress(text.as_bytes());
        for cut in [file.len() - 1, file.len() / 2, 12] {
            let refused = read_one(&name, &file[..cut], &options);
            assert_refused(refused, &[&name, "truncated or damaged"]);
        }
        let second = [&file[..], &file[..file.len() - 3]].concat();
        assert_refused(
            read_one(&name, &second, &options),
            &[&name, "truncated or damaged"],
        );
        let mut flipped = file.clone();
        let middle = file.len() / 2;
        flipped[middle] ^= 0x10;
        assert_refused(
            read_one(&name, &flipped, &options),
            &[&name, "truncated or damaged"],
        );
        let empty = read_one(&name, b"", &options);
        assert_refused(empty, &[&name, "as its suffix says"]);
        let plain = read_one(&name, b"plain text", &options);
        assert_refused(plain, &[&name, "as its suffix says"]);
    }
}

#[test]
fn compressed_files_are_recognized_by_their_contents() {
    let options = InputOptions::default();
    let twice = gzip(&zstd(b"text"));
    assert_refused(
        read_one("a.txt.gz", &twice, &options),
        &["compressed twice"],
    );
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    assert_refused(read_one("a.tgz", &gzip(&tar), &options), &["a tar archive"]);
    assert_refused(
        read_one("a.gz", &gzip(b"text"), &options),
        &["its kind is unknown"],
    );
    let utf16: Vec<u8> = "\u{FEFF}é"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    assert_eq!(
        read_one("a.txt.xz", &xz(&utf16), &options).unwrap().texts,
        ["é"]
    );
    // A dictionary of 1.5 GiB: the size is known before the memory is reserved.
    let mut preset = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    preset.dict_size(1 << 20);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&preset);
    let check = liblzma::stream::Check::None;
    let stream = liblzma::stream::Stream::new_stream_encoder(&filters, check).unwrap();
    let mut file = Vec::new();
    let mut encoder = liblzma::write::XzEncoder::new_stream(&mut file, stream);
    encoder.write_all(b"text").unwrap();
    encoder.finish().unwrap();
    assert_eq!(
        read_one("a.txt.xz", &file, &options).unwrap().texts,
        ["text"]
    );
    // Block header: size, flags, LZMA2's number, size of its properties, the dictionary's size.
    assert_eq!(file[14..16], [0x21, 1]);
    file[16] = 37;
    let header = crc32(&file[12..20]).to_le_bytes();
    file[20..24].copy_from_slice(&header);
    assert_refused(
        read_one("a.txt.xz", &file, &options),
        &["a.txt.xz", "too large a window"],
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
