//! Checks that types cannot express: numbers that must divide others, and keys that need others.

mod device;
mod layout;
mod model;
mod schedule;
mod training;

pub(crate) use layout::hierarchical_groups;

use super::Config;
use crate::problems::Problems;

impl Config {
    /// Returns every reason why this experiment cannot run on `ranks` ranks, one sentence each.
    pub fn problems(&self, ranks: usize) -> Vec<String> {
        let mut problems = Problems::default();
        for problem in self.range_problems() {
            problems.add(problem);
        }
        if !problems.is_empty() {
            // The other checks do arithmetic, which needs numbers within their ranges.
            return problems.into_list();
        }
        self.check_sizes(&mut problems);
        if !problems.is_empty() {
            return problems.into_list();
        }
        self.model.check(&mut problems);
        self.check_data(&mut problems);
        self.check_training(&mut problems);
        self.check_snapshots(ranks, &mut problems);
        match self.mesh(0, ranks) {
            Ok(mesh) => self.check_layout(&mesh, ranks, &mut problems),
            Err(error) => problems.add(error),
        }
        problems.into_list()
    }
}
