//! Compressed files: recognizes and decompresses them.

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use liblzma::{bufread::XzDecoder, stream};
use std::io::{self, BufRead, Read};

/// Most memory for decompressing `.xz`, in bytes: enough for `xz -9`.
const XZ_MEMORY: u64 = 128 << 20;

/// A compression that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

impl Compression {
    /// Returns the compression of a file that starts with these bytes.
    pub(super) fn of_start(start: &[u8]) -> Option<Self> {
        let block_or_end = |start: &[u8]| {
            let magic = start.get(4..10);
            magic == Some(b"1AY&SY") || magic == Some(b"\x17\x72\x45\x38\x50\x90")
        };
        match start {
            [0x1F, 0x8B, 8, ..] => Some(Self::Gzip),
            [0x28, 0xB5, 0x2F, 0xFD, ..] => Some(Self::Zstd),
            // A skippable frame, with which parallel compressors begin.
            [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] => Some(Self::Zstd),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] if block_or_end(start) => Some(Self::Bzip2),
            [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            _ => None,
        }
    }

    /// Returns the compression that a file's suffix stands for.
    pub(super) fn of_extension(extension: &str) -> Option<Self> {
        match extension {
            "gz" | "gzip" | "bgz" => Some(Self::Gzip),
            "zst" | "zstd" => Some(Self::Zstd),
            "bz2" => Some(Self::Bzip2),
            "xz" => Some(Self::Xz),
            _ => None,
        }
    }

    /// Returns the name for messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "Zstandard",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
        }
    }

    /// Returns a reader of the contents: of all members, frames or streams of the file.
    pub(super) fn decompress(self, file: impl BufRead + 'static) -> io::Result<Box<dyn Read>> {
        let inner: Box<dyn Read> = match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(file)),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(file)?),
            Self::Bzip2 => Box::new(MultiBzDecoder::new(file)),
            Self::Xz => {
                let flags = stream::CONCATENATED;
                let decoder = stream::Stream::new_stream_decoder(XZ_MEMORY, flags)?;
                Box::new(XzDecoder::new_stream(file, decoder))
            }
        };
        Ok(Box::new(Named {
            inner,
            compression: self,
        }))
    }
}

/// A decompressor that adds its name to errors.
struct Named {
    inner: Box<dyn Read>,
    compression: Compression,
}

impl Read for Named {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read(into).map_err(|error| {
            if error.kind() == io::ErrorKind::Interrupted {
                return error;
            }
            let name = self.compression.name();
            let cause = if error.to_string().contains("memory") {
                format!("the {name} data needs too large a window: compress it anew ({error})")
            } else {
                format!("the {name} data is truncated or damaged ({error})")
            };
            io::Error::new(error.kind(), cause)
        })
    }
}
