//! Makes one snapshot whole again: keepers verify their parts, repair or rebuild what is missing,
//! and learn where each part is.

use super::{
    Engine,
    command::KeeperRequest,
    event::{Answer, Failed},
    keepers::KeeperId,
    requests::Purpose,
};
use checkpoint::keeper::{
    SnapshotId,
    recover::{Candidate, Rebuild},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

/// Requests to rebuild, by the keeper that does it.
type Rebuilds = BTreeMap<KeeperId, Vec<Rebuild>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Verifying,
    Repairing,
    Rebuilding,
    Selecting,
}

/// Damaged chunks of one rank's part.
#[derive(Debug)]
struct Damage {
    keeper: KeeperId,
    rank: usize,
    chunks: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Reassembly {
    candidate: Candidate,
    /// Keepers that answered. A [`Candidate`] counts keepers by position in this list.
    keepers: Vec<KeeperId>,
    step: Step,
    damage: Vec<Damage>,
    /// Keeper of each rank's part, once it is whole.
    holders: Vec<KeeperId>,
    rebuilding: BTreeSet<KeeperId>,
    rebuilt: Vec<usize>,
}

/// A snapshot that is whole again.
#[derive(Debug)]
pub(super) struct Reassembled {
    pub(super) id: SnapshotId,
    /// Keeper of each rank's part.
    pub(super) holders: Vec<KeeperId>,
    /// The work that it took.
    pub(super) how: String,
}

pub(super) enum Progress<P, T> {
    Waiting(P),
    Done(T),
}

impl Reassembly {
    pub(super) fn begin(
        engine: &mut Engine,
        candidate: Candidate,
        keepers: Vec<KeeperId>,
    ) -> Reassembly {
        let reassembly = Reassembly {
            candidate,
            keepers,
            step: Step::Verifying,
            damage: Vec::new(),
            holders: Vec::new(),
            rebuilding: BTreeSet::new(),
            rebuilt: Vec::new(),
        };
        let id = reassembly.id();
        let holders = reassembly.candidate.holders.iter().flatten();
        let holders: BTreeSet<usize> = holders.copied().collect();
        for holder in holders {
            let keeper = reassembly.keepers[holder];
            engine.ask(keeper, Purpose::Verify(keeper), KeeperRequest::Verify(id));
        }
        reassembly
    }

    fn id(&self) -> SnapshotId {
        self.candidate.snapshot.id
    }

    /// Takes replies, then the next step. The error is the reason why the snapshot is of no use.
    pub(super) fn advance(
        mut self,
        engine: &mut Engine,
    ) -> Progress<Reassembly, Result<Reassembled, String>> {
        loop {
            let replies = engine.take_replies(is_step_of_reassembly);
            for (purpose, reply) in replies {
                if let Err(reason) = self.take_reply(engine, purpose, reply) {
                    engine.requests.forget(is_step_of_reassembly);
                    return Progress::Done(Err(reason));
                }
            }
            if engine.requests.any(is_step_of_reassembly) {
                return Progress::Waiting(self);
            }
            match self.step {
                Step::Verifying => self.repair(engine),
                Step::Repairing => self.rebuild(engine),
                Step::Rebuilding => self.select(engine),
                Step::Selecting => return Progress::Done(Ok(self.finish(engine))),
            }
        }
    }

    fn take_reply(
        &mut self,
        engine: &Engine,
        purpose: Purpose,
        reply: Result<Answer, Failed>,
    ) -> Result<(), String> {
        match (purpose, reply) {
            (Purpose::Verify(keeper), Ok(Answer::Damaged(chunks))) => {
                self.note_damage(keeper, chunks);
                Ok(())
            }
            // Ranks can also be told later: a keeper that is lost now is noticed.
            (Purpose::Select(_), _) | (_, Ok(_)) => Ok(()),
            (Purpose::Rebuild(keeper), Err(failed)) if self.step == Step::Repairing => {
                let chunks: usize = self.damage.iter().map(|damage| damage.chunks.len()).sum();
                let keeper = engine.name_of(keeper);
                Err(format!(
                    "{chunks} chunks are damaged and cannot be repaired: {keeper}: {}",
                    failed.reason()
                ))
            }
            (Purpose::Verify(keeper) | Purpose::Rebuild(keeper), Err(failed)) => {
                Err(format!("{}: {}", engine.name_of(keeper), failed.reason()))
            }
            (_, Err(failed)) => Err(failed.reason().to_string()),
        }
    }

    fn note_damage(&mut self, keeper: KeeperId, chunks: Vec<(usize, u64)>) {
        let mut damaged: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for (rank, chunk) in chunks {
            let holder = self.candidate.holders.get(rank).copied().flatten();
            if holder.is_some_and(|holder| self.keepers[holder] == keeper) {
                damaged.entry(rank).or_default().push(chunk);
            }
        }
        for (rank, chunks) in damaged {
            self.damage.push(Damage {
                keeper,
                rank,
                chunks,
            });
        }
    }

    fn repair(&mut self, engine: &mut Engine) {
        self.step = Step::Repairing;
        let mut repairs = Rebuilds::new();
        for damage in &self.damage {
            let chunks = Some(damage.chunks.clone());
            let rebuild = self.request(engine, damage.rank, chunks);
            repairs.entry(damage.keeper).or_default().push(rebuild);
        }
        ask_to_rebuild(engine, repairs);
    }

    fn rebuild(&mut self, engine: &mut Engine) {
        self.step = Step::Rebuilding;
        self.holders = self.choose_holders(engine);
        let mut missing = Rebuilds::new();
        for (rank, holder) in self.candidate.holders.iter().enumerate() {
            if holder.is_none() {
                let rebuild = self.request(engine, rank, None);
                missing.entry(self.holders[rank]).or_default().push(rebuild);
                self.rebuilt.push(rank);
            }
        }
        self.rebuilding = missing.keys().copied().collect();
        ask_to_rebuild(engine, missing);
    }

    fn select(&mut self, engine: &mut Engine) {
        self.step = Step::Selecting;
        let holders = self
            .holders
            .iter()
            .map(|&keeper| engine.keepers.address(keeper));
        let holders: Vec<SocketAddr> = holders.collect();
        for keeper in engine.keepers.ready() {
            let request = KeeperRequest::SelectRestore {
                snapshot: Some(self.candidate.snapshot.clone()),
                holders: holders.clone(),
            };
            engine.ask(keeper, Purpose::Select(keeper), request);
        }
    }

    fn finish(self, engine: &mut Engine) -> Reassembled {
        self.restore_parity(engine);
        let mut how = vec!["in memory".to_string()];
        let repaired: usize = self.damage.iter().map(|damage| damage.chunks.len()).sum();
        if repaired > 0 {
            how.push(format!("{repaired} damaged chunks repaired from parity"));
        }
        if !self.rebuilt.is_empty() {
            let ranks: Vec<String> = self.rebuilt.iter().map(usize::to_string).collect();
            let ranks = ranks.join(", ");
            let redundancy = &self.candidate.snapshot.topology.redundancy;
            how.push(format!("parts of ranks {ranks} rebuilt from {redundancy}"));
        }
        Reassembled {
            id: self.id(),
            how: how.join("; "),
            holders: self.holders,
        }
    }

    /// Returns the keeper that has each rank's part, or is to have it.
    ///
    /// A missing part goes to the keeper that took the lost node's place, else to any.
    fn choose_holders(&self, engine: &Engine) -> Vec<KeeperId> {
        let topology = &self.candidate.snapshot.topology;
        let keeper_of = |(rank, holder): (usize, &Option<usize>)| match holder {
            Some(holder) => self.keepers[*holder],
            None => {
                let node = topology.node_of(rank).unwrap_or(0);
                let seats = &engine.keepers.seats;
                let seated = seats.get(node).and_then(|seat| seat.keeper);
                let seated = seated.filter(|keeper| self.keepers.contains(keeper));
                seated.unwrap_or(self.keepers[rank % self.keepers.len()])
            }
        };
        let holders = self.candidate.holders.iter().enumerate();
        holders.map(keeper_of).collect()
    }

    fn request(&self, engine: &Engine, rank: usize, chunks: Option<Vec<u64>>) -> Rebuild {
        Rebuild {
            snapshot: self.candidate.snapshot.clone(),
            rank,
            chunks,
            sources: self.sources(engine, rank),
        }
    }

    fn sources(&self, engine: &Engine, rank: usize) -> Vec<Option<SocketAddr>> {
        let answering = self
            .keepers
            .iter()
            .map(|&keeper| engine.keepers.address(keeper));
        let answering: Vec<SocketAddr> = answering.collect();
        self.candidate.sources(rank, &answering)
    }

    /// Rebuilds the parity of nodes that replaced lost ones, while ranks start.
    ///
    /// Until it is done, another loss may be one too many.
    fn restore_parity(&self, engine: &mut Engine) {
        let topology = &self.candidate.snapshot.topology;
        for node in self.candidate.lost_nodes() {
            let seat = engine.keepers.seats.get(node);
            let keeper = seat.and_then(|seat| seat.keeper);
            let Some(keeper) = keeper.filter(|keeper| self.rebuilding.contains(keeper)) else {
                continue;
            };
            let Some(&rank) = topology.nodes[node].ranks.first() else {
                continue;
            };
            let mut sources = self.sources(engine, rank);
            let mut groups = topology.groups.iter();
            let position = groups.find_map(|group| group.iter().position(|&other| other == node));
            if let Some(position) = position {
                sources[position] = Some(engine.keepers.address(keeper));
            }
            let request = KeeperRequest::Protect {
                snapshot: self.candidate.snapshot.clone(),
                node,
                sources,
            };
            engine.ask(keeper, Purpose::Notify(keeper), request);
        }
    }
}

fn is_step_of_reassembly(purpose: Purpose) -> bool {
    matches!(
        purpose,
        Purpose::Verify(_) | Purpose::Rebuild(_) | Purpose::Select(_)
    )
}

fn ask_to_rebuild(engine: &mut Engine, rebuilds: Rebuilds) {
    for (keeper, rebuilds) in rebuilds {
        let request = KeeperRequest::Rebuild(rebuilds);
        engine.ask(keeper, Purpose::Rebuild(keeper), request);
    }
}
