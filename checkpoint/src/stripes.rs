//! Where redundancy lies: which nodes protect one another, and which chunk of whom is coded with which.
//!
//! Nodes are dealt into groups. In a group of `n` nodes with `m` parities, a *stripe* takes one chunk from each of
//! `k = n - m` nodes and leaves its parities on the other `m`, so no node ever has parity of its own data, and any `m`
//! nodes of a group can be lost. The parity moves on by one node from stripe to stripe, as in RAID-5 and in SCR's XOR
//! scheme (REFT, arXiv 2310.12670, calls it RAIM5). Nothing here knows bytes or sockets.

use serde::{Deserialize, Serialize};

/// How snapshots survive the loss of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Redundancy {
    /// They do not: only the death of processes is survived.
    None,
    /// Whole copies on so many other nodes.
    Copies(usize),
    /// Groups of at most `data + parity` nodes, any `parity` of which may be lost: XOR for one, Reed-Solomon for more.
    Parity {
        /// Nodes' worth of data that parities are made of, at most.
        data: usize,
        /// Nodes of a group that may be lost.
        parity: usize,
    },
}

impl Redundancy {
    /// Nodes of a group that may be lost.
    pub fn survives(self) -> usize {
        match self {
            Redundancy::None => 0,
            Redundancy::Copies(copies) => copies,
            Redundancy::Parity { parity, .. } => parity,
        }
    }

    /// Nodes of a group at most.
    fn group_size(self) -> usize {
        match self {
            Redundancy::None => 1,
            Redundancy::Copies(copies) => 1 + copies,
            Redundancy::Parity { data, parity } => data + parity,
        }
    }
}

impl std::fmt::Display for Redundancy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Redundancy::None => write!(f, "no redundancy"),
            Redundancy::Copies(1) => write!(f, "a copy on another node"),
            Redundancy::Copies(copies) => write!(f, "copies on {copies} other nodes"),
            Redundancy::Parity { data, parity } => write!(f, "erasure coding {data} + {parity}"),
        }
    }
}

/// Deals nodes, given by the failure domain (rack, power supply) that each is in, into groups of even size; nodes of one
/// domain go to different groups as far as there are groups. The same on every node.
///
/// # Errors
/// When there are too few nodes, or a group would have more nodes of one domain than it can lose.
pub fn redundancy_groups(
    domains: &[usize],
    redundancy: Redundancy,
) -> Result<Vec<Vec<usize>>, String> {
    let nodes = domains.len();
    let survives = redundancy.survives();
    if nodes <= survives {
        return Err(format!(
            "{redundancy} needs at least {} nodes, and there {}",
            survives + 1,
            if nodes == 1 {
                "is 1".into()
            } else {
                format!("are {nodes}")
            }
        ));
    }
    // Fewer groups where the last would be too small to lose `survives` nodes.
    let count = nodes
        .div_ceil(redundancy.group_size())
        .min(nodes / (survives + 1));
    let mut order: Vec<usize> = (0..nodes).collect();
    let members = |domain: usize| domains.iter().filter(|&&other| other == domain).count();
    order.sort_by_key(|&node| {
        (
            std::cmp::Reverse(members(domains[node])),
            domains[node],
            node,
        )
    });
    let mut groups = vec![Vec::new(); count];
    for (place, node) in order.into_iter().enumerate() {
        groups[place % count].push(node);
    }
    groups.iter_mut().for_each(|group| group.sort_unstable());
    let apart = domains.iter().any(|&domain| domain != domains[0]);
    for group in groups.iter().filter(|_| survives > 0 && apart) {
        for &node in group {
            let together = group
                .iter()
                .filter(|&&other| domains[other] == domains[node])
                .count();
            if together > survives {
                return Err(format!(
                    "{together} nodes of failure domain {} would be in one group, and {redundancy} survives {survives}: \
                     use more parity or smaller groups",
                    domains[node]
                ));
            }
        }
    }
    Ok(groups)
}

/// The stripes of one group, over its positions `0..nodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripes {
    /// Nodes of the group.
    pub nodes: usize,
    /// Parities of a stripe.
    pub parity: usize,
    /// Where the first parity of the first stripe is: other for each rank of a node, so that small parts spread too.
    pub rotation: usize,
}

impl Stripes {
    /// Chunks of data in a stripe.
    pub fn data(&self) -> usize {
        self.nodes - self.parity
    }

    /// The position of parity `index` of a stripe. That of parity 0 encodes.
    pub fn parity_position(&self, stripe: u64, index: usize) -> usize {
        ((stripe % self.nodes as u64) as usize + self.rotation + index) % self.nodes
    }

    /// The positions whose data is in a stripe, in the order of the code.
    pub fn data_positions(&self, stripe: u64) -> impl Iterator<Item = usize> + use<> {
        let stripes = *self;
        let first = self.parity_position(stripe, 0);
        (stripes.parity..stripes.nodes).map(move |after| (first + after) % stripes.nodes)
    }

    /// Which chunk of `position` is in `stripe`; None where it has parity.
    pub fn chunk(&self, position: usize, stripe: u64) -> Option<u64> {
        let nodes = self.nodes as u64;
        let before = (stripe / nodes * nodes..stripe)
            .filter(|&earlier| self.has_data(position, earlier))
            .count() as u64;
        self.has_data(position, stripe)
            .then(|| stripe / nodes * self.data() as u64 + before)
    }

    /// In which stripe `chunk` of `position` is.
    pub fn stripe_of(&self, position: usize, chunk: u64) -> u64 {
        let nodes = self.nodes as u64;
        let data = self.data() as u64;
        let round = chunk / data * nodes;
        let mut stripes = (round..round + nodes).filter(|&stripe| self.has_data(position, stripe));
        stripes
            .nth((chunk % data) as usize)
            .expect("a node has data in k stripes of n")
    }

    /// Stripes that cover parts of up to `chunks` chunks.
    pub fn count(&self, chunks: u64) -> u64 {
        chunks.div_ceil(self.data() as u64) * self.nodes as u64
    }

    fn has_data(&self, position: usize, stripe: u64) -> bool {
        (0..self.parity).all(|index| self.parity_position(stripe, index) != position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn shape() -> impl Strategy<Value = (Stripes, u64)> {
        (2usize..10, 1usize..4, 0usize..20, 0u64..40).prop_map(
            |(nodes, parity, rotation, chunks)| {
                let parity = parity.min(nodes - 1);
                (
                    Stripes {
                        nodes,
                        parity,
                        rotation: rotation % nodes,
                    },
                    chunks,
                )
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn every_chunk_is_in_one_stripe_whose_parity_is_elsewhere((stripes, chunks) in shape()) {
            let mut seen = BTreeSet::new();
            for stripe in 0..stripes.count(chunks) {
                let parities: Vec<usize> = (0..stripes.parity).map(|index| stripes.parity_position(stripe, index)).collect();
                let data: Vec<usize> = stripes.data_positions(stripe).collect();
                let all: BTreeSet<usize> = parities.iter().chain(&data).copied().collect();
                prop_assert_eq!(all.len(), stripes.nodes, "every node has one part of a stripe");
                for &position in &data {
                    let chunk = stripes.chunk(position, stripe).unwrap();
                    prop_assert!(seen.insert((position, chunk)));
                    prop_assert_eq!(stripes.stripe_of(position, chunk), stripe);
                }
                prop_assert!(parities.iter().all(|&position| stripes.chunk(position, stripe).is_none()));
            }
            for position in 0..stripes.nodes {
                prop_assert!((0..chunks).all(|chunk| seen.contains(&(position, chunk))));
            }
        }

        #[test]
        fn parity_is_spread_evenly((stripes, chunks) in shape()) {
            let mut held = vec![0u64; stripes.nodes];
            for stripe in 0..stripes.count(chunks) {
                (0..stripes.parity).for_each(|index| held[stripes.parity_position(stripe, index)] += 1);
            }
            let even = stripes.count(chunks) * stripes.parity as u64 / stripes.nodes as u64;
            prop_assert!(held.iter().all(|&parities| parities == even));
        }

        #[test]
        fn groups_are_even_and_keep_domains_apart(
            nodes in 1usize..40, per_domain in 1usize..6, data in 1usize..9, parity in 1usize..4,
        ) {
            let domains: Vec<usize> = (0..nodes).map(|node| node / per_domain).collect();
            let redundancy = Redundancy::Parity { data, parity };
            match redundancy_groups(&domains, redundancy) {
                Ok(groups) => {
                    let all: BTreeSet<usize> = groups.iter().flatten().copied().collect();
                    prop_assert_eq!(all.len(), nodes);
                    prop_assert_eq!(groups.iter().map(Vec::len).sum::<usize>(), nodes);
                    let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
                    let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
                    prop_assert!(least > parity && most - least <= 1, "{:?}", sizes);
                    if nodes > per_domain {
                        for group in &groups {
                            for &node in group {
                                prop_assert!(group.iter().filter(|&&o| domains[o] == domains[node]).count() <= parity);
                            }
                        }
                    }
                }
                Err(reason) => {
                    let groups = nodes.div_ceil(data + parity).min(nodes / (parity + 1));
                    prop_assert!(nodes <= parity || per_domain.min(nodes).div_ceil(groups) > parity, "{}", reason);
                }
            }
        }
    }

    #[test]
    fn the_printed_layout_of_four_and_two() {
        let stripes = Stripes {
            nodes: 6,
            parity: 2,
            rotation: 0,
        };
        assert_eq!(stripes.data_positions(0).collect::<Vec<_>>(), [2, 3, 4, 5]);
        assert_eq!(stripes.data_positions(5).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(
            (
                stripes.chunk(2, 0),
                stripes.chunk(2, 3),
                stripes.chunk(2, 2)
            ),
            (Some(0), Some(1), None)
        );
        assert_eq!(
            redundancy_groups(&[0, 0, 1, 1], Redundancy::Copies(1)).unwrap(),
            [[0, 2], [1, 3]]
        );
        assert!(
            redundancy_groups(&[0], Redundancy::Copies(1))
                .unwrap_err()
                .contains("at least 2 nodes, and there is 1")
        );
    }
}
