//! Outstanding requests: their recipients, purposes and deadlines.

use super::keepers::KeeperId;
use checkpoint::keeper::SnapshotId;
use std::{collections::BTreeMap, time::Duration};

/// Number of a request. Replies carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestId(pub(crate) u64);

/// The process that answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recipient {
    Keeper(KeeperId),
    Machine(usize),
    Disk,
}

/// The use of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Start the process of a keeper.
    StartKeeper(KeeperId),
    /// Connect to a keeper and receive its events.
    Connect(KeeperId),
    /// Find out what a keeper holds.
    Inventory(KeeperId),
    /// Compare a keeper's parts with their checksums.
    Verify(KeeperId),
    /// Repair damaged chunks, or rebuild whole parts.
    Rebuild(KeeperId),
    /// Tell a keeper which snapshot ranks restore.
    Select(KeeperId),
    /// Tell a keeper the nodes of a new generation.
    SetUp(KeeperId),
    /// Something that no decision waits for.
    Notify(KeeperId),
    StopKeeper(KeeperId),
    WriteCheckpoint(SnapshotId),
    /// Find the newest checkpoint that can be read.
    Survey,
    SaveRegistry,
}

#[derive(Debug)]
pub(crate) struct Outstanding {
    pub(crate) recipient: Recipient,
    pub(crate) purpose: Purpose,
    /// None for the disk, which may hang for as long as it likes.
    deadline: Option<Duration>,
}

#[derive(Debug, Default)]
pub(crate) struct Requests {
    last: u64,
    outstanding: BTreeMap<RequestId, Outstanding>,
}

impl Requests {
    pub(crate) fn issue(
        &mut self,
        recipient: Recipient,
        purpose: Purpose,
        deadline: Option<Duration>,
    ) -> RequestId {
        self.last += 1;
        let id = RequestId(self.last);
        let outstanding = Outstanding {
            recipient,
            purpose,
            deadline,
        };
        self.outstanding.insert(id, outstanding);
        id
    }

    /// Removes an answered request. None if nothing waits for it any more.
    pub(crate) fn take(&mut self, id: RequestId) -> Option<Outstanding> {
        self.outstanding.remove(&id)
    }

    /// Returns the purpose of an outstanding request.
    pub(crate) fn purpose(&self, id: RequestId) -> Option<Purpose> {
        self.outstanding.get(&id).map(|request| request.purpose)
    }

    /// Purposes of all outstanding requests.
    pub(crate) fn purposes(&self) -> impl Iterator<Item = Purpose> {
        self.outstanding.values().map(|request| request.purpose)
    }

    /// True if a request for one of these purposes is outstanding.
    pub(crate) fn any(&self, is_wanted: impl Fn(Purpose) -> bool) -> bool {
        let mut outstanding = self.outstanding.values();
        outstanding.any(|request| is_wanted(request.purpose))
    }

    /// Removes the requests whose deadline has passed.
    pub(crate) fn take_expired(&mut self, now: Duration) -> Vec<Outstanding> {
        self.take_all(|request| request.deadline.is_some_and(|deadline| deadline <= now))
    }

    /// Removes the requests to a recipient that is gone.
    pub(crate) fn take_of(&mut self, recipient: Recipient) -> Vec<Outstanding> {
        self.take_all(|request| request.recipient == recipient)
    }

    /// Removes requests whose replies are of no use any more.
    pub(crate) fn forget(&mut self, is_useless: impl Fn(Purpose) -> bool) {
        self.outstanding
            .retain(|_, request| !is_useless(request.purpose));
    }

    fn take_all(&mut self, is_taken: impl Fn(&Outstanding) -> bool) -> Vec<Outstanding> {
        let outstanding = self.outstanding.iter();
        let taken = outstanding.filter(|(_, request)| is_taken(request));
        let taken: Vec<RequestId> = taken.map(|(&id, _)| id).collect();
        let taken = taken.iter();
        taken.filter_map(|id| self.outstanding.remove(id)).collect()
    }
}
