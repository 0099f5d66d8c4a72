//! The least loaded of a range of owners, in logarithmic time.

use std::cmp::Reverse;
use std::ops::Range;

/// Stands for no owner in [`LeastLoadedTree`].
const NONE: usize = usize::MAX;

/// Loads of owners, with a tree of the least loaded owners.
pub(crate) struct LeastLoadedTree {
    loads: Vec<i64>,
    /// The least loaded owner of each subtree; leaves begin at `width`.
    tree: Vec<usize>,
    width: usize,
    hidden: usize,
}

impl LeastLoadedTree {
    pub(crate) fn new(loads: &[i64]) -> LeastLoadedTree {
        let width = loads.len().next_power_of_two();
        let mut tree = vec![NONE; 2 * width];
        for owner in 0..loads.len() {
            tree[width + owner] = owner;
        }
        let mut new = LeastLoadedTree {
            loads: loads.to_vec(),
            tree,
            width,
            hidden: NONE,
        };
        for node in (1..width).rev() {
            new.update_node(node);
        }
        new
    }

    pub(crate) fn len(&self) -> usize {
        self.loads.len()
    }

    pub(crate) fn load(&self, owner: usize) -> i64 {
        self.loads[owner]
    }

    /// Returns the less loaded owner; of equal ones the first. A hidden owner is worse than any
    /// other, and none is worse than that.
    fn better(&self, a: usize, b: usize) -> usize {
        let key = |owner: usize| {
            (
                owner == NONE,
                owner == self.hidden,
                self.loads.get(owner),
                owner,
            )
        };
        if key(a) <= key(b) { a } else { b }
    }

    fn update_node(&mut self, node: usize) {
        self.tree[node] = self.better(self.tree[2 * node], self.tree[2 * node + 1]);
    }

    fn update(&mut self, owner: usize) {
        let mut node = (self.width + owner) / 2;
        while node > 0 {
            self.update_node(node);
            node /= 2;
        }
    }

    /// Makes `owner` the last choice until its load is set again.
    pub(crate) fn hide(&mut self, owner: usize) {
        self.hidden = owner;
        self.update(owner);
    }

    pub(crate) fn set(&mut self, owner: usize, load: i64) {
        self.loads[owner] = load;
        if self.hidden == owner {
            self.hidden = NONE;
        }
        self.update(owner);
    }

    pub(crate) fn add(&mut self, owner: usize, load: i64) {
        self.set(owner, self.load(owner) + load);
    }

    /// Returns the least loaded owner in `range`.
    pub(crate) fn least(&self, range: Range<usize>) -> usize {
        let mut start = self.width + range.start;
        let mut end = self.width + range.end;
        let mut best = NONE;
        while start < end {
            if start % 2 == 1 {
                best = self.better(best, self.tree[start]);
                start += 1;
            }
            if end % 2 == 1 {
                end -= 1;
                best = self.better(best, self.tree[end]);
            }
            start /= 2;
            end /= 2;
        }
        best
    }
}

/// Returns the experts with load, the heaviest first; of equal ones the first.
pub(crate) fn heaviest_first(loads: &[i64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..loads.len())
        .filter(|&expert| loads[expert] > 0)
        .collect();
    order.sort_by_key(|&expert| Reverse(loads[expert]));
    order
}
