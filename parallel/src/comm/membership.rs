//! The members of a group, as one of its ranks sees them, and errors that name them.

use super::{CommError, MemberRanges};
use std::sync::Arc;

#[derive(Debug, Clone)]
pub(crate) struct Membership {
    name: Arc<str>,
    /// The global ranks of the group.
    pub(crate) members: Arc<[usize]>,
    ranges: MemberRanges,
    global_rank: usize,
    /// The index of this rank among the members.
    pub(crate) position: usize,
    /// Tells apart the groups of a run, of which several may have the same name.
    pub(crate) digest: u64,
}

impl Membership {
    /// # Errors
    /// If `rank` is not a member.
    pub(crate) fn new(name: &str, members: &[usize], rank: usize) -> Result<Membership, CommError> {
        let mut membership = Membership {
            name: name.into(),
            members: members.into(),
            ranges: MemberRanges::new(members),
            global_rank: rank,
            position: 0,
            digest: digest(name, members),
        };
        match members.iter().position(|&member| member == rank) {
            Some(position) => {
                membership.position = position;
                Ok(membership)
            }
            None => Err(membership.error("joining", "this rank is not a member")),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn size(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn ranges(&self) -> &MemberRanges {
        &self.ranges
    }

    /// Returns the prefix of the group's keys in the store. Its length does not depend on the
    /// number of members.
    pub(crate) fn store_key(&self) -> String {
        format!("{}/{:016x}", self.name, self.digest)
    }

    /// Returns the error of an operation of this group.
    pub(crate) fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        CommError {
            rank: self.global_rank,
            group: self.name.to_string(),
            members: self.ranges.clone(),
            operation,
            reason: reason.to_string(),
        }
    }
}

fn digest(name: &str, members: &[usize]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    for &member in members {
        hasher.update(&(member as u64).to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_tell_groups_apart_in_constant_length() {
        let key = |name: &str, members: &[usize]| {
            let membership = Membership::new(name, members, members[0]);
            membership.unwrap().store_key()
        };
        let large: Vec<usize> = (0..16_384).collect();
        assert_eq!(key("experts", &large).len(), key("experts", &[0]).len());
        assert_ne!(key("experts", &[0, 1]), key("experts", &[0, 2]));
        assert_ne!(key("experts", &[0, 1]), key("experts", &[1, 0]));
        assert_eq!(key("dense", &[3, 5]), key("dense", &[3, 5]));
    }

    proptest! {
        #[test]
        fn errors_of_large_groups_are_short(
            stride in 1usize..100,
            irregular in prop::collection::vec(0usize..1_000_000, 0..500),
        ) {
            let regular = (0..16_384).map(|rank| rank * stride);
            let members: Vec<usize> = irregular
                .into_iter()
                .chain(regular)
                .collect();
            let membership = Membership::new("expert replicas", &members, 0);
            let error = membership
                .unwrap()
                .error("reduce_scatter", "timed out after 300.0s");
            prop_assert!(error.to_string().len() < 512, "{}", error);
        }
    }
}
