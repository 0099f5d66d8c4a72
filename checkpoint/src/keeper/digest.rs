//! The digest that stands for the checksums of a part in messages.

use serde::{Deserialize, Serialize};

const DIGEST_BYTES: usize = 16;

/// A BLAKE3 hash of a list of checksums, cut to 128 bits: no two lists of a run have the same one
/// by accident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecksumDigest([u8; DIGEST_BYTES]);

impl ChecksumDigest {
    /// Returns the digest of the CRC-32C of each chunk, in order.
    pub fn of(crcs: &[u32]) -> ChecksumDigest {
        let mut hasher = blake3::Hasher::new();
        for crc in crcs {
            hasher.update(&crc.to_le_bytes());
        }
        let mut digest = [0; DIGEST_BYTES];
        digest.copy_from_slice(&hasher.finalize().as_bytes()[..DIGEST_BYTES]);
        ChecksumDigest(digest)
    }
}
