//! The size of a chunk and the limit of a message, which tests scale down together.

use crate::secure::Purpose;
use std::{str::FromStr, sync::LazyLock};

/// The size of a chunk, which stays in the cache while it is copied, checked and coded.
pub const DEFAULT_CHUNK_BYTES: usize = 256 << 10;

/// Environment variables of tests, which make a small state as hard to describe as a large one.
const CHUNK_VARIABLE: &str = "MOERUN_TEST_CHUNK_BYTES";
const MESSAGE_VARIABLE: &str = "MOERUN_TEST_MESSAGE_BYTES";

fn variable<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// Returns the size of a chunk in bytes.
pub fn chunk_bytes() -> usize {
    static BYTES: LazyLock<usize> = LazyLock::new(|| {
        let scaled = variable(CHUNK_VARIABLE).filter(|&bytes| bytes > 0);
        scaled.unwrap_or(DEFAULT_CHUNK_BYTES)
    });
    *BYTES
}

/// Returns the purpose of a keeper's TCP port.
pub(super) fn keeper_purpose() -> Purpose {
    static LIMIT: LazyLock<u32> = LazyLock::new(|| {
        let limit = Purpose::KEEPER.max_frame_bytes;
        let scaled: Option<u32> = variable(MESSAGE_VARIABLE);
        scaled.map_or(limit, |bytes| bytes.min(limit))
    });
    Purpose {
        max_frame_bytes: *LIMIT,
        ..Purpose::KEEPER
    }
}
