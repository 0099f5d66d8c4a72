//! The work that requests of the launcher, other keepers and tools need outside the state.

use super::{
    daemon::Keeper,
    decide::{Decision, Job},
    inject, persist, protect,
    protocol::{Reply, Request},
    rebuild, restore, verify,
};
use crate::secure::Error;
use std::time::Instant;

/// Handles a request. Returns the reply, or none if the connection carries events from now on.
///
/// # Errors
/// If the keeper cannot do what was requested.
pub(super) fn handle(keeper: &Keeper, request: Request) -> Result<Option<Reply>, Error> {
    match keeper.apply(|state| state.decide(request, Instant::now()))? {
        Decision::Reply(Reply::Status(mut status)) => {
            status.refusals = keeper.refusals();
            Ok(Some(Reply::Status(status)))
        }
        Decision::Reply(reply) => Ok(Some(reply)),
        Decision::Subscribe => Ok(None),
        Decision::Job(job) => {
            let result = run(keeper, job);
            keeper.apply(|state| state.finish_job(Instant::now()));
            result.map(Some)
        }
    }
}

fn run(keeper: &Keeper, job: Job) -> Result<Reply, Error> {
    match job {
        Job::Verify(id) => verify::find_damage(keeper, id).map(Reply::Damage),
        Job::Length { id, rank } => {
            let bytes = keeper.read_part(id, rank, 0, |_, part| part.bytes)?;
            Ok(Reply::Length(bytes))
        }
        Job::Chunk { id, rank, chunk } => {
            protect::read_chunk(keeper, id, rank, chunk).map(Reply::Bytes)
        }
        Job::Checksums { id, rank } => {
            let checksums =
                keeper.read_part(id, rank, u64::MAX, |_, part| part.checksums.clone())?;
            Ok(Reply::Checksums(checksums.as_slice().to_vec()))
        }
        Job::Header { id, rank } => restore::local_header(keeper, id, rank).map(Reply::Bytes),
        Job::Rebuild(wanted) => rebuild::rebuild(keeper, &wanted).map(|()| Reply::Done),
        Job::Protect {
            snapshot,
            node,
            sources,
        } => protect::reencode(keeper, &snapshot, node, &sources).map(|()| Reply::Done),
        Job::Persist { id, ranks, folder } => {
            persist::write(keeper, id, &ranks, &folder).map(Reply::Shards)
        }
        Job::Inject(fault) => inject::inject(keeper, fault).map(|()| Reply::Done),
    }
}
