//! The layout of redundancy: which nodes protect each other, and which chunks are coded together.
//!
//! Nodes form groups. In a group of `n` nodes with `m` parities, a *stripe* takes one chunk from
//! each of `k = n - m` nodes and puts its parities on the other `m`. No node has parity of its own
//! data, so any `m` nodes of a group can be lost. The parity moves by one node from stripe to
//! stripe, as in RAID-5 and in SCR's XOR scheme (REFT, arXiv 2310.12670, calls it RAIM5). This file
//! knows neither bytes nor sockets.

use serde::{Deserialize, Serialize};
use std::{cmp::Reverse, collections::BTreeMap};

/// The way in which snapshots survive the loss of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Redundancy {
    /// Snapshots survive the death of processes, but not the loss of a node.
    None,
    /// Each node's snapshots are copied to this many other nodes.
    Copies(usize),
    /// Groups have at most `data + parity` nodes, of which any `parity` may be lost. One parity
    /// is XOR, more are Reed-Solomon.
    Parity {
        /// The number of chunks that a parity is computed from, at most.
        data: usize,
        parity: usize,
    },
}

impl Redundancy {
    /// Returns how many nodes of a group may be lost.
    pub fn max_losses(self) -> usize {
        match self {
            Redundancy::None => 0,
            Redundancy::Copies(copies) => copies,
            Redundancy::Parity { parity, .. } => parity,
        }
    }

    fn max_group_size(self) -> usize {
        match self {
            Redundancy::None => 1,
            Redundancy::Copies(copies) => copies.saturating_add(1),
            Redundancy::Parity { data, parity } => data.saturating_add(parity).max(1),
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

/// Assigns nodes to groups of even size; `domains` is the failure domain (rack, power supply) of
/// each node. Nodes of one domain go to different groups, as far as there are groups. Every node
/// computes the same groups.
///
/// # Errors
/// If there are too few nodes, or a group would have more nodes of one domain than it may lose.
pub fn redundancy_groups(
    domains: &[usize],
    redundancy: Redundancy,
) -> Result<Vec<Vec<usize>>, String> {
    let nodes = domains.len();
    let max_losses = redundancy.max_losses();
    if nodes <= max_losses {
        let needed = max_losses.saturating_add(1);
        let verb = if nodes == 1 { "is" } else { "are" };
        return Err(format!(
            "{redundancy} needs at least {needed} nodes, and there {verb} {nodes}"
        ));
    }
    // With more groups, the last one would be too small to lose `max_losses` nodes.
    let count = nodes
        .div_ceil(redundancy.max_group_size())
        .min(nodes / (max_losses + 1));
    let groups = deal(domains, count);
    let has_domains = domains.iter().any(|&domain| domain != domains[0]);
    if max_losses > 0 && has_domains {
        check_domains(&groups, domains, redundancy)?;
    }
    Ok(groups)
}

/// Deals nodes to `count` groups, the largest failure domains first.
fn deal(domains: &[usize], count: usize) -> Vec<Vec<usize>> {
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    for &domain in domains {
        *sizes.entry(domain).or_default() += 1;
    }
    let mut order: Vec<usize> = (0..domains.len()).collect();
    order.sort_by_key(|&node| (Reverse(sizes[&domains[node]]), domains[node], node));
    let mut groups = vec![Vec::new(); count];
    for (index, node) in order.into_iter().enumerate() {
        groups[index % count].push(node);
    }
    for group in &mut groups {
        group.sort_unstable();
    }
    groups
}

/// Checks that no failure domain has more nodes in a group than the group may lose.
fn check_domains(
    groups: &[Vec<usize>],
    domains: &[usize],
    redundancy: Redundancy,
) -> Result<(), String> {
    let max_losses = redundancy.max_losses();
    for group in groups {
        for &node in group {
            let domain = domains[node];
            let together = group
                .iter()
                .filter(|&&other| domains[other] == domain)
                .count();
            if together > max_losses {
                return Err(format!(
                    "{together} nodes of failure domain {domain} would be in one group, and \
                     {redundancy} survives {max_losses}: use more parity or smaller groups"
                ));
            }
        }
    }
    Ok(())
}

/// The stripes of one group, over its positions `0..nodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripeLayout {
    /// The number of nodes in the group.
    pub nodes: usize,
    /// The number of parities in a stripe.
    pub parity: usize,
    /// The position of the first parity of the first stripe. It differs between the ranks of a
    /// node, so that small parts are spread as well.
    pub rotation: usize,
}

impl StripeLayout {
    /// Returns the number of data chunks in a stripe.
    pub fn data(&self) -> usize {
        self.nodes - self.parity
    }

    /// Returns the position of parity `index` of a stripe. The node at that of parity 0 encodes.
    pub fn parity_position(&self, stripe: u64, index: usize) -> usize {
        let stripe = (stripe % self.nodes as u64) as usize;
        (stripe + self.rotation + index) % self.nodes
    }

    /// Returns the positions whose data is in a stripe, in the order of the code.
    pub fn data_positions(&self, stripe: u64) -> impl Iterator<Item = usize> + use<> {
        let layout = *self;
        let first = self.parity_position(stripe, 0);
        (layout.parity..layout.nodes).map(move |after| (first + after) % layout.nodes)
    }

    /// Returns the chunk of `position` that is in `stripe`, if that has data there.
    pub fn chunk_at(&self, position: usize, stripe: u64) -> Option<u64> {
        if !self.has_data(position, stripe) {
            return None;
        }
        let nodes = self.nodes as u64;
        let round = stripe / nodes;
        let before = (round * nodes..stripe)
            .filter(|&earlier| self.has_data(position, earlier))
            .count();
        Some(round * self.data() as u64 + before as u64)
    }

    /// Returns the stripe that holds `chunk` of `position`.
    pub fn stripe_of(&self, position: usize, chunk: u64) -> u64 {
        let nodes = self.nodes as u64;
        let data = self.data() as u64;
        let first = chunk / data * nodes;
        (first..first + nodes)
            .filter(|&stripe| self.has_data(position, stripe))
            .nth((chunk % data) as usize)
            .expect("a node has data in k stripes of n")
    }

    /// Returns the number of stripes that cover parts of up to `chunks` chunks.
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

    fn layout() -> impl Strategy<Value = StripeLayout> {
        let sizes = (2usize..10, 1usize..4, 0usize..20);
        sizes.prop_map(|(nodes, parity, rotation)| StripeLayout {
            nodes,
            parity: parity.min(nodes - 1),
            rotation: rotation % nodes,
        })
    }

    fn parity_positions(layout: &StripeLayout, stripe: u64) -> Vec<usize> {
        (0..layout.parity)
            .map(|index| layout.parity_position(stripe, index))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn every_chunk_is_in_one_stripe_whose_parity_is_elsewhere(
            layout in layout(),
            chunks in 0u64..40,
        ) {
            let mut seen = BTreeSet::new();
            for stripe in 0..layout.count(chunks) {
                let parities = parity_positions(&layout, stripe);
                let data: Vec<usize> = layout.data_positions(stripe).collect();
                let all: BTreeSet<usize> = parities.iter().chain(&data).copied().collect();
                prop_assert_eq!(all.len(), layout.nodes, "every node has one part of a stripe");
                for &position in &data {
                    let chunk = layout.chunk_at(position, stripe).unwrap();
                    prop_assert!(seen.insert((position, chunk)));
                    prop_assert_eq!(layout.stripe_of(position, chunk), stripe);
                }
                for &position in &parities {
                    prop_assert_eq!(layout.chunk_at(position, stripe), None);
                }
            }
            for position in 0..layout.nodes {
                prop_assert!((0..chunks).all(|chunk| seen.contains(&(position, chunk))));
            }
        }

        #[test]
        fn parity_is_spread_evenly(layout in layout(), chunks in 0u64..40) {
            let mut held = vec![0u64; layout.nodes];
            for stripe in 0..layout.count(chunks) {
                for position in parity_positions(&layout, stripe) {
                    held[position] += 1;
                }
            }
            let all = layout.count(chunks) * layout.parity as u64;
            let even = all / layout.nodes as u64;
            prop_assert!(held.iter().all(|&parities| parities == even));
        }

        #[test]
        fn groups_are_even_and_keep_domains_apart(
            nodes in 1usize..40,
            per_domain in 1usize..6,
            data in 1usize..9,
            parity in 1usize..4,
        ) {
            let domains: Vec<usize> = (0..nodes).map(|node| node / per_domain).collect();
            match redundancy_groups(&domains, Redundancy::Parity { data, parity }) {
                Ok(groups) => {
                    let all: BTreeSet<usize> = groups.iter().flatten().copied().collect();
                    prop_assert_eq!(all.len(), nodes);
                    let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
                    prop_assert_eq!(sizes.iter().sum::<usize>(), nodes);
                    let least = *sizes.iter().min().unwrap();
                    let most = *sizes.iter().max().unwrap();
                    prop_assert!(least > parity && most - least <= 1, "{:?}", sizes);
                    if nodes > per_domain {
                        for group in &groups {
                            for &node in group {
                                let together = group
                                    .iter()
                                    .filter(|&&other| domains[other] == domains[node])
                                    .count();
                                prop_assert!(together <= parity);
                            }
                        }
                    }
                }
                Err(reason) => {
                    let groups = nodes.div_ceil(data + parity).min(nodes / (parity + 1));
                    let is_expected = nodes <= parity
                        || per_domain.min(nodes).div_ceil(groups) > parity;
                    prop_assert!(is_expected, "{}", reason);
                }
            }
        }
    }

    #[test]
    fn the_printed_layout_of_four_and_two() {
        let layout = StripeLayout {
            nodes: 6,
            parity: 2,
            rotation: 0,
        };
        let positions = |stripe| layout.data_positions(stripe).collect::<Vec<_>>();
        assert_eq!(positions(0), [2, 3, 4, 5]);
        assert_eq!(positions(5), [1, 2, 3, 4]);
        assert_eq!(layout.chunk_at(2, 0), Some(0));
        assert_eq!(layout.chunk_at(2, 3), Some(1));
        assert_eq!(layout.chunk_at(2, 2), None);
    }

    #[test]
    fn groups_of_copies_and_too_few_nodes() {
        let copies = Redundancy::Copies(1);
        let groups = redundancy_groups(&[0, 0, 1, 1], copies).unwrap();
        assert_eq!(groups, [[0, 2], [1, 3]]);
        let error = redundancy_groups(&[0], copies).unwrap_err();
        assert!(
            error.contains("at least 2 nodes, and there is 1"),
            "{error}"
        );
    }
}
