//! Streams, each with a vendor's communicator whose operations run on it.

use super::{
    super::{Membership, arrival::Arrival},
    abortable::AbortableComm,
    library::Library,
};
use std::time::Duration;
use tch::Tensor;
use torch_ext::{Priority, Store, Stream};

/// The ranks of a vendor's communicator: the whole group, or a sender and a receiver.
///
/// Each direction between two ranks has a communicator of its own. If both shared one, a rank that
/// sends and then receives would wait for another that does the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Participants {
    All,
    Pair { from: usize, to: usize },
}

/// Returns the participants of each communicator of a rank in a group of `size`. With `p2p`, there
/// are those of its neighbours.
pub(super) fn all_participants(rank: usize, size: usize, p2p: bool) -> Vec<Participants> {
    let pairs = if p2p {
        neighbor_pairs(rank, size)
    } else {
        Vec::new()
    };
    std::iter::once(Participants::All).chain(pairs).collect()
}

/// Returns the pairs of a rank with its neighbours in the ring of the group.
///
/// All ranks of the group create their pairs in the same order, so that they never wait for each
/// other in a circle.
fn neighbor_pairs(rank: usize, size: usize) -> Vec<Participants> {
    let mut pairs = Vec::new();
    for one in 0..size {
        let next = (one + 1) % size;
        pairs.push((one, next));
        pairs.push((next, one));
    }
    pairs.sort_by_key(|&(from, to)| (from.min(to), from.max(to), from));
    pairs.dedup();
    pairs.retain(|&(from, to)| from != to && (from == rank || to == rank));
    let participants = pairs.into_iter();
    participants
        .map(|(from, to)| Participants::Pair { from, to })
        .collect()
}

pub(super) struct DeviceStream<L: Library> {
    /// In use while an operation is queued between its two events.
    pub(super) comm: AbortableComm<L>,
    pub(super) stream: Stream,
}

impl<L> DeviceStream<L>
where
    L: Library,
{
    /// Creates a vendor's communicator together with its other participants.
    pub(super) fn create(
        library: &'static L,
        participants: Participants,
        membership: &Membership,
        store: &Store,
        timeout: Duration,
        like: &Tensor,
    ) -> Result<DeviceStream<L>, String> {
        let position = membership.position;
        let (rank, size, name) = match participants {
            Participants::All => (position, membership.members.len(), "all".to_string()),
            Participants::Pair { from, to } => {
                (usize::from(to == position), 2, format!("{from}-{to}"))
            }
        };
        let text = |e: torch_ext::Error| e.to_string();
        let id_key = format!("{name}/id");
        if rank == 0 {
            store.set(&id_key, &library.new_id()?).map_err(text)?;
        }
        // The library would wait for a missing rank without end.
        let key = &format!("{name}/here");
        Arrival { store, key, size }.wait(timeout)?;
        let id = store.get(&id_key).map_err(text)?;
        let stream = Stream::from_pool(like, Priority::High).map_err(text)?;
        let comm = library.join(&id, rank, size)?;
        Ok(DeviceStream {
            comm: AbortableComm::new(library, comm),
            stream,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// True if all ranks can create their pairs, each in its own order.
    fn all_pairs_are_created(size: usize) -> bool {
        let mut left: Vec<Vec<Participants>> =
            (0..size).map(|rank| neighbor_pairs(rank, size)).collect();
        loop {
            let ready = |rank: usize, left: &Vec<Vec<Participants>>| match left[rank].first() {
                Some(&participants @ Participants::Pair { from, to }) => {
                    let other = if from == rank { to } else { from };
                    (left[other].first() == Some(&participants)).then_some((rank, other))
                }
                _ => None,
            };
            let Some((one, other)) = (0..size).find_map(|rank| ready(rank, &left)) else {
                break;
            };
            left[one].remove(0);
            left[other].remove(0);
        }
        left.iter().all(Vec::is_empty)
    }

    #[test]
    fn a_communicator_per_direction_to_each_neighbour() {
        let streams = |size, p2p| all_participants(0, size, p2p).len();
        assert_eq!([1, 2, 3, 16].map(|size| streams(size, false)), [1; 4]);
        assert_eq!([1, 2, 3, 16].map(|size| streams(size, true)), [1, 3, 5, 5]);
    }

    #[test]
    fn neighbours_create_their_communicators_without_a_deadlock() {
        assert_eq!(neighbor_pairs(0, 1), []);
        assert_eq!(
            neighbor_pairs(0, 2),
            [
                Participants::Pair { from: 0, to: 1 },
                Participants::Pair { from: 1, to: 0 }
            ]
        );
        assert_eq!(neighbor_pairs(1, 4).len(), 4);
        for size in 1..40 {
            assert!(all_pairs_are_created(size), "{size} ranks");
        }
    }
}
