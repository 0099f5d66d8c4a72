//! Which keeper this is: of which run, in which process, on which machine.

use crate::secure::{Error, Secret};
use serde::{Deserialize, Serialize};

/// The identity of a machine, as far as the system knows it. Two containers on one machine have
/// the same boot id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineIdentity {
    /// The contents of `/etc/machine-id`, which images may share.
    pub machine_id: String,
    /// The kernel's random number of this boot.
    pub boot_id: String,
    pub hostname: String,
}

impl MachineIdentity {
    /// Returns the identity of this machine. What cannot be read is empty.
    pub fn read() -> MachineIdentity {
        let line = |path: &str| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.trim().chars().take(128).collect()
        };
        MachineIdentity {
            machine_id: line("/etc/machine-id"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            hostname: line("/proc/sys/kernel/hostname"),
        }
    }
}

/// The identity of a keeper.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// A random name, new for each process.
    pub keeper: String,
    /// The name of the run, which does not reveal its secret.
    pub run: String,
    pub pid: i32,
    pub machine: MachineIdentity,
}

impl Identity {
    /// Returns the identity of a new keeper in this process.
    ///
    /// # Errors
    /// If the system has no random bytes.
    pub(super) fn new(secret: &Secret) -> Result<Identity, Error> {
        Ok(Identity {
            keeper: Secret::random()?.name(),
            run: secret.name(),
            pid: std::process::id() as i32,
            machine: MachineIdentity::read(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepers_of_a_run_differ_by_name_only() {
        let secret = Secret::random().unwrap();
        let first = Identity::new(&secret).unwrap();
        let second = Identity::new(&secret).unwrap();
        assert_ne!(first.keeper, second.keeper);
        assert_eq!(first.run, second.run);
        assert_eq!(first.machine, second.machine);
        assert!(!first.machine.boot_id.is_empty() || !first.machine.hostname.is_empty());
    }
}
