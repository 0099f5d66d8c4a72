//! The lengths of messages about snapshots, for simulated runs of any size.

use super::{
    digest::ChecksumDigest,
    identity::Identity,
    inventory_pool::InventoryPool,
    layout::num_chunks,
    protocol::{Reply, Request},
    report::{Event, Inventory},
    shared::Shared,
    sizes::DEFAULT_CHUNK_BYTES,
    snapshot::{PartInfo, Snapshot, SnapshotContents, SnapshotId},
    topology::{Node, Topology},
};
use crate::{
    secure::{Error, Purpose, decode_body, encode_body},
    stripes::{Redundancy, redundancy_groups},
};
use serde::Serialize;
use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Number of complete snapshots that a keeper remembers.
const COMPLETE_SNAPSHOTS: u64 = 3;
const GENERATION: u64 = 1000;
const STEP: u64 = 1_000_000;

/// A run whose messages are measured, without ranks and keepers.
#[derive(Debug, Clone, Copy)]
pub struct SimulatedRun {
    pub ranks: usize,
    /// The ranks on a node, which has one keeper.
    pub ranks_per_node: usize,
    /// The length of a snapshot, of which each rank has an equal part.
    pub state_bytes: u64,
}

/// The lengths of messages in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MessageBytes {
    /// A keeper learns the nodes of a generation.
    pub set_up: usize,
    /// A rank's part is complete.
    pub complete_event: usize,
    /// A snapshot is complete.
    pub commit: usize,
    /// A keeper lists what it holds, with three complete snapshots.
    pub inventory: usize,
    /// A keeper learns which snapshot ranks restore.
    pub select_restore: usize,
    /// The checksums of one rank's part, which only keepers of its group exchange.
    pub checksums: usize,
}

impl SimulatedRun {
    /// Returns the number of nodes.
    pub fn nodes(&self) -> usize {
        self.ranks.div_ceil(self.ranks_per_node)
    }

    /// Returns the topology of the run, in which each node has one copy on another.
    pub fn topology(&self) -> Topology {
        let node = |node: usize| {
            let first = node * self.ranks_per_node;
            let end = (first + self.ranks_per_node).min(self.ranks);
            Node {
                address: address(node),
                ranks: (first..end).collect(),
            }
        };
        let nodes = self.nodes();
        let copies = Redundancy::Copies(1);
        let (redundancy, groups) = match redundancy_groups(&vec![0; nodes], copies) {
            Ok(groups) => (copies, groups),
            Err(_) => (
                Redundancy::None,
                (0..nodes).map(|node| vec![node]).collect(),
            ),
        };
        Topology {
            generation: GENERATION,
            nodes: (0..nodes).map(node).collect(),
            redundancy,
            groups,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
        }
    }

    fn part_bytes(&self) -> u64 {
        self.state_bytes / self.ranks.max(1) as u64
    }

    fn part(&self, rank: usize) -> PartInfo {
        PartInfo {
            rank,
            bytes: self.part_bytes(),
            digest: ChecksumDigest::of(&[rank as u32]),
        }
    }

    fn ids() -> impl Iterator<Item = SnapshotId> {
        (0..COMPLETE_SNAPSHOTS).map(|age| SnapshotId {
            generation: GENERATION,
            step: STEP + age,
        })
    }

    /// Returns the complete snapshots that keepers remember.
    fn snapshots(&self) -> Vec<Snapshot> {
        let topology = Shared::from(self.topology());
        let parts: Vec<PartInfo> = (0..self.ranks).map(|rank| self.part(rank)).collect();
        let snapshot = |id| {
            Snapshot::from(SnapshotContents {
                id,
                topology: topology.clone(),
                parts: parts.clone(),
            })
        };
        SimulatedRun::ids().map(snapshot).collect()
    }

    /// Returns what the keeper of a node holds.
    pub fn inventory(&self, node: usize) -> Inventory {
        self.inventory_with(node, &self.snapshots())
    }

    fn inventory_with(&self, node: usize, snapshots: &[Snapshot]) -> Inventory {
        let topology = &snapshots[0].topology;
        let ranks = &topology.nodes[node].ranks;
        let parts = snapshots.iter().flat_map(|snapshot| {
            let parts = ranks.iter().map(|&rank| snapshot.parts[rank]);
            parts.map(|part| (snapshot.id, part))
        });
        Inventory {
            identity: Identity::default(),
            memberships: vec![(topology.clone(), node)],
            parts: parts.collect(),
            protected: SimulatedRun::ids().collect(),
            complete: snapshots.to_vec(),
        }
    }

    /// Returns the lengths of the run's messages.
    ///
    /// # Errors
    /// If a message cannot be encoded.
    pub fn message_bytes(&self) -> Result<MessageBytes, Error> {
        let snapshots = self.snapshots();
        let snapshot = &snapshots[0];
        let id = snapshot.id;
        let holders = (0..self.ranks).map(|rank| address(rank / self.ranks_per_node));
        let num_chunks = num_chunks(self.part_bytes(), DEFAULT_CHUNK_BYTES);
        Ok(MessageBytes {
            set_up: bytes_of(&Request::Setup {
                topology: self.topology(),
                node: 0,
            })?,
            complete_event: bytes_of(&Event::Complete {
                id,
                part: snapshot.parts[self.ranks - 1],
                durable: true,
            })?,
            commit: bytes_of(&Request::Commit(snapshot.clone()))?,
            inventory: {
                let inventory = self.inventory_with(0, &snapshots);
                bytes_of(&Reply::Inventory(Box::new(inventory)))?
            },
            select_restore: bytes_of(&Request::SelectRestore {
                snapshot: Some(snapshot.clone()),
                holders: holders.collect(),
            })?,
            checksums: checksums_bytes(num_chunks)?,
        })
    }

    /// Calls `keep` with the inventory of each keeper, as the launcher receives it. Returns the
    /// time for decoding them.
    ///
    /// # Errors
    /// If one cannot be encoded or decoded.
    pub fn receive_inventories(&self, mut keep: impl FnMut(Inventory)) -> Result<Duration, Error> {
        let snapshots = self.snapshots();
        let mut pool = InventoryPool::default();
        let mut time = Duration::ZERO;
        for node in 0..self.nodes() {
            let sent = self.inventory_with(node, &snapshots);
            let body = encode_body(&sent, Purpose::KEEPER)?;
            let began = Instant::now();
            let mut received = decode_body(&body, Purpose::KEEPER)?;
            pool.share(&mut received);
            time += began.elapsed();
            keep(received);
        }
        Ok(time)
    }
}

fn address(node: usize) -> SocketAddr {
    let [.., high, low] = (node as u32).to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(10, 200, high, low), 40_000))
}

/// Returns the length of a list of checksums, which is not made for it: it may exceed this
/// machine's memory.
fn checksums_bytes(num_chunks: u64) -> Result<usize, Error> {
    let without_count = bytes_of(&Reply::Checksums(Vec::new()))? - bytes_of(&0u64)?;
    Ok(without_count + bytes_of(&num_chunks)? + num_chunks as usize * bytes_of(&u32::MAX)?)
}

fn bytes_of(message: &impl Serialize) -> Result<usize, Error> {
    Ok(encode_body(message, Purpose::KEEPER)?.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TERABYTE: u64 = 1_000_000_000_000;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn metadata_grows_with_the_ranks_and_not_with_the_state(
            nodes in 2usize..64,
            ranks_per_node in 1usize..9,
            state_bytes in 1u64 << 20..1 << 60,
        ) {
            let ranks = nodes * ranks_per_node;
            let run = SimulatedRun { ranks, ranks_per_node, state_bytes };
            let bytes = run.message_bytes().unwrap();
            prop_assert!(bytes.commit <= 50 * ranks + 100, "{:?}", bytes);
            prop_assert!(bytes.inventory <= 250 * ranks + 500, "{:?}", bytes);
            prop_assert!(bytes.select_restore <= 60 * ranks + 100, "{:?}", bytes);
            prop_assert!(bytes.complete_event <= 60);
        }
    }

    #[test]
    fn received_inventories_share_what_they_have_in_common() {
        let run = SimulatedRun {
            ranks: 64,
            ranks_per_node: 8,
            state_bytes: TERABYTE,
        };
        let mut inventories = Vec::new();
        run.receive_inventories(|inventory| inventories.push(inventory))
            .unwrap();
        assert_eq!(inventories.len(), 8);
        for inventory in &inventories {
            let shared = std::ptr::eq(&*inventory.complete[0], &*inventories[0].complete[0]);
            assert!(shared && inventory.parts.len() == 3 * 8);
        }
    }

    #[test]
    fn the_length_of_a_list_is_that_of_its_message() {
        for count in [0, 1, 250, 251, 70_000] {
            let expected = bytes_of(&Reply::Checksums(vec![u32::MAX; count])).unwrap();
            assert_eq!(checksums_bytes(count as u64).unwrap(), expected);
        }
    }

    #[test]
    fn lengths_are_equal_for_20_and_for_200_terabytes() {
        let of_state = |state_bytes| {
            let run = SimulatedRun {
                ranks: 4096,
                ranks_per_node: 8,
                state_bytes,
            };
            run.message_bytes().unwrap()
        };
        // Parts of both have lengths of eight bytes.
        let small = of_state(20 * TERABYTE);
        let large = of_state(200 * TERABYTE);
        assert_eq!(small.commit, large.commit);
        assert_eq!(small.inventory, large.inventory);
        assert!(large.checksums > 9 * small.checksums);
        assert!(small.inventory < 1 << 20, "{small:?}");
    }
}
