//! Least-loaded expert parallelism (LLEP, arXiv 2601.17111): when ranks would be loaded unevenly, part of the work of
//! full ones is done by others, to which the experts' weights are sent.
//!
//! The plan is a pure function of the experts' loads, so every rank computes the same one. [`Planner::plan`] keeps the
//! paper's algorithm (2 and 3) and fixes what makes it fail or lose: the capacity rounds up, so everything fits without
//! being forced; a chunk is never required to be larger than balance can bear; an excess that is not worth a transfer
//! stays at home; of several capacities the one with the shortest time, transfers included, is taken; and a plan is used
//! only where it saves more than its transfers cost. [`paper`] is the algorithm as published.

use crate::lending::assignment::{Assignment, Share, home, home_loads};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the paper's imbalance is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Imbalance {
    /// Over ranks: what decides a step's time, and what the authors' code does.
    #[default]
    Device,
    /// Over experts: as the paper's algorithm 4 is written.
    Expert,
}

/// Capacities that are tried, over the wanted one: more routed tokens on full owners are fewer transfers. The plan with the
/// shortest time is taken, or none.
const CAPACITY_SLACKS: [f64; 4] = [1.0, 1.1, 1.25, 1.5];

/// Decides who works on what.
#[derive(Debug, Clone, PartialEq)]
pub struct Planner {
    /// Choices that an owner is given at most, over the mean (the paper's alpha).
    pub capacity: f64,
    /// Choices that are worth sending an expert's weights for (the paper's m): one transfer costs as much as the work on
    /// so many.
    pub min_tokens: i64,
    /// Largest load over mean load up to which nothing is moved (the paper's lambda).
    pub threshold: f64,
    /// What that is measured over.
    pub over: Imbalance,
    /// The algorithm as published, without what fixes it.
    pub strict_paper: bool,
    /// The node of each owner; helpers on the home's own are asked first. Empty: all are alike.
    pub nodes: Vec<usize>,
}

/// Part `start..end` of the routed tokens of an expert, numbered rank by rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AssignedRange {
    /// The expert.
    pub expert: usize,
    /// Who works on them.
    pub owner: usize,
    /// The first.
    pub start: i64,
    /// The one after the last.
    pub end: i64,
}

impl Planner {
    /// Who works on the routed tokens of experts with `loads` `[E]`.
    pub fn plan(&self, loads: &[i64], owners: usize) -> Assignment {
        if owners == 1 || self.balanced(loads, owners) {
            return Assignment::standard(loads, owners);
        }
        if self.strict_paper {
            let share = |entry: AssignedRange| Share {
                expert: entry.expert,
                owner: entry.owner,
                routed_tokens: entry.end - entry.start,
            };
            let entries = paper(loads, owners, self.capacity, self.min_tokens);
            return Assignment::new(
                loads.len(),
                owners,
                entries.into_iter().map(share).collect(),
            );
        }
        let standard = home_loads(loads, owners);
        let order = heaviest_first(loads);
        let mut best = None;
        let mut least_time = standard.iter().copied().max().unwrap_or(0);
        for slack in CAPACITY_SLACKS {
            let shares = self.spread(loads, &standard, &order, self.capacity * slack);
            let time = self.time(&shares, loads.len(), owners);
            if time < least_time {
                (least_time, best) = (time, Some(shares));
            }
        }
        match best {
            Some(shares) => Assignment::new(loads.len(), owners, shares),
            None => Assignment::standard(loads, owners),
        }
    }

    /// What the slowest owner is busy with, in units of the work on one choice: routed tokens, and one transfer after another.
    fn time(&self, shares: &[Share], experts: usize, owners: usize) -> i64 {
        let mut times = vec![0; owners];
        for share in shares {
            times[share.owner] += share.routed_tokens;
            let from = home(share.expert, experts, owners);
            if from != share.owner {
                times[from] += self.min_tokens;
                times[share.owner] += self.min_tokens;
            }
        }
        times.into_iter().max().unwrap_or(0)
    }

    fn balanced(&self, loads: &[i64], owners: usize) -> bool {
        let owner_loads = home_loads(loads, owners);
        let measured = match self.over {
            Imbalance::Device => &owner_loads,
            Imbalance::Expert => loads,
        };
        let total = measured.iter().sum::<i64>();
        let largest = measured.iter().copied().max().unwrap_or(0);
        total == 0 || largest as f64 * (measured.len() as f64) < self.threshold * total as f64
    }

    /// Experts in `order`, nobody above `capacity` times the mean if it can be.
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
        // Finer than this, chunks are not worth more balance; coarser, and full ranks cannot be emptied.
        let least = self.min_tokens.min(capacity / 16).max(1);
        let mut shares = Vec::with_capacity(experts + owners);
        // What each owner has been given, and what of its own experts is still to be decided.
        let mut loaded = LeastLoadedTree::new(standard);
        for &expert in order {
            let load = loads[expert];
            let home_owner = home(expert, experts, owners);
            let others = loaded.load(home_owner) - load;
            let mut kept = (capacity - others).clamp(0, load);
            let mut rest = load - kept;
            if rest >= least {
                loaded.hide(home_owner);
            }
            // What is left over of an excess is not worth a transfer either.
            while rest >= least {
                let (helper, room) = self.helper(&loaded, home_owner, capacity, least);
                // Where nobody has room for a chunk that pays: over the capacity, if that is still better than at home.
                let chunk = match room {
                    0 if loaded.load(helper) + least <= others + kept => rest,
                    room => rest.min(room),
                };
                if chunk == 0 {
                    break;
                }
                shares.push(Share {
                    expert,
                    owner: helper,
                    routed_tokens: chunk,
                });
                loaded.set(helper, loaded.load(helper) + chunk);
                rest -= chunk;
            }
            kept += rest;
            loaded.set(home_owner, others + kept);
            shares.push(Share {
                expert,
                owner: home_owner,
                routed_tokens: kept,
            });
        }
        shares
    }

    /// The helper to ask next, and its room under the capacity; 0 where that is not enough for a chunk that pays.
    fn helper(
        &self,
        loaded: &LeastLoadedTree,
        home_owner: usize,
        capacity: i64,
        least: i64,
    ) -> (usize, i64) {
        let room = |owner: usize| {
            Some(capacity - loaded.load(owner))
                .filter(|&room| room >= least)
                .unwrap_or(0)
        };
        if let Some(&node) = self.nodes.get(home_owner) {
            // Nodes are ranges of owners.
            let start = self.nodes.partition_point(|&other| other < node);
            let end = self.nodes.partition_point(|&other| other <= node);
            let near = loaded.least(start..end);
            if near != home_owner && room(near) > 0 {
                return (near, room(near));
            }
        }
        // The least loaded has the most room: if it is not enough, nobody's is.
        let helper = loaded.least(0..loaded.len());
        (helper, room(helper))
    }
}

/// LLEP as published: algorithms 2 and 3, entry for entry. (Without threshold. It has flaws that
/// [`Planner::plan`] fixes: one owner may appear twice for an expert, small chunks are sent, and a `min_tokens` above
/// the mean load forces everything onto one helper.)
pub fn paper(loads: &[i64], owners: usize, capacity: f64, min_tokens: i64) -> Vec<AssignedRange> {
    let total: i64 = loads.iter().sum();
    let capacity = (capacity * total as f64 / owners as f64).floor() as i64;
    let mut loaded = LeastLoadedTree::new(&home_loads(loads, owners));
    let mut entries = Vec::new();
    for expert in heaviest_first(loads) {
        let load = loads[expert];
        let home_owner = home(expert, loads.len(), owners);
        let others = loaded.load(home_owner) - load;
        let kept = (capacity - others).clamp(0, load);
        let mut start = 0;
        let mut give = |owner, routed_tokens| {
            entries.push(AssignedRange {
                expert,
                owner,
                start,
                end: start + routed_tokens,
            });
            start += routed_tokens;
        };
        if kept > 0 {
            give(home_owner, kept);
        }
        loaded.hide(home_owner);
        let mut rest = load - kept;
        while rest > 0 {
            let helper = loaded.least(0..owners);
            let chunk = rest.min(capacity - loaded.load(helper));
            // The least loaded has the most room: where its chunk is too small, all are.
            let taken = if chunk > 0 && (chunk >= min_tokens || chunk == rest) {
                chunk
            } else {
                rest
            };
            give(helper, taken);
            loaded.set(helper, loaded.load(helper) + taken);
            rest -= taken;
        }
        loaded.set(home_owner, others + kept);
    }
    entries
}

/// The experts with load, from the heaviest; of equal ones the first first.
fn heaviest_first(loads: &[i64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..loads.len())
        .filter(|&expert| loads[expert] > 0)
        .collect();
    order.sort_by_key(|&expert| std::cmp::Reverse(loads[expert]));
    order
}

/// Loads of which the least of any range is found in logarithmic time.
struct LeastLoadedTree {
    loads: Vec<i64>,
    /// Number of the least loaded in each subtree; leaves from `width` on.
    tree: Vec<usize>,
    width: usize,
    hidden: usize,
}

impl LeastLoadedTree {
    fn new(loads: &[i64]) -> LeastLoadedTree {
        let width = loads.len().next_power_of_two();
        let mut tree = vec![usize::MAX; 2 * width];
        (0..loads.len()).for_each(|owner| tree[width + owner] = owner);
        let mut new = LeastLoadedTree {
            loads: loads.to_vec(),
            tree,
            width,
            hidden: usize::MAX,
        };
        (1..width).rev().for_each(|node| {
            new.tree[node] = new.better(new.tree[2 * node], new.tree[2 * node + 1])
        });
        new
    }

    fn len(&self) -> usize {
        self.loads.len()
    }

    fn load(&self, owner: usize) -> i64 {
        self.loads[owner]
    }

    /// The less loaded; of equal ones the first. One that is not there or hidden is worse than any.
    fn better(&self, a: usize, b: usize) -> usize {
        let key = |owner: usize| {
            (
                owner == usize::MAX,
                owner == self.hidden,
                self.loads.get(owner),
                owner,
            )
        };
        if key(a) <= key(b) { a } else { b }
    }

    fn update(&mut self, owner: usize) {
        let mut node = (self.width + owner) / 2;
        while node > 0 {
            self.tree[node] = self.better(self.tree[2 * node], self.tree[2 * node + 1]);
            node /= 2;
        }
    }

    /// Makes `owner` the last choice until its load is set again.
    fn hide(&mut self, owner: usize) {
        self.hidden = owner;
        self.update(owner);
    }

    fn set(&mut self, owner: usize, load: i64) {
        self.loads[owner] = load;
        if self.hidden == owner {
            self.hidden = usize::MAX;
        }
        self.update(owner);
    }

    /// The least loaded owner in `range`.
    fn least(&self, range: std::ops::Range<usize>) -> usize {
        let mut start = self.width + range.start;
        let mut end = self.width + range.end;
        let mut best = usize::MAX;
        while start < end {
            if start % 2 == 1 {
                best = self.better(best, self.tree[start]);
                start += 1;
            }
            if end % 2 == 1 {
                end -= 1;
                best = self.better(best, self.tree[end]);
            }
            (start, end) = (start / 2, end / 2);
        }
        best
    }
}

#[cfg(test)]
mod tests;
