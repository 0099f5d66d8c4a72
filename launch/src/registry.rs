//! `keepers.json` in a run's folder: where a later launcher and tools find the run's keepers.

use crate::{argument_ranges::MAX_RANKS, hint::WithHint, run_file};
use anyhow::{Context, Result, anyhow, bail};
use checkpoint::keeper::{Peer, Secret, Status};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::Write,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Most restarts of a run, and most batches that it skips before a step.
const MAX_COUNT: u64 = 1_000_000_000;

/// Most bytes of the file: far more than entries of all keepers.
const MAX_BYTES: u64 = 64 << 20;
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// The keepers of a run, while they run. Only the user can read the file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(crate) struct KeeperRegistry {
    /// Key by which the processes of the run authenticate each other.
    #[schemars(with = "String")]
    pub(crate) secret: Secret,
    /// Last generation of the run.
    pub(crate) generation: u64,
    /// Number of batches to skip before each step.
    #[serde(alias = "skips")]
    pub(crate) skipped_batches: BTreeMap<u64, u64>,
    /// Keepers of nodes with ranks, then those of spare nodes.
    pub(crate) keepers: Vec<KeeperEntry>,
    /// Number of spare nodes.
    pub(crate) spares: usize,
}

/// A keeper of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct KeeperEntry {
    /// Process id of the keeper, on its machine.
    pub(crate) pid: i32,
    /// Machine of the keeper; 0 is the launcher's.
    #[serde(default)]
    pub(crate) machine: usize,
    /// TCP address for other keepers and for tools.
    #[schemars(with = "String")]
    pub(crate) address: SocketAddr,
    /// Name of the Unix socket for ranks, in the abstract namespace.
    pub(crate) socket: String,
    /// Distinguishes machines whose addresses change.
    #[serde(default)]
    pub(crate) identity: String,
}

fn path(run: &Path) -> PathBuf {
    run.join("keepers.json")
}

impl KeeperRegistry {
    /// Returns the registry of an earlier launcher, if it left one. Its secret becomes the run's,
    /// so that the file must be this user's own.
    pub(crate) fn load(run: &Path) -> Result<Option<KeeperRegistry>> {
        let path = path(run);
        let Some(text) = run_file::read_private(&path, MAX_BYTES)? else {
            return Ok(None);
        };
        let registry = serde_json::from_slice(&text).map_err(anyhow::Error::from);
        registry
            .and_then(KeeperRegistry::checked)
            .map(Some)
            .with_context(|| format!("{} is damaged", path.display()))
            .hint("'moerun train' sets it aside; without it the keepers exit after an hour")
    }

    /// As [`KeeperRegistry::load`], but renames a file that is refused: the run does not depend on
    /// it.
    pub(crate) fn load_or_set_aside(run: &Path) -> Result<Option<KeeperRegistry>> {
        let path = path(run);
        KeeperRegistry::load(run).or_else(|error| {
            let aside = run.join("keepers.json.damaged");
            std::fs::rename(&path, &aside)
                .with_context(|| format!("cannot rename {}", path.display()))?;
            eprintln!(
                "warning: {error:#}; renamed it to {}, so state in memory is not found",
                aside.display()
            );
            Ok(None)
        })
    }

    /// Returns the addresses of the keepers.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.keepers.iter().map(|keeper| keeper.address).collect()
    }

    /// Refuses numbers that no launcher writes.
    fn checked(self) -> Result<KeeperRegistry> {
        let keepers = self.keepers.len();
        let spares = self.spares;
        if spares > keepers {
            bail!("spares is {spares}, but it lists {keepers} keepers");
        }
        let generation = self.generation;
        if generation > MAX_COUNT {
            bail!("generation is {generation}; it must be at most {MAX_COUNT}");
        }
        for KeeperEntry { pid, machine, .. } in &self.keepers {
            // Process 1 is the system's; signals to 0 and below go to many processes.
            if *pid < 2 {
                bail!("pid is {pid}; it must be at least 2");
            }
            if *machine as u64 >= MAX_RANKS {
                bail!("machine is {machine}; it must be below {MAX_RANKS}");
            }
        }
        if let Some((step, batches)) = self.skipped_batches.iter().find(|(_, n)| **n > MAX_COUNT) {
            bail!("skipped_batches of step {step} is {batches}; it must be at most {MAX_COUNT}");
        }
        Ok(self)
    }

    /// Writes the registry, readable by this user only.
    pub(crate) fn save(&self, run: &Path) -> Result<()> {
        let path = path(run);
        self.write(&path, &run.join("keepers.json.new"))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn write(&self, path: &Path, temporary: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        let _ = std::fs::remove_file(temporary);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options.open(temporary)?.write_all(&text)?;
        std::fs::rename(temporary, path)
    }

    pub(crate) fn remove(run: &Path) {
        // A stale file does no harm: its keepers do not answer.
        let _ = std::fs::remove_file(path(run));
    }

    /// Connects to the keeper of `node`.
    pub(crate) fn connect(&self, node: usize, timeout: Duration) -> Result<Peer> {
        let address = self.keepers[node].address;
        Peer::connect(address, &self.secret, timeout).map_err(|error| {
            anyhow!("cannot reach the keeper of node {node} at {address}: {error}")
        })
    }

    /// Asks every keeper for its status.
    pub(crate) fn statuses(&self) -> Vec<Result<Status>> {
        let ask = |node| {
            let mut peer = self.connect(node, REPLY_TIMEOUT)?;
            peer.status()
                .map_err(|error| anyhow!("the keeper of node {node}: {error}"))
        };
        (0..self.keepers.len()).map(ask).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    fn registry() -> KeeperRegistry {
        KeeperRegistry {
            secret: Secret::random().unwrap(),
            generation: 1,
            skipped_batches: BTreeMap::new(),
            keepers: Vec::new(),
            spares: 0,
        }
    }

    #[test]
    fn a_file_that_others_may_have_written_is_set_aside() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        registry().save(run).unwrap();
        assert!(KeeperRegistry::load_or_set_aside(run).unwrap().is_some());
        std::fs::set_permissions(path(run), Permissions::from_mode(0o666)).unwrap();
        assert!(KeeperRegistry::load_or_set_aside(run).unwrap().is_none());
        assert!(run.join("keepers.json.damaged").exists() && !path(run).exists());
        // A link to a right one, and a pipe, which would never be read to its end.
        registry().save(run).unwrap();
        std::fs::rename(path(run), run.join("other")).unwrap();
        std::os::unix::fs::symlink(run.join("other"), path(run)).unwrap();
        assert!(KeeperRegistry::load_or_set_aside(run).unwrap().is_none());
        assert!(run.join("other").exists());
        nix::unistd::mkfifo(&path(run), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(KeeperRegistry::load_or_set_aside(run).unwrap().is_none());
    }
}
