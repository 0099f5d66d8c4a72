//! Which processors a rank runs on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuAffinity {
    /// As `numa` on machines with several NUMA nodes, unless the launcher has bound the rank already; else as `none`.
    #[default]
    Auto,
    /// Where the kernel likes.
    None,
    /// Its share of the processors, alone. For machines that nobody else uses.
    Cores,
    /// The processors of one NUMA node: its GPU's, or nodes in turn.
    Numa,
}

/// What a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuTopology {
    /// Those of each NUMA node.
    pub nodes: Vec<Vec<usize>>,
    /// Those that this process may use.
    pub allowed: Vec<usize>,
}

impl CpuTopology {
    /// Of this machine, as the kernel tells, for a process that may use `allowed`.
    pub fn detect(allowed: Vec<usize>) -> CpuTopology {
        let text = |path: &Path| std::fs::read_to_string(path).ok();
        let folder = Path::new("/sys/devices/system/node");
        let online = text(&folder.join("online"))
            .and_then(|list| numbers(&list))
            .unwrap_or_default();
        let nodes = online
            .iter()
            .filter_map(|node| numbers(&text(&folder.join(format!("node{node}/cpulist")))?));
        let nodes: Vec<Vec<usize>> = nodes.filter(|cpus| !cpus.is_empty()).collect();
        CpuTopology {
            nodes: if nodes.is_empty() {
                vec![allowed.clone()]
            } else {
                nodes
            },
            allowed,
        }
    }

    /// The processors for rank `local` of the `ranks` of this machine, whose device is at NUMA node `device`, where that is
    /// known; None: all that it may use.
    pub fn cpus_for_rank(
        &self,
        affinity: CpuAffinity,
        local: usize,
        ranks: usize,
        device: Option<usize>,
    ) -> Option<Vec<usize>> {
        let may = |cpu: &usize| self.allowed.contains(cpu);
        // Those that may be used, node by node.
        let nodes = self
            .nodes
            .iter()
            .map(|node| node.iter().copied().filter(may).collect::<Vec<_>>());
        let nodes: Vec<Vec<usize>> = nodes.filter(|node| !node.is_empty()).collect();
        let restricted = self.allowed.len() < self.nodes.iter().map(Vec::len).sum();
        match affinity {
            CpuAffinity::None => None,
            CpuAffinity::Auto if restricted || nodes.len() < 2 => None,
            CpuAffinity::Auto | CpuAffinity::Numa => {
                let device_cpus = device
                    .and_then(|node| self.nodes.get(node))
                    .map(|node| node.iter().copied().filter(may).collect::<Vec<_>>());
                let round_robin = || nodes.get(local * nodes.len() / ranks.max(1)).cloned();
                device_cpus
                    .filter(|cpus| !cpus.is_empty())
                    .or_else(round_robin)
            }
            CpuAffinity::Cores => {
                let all: Vec<usize> = nodes.concat();
                let share = all.len() / ranks.max(1);
                (share > 0).then(|| all[local * share..(local + 1) * share].to_vec())
            }
        }
    }
}

/// `0-3,8`: the numbers of a list as the kernel writes it.
fn numbers(text: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        found.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
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
    fn ranks_sit_where_their_device_is() {
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
        // srun has bound it already.
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
        let one = CpuTopology {
            nodes: vec![vec![0, 1]],
            allowed: vec![0, 1],
        };
        assert_eq!(one.cpus_for_rank(CpuAffinity::Auto, 0, 2, None), None);
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(numbers("0-3,8\n").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(numbers("\n").unwrap(), [0usize; 0]);
        assert_eq!(numbers("a"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn shares_are_apart_and_allowed(
            sizes in proptest::collection::vec(1usize..9, 1..5), ranks in 1usize..17, skip in 0usize..5,
        ) {
            let mut next = 0..;
            let nodes: Vec<Vec<usize>> = sizes.iter().map(|&size| next.by_ref().take(size).collect()).collect();
            let allowed: Vec<usize> = nodes.concat().into_iter().filter(|cpu| cpu % 5 != skip).collect();
            let machine = CpuTopology { nodes, allowed };
            let mut seen = std::collections::BTreeSet::new();
            for rank in 0..ranks {
                for affinity in [CpuAffinity::Auto, CpuAffinity::Numa, CpuAffinity::Cores] {
                    let cpus = machine.cpus_for_rank(affinity, rank, ranks, None);
                    prop_assert!(cpus.iter().flatten().all(|cpu| machine.allowed.contains(cpu)));
                    prop_assert!(cpus.is_none_or(|cpus| !cpus.is_empty()));
                }
                for cpu in machine.cpus_for_rank(CpuAffinity::Cores, rank, ranks, None).unwrap_or_default() {
                    prop_assert!(seen.insert(cpu), "{} belongs to two ranks", cpu);
                }
            }
        }
    }
}
