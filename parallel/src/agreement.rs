//! Agreement among the ranks of a group: common results, messages of any length, and sums.
//!
//! # Collective
//! All ranks of the group call the same function at the same point.

use crate::{Accelerator, CommError, Communicator, Cpu, ReduceOp};
use serde::de::DeserializeOwned;
use std::{fmt::Display, sync::Arc};
use tch::{Kind, Tensor};

/// A reason why the ranks of a group could not agree.
#[derive(Debug, thiserror::Error)]
pub enum AgreementError {
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Another rank reported an error; `message` is its text.
    #[error("rank {rank}: {message}")]
    Peer { rank: usize, message: String },
    #[error("unexpected message from another rank: {0}")]
    Decode(#[from] serde_json::Error),
}

/// Returns this rank's result unless another rank failed.
///
/// # Errors
/// This rank's own error; else that of the lowest failed rank, which its message names.
pub fn agree<T, E>(group: &Arc<dyn Communicator>, own: Result<T, E>) -> Result<T, E>
where
    E: Display + From<AgreementError>,
{
    let text = match &own {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    let texts = all_gather_bytes(group, text.as_bytes()).map_err(AgreementError::Comm)?;
    let value = own?;
    match texts.iter().position(|text| !text.is_empty()) {
        None => Ok(value),
        Some(rank) => {
            let message = String::from_utf8_lossy(&texts[rank]).into_owned();
            Err(AgreementError::Peer { rank, message }.into())
        }
    }
}

/// Returns the bytes of every rank, in rank order; their lengths may differ.
///
/// # Errors
/// If a collective fails.
pub fn all_gather_bytes(
    group: &Arc<dyn Communicator>,
    bytes: &[u8],
) -> Result<Vec<Vec<u8>>, CommError> {
    let size = group.size();
    let own_length = Tensor::from_slice(&[bytes.len() as i64]);
    let lengths = Cpu.zeros(&[size as i64], Kind::Int64);
    group.all_gather(&lengths, &own_length)?.wait()?;
    let lengths: Vec<i64> = Vec::try_from(lengths).expect("a list of integers");

    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut padded = bytes.to_vec();
    padded.resize(longest as usize, 0);
    let all = Cpu.zeros(&[longest * size as i64], Kind::Uint8);
    group
        .all_gather(&all, &Tensor::from_slice(&padded))?
        .wait()?;
    let all: Vec<u8> = Vec::try_from(all).expect("a list of bytes");

    let part = |rank: usize| {
        let start = rank * longest as usize;
        all[start..start + lengths[rank] as usize].to_vec()
    };
    Ok((0..size).map(part).collect())
}

/// Returns the bytes of rank 0; those of other ranks are ignored.
///
/// # Errors
/// If a collective fails.
pub fn broadcast_bytes(group: &Arc<dyn Communicator>, bytes: &[u8]) -> Result<Vec<u8>, CommError> {
    let own = if group.rank() == 0 { bytes } else { &[] };
    Ok(all_gather_bytes(group, own)?.swap_remove(0))
}

/// Decodes the JSON that another rank sent.
///
/// # Errors
/// If it is not of this type.
pub fn decode_peer_message<T>(bytes: &[u8]) -> Result<T, AgreementError>
where
    T: DeserializeOwned,
{
    Ok(serde_json::from_slice(bytes)?)
}

/// Sums each of `values` over all ranks.
///
/// # Errors
/// If the collective fails.
pub fn sum_over_ranks(
    group: &Arc<dyn Communicator>,
    values: &[f64],
) -> Result<Vec<f64>, CommError> {
    let sums = Tensor::from_slice(values);
    group.all_reduce(&sums, ReduceOp::Sum)?.wait()?;
    Ok(Vec::try_from(sums).expect("a list of numbers"))
}

/// Returns the maximum of each of `values` over all ranks.
///
/// # Errors
/// If the collective fails.
pub fn max_over_ranks(
    group: &Arc<dyn Communicator>,
    values: &[i64],
) -> Result<Vec<i64>, CommError> {
    let most = Tensor::from_slice(values);
    group.all_reduce(&most, ReduceOp::Max)?.wait()?;
    Ok(Vec::try_from(most).expect("a list of integers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_on_threads;
    use std::time::Duration;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn ranks_agree_on_messages_and_sums() {
        run_on_threads(3, TIMEOUT, |world| {
            let group = world.all("agreement").unwrap();
            let rank = group.rank();
            let gathered = all_gather_bytes(&group, &vec![rank as u8; 2 * rank]).unwrap();
            assert_eq!(gathered, [vec![], vec![1; 2], vec![2; 4]]);
            let empty = all_gather_bytes(&group, &[]).unwrap();
            assert_eq!(empty, [[0u8; 0]; 3]);
            assert_eq!(broadcast_bytes(&group, &[rank as u8]).unwrap(), [0]);
            let sums = sum_over_ranks(&group, &[rank as f64, 0.5]).unwrap();
            assert_eq!(sums, [3.0, 1.5]);
            let large = (1i64 << 62) + rank as i64;
            let most = max_over_ranks(&group, &[-(rank as i64), large, i64::MIN]).unwrap();
            assert_eq!(most, [0, (1 << 62) + 2, i64::MIN]);
        });
    }

    #[test]
    fn a_failed_rank_fails_all_and_is_named() {
        let messages = run_on_threads(3, TIMEOUT, |world| {
            let group = world.all("agreement").unwrap();
            let rank = group.rank();
            let all_well: Result<usize, AgreementError> = agree(&group, Ok(rank));
            assert_eq!(all_well.unwrap(), rank);
            let own = match rank {
                1 => decode_peer_message::<u64>(b"x").map(|_| ()),
                _ => Ok(()),
            };
            agree(&group, own).unwrap_err().to_string()
        });
        let own = "unexpected message from another rank: expected value at line 1 column 1";
        let of_peer = format!("rank 1: {own}");
        assert_eq!(messages, [of_peer.as_str(), own, of_peer.as_str()]);
    }
}
