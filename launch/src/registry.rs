//! `keepers.json` in a run's folder: how the keepers of a run are found again, by a launcher that is started after another
//! was killed, and by tools.

use anyhow::{Context, Result, anyhow};
use checkpoint::keeper::{Peer, Secret};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is known of a run's keepers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct KeeperRegistry {
    pub(crate) secret: Secret,
    /// The last attempt of the run.
    pub(crate) generation: u64,
    /// Batches that are left out before a step.
    #[serde(alias = "skips")]
    pub(crate) skipped_batches: BTreeMap<u64, u64>,
    /// The keepers of nodes with ranks, then spare ones.
    pub(crate) keepers: Vec<KeeperEntry>,
    /// How many of them are spare.
    pub(crate) spares: usize,
}

/// Where a keeper is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeeperEntry {
    pub(crate) pid: i32,
    /// The machine it is on; 0 is the launcher's.
    #[serde(default)]
    pub(crate) machine: usize,
    pub(crate) address: SocketAddr,
    pub(crate) socket: String,
}

fn path(run: &Path) -> PathBuf {
    run.join("keepers.json")
}

impl KeeperRegistry {
    pub(crate) fn new(secret: &Secret) -> KeeperRegistry {
        let keepers = Vec::new();
        let skipped_batches = BTreeMap::new();
        KeeperRegistry {
            secret: secret.clone(),
            generation: 0,
            skipped_batches,
            keepers,
            spares: 0,
        }
    }

    /// What an earlier launcher left; None where it left nothing.
    pub(crate) fn load(run: &Path) -> Result<Option<KeeperRegistry>> {
        let path = path(run);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let read = serde_json::from_slice(&text);
        read.map(Some).with_context(|| {
            format!(
                "{} is damaged; remove it to start without keepers",
                path.display()
            )
        })
    }

    /// Writes it, for this user's eyes only.
    pub(crate) fn save(&self, run: &Path) -> Result<()> {
        let path = path(run);
        let fresh = run.join("keepers.json.new");
        let write = || -> std::io::Result<()> {
            let _ = std::fs::remove_file(&fresh);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(self).expect("plain data"))?;
            std::fs::rename(&fresh, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn remove(run: &Path) {
        // A file that stays names keepers that answer nobody.
        let _ = std::fs::remove_file(path(run));
    }

    /// A connection to keeper number `number`.
    pub(crate) fn connect(&self, number: usize, timeout: Duration) -> Result<Peer> {
        let keeper = &self.keepers[number];
        Peer::connect(keeper.address, &self.secret, timeout).map_err(|e| {
            anyhow!(
                "the keeper of node {number} at {} cannot be reached: {e}",
                keeper.address
            )
        })
    }
}

/// One launcher at a time works in a run's folder, for as long as this lives.
pub(crate) fn lock(run: &Path) -> Result<nix::fcntl::Flock<File>> {
    let path = run.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow!(
            "another moerun works in {}: wait for its end, or choose another run.dir",
            run.display()
        )
    })
}
