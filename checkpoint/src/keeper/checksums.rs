//! The checksums of a part's chunks, which a digest stands for in messages.
//!
//! A list has four bytes for each chunk, so it grows with the state. Only keepers that have a part
//! or protect it keep its list. Any other uses a list from one of them after it has compared the
//! list with the digest in the snapshot.

use super::{digest::ChecksumDigest, layout::num_chunks, snapshot::PartInfo};
use crate::secure::Error;
use std::sync::Arc;

/// The CRC-32C of each chunk of a part, as far as the part is filled. Clones share the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checksums(Arc<Vec<u32>>);

impl Checksums {
    pub(crate) fn new(crcs: Vec<u32>) -> Checksums {
        Checksums(Arc::new(crcs))
    }

    /// Returns a list that another keeper sent, if it is the one that a snapshot names.
    ///
    /// # Errors
    /// If it is another list.
    pub(crate) fn verified(
        crcs: Vec<u32>,
        part: &PartInfo,
        chunk_bytes: usize,
    ) -> Result<Checksums, Error> {
        let checksums = Checksums::new(crcs);
        if checksums.are_of(part, chunk_bytes) {
            return Ok(checksums);
        }
        let rank = part.rank;
        let reason = format!("the checksums of rank {rank}'s part are not those of the snapshot");
        Err(Error::Refused(reason))
    }

    /// True if these are the checksums that a snapshot names.
    pub(crate) fn are_of(&self, part: &PartInfo, chunk_bytes: usize) -> bool {
        let has_length = self.0.len() as u64 == num_chunks(part.bytes, chunk_bytes);
        has_length && self.digest() == part.digest
    }

    pub(crate) fn as_slice(&self) -> &[u32] {
        &self.0
    }

    /// Adds the checksums of the chunks that were filled since.
    pub(crate) fn extend(&mut self, crcs: &[u32]) {
        Arc::make_mut(&mut self.0).extend(crcs);
    }

    pub(crate) fn digest(&self) -> ChecksumDigest {
        ChecksumDigest::of(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_used_only_if_it_is_that_of_the_snapshot() {
        let crcs = vec![1, 2, 3];
        let part = PartInfo {
            rank: 7,
            bytes: 20,
            digest: ChecksumDigest::of(&crcs),
        };
        let accepted = |crcs: &[u32], part: &PartInfo| {
            let list = Checksums::verified(crcs.to_vec(), part, 8);
            list.is_ok_and(|list| list.digest() == part.digest)
        };
        assert!(accepted(&crcs, &part));
        assert!(!accepted(&[1, 3, 2], &part));
        assert!(!accepted(&[1, 2], &part));
        // Three checksums are too many for two chunks.
        let shorter = PartInfo { bytes: 16, ..part };
        assert!(!accepted(&crcs, &shorter));
        let error = Checksums::verified(Vec::new(), &part, 8).unwrap_err();
        let expected = "the checksums of rank 7's part are not those of the snapshot";
        assert_eq!(error.to_string(), expected);
    }
}
