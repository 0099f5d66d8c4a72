//! Tests of the keeper's decisions: single situations, and invariants over random sequences.

use super::{
    Decision, Effect, End, Grant, Life, Lifetime, PartRead, RankDecision, RankJob, RankSession,
    ReadStep, State, StripeId,
};
use crate::{
    keeper::{
        ChecksumDigest, Event, Identity, Node, PartInfo, Snapshot, SnapshotContents, SnapshotId,
        Topology,
        checksums::Checksums,
        protocol::{RankReply, RankRequest, Reply, Request},
        recover::Rebuild,
    },
    secure::Error,
    stripes::Redundancy,
};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

const ORPHAN_TIMEOUT: Duration = Duration::from_secs(3600);
const STRIPE: StripeId = StripeId {
    local: 0,
    stripe: 0,
};

/// Two nodes with one rank each, which hold copies of each other's parts.
fn topology(generation: u64) -> Topology {
    let node = |rank: usize| Node {
        address: SocketAddr::from(([127, 0, 0, 1], rank as u16)),
        ranks: vec![rank],
    };
    Topology {
        generation,
        nodes: vec![node(0), node(1)],
        redundancy: Redundancy::Copies(1),
        groups: vec![vec![0, 1]],
        chunk_bytes: 8,
    }
}

fn id(generation: u64, step: u64) -> SnapshotId {
    SnapshotId { generation, step }
}

fn snapshot(id: SnapshotId) -> Snapshot {
    let part = |rank: usize| PartInfo {
        rank,
        bytes: 8,
        digest: ChecksumDigest::of(&[rank as u32]),
    };
    Snapshot::from(SnapshotContents {
        id,
        topology: topology(id.generation).into(),
        parts: vec![part(0), part(1)],
    })
}

/// The only session of a process.
fn session(rank: usize, pid: i32) -> RankSession {
    RankSession {
        rank,
        pid,
        number: 1,
    }
}

/// A keeper's state at a time that the test sets.
struct Keeper {
    state: State,
    now: Instant,
}

impl Keeper {
    fn empty(limit: Option<u64>) -> Keeper {
        let now = Instant::now();
        let lifetime = Lifetime::new(ORPHAN_TIMEOUT, now);
        Keeper {
            state: State::new(Identity::default(), limit, lifetime),
            now,
        }
    }

    /// Node 0 in generation 1, whose rank has three slots.
    fn new() -> Keeper {
        let mut keeper = Keeper::empty(None);
        keeper.set_up(topology(1));
        keeper.state.add_slots(0, &[8, 8, 8]);
        keeper
    }

    fn ask(&mut self, request: Request) -> Result<Decision, Error> {
        self.state.decide(request, self.now)
    }

    /// Sends a request that must succeed.
    fn command(&mut self, request: Request) {
        match self.ask(request) {
            Ok(Decision::Reply(Reply::Done)) => {}
            other => panic!("{other:?}"),
        }
    }

    fn rank(&mut self, request: RankRequest) -> Result<RankDecision, Error> {
        self.rank_in(session(0, 100), request)
    }

    fn rank_in(
        &mut self,
        session: RankSession,
        request: RankRequest,
    ) -> Result<RankDecision, Error> {
        self.state.decide_for_rank(session, request, self.now)
    }

    fn set_up(&mut self, topology: Topology) {
        self.command(Request::Setup { topology, node: 0 });
    }

    fn reserve(&mut self, id: SnapshotId, bytes: u64) -> Option<usize> {
        let durable = true;
        match self.rank(RankRequest::Reserve { id, bytes, durable }) {
            Ok(RankDecision::Reply(RankReply::Slot(slot))) => slot,
            other => panic!("{other:?}"),
        }
    }

    fn fill(&mut self, slot: usize, filled_to: u64, crcs: Vec<u32>) -> Result<(), Error> {
        let request = RankRequest::Filled {
            slot,
            filled_to,
            crcs,
        };
        self.rank(request).map(drop)
    }

    fn put_parity(&mut self, id: SnapshotId) -> Result<(), Error> {
        let request = Request::PutParity {
            id,
            local: 0,
            stripe: 0,
            bytes: vec![1; 8],
        };
        self.ask(request).map(drop)
    }

    /// Takes and commits a snapshot, with parity from the other node.
    fn take(&mut self, id: SnapshotId) {
        let slot = self.reserve(id, 8).unwrap();
        self.fill(slot, 8, vec![0]).unwrap();
        self.put_parity(id).unwrap();
        self.command(Request::Commit(snapshot(id)));
    }

    fn complete_steps(&self) -> Vec<u64> {
        let complete = self.state.inventory().complete;
        complete.iter().map(|snapshot| snapshot.id.step).collect()
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for effect in self.state.take_effects() {
            if let Effect::Send(event) = effect {
                events.push(event);
            }
        }
        events
    }

    fn tick(&mut self, launchers: usize) -> Life {
        self.state.tick(launchers, self.now)
    }

    fn is_here(&self, id: SnapshotId, rank: usize) -> bool {
        self.state.find_part(id, rank).is_some()
    }
}

fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_newest_snapshots_and_their_parity_are_kept() {
    let mut keeper = Keeper::new();
    for step in 1..6 {
        keeper.take(id(1, step));
    }
    assert_eq!(keeper.complete_steps(), [3, 4, 5]);
    let with_parity: Vec<u64> = (1..6)
        .filter(|&step| keeper.state.intact_parity(id(1, step), STRIPE).is_ok())
        .collect();
    assert_eq!(with_parity, [4, 5]);
    assert_eq!(keeper.state.parity.bytes(), 16);
    assert_eq!(keeper.state.slot_bytes(), 24);
}

#[test]
fn a_completed_part_is_reported_and_encoded_once() {
    let mut keeper = Keeper::new();
    let slot = keeper.reserve(id(1, 1), 8).unwrap();
    keeper.fill(slot, 4, vec![]).unwrap();
    let effects = keeper.state.take_effects();
    assert!(effects.contains(&Effect::Encode(id(1, 1))) && effects.contains(&Effect::Wake));
    keeper.fill(slot, 8, vec![7]).unwrap();
    let expected = Event::Complete {
        id: id(1, 1),
        part: PartInfo {
            rank: 0,
            bytes: 8,
            digest: ChecksumDigest::of(&[7]),
        },
        durable: true,
    };
    let effects = keeper.state.take_effects();
    assert_eq!(effects, [Effect::Send(expected), Effect::Wake]);
}

#[test]
fn checksums_stay_as_long_as_the_part_or_the_parity() {
    let mut keeper = Keeper::new();
    let request = |step, rank, waits| Request::Checksums {
        id: id(1, step),
        rank,
        waits,
    };
    let list = |keeper: &mut Keeper, step, rank| match keeper.ask(request(step, rank, false)) {
        Ok(Decision::Reply(Reply::Checksums(crcs))) => Some(crcs),
        _ => None,
    };
    keeper.take(id(1, 1));
    assert_eq!(list(&mut keeper, 1, 0), Some(vec![0]));
    let missing = keeper.ask(request(1, 1, false));
    let expected = "the checksums of rank 1's part of step 1 are not here";
    assert_eq!(message(missing), expected);
    let of_other = Checksums::new(vec![1]);
    keeper.state.put_checksums(id(1, 1), 1, of_other.clone());
    assert_eq!(list(&mut keeper, 1, 1), Some(vec![1]));
    keeper.take(id(1, 2));
    assert_eq!(list(&mut keeper, 1, 1), Some(vec![1]));
    keeper.take(id(1, 3));
    assert_eq!(list(&mut keeper, 1, 1), None);
    // A part that is being filled has checksums for those that wait.
    let slot = keeper.reserve(id(1, 4), 8).unwrap();
    assert_eq!(list(&mut keeper, 4, 0), None);
    let waiting = keeper.ask(request(4, 0, true));
    assert!(matches!(waiting, Ok(Decision::Job(_))), "{waiting:?}");
    keeper.fill(slot, 8, vec![4]).unwrap();
    assert_eq!(list(&mut keeper, 4, 0), Some(vec![4]));
    keeper.command(Request::Abandon(id(1, 4)));
    keeper.state.put_checksums(id(1, 4), 1, of_other);
    assert_eq!(list(&mut keeper, 4, 1), None);
}

#[test]
fn parts_too_large_for_the_slots_are_skipped() {
    let mut keeper = Keeper::new();
    assert_eq!(keeper.reserve(id(1, 1), 9), None);
    assert_eq!(keeper.state.status(keeper.now).skipped, 1);
    assert_eq!(keeper.reserve(id(1, 1), 8), Some(0));
}

#[test]
fn a_rank_that_leaves_ends_the_wait_for_its_part() {
    let mut keeper = Keeper::new();
    keeper.state.connect_rank(session(0, 100), keeper.now);
    keeper.take(id(1, 1));
    let slot = keeper.reserve(id(1, 2), 8).unwrap();
    keeper.fill(slot, 4, vec![]).unwrap();
    keeper.events();
    keeper.state.disconnect_rank(session(0, 100));
    let left = Event::Unprotected {
        id: id(1, 2),
        reason: "rank 0 left its part unfinished".into(),
    };
    assert_eq!(keeper.events(), [left]);
    assert!(keeper.is_here(id(1, 1), 0));
}

#[test]
fn what_is_left_of_an_earlier_session_changes_nothing() {
    let mut keeper = Keeper::new();
    let [earlier, later] = [1, 2].map(|number| RankSession {
        number,
        ..session(0, 100)
    });
    keeper.state.connect_rank(earlier, keeper.now);
    keeper.state.connect_rank(earlier, keeper.now);
    keeper.reserve(id(1, 1), 8).unwrap();
    keeper.events();
    // A rank that needs larger slots connects again. What it had reserved is dropped once.
    keeper.state.connect_rank(later, keeper.now);
    let left = Event::Unprotected {
        id: id(1, 1),
        reason: "rank 0 left its part unfinished".into(),
    };
    assert_eq!(keeper.events(), [left]);
    let reserve = RankRequest::Reserve {
        id: id(1, 2),
        bytes: 8,
        durable: false,
    };
    let reserved = keeper.rank_in(later, reserve.clone());
    let Ok(RankDecision::Reply(RankReply::Slot(Some(slot)))) = reserved else {
        panic!("{reserved:?}");
    };
    // The last messages of the earlier session arrive, then its connections close.
    let release = RankRequest::Release { slot };
    let fill = RankRequest::Filled {
        slot,
        filled_to: 8,
        crcs: vec![7],
    };
    for request in [release, fill.clone()] {
        let decision = keeper.rank_in(earlier, request);
        assert!(matches!(decision, Ok(RankDecision::Silent)), "{decision:?}");
    }
    let refused = message(keeper.rank_in(earlier, reserve).map(drop));
    assert_eq!(refused, "the rank has connected again");
    keeper.state.disconnect_rank(earlier);
    keeper.state.disconnect_rank(earlier);
    assert!(keeper.events().is_empty());
    let is_complete = |keeper: &mut Keeper, step| {
        let request = RankRequest::IsComplete { id: id(1, step) };
        match keeper.rank_in(later, request) {
            Ok(RankDecision::Reply(RankReply::Complete(is_complete))) => is_complete,
            other => panic!("{other:?}"),
        }
    };
    assert!(!is_complete(&mut keeper, 2));
    assert!(keeper.rank_in(later, fill).is_ok());
    assert!(is_complete(&mut keeper, 2) && !is_complete(&mut keeper, 1));
    // The rank leaves nothing half-written.
    keeper.events();
    keeper.state.disconnect_rank(later);
    assert!(keeper.events().is_empty() && keeper.is_here(id(1, 2), 0));
}

#[test]
fn an_abandoned_snapshot_arrives_no_more() {
    let mut keeper = Keeper::new();
    assert!(keeper.state.may_arrive(id(1, 1)));
    keeper.reserve(id(1, 1), 8).unwrap();
    keeper.put_parity(id(1, 1)).unwrap();
    keeper.command(Request::Abandon(id(1, 1)));
    assert!(!keeper.state.may_arrive(id(1, 1)) && keeper.state.may_arrive(id(1, 2)));
    assert!(!keeper.is_here(id(1, 1), 0));
    let refused = message(keeper.put_parity(id(1, 1)));
    assert_eq!(refused, "the snapshot of step 1 was abandoned");
    assert!(keeper.state.intact_parity(id(1, 1), STRIPE).is_err());
    // One that was committed is not lost by a late request.
    keeper.take(id(1, 2));
    keeper.command(Request::Abandon(id(1, 2)));
    assert!(keeper.is_here(id(1, 2), 0));
}

#[test]
fn a_new_generation_takes_slots_from_ranks_that_left() {
    let mut keeper = Keeper::new();
    keeper.take(id(1, 1));
    let mut moved = topology(2);
    moved.nodes[0].ranks = vec![1];
    moved.nodes[1].ranks = vec![0];
    keeper.set_up(moved);
    // The part is still read, and the empty slots are freed.
    assert_eq!(keeper.reserve(id(2, 2), 8), None);
    assert!(keeper.is_here(id(1, 1), 0));
    assert_eq!(keeper.state.slot_bytes(), 8);
    assert!(!keeper.state.may_arrive(id(1, 2)));
    // Generation 1 is needed for its complete snapshot.
    let generations: Vec<u64> = keeper.state.memberships.keys().copied().collect();
    assert_eq!(generations, [1, 2]);
    assert_eq!(keeper.state.chunk_bytes(id(1, 1)).unwrap(), 8);
    assert!(keeper.state.chunk_bytes(id(7, 1)).is_err());
}

#[test]
fn restoring_forgets_newer_snapshots_until_one_is_committed() {
    let mut keeper = Keeper::new();
    for step in 1..4 {
        keeper.take(id(1, step));
    }
    keeper.command(Request::Pin(id(1, 3)));
    let holders = vec![SocketAddr::from(([127, 0, 0, 1], 0)); 2];
    let select = |snapshot: Option<Snapshot>| Request::SelectRestore {
        snapshot,
        holders: holders.clone(),
    };
    keeper.command(select(Some(snapshot(id(1, 2)))));
    assert_eq!(keeper.complete_steps(), [1, 2]);
    assert_eq!(keeper.state.newest(), Some(id(1, 2)));
    let source = keeper.state.restore_source(1).unwrap();
    assert!(source.holder == holders[1] && !source.is_here);
    assert!(keeper.state.restore_source(2).is_err());
    // The part of another rank is fetched, and dropped with the next snapshot.
    let fetched = snapshot(id(1, 2)).parts[1];
    let checksums = Checksums::new(vec![1]);
    keeper.state.insert_part(id(1, 2), fetched, checksums, 8);
    assert!(keeper.is_here(id(1, 2), 1));
    keeper.take(id(1, 4));
    assert!(keeper.state.restore_source(1).is_err());
    assert!(!keeper.is_here(id(1, 2), 1));
    assert_eq!(keeper.state.slot_bytes(), 24);
    keeper.command(select(None));
    assert!(keeper.complete_steps().is_empty());
}

#[test]
fn slots_of_the_right_size_are_used_again() {
    let mut keeper = Keeper::new();
    let missing = |keeper: &mut Keeper, bytes, slots| match keeper
        .rank(RankRequest::Allocate { bytes, slots })
    {
        Ok(RankDecision::Job(RankJob::Allocate { missing, .. })) => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(&mut keeper, 8, 2), 0);
    assert_eq!(keeper.state.slots_of(0).len(), 2);
    assert_eq!(missing(&mut keeper, 9, 2), 2);
    assert!(keeper.state.slots_of(0).is_empty());
    assert_eq!(keeper.state.slot_bytes(), 0);
    let freed = keeper.state.take_effects();
    let freed = freed
        .iter()
        .filter(|effect| matches!(effect, Effect::Free(_)));
    assert_eq!(freed.count(), 3);
    let many = RankRequest::Allocate {
        bytes: 0,
        slots: usize::MAX,
    };
    assert!(keeper.rank(many).is_err());
}

#[test]
fn grants_stay_within_the_limit() {
    let mut keeper = Keeper::empty(Some(100));
    let mut first = keeper.state.grant(30, 2, None).unwrap();
    // Two ranks that allocate at once do not get the same memory.
    let refused = message(keeper.state.grant(30, 2, None));
    let expected = "no memory for 2 slots of 0.0 MiB: snapshot.memory_gib leaves 0.0 MiB";
    assert_eq!(refused, expected);
    keeper.state.record_allocation(&mut first);
    keeper.state.return_grant(&first);
    assert!(keeper.state.grant(50, 2, None).is_ok());
    assert!(keeper.state.grant(1, 1, None).is_err());
    assert!(keeper.state.grant(u64::MAX, 16, None).is_err());
}

#[test]
fn half_of_the_free_memory_is_granted() {
    let mut keeper = Keeper::empty(None);
    let grant = |keeper: &mut Keeper, available| keeper.state.grant(30, 1, Some(available));
    assert!(grant(&mut keeper, 59).is_err());
    let mut first = grant(&mut keeper, 100).unwrap();
    // The machine's free memory does not show the first grant yet.
    assert!(grant(&mut keeper, 100).is_err());
    keeper.state.record_allocation(&mut first);
    assert!(grant(&mut keeper, 70).is_ok());
    assert!(keeper.state.grant(u64::MAX, 16, None).is_err());
}

#[test]
fn parity_counts_towards_the_limit() {
    let mut keeper = Keeper::empty(Some(24));
    keeper.set_up(topology(1));
    keeper.state.add_slots(0, &[8, 8]);
    keeper.put_parity(id(1, 1)).unwrap();
    let refused = message(keeper.put_parity(id(1, 2)));
    let expected = "no memory for 0.0 MiB of parity: the limit leaves 0.0 MiB";
    assert_eq!(refused, expected);
}

#[test]
fn checksums_have_to_fit_the_bytes() {
    let mut keeper = Keeper::new();
    let slot = keeper.reserve(id(1, 1), 8).unwrap();
    assert!(keeper.fill(slot, 4, vec![1, 2]).is_err());
    assert!(keeper.fill(slot, 8, vec![]).is_err());
    assert!(keeper.fill(slot, 8, vec![1]).is_ok());
    assert_eq!(message(keeper.fill(9, 8, vec![])), "there is no slot 9");
}

#[test]
fn requests_that_contradict_themselves_are_refused() {
    let mut keeper = Keeper::new();
    let mut refuse = |request: Request, reason: &str| {
        assert_eq!(
            message(keeper.ask(request)),
            format!("invalid request: {reason}")
        );
    };
    let set_up = |change: &dyn Fn(&mut Topology), node: usize| {
        let mut topology = topology(2);
        change(&mut topology);
        Request::Setup { topology, node }
    };
    refuse(set_up(&|t| t.chunk_bytes = 0, 0), "chunks of 0 bytes");
    refuse(set_up(&|_| {}, 2), "node 2 of 2");
    let twice = "a rank is missing or on two nodes";
    refuse(set_up(&|t| t.nodes[1].ranks = vec![0], 0), twice);
    refuse(set_up(&|t| t.nodes[1].ranks = vec![7], 0), twice);
    let unknown = "node 5 of a group is unknown or in two groups";
    refuse(set_up(&|t| t.groups[0] = vec![0, 5], 0), unknown);
    let alone = "a copy on another node in a group of 1 nodes";
    refuse(set_up(&|t| t.groups = vec![vec![0], vec![1]], 0), alone);
    let mut wrong = snapshot(id(1, 1));
    wrong.make_mut().parts[1].rank = 0;
    refuse(Request::Commit(wrong), "a part of rank 0 instead of 1");
    let mut wrong = snapshot(id(1, 1));
    wrong.make_mut().parts.pop();
    refuse(Request::Commit(wrong), "1 parts of 2 ranks");
    let rebuild = |rank, chunks, sources| {
        Request::Rebuild(Box::new(Rebuild {
            snapshot: snapshot(id(1, 1)),
            rank,
            chunks: Some(chunks),
            sources: vec![None; sources],
        }))
    };
    refuse(rebuild(4, vec![0], 2), "there is no rank 4");
    refuse(rebuild(0, vec![1], 2), "chunk 1 of 1");
    refuse(rebuild(0, vec![0], 1), "1 sources for 2 positions");
}

#[test]
fn a_wait_for_a_part_ends_with_it_or_with_the_reason() {
    let mut keeper = Keeper::new();
    let read = PartRead {
        id: id(1, 1),
        rank: 0,
        filled_to: 8,
        deadline: keeper.now + Duration::from_secs(30),
    };
    let poll = |keeper: &mut Keeper| keeper.state.poll_read(&read, keeper.now);
    assert_eq!(poll(&mut keeper).unwrap(), ReadStep::Wait);
    let slot = keeper.reserve(id(1, 1), 8).unwrap();
    keeper.fill(slot, 4, vec![]).unwrap();
    assert_eq!(poll(&mut keeper).unwrap(), ReadStep::Wait);
    keeper.now += Duration::from_secs(30);
    let late = message(poll(&mut keeper));
    assert_eq!(late, "rank 0's part of step 1 was not filled in time");
    keeper.fill(slot, 8, vec![1]).unwrap();
    let ready = poll(&mut keeper).unwrap();
    assert!(matches!(ready, ReadStep::Ready { slot: 0, .. }));
    // The slot is pinned until the read ends.
    keeper.command(Request::Abandon(id(1, 1)));
    let lost = message(poll(&mut keeper));
    assert_eq!(lost, "rank 0's part of step 1 is not here");
    assert_eq!(keeper.reserve(id(1, 2), 8), Some(1));
    keeper.state.end_read(0);
    assert_eq!(keeper.reserve(id(1, 3), 8), Some(0));
}

#[test]
fn heartbeats_are_sent_at_intervals() {
    let mut keeper = Keeper::new();
    keeper.state.connect_rank(session(0, 77), keeper.now);
    keeper.events();
    let Life::Until(time) = keeper.tick(1) else {
        panic!("it ended");
    };
    assert!(keeper.events().is_empty());
    keeper.now = time;
    keeper.tick(1);
    let events = keeper.events();
    assert!(matches!(&events[..], [Event::Heartbeat { ranks }] if ranks[0].pid == 77));
}

#[test]
fn a_keeper_without_a_launcher_ends_after_the_timeout() {
    let mut keeper = Keeper::new();
    keeper.now += ORPHAN_TIMEOUT;
    assert!(matches!(keeper.tick(1), Life::Until(_)));
    keeper.now += ORPHAN_TIMEOUT;
    assert!(matches!(keeper.tick(0), Life::Until(_)));
    keeper.now += Duration::from_secs(1);
    assert_eq!(keeper.tick(0), Life::Ends(End::Orphaned));
    keeper.command(Request::Stop);
    assert_eq!(keeper.tick(1), Life::Ends(End::Requested));
}

#[test]
fn a_signal_ends_a_keeper_only_without_a_launcher_and_work() {
    let mut keeper = Keeper::new();
    keeper.state.signal(15, keeper.now);
    let request = Event::StopRequested { signal: 15 };
    assert!(keeper.events().contains(&request));
    assert_eq!(keeper.state.missed_events(), [request]);
    keeper.now += Duration::from_secs(100);
    assert!(matches!(keeper.tick(1), Life::Until(_)));
    // The launcher is gone, but a checkpoint is being written.
    let persist = Request::Persist {
        id: id(1, 1),
        ranks: vec![0],
        folder: "x".into(),
    };
    assert!(matches!(keeper.ask(persist), Ok(Decision::Job(_))));
    keeper.now += Duration::from_secs(100);
    assert!(matches!(keeper.tick(0), Life::Until(_)));
    keeper.state.finish_job(keeper.now);
    keeper.now += Duration::from_secs(19);
    assert!(matches!(keeper.tick(0), Life::Until(_)));
    keeper.now += Duration::from_secs(1);
    assert_eq!(keeper.tick(0), Life::Ends(End::Signalled(15)));
    // A signal long after the launcher left still gives 20 s.
    let mut keeper = Keeper::new();
    keeper.now += Duration::from_secs(1000);
    keeper.state.signal(15, keeper.now);
    assert!(matches!(keeper.tick(0), Life::Until(_)));
    // A request for a checkpoint is no request to end.
    let mut keeper = Keeper::new();
    keeper.state.signal(10, keeper.now);
    assert!(
        keeper
            .events()
            .contains(&Event::StopRequested { signal: 10 })
    );
    keeper.now += Duration::from_secs(1000);
    assert!(matches!(keeper.tick(0), Life::Until(_)));
}

#[test]
fn a_signal_concerns_the_launcher_of_its_time() {
    let mut keeper = Keeper::new();
    let missed = |keeper: &mut Keeper, launcher| {
        let decision = keeper.ask(Request::Subscribe { launcher });
        assert!(matches!(decision, Ok(Decision::Subscribe)));
        keeper.state.missed_events()
    };
    assert_eq!(missed(&mut keeper, 7), []);
    keeper.state.signal(15, keeper.now);
    // It connects again, and may have missed the signal.
    let request = Event::StopRequested { signal: 15 };
    assert_eq!(missed(&mut keeper, 7), [request]);
    assert_eq!(missed(&mut keeper, 8), []);
    // The keeper stays for an hour after the launcher that has taken it over.
    keeper.now += Duration::from_secs(100);
    assert!(matches!(keeper.tick(0), Life::Until(_)));
}

#[test]
fn the_first_launcher_learns_of_an_earlier_signal() {
    let mut keeper = Keeper::new();
    keeper.state.signal(15, keeper.now);
    assert!(keeper.ask(Request::Subscribe { launcher: 7 }).is_ok());
    let request = Event::StopRequested { signal: 15 };
    assert_eq!(keeper.state.missed_events(), [request]);
}

/// Something that happens to a keeper.
#[derive(Debug, Clone)]
enum Action {
    Reserve(usize),
    Fill(usize),
    Release(usize),
    Commit,
    Abandon,
    Pin,
    Unpin,
    Select(bool),
    SetUp,
    Parity(u64),
    Fetch(usize),
    Read(usize),
    EndRead,
    Allocate { rank: usize, slots: usize },
    FinishAllocation,
    Connect(usize),
    Die(usize),
    Signal,
    Wait(u64),
}

fn action() -> impl Strategy<Value = Action> {
    let rank = || 0usize..2;
    prop_oneof![
        6 => rank().prop_map(Action::Reserve),
        9 => rank().prop_map(Action::Fill),
        1 => rank().prop_map(Action::Release),
        4 => Just(Action::Commit),
        1 => Just(Action::Abandon),
        2 => Just(Action::Pin),
        1 => Just(Action::Unpin),
        1 => any::<bool>().prop_map(Action::Select),
        1 => Just(Action::SetUp),
        3 => (0u64..3).prop_map(Action::Parity),
        1 => (2usize..4).prop_map(Action::Fetch),
        3 => (0usize..4).prop_map(Action::Read),
        2 => Just(Action::EndRead),
        2 => (rank(), 1usize..7).prop_map(|(rank, slots)| Action::Allocate { rank, slots }),
        2 => Just(Action::FinishAllocation),
        1 => rank().prop_map(Action::Connect),
        1 => rank().prop_map(Action::Die),
        1 => Just(Action::Signal),
        2 => (1u64..40).prop_map(Action::Wait),
    ]
}

const PART: u64 = 16;
const LIMIT: u64 = 8 * PART;

/// A keeper of two ranks, of four in the run, and a launcher that acts at random.
struct World {
    keeper: Keeper,
    generation: u64,
    step: u64,
    open: Option<SnapshotId>,
    reads: Vec<(usize, SnapshotId, usize)>,
    waits: Vec<PartRead>,
    grants: Vec<(usize, Grant)>,
    pinned: Option<SnapshotId>,
    signalled: bool,
    /// The content of each slot's memory, as the ranks wrote it.
    contents: BTreeMap<usize, (SnapshotId, usize)>,
    connections: [usize; 2],
}

impl World {
    fn new() -> World {
        let mut world = World {
            keeper: Keeper::empty(Some(LIMIT)),
            generation: 0,
            step: 0,
            open: None,
            reads: Vec::new(),
            waits: Vec::new(),
            grants: Vec::new(),
            pinned: None,
            signalled: false,
            contents: BTreeMap::new(),
            connections: [0, 0],
        };
        world.set_up();
        world
    }

    fn topology(&self) -> Topology {
        let node = |node: usize| Node {
            address: SocketAddr::from(([127, 0, 0, 1], node as u16)),
            ranks: vec![2 * node, 2 * node + 1],
        };
        Topology {
            generation: self.generation,
            nodes: vec![node(0), node(1)],
            redundancy: Redundancy::Copies(1),
            groups: vec![vec![0, 1]],
            chunk_bytes: PART as usize / 2,
        }
    }

    fn set_up(&mut self) {
        self.generation += 1;
        self.open = None;
        let topology = self.topology();
        self.keeper.set_up(topology);
    }

    fn snapshot(&self, id: SnapshotId) -> Snapshot {
        let part = |rank: usize| PartInfo {
            rank,
            bytes: PART,
            digest: ChecksumDigest::of(&[rank as u32, id.step as u32]),
        };
        let mut topology = self.topology();
        topology.generation = id.generation;
        Snapshot::from(SnapshotContents {
            id,
            topology: topology.into(),
            parts: (0..4).map(part).collect(),
        })
    }

    fn ask_as(&mut self, rank: usize, request: RankRequest) -> Option<RankDecision> {
        let now = self.keeper.now;
        let session = session(rank, 100);
        self.keeper
            .state
            .decide_for_rank(session, request, now)
            .ok()
    }

    fn is_complete(&self, id: SnapshotId) -> bool {
        let ranks = self.keeper.state.complete_ranks(id);
        ranks.contains(&0) && ranks.contains(&1)
    }

    fn reserve(&mut self, rank: usize) {
        let id = *self.open.get_or_insert_with(|| {
            self.step += 1;
            id(self.generation, self.step)
        });
        if self.keeper.is_here(id, rank) {
            return;
        }
        let request = RankRequest::Reserve {
            id,
            bytes: PART,
            durable: false,
        };
        if let Some(RankDecision::Reply(RankReply::Slot(Some(slot)))) = self.ask_as(rank, request) {
            let slot = self.keeper.state.slots_of(rank)[slot];
            self.contents.insert(slot, (id, rank));
        }
    }

    fn fill(&mut self, rank: usize) {
        let Some(id) = self.open else { return };
        let Some(slot) = self.keeper.state.find_part(id, rank) else {
            return;
        };
        let own = self.keeper.state.slots_of(rank);
        let Some(number) = own.iter().position(|&own| own == slot) else {
            return;
        };
        let part = self.keeper.state.slots.part(slot).unwrap();
        let crcs = part.checksums.as_slice().len();
        let expected = [rank as u32, id.step as u32];
        let request = RankRequest::Filled {
            slot: number,
            filled_to: (crcs as u64 + 1) * PART / 2,
            crcs: expected.get(crcs).copied().into_iter().collect(),
        };
        self.ask_as(rank, request);
    }

    fn select(&mut self, some: bool) {
        let complete = self.keeper.state.inventory().complete;
        let snapshot = complete.last().cloned().filter(|_| some);
        let holders = vec![SocketAddr::from(([127, 0, 0, 1], 9)); 4];
        self.keeper
            .command(Request::SelectRestore { snapshot, holders });
        self.pinned = None;
        self.open = None;
    }

    fn read(&mut self, rank: usize) {
        let newest = self.keeper.state.newest();
        let Some(id) = self.open.or(newest) else {
            return;
        };
        self.waits.push(PartRead {
            id,
            rank,
            filled_to: PART,
            deadline: self.keeper.now + Duration::from_secs(30),
        });
    }

    fn poll(&mut self) {
        let mut waiting = Vec::new();
        for wait in std::mem::take(&mut self.waits) {
            match self.keeper.state.poll_read(&wait, self.keeper.now) {
                Ok(ReadStep::Wait) => waiting.push(wait),
                Ok(ReadStep::Ready { slot, .. }) => self.reads.push((slot, wait.id, wait.rank)),
                Err(_) => {}
            }
        }
        for wait in &waiting {
            assert!(self.keeper.now < wait.deadline, "a wait does not end");
        }
        self.waits = waiting;
    }

    fn allocate(&mut self, rank: usize, slots: usize) {
        let bytes = PART;
        let request = RankRequest::Allocate { bytes, slots };
        let decision = self.ask_as(rank, request);
        if let Some(RankDecision::Job(RankJob::Allocate { bytes, missing })) = decision
            && let Ok(grant) = self.keeper.state.grant(bytes, missing, None)
        {
            self.grants.push((rank, grant));
        }
    }

    fn finish_allocation(&mut self) {
        let Some((rank, mut grant)) = self.grants.pop() else {
            return;
        };
        for _ in 0..grant.count {
            self.keeper.state.record_allocation(&mut grant);
        }
        let lens = vec![grant.bytes; grant.count];
        self.keeper.state.add_slots(rank, &lens);
        self.keeper.state.return_grant(&grant);
    }

    fn fetch(&mut self, rank: usize) {
        let Ok(source) = self.keeper.state.restore_source(rank) else {
            return;
        };
        let id = source.id;
        if source.is_here {
            return;
        }
        if let Ok(grant) = self.keeper.state.grant(PART, 1, None) {
            let checksums = Checksums::new(vec![rank as u32, id.step as u32]);
            let state = &mut self.keeper.state;
            let slot = state.insert_part(id, source.part, checksums, PART);
            self.contents.insert(slot, (id, rank));
            self.keeper.state.return_grant(&grant);
        }
    }

    fn commit(&mut self) {
        if let Some(id) = self.open.filter(|&id| self.is_complete(id)) {
            let snapshot = self.snapshot(id);
            self.keeper.command(Request::Commit(snapshot));
            self.open = None;
        }
    }

    fn abandon(&mut self) {
        let id = self.open.take().or(self.keeper.state.newest());
        if let Some(id) = id {
            self.keeper.command(Request::Abandon(id));
        }
    }

    fn pin(&mut self) {
        if let Some(newest) = self.keeper.state.newest() {
            self.keeper.command(Request::Pin(newest));
            self.pinned = Some(newest);
        }
    }

    fn put_parity(&mut self, stripe: u64) {
        let request = Request::PutParity {
            id: self.open.unwrap_or(id(self.generation, self.step)),
            local: 0,
            stripe,
            bytes: vec![0; PART as usize / 2],
        };
        // It may exceed the limit.
        let _ = self.keeper.ask(request);
    }

    fn connect(&mut self, rank: usize) {
        let now = self.keeper.now;
        self.keeper.state.connect_rank(session(rank, 100), now);
        self.connections[rank] += 1;
    }

    fn die(&mut self, rank: usize) {
        for _ in 0..std::mem::take(&mut self.connections[rank]) {
            self.keeper.state.disconnect_rank(session(rank, 100));
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Reserve(rank) => self.reserve(rank),
            Action::Fill(rank) => self.fill(rank),
            Action::Release(slot) => drop(self.ask_as(0, RankRequest::Release { slot })),
            Action::Commit => self.commit(),
            Action::Abandon => self.abandon(),
            Action::Pin => self.pin(),
            Action::Unpin => {
                self.keeper.command(Request::Unpin);
                self.pinned = None;
            }
            Action::Select(some) => self.select(some),
            Action::SetUp => self.set_up(),
            Action::Parity(stripe) => self.put_parity(stripe),
            Action::Fetch(rank) => self.fetch(rank),
            Action::Read(rank) => self.read(rank),
            Action::EndRead => {
                if let Some((slot, ..)) = self.reads.pop() {
                    self.keeper.state.end_read(slot);
                }
            }
            Action::Allocate { rank, slots } => self.allocate(rank, slots),
            Action::FinishAllocation => self.finish_allocation(),
            Action::Connect(rank) => self.connect(rank),
            Action::Die(rank) => self.die(rank),
            Action::Signal => {
                let now = self.keeper.now;
                self.keeper.state.signal(15, now);
                self.signalled = true;
            }
            Action::Wait(seconds) => self.keeper.now += Duration::from_secs(seconds),
        }
    }

    fn apply(&mut self, action: Action) {
        self.act(action);
        self.poll();
        for effect in self.keeper.state.take_effects() {
            if let Effect::Free(slot) = effect {
                self.contents.remove(&slot);
                let read = self.reads.iter().find(|(read, ..)| *read == slot);
                assert!(read.is_none(), "memory was freed that is read: {read:?}");
            }
        }
    }

    fn check(&self) {
        let state = &self.keeper.state;
        let unwritten: u64 = self
            .grants
            .iter()
            .map(|(_, g)| g.bytes * g.count as u64)
            .sum();
        let used = state.slot_bytes() + state.parity.bytes() + unwritten;
        assert!(used <= LIMIT, "{used} of {LIMIT} bytes are used");
        if let Some(newest) = state.newest()
            && state.complete.contains_key(&newest)
        {
            assert!(self.is_complete(newest), "{newest:?} was complete");
        }
        if let Some(pinned) = self.pinned {
            assert!(self.is_complete(pinned), "{pinned:?} is pinned");
        }
        for &(slot, id, rank) in &self.reads {
            assert_eq!(
                self.contents.get(&slot),
                Some(&(id, rank)),
                "slot {slot} was overwritten"
            );
        }
        assert!(state.complete.len() <= 3 && state.encoding.len() <= 64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_sequence_of_events_loses_a_complete_snapshot(
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let mut world = World::new();
        for rank in [0, 1] {
            world.allocate(rank, 3);
            world.finish_allocation();
        }
        for action in actions {
            world.apply(action);
            world.check();
        }
        // Every wait ends, with the keeper's life at last.
        world.keeper.now += Duration::from_secs(30);
        world.poll();
        prop_assert!(world.waits.is_empty());
        world.keeper.tick(1);
        world.keeper.now += if world.signalled {
            Duration::from_secs(20)
        } else {
            ORPHAN_TIMEOUT + Duration::from_secs(1)
        };
        prop_assert!(matches!(world.keeper.tick(0), Life::Ends(_)));
    }
}
