//! The division of a batch of GEMMs among threads, as a pure function of their sizes.

use super::kernel::{LANES, ROWS};
use std::ops::Range;

/// Columns per block, so that the packed right matrix of a block fits the L2 cache.
const WIDTH: usize = 256;
/// Multiplications that are worth a thread.
const GRAIN: usize = 1 << 18;
/// Blocks per thread from which threads compute whole blocks.
const BLOCKS_PER_THREAD: usize = 4;
/// Parts per thread, so that other threads take over the parts of a delayed one.
const PARTS_PER_THREAD: usize = 8;
/// Most elements of right matrices that a wave packs.
const MAX_PACKED: usize = 1 << 20;

/// The rows `m`, inner dimension `k` and columns `n` of a GEMM.
#[derive(Debug, Clone, Copy)]
pub(super) struct GemmSize {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
}

impl GemmSize {
    fn multiplications(self) -> usize {
        self.m * self.k * self.n
    }

    fn is_empty(self) -> bool {
        self.m == 0 || self.n == 0
    }

    pub(super) fn panels(self) -> usize {
        self.m.div_ceil(ROWS)
    }
}

/// A range of a task's columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) task: usize,
    pub(super) columns: Range<usize>,
}

impl Block {
    /// Returns the number of columns, rounded up to whole lines.
    pub(super) fn padded(&self) -> usize {
        self.columns.len().next_multiple_of(LANES)
    }
}

/// Consecutive panels of [`ROWS`] rows of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockPanels {
    /// Index of the block in its wave.
    pub(super) block: usize,
    pub(super) panels: Range<usize>,
}

/// Blocks whose right matrices all threads pack together before any thread uses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wave {
    pub(super) blocks: Vec<Block>,
    /// Parts of about equal work; each thread takes the next part when it is free.
    pub(super) parts: Vec<Vec<BlockPanels>>,
}

/// The assignment of work to threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Partition {
    /// Each thread takes the next whole block when it is free.
    PerThread(Vec<Block>),
    /// Threads share the blocks of one wave after another.
    Cooperative(Vec<Wave>),
}

/// Divides GEMMs of these sizes among `threads` threads.
pub(super) fn partition(sizes: &[GemmSize], threads: usize) -> Partition {
    let total = sizes
        .iter()
        .map(|size| size.multiplications())
        .sum::<usize>();
    let threads = threads.min(total.div_ceil(GRAIN)).max(1);
    let limit = if threads == 1 {
        total
    } else {
        total / (threads * BLOCKS_PER_THREAD)
    };
    let is_small = |block: &Block| {
        let size = GemmSize {
            n: block.columns.len(),
            ..sizes[block.task]
        };
        size.multiplications() <= limit
    };
    let mut candidates = [WIDTH, WIDTH / 2]
        .into_iter()
        .map(|width| blocks(sizes, width));
    match candidates.find(|blocks| blocks.iter().all(is_small)) {
        Some(blocks) => Partition::PerThread(blocks),
        None => Partition::Cooperative(waves(sizes, threads, total)),
    }
}

fn blocks(sizes: &[GemmSize], width: usize) -> Vec<Block> {
    let mut all = Vec::new();
    for (task, size) in sizes.iter().enumerate() {
        if !size.is_empty() {
            all.extend(blocks_of(task, size.n, width));
        }
    }
    all
}

/// Divides the `n` columns of a task into blocks of `width` columns.
fn blocks_of(task: usize, n: usize, width: usize) -> impl Iterator<Item = Block> {
    (0..n).step_by(width).map(move |start| Block {
        task,
        columns: start..(start + width).min(n),
    })
}

fn waves(sizes: &[GemmSize], threads: usize, total: usize) -> Vec<Wave> {
    let count = (threads * PARTS_PER_THREAD).min(total / GRAIN).max(threads);
    let mut waves = Vec::new();
    let mut blocks = Vec::new();
    let mut packed = 0;
    for (task, size) in sizes.iter().enumerate() {
        if size.is_empty() {
            continue;
        }
        // Narrow blocks give every thread work if there is little of it.
        let width = if size.panels() * size.n.div_ceil(WIDTH) < count {
            WIDTH / 4
        } else {
            WIDTH
        };
        for block in blocks_of(task, size.n, width) {
            let elements = size.k * block.padded();
            if packed > 0 && packed + elements > MAX_PACKED {
                waves.push(wave(std::mem::take(&mut blocks), sizes, count));
                packed = 0;
            }
            packed += elements;
            blocks.push(block);
        }
    }
    if !blocks.is_empty() {
        waves.push(wave(blocks, sizes, count));
    }
    waves
}

fn wave(blocks: Vec<Block>, sizes: &[GemmSize], count: usize) -> Wave {
    // Work is counted in multiplications per row of a panel.
    let panel_cost = |block: &Block| (sizes[block.task].k * block.columns.len()).max(1);
    let panels = |block: &Block| sizes[block.task].panels();
    let total: usize = blocks
        .iter()
        .map(|block| panels(block) * panel_cost(block))
        .sum();
    let mut parts = vec![Vec::new(); count];
    let mut before = 0;
    for (index, block) in blocks.iter().enumerate() {
        let cost = panel_cost(block);
        let panels = panels(block);
        // Returns the first panel at or after a point of the work.
        let panel_at = |point: usize| {
            let inside = point.saturating_sub(before);
            inside.div_ceil(cost).min(panels)
        };
        for (part, pieces) in parts.iter_mut().enumerate() {
            let start = panel_at(total * part / count);
            let end = panel_at(total * (part + 1) / count);
            if start < end {
                pieces.push(BlockPanels {
                    block: index,
                    panels: start..end,
                });
            }
        }
        before += panels * cost;
    }
    Wave { blocks, parts }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_tile_has_one_thread(
            sizes in proptest::collection::vec([0usize..700, 0usize..3000, 0usize..900], 0..9),
            threads in 1usize..9,
        ) {
            let sizes: Vec<GemmSize> = sizes
                .into_iter()
                .map(|[m, k, n]| GemmSize { m, k, n })
                .collect();
            let mut seen: Vec<Vec<u8>> = sizes
                .iter()
                .map(|size| vec![0; size.panels() * size.n])
                .collect();
            let mut see = |block: &Block, panels: Range<usize>| {
                let n = sizes[block.task].n;
                for panel in panels {
                    for column in block.columns.clone() {
                        seen[block.task][panel * n + column] += 1;
                    }
                }
            };
            match partition(&sizes, threads) {
                Partition::PerThread(blocks) => {
                    let mut costs = Vec::new();
                    for block in &blocks {
                        let size = sizes[block.task];
                        see(block, 0..size.panels());
                        costs.push(size.m * size.k * block.columns.len());
                    }
                    // No block is so large that the other threads wait for it at the end.
                    let total: usize = costs.iter().sum();
                    let most = total / (2 * BLOCKS_PER_THREAD);
                    let fair = costs
                        .iter()
                        .all(|&cost| cost <= most);
                    prop_assert!(total <= GRAIN || threads == 1 || fair);
                }
                Partition::Cooperative(waves) => {
                    for Wave { blocks, parts } in waves {
                        let cost =
                            |block: &Block, width: usize| (sizes[block.task].k * width).max(1);
                        let mut work = Vec::new();
                        for pieces in &parts {
                            let mut sum = 0;
                            for BlockPanels { block, panels } in pieces {
                                let block = &blocks[*block];
                                see(block, panels.clone());
                                sum += cost(block, block.columns.len()) * panels.len();
                            }
                            work.push(sum);
                        }
                        // No part exceeds its fair share by more than a panel.
                        let panel = blocks
                            .iter()
                            .map(|block| cost(block, WIDTH))
                            .max();
                        let most = work
                            .iter()
                            .sum::<usize>()
                            .div_ceil(parts.len())
                            + panel.unwrap_or(0);
                        prop_assert!(work.iter().all(|&sum| sum <= most), "{work:?}");
                        // A wave packs at most the limit, unless it has only one block to pack.
                        let packed: Vec<usize> = blocks
                            .iter()
                            .map(|block| sizes[block.task].k * block.padded())
                            .filter(|&packed| packed > 0)
                            .collect();
                        let total: usize = packed.iter().sum();
                        prop_assert!(total <= MAX_PACKED || packed.len() == 1);
                    }
                }
            }
            prop_assert!(
                seen.iter()
                    .flatten()
                    .all(|&times| times == 1)
            );
        }
    }
}
