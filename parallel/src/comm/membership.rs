//! The members of a group, as one of its ranks sees them, and errors that name them.

use super::CommError;

#[derive(Debug, Clone)]
pub(crate) struct Membership {
    name: String,
    /// The global ranks of the group.
    pub(crate) members: Vec<usize>,
    global_rank: usize,
    /// The index of this rank among the members.
    pub(crate) position: usize,
}

impl Membership {
    /// # Errors
    /// If `rank` is not a member.
    pub(crate) fn new(name: &str, members: &[usize], rank: usize) -> Result<Membership, CommError> {
        let mut membership = Membership {
            name: name.to_string(),
            members: members.to_vec(),
            global_rank: rank,
            position: 0,
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

    /// Returns the error of an operation of this group.
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
