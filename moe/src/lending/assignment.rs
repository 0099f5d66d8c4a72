//! Which owners compute which routed tokens of which expert, as plain numbers.
//!
//! *Owners* hold equal, contiguous ranges of a layer's experts. An expert's owner is its *home*.
//! (An owner is one rank, or the neighboring ranks that split the same experts.) The *load* of an
//! expert is the number of its routed tokens over all tokens of a layer.

/// The part of an expert's load that one owner computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub expert: usize,
    /// The expert's home or a helper.
    pub owner: usize,
    /// A positive number of tokens.
    pub routed_tokens: i64,
}

/// A transfer of an expert's weights. The order of the fields is the sort order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transfer {
    /// The home, which lends the expert.
    pub from: usize,
    /// The helper, which computes a share.
    pub to: usize,
    pub expert: usize,
}

/// The shares of a layer's experts. Every rank of the group computes the same assignment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    experts: usize,
    owners: usize,
    /// Sorted by expert; an owner has at most one share of an expert.
    shares: Vec<Share>,
    /// Index of each expert's first share, and the number of shares.
    first: Vec<usize>,
}

/// Returns the owner that holds `expert`.
pub fn home(expert: usize, experts: usize, owners: usize) -> usize {
    expert * owners / experts
}

/// Returns the loads of owners without lending.
pub fn home_loads(loads: &[i64], owners: usize) -> Vec<i64> {
    let mut owner_loads = vec![0; owners];
    for (expert, load) in loads.iter().enumerate() {
        owner_loads[home(expert, loads.len(), owners)] += load;
    }
    owner_loads
}

impl Assignment {
    /// Returns the assignment without lending: every home computes its experts.
    pub fn standard(loads: &[i64], owners: usize) -> Assignment {
        let experts = loads.len();
        let share = |expert: usize| Share {
            expert,
            owner: home(expert, experts, owners),
            routed_tokens: loads[expert],
        };
        Assignment::new(experts, owners, (0..experts).map(share).collect())
    }

    /// Creates an assignment from shares in any order. Shares of one expert and owner are added up,
    /// empty ones are dropped.
    pub fn new(experts: usize, owners: usize, mut shares: Vec<Share>) -> Assignment {
        shares.retain(|share| share.routed_tokens > 0);
        // Stable, so the shares of an expert keep their order.
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

    /// Returns the number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Returns the number of owners.
    pub fn owners(&self) -> usize {
        self.owners
    }

    /// Returns the owner that holds `expert`.
    pub fn home(&self, expert: usize) -> usize {
        home(expert, self.experts, self.owners)
    }

    /// Returns the shares of `expert`.
    pub fn expert_shares(&self, expert: usize) -> &[Share] {
        &self.shares[self.first[expert]..self.first[expert + 1]]
    }

    /// Returns all shares, sorted by expert.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// Returns the number of routed tokens that each owner computes.
    pub fn loads(&self) -> Vec<i64> {
        let mut loads = vec![0; self.owners];
        for share in &self.shares {
            loads[share.owner] += share.routed_tokens;
        }
        loads
    }

    /// Returns the weights that helpers need, each once, sorted by sender and then by receiver.
    pub fn transfers(&self) -> Vec<Transfer> {
        let transfer = |share: &Share| Transfer {
            from: self.home(share.expert),
            to: share.owner,
            expert: share.expert,
        };
        let mut transfers: Vec<Transfer> = self.lent_shares().map(transfer).collect();
        transfers.sort_unstable();
        transfers
    }

    /// Returns the number of routed tokens that helpers compute.
    pub fn lent_tokens(&self) -> i64 {
        self.lent_shares().map(|share| share.routed_tokens).sum()
    }

    fn lent_shares(&self) -> impl Iterator<Item = &Share> {
        self.shares
            .iter()
            .filter(|share| share.owner != self.home(share.expert))
    }
}

/// Routed tokens of an expert that come from, or go to, one location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocatedTokens {
    pub location: Location,
    pub routed_tokens: i64,
}

/// Owner and node of a source rank or a helper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub owner: usize,
    pub node: usize,
}

/// Routed tokens of one source that go to one share. The order of the fields is the sort order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MatchedTokens {
    /// Index of the source.
    pub source: usize,
    /// Index of the share.
    pub share: usize,
    pub routed_tokens: i64,
}

/// Matches an expert's routed tokens by source rank with its shares. The result is sorted by
/// source, then by share.
///
/// A source's routed tokens stay with its own owner if that has a share, else on its node, and else
/// are assigned in order. So few rows move.
pub fn match_sources_to_shares(
    sources: &[LocatedTokens],
    shares: &[LocatedTokens],
) -> Vec<MatchedTokens> {
    let unmatched = |tokens: &[LocatedTokens]| -> Vec<i64> {
        tokens.iter().map(|tokens| tokens.routed_tokens).collect()
    };
    let mut left = unmatched(sources);
    let mut room = unmatched(shares);
    let mut matches: Vec<MatchedTokens> = Vec::new();
    let same_owner: fn(&Location) -> usize = |location| location.owner;
    let same_node: fn(&Location) -> usize = |location| location.node;
    let anywhere: fn(&Location) -> usize = |_| 0;
    for place in [same_owner, same_node, anywhere] {
        let by_place = |tokens: &[LocatedTokens], left: &[i64]| {
            let mut order: Vec<usize> =
                (0..tokens.len()).filter(|&index| left[index] > 0).collect();
            order.sort_by_key(|&index| place(&tokens[index].location));
            order
        };
        let mut source_order = by_place(sources, &left).into_iter().peekable();
        let mut share_order = by_place(shares, &room).into_iter().peekable();
        while let (Some(&source), Some(&share)) = (source_order.peek(), share_order.peek()) {
            let source_place = place(&sources[source].location);
            let share_place = place(&shares[share].location);
            if source_place < share_place {
                source_order.next();
                continue;
            }
            if source_place > share_place {
                share_order.next();
                continue;
            }
            let routed_tokens = left[source].min(room[share]);
            left[source] -= routed_tokens;
            room[share] -= routed_tokens;
            matches.push(MatchedTokens {
                source,
                share,
                routed_tokens,
            });
            if left[source] == 0 {
                source_order.next();
            }
            if room[share] == 0 {
                share_order.next();
            }
        }
    }
    merge_matches(matches)
}

/// Sorts matches, and adds up those of one source and share.
fn merge_matches(mut matches: Vec<MatchedTokens>) -> Vec<MatchedTokens> {
    matches.sort_unstable();
    matches.dedup_by(|next, kept| {
        let is_same = next.source == kept.source && next.share == kept.share;
        if is_same {
            kept.routed_tokens += next.routed_tokens;
        }
        is_same
    });
    matches
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_of_one_owner_are_merged() {
        let share = |expert, owner, routed_tokens| Share {
            expert,
            owner,
            routed_tokens,
        };
        let shares = vec![
            share(2, 0, 3),
            share(0, 0, 5),
            share(2, 1, 1),
            share(2, 0, 4),
            share(3, 1, 0),
        ];
        let assignment = Assignment::new(4, 2, shares);
        assert_eq!(assignment.expert_shares(0), [share(0, 0, 5)]);
        assert_eq!(assignment.expert_shares(1), []);
        assert_eq!(
            assignment.expert_shares(2),
            [share(2, 0, 7), share(2, 1, 1)]
        );
        let transfer = Transfer {
            from: 1,
            to: 0,
            expert: 2,
        };
        assert_eq!(assignment.transfers(), [transfer]);
        assert_eq!(assignment.loads(), [12, 1]);
        assert_eq!(assignment.lent_tokens(), 7);
    }

    /// Cuts the load into shares of some owners.
    fn cut_into_shares(
        total: i64,
        cuts: &[f64],
        ranks: usize,
        location: impl Fn(usize) -> Location,
    ) -> Vec<LocatedTokens> {
        let mut ends: Vec<i64> = cuts
            .iter()
            .take(ranks - 1)
            .map(|cut| (cut * total as f64) as i64)
            .collect();
        ends.push(total);
        ends.sort();
        let mut start = 0;
        let mut shares = Vec::new();
        for (index, end) in ends.into_iter().enumerate() {
            shares.push(LocatedTokens {
                location: location((index * 3 + 1) % ranks),
                routed_tokens: end - start,
            });
            start = end;
        }
        shares
    }

    fn check_matches(sources: &[LocatedTokens], shares: &[LocatedTokens], ranks: usize) {
        let matches = match_sources_to_shares(sources, shares);
        let sum = |includes: &dyn Fn(&MatchedTokens) -> bool| -> i64 {
            let included = matches.iter().filter(|matched| includes(matched));
            included.map(|matched| matched.routed_tokens).sum()
        };
        for (source, tokens) in sources.iter().enumerate() {
            assert_eq!(
                sum(&|matched| matched.source == source),
                tokens.routed_tokens
            );
        }
        for (share, tokens) in shares.iter().enumerate() {
            assert_eq!(sum(&|matched| matched.share == share), tokens.routed_tokens);
        }
        assert!(matches.is_sorted());
        assert!(matches.iter().all(|matched| matched.routed_tokens > 0));
        for owner in 0..ranks {
            let of_owner = |tokens: &[LocatedTokens]| -> i64 {
                let own = tokens.iter().filter(|part| part.location.owner == owner);
                own.map(|part| part.routed_tokens).sum()
            };
            let staying = sum(&|matched| {
                sources[matched.source].location.owner == owner
                    && shares[matched.share].location.owner == owner
            });
            assert_eq!(staying, of_owner(sources).min(of_owner(shares)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn all_routed_tokens_are_matched_and_stay_with_their_owner_if_possible(
            ranks in 1usize..9,
            slices in 1usize..3,
            per_node in 1usize..4,
            loads in prop::collection::vec(0i64..50, 16),
            cuts in prop::collection::vec(0.0f64..1.0, 0..8),
        ) {
            let location = |owner: usize| Location {
                owner,
                node: owner / per_node,
            };
            let sources: Vec<LocatedTokens> = (0..ranks * slices)
                .map(|rank| LocatedTokens {
                    location: location(rank / slices),
                    routed_tokens: loads[rank % 16],
                })
                .collect();
            let total = sources
                .iter()
                .map(|source| source.routed_tokens)
                .sum();
            let shares = cut_into_shares(total, &cuts, ranks, location);
            check_matches(&sources, &shares, ranks);
        }
    }
}
