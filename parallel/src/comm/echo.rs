//! The communicator of a rehearsal: its other members have the values of this rank, and send zeros.
//!
//! No other rank takes part: before real communicators exist, a rank runs the operations of a step
//! with it.

use super::{CommError, Communicator, Membership, ReduceOp, Work, check_splits};
use std::ops::Range;
use tch::{TchError, Tensor};

/// A group whose only real member is this rank.
pub(crate) struct EchoComm {
    membership: Membership,
    /// True if the real group's operations on the device's tensors run on a stream.
    is_stream_ordered: bool,
}

impl EchoComm {
    pub(crate) fn new(membership: Membership, is_stream_ordered: bool) -> EchoComm {
        EchoComm {
            membership,
            is_stream_ordered,
        }
    }

    /// Runs operations on this rank's tensors, in place of those of the group.
    fn run(
        &self,
        operation: &'static str,
        body: impl FnOnce() -> Result<(), TchError>,
    ) -> Result<Work, CommError> {
        tch::no_grad(body).map_err(|error| self.membership.error(operation, error))?;
        Ok(Work::done())
    }

    /// Returns this rank's rows among parts of these lengths.
    fn own(&self, splits: &[i64]) -> Range<i64> {
        let start: i64 = splits[..self.rank()].iter().sum();
        start..start + splits[self.rank()]
    }
}

fn rows(tensor: &Tensor, rows: &Range<i64>) -> Result<Tensor, TchError> {
    tensor.f_narrow(0, rows.start, rows.end - rows.start)
}

impl Communicator for EchoComm {
    fn backend(&self) -> &'static str {
        "echo"
    }
    fn is_stream_ordered(&self) -> bool {
        self.is_stream_ordered
    }
    fn rank(&self) -> usize {
        self.membership.position
    }
    fn size(&self) -> usize {
        self.membership.size()
    }
    /// Leaves the tensor as it is: a sum over many ranks would grow without bounds.
    fn all_reduce(&self, _tensor: &Tensor, _op: ReduceOp) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        if root == self.rank() {
            return Ok(Work::done());
        }
        self.recv(tensor, root, 0)
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.run("all_gather", || {
            for part in output.f_chunk(self.size() as i64, 0)? {
                part.shallow_clone().f_copy_(input)?;
            }
            Ok(())
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        _op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.run("reduce_scatter", || {
            let len = output.size()[0];
            let start = len * self.rank() as i64;
            let own = rows(input, &(start..start + len))?;
            output.shallow_clone().f_copy_(&own).map(drop)
        })
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|error| self.membership.error("all_to_all", error))?;
        self.run("all_to_all", || {
            let _ = output.shallow_clone().f_zero_()?;
            let sent = rows(input, &self.own(input_splits))?;
            let mut received = rows(output, &self.own(output_splits))?;
            received.f_copy_(&sent).map(drop)
        })
    }
    fn send(&self, _tensor: &Tensor, _to: usize, _tag: i32) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn recv(&self, tensor: &Tensor, _from: usize, _tag: i32) -> Result<Work, CommError> {
        self.run("recv", || tensor.shallow_clone().f_zero_().map(drop))
    }
    fn barrier(&self) -> Result<Work, CommError> {
        Ok(Work::done())
    }
    fn abort(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(range: Range<i64>) -> Tensor {
        Tensor::from_slice(&range.collect::<Vec<_>>())
    }

    #[test]
    fn other_ranks_have_the_same_values_and_send_zeros() {
        let membership = Membership::new("rehearsal", &[3, 5, 8], 5).unwrap();
        let group = EchoComm::new(membership, true);
        assert_eq!((group.rank(), group.size()), (1, 3));
        let own = numbers(1..3);
        let all = numbers(10..16);
        group.all_gather(&all, &own).unwrap().wait().unwrap();
        assert_eq!(all, Tensor::from_slice(&[1i64, 2, 1, 2, 1, 2]));
        let all = numbers(10..16);
        group
            .reduce_scatter(&own, &all, ReduceOp::Sum)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(own, numbers(12..14));
        let received = numbers(10..14);
        let sent = numbers(20..25);
        let exchanged = group.all_to_all(&received, &sent, &[1, 2, 1], &[0, 2, 3]);
        exchanged.unwrap().wait().unwrap();
        assert_eq!(received, Tensor::from_slice(&[0i64, 20, 21, 0]));
        group.broadcast(&sent, 1).unwrap().wait().unwrap();
        assert_eq!(sent, numbers(20..25));
        group
            .exchange(&[(&sent, 0)], &[(&own, 2)], 0)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(own, Tensor::from_slice(&[0i64, 0]));
        let wrong = group.all_to_all(&received, &sent, &[1, 2], &[0, 2, 3]);
        assert!(wrong.err().unwrap().to_string().contains("rehearsal"));
    }
}
