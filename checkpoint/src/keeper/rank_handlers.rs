//! Handlers of a rank's requests: one function per request.

use super::{
    daemon::Keeper,
    error::Error,
    protocol::{RankReply, RankRequest},
    restore,
    snapshot::SnapshotId,
    wire,
};
use crate::memory::{Region, send_file};
use std::{os::unix::net::UnixStream, sync::Arc, time::Instant};

/// The answer to a request of a rank.
pub(super) struct Answer {
    /// The reply, for requests that have one.
    reply: Option<RankReply>,
    /// Memory that is passed to the rank after the reply.
    regions: Vec<Arc<Region>>,
}

impl Answer {
    /// The answer to requests without a reply.
    const NONE: Answer = Answer {
        reply: None,
        regions: Vec::new(),
    };

    fn reply(reply: RankReply) -> Answer {
        Answer {
            reply: Some(reply),
            regions: Vec::new(),
        }
    }

    pub(super) fn send(self, stream: &mut UnixStream) -> Result<(), Error> {
        if let Some(reply) = self.reply {
            wire::send(stream, &reply)?;
        }
        for region in self.regions {
            send_file(stream, region.file())?;
        }
        Ok(())
    }
}

/// Handles a request of rank `rank`.
///
/// # Errors
/// If the keeper cannot do what was requested.
pub(super) fn handle(keeper: &Keeper, rank: usize, request: RankRequest) -> Result<Answer, Error> {
    keeper.lock().ranks.record_message(rank, Instant::now());
    match request {
        RankRequest::Hello { .. } => Err(Error::Protocol("a second hello".into())),
        RankRequest::Allocate { bytes, slots } => allocate(keeper, rank, bytes, slots),
        RankRequest::Reserve { id, bytes, durable } => {
            let slot = keeper.lock().reserve(rank, id, bytes, durable);
            Ok(Answer::reply(RankReply::Slot(slot)))
        }
        RankRequest::Release { slot } => {
            keeper.update(|state| state.release(rank, slot));
            Ok(Answer::NONE)
        }
        RankRequest::Filled {
            slot,
            filled_to,
            crcs,
        } => {
            record_filled(keeper, rank, slot, filled_to, &crcs)?;
            Ok(Answer::NONE)
        }
        RankRequest::Heartbeat { step, progress } => {
            keeper.lock().ranks.record_progress(rank, step, progress);
            Ok(Answer::NONE)
        }
        RankRequest::Sync => Ok(Answer::reply(RankReply::Ack)),
        RankRequest::Header { rank: wanted } => {
            let header = restore::header(keeper, wanted)?;
            Ok(Answer::reply(RankReply::Bytes(header)))
        }
        RankRequest::Open { rank: wanted } => {
            let region = restore::fetch(keeper, wanted)?;
            Ok(Answer {
                reply: Some(RankReply::Part),
                regions: vec![region],
            })
        }
    }
}

/// Gives slots to a rank: those it had, if their size is right, and new ones.
fn allocate(keeper: &Keeper, rank: usize, bytes: u64, count: usize) -> Result<Answer, Error> {
    let missing = keeper.lock().keep_fitting_slots(rank, bytes, count);
    let new = keeper.allocate(bytes, missing)?;
    let mut state = keeper.lock();
    state.add_slots(rank, new);
    let regions = state.regions_of_rank(rank);
    Ok(Answer {
        reply: Some(RankReply::Slots(regions.len())),
        regions,
    })
}

/// Records filled bytes; the first of a snapshot begin its encoding.
fn record_filled(
    keeper: &Keeper,
    rank: usize,
    slot: usize,
    filled_to: u64,
    crcs: &[u32],
) -> Result<(), Error> {
    keeper.update(|state| {
        let id: SnapshotId = state.fill(rank, slot, filled_to, crcs)?;
        if state.begin_encoding(id) {
            keeper.encode_later(id);
        }
        Ok(())
    })
}
