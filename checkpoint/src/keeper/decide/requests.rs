//! Decisions about the requests of the launcher, of tools and of other keepers.

use super::{
    check::{check_rebuild, check_snapshot, check_sources, check_topology},
    parity_store::StripeId,
    state::State,
};
use crate::{
    keeper::{
        fault::Fault,
        protocol::{Reply, Request},
        recover::Rebuild,
        snapshot::{Snapshot, SnapshotId},
    },
    secure::Error,
};
use std::{net::SocketAddr, path::PathBuf, time::Instant};

/// The decision about a request.
#[derive(Debug)]
pub(crate) enum Decision {
    Reply(Reply),
    /// The daemon has to do something that waits or moves bytes.
    Job(Job),
    /// The connection carries events from now on.
    Subscribe,
}

/// Work outside the state.
#[derive(Debug)]
pub(crate) enum Job {
    Verify(SnapshotId),
    Length {
        id: SnapshotId,
        rank: usize,
    },
    Chunk {
        id: SnapshotId,
        rank: usize,
        chunk: u64,
    },
    /// Wait for a part, and return its checksums.
    Checksums {
        id: SnapshotId,
        rank: usize,
    },
    Header {
        id: SnapshotId,
        rank: usize,
    },
    Rebuild(Box<Rebuild>),
    Protect {
        snapshot: Snapshot,
        node: usize,
        sources: Vec<Option<SocketAddr>>,
    },
    Persist {
        id: SnapshotId,
        ranks: Vec<usize>,
        folder: PathBuf,
    },
    Inject(Fault),
}

impl State {
    /// Decides about a request.
    ///
    /// # Errors
    /// If it is not possible, or contradicts itself.
    pub(crate) fn decide(&mut self, request: Request, now: Instant) -> Result<Decision, Error> {
        match request {
            Request::Setup { topology, node } => {
                check_topology(&topology, Some(node))?;
                self.set_up(topology, node);
            }
            Request::Subscribe { launcher } => {
                self.lifetime.connect(launcher);
                return Ok(Decision::Subscribe);
            }
            Request::Inventory => {
                let inventory = self.inventory();
                return Ok(Decision::Reply(Reply::Inventory(Box::new(inventory))));
            }
            Request::Status => {
                return Ok(Decision::Reply(Reply::Status(Box::new(self.status(now)))));
            }
            Request::Commit(snapshot) => {
                check_snapshot(&snapshot)?;
                self.commit(snapshot);
            }
            Request::Abandon(id) => self.abandon(id),
            Request::SelectRestore { snapshot, holders } => {
                if let Some(snapshot) = &snapshot {
                    check_snapshot(snapshot)?;
                }
                self.select_restore(snapshot, holders);
            }
            Request::Pin(id) => self.pin(id),
            Request::Unpin => self.unpin(),
            Request::Stop => self.stop(),
            Request::Checksums { id, rank, waits } => return self.find_checksums(id, rank, waits),
            Request::Parity { id, local, stripe } => {
                let stripe = StripeId { local, stripe };
                let bytes = self.intact_parity(id, stripe)?.to_vec();
                return Ok(Decision::Reply(Reply::Bytes(bytes)));
            }
            Request::PutParity {
                id,
                local,
                stripe,
                bytes,
            } => self.put_parity(id, StripeId { local, stripe }, bytes)?,
            other => {
                let job = job(other)?;
                self.begin_job();
                return Ok(Decision::Job(job));
            }
        }
        Ok(Decision::Reply(Reply::Done))
    }

    fn find_checksums(
        &mut self,
        id: SnapshotId,
        rank: usize,
        waits: bool,
    ) -> Result<Decision, Error> {
        if let Some(checksums) = self.checksums(id, rank) {
            let reply = Reply::Checksums(checksums.as_slice().to_vec());
            return Ok(Decision::Reply(reply));
        }
        if waits {
            self.begin_job();
            return Ok(Decision::Job(Job::Checksums { id, rank }));
        }
        let step = id.step;
        let reason = format!("the checksums of rank {rank}'s part of step {step} are not here");
        Err(Error::Refused(reason))
    }
}

/// Returns the work that a request needs.
fn job(request: Request) -> Result<Job, Error> {
    Ok(match request {
        Request::Verify(id) => Job::Verify(id),
        Request::Length { id, rank } => Job::Length { id, rank },
        Request::Chunk { id, rank, chunk } => Job::Chunk { id, rank, chunk },
        Request::Header { id, rank } => Job::Header { id, rank },
        Request::Rebuild(rebuild) => {
            check_rebuild(&rebuild)?;
            Job::Rebuild(rebuild)
        }
        Request::Protect {
            snapshot,
            node,
            sources,
        } => {
            check_snapshot(&snapshot)?;
            check_topology(&snapshot.topology, Some(node))?;
            check_sources(&snapshot.topology, node, &sources)?;
            Job::Protect {
                snapshot,
                node,
                sources,
            }
        }
        Request::Persist { id, ranks, folder } => Job::Persist { id, ranks, folder },
        Request::Inject(fault) => Job::Inject(fault),
        _ => return Err(Error::Protocol("a request without a decision".into())),
    })
}
