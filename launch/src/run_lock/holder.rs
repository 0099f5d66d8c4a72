//! The process that uses a run's folder, as its lock file describes it, and whether it still does.

use crate::hint::one_line;
use anyhow::{Context, Result};
use nix::{errno::Errno, sys::signal::kill, unistd::Pid};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The time after which a lease that its holder has not renewed is over.
pub(super) const EXPIRY: Duration = Duration::from_secs(30);
/// The age of a lease that is over whatever the clocks of machines say.
const LONG_AGO: Duration = Duration::from_secs(600);

/// A process with a run's lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Holder {
    host: String,
    /// Identifies the kernel since it booted.
    boot: String,
    /// Identifies the namespace of process ids: containers number their own.
    pid_namespace: String,
    pid: i32,
    /// Clock ticks from boot to the process's start: process ids are used again.
    started: u64,
    /// Seconds since 1970 at which the process took the lock.
    since: u64,
}

/// A lock file that another process has left or holds.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// None if the file cannot be read as one.
    pub(super) holder: Option<Holder>,
    /// Time since the last renewal, by the clock of this machine.
    pub(super) age: Duration,
}

/// The state of the folder by a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Free,
    Held,
    /// Only renewals tell: it is free if none comes for [`EXPIRY`].
    Unknown,
}

impl Standing {
    /// Returns `otherwise` if the folder is not free.
    fn unless(is_free: bool, otherwise: Standing) -> Standing {
        if is_free { Standing::Free } else { otherwise }
    }
}

impl Holder {
    /// Returns the record of this process.
    pub(super) fn this_process() -> Result<Holder> {
        let read = |path: &str| {
            let text = std::fs::read_to_string(path);
            text.with_context(|| format!("cannot read {path}"))
        };
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let pid = std::process::id() as i32;
        Ok(Holder {
            host: read("/proc/sys/kernel/hostname")?.trim().to_string(),
            boot: read("/proc/sys/kernel/random/boot_id")?.trim().to_string(),
            pid_namespace: namespace.display().to_string(),
            pid,
            started: start_ticks(pid).unwrap_or_default(),
            since: unix_seconds(),
        })
    }

    /// True if both processes run on one kernel, so that its locks are the same for both.
    fn shares_kernel(&self, other: &Holder) -> bool {
        self.boot == other.boot
    }

    /// True if the process runs. Its number has to be of this process's namespace.
    fn is_alive(&self) -> bool {
        if self.pid < 1 {
            return false;
        }
        let exists = match kill(Pid::from_raw(self.pid), None) {
            Ok(()) | Err(Errno::EPERM) => true,
            Err(_) => false,
        };
        exists && start_ticks(self.pid).is_none_or(|started| started == self.started)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = unix_seconds().saturating_sub(self.since);
        let time = match seconds {
            0..120 => format!("{seconds} s"),
            120..7200 => format!("{} min", seconds / 60),
            _ => format!("{} h", seconds / 3600),
        };
        let host = one_line(&self.host);
        write!(f, "process {} on {host}, for {time}", self.pid)
    }
}

impl Record {
    /// Judges the record. `has_flock` is true if this process holds the kernel's lock.
    pub(super) fn standing(&self, own: &Holder, has_flock: bool) -> Standing {
        let is_old = self.age > LONG_AGO;
        let Some(holder) = &self.holder else {
            return Standing::unless(has_flock || is_old, Standing::Unknown);
        };
        let shares_kernel = holder.shares_kernel(own);
        if has_flock && shares_kernel {
            return Standing::Free;
        }
        if shares_kernel && holder.pid_namespace == own.pid_namespace {
            return Standing::unless(!holder.is_alive(), Standing::Held);
        }
        Standing::unless(is_old, Standing::Unknown)
    }
}

fn unix_seconds() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, |time| time.as_secs())
}

/// Returns the clock ticks from boot to the start of a process.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may contain blanks and brackets.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutated::{MUTATIONS, mutated};
    use proptest::prelude::*;

    fn own_text() -> Vec<u8> {
        serde_json::to_vec(&Holder::this_process().unwrap()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(MUTATIONS))]

        #[test]
        fn mutated_locks(text in mutated(own_text())) {
            let own = Holder::this_process().unwrap();
            let holder = serde_json::from_slice::<Holder>(&text).ok();
            if let Some(holder) = &holder {
                prop_assert!(!holder.to_string().contains('\n'));
            }
            let record = Record { holder, age: Duration::from_secs(1) };
            record.standing(&own, true);
            record.standing(&own, false);
        }
    }

    fn record(change: impl FnOnce(&mut Holder), age: u64) -> Record {
        let mut holder = Holder::this_process().unwrap();
        change(&mut holder);
        Record {
            holder: Some(holder),
            age: Duration::from_secs(age),
        }
    }

    fn standing(record: &Record, has_flock: bool) -> Standing {
        record.standing(&Holder::this_process().unwrap(), has_flock)
    }

    #[test]
    fn on_one_kernel_the_process_or_its_flock_decides() {
        let alive = record(|_| (), 1);
        assert_eq!(standing(&alive, false), Standing::Held);
        // Its flock is gone, so it has exited.
        assert_eq!(standing(&alive, true), Standing::Free);
        // Suspended for long, but it exists.
        assert_eq!(standing(&record(|_| (), 5000), false), Standing::Held);
        let exited = record(|holder| holder.pid = i32::MAX, 1);
        assert_eq!(standing(&exited, false), Standing::Free);
        let reused = record(|holder| holder.started += 1, 1);
        assert_eq!(standing(&reused, false), Standing::Free);
        // Signals to 0 and below go to many processes.
        for pid in [0, -1, i32::MIN] {
            let wrong = record(|holder| holder.pid = pid, 1);
            assert_eq!(standing(&wrong, false), Standing::Free, "{pid}");
        }
    }

    #[test]
    fn processes_of_other_machines_and_containers_are_judged_by_renewals() {
        let container = |age| record(|holder| holder.pid_namespace = "pid:[1]".into(), age);
        assert_eq!(standing(&container(1), false), Standing::Unknown);
        assert_eq!(standing(&container(1), true), Standing::Free);
        assert_eq!(standing(&container(601), false), Standing::Free);
        // A flock may be local to each machine (Lustre with -o localflock).
        let machine = |age| record(|holder| holder.boot = "another".into(), age);
        for has_flock in [false, true] {
            assert_eq!(standing(&machine(1), has_flock), Standing::Unknown);
            assert_eq!(standing(&machine(601), has_flock), Standing::Free);
        }
    }

    #[test]
    fn a_damaged_record_is_no_holder_forever() {
        let damaged = |age| Record {
            holder: None,
            age: Duration::from_secs(age),
        };
        assert_eq!(standing(&damaged(1), true), Standing::Free);
        assert_eq!(standing(&damaged(1), false), Standing::Unknown);
        assert_eq!(standing(&damaged(601), false), Standing::Free);
    }

    #[test]
    fn a_holder_is_described_in_one_line() {
        let mut holder = Holder::this_process().unwrap();
        holder.host = "a\nb".into();
        holder.since -= 600;
        let text = holder.to_string();
        assert!(text.contains("on a\\nb, for 10 min"), "{text}");
    }
}
