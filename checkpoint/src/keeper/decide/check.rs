//! Checks of what a request describes, before anything is computed from it.

use crate::{
    keeper::{
        layout::num_chunks,
        recover::Rebuild,
        snapshot::{Snapshot, SnapshotContents},
        topology::Topology,
    },
    secure::Error,
};
use std::{collections::BTreeSet, net::SocketAddr};

/// Longest chunk. A frame carries one.
const MAX_CHUNK_BYTES: usize = 64 << 20;

fn refuse<T>(reason: String) -> Result<T, Error> {
    Err(Error::Refused(format!("invalid request: {reason}")))
}

/// Checks a topology, and the number of the keeper's node in it.
///
/// # Errors
/// If it contradicts itself.
pub(super) fn check_topology(topology: &Topology, node: Option<usize>) -> Result<(), Error> {
    let Topology {
        nodes,
        groups,
        redundancy,
        chunk_bytes,
        ..
    } = topology;
    if *chunk_bytes == 0 || *chunk_bytes > MAX_CHUNK_BYTES {
        return refuse(format!("chunks of {chunk_bytes} bytes"));
    }
    if let Some(node) = node.filter(|&node| node >= nodes.len()) {
        return refuse(format!("node {node} of {}", nodes.len()));
    }
    let ranks: BTreeSet<usize> = nodes.iter().flat_map(|node| &node.ranks).copied().collect();
    if ranks.len() != topology.ranks() || !ranks.iter().copied().eq(0..ranks.len()) {
        return refuse("a rank is missing or on two nodes".into());
    }
    let mut grouped = BTreeSet::new();
    for group in groups {
        if group.len() <= redundancy.max_losses() {
            return refuse(format!("{redundancy} in a group of {} nodes", group.len()));
        }
        for &node in group {
            if node >= nodes.len() || !grouped.insert(node) {
                return refuse(format!(
                    "node {node} of a group is unknown or in two groups"
                ));
            }
        }
    }
    Ok(())
}

/// Checks a complete snapshot.
///
/// # Errors
/// If its parts do not fit its topology.
pub(super) fn check_snapshot(snapshot: &Snapshot) -> Result<(), Error> {
    let SnapshotContents {
        id,
        topology,
        parts,
    } = &**snapshot;
    check_topology(topology, None)?;
    if id.generation != topology.generation {
        let expected = topology.generation;
        return refuse(format!(
            "generation {} instead of {expected}",
            id.generation
        ));
    }
    if parts.len() != topology.ranks() {
        return refuse(format!(
            "{} parts of {} ranks",
            parts.len(),
            topology.ranks()
        ));
    }
    for (expected, part) in parts.iter().enumerate() {
        let rank = part.rank;
        if rank != expected {
            return refuse(format!("a part of rank {rank} instead of {expected}"));
        }
    }
    Ok(())
}

/// Checks that there is an address or a gap for each position of a node's group.
///
/// # Errors
/// If there is not.
pub(super) fn check_sources(
    topology: &Topology,
    node: usize,
    sources: &[Option<SocketAddr>],
) -> Result<(), Error> {
    let group = topology.group_position(node).map(|place| place.group);
    let expected = group.map_or(sources.len(), |group| topology.groups[group].len());
    if sources.len() != expected {
        return refuse(format!(
            "{} sources for {expected} positions",
            sources.len()
        ));
    }
    Ok(())
}

/// Checks a request to rebuild a part.
///
/// # Errors
/// If it contradicts itself.
pub(super) fn check_rebuild(rebuild: &Rebuild) -> Result<(), Error> {
    let Rebuild {
        snapshot,
        rank,
        chunks,
        sources,
    } = rebuild;
    check_snapshot(snapshot)?;
    let Some(node) = snapshot.topology.node_of(*rank) else {
        return refuse(format!("there is no rank {rank}"));
    };
    check_sources(&snapshot.topology, node, sources)?;
    let num_chunks = num_chunks(snapshot.parts[*rank].bytes, snapshot.topology.chunk_bytes);
    let beyond = chunks.iter().flatten().find(|&&chunk| chunk >= num_chunks);
    if let Some(chunk) = beyond {
        return refuse(format!("chunk {chunk} of {num_chunks}"));
    }
    Ok(())
}
