//! The machines of a run: which ranks share one, and from which addresses ranks may connect.
//!
//! Every rank reports its machine once. The last rank to report publishes a table for all, whose
//! size does not grow with the number of ranks if they are in blocks of equal size.

use crate::{
    RankEnv, Rendezvous,
    comm::MemberRanges,
    networks::{Network, own_addresses, summarize},
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use torch_ext::{Error, Store};

/// The machine of each rank, and the networks of the machines.
pub(crate) struct Machines {
    /// Numbers of machines, by rank.
    of_rank: Vec<u32>,
    /// The networks from which ranks may connect; empty if they are not known.
    pub(crate) networks: Vec<Network>,
}

/// The table that the last rank publishes.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Table {
    placement: Placement,
    networks: Vec<Network>,
}

/// The machine of each rank, in short.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Placement {
    /// Each block of consecutive ranks has a machine of its own.
    Blocks(Vec<EqualBlocks>),
    /// Numbers of machines, by rank.
    Numbers(MemberRanges),
}

/// Consecutive blocks of equal size.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct EqualBlocks {
    blocks: u32,
    ranks: u32,
}

impl Machines {
    /// Tells all ranks which of them share a machine; `own` identifies this rank's.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a rank does not reach the store in time.
    pub(crate) fn exchange(env: &RankEnv, store: &Store, own: u64) -> Result<Machines, Error> {
        // Only moerun's launcher knows how many ranks each machine has.
        let is_own_launch = matches!(env.rendezvous, Rendezvous::Launcher(_));
        if is_own_launch && env.address.is_some() && env.local_rank == 0 {
            store.append("machines/addresses", own_addresses().as_bytes())?;
        }
        let report = format!("{} {own:016x}\n", env.rank);
        store.append("machines/reports", report.as_bytes())?;
        let arrivals = store.add("machines/arrivals", 1)?;
        if arrivals == env.world_size as i64 {
            let reports = store.get("machines/reports")?;
            let addresses = if store.contains("machines/addresses")? {
                store.get("machines/addresses")?
            } else {
                Vec::new()
            };
            let table = Table {
                placement: Placement::new(&numbers(&reports, env.world_size)?),
                networks: summarize(&String::from_utf8_lossy(&addresses)),
            };
            let table = serde_json::to_vec(&table).expect("plain data");
            store.set("machines/table", &table)?;
        }
        let table = store.get("machines/table")?;
        let table: Table = serde_json::from_slice(&table)
            .map_err(|error| Error::new(format!("the table of machines: {error}")))?;
        Ok(Machines {
            of_rank: table.placement.numbers(),
            networks: table.networks,
        })
    }

    /// True if all of these ranks are on one machine.
    pub(crate) fn are_one(&self, ranks: &[usize]) -> bool {
        let mut machines = ranks.iter().map(|&rank| self.of_rank.get(rank));
        let first = machines.next();
        machines.all(|machine| Some(machine) == first)
    }

    /// Returns the numbers of the machines of these ranks.
    pub(crate) fn of(&self, ranks: &[usize]) -> Vec<u32> {
        ranks.iter().map(|&rank| self.of_rank[rank]).collect()
    }
}

/// Returns the number of each rank's machine, from the ranks' reports.
fn numbers(reports: &[u8], ranks: usize) -> Result<Vec<u32>, Error> {
    let text = String::from_utf8_lossy(reports);
    let mut identities = vec![None; ranks];
    for line in text.lines() {
        let report = line
            .split_once(' ')
            .and_then(|(rank, identity)| Some((rank.parse().ok()?, identity)));
        let (rank, identity): (usize, &str) =
            report.ok_or_else(|| Error::new(format!("{line:?} is no report of a machine")))?;
        if let Some(reported) = identities.get_mut(rank) {
            *reported = Some(identity);
        }
    }
    let mut known = HashMap::new();
    let number = |identity: Option<&str>| {
        let next = known.len() as u32;
        *known
            .entry(identity.unwrap_or("?").to_string())
            .or_insert(next)
    };
    Ok(identities.into_iter().map(number).collect())
}

impl Placement {
    fn new(numbers: &[u32]) -> Placement {
        let mut blocks: Vec<EqualBlocks> = Vec::new();
        for (index, block) in numbers.chunk_by(|one, next| one == next).enumerate() {
            if block[0] != index as u32 {
                let numbers = numbers
                    .iter()
                    .map(|&number| number as usize)
                    .collect::<Vec<usize>>();
                return Placement::Numbers(MemberRanges::new(&numbers));
            }
            let ranks = block.len() as u32;
            match blocks.last_mut() {
                Some(last) if last.ranks == ranks => last.blocks += 1,
                _ => blocks.push(EqualBlocks { blocks: 1, ranks }),
            }
        }
        Placement::Blocks(blocks)
    }

    fn numbers(&self) -> Vec<u32> {
        match self {
            Placement::Numbers(numbers) => numbers.ranks().map(|number| number as u32).collect(),
            Placement::Blocks(blocks) => {
                let sizes = blocks
                    .iter()
                    .flat_map(|equal| std::iter::repeat_n(equal.ranks, equal.blocks as usize));
                let numbers = (0u32..).zip(sizes);
                numbers
                    .flat_map(|(number, ranks)| std::iter::repeat_n(number, ranks as usize))
                    .collect()
            }
        }
    }
}

/// Returns a number that processes share if they can share memory: those of one kernel that see
/// each other's process numbers.
pub(crate) fn machine_identity() -> u64 {
    let kernel = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let processes = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&kernel);
    hasher.update(processes.as_os_str().as_encoded_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_of_a_regular_cluster_has_constant_size() {
        let table = |machines: u32, ranks: u32| {
            let numbers = (0..machines * ranks)
                .map(|rank| rank / ranks)
                .collect::<Vec<u32>>();
            let placement = Placement::new(&numbers);
            assert_eq!(placement.numbers(), numbers);
            serde_json::to_vec(&placement).unwrap().len()
        };
        assert!(table(2048, 8) <= table(2, 8) + 3);
        // Neighbouring ranks on different machines.
        let cyclic: Vec<u32> = (0..16_384).map(|rank| rank % 2048).collect();
        let placement = Placement::new(&cyclic);
        assert_eq!(placement.numbers(), cyclic);
        assert!(serde_json::to_vec(&placement).unwrap().len() < 500);
    }

    #[test]
    fn ranks_with_equal_identities_share_a_machine() {
        let reports = "2 b\n0 a\n1 a\n3 c\n";
        let of_rank = numbers(reports.as_bytes(), 4).unwrap();
        assert_eq!(of_rank, [0, 0, 1, 2]);
        assert!(numbers(b"nonsense\n", 4).is_err());
        let machines = Machines {
            of_rank,
            networks: Vec::new(),
        };
        assert!(machines.are_one(&[1, 0]) && !machines.are_one(&[0, 1, 2]));
        assert_eq!(machines.of(&[3, 0]), [2, 0]);
        assert_eq!(machine_identity(), machine_identity());
    }

    proptest! {
        #[test]
        fn any_placement_survives_its_encoding(
            identities in prop::collection::vec(0u8..5, 1..40),
        ) {
            let reports = identities.iter().enumerate();
            let reports: Vec<String> = reports
                .map(|(rank, id)| format!("{rank} {id}\n"))
                .collect();
            let numbers = numbers(reports.concat().as_bytes(), identities.len()).unwrap();
            prop_assert_eq!(Placement::new(&numbers).numbers(), numbers);
        }
    }
}
