//! LLEP's planner as published (arXiv 2601.17111, algorithms 2 and 3), entry for entry.

use crate::lending::assignment::{Share, home, home_loads};
use crate::lending::load_tree::{LeastLoadedTree, heaviest_first};

/// Routed tokens `start..end` of an expert, numbered rank by rank, and the owner that computes
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AssignedRange {
    pub(crate) expert: usize,
    pub(crate) owner: usize,
    pub(crate) start: i64,
    pub(crate) end: i64,
}

impl AssignedRange {
    pub(crate) fn share(self) -> Share {
        Share {
            expert: self.expert,
            owner: self.owner,
            routed_tokens: self.end - self.start,
        }
    }
}

/// Plans like the paper, without the threshold.
///
/// The paper's algorithm has flaws that `Planner::plan` fixes. One owner may appear twice for an
/// expert, small chunks are sent, and a `min_tokens` above the mean load forces everything onto one
/// helper.
pub(crate) fn plan_as_published(
    loads: &[i64],
    owners: usize,
    capacity: f64,
    min_tokens: i64,
) -> Vec<AssignedRange> {
    let total: i64 = loads.iter().sum();
    let capacity = (capacity * total as f64 / owners as f64).floor() as i64;
    let mut loaded = LeastLoadedTree::new(&home_loads(loads, owners));
    let mut ranges = Vec::new();
    for expert in heaviest_first(loads) {
        let load = loads[expert];
        let home_owner = home(expert, loads.len(), owners);
        let others = loaded.load(home_owner) - load;
        let kept = (capacity - others).clamp(0, load);
        let mut start = 0;
        let mut assign = |owner, routed_tokens| {
            let end = start + routed_tokens;
            ranges.push(AssignedRange {
                expert,
                owner,
                start,
                end,
            });
            start = end;
        };
        if kept > 0 {
            assign(home_owner, kept);
        }
        loaded.hide(home_owner);
        let mut rest = load - kept;
        while rest > 0 {
            let helper = loaded.least(0..owners);
            let chunk = rest.min(capacity - loaded.load(helper));
            // The least loaded has the most room: if its chunk is too small, all chunks are.
            let taken = if chunk > 0 && (chunk >= min_tokens || chunk == rest) {
                chunk
            } else {
                rest
            };
            assign(helper, taken);
            loaded.add(helper, taken);
            rest -= taken;
        }
        loaded.set(home_owner, others + kept);
    }
    ranges
}
