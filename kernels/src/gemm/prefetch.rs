//! The prefetch of what is packed next, a few cache lines per tile.
//!
//! Packing is bound by memory bandwidth, which tiles leave unused.

use super::kernel::{CacheLine, Operand};
use std::{
    arch::x86_64::{_MM_HINT_T1, _mm_prefetch},
    ops::Range,
};

const LINE: usize = size_of::<CacheLine>();

/// A prefetcher of equally spaced runs of memory.
pub(super) struct Prefetcher {
    /// Address of the current run.
    start: usize,
    /// Bytes of the current run that are already prefetched.
    done: usize,
    /// Bytes of a run.
    run: usize,
    /// Number of remaining runs, including the current one.
    runs: usize,
    /// Bytes from one run to the next.
    step: usize,
    lines_per_call: usize,
}

impl Prefetcher {
    /// Returns a prefetcher of a part of a right matrix, in `times` calls. An element has `size`
    /// bytes.
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
        // An empty run has no line; any other may start inside a line and so touch one more.
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

    /// Prefetches the next lines.
    #[inline]
    pub(super) fn fetch(&mut self) {
        // SAFETY: a prefetch may use any address.
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
            start in 0usize..200,
            inner in 0usize..80,
            outer in 0usize..80,
            gap in 0usize..300,
            contiguous: bool,
            from in [0usize..9, 0usize..9],
            times in 1usize..70,
        ) {
            let size = 4;
            let run = size * (from[0] + inner).max(from[1] + outer);
            let step = run + gap * size;
            let operand = Operand {
                data: (4096 + start * size) as *const u8,
                inner: if contiguous { size } else { step },
                outer: if contiguous { step } else { size },
                len: from[0] + inner,
            };
            let units = from[0]..from[0] + inner;
            let columns = from[1]..from[1] + outer;
            let mut prefetcher =
                Prefetcher::of(&operand, size, units.clone(), columns.clone(), times);
            let mut fetched = Vec::new();
            for _ in 0..times {
                prefetcher.lines(|line| fetched.push(line));
            }
            let mut wanted = Vec::new();
            for unit in units {
                for column in columns.clone() {
                    let offset = unit * operand.inner + column * operand.outer;
                    wanted.push((operand.data as usize + offset) / LINE * LINE);
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
