//! Verification of checkpoints on disk by all ranks together.
//!
//! # Collective
//! All ranks call [`list_on_rank_0`] and [`inspect_together`] at the same point.

use crate::Error;
use checkpoint::{
    Checkpoint,
    folder::{self, Inspection, Refused},
};
use parallel::{
    Communicator,
    agreement::{agree, all_gather_bytes, broadcast_bytes, decode_peer_message},
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
    Ok(decode_peer_message(&broadcast_bytes(world, &message)?)?)
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

/// Verifies a checkpoint; each rank reads its share of the files. All ranks get the same answer,
/// except that only rank 0 knows whether to set the checkpoint aside.
///
/// # Errors
/// If a rank may not read the checkpoint: an older one would silently lose work.
pub(super) fn inspect_together(
    step: u64,
    path: &Path,
    world: &Arc<dyn Communicator>,
) -> Result<Result<Checkpoint, Refused>, Error> {
    let inspection = Inspection::open(path);
    let fault = match &inspection {
        Ok(inspection) => verify_share(inspection, world),
        Err(error) => Some(Fault::new(error, None)),
    };
    let own = serde_json::to_vec(&fault).expect("plain data");
    let mut found = None;
    for message in all_gather_bytes(world, &own)? {
        let of_rank: Option<Fault> = decode_peer_message(&message)?;
        found = found.or(of_rank);
    }
    match (inspection, found) {
        (Ok(inspection), None) => {
            inspection.remember();
            Ok(Ok(inspection.into_checkpoint()))
        }
        (_, Some(fault)) if fault.is_denied => Err(Error::Resume(fault.reason)),
        (inspection, Some(fault)) => Ok(Err(Refused {
            path: path.to_path_buf(),
            step,
            is_damaged: world.rank() == 0 && fault.is_damage && confirms(&inspection, &fault),
            reason: fault.reason,
        })),
        (Err(error), None) => Err(error.into()),
    }
}

/// Verifies this rank's share of a checkpoint's files.
fn verify_share(inspection: &Inspection, world: &Arc<dyn Communicator>) -> Option<Fault> {
    if inspection.is_known() {
        return None;
    }
    let checkpoint = inspection.checkpoint();
    let mut own = (world.rank()..checkpoint.manifest().files.len()).step_by(world.size());
    own.find_map(|file| {
        let verified = checkpoint.verify_file(file);
        verified.err().map(|error| Fault::new(&error, Some(file)))
    })
}

/// True if this rank finds the same fault: the memory or the mount of another one may be at fault.
fn confirms(inspection: &Result<Inspection, checkpoint::Error>, fault: &Fault) -> bool {
    match (inspection, fault.file) {
        (Err(error), _) => error.is_damage(),
        (Ok(inspection), Some(file)) => {
            let verified = inspection.checkpoint().verify_file(file);
            verified.is_err_and(|error| error.is_damage())
        }
        (Ok(_), None) => false,
    }
}
