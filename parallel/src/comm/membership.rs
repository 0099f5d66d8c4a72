//! Who a group is, for messages about it.

use super::CommError;

/// A group, as one of its ranks sees it.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    name: String,
    /// Global ranks.
    pub(crate) members: Vec<usize>,
    global_rank: usize,
    /// Where that is among them.
    pub(crate) position: usize,
}

impl Membership {
    /// # Errors
    /// When `rank` is none of the members.
    pub(crate) fn new(name: &str, members: &[usize], rank: usize) -> Result<Membership, CommError> {
        let membership = Membership {
            name: name.to_string(),
            members: members.to_vec(),
            global_rank: rank,
            position: 0,
        };
        match members.iter().position(|&member| member == rank) {
            Some(position) => Ok(Membership {
                position,
                ..membership
            }),
            None => Err(membership.error("joining", "this rank is not a member")),
        }
    }

    /// What went wrong in an operation of the group.
    pub(crate) fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        CommError {
            rank: self.global_rank,
            group: self.name.clone(),
            members: self.members.clone(),
            operation,
            reason: reason.to_string(),
        }
    }
}
