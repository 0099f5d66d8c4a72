//! Making what is left whole again: the newest snapshot that can be put together, checked, rebuilt, and handed to every
//! keeper.

use super::keepers::Keepers;
use anyhow::{Result, anyhow};
use checkpoint::keeper::SnapshotId;
use checkpoint::keeper::recover::{Candidate, Rebuild, candidates};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

/// What ranks start from.
pub(super) struct Restored {
    /// The snapshot, and how many ranks made it; None: the newest checkpoint, or nothing.
    pub(super) snapshot: Option<(SnapshotId, usize)>,
    /// For people: from what, and why not from something newer.
    pub(super) message: String,
}

/// Prepares the newest state past the first `older`.
pub(super) fn recover(keepers: &mut Keepers, older: usize, checkpoints: &Path) -> Restored {
    let mut reasons = Vec::new();
    let (found, places) = find_candidates(keepers);
    for candidate in found.iter().skip(older) {
        let id = candidate.snapshot.id;
        match reassemble(keepers, candidate, &places) {
            Ok(how) => {
                if older > 0 {
                    reasons.push(format!(
                        "{older} newer state{} did not help",
                        if older == 1 { "" } else { "s" }
                    ));
                }
                let message = format!("going on from the snapshot of step {} ({how})", id.step);
                return Restored {
                    snapshot: Some((id, candidate.holders.len())),
                    message: with_reasons(message, &reasons),
                };
            }
            Err(error) => reasons.push(format!(
                "the snapshot of step {} is of no use: {error:#}",
                id.step
            )),
        }
    }
    if found.is_empty() {
        reasons.push("no snapshot in memory can be put together".into());
    } else if reasons.is_empty() {
        reasons.push("the snapshots in memory did not help".into());
    }
    keepers.ask_all(|peer| peer.select_restore(None, &[]));
    let newest = checkpoint::list(checkpoints)
        .ok()
        .and_then(|list| list.into_iter().next());
    let message = match newest {
        Some(path) => format!("going on from checkpoint {}", path.display()),
        None => "there is no checkpoint: beginning again".into(),
    };
    Restored {
        snapshot: None,
        message: with_reasons(message, &reasons),
    }
}

fn with_reasons(message: String, reasons: &[String]) -> String {
    if reasons.is_empty() {
        message
    } else {
        format!("{message}; {}", reasons.join("; "))
    }
}

/// What can be restored, and which keeper each inventory is of.
pub(super) fn find_candidates(keepers: &mut Keepers) -> (Vec<Candidate>, Vec<usize>) {
    let found: Vec<_> = (0..keepers.members.len())
        .filter_map(|p| Some((p, keepers.inventory(p)?)))
        .collect();
    let (places, inventories): (Vec<usize>, Vec<_>) = found.into_iter().unzip();
    (candidates(&inventories), places)
}

/// Checks and rebuilds a snapshot, and tells every keeper who has what: how it was done.
fn reassemble(keepers: &mut Keepers, candidate: &Candidate, places: &[usize]) -> Result<String> {
    let snapshot = &candidate.snapshot;
    let addresses: Vec<SocketAddr> = places
        .iter()
        .map(|&place| keepers.addresses()[place])
        .collect();
    let spread = |tasks: BTreeMap<usize, Vec<Rebuild>>| rebuild_all(keepers, tasks);
    // Chunks that are not what they were.
    let mut damaged: BTreeMap<(usize, usize), Vec<u64>> = BTreeMap::new();
    let holders: BTreeSet<usize> = candidate.holders.iter().flatten().copied().collect();
    let checked = std::thread::scope(|scope| {
        let check = |&holder: &usize| {
            let peer = keepers.long_connection(places[holder]);
            let handle = scope
                .spawn(move || Ok::<_, anyhow::Error>((holder, peer?.verify(snapshot.id)?.chunks)));
            (holder, handle)
        };
        let handles: Vec<_> = holders.iter().map(check).collect();
        handles
            .into_iter()
            .map(|(_, handle)| handle.join().expect("no panic"))
            .collect::<Result<Vec<_>>>()
    })?;
    for (holder, bad) in checked {
        for (rank, chunk) in bad {
            if candidate.holders[rank] == Some(holder) {
                damaged.entry((holder, rank)).or_default().push(chunk);
            }
        }
    }
    let mut repairs: BTreeMap<usize, Vec<Rebuild>> = BTreeMap::new();
    for ((holder, rank), chunks) in &damaged {
        let sources = candidate.sources(*rank, &addresses);
        let rebuild = Rebuild {
            snapshot: snapshot.clone(),
            rank: *rank,
            chunks: Some(chunks.clone()),
            sources,
        };
        repairs.entry(places[*holder]).or_default().push(rebuild);
    }
    let repaired: usize = damaged.values().map(Vec::len).sum();
    spread(repairs)
        .map_err(|e| anyhow!("{repaired} chunks are damaged, and cannot be repaired: {e:#}"))?;
    // Whole parts that are gone: to the keeper that has taken the node's place, else to any.
    let mut missing: BTreeMap<usize, Vec<Rebuild>> = BTreeMap::new();
    let mut holders = Vec::new();
    for (rank, holder) in candidate.holders.iter().enumerate() {
        let place = match holder {
            Some(holder) => places[*holder],
            None => {
                let node = snapshot.topology.node_of(rank).unwrap_or(0);
                let place = if places.contains(&node) {
                    node
                } else {
                    places[rank % places.len()]
                };
                let sources = candidate.sources(rank, &addresses);
                let rebuild = Rebuild {
                    snapshot: snapshot.clone(),
                    rank,
                    chunks: None,
                    sources,
                };
                missing.entry(place).or_default().push(rebuild);
                place
            }
        };
        holders.push(keepers.addresses()[place]);
    }
    let rebuilt: Vec<usize> = missing
        .values()
        .flatten()
        .map(|rebuild| rebuild.rank)
        .collect();
    let targets: Vec<usize> = missing.keys().copied().collect();
    spread(missing)?;
    keepers.ask_all(|peer| peer.select_restore(Some(snapshot), &holders));
    restore_parity(keepers, candidate, &targets, &addresses, places);
    let mut how = vec!["in memory".to_string()];
    if repaired > 0 {
        how.push(format!("{repaired} damaged chunks repaired from parity"));
    }
    if !rebuilt.is_empty() {
        let ranks: Vec<String> = rebuilt.iter().map(usize::to_string).collect();
        how.push(format!(
            "parts of ranks {} rebuilt from {}",
            ranks.join(", "),
            snapshot.topology.redundancy
        ));
    }
    Ok(how.join("; "))
}

/// Rebuilds on several keepers at once, on each one part after the other.
fn rebuild_all(keepers: &Keepers, tasks: BTreeMap<usize, Vec<Rebuild>>) -> Result<()> {
    std::thread::scope(|scope| {
        let start = |(place, rebuilds): (usize, Vec<Rebuild>)| {
            let peer = keepers.long_connection(place);
            scope.spawn(move || {
                let mut peer = peer?;
                rebuilds
                    .into_iter()
                    .try_for_each(|rebuild| Ok::<_, anyhow::Error>(peer.rebuild(rebuild)?))
            })
        };
        let handles: Vec<_> = tasks.into_iter().map(start).collect();
        handles
            .into_iter()
            .try_for_each(|handle| handle.join().expect("no panic"))
    })
}

/// Gives nodes that took the place of lost ones the parity that those had, while ranks start: until then another loss may
/// be too much.
fn restore_parity(
    keepers: &Keepers,
    candidate: &Candidate,
    targets: &[usize],
    addresses: &[SocketAddr],
    places: &[usize],
) {
    let topology = &candidate.snapshot.topology;
    for node in candidate.lost_nodes() {
        if !targets.contains(&node) || !places.contains(&node) {
            continue;
        }
        let Some(&rank) = topology.nodes[node].ranks.first() else {
            continue;
        };
        let mut sources = candidate.sources(rank, addresses);
        let group = topology.groups.iter().find(|group| group.contains(&node));
        if let Some(position) =
            group.and_then(|group| group.iter().position(|&other| other == node))
        {
            sources[position] = Some(keepers.addresses()[node]);
        }
        let peer = keepers.long_connection(node);
        let snapshot = candidate.snapshot.clone();
        std::thread::spawn(move || {
            let made = peer.and_then(|mut peer| Ok(peer.protect(&snapshot, node, &sources)?));
            if let Err(error) = made {
                tracing::warn!(
                    "node {node} has no parity of step {} yet: {error:#}",
                    snapshot.id.step
                );
            }
        });
    }
}
