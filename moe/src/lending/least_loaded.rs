//! Least-loaded expert parallelism (LLEP, arXiv 2601.17111): overloaded owners lend experts.
//!
//! The plan is a pure function of the experts' loads, so every rank computes the same plan.
//! [`Planner::plan`] follows the paper's algorithms 2 and 3, with these changes:
//! - The capacity rounds up, so that everything fits without being forced.
//! - The required size of a chunk never exceeds what balance allows.
//! - An excess that is not worth a transfer stays at home.
//! - Of several capacities the one with the shortest time, including transfers, is used.
//! - A plan is used only if it saves more than its transfers cost.

use crate::lending::assignment::{Assignment, Share, home, home_loads};
use crate::lending::load_tree::{LeastLoadedTree, heaviest_first};
use crate::lending::published::{AssignedRange, plan_as_published};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Loads over which the paper's imbalance is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Imbalance {
    /// Loads of ranks, which decide the time of a step. The authors' code does the same.
    #[default]
    Device,
    /// Loads of experts, like in the paper's algorithm 4.
    Expert,
}

/// Factors on the wanted capacity. A higher capacity leaves more routed tokens on full owners and
/// needs fewer transfers.
const CAPACITY_SLACKS: [f64; 4] = [1.0, 1.1, 1.25, 1.5];

/// Planner of least-loaded dispatch.
#[derive(Debug, Clone, PartialEq)]
pub struct Planner {
    /// Most routed tokens of an owner, over the mean (the paper's alpha).
    pub capacity: f64,
    /// Routed tokens whose computation takes as long as one transfer of an expert (the paper's m).
    pub min_tokens: i64,
    /// Largest load over mean load up to which nothing is moved (the paper's lambda).
    pub threshold: f64,
    /// Loads that the threshold applies to.
    pub over: Imbalance,
    /// True for the algorithm as published, without the fixes.
    pub strict_paper: bool,
    /// The node of each owner. Helpers on the home's node come first. Empty if nodes do not matter.
    pub nodes: Vec<usize>,
}

impl Planner {
    /// Returns the shares of experts with `loads` `[E]`.
    pub fn plan(&self, loads: &[i64], owners: usize) -> Assignment {
        if owners == 1 || self.is_balanced(loads, owners) {
            return Assignment::standard(loads, owners);
        }
        if self.strict_paper {
            let ranges = plan_as_published(loads, owners, self.capacity, self.min_tokens);
            let shares = ranges.into_iter().map(AssignedRange::share);
            return Assignment::new(loads.len(), owners, shares.collect());
        }
        let standard = home_loads(loads, owners);
        let order = heaviest_first(loads);
        let mut best = None;
        let mut shortest_time = standard.iter().copied().max().unwrap_or(0);
        for slack in CAPACITY_SLACKS {
            let shares = self.spread(loads, &standard, &order, self.capacity * slack);
            let time = self.time(&shares, loads.len(), owners);
            if time < shortest_time {
                shortest_time = time;
                best = Some(shares);
            }
        }
        match best {
            Some(shares) => Assignment::new(loads.len(), owners, shares),
            None => Assignment::standard(loads, owners),
        }
    }

    fn is_balanced(&self, loads: &[i64], owners: usize) -> bool {
        let owner_loads = home_loads(loads, owners);
        let measured = match self.over {
            Imbalance::Device => &owner_loads,
            Imbalance::Expert => loads,
        };
        let total = measured.iter().sum::<i64>();
        let largest = measured.iter().copied().max().unwrap_or(0);
        total == 0 || largest as f64 * (measured.len() as f64) < self.threshold * total as f64
    }

    /// Returns the time of the slowest owner in units of one routed token's computation. Transfers
    /// do not overlap.
    fn time(&self, shares: &[Share], experts: usize, owners: usize) -> i64 {
        let mut times = vec![0; owners];
        for share in shares {
            times[share.owner] += share.routed_tokens;
            let home_owner = home(share.expert, experts, owners);
            if home_owner != share.owner {
                times[home_owner] += self.min_tokens;
                times[share.owner] += self.min_tokens;
            }
        }
        times.into_iter().max().unwrap_or(0)
    }

    /// Assigns experts in `order`, so that no owner exceeds `capacity` times the mean if possible.
    fn spread(
        &self,
        loads: &[i64],
        standard: &[i64],
        order: &[usize],
        capacity: f64,
    ) -> Vec<Share> {
        let experts = loads.len();
        let owners = standard.len();
        let total: i64 = standard.iter().sum();
        let capacity = (capacity * total as f64 / owners as f64).ceil() as i64;
        let mut spread = Spread {
            nodes: &self.nodes,
            capacity,
            // Finer chunks do not pay for better balance; coarser ones cannot empty full ranks.
            min_chunk: self.min_tokens.min(capacity / 16).max(1),
            loaded: LeastLoadedTree::new(standard),
            shares: Vec::with_capacity(experts + owners),
        };
        for &expert in order {
            spread.assign(expert, loads[expert], home(expert, experts, owners));
        }
        spread.shares
    }
}

/// State of a plan in which some experts are assigned.
struct Spread<'a> {
    nodes: &'a [usize],
    capacity: i64,
    min_chunk: i64,
    /// Loads assigned to each owner, and the loads of its own experts that are not yet assigned.
    loaded: LeastLoadedTree,
    shares: Vec<Share>,
}

/// An owner that may help, and its room under the capacity: 0 if that is below the minimum chunk.
struct Helper {
    owner: usize,
    room: i64,
}

impl Spread<'_> {
    fn assign(&mut self, expert: usize, load: i64, home_owner: usize) {
        let others = self.loaded.load(home_owner) - load;
        let mut kept = (self.capacity - others).clamp(0, load);
        let mut rest = load - kept;
        if rest >= self.min_chunk {
            self.loaded.hide(home_owner);
        }
        // A remainder below the minimum chunk is not worth a transfer either.
        while rest >= self.min_chunk {
            let helper = self.next_helper(home_owner);
            let helper_load = self.loaded.load(helper.owner);
            // Without room anywhere, a helper exceeds the capacity if that is better than home.
            let chunk = if helper.room == 0 && helper_load + self.min_chunk <= others + kept {
                rest
            } else {
                rest.min(helper.room)
            };
            if chunk == 0 {
                break;
            }
            self.shares.push(Share {
                expert,
                owner: helper.owner,
                routed_tokens: chunk,
            });
            self.loaded.add(helper.owner, chunk);
            rest -= chunk;
        }
        kept += rest;
        self.loaded.set(home_owner, others + kept);
        self.shares.push(Share {
            expert,
            owner: home_owner,
            routed_tokens: kept,
        });
    }

    fn next_helper(&self, home_owner: usize) -> Helper {
        if let Some(&node) = self.nodes.get(home_owner) {
            // The owners of a node are contiguous.
            let start = self.nodes.partition_point(|&other| other < node);
            let end = self.nodes.partition_point(|&other| other <= node);
            let near = self.helper(self.loaded.least(start..end));
            if near.owner != home_owner && near.room > 0 {
                return near;
            }
        }
        // The least loaded owner has the most room.
        self.helper(self.loaded.least(0..self.loaded.len()))
    }

    fn helper(&self, owner: usize) -> Helper {
        let room = self.capacity - self.loaded.load(owner);
        Helper {
            owner,
            room: if room >= self.min_chunk { room } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests;
