//! The work that requests of ranks need outside the state, and the answers to ranks.

use super::{
    daemon::Keeper,
    decide::{RankDecision, RankJob, RankSession},
    protocol::{RankReply, RankRequest},
    restore,
};
use crate::{
    memory::{Region, send_file},
    secure::{Connection, Error},
};
use std::{os::unix::net::UnixStream, sync::Arc, time::Instant};

/// The answer to a request of a rank.
pub(super) struct Answer {
    /// The reply, for requests that have one.
    reply: Option<RankReply>,
    /// Memory that is passed to the rank after the reply.
    regions: Vec<Arc<Region>>,
}

impl Answer {
    fn new(reply: Option<RankReply>) -> Answer {
        Answer {
            reply,
            regions: Vec::new(),
        }
    }

    pub(super) fn send(self, connection: &mut Connection<UnixStream>) -> Result<(), Error> {
        if let Some(reply) = self.reply {
            connection.send(&reply)?;
        }
        for region in self.regions {
            send_file(connection.socket(), region.file())?;
        }
        Ok(())
    }
}

/// Handles a request of a rank.
///
/// # Errors
/// If the keeper cannot do what was requested.
pub(super) fn handle(
    keeper: &Keeper,
    session: RankSession,
    request: RankRequest,
) -> Result<Answer, Error> {
    let now = Instant::now();
    let rank = session.rank;
    match keeper.apply(|state| state.decide_for_rank(session, request, now))? {
        RankDecision::Silent => Ok(Answer::new(None)),
        RankDecision::Reply(reply) => Ok(Answer::new(Some(reply))),
        RankDecision::Job(RankJob::Allocate { bytes, missing }) => {
            keeper.allocate(bytes, missing)?.add_to_rank(rank);
            let regions = keeper.regions_of_rank(rank);
            Ok(Answer {
                reply: Some(RankReply::Slots(regions.len())),
                regions,
            })
        }
        RankDecision::Job(RankJob::Header { rank: wanted }) => {
            let header = restore::header(keeper, wanted)?;
            Ok(Answer::new(Some(RankReply::Bytes(header))))
        }
        RankDecision::Job(RankJob::Open { rank: wanted }) => {
            let region = restore::fetch(keeper, wanted)?;
            Ok(Answer {
                reply: Some(RankReply::Part),
                regions: vec![region],
            })
        }
    }
}
