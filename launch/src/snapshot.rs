//! `moerun snapshot`: shows and verifies the snapshots in the memory of a run's keepers.

use crate::{
    cli::{RunArgs, SnapshotStatusArgs},
    hint::hinted,
    registry::KeeperRegistry,
};
use anyhow::{Result, anyhow};
use checkpoint::keeper::{
    Inventory, Snapshot, SnapshotId, Status, format_mib,
    recover::{Candidate, candidates},
};
use std::{path::Path, process::ExitCode, time::Duration};

/// The time within which a keeper must verify all of a snapshot.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(3600);

fn load_registry(run: &Path) -> Result<KeeperRegistry> {
    KeeperRegistry::load(run)?.ok_or_else(|| {
        hinted(
            anyhow!("{} has no keepers", run.display()),
            "a run has keepers while 'moerun train' runs, and after it was killed",
        )
    })
}

pub(crate) fn status(args: &SnapshotStatusArgs) -> Result<ExitCode> {
    let registry = load_registry(&args.run)?;
    let answers = registry.statuses();
    if args.json {
        print_json(&answers);
        return Ok(ExitCode::SUCCESS);
    }
    let spares = registry.spares;
    let nodes = registry.keepers.len() - spares;
    let generation = registry.generation;
    println!("generation {generation}; {nodes} nodes, {spares} spare");
    let mut inventories = Vec::new();
    for (node, answer) in answers.into_iter().enumerate() {
        let spare = if node >= nodes { " (spare)" } else { "" };
        match answer {
            Ok(status) => {
                let address = registry.keepers[node].address;
                println!(
                    "node {node}{spare}: {}",
                    describe(&status, &address.to_string())
                );
                print_refusals(&status);
                for rank in &status.ranks {
                    println!(
                        "  rank {}: process {}, step {}, last heartbeat {} ms ago",
                        rank.rank, rank.pid, rank.step, rank.silent_ms
                    );
                }
                inventories.push(status.inventory);
            }
            Err(error) => println!("node {node}{spare}: {error:#}"),
        }
    }
    let found = candidates(&inventories);
    if found.is_empty() {
        println!("no complete snapshot");
    }
    for candidate in &found {
        print_candidate(candidate, &inventories);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints how many connections a keeper refused, if it refused some, and a signal that it got.
fn print_refusals(status: &Status) {
    let refusals = status.refusals;
    let peers = refusals.peers.line("the TCP socket");
    let ranks = refusals.ranks.line("the Unix socket");
    for line in peers.into_iter().chain(ranks) {
        println!("  {line}");
    }
    if let Some(signal) = status.stop_signal {
        println!(
            "  signal {signal} asked the keeper to exit; it stays while a launcher is connected"
        );
    }
}

fn print_json(answers: &[Result<Status>]) {
    for (node, answer) in answers.iter().enumerate() {
        let line = match answer {
            Ok(status) => serde_json::json!({"node": node, "status": status}),
            Err(error) => serde_json::json!({"node": node, "error": error.to_string()}),
        };
        println!("{line}");
    }
}

fn describe(status: &Status, address: &str) -> String {
    let pid = status.pid;
    let slots = format_mib(status.slot_bytes);
    let parity = format_mib(status.parity_bytes);
    let skipped = status.skipped;
    let coding_s = status.coding_ms as f64 / 1e3;
    format!(
        "keeper is process {pid} at {address}; slots {slots}, parity {parity}; \
         {skipped} snapshots skipped; {coding_s:.1} s of coding"
    )
}

fn print_candidate(candidate: &Candidate, inventories: &[Inventory]) {
    let snapshot = &candidate.snapshot;
    let topology = &snapshot.topology;
    let SnapshotId { generation, step } = snapshot.id;
    let parts = snapshot.parts.len();
    let bytes: u64 = snapshot.parts.iter().map(|part| part.bytes).sum();
    let size = format_mib(bytes);
    let redundancy = &topology.redundancy;
    let parity = if redundancy.max_losses() == 0 {
        String::new()
    } else {
        let mut protected = 0;
        for inventory in inventories {
            protected += usize::from(inventory.protected.contains(&snapshot.id));
        }
        format!(", parity on {protected} of {} nodes", topology.nodes.len())
    };
    let lost = match candidate.lost_nodes().as_slice() {
        [] => String::new(),
        lost => format!("; parts of nodes {lost:?} must be rebuilt"),
    };
    println!(
        "snapshot of step {step} (generation {generation}): {parts} parts, {size}; \
         {redundancy}{parity}{lost}"
    );
}

/// An inventory and its keeper's node.
struct NodeInventory {
    node: usize,
    inventory: Inventory,
}

pub(crate) fn verify(args: &RunArgs) -> Result<ExitCode> {
    let registry = load_registry(&args.run)?;
    let mut held = Vec::new();
    for (node, answer) in registry.statuses().into_iter().enumerate() {
        match answer {
            Ok(status) => held.push(NodeInventory {
                node,
                inventory: status.inventory,
            }),
            Err(error) => println!("{error:#}"),
        }
    }
    let inventories = held.iter().map(|held| held.inventory.clone());
    let found = candidates(&inventories.collect::<Vec<_>>());
    if found.is_empty() {
        println!("no complete snapshot");
        return Ok(ExitCode::FAILURE);
    }
    let mut damaged = false;
    for candidate in &found {
        damaged |= verify_snapshot(&registry, &candidate.snapshot, &held)? > 0;
    }
    Ok(if damaged {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Verifies a snapshot on all nodes. Returns the number of damaged chunks and parities.
fn verify_snapshot(
    registry: &KeeperRegistry,
    snapshot: &Snapshot,
    held: &[NodeInventory],
) -> Result<u64> {
    let id = snapshot.id;
    let SnapshotId { generation, step } = id;
    let chunk_bytes = snapshot.topology.chunk_bytes as u64;
    let mut chunks = 0;
    let mut bad = 0;
    for NodeInventory { node, inventory } in held {
        let parts = inventory.parts.iter().filter(|(other, _)| *other == id);
        chunks += parts
            .map(|(_, part)| part.bytes.div_ceil(chunk_bytes))
            .sum::<u64>();
        let mut peer = registry.connect(*node, VERIFY_TIMEOUT)?;
        let damage = match peer.verify(id) {
            Ok(damage) => damage,
            // The live run has overwritten it since.
            Err(error) => {
                println!("step {step}, node {node}: {error}");
                continue;
            }
        };
        for (rank, chunk) in &damage.chunks {
            println!("step {step}: chunk {chunk} of rank {rank}'s part on node {node} is damaged");
        }
        let parities = damage.parities;
        if parities > 0 {
            println!("step {step}: {parities} parities on node {node} are damaged");
        }
        bad += damage.chunks.len() as u64 + parities;
    }
    println!(
        "snapshot of step {step} (generation {generation}): {chunks} chunks checked, {bad} damaged"
    );
    Ok(bad)
}
