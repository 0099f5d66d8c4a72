//! Accounts for every tensor of a checkpoint and of the run that resumes from it.

use crate::Error;
use checkpoint::{Manifest, TensorSlice};
use parallel::{
    Communicator, ReduceOp,
    agreement::{all_gather_bytes, decode_peer_message},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{Display, Formatter},
    sync::Arc,
};
use tch::Tensor;

/// A tensor that a checkpoint and a run do not share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Mismatch {
    /// The run has a tensor that the checkpoint lacks.
    Missing { name: String, shape: Vec<i64> },
    /// The checkpoint has a tensor that the run lacks.
    Unplaced { name: String, shape: Vec<i64> },
    /// Both have the tensor, in different shapes.
    Reshaped {
        name: String,
        saved: Vec<i64>,
        now: Vec<i64>,
    },
}

impl Mismatch {
    pub(crate) fn name(&self) -> &str {
        match self {
            Mismatch::Missing { name, .. }
            | Mismatch::Unplaced { name, .. }
            | Mismatch::Reshaped { name, .. } => name,
        }
    }
}

impl Display for Mismatch {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Mismatch::Missing { name, shape } => {
                write!(out, "{name} {shape:?} is in the run only")
            }
            Mismatch::Unplaced { name, shape } => {
                write!(out, "{name} {shape:?} is in the checkpoint only")
            }
            Mismatch::Reshaped { name, saved, now } => {
                write!(
                    out,
                    "{name} is {saved:?} in the checkpoint and {now:?} in the run"
                )
            }
        }
    }
}

/// The names and global shapes of tensors.
pub(crate) type Shapes = BTreeMap<String, Vec<i64>>;

/// Returns the tensors of a checkpoint that `counts` selects by name.
pub(crate) fn saved_shapes(manifest: &Manifest, counts: impl Fn(&str) -> bool) -> Shapes {
    let tensors = manifest.tensors.iter();
    let counted = tensors.filter(|(name, _)| counts(name));
    counted
        .map(|(name, entry)| (name.clone(), entry.shape.clone()))
        .collect()
}

/// Returns the global shapes of the tensors of which a rank holds slices.
pub(crate) fn held_shapes<'a>(slices: impl Iterator<Item = &'a TensorSlice>) -> Shapes {
    slices
        .map(|slice| (slice.name.clone(), slice.global_shape.clone()))
        .collect()
}

/// Returns the tensors in which a checkpoint and a run on one rank differ.
pub(crate) fn account_alone(saved: &Shapes, held: &Shapes) -> Vec<Mismatch> {
    let mut all = mismatches(saved, held);
    for (name, shape) in saved {
        if !held.contains_key(name) {
            all.push(Mismatch::Unplaced {
                name: name.clone(),
                shape: shape.clone(),
            });
        }
    }
    all
}

/// Returns the tensors of a rank that differ from those saved.
fn mismatches(saved: &Shapes, held: &Shapes) -> Vec<Mismatch> {
    let mut found = Vec::new();
    for (name, shape) in held {
        match saved.get(name) {
            None => found.push(Mismatch::Missing {
                name: name.clone(),
                shape: shape.clone(),
            }),
            Some(saved) if saved != shape => found.push(Mismatch::Reshaped {
                name: name.clone(),
                saved: saved.clone(),
                now: shape.clone(),
            }),
            Some(_) => {}
        }
    }
    found
}

/// Compares the tensors of a checkpoint with those of all ranks, by name and shape. All ranks get
/// the same list.
///
/// # Collective
/// All ranks, with the same `saved`.
///
/// # Errors
/// If a collective fails.
pub(crate) fn account(
    saved: &Shapes,
    held: &Shapes,
    world: &Arc<dyn Communicator>,
) -> Result<Vec<Mismatch>, Error> {
    // A flag per saved tensor is short, however many ranks there are. The lists of differences
    // are empty when a run resumes as it was.
    let flags: Vec<f32> = saved
        .keys()
        .map(|name| f32::from(u8::from(held.contains_key(name))))
        .collect();
    let placed = Tensor::from_slice(&flags);
    world.all_reduce(&placed, ReduceOp::Sum)?.wait()?;
    let placed = Vec::<f32>::try_from(&placed)?;
    let own = serde_json::to_vec(&mismatches(saved, held)).expect("plain data");
    let mut all = BTreeSet::new();
    for message in all_gather_bytes(world, &own)? {
        let of_rank: Vec<Mismatch> = decode_peer_message(&message)?;
        all.extend(of_rank);
    }
    for ((name, shape), placed) in saved.iter().zip(placed) {
        if placed == 0.0 {
            all.insert(Mismatch::Unplaced {
                name: name.clone(),
                shape: shape.clone(),
            });
        }
    }
    Ok(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::run_on_threads;
    use std::time::Duration;

    fn shapes(tensors: &[(&str, &[i64])]) -> Shapes {
        let owned = |(name, shape): &(&str, &[i64])| (name.to_string(), shape.to_vec());
        tensors.iter().map(owned).collect()
    }

    #[test]
    fn every_tensor_is_accounted_for_on_both_sides() {
        let all = run_on_threads(2, Duration::from_secs(20), |world| {
            let saved = shapes(&[("a", &[2]), ("b", &[2]), ("c", &[4]), ("old", &[1])]);
            let held = match world.rank() {
                0 => shapes(&[("a", &[2]), ("b", &[2])]),
                _ => shapes(&[("b", &[2]), ("c", &[5]), ("new", &[3])]),
            };
            let group = world.all("world").unwrap();
            account(&saved, &held, &group).unwrap()
        });
        let expected = vec![
            Mismatch::Missing {
                name: "new".into(),
                shape: vec![3],
            },
            Mismatch::Unplaced {
                name: "old".into(),
                shape: vec![1],
            },
            Mismatch::Reshaped {
                name: "c".into(),
                saved: vec![4],
                now: vec![5],
            },
        ];
        assert_eq!(all, [expected.clone(), expected]);
    }

    #[test]
    fn equal_tensors_do_not_differ() {
        let same = run_on_threads(1, Duration::from_secs(20), |world| {
            let saved = shapes(&[("a", &[2])]);
            account(&saved, &saved, &world.all("world").unwrap()).unwrap()
        });
        assert_eq!(same, [Vec::new()]);
    }
}
