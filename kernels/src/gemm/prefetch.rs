//! What is packed next is fetched a little at a time, between tiles: packing reads at the speed of memory, and tiles leave that unused.

use super::kernel::{CacheLine, Operand};
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

/// Bytes of a line.
const LINE: usize = size_of::<CacheLine>();

/// Runs of memory, equally far apart, of which some lines are fetched at a time.
pub(super) struct Prefetcher {
    /// Where the run begins that is being fetched.
    start: usize,
    /// Bytes of it that have been.
    done: usize,
    /// Bytes of a run.
    run: usize,
    /// Runs that are left, this one included.
    runs: usize,
    /// Bytes from one run to the next.
    step: usize,
    /// Lines at a time.
    lines_per_call: usize,
}

impl Prefetcher {
    /// Some of a right matrix, `size` bytes a number, in `times` times.
    pub(super) fn of(
        from: &Operand,
        size: usize,
        inner: Range<usize>,
        columns: Range<usize>,
        times: usize,
    ) -> Prefetcher {
        let start = (from.data as usize)
            .wrapping_add(inner.start * from.inner + columns.start * from.outer);
        let (run, runs, step) = if from.inner == size {
            (inner.len() * size, columns.len(), from.outer)
        } else {
            (columns.len() * size, inner.len(), from.inner)
        };
        // Of nothing no line; and a run may begin within one.
        let runs = if run == 0 { 0 } else { runs };
        let lines = runs * (run.div_ceil(LINE) + 1);
        Prefetcher {
            start,
            done: 0,
            run,
            runs,
            step,
            lines_per_call: lines.div_ceil(times.max(1)),
        }
    }

    /// Fetches the next lines.
    #[inline]
    pub(super) fn fetch(&mut self) {
        // SAFETY: fetching asks for nothing.
        self.lines(|line| unsafe { _mm_prefetch::<_MM_HINT_T1>(line as *const i8) });
    }

    #[inline(always)]
    fn lines(&mut self, mut fetch: impl FnMut(usize)) {
        let mut left = self.lines_per_call;
        while left > 0 && self.runs > 0 {
            let first = self.start / LINE * LINE;
            let end = self.start.wrapping_add(self.run);
            while left > 0 && first.wrapping_add(self.done) < end {
                fetch(first.wrapping_add(self.done));
                self.done = self.done.wrapping_add(LINE);
                left = left.wrapping_sub(1);
            }
            if first.wrapping_add(self.done) >= end {
                self.start = self.start.wrapping_add(self.step);
                self.runs -= 1;
                self.done = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn every_line_is_fetched_in_time(
            start in 0usize..200, (inner, outer) in (0usize..80, 0usize..80), apart in 0usize..300, along: bool,
            from in (0usize..9, 0usize..9), times in 1usize..70,
        ) {
            let size = 4;
            let run = size * (from.0 + inner).max(from.1 + outer);
            let (inner_step, outer_step) = if along { (size, run + apart * size) } else { (run + apart * size, size) };
            let data = (4096 + start * size) as *const u8;
            let operand = Operand { data, inner: inner_step, outer: outer_step, len: from.0 + inner };
            let (units, columns) = (from.0..from.0 + inner, from.1..from.1 + outer);
            let mut prefetcher = Prefetcher::of(&operand, size, units.clone(), columns.clone(), times);
            let mut fetched = Vec::new();
            (0..times).for_each(|_| prefetcher.lines(|line| fetched.push(line)));
            let mut wanted = Vec::new();
            for unit in units {
                for column in columns.clone() {
                    wanted.push((data as usize + unit * inner_step + column * outer_step) / LINE * LINE);
                }
            }
            wanted.sort_unstable();
            wanted.dedup();
            fetched.sort_unstable();
            fetched.dedup();
            prop_assert_eq!(fetched, wanted);
        }
    }
}
