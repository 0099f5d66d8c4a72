//! Handlers of the launcher's, other keepers' and tools' requests: one function per request.
//!
//! A request that only reads or changes the state is a method of [`KeeperState`]. A handler here
//! may wait for ranks, other keepers or the disk, and holds the lock only for a moment.

use super::daemon::Keeper;
use super::error::Error;
use super::parity_store::StripeId;
use super::protocol::{Reply, Request};
use super::snapshot::SnapshotId;
use super::{inject, persist, protect, rebuild, restore, verify};
use std::time::Instant;

/// Handles a request and returns the reply.
///
/// # Errors
/// If the keeper cannot do what was requested.
pub(super) fn handle(keeper: &Keeper, request: Request) -> Result<Reply, Error> {
    match request {
        Request::Setup { topology, node } => keeper.lock().set_up(topology, node),
        Request::Subscribe => return Err(Error::Protocol("a stream has no replies".into())),
        Request::Inventory => {
            let inventory = keeper.lock().inventory();
            return Ok(Reply::Inventory(inventory));
        }
        Request::Status => return Ok(status(keeper)),
        Request::Commit(snapshot) => keeper.lock().commit(snapshot),
        Request::Abandon(id) => keeper.update(|state| state.abandon(id)),
        Request::SelectRestore { snapshot, holders } => {
            keeper.update(|state| state.select_restore(snapshot, holders));
        }
        Request::Verify(id) => {
            let damage = verify::find_damage(keeper, id)?;
            return Ok(Reply::Damage(damage));
        }
        Request::Length { id, rank } => return length(keeper, id, rank),
        Request::Chunk { id, rank, chunk } => {
            let bytes = protect::read_chunk(keeper, id, rank, chunk)?;
            return Ok(Reply::Bytes(bytes));
        }
        Request::Header { id, rank } => {
            let bytes = restore::local_header(keeper, id, rank)?;
            return Ok(Reply::Bytes(bytes));
        }
        Request::Parity { id, local, stripe } => {
            return parity(keeper, id, StripeId { local, stripe });
        }
        Request::PutParity {
            id,
            local,
            stripe,
            bytes,
        } => {
            let stripe = StripeId { local, stripe };
            keeper.lock().put_parity(id, stripe, bytes)?;
        }
        Request::Rebuild(wanted) => rebuild::rebuild(keeper, &wanted)?,
        Request::Protect {
            snapshot,
            node,
            sources,
        } => protect::reencode(keeper, &snapshot, node, &sources)?,
        Request::Pin(id) => keeper.lock().pin(id),
        Request::Unpin => keeper.lock().unpin(),
        Request::Persist { id, ranks, folder } => {
            let shards = persist::write(keeper, id, &ranks, &folder)?;
            return Ok(Reply::Shards(shards));
        }
        Request::Inject(fault) => inject::inject(keeper, fault)?,
        Request::Stop => keeper.update(|state| state.stop()),
    }
    Ok(Reply::Done)
}

fn status(keeper: &Keeper) -> Reply {
    let pid = std::process::id() as i32;
    Reply::Status(keeper.lock().status(pid, Instant::now()))
}

fn length(keeper: &Keeper, id: SnapshotId, rank: usize) -> Result<Reply, Error> {
    let bytes = keeper.read_part(id, rank, 0, |_, info| info.bytes)?;
    Ok(Reply::Length(bytes))
}

fn parity(keeper: &Keeper, id: SnapshotId, stripe: StripeId) -> Result<Reply, Error> {
    let state = keeper.lock();
    let bytes = state.intact_parity(id, stripe)?;
    Ok(Reply::Bytes(bytes.to_vec()))
}
