//! The identity of this machine, by which a launcher knows it again under another address.

use checkpoint::keeper::MachineIdentity;

/// Returns a name that no other machine has. Empty if the system tells nothing.
pub(crate) fn machine_identity() -> String {
    let MachineIdentity {
        machine_id,
        boot_id,
        hostname,
    } = MachineIdentity::read();
    let parts = [machine_id, boot_id, hostname];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("/")
}
