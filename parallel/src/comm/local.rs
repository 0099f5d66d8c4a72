//! The communicator of a group of one rank: every collective is a copy.

use super::{CommError, Communicator, MemberRanges, ReduceOp, Work, check_splits};
use tch::Tensor;

/// The communicator of a group of one rank.
#[derive(Debug, Clone)]
pub struct Local {
    rank: usize,
    group: String,
}

impl Local {
    /// Returns the group `group`, whose only member is the global rank `rank`.
    pub fn new(rank: usize, group: &str) -> Local {
        Local {
            rank,
            group: group.to_string(),
        }
    }

    fn error(&self, operation: &'static str, reason: String) -> CommError {
        CommError {
            rank: self.rank,
            group: self.group.clone(),
            members: MemberRanges::new(&[self.rank]),
            operation,
            reason,
        }
    }

    fn copy(
        &self,
        operation: &'static str,
        output: &Tensor,
        input: &Tensor,
    ) -> Result<Work, CommError> {
        let copied = tch::no_grad(|| output.shallow_clone().f_copy_(input));
        copied.map_err(|error| self.error(operation, error.to_string()))?;
        Ok(Work::done())
    }
}

impl Communicator for Local {
    fn backend(&self) -> &'static str {
        "local"
    }
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _tensor: &Tensor, _op: ReduceOp) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn broadcast(&self, _tensor: &Tensor, _root: usize) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.copy("all_gather", output, input)
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        _op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.copy("reduce_scatter", output, input)
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, 1)
            .map_err(|e| self.error("all_to_all", e))?;
        self.copy("all_to_all", output, input)
    }
    fn send(&self, _tensor: &Tensor, to: usize, _tag: i32) -> Result<Work, CommError> {
        Err(self.error("send", format!("no rank {to} in a group of one")))
    }
    fn recv(&self, _tensor: &Tensor, from: usize, _tag: i32) -> Result<Work, CommError> {
        Err(self.error("recv", format!("no rank {from} in a group of one")))
    }
    fn barrier(&self) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn abort(&self) {}
}
