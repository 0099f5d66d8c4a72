//! Verification of checkpoints on disk by all ranks together.
//!
//! # Collective
//! All ranks call [`list_on_rank_0`] and [`inspect_together`] at the same point.

use super::handed_on::from_rank_0;
use crate::Error;
use checkpoint::{
    Checkpoint,
    folder::{self, Inspection, Refused},
};
use parallel::{
    Communicator,
    agreement::{agree, all_gather_bytes, decode_peer_message},
};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Returns the error of a folder with checkpoints of which none can be used.
pub(super) fn none_usable(root: &Path, refusals: &[Refused], set_aside: &[PathBuf]) -> Error {
    let refused = refusals.iter().map(|refused| refused.reason.clone());
    let aside = set_aside
        .iter()
        .map(|path| format!("{} is damaged", path.display()));
    let reasons: Vec<String> = refused.chain(aside).collect();
    Error::Resume(format!(
        "none of the {} checkpoints in {} can be used ({}); move the folder away to start from the \
         beginning",
        reasons.len(),
        root.display(),
        reasons.join("; ")
    ))
}

/// Renames damaged checkpoints. A failure only warns: they are refused again by the next start.
pub(super) fn set_damaged_aside(root: &Path, refusals: &[Refused], warn: &mut dyn FnMut(&str)) {
    match folder::set_damaged_aside(root, refusals) {
        Ok(renamed) => {
            for (from, to) in renamed {
                warn(&format!("renamed {} to {}", from.display(), to.display()));
            }
        }
        Err(error) => warn(&format!("damaged checkpoints keep their names: {error}")),
    }
}

/// The checkpoints that rank 0 finds.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct FolderPaths {
    /// Steps and paths, newest first.
    pub(super) candidates: Vec<(u64, PathBuf)>,
    pub(super) set_aside: Vec<PathBuf>,
}

/// Returns what rank 0 finds under `root`.
pub(super) fn list_on_rank_0(
    root: &Path,
    world: &Arc<dyn Communicator>,
) -> Result<FolderPaths, Error> {
    let listed = if world.rank() == 0 {
        folder::listing(root).map(|listing| FolderPaths {
            candidates: listing.candidates,
            set_aside: listing.set_aside,
        })
    } else {
        Ok(FolderPaths::default())
    };
    let listed = listed.map_err(|error| Error::Resume(error.to_string()));
    let listed = agree(world, listed)?;
    let message = serde_json::to_vec(&listed).expect("paths are UTF-8");
    Ok(decode_peer_message(&from_rank_0(world, message)?)?)
}

/// The fault that a rank found in its share of a checkpoint's files.
#[derive(Serialize, Deserialize)]
struct Fault {
    reason: String,
    /// The number of the file; `None` if the checkpoint cannot be opened.
    file: Option<usize>,
    is_damage: bool,
    is_denied: bool,
}

impl Fault {
    fn new(error: &checkpoint::Error, file: Option<usize>) -> Fault {
        Fault {
            reason: error.to_string(),
            file,
            is_damage: error.is_damage(),
            is_denied: error.is_denied(),
        }
    }
}

/// A checkpoint whose manifest rank 0 read.
enum Opened {
    /// On rank 0, which has compared the lengths of all files.
    Inspected(Inspection),
    HandedOn(Checkpoint),
}

impl Opened {
    fn checkpoint(&self) -> &Checkpoint {
        match self {
            Opened::Inspected(inspection) => inspection.checkpoint(),
            Opened::HandedOn(checkpoint) => checkpoint,
        }
    }
}

/// Verifies a checkpoint. Rank 0 reads the manifest for all ranks, and each rank reads its share of
/// the files, unless rank 0 knows that they have not changed since all were read. All ranks get the
/// same answer, except that only rank 0 knows whether to set the checkpoint aside.
///
/// # Errors
/// If a rank may not read the checkpoint: an older one would silently lose work.
pub(super) fn inspect_together(
    step: u64,
    path: &Path,
    world: &Arc<dyn Communicator>,
) -> Result<Result<Checkpoint, Refused>, Error> {
    let (opened, is_known) = match open_on_rank_0(path, world)? {
        Ok(opened) => opened,
        Err(fault) => return refused(step, path, fault, world.rank() == 0),
    };
    let fault = match &opened {
        Ok(opened) if !is_known => verify_share(opened.checkpoint(), world),
        Ok(_) => None,
        Err(error) => Some(Fault::new(error, None)),
    };
    let own = serde_json::to_vec(&fault).expect("plain data");
    let mut found = None;
    for (rank, message) in all_gather_bytes(world, &own)?.iter().enumerate() {
        let of_rank: Option<Fault> = decode_peer_message(message)?;
        found = found.or(of_rank.map(|fault| (rank, fault)));
    }
    if let Some((rank, mut fault)) = found {
        let is_confirmed = world.rank() == 0 && confirms(&opened, &fault);
        if world.size() > 1 {
            fault.reason += &format!(" (found by rank {rank})");
        }
        return refused(step, path, fault, is_confirmed);
    }
    Ok(Ok(match opened? {
        Opened::Inspected(inspection) => {
            inspection.remember();
            inspection.into_checkpoint()
        }
        Opened::HandedOn(checkpoint) => checkpoint,
    }))
}

/// Returns the answer that a checkpoint with this fault is not used. `is_confirmed` is true if this
/// rank decides about the checkpoint and finds the same fault.
fn refused(
    step: u64,
    path: &Path,
    fault: Fault,
    is_confirmed: bool,
) -> Result<Result<Checkpoint, Refused>, Error> {
    if fault.is_denied {
        return Err(Error::Resume(fault.reason));
    }
    Ok(Err(Refused {
        path: path.to_path_buf(),
        step,
        is_damaged: is_confirmed && fault.is_damage,
        reason: fault.reason,
    }))
}

/// This rank's view of a checkpoint that rank 0 could open, and true if rank 0 knows its files.
type OpenedOnRank0 = (Result<Opened, checkpoint::Error>, bool);

/// Opens a checkpoint with the manifest that rank 0 reads, or returns the fault that rank 0 finds.
fn open_on_rank_0(
    path: &Path,
    world: &Arc<dyn Communicator>,
) -> Result<Result<OpenedOnRank0, Fault>, Error> {
    let is_rank_0 = world.rank() == 0;
    let own = is_rank_0.then(|| {
        let text = Checkpoint::manifest_text(path)?;
        let inspection = Inspection::with_manifest(path, &text)?;
        Ok::<_, checkpoint::Error>((inspection, text))
    });
    let outcome: Result<bool, Fault> = match &own {
        Some(Ok((inspection, _))) => Ok(inspection.is_known()),
        Some(Err(error)) => Err(Fault::new(error, None)),
        None => Ok(false),
    };
    let outcome = serde_json::to_vec(&outcome).expect("plain data");
    let outcome: Result<bool, Fault> = decode_peer_message(&from_rank_0(world, outcome)?)?;
    let is_known = match outcome {
        Ok(is_known) => is_known,
        Err(fault) => return Ok(Err(fault)),
    };
    let (inspection, text) = match own {
        Some(own) => own.map(|(inspection, text)| (Some(inspection), text))?,
        None => (None, Vec::new()),
    };
    let text = from_rank_0(world, text)?;
    let opened = match inspection {
        Some(inspection) => Ok(Opened::Inspected(inspection)),
        None => Checkpoint::with_manifest(path, &text).map(Opened::HandedOn),
    };
    Ok(Ok((opened, is_known)))
}

/// Verifies this rank's share of a checkpoint's files.
fn verify_share(checkpoint: &Checkpoint, world: &Arc<dyn Communicator>) -> Option<Fault> {
    let mut own = (world.rank()..checkpoint.manifest().files.len()).step_by(world.size());
    own.find_map(|file| {
        let verified = checkpoint.verify_file(file);
        verified.err().map(|error| Fault::new(&error, Some(file)))
    })
}

/// True if this rank finds the same fault: the memory or the mount of another one may be at fault.
fn confirms(opened: &Result<Opened, checkpoint::Error>, fault: &Fault) -> bool {
    match (opened, fault.file) {
        (Err(error), _) => error.is_damage(),
        (Ok(opened), Some(file)) => {
            let verified = opened.checkpoint().verify_file(file);
            verified.is_err_and(|error| error.is_damage())
        }
        (Ok(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::{Staging, TensorSlice};
    use parallel::run_on_threads;
    use std::time::Duration;
    use tch::Tensor;

    const RANKS: usize = 3;

    fn save(root: &Path) -> PathBuf {
        let staging = Staging::new(root, 7);
        staging.begin().unwrap();
        let shard = |rank: usize| {
            let values = Tensor::from_slice(&[rank as f32]);
            let tensors = vec![(TensorSlice::whole(format!("w{rank}"), &[1]), values)];
            staging.write_shard(rank, tensors).unwrap()
        };
        let shards = (0..2 * RANKS).map(shard).collect();
        staging
            .commit(shards, 2 * RANKS, serde_json::json!({}))
            .unwrap()
    }

    /// Returns for each rank the number of files of the checkpoint, or why it is refused and
    /// whether to set it aside.
    fn inspect(path: &Path) -> Vec<Result<usize, (String, bool)>> {
        let path = path.to_path_buf();
        run_on_threads(RANKS, Duration::from_secs(20), move |world| {
            let group = world.all("world").unwrap();
            let found = inspect_together(7, &path, &group).unwrap();
            let files = found.map(|checkpoint| checkpoint.manifest().files.len());
            files.map_err(|refused| (refused.reason, refused.is_damaged))
        })
    }

    #[test]
    fn a_fault_in_the_share_of_one_rank_is_the_answer_of_all() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path());
        assert_eq!(inspect(&path), vec![Ok(2 * RANKS); RANKS]);
        // The share of rank 1.
        let shard = path.join("shard-00004.safetensors");
        let mut bytes = std::fs::read(&shard).unwrap();
        // The clock of file times has ticks of some milliseconds.
        std::thread::sleep(Duration::from_millis(60));
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, bytes).unwrap();
        for (rank, found) in inspect(&path).into_iter().enumerate() {
            let (reason, is_damaged) = found.unwrap_err();
            assert!(
                reason.contains("shard-00004.safetensors is damaged"),
                "{reason}"
            );
            assert!(reason.ends_with("(found by rank 1)"), "{reason}");
            assert_eq!(is_damaged, rank == 0);
        }
        std::fs::write(path.join("manifest.json"), "{").unwrap();
        for (rank, found) in inspect(&path).into_iter().enumerate() {
            let (reason, is_damaged) = found.unwrap_err();
            assert!(reason.contains("manifest.json is damaged"), "{reason}");
            assert_eq!(is_damaged, rank == 0);
        }
    }
}
