//! Who works on which routed tokens of which expert, as plain numbers.
//!
//! *Owners* share a layer's experts out evenly, in order: owner `o` is *home* to its own. (An owner is one rank, or the
//! neighbours that split the same experts.) The routed tokens of an expert, over all tokens of a layer, are its *load*.

/// Part of an expert's load, and who works on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The expert.
    pub expert: usize,
    /// Its helper, or its home.
    pub owner: usize,
    /// How many of its routed tokens; at least one.
    pub routed_tokens: i64,
}

/// A weight transfer: `to` works on routed tokens of `expert`, whose weights are at `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transfer {
    /// The expert's home.
    pub from: usize,
    /// The helper.
    pub to: usize,
    /// The expert.
    pub expert: usize,
}

/// Who works on a layer's routed tokens. Every rank of the group computes the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    experts: usize,
    owners: usize,
    /// Expert by expert; an owner appears once among those of an expert.
    shares: Vec<Share>,
    /// Where each expert's begin.
    first: Vec<usize>,
}

/// The owner that holds `expert`.
pub fn home(expert: usize, experts: usize, owners: usize) -> usize {
    expert * owners / experts
}

/// The loads of owners that work on all routed tokens of the experts they hold.
pub fn home_loads(loads: &[i64], owners: usize) -> Vec<i64> {
    let mut owner_loads = vec![0; owners];
    for (expert, load) in loads.iter().enumerate() {
        owner_loads[home(expert, loads.len(), owners)] += load;
    }
    owner_loads
}

impl Assignment {
    /// Every expert's home works on all of its routed tokens.
    pub fn standard(loads: &[i64], owners: usize) -> Assignment {
        let experts = loads.len();
        let share = |(expert, &routed_tokens)| Share {
            expert,
            owner: home(expert, experts, owners),
            routed_tokens,
        };
        Assignment::new(
            experts,
            owners,
            loads.iter().enumerate().map(share).collect(),
        )
    }

    /// From shares in any order; those of the same expert and owner are added up, empty ones left out.
    pub fn new(experts: usize, owners: usize, mut shares: Vec<Share>) -> Assignment {
        shares.retain(|share| share.routed_tokens > 0);
        // Stable: an expert's shares stay in the order that they were given in.
        shares.sort_by_key(|share| share.expert);
        let mut merged: Vec<Share> = Vec::with_capacity(shares.len());
        let mut first = Vec::with_capacity(experts + 1);
        for share in shares {
            while first.len() <= share.expert {
                first.push(merged.len());
            }
            let start = first[share.expert];
            match merged[start..]
                .iter_mut()
                .find(|known| known.owner == share.owner)
            {
                Some(known) => known.routed_tokens += share.routed_tokens,
                None => merged.push(share),
            }
        }
        first.resize(experts + 1, merged.len());
        Assignment {
            experts,
            owners,
            shares: merged,
            first,
        }
    }

    /// How many experts there are.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// How many owners share them out.
    pub fn owners(&self) -> usize {
        self.owners
    }

    /// The owner that holds `expert`.
    pub fn home(&self, expert: usize) -> usize {
        home(expert, self.experts, self.owners)
    }

    /// Who works on `expert`.
    pub fn expert_shares(&self, expert: usize) -> &[Share] {
        &self.shares[self.first[expert]..self.first[expert + 1]]
    }

    /// All shares, expert by expert.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// Choices that each owner works on.
    pub fn loads(&self) -> Vec<i64> {
        let mut loads = vec![0; self.owners];
        self.shares
            .iter()
            .for_each(|share| loads[share.owner] += share.routed_tokens);
        loads
    }

    /// The weights that helpers need, by sender and then receiver: each once.
    pub fn transfers(&self) -> Vec<Transfer> {
        let away = self
            .shares
            .iter()
            .filter(|share| share.owner != self.home(share.expert));
        let transfer = |share: &Share| Transfer {
            from: self.home(share.expert),
            to: share.owner,
            expert: share.expert,
        };
        let mut transfers: Vec<Transfer> = away.map(transfer).collect();
        transfers.sort_unstable();
        transfers
    }

    /// Choices that are worked on away from home.
    pub fn lent_tokens(&self) -> i64 {
        self.shares
            .iter()
            .filter(|share| share.owner != self.home(share.expert))
            .map(|share| share.routed_tokens)
            .sum()
    }
}

/// Which of an expert's routed tokens go to which of its shares: (source, share, routed tokens), by source and then share.
///
/// `by_source` are the routed tokens of each source rank; `at` says for a source, and for each share, its location: owner and
/// node. A source's routed tokens stay with its own owner where that has a share, else inside its node, else go in order. So
/// a plan moves as few rows as it can.
pub fn split(
    by_source: &[(Location, i64)],
    shares: &[(Location, i64)],
) -> Vec<(usize, usize, i64)> {
    let mut left: Vec<i64> = by_source
        .iter()
        .map(|(_, routed_tokens)| *routed_tokens)
        .collect();
    let mut room: Vec<i64> = shares
        .iter()
        .map(|(_, routed_tokens)| *routed_tokens)
        .collect();
    let mut parts: Vec<(usize, usize, i64)> = Vec::new();
    for near in [
        Location::owner as fn(&Location) -> usize,
        Location::node,
        |_| 0,
    ] {
        // Both sides by where they are; then each meets the next one of the same location.
        let order = |locations: &[(Location, i64)], left: &[i64]| {
            let mut order: Vec<usize> = (0..locations.len())
                .filter(|&index| left[index] > 0)
                .collect();
            order.sort_by_key(|&index| near(&locations[index].0));
            order
        };
        let sources = order(by_source, &left);
        let targets = order(shares, &room);
        let mut source = 0;
        let mut target = 0;
        while source < sources.len() && target < targets.len() {
            let from = sources[source];
            let to = targets[target];
            let taken = match near(&by_source[from].0).cmp(&near(&shares[to].0)) {
                std::cmp::Ordering::Equal => left[from].min(room[to]),
                std::cmp::Ordering::Less => {
                    source += 1;
                    continue;
                }
                std::cmp::Ordering::Greater => {
                    target += 1;
                    continue;
                }
            };
            (left[from], room[to]) = (left[from] - taken, room[to] - taken);
            parts.push((from, to, taken));
            source += usize::from(left[from] == 0);
            target += usize::from(room[to] == 0);
        }
    }
    parts.sort_unstable();
    parts.dedup_by(|next, kept| {
        let same = (next.0, next.1) == (kept.0, kept.1);
        if same {
            kept.2 += next.2;
        }
        same
    });
    parts
}

/// Where a source or a helper sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Number of its owner.
    pub owner: usize,
    /// Number of its node.
    pub node: usize,
}

impl Location {
    fn owner(&self) -> usize {
        self.owner
    }

    fn node(&self) -> usize {
        self.node
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_of_one_owner_are_one() {
        let share = |expert, owner, routed_tokens| Share {
            expert,
            owner,
            routed_tokens,
        };
        let assignment = Assignment::new(
            4,
            2,
            vec![
                share(2, 0, 3),
                share(0, 0, 5),
                share(2, 1, 1),
                share(2, 0, 4),
                share(3, 1, 0),
            ],
        );
        assert_eq!(assignment.expert_shares(0), [share(0, 0, 5)]);
        assert_eq!(assignment.expert_shares(1), []);
        assert_eq!(
            assignment.expert_shares(2),
            [share(2, 0, 7), share(2, 1, 1)]
        );
        assert_eq!(
            assignment.transfers(),
            [Transfer {
                from: 1,
                to: 0,
                expert: 2
            }]
        );
        assert_eq!(
            (assignment.loads(), assignment.lent_tokens()),
            (vec![12, 1], 7)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn choices_are_split_exactly_and_stay_where_they_are_if_they_can(
            ranks in 1usize..9, slices in 1usize..3, per_node in 1usize..4,
            sources in prop::collection::vec(0i64..50, 16),
            cuts in prop::collection::vec(0.0f64..1.0, 0..8),
        ) {
            let location = |owner: usize| Location { owner, node: owner / per_node };
            let sources: Vec<(Location, i64)> =
                (0..ranks * slices).map(|rank| (location(rank / slices), sources[rank % 16])).collect();
            let total: i64 = sources.iter().map(|s| s.1).sum();
            // The load cut into parts, one for each of some owners.
            let mut ends: Vec<i64> = cuts.iter().take(ranks - 1).map(|cut| (cut * total as f64) as i64).collect();
            ends.push(total);
            ends.sort();
            let mut start = 0;
            let shares: Vec<(Location, i64)> = ends.iter().enumerate().map(|(number, &end)| {
                let routed_tokens = end - std::mem::replace(&mut start, end);
                (location((number * 3 + 1) % ranks), routed_tokens)
            }).collect();
            let parts = split(&sources, &shares);
            for (source, (_, routed_tokens)) in sources.iter().enumerate() {
                prop_assert_eq!(parts.iter().filter(|p| p.0 == source).map(|p| p.2).sum::<i64>(), *routed_tokens);
            }
            for (share, (_, routed_tokens)) in shares.iter().enumerate() {
                prop_assert_eq!(parts.iter().filter(|p| p.1 == share).map(|p| p.2).sum::<i64>(), *routed_tokens);
            }
            prop_assert!(parts.is_sorted() && parts.iter().all(|part| part.2 > 0));
            for owner in 0..ranks {
                let of = |list: &[(Location, i64)]| list.iter().filter(|s| s.0.owner == owner).map(|s| s.1).sum::<i64>();
                let stays: i64 = parts.iter()
                    .filter(|p| sources[p.0].0.owner == owner && shares[p.1].0.owner == owner).map(|p| p.2).sum();
                prop_assert_eq!(stays, of(&sources).min(of(&shares)));
            }
        }
    }
}
