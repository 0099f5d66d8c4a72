//! Recovery after a failure: finds the newest snapshot that survived, checks and rebuilds it, and
//! hands it to every keeper.

use super::keepers::Keepers;
use anyhow::{Context, Result};
use checkpoint::{
    folder::{self, Depth},
    keeper::{
        Peer, SnapshotId,
        recover::{Candidate, Rebuild, candidates},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
};

/// The state that ranks start from.
#[derive(Default)]
pub(super) struct Restored {
    /// None: the newest checkpoint, or nothing.
    pub(super) snapshot: Option<RestoredSnapshot>,
    /// The source of the state, and the reasons why it is not a newer one.
    pub(super) message: String,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct RestoredSnapshot {
    pub(super) id: SnapshotId,
    /// Number of ranks that made it.
    pub(super) ranks: usize,
}

impl Restored {
    pub(super) fn step(&self) -> Option<u64> {
        self.snapshot.map(|snapshot| snapshot.id.step)
    }
}

/// The restorable snapshots in the memory of a run's keepers, the newest first.
pub(super) struct Candidates {
    pub(super) found: Vec<Candidate>,
    /// Node of each keeper that answered. A [`Candidate`] counts keepers by position in this list.
    pub(super) nodes: Vec<usize>,
}

impl Candidates {
    pub(super) fn newest(&self) -> Option<SnapshotId> {
        let newest = self.found.first()?;
        Some(newest.snapshot.id)
    }
}

pub(super) fn find_candidates(keepers: &mut Keepers) -> Candidates {
    let mut nodes = Vec::new();
    let mut inventories = Vec::new();
    for node in 0..keepers.members.len() {
        if let Some(inventory) = keepers.inventory(node) {
            nodes.push(node);
            inventories.push(inventory);
        }
    }
    let found = candidates(&inventories);
    Candidates { found, nodes }
}

/// Prepares the newest usable state, skipping the `older` newest snapshots.
pub(super) fn recover(keepers: &mut Keepers, older: usize, checkpoints: &Path) -> Restored {
    let mut reasons = Vec::new();
    let Candidates { found, nodes } = find_candidates(keepers);
    for candidate in found.iter().skip(older) {
        let id = candidate.snapshot.id;
        let reassembly = Reassembly {
            candidate,
            nodes: &nodes,
            addresses: keepers.addresses(),
        };
        match reassembly.run(keepers) {
            Ok(how) => {
                if older > 0 {
                    let s = if older == 1 { "" } else { "s" };
                    reasons.push(format!("{older} newer snapshot{s} did not help"));
                }
                let message = format!("resuming from the snapshot of step {} ({how})", id.step);
                let ranks = candidate.holders.len();
                return Restored {
                    snapshot: Some(RestoredSnapshot { id, ranks }),
                    message: with_reasons(message, &reasons),
                };
            }
            Err(error) => {
                let step = id.step;
                reasons.push(format!(
                    "the snapshot of step {step} is unusable: {error:#}"
                ));
            }
        }
    }
    if found.is_empty() {
        reasons.push("no complete snapshot is left in memory".into());
    } else if reasons.is_empty() {
        reasons.push("the snapshots in memory did not help".into());
    }
    keepers.ask_all(|peer| peer.select_restore(None, &[]));
    let newest = folder::newest(checkpoints, Depth::Lengths).unwrap_or_default();
    let message = match newest.verified.first() {
        Some(newest) => format!("resuming from checkpoint {}", newest.path.display()),
        None => "no checkpoint, starting over".into(),
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

/// Rebuild requests for each node.
type Rebuilds = BTreeMap<usize, Vec<Rebuild>>;

/// Makes one snapshot whole again.
struct Reassembly<'a> {
    candidate: &'a Candidate,
    /// Node of each keeper that answered.
    nodes: &'a [usize],
    /// Address of each node's keeper.
    addresses: Vec<SocketAddr>,
}

/// Damaged chunks of one rank's part.
struct Damage {
    node: usize,
    rank: usize,
    chunks: Vec<u64>,
}

impl Reassembly<'_> {
    /// Checks and rebuilds the snapshot, and tells every keeper where each part is. Returns a
    /// description of the work.
    fn run(&self, keepers: &mut Keepers) -> Result<String> {
        let snapshot = &self.candidate.snapshot;
        let damage = self.verify(keepers)?;
        let repaired: usize = damage.iter().map(|damage| damage.chunks.len()).sum();
        let repairs = self.repairs(damage);
        rebuild_all(keepers, repairs)
            .with_context(|| format!("{repaired} chunks are damaged and cannot be repaired"))?;
        let holders = self.holders();
        let missing = self.missing(&holders);
        let rebuilt: Vec<String> = missing
            .values()
            .flatten()
            .map(|rebuild| rebuild.rank.to_string())
            .collect();
        let rebuilding_nodes: Vec<usize> = missing.keys().copied().collect();
        rebuild_all(keepers, missing)?;
        let holders = holders.iter().map(|&node| self.addresses[node]);
        let holders: Vec<SocketAddr> = holders.collect();
        keepers.ask_all(|peer| peer.select_restore(Some(snapshot), &holders));
        self.restore_parity(keepers, &rebuilding_nodes);
        let mut how = vec!["in memory".to_string()];
        if repaired > 0 {
            how.push(format!("{repaired} damaged chunks repaired from parity"));
        }
        if !rebuilt.is_empty() {
            let ranks = rebuilt.join(", ");
            let redundancy = &snapshot.topology.redundancy;
            how.push(format!("parts of ranks {ranks} rebuilt from {redundancy}"));
        }
        Ok(how.join("; "))
    }

    /// Has all holders check their parts at once.
    fn verify(&self, keepers: &Keepers) -> Result<Vec<Damage>> {
        let id = self.candidate.snapshot.id;
        let holders = self.candidate.holders.iter().flatten();
        let holders: BTreeSet<usize> = holders.copied().collect();
        let checked = std::thread::scope(|scope| {
            let check = |holder: usize| {
                let peer = keepers.long_connection(self.nodes[holder]);
                scope.spawn(move || {
                    let damaged = peer?.verify(id)?.chunks;
                    Ok::<_, anyhow::Error>((holder, damaged))
                })
            };
            let threads: Vec<_> = holders.into_iter().map(check).collect();
            let results = threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"));
            results.collect::<Result<Vec<_>>>()
        })?;
        let mut damaged: BTreeMap<(usize, usize), Vec<u64>> = BTreeMap::new();
        for (holder, chunks) in checked {
            for (rank, chunk) in chunks {
                if self.candidate.holders[rank] == Some(holder) {
                    damaged.entry((holder, rank)).or_default().push(chunk);
                }
            }
        }
        let damaged = damaged.into_iter().map(|((holder, rank), chunks)| Damage {
            node: self.nodes[holder],
            rank,
            chunks,
        });
        Ok(damaged.collect())
    }

    fn repairs(&self, damage: Vec<Damage>) -> Rebuilds {
        let mut repairs = Rebuilds::new();
        for Damage { node, rank, chunks } in damage {
            let rebuild = self.rebuild(rank, Some(chunks));
            repairs.entry(node).or_default().push(rebuild);
        }
        repairs
    }

    /// Returns the node that has each rank's part, or is to have it.
    ///
    /// A missing part goes to the keeper that took the lost node's place, else to any.
    fn holders(&self) -> Vec<usize> {
        let topology = &self.candidate.snapshot.topology;
        let node_of = |(rank, holder): (usize, &Option<usize>)| match holder {
            Some(holder) => self.nodes[*holder],
            None => {
                let node = topology.node_of(rank).unwrap_or(0);
                if self.nodes.contains(&node) {
                    node
                } else {
                    self.nodes[rank % self.nodes.len()]
                }
            }
        };
        let holders = self.candidate.holders.iter().enumerate();
        holders.map(node_of).collect()
    }

    /// Returns the requests to rebuild whole parts.
    fn missing(&self, holders: &[usize]) -> Rebuilds {
        let mut missing = Rebuilds::new();
        for (rank, holder) in self.candidate.holders.iter().enumerate() {
            if holder.is_none() {
                let rebuild = self.rebuild(rank, None);
                missing.entry(holders[rank]).or_default().push(rebuild);
            }
        }
        missing
    }

    fn rebuild(&self, rank: usize, chunks: Option<Vec<u64>>) -> Rebuild {
        Rebuild {
            snapshot: self.candidate.snapshot.clone(),
            rank,
            chunks,
            sources: self.sources(rank),
        }
    }

    fn sources(&self, rank: usize) -> Vec<Option<SocketAddr>> {
        let answering = self.nodes.iter().map(|&node| self.addresses[node]);
        let answering: Vec<SocketAddr> = answering.collect();
        self.candidate.sources(rank, &answering)
    }

    /// Rebuilds the parity of nodes that replaced lost ones, while ranks start.
    ///
    /// Until it is done, another loss may be one too many.
    fn restore_parity(&self, keepers: &Keepers, rebuilding_nodes: &[usize]) {
        let topology = &self.candidate.snapshot.topology;
        for node in self.candidate.lost_nodes() {
            if !rebuilding_nodes.contains(&node) || !self.nodes.contains(&node) {
                continue;
            }
            let Some(&rank) = topology.nodes[node].ranks.first() else {
                continue;
            };
            let mut sources = self.sources(rank);
            let mut groups = topology.groups.iter();
            let position = groups.find_map(|group| group.iter().position(|&other| other == node));
            if let Some(position) = position {
                sources[position] = Some(self.addresses[node]);
            }
            let peer = keepers.long_connection(node);
            let snapshot = self.candidate.snapshot.clone();
            std::thread::spawn(move || {
                let protect = |mut peer: Peer| Ok(peer.protect(&snapshot, node, &sources)?);
                if let Err(error) = peer.and_then(protect) {
                    let step = snapshot.id.step;
                    tracing::warn!("node {node} has no parity of step {step} yet: {error:#}");
                }
            });
        }
    }
}

/// Rebuilds on all nodes at once, and on each node one part after the other.
fn rebuild_all(keepers: &Keepers, rebuilds: Rebuilds) -> Result<()> {
    std::thread::scope(|scope| {
        let start = |(node, rebuilds): (usize, Vec<Rebuild>)| {
            let peer = keepers.long_connection(node);
            scope.spawn(move || -> Result<()> {
                let mut peer = peer?;
                for rebuild in rebuilds {
                    peer.rebuild(rebuild)?;
                }
                Ok(())
            })
        };
        let threads: Vec<_> = rebuilds.into_iter().map(start).collect();
        let mut results = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        results.try_for_each(|result| result)
    })
}
