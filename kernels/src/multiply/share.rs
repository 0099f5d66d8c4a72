//! How the tiles of several products are shared out: a pure function of their sizes.

use super::ROWS;
use std::ops::Range;

/// Columns that are worked on together: what is packed of the right matrix for them stays in a processor's second cache.
pub(super) const WIDTH: usize = 256;
/// Multiplications that are worth a thread.
const GRAIN: usize = 1 << 18;
/// Parts for each thread: one that was held up leaves the rest of its parts to others.
const PARTS: usize = 4;

/// Rows, inner dimension and columns of a product.
pub(super) type Size = (usize, usize, usize);

/// Neighbouring panels of [`ROWS`] rows of one product, for some of its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) product: usize,
    pub(super) columns: Range<usize>,
    pub(super) panels: Range<usize>,
}

/// The parts, of about equal work, in which `threads` threads go through all products.
pub(super) fn share(sizes: &[Size], threads: usize) -> Vec<Vec<Piece>> {
    let total: usize = sizes.iter().map(|(m, k, n)| m * k * n).sum();
    let threads = threads.min(total.div_ceil(GRAIN)).max(1);
    let count = if threads == 1 { 1 } else { (threads * PARTS).min(total / GRAIN).max(threads) };
    // Work is counted in panels times the inner dimension times columns.
    let blocks = || {
        sizes.iter().enumerate().flat_map(|(product, &(m, k, n))| {
            // Few columns in all are divided so that every thread has some.
            let width = if m.div_ceil(ROWS) * n.div_ceil(WIDTH) < count { WIDTH / 4 } else { WIDTH };
            (0..n).step_by(width).map(move |start| {
                let columns = start..(start + width).min(n);
                (product, columns.clone(), m.div_ceil(ROWS), k * columns.len())
            })
        })
    };
    let all: usize = blocks().map(|(_, _, panels, cost)| panels * cost).sum();
    let mut parts = vec![Vec::new(); count];
    let mut before = 0;
    for (product, columns, panels, cost) in blocks() {
        // The first panel at or after a point of the work.
        let panel_at = |point: usize| (point.saturating_sub(before)).div_ceil(cost.max(1)).min(panels);
        for (part, pieces) in parts.iter_mut().enumerate() {
            let panels = panel_at(all * part / count)..panel_at(all * (part + 1) / count);
            if !panels.is_empty() {
                pieces.push(Piece { product, columns: columns.clone(), panels });
            }
        }
        before += panels * cost;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_tile_is_somebodys(
            sizes in proptest::collection::vec((0usize..700, 1usize..900, 1usize..600), 0..9), threads in 1usize..9,
        ) {
            let parts = share(&sizes, threads);
            let mut seen: Vec<Vec<u8>> = sizes.iter().map(|(m, _, n)| vec![0; m.div_ceil(ROWS) * n]).collect();
            let mut work = Vec::new();
            for pieces in &parts {
                let mut here = 0;
                for Piece { product, columns, panels } in pieces {
                    let (_, k, n) = sizes[*product];
                    here += k * columns.len() * panels.len();
                    for panel in panels.clone() {
                        columns.clone().for_each(|column| seen[*product][panel * n + column] += 1);
                    }
                }
                work.push(here);
            }
            prop_assert!(seen.iter().flatten().all(|&times| times == 1));
            // Nobody has more than his share and a panel.
            let panel = sizes.iter().map(|(_, k, _)| k * WIDTH).max().unwrap_or(0);
            let fair = work.iter().sum::<usize>().div_ceil(parts.len());
            prop_assert!(work.iter().all(|&here| here <= fair + panel), "{:?}", work);
        }
    }
}
