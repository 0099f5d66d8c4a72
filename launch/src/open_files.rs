//! Open files that the processes of a run need, against the limit of this machine.
//!
//! A process at its limit cannot connect or accept, and a run would hang without an error.

use crate::hint::hinted;
use anyhow::{Result, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parallel::Backend;
use trainer::config::Config;

/// Most files that the limit is raised to: programs of which some close all possible files when
/// they start others.
const MAX_RAISED: u64 = 1 << 20;

/// Largest group of which each rank connects to all others at once; in larger ones it connects when
/// it first sends a large tensor.
const MAX_EAGER_SIZE: usize = 64;
/// Most keepers that exchange parity with a keeper.
const MAX_PARITY_PEERS: usize = 32;

/// Sizes of a run that decide how many files its processes open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunSize {
    pub(crate) ranks: usize,
    /// Ranks of one machine.
    pub(crate) local_ranks: usize,
    /// Ranks that a rank reaches through sockets; 0 if all share memory.
    pub(crate) peers: usize,
    pub(crate) machines: usize,
    /// Keepers, spare ones included; 0 in a run without snapshots.
    pub(crate) keepers: usize,
    /// Ranks of one keeper.
    pub(crate) node_ranks: usize,
}

/// Number of files that a process opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// The process, for messages.
    pub(crate) process: &'static str,
    pub(crate) files: usize,
}

impl RunSize {
    /// Returns the sizes of a run of `ranks` on machines of `local_ranks`.
    pub(crate) fn new(config: &Config, ranks: usize, local_ranks: usize) -> RunSize {
        let local_ranks = local_ranks.clamp(1, ranks.max(1));
        let shares_memory = local_ranks == ranks && config.run.backend == Backend::Auto;
        let nodes = config.nodes(ranks);
        let keepers = if config.takes_snapshots() {
            nodes.len()
        } else {
            0
        };
        RunSize {
            ranks,
            local_ranks,
            peers: if shares_memory { 0 } else { ranks },
            machines: ranks.div_ceil(local_ranks),
            keepers,
            node_ranks: nodes.first().map_or(0, Vec::len),
        }
    }

    /// Returns the most that the launcher opens: two connections of each rank to the store, the
    /// input of each standby process, and for each keeper connections for requests, events and what
    /// takes long.
    pub(crate) fn launcher(self) -> Need {
        let files = 48 + 2 * self.ranks + self.local_ranks + 4 * self.keepers + 2 * self.machines;
        Need {
            process: "the launcher",
            files,
        }
    }

    /// Returns the most that a rank opens: a socket for each peer, and in small groups of each
    /// kind.
    pub(crate) fn rank(self) -> Need {
        Need {
            process: "a rank",
            files: 48 + self.peers + 4 * self.peers.min(MAX_EAGER_SIZE),
        }
    }

    /// Returns the most that a keeper opens: the connections and the memory of its ranks, a file of
    /// a checkpoint for each, and connections to other keepers.
    pub(crate) fn keeper(self) -> Need {
        let files = match self.keepers {
            0 => 0,
            keepers => 48 + 7 * self.node_ranks + 4 * keepers.min(MAX_PARITY_PEERS),
        };
        Need {
            process: "a keeper",
            files,
        }
    }

    /// Returns the largest need of a process.
    pub(crate) fn largest(self) -> Need {
        let needs = [self.rank(), self.keeper(), self.launcher()];
        let largest = needs.into_iter().max_by_key(|need| need.files);
        largest.unwrap_or(self.launcher())
    }
}

/// Raises the soft limit of open files to the hard one, for this process and those that it starts.
/// Best effort: [`refuse_too_many`] tells when it matters.
pub(crate) fn raise() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let raised = hard.min(MAX_RAISED).max(soft);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, raised, hard);
    }
}

/// Returns the number of files that this process may open; None if the system does not tell.
pub(crate) fn limit() -> Option<usize> {
    getrlimit(Resource::RLIMIT_NOFILE)
        .ok()
        .map(|(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}

/// Refuses a run whose processes need more files than they may open.
///
/// # Errors
/// If they do: the number and the ways to raise the limit.
pub(crate) fn refuse_too_many(need: Need) -> Result<()> {
    match limit() {
        Some(limit) if limit < need.files => {
            let Need { process, files } = need;
            Err(hinted(
                anyhow!("{process} needs up to {files} open files, and the limit is {limit}"),
                fix(files),
            ))
        }
        _ => Ok(()),
    }
}

/// Returns how to raise the limit to `files`.
pub(crate) fn fix(files: usize) -> String {
    format!(
        "run 'ulimit -n {files}' first; if that is not permitted, raise the hard limit: \
         LimitNOFILE of a systemd service, nofile in /etc/security/limits.conf, or under Slurm \
         PropagateResourceLimits and the limit of slurmd"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted in `/proc/PID/fd` of real runs.
    struct Counted {
        size: RunSize,
        launcher: usize,
        keeper: usize,
        rank: usize,
    }

    fn size(ranks: usize, peers: usize, keepers: usize) -> RunSize {
        RunSize {
            ranks,
            local_ranks: ranks,
            peers,
            machines: 1,
            keepers,
            node_ranks: ranks / keepers,
        }
    }

    #[test]
    fn needs_cover_what_real_runs_open_and_little_more() {
        let counted = |size, launcher, keeper, rank| Counted {
            size,
            launcher,
            keeper,
            rank,
        };
        for Counted {
            size,
            launcher,
            keeper,
            rank,
        } in [
            counted(size(8, 0, 1), 33, 57, 17),
            counted(size(64, 0, 1), 145, 337, 17),
            counted(size(16, 16, 4), 55, 45, 90),
            counted(size(32, 32, 1), 81, 177, 146),
        ] {
            let needs = [size.launcher(), size.keeper(), size.rank()];
            for (need, open) in needs.into_iter().zip([launcher, keeper, rank]) {
                let Need { process, files } = need;
                let is_close = (open..=open * 3 / 2 + 64).contains(&files);
                assert!(is_close, "{process}: {files} for {open} in {size:?}");
            }
        }
    }

    #[test]
    fn a_process_that_needs_too_many_is_named_with_the_number() {
        let need = Need {
            process: "a keeper",
            files: usize::MAX,
        };
        let error = refuse_too_many(need).unwrap_err().to_string();
        assert!(
            error.starts_with("a keeper needs up to 18446744073709551615"),
            "{error}"
        );
        assert!(refuse_too_many(size(1, 0, 1).rank()).is_ok());
    }
}
