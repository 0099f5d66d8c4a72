//! `moerun snapshot`: what is in the memory of a run's keepers, and whether it is right.

use crate::cli::{RunArgs, SnapshotStatusArgs};
use crate::registry::KeeperRegistry;
use anyhow::{Result, anyhow};
use checkpoint::keeper::recover::candidates;
use checkpoint::keeper::{Inventory, Status, format_mib};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

fn load_registry(run: &Path) -> Result<KeeperRegistry> {
    KeeperRegistry::load(run)?.ok_or_else(|| {
        anyhow!(
            "{} has no keepers: they are there while 'moerun train' runs, and after it was killed",
            run.display()
        )
    })
}

/// Each keeper's answer, or why there is none.
pub(crate) fn ask_all(registry: &KeeperRegistry) -> Vec<Result<Status>> {
    let ask = |number| {
        let mut peer = registry.connect(number, REPLY_TIMEOUT)?;
        peer.status()
            .map_err(|e| anyhow!("the keeper of node {number}: {e}"))
    };
    (0..registry.keepers.len()).map(ask).collect()
}

pub(crate) fn status(args: &SnapshotStatusArgs) -> Result<ExitCode> {
    let registry = load_registry(&args.run)?;
    let answers = ask_all(&registry);
    if args.json {
        for (node, answer) in answers.iter().enumerate() {
            let line = match answer {
                Ok(status) => serde_json::json!({"node": node, "status": status}),
                Err(error) => serde_json::json!({"node": node, "error": error.to_string()}),
            };
            println!("{line}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let nodes = registry.keepers.len() - registry.spares;
    println!(
        "attempt {}; {nodes} nodes, {} spare",
        registry.generation, registry.spares
    );
    for (node, answer) in answers.iter().enumerate() {
        let spare = if node >= nodes { " (spare)" } else { "" };
        match answer {
            Ok(status) => {
                println!(
                    "node {node}{spare}: keeper is process {} at {}; slots {}, parity {}; {} snapshots skipped; {:.1} s of coding",
                    status.pid,
                    registry.keepers[node].address,
                    format_mib(status.slot_bytes),
                    format_mib(status.parity_bytes),
                    status.skipped,
                    status.coding_ms as f64 / 1e3
                );
                for rank in &status.ranks {
                    println!(
                        "  rank {}: process {}, step {}, heard of {} ms ago",
                        rank.rank, rank.pid, rank.step, rank.silent_ms
                    );
                }
            }
            Err(error) => println!("node {node}{spare}: {error:#}"),
        }
    }
    let inventories: Vec<Inventory> = answers
        .iter()
        .flatten()
        .map(|status| status.inventory.clone())
        .collect();
    let found = candidates(&inventories);
    if found.is_empty() {
        println!("no snapshot can be put together");
    }
    for candidate in found {
        let snapshot = &candidate.snapshot;
        let bytes: u64 = snapshot.parts.iter().map(|part| part.bytes).sum();
        let protected = inventories
            .iter()
            .filter(|inventory| inventory.protected.contains(&snapshot.id))
            .count();
        let parity = match snapshot.topology.redundancy.max_losses() {
            0 => String::new(),
            _ => format!(
                ", parity on {protected} of {} nodes",
                snapshot.topology.nodes.len()
            ),
        };
        let lost = match candidate.lost_nodes().as_slice() {
            [] => String::new(),
            lost => format!("; parts of nodes {lost:?} would be rebuilt"),
        };
        println!(
            "snapshot of step {} (attempt {}): {} parts, {}; {}{parity}{lost}",
            snapshot.id.step,
            snapshot.id.generation,
            snapshot.parts.len(),
            format_mib(bytes),
            snapshot.topology.redundancy,
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn verify(args: &RunArgs) -> Result<ExitCode> {
    let registry = load_registry(&args.run)?;
    let inventories: Vec<(usize, Inventory)> = ask_all(&registry)
        .into_iter()
        .enumerate()
        .filter_map(|(node, answer)| match answer {
            Ok(status) => Some((node, status.inventory)),
            Err(error) => {
                println!("{error:#}");
                None
            }
        })
        .collect();
    let found = candidates(
        &inventories
            .iter()
            .map(|(_, inventory)| inventory.clone())
            .collect::<Vec<_>>(),
    );
    let mut damaged = found.is_empty();
    for candidate in &found {
        let id = candidate.snapshot.id;
        let mut chunks = 0;
        let mut bad = 0;
        for (node, inventory) in &inventories {
            let here = inventory.parts.iter().filter(|(other, _)| *other == id);
            chunks += here.map(|(_, part)| part.crcs.len()).sum::<usize>();
            let damage = registry
                .connect(*node, Duration::from_secs(3600))?
                .verify(id);
            let damage = match damage {
                Ok(damage) => damage,
                // It has been written over since: the run goes on.
                Err(error) => {
                    println!("step {}, node {node}: {error}", id.step);
                    continue;
                }
            };
            for (rank, chunk) in &damage.chunks {
                println!(
                    "step {}: chunk {chunk} of rank {rank}'s part on node {node} is damaged",
                    id.step
                );
            }
            if damage.parities > 0 {
                println!(
                    "step {}: {} parities on node {node} are damaged",
                    id.step, damage.parities
                );
            }
            bad += damage.chunks.len() as u64 + damage.parities;
        }
        println!(
            "snapshot of step {} (attempt {}): {chunks} chunks checked, {bad} damaged",
            id.step, id.generation
        );
        damaged |= bad > 0;
    }
    if found.is_empty() {
        println!("no snapshot can be put together");
    }
    Ok(if damaged {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
