//! Binding of ranks to processors.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The binding of ranks to processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuAffinity {
    /// `numa` on machines with several NUMA nodes unless the rank is bound already, else `none`.
    #[default]
    Auto,
    /// Leave the rank unbound; the kernel places it.
    None,
    /// An exclusive share of the processors. For machines that run nothing else.
    Cores,
    /// The processors of one NUMA node: that of the rank's GPU, else the ranks share out the nodes.
    Numa,
}

/// The processors of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuTopology {
    /// Processors of each NUMA node.
    pub nodes: Vec<Vec<usize>>,
    /// Processors that this process may use.
    pub allowed: Vec<usize>,
}

impl CpuTopology {
    /// Reads this machine's topology from the kernel, for a process that may use `allowed`.
    pub fn detect(allowed: Vec<usize>) -> CpuTopology {
        let folder = Path::new("/sys/devices/system/node");
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok();
        let online = read("online").and_then(|list| parse_cpu_list(&list));
        let cpus_of = |node: usize| parse_cpu_list(&read(&format!("node{node}/cpulist"))?);
        let nodes = online.unwrap_or_default().into_iter().filter_map(cpus_of);
        // Nodes may have memory only.
        let mut nodes = nodes
            .filter(|cpus| !cpus.is_empty())
            .collect::<Vec<Vec<usize>>>();
        if nodes.is_empty() {
            nodes.push(allowed.clone());
        }
        CpuTopology { nodes, allowed }
    }

    /// Returns the processors for rank `local` of the `ranks` on this machine, or `None` to leave
    /// it unbound. `device` is the NUMA node of the rank's device, if known.
    pub fn cpus_for_rank(
        &self,
        affinity: CpuAffinity,
        local: usize,
        ranks: usize,
        device: Option<usize>,
    ) -> Option<Vec<usize>> {
        let allowed_in = |node: &Vec<usize>| -> Vec<usize> {
            let cpus = node.iter().copied();
            cpus.filter(|cpu| self.allowed.contains(cpu)).collect()
        };
        let allowed_by_node = self.nodes.iter().map(allowed_in);
        let nodes = allowed_by_node
            .filter(|node| !node.is_empty())
            .collect::<Vec<Vec<usize>>>();
        let present: usize = self.nodes.iter().map(Vec::len).sum();
        let restricted = self.allowed.len() < present;
        match affinity {
            CpuAffinity::None => None,
            CpuAffinity::Auto if restricted || nodes.len() < 2 => None,
            CpuAffinity::Auto | CpuAffinity::Numa => {
                let device_node = device.and_then(|node| self.nodes.get(node));
                let device_cpus = device_node.map(allowed_in);
                let own_share = || nodes.get(local * nodes.len() / ranks.max(1)).cloned();
                device_cpus
                    .filter(|cpus| !cpus.is_empty())
                    .or_else(own_share)
            }
            CpuAffinity::Cores => {
                let all: Vec<usize> = nodes.concat();
                let share = all.len() / ranks.max(1);
                (share > 0).then(|| all[local * share..(local + 1) * share].to_vec())
            }
        }
    }
}

/// Parses a list in the kernel's format, such as `0-3,8`.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.parse().ok()?;
        let last: usize = last.parse().ok()?;
        found.extend(first..=last);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn two_nodes() -> CpuTopology {
        CpuTopology {
            nodes: vec![vec![0, 1, 2, 3, 8, 9], vec![4, 5, 6, 7, 10, 11]],
            allowed: (0..12).collect(),
        }
    }

    #[test]
    fn ranks_run_on_the_node_of_their_device() {
        let machine = two_nodes();
        assert_eq!(machine.cpus_for_rank(CpuAffinity::None, 0, 4, None), None);
        assert_eq!(
            machine
                .cpus_for_rank(CpuAffinity::Auto, 1, 4, None)
                .unwrap(),
            machine.nodes[0]
        );
        assert_eq!(
            machine
                .cpus_for_rank(CpuAffinity::Auto, 2, 4, None)
                .unwrap(),
            machine.nodes[1]
        );
        assert_eq!(
            machine
                .cpus_for_rank(CpuAffinity::Numa, 0, 4, Some(1))
                .unwrap(),
            machine.nodes[1]
        );
        assert_eq!(
            machine
                .cpus_for_rank(CpuAffinity::Cores, 1, 4, None)
                .unwrap(),
            [3, 8, 9]
        );
        // The process is bound already, for example by srun.
        let bound = CpuTopology {
            allowed: vec![4, 5],
            ..machine
        };
        assert_eq!(bound.cpus_for_rank(CpuAffinity::Auto, 1, 4, None), None);
        assert_eq!(
            bound.cpus_for_rank(CpuAffinity::Numa, 1, 4, None).unwrap(),
            [4, 5]
        );
        assert_eq!(
            bound.cpus_for_rank(CpuAffinity::Cores, 0, 4, None),
            None,
            "fewer processors than ranks"
        );
        let single_node = CpuTopology {
            nodes: vec![vec![0, 1]],
            allowed: vec![0, 1],
        };
        assert_eq!(
            single_node.cpus_for_rank(CpuAffinity::Auto, 0, 2, None),
            None
        );
    }

    #[test]
    fn cpu_lists_are_parsed() {
        assert_eq!(parse_cpu_list("0-3,8\n").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_cpu_list("\n").unwrap(), [0usize; 0]);
        assert_eq!(parse_cpu_list("a"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn shares_are_disjoint_and_allowed(
            sizes in proptest::collection::vec(1usize..9, 1..5),
            ranks in 1usize..17,
            skip in 0usize..5,
        ) {
            let mut next = 0..;
            let node = |&size: &usize| next.by_ref().take(size).collect();
            let nodes: Vec<Vec<usize>> = sizes.iter().map(node).collect();
            let mut allowed = nodes.concat();
            allowed.retain(|cpu| cpu % 5 != skip);
            let machine = CpuTopology { nodes, allowed };
            let mut seen = std::collections::BTreeSet::new();
            for rank in 0..ranks {
                for affinity in [CpuAffinity::Auto, CpuAffinity::Numa, CpuAffinity::Cores] {
                    let cpus = machine.cpus_for_rank(affinity, rank, ranks, None);
                    for cpu in cpus.iter().flatten() {
                        prop_assert!(machine.allowed.contains(cpu));
                    }
                    prop_assert!(cpus.is_none_or(|cpus| !cpus.is_empty()));
                }
                let own = machine.cpus_for_rank(CpuAffinity::Cores, rank, ranks, None);
                for cpu in own.unwrap_or_default() {
                    prop_assert!(seen.insert(cpu), "{} belongs to two ranks", cpu);
                }
            }
        }
    }
}
