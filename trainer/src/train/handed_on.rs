//! Bytes that rank 0 reads for all ranks, and bytes of all ranks that only rank 0 needs.
//!
//! Each rank sends and receives what it has to and no more, so that megabytes stay megabytes with
//! thousands of ranks.
//!
//! # Collective
//! All ranks of the group call the same function at the same point.

use parallel::{Accelerator, CommError, Communicator, Cpu, Work};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Returns the bytes of rank 0; those of other ranks are ignored.
///
/// # Errors
/// If a collective fails.
pub(super) fn from_rank_0(
    group: &Arc<dyn Communicator>,
    bytes: Vec<u8>,
) -> Result<Vec<u8>, CommError> {
    let length = Tensor::from_slice(&[bytes.len() as i64]);
    group.broadcast(&length, 0).and_then(Work::wait)?;
    let length = length.int64_value(&[0]);
    if length == 0 {
        return Ok(Vec::new());
    }
    if group.rank() == 0 {
        let contents = Tensor::from_slice(&bytes);
        group.broadcast(&contents, 0).and_then(Work::wait)?;
        return Ok(bytes);
    }
    let contents = Cpu.zeros(&[length], Kind::Uint8);
    group.broadcast(&contents, 0).and_then(Work::wait)?;
    Ok(Vec::try_from(contents).expect("a list of bytes"))
}

/// Returns the bytes of each rank on rank 0, and nothing on the others.
///
/// # Errors
/// If a collective fails.
pub(super) fn to_rank_0(
    group: &Arc<dyn Communicator>,
    bytes: &[u8],
) -> Result<Vec<Vec<u8>>, CommError> {
    let size = group.size();
    let own_length = bytes.len() as i64;
    let lengths = Cpu.zeros(&[size as i64], Kind::Int64);
    let own = Tensor::from_slice(&[own_length]);
    group.all_gather(&lengths, &own).and_then(Work::wait)?;
    let lengths: Vec<i64> = Vec::try_from(lengths).expect("a list of integers");
    let mut sends = vec![0; size];
    sends[0] = own_length;
    let receives = match group.rank() {
        0 => lengths,
        _ => vec![0; size],
    };
    let all = Cpu.zeros(&[receives.iter().sum::<i64>()], Kind::Uint8);
    group
        .all_to_all(&all, &Tensor::from_slice(bytes), &receives, &sends)
        .and_then(Work::wait)?;
    let all: Vec<u8> = Vec::try_from(all).expect("a list of bytes");
    let mut rest = all.as_slice();
    let parts = receives.iter().map(|&length| {
        let (part, after) = rest.split_at(length as usize);
        rest = after;
        part.to_vec()
    });
    let parts = parts.collect();
    Ok(match group.rank() {
        0 => parts,
        _ => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::run_on_threads;
    use std::time::Duration;

    #[test]
    fn bytes_of_any_length_arrive() {
        run_on_threads(3, Duration::from_secs(20), |world| {
            let group = world.all("handed on").unwrap();
            let rank = group.rank();
            for length in [0, 1, 100_000] {
                let text = vec![7 + rank as u8; length];
                assert_eq!(from_rank_0(&group, text).unwrap(), vec![7; length]);
            }
            for length in [0, 5] {
                let own = vec![rank as u8; length * rank];
                let all = to_rank_0(&group, &own).unwrap();
                let expected = [vec![], vec![1; length], vec![2; 2 * length]];
                match rank {
                    0 => assert_eq!(all, expected),
                    _ => assert!(all.is_empty()),
                }
            }
        });
    }
}
