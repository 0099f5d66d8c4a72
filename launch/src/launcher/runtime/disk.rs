//! Everything that the launcher does on disk, in threads: a disk may hang.

use super::{keeper_links::KeeperLinks, queue::Queue};
use crate::{
    launcher::engine::{
        command::KeeperShare,
        event::{Answer, Event, Failed, SavedCheckpoint},
        requests::RequestId,
        restart_record::RestartRecord,
    },
    registry::KeeperRegistry,
    restarts,
};
use anyhow::{Context, Result, anyhow};
use checkpoint::{
    Shard, Staging,
    folder::{self, Depth},
    keeper::{Error, Peer, SnapshotId},
};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::Duration,
};

/// The time between two attempts to write what the disk does not take.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Most lines about restarts that wait for the disk.
const MAX_WAITING_LINES: usize = 1000;

enum Order {
    SaveRegistry {
        id: RequestId,
        registry: Option<Box<KeeperRegistry>>,
    },
    RecordRestart(String),
}

pub(super) struct Disk {
    dir: PathBuf,
    checkpoints: PathBuf,
    /// Number of checkpoints to keep.
    keep: usize,
    events: Queue<Event>,
    orders: Queue<Order>,
}

/// Opens a connection to a keeper.
trait Connect: FnOnce() -> Result<Peer, Error> + Send {}

impl<C: FnOnce() -> Result<Peer, Error> + Send> Connect for C {}

/// The ranks whose parts one keeper writes.
struct Share<C> {
    connect: C,
    ranks: Vec<usize>,
}

impl Disk {
    pub(super) fn start(dir: &Path, keep: usize, events: Queue<Event>) -> Result<Disk> {
        let disk = Disk {
            dir: dir.to_path_buf(),
            checkpoints: dir.join("checkpoints"),
            keep,
            events: events.clone(),
            orders: Queue::new(),
        };
        let records = Records {
            dir: disk.dir.clone(),
            events,
            registry: None,
            lines: VecDeque::new(),
        };
        let orders = disk.orders.clone();
        std::thread::Builder::new()
            .name("records".into())
            .spawn(move || records.run(&orders))
            .context("cannot start a thread")?;
        Ok(disk)
    }

    pub(super) fn save_registry(&self, id: RequestId, registry: Option<KeeperRegistry>) {
        let registry = registry.map(Box::new);
        self.orders.push(Order::SaveRegistry { id, registry });
    }

    pub(super) fn record_restart(&self, record: &RestartRecord) {
        let line = serde_json::to_string(record).expect("plain data");
        self.orders.push(Order::RecordRestart(line));
    }

    /// Finds the newest checkpoint that can be read. If there is one, damaged ones that are newer
    /// are set aside; otherwise they keep their names, and no run overwrites them.
    pub(super) fn survey(&self, id: RequestId) {
        let checkpoints = self.checkpoints.clone();
        self.in_thread(id, move || {
            let survey = folder::newest(&checkpoints, Depth::Data)?;
            for refused in &survey.refused {
                eprintln!("warning: {}", refused.reason);
            }
            if !survey.verified.is_empty() {
                for (from, to) in folder::set_damaged_aside(&checkpoints, &survey.refused)? {
                    eprintln!("warning: renamed {} to {}", from.display(), to.display());
                }
            }
            let newest = survey.verified.into_iter().next();
            let saved = newest.map(|verified| SavedCheckpoint {
                step: verified.step,
                path: verified.path,
            });
            Ok(Answer::Surveyed(saved))
        });
    }

    /// Writes a snapshot from the keepers' memory, while training continues.
    pub(super) fn write_checkpoint(
        &self,
        id: RequestId,
        snapshot: SnapshotId,
        shares: Vec<KeeperShare>,
        links: &KeeperLinks,
    ) {
        let shares = shares.into_iter().map(|share| Share {
            connect: links.long_connector(share.keeper),
            ranks: share.ranks,
        });
        let shares: Vec<_> = shares.collect();
        let root = self.checkpoints.clone();
        let keep = self.keep;
        self.in_thread(id, move || {
            let path = write(&root, snapshot, shares)?;
            let step = snapshot.step;
            if let Err(error) = trainer::retain_checkpoints(&root, keep, step) {
                eprintln!("warning: cannot remove old checkpoints: {error:#}");
            }
            Ok(Answer::Written(SavedCheckpoint { step, path }))
        });
    }

    fn in_thread(&self, id: RequestId, work: impl FnOnce() -> Result<Answer> + Send + 'static) {
        let events = self.events.clone();
        let run = move || {
            let reply = work().map_err(|error| Failed::Refused(format!("{error:#}")));
            events.push(Event::Reply { id, reply });
        };
        if let Err(error) = std::thread::Builder::new().spawn(run) {
            let reply = Err(Failed::Refused(format!("cannot start a thread: {error}")));
            self.events.push_now(Event::Reply { id, reply });
        }
    }
}

/// Writes small records one after the other, and tries again what the disk does not take.
struct Records {
    dir: PathBuf,
    events: Queue<Event>,
    /// The newest registry, until it is written.
    registry: Option<Option<Box<KeeperRegistry>>>,
    /// Lines of `restarts.jsonl` that are not written yet.
    lines: VecDeque<String>,
}

impl Records {
    fn run(mut self, orders: &Queue<Order>) {
        loop {
            match orders.pop(RETRY_INTERVAL) {
                Some(Order::SaveRegistry { id, registry }) => {
                    self.registry = Some(registry);
                    let reply = match self.write_registry() {
                        Ok(()) => Ok(Answer::Done),
                        Err(error) => Err(Failed::Refused(format!("{error:#}"))),
                    };
                    self.events.push(Event::Reply { id, reply });
                }
                Some(Order::RecordRestart(line)) => {
                    if self.lines.len() < MAX_WAITING_LINES {
                        self.lines.push_back(line);
                    }
                    self.write_lines();
                }
                None => {
                    let _ = self.write_registry();
                    self.write_lines();
                }
            }
        }
    }

    fn write_registry(&mut self) -> Result<()> {
        match &self.registry {
            Some(Some(registry)) => registry.save(&self.dir)?,
            Some(None) => KeeperRegistry::remove(&self.dir),
            None => {}
        }
        self.registry = None;
        Ok(())
    }

    fn write_lines(&mut self) {
        while let Some(line) = self.lines.front() {
            if let Err(error) = restarts::append(&self.dir, line) {
                tracing::warn!("{error:#}");
                return;
            }
            self.lines.pop_front();
        }
    }
}

fn write<C: Connect>(root: &Path, id: SnapshotId, shares: Vec<Share<C>>) -> Result<PathBuf> {
    let staging = Staging::of_keepers(root, id.step);
    let result = write_staged(&staging, id, shares);
    if result.is_err() {
        staging.discard();
    }
    result
}

fn write_staged<C: Connect>(
    staging: &Staging,
    id: SnapshotId,
    shares: Vec<Share<C>>,
) -> Result<PathBuf> {
    staging.begin()?;
    let folder = std::path::absolute(staging.folder())?;
    let folder = &folder;
    let parts = std::thread::scope(|scope| {
        let start = |share| scope.spawn(move || persist(share, id, folder));
        let threads: Vec<_> = shares.into_iter().map(start).collect();
        let parts = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        parts.collect::<Result<Vec<_>>>()
    })?;
    let mut shards: Vec<(usize, Shard)> = parts.into_iter().flatten().collect();
    shards.sort_by_key(|(rank, _)| *rank);
    let shards = shards.into_iter().map(|(_, shard)| shard);
    Ok(staging.commit_images(shards.collect())?)
}

/// Has a keeper write its ranks' parts; returns each rank's shard.
fn persist<C: Connect>(
    share: Share<C>,
    id: SnapshotId,
    folder: &Path,
) -> Result<Vec<(usize, Shard)>> {
    let shards = (share.connect)()
        .and_then(|mut peer| peer.persist(id, &share.ranks, folder))
        .map_err(|error| anyhow!("{error}"))?;
    Ok(share.ranks.into_iter().zip(shards).collect())
}
