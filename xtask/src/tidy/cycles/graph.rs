//! Which file imports which.

use std::collections::{BTreeMap, VecDeque, btree_map::Entry};

/// Files and their imports, with one line for each.
#[derive(Default)]
pub(super) struct Graph<'a> {
    imports: BTreeMap<&'a str, BTreeMap<&'a str, usize>>,
}

/// Files that import each other.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cycle<'a> {
    /// All files that can reach each other.
    pub(super) group: Vec<&'a str>,
    /// The shortest cycle among them, each file importing the next and the last the first.
    pub(super) shortest: Vec<&'a str>,
}

impl<'a> Graph<'a> {
    pub(super) fn add(&mut self, from: &'a str, to: &'a str, line: usize) {
        if from != to {
            self.imports
                .entry(from)
                .or_default()
                .entry(to)
                .or_insert(line);
        }
    }

    /// Returns the line on which `from` imports `to`, if it does.
    pub(super) fn line(&self, from: &str, to: &str) -> Option<usize> {
        self.imports.get(from)?.get(to).copied()
    }

    /// Returns the groups of files that reach each other.
    pub(super) fn cycles(&self) -> Vec<Cycle<'a>> {
        let reached = |file: &&'a str| (*file, self.reached_from(file));
        let reached: BTreeMap<&str, _> = self.imports.keys().map(reached).collect();
        let reaches = |from: &str, to: &str| {
            reached
                .get(from)
                .is_some_and(|files| files.contains_key(to))
        };
        let mut cycles: Vec<Cycle> = Vec::new();
        for &file in self.imports.keys() {
            let is_known = cycles.iter().any(|cycle| cycle.group.contains(&file));
            if reaches(file, file) && !is_known {
                let others = reached[file].keys().copied();
                let group: Vec<&str> = others.filter(|other| reaches(other, file)).collect();
                let loops = group.iter().map(|file| way_back(file, &reached[file]));
                let shortest = loops.min_by_key(Vec::len).unwrap_or_default();
                cycles.push(Cycle { group, shortest });
            }
        }
        cycles
    }

    /// Returns the files that `start` imports, directly or not, each with the file before it on the
    /// shortest way.
    fn reached_from(&self, start: &'a str) -> BTreeMap<&'a str, &'a str> {
        let mut before = BTreeMap::new();
        let mut open = VecDeque::from([start]);
        while let Some(file) = open.pop_front() {
            for &next in self.imports.get(file).into_iter().flat_map(BTreeMap::keys) {
                if let Entry::Vacant(entry) = before.entry(next) {
                    entry.insert(file);
                    open.push_back(next);
                }
            }
        }
        before
    }
}

/// Returns the files of the shortest cycle through `start`, which is the first of them.
fn way_back<'a>(start: &'a str, before: &BTreeMap<&'a str, &'a str>) -> Vec<&'a str> {
    let mut files = vec![before[start]];
    while files[files.len() - 1] != start {
        files.push(before[files[files.len() - 1]]);
    }
    files.reverse();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_apart_and_chains_are_none() {
        let mut graph = Graph::default();
        for pair in ["12", "21", "23", "34", "45", "53", "56"] {
            graph.add(&pair[..1], &pair[1..], 1);
        }
        graph.add("4", "3", 1);
        let cycle = |group: &[&'static str], shortest: &[&'static str]| Cycle {
            group: group.to_vec(),
            shortest: shortest.to_vec(),
        };
        let expected = [
            cycle(&["1", "2"], &["1", "2"]),
            cycle(&["3", "4", "5"], &["3", "4"]),
        ];
        assert_eq!(graph.cycles(), expected);
    }
}
