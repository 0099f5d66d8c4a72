//! The faults that `moerun chaos` injects, planned from a seed.

use clap::ValueEnum;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FaultKind {
    /// Send SIGKILL to a rank
    Kill,
    /// Send SIGSTOP to a rank, which then hangs
    Stop,
    /// Send SIGABRT to a rank
    Abort,
    /// Pause a rank for a second
    Delay,
    /// Flip one bit of a rank's newest snapshot
    Corrupt,
    /// Fill a rank's newest snapshot with NaN, under valid checksums
    Poison,
    /// Kill the keeper and all ranks of a node
    KillNode,
}

impl FaultKind {
    /// True if the fault makes the launcher restart the ranks.
    pub(crate) fn is_fatal(self) -> bool {
        matches!(
            self,
            FaultKind::Kill | FaultKind::Stop | FaultKind::Abort | FaultKind::KillNode
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlannedFault {
    pub(crate) kind: FaultKind,
    /// A rank, or for `kill-node` a node, modulo their number.
    pub(crate) target: u64,
    /// Steps after the last recovery.
    pub(crate) after: u64,
    /// Offset into the next step, in thousandths of a step's time.
    pub(crate) offset_per_mille: u64,
    /// The byte to corrupt.
    pub(crate) byte: u64,
}

/// Parameters of a plan.
pub(crate) struct FaultPlan<'a> {
    pub(crate) seed: u64,
    pub(crate) faults: usize,
    pub(crate) kinds: &'a [FaultKind],
    /// Mean number of steps between faults.
    pub(crate) gap: u64,
}

impl FaultPlan<'_> {
    /// Returns the faults, the same for the same plan.
    pub(crate) fn faults(&self) -> Vec<PlannedFault> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let kinds = self.kinds;
        let max_gap = (2 * self.gap).max(1);
        // The order of the draws is part of a seed's meaning.
        let mut fault = |_| PlannedFault {
            kind: kinds[(random.next_u64() % kinds.len() as u64) as usize],
            target: random.next_u64(),
            after: 1 + random.next_u64() % max_gap,
            offset_per_mille: random.next_u64() % 1000,
            byte: random.next_u64(),
        };
        (0..self.faults).map(&mut fault).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_determines_all_faults() {
        let kinds = [FaultKind::Kill, FaultKind::Corrupt];
        let plan = |seed: u64, faults: usize| {
            let kinds = &kinds;
            let gap = 3;
            let plan = FaultPlan {
                seed,
                faults,
                kinds,
                gap,
            };
            plan.faults()
        };
        assert_eq!(plan(7, 50), plan(7, 50));
        assert_ne!(plan(7, 50), plan(8, 50));
        let planned = plan(7, 500);
        for fault in &planned {
            assert!((1..=6).contains(&fault.after) && kinds.contains(&fault.kind));
        }
        assert!(planned.iter().any(|fault| fault.kind == FaultKind::Corrupt));
    }
}
