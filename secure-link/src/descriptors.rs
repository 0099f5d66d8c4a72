//! A reserve of file descriptors, so that connections of others cannot use them up.

use nix::sys::resource::{Resource, getrlimit};
use std::{fs::File, os::fd::RawFd};

/// The file descriptors that connections may use.
#[derive(Debug)]
pub(super) struct Descriptors {
    /// Descriptors from this number on are the reserve.
    first_reserved: u64,
    /// Closed for a moment when none is left, to accept and close a connection that waits.
    spare: Option<File>,
}

impl Descriptors {
    pub(super) fn new(reserve: u64) -> Descriptors {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Descriptors {
            // A very small limit still lets some connections in.
            first_reserved: limit.saturating_sub(reserve).max(limit / 2),
            spare: open_spare(),
        }
    }

    /// True if a new descriptor with this number belongs to the reserve. The system hands out the
    /// lowest free number, so that many are in use.
    pub(super) fn is_reserved(&self, descriptor: RawFd) -> bool {
        u64::try_from(descriptor).is_ok_and(|number| number >= self.first_reserved)
    }

    /// Calls `turn_away` with one more descriptor free than before.
    pub(super) fn use_spare(&mut self, turn_away: impl FnOnce()) {
        self.spare = None;
        turn_away();
        self.spare = open_spare();
    }
}

fn open_spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_descriptors_are_reserved() {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let descriptors = Descriptors::new(limit / 4);
        let first = descriptors.first_reserved as RawFd;
        assert!(!descriptors.is_reserved(first - 1) && descriptors.is_reserved(first));
        assert!(!descriptors.is_reserved(-1));
        // A reserve larger than the limit leaves half of it.
        assert_eq!(Descriptors::new(u64::MAX).first_reserved, limit / 2);
    }
}
