//! Saves what is only in memory when the launcher gives a run up.

use super::{
    checkpoint_writer::{CheckpointWriter, Finished},
    keepers::Keepers,
    recovery::{find_candidates, recover},
};
use crate::hint::WithHint;
use anyhow::{Context, Result};
use std::time::Duration;

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Writes the newest snapshot to a checkpoint, unless a newer one is on disk, and stops the
/// keepers. Returns the step that it wrote.
///
/// # Errors
/// If it cannot be written. The keepers stay, and the same command tries again.
pub(super) fn rescue(mut keepers: Keepers, writer: &mut CheckpointWriter) -> Result<Option<u64>> {
    let newest = find_candidates(&mut keepers).newest();
    let written = match newest {
        Some(id) if writer.newest_step_on_disk() < Some(id.step) => {
            write_newest(&mut keepers, writer)?
        }
        _ => None,
    };
    keepers.stop();
    Ok(written)
}

/// Reassembles and writes the newest snapshot. Returns its step, or None if it cannot be
/// reassembled.
fn write_newest(keepers: &mut Keepers, writer: &mut CheckpointWriter) -> Result<Option<u64>> {
    let Some(snapshot) = recover(keepers, 0, writer.root()).snapshot else {
        return Ok(None);
    };
    let id = snapshot.id;
    let candidates = find_candidates(keepers);
    let mut found = candidates.found.iter();
    let candidate = found.find(|candidate| candidate.snapshot.id == id);
    let holders = candidate.and_then(|candidate| {
        let holders = candidate.holders.iter();
        let nodes = holders.map(|holder| Some(candidates.nodes[(*holder)?]));
        nodes.collect::<Option<Vec<usize>>>()
    });
    let Some(holders) = holders else {
        return Ok(None);
    };
    writer.request(id);
    loop {
        writer.begin(keepers, id, &holders);
        match writer.take_finished(keepers) {
            None => std::thread::sleep(POLL_INTERVAL),
            // An older checkpoint was being written.
            Some(Finished { step, .. }) if step != id.step => {}
            Some(Finished { step, result }) => {
                result
                    .with_context(|| format!("cannot write step {step}, which is only in memory"))
                    .hint("free disk space and run the same command again")?;
                return Ok(Some(step));
            }
        }
    }
}
