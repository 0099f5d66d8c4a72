//! How several products are made by several threads: a pure function of their sizes.

use super::kernel::{LANES, ROWS};
use std::ops::Range;

/// Columns that are worked on together: what is packed of the right matrix for them stays in a processor's second cache.
const WIDTH: usize = 256;
/// Multiplications that are worth a thread.
const GRAIN: usize = 1 << 18;
/// Blocks for each thread that are enough to make them whole.
const BLOCKS_PER_THREAD: usize = 4;
/// Parts for each thread: one that was held up leaves the rest of its parts to others.
const PARTS_PER_THREAD: usize = 8;
/// Numbers of right matrices that are packed before they are used.
const MAX_PACKED: usize = 1 << 20;

/// Rows, inner dimension and columns of a task.
pub(super) type Size = (usize, usize, usize);

/// Some columns of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) task: usize,
    pub(super) columns: Range<usize>,
}

impl Block {
    /// Its columns with those that fill up the last line.
    pub(super) fn padded(&self) -> usize {
        self.columns.len().next_multiple_of(LANES)
    }
}

/// Neighbouring panels of [`ROWS`] rows of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockPanels {
    /// Of its wave.
    pub(super) block: usize,
    pub(super) panels: Range<usize>,
}

/// Blocks whose right matrices are packed by all threads, for all of them, before any thread uses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wave {
    pub(super) blocks: Vec<Block>,
    /// Parts of about equal work, for whoever is free.
    pub(super) parts: Vec<Vec<BlockPanels>>,
}

/// Who makes what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Partition {
    /// Whole blocks, for whoever is free.
    PerThread(Vec<Block>),
    /// Parts of blocks, one wave after another.
    Cooperative(Vec<Wave>),
}

/// How `threads` threads make all products.
pub(super) fn partition(sizes: &[Size], threads: usize) -> Partition {
    let total: usize = sizes.iter().map(cost).sum();
    let threads = threads.min(total.div_ceil(GRAIN)).max(1);
    let limit = if threads == 1 {
        total
    } else {
        total / (threads * BLOCKS_PER_THREAD)
    };
    let small = |blocks: &Vec<Block>| {
        blocks.iter().all(|Block { task, columns }| {
            let (m, k, _) = sizes[*task];
            cost(&(m, k, columns.len())) <= limit
        })
    };
    match [WIDTH, WIDTH / 2]
        .into_iter()
        .map(|width| blocks(sizes, width))
        .find(small)
    {
        Some(blocks) => Partition::PerThread(blocks),
        None => Partition::Cooperative(waves(sizes, threads, total)),
    }
}

/// Multiplications.
fn cost((m, k, n): &Size) -> usize {
    m * k * n
}

fn blocks(sizes: &[Size], width: usize) -> Vec<Block> {
    let there = sizes.iter().enumerate().filter(|(_, (m, _, n))| m * n > 0);
    let of = |(task, &(_, _, n)): (usize, &Size)| {
        (0..n).step_by(width).map(move |start| Block {
            task,
            columns: start..(start + width).min(n),
        })
    };
    there.flat_map(of).collect()
}

/// For several threads.
fn waves(sizes: &[Size], threads: usize, total: usize) -> Vec<Wave> {
    let count = (threads * PARTS_PER_THREAD).min(total / GRAIN).max(threads);
    let mut waves = Vec::new();
    let mut blocks = Vec::new();
    let mut packed = 0;
    for (task, &(m, k, n)) in sizes.iter().enumerate().filter(|(_, (m, _, n))| m * n > 0) {
        // Few columns in all are divided so that every thread has some.
        let width = if m.div_ceil(ROWS) * n.div_ceil(WIDTH) < count {
            WIDTH / 4
        } else {
            WIDTH
        };
        for start in (0..n).step_by(width) {
            let block = Block {
                task,
                columns: start..(start + width).min(n),
            };
            let here = k * block.padded();
            if packed > 0 && packed + here > MAX_PACKED {
                waves.push(wave(std::mem::take(&mut blocks), sizes, count));
                packed = 0;
            }
            packed += here;
            blocks.push(block);
        }
    }
    if !blocks.is_empty() {
        waves.push(wave(blocks, sizes, count));
    }
    waves
}

fn wave(blocks: Vec<Block>, sizes: &[Size], count: usize) -> Wave {
    // Work is counted in panels times the inner dimension times columns.
    let work = |block: &Block| {
        let (m, k, _) = sizes[block.task];
        (m.div_ceil(ROWS), (k * block.columns.len()).max(1))
    };
    let all: usize = blocks
        .iter()
        .map(work)
        .map(|(panels, cost)| panels * cost)
        .sum();
    let mut parts = vec![Vec::new(); count];
    let mut before = 0;
    for (block, (panels, cost)) in blocks.iter().map(work).enumerate() {
        // The first panel at or after a point of the work.
        let panel_at = |point: usize| (point.saturating_sub(before)).div_ceil(cost).min(panels);
        for (part, pieces) in parts.iter_mut().enumerate() {
            let panels = panel_at(all * part / count)..panel_at(all * (part + 1) / count);
            if !panels.is_empty() {
                pieces.push(BlockPanels { block, panels });
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
        fn every_tile_is_somebodys(
            sizes in proptest::collection::vec((0usize..700, 0usize..3000, 0usize..900), 0..9), threads in 1usize..9,
        ) {
            let mut seen: Vec<Vec<u8>> = sizes.iter().map(|(m, _, n)| vec![0; m.div_ceil(ROWS) * n]).collect();
            let mut see = |block: &Block, panels: Range<usize>| {
                let n = sizes[block.task].2;
                for panel in panels {
                    block.columns.clone().for_each(|column| seen[block.task][panel * n + column] += 1);
                }
            };
            match partition(&sizes, threads) {
                Partition::PerThread(blocks) => {
                    let costs: Vec<usize> = blocks.iter().map(|block| {
                        let (m, k, _) = sizes[block.task];
                        see(block, 0..m.div_ceil(ROWS));
                        m * k * block.columns.len()
                    }).collect();
                    // Nobody waits for long for whoever was last.
                    let all: usize = costs.iter().sum();
                    prop_assert!(all <= GRAIN || threads == 1 || costs.iter().all(|&cost| cost * 2 * BLOCKS_PER_THREAD <= all));
                }
                Partition::Cooperative(waves) => for Wave { blocks, parts } in waves {
                    let mut work = Vec::new();
                    for pieces in &parts {
                        let mut here = 0;
                        for BlockPanels { block, panels } in pieces {
                            let block = &blocks[*block];
                            see(block, panels.clone());
                            here += (sizes[block.task].1 * block.columns.len()).max(1) * panels.len();
                        }
                        work.push(here);
                    }
                    // Nobody has more than his partition and a panel.
                    let panel = blocks.iter().map(|block| (sizes[block.task].1 * WIDTH).max(1)).max().unwrap_or(0);
                    let fair = work.iter().sum::<usize>().div_ceil(parts.len());
                    prop_assert!(work.iter().all(|&here| here <= fair + panel), "{:?}", work);
                    // No more is packed than is allowed, or one block needs.
                    let packed: Vec<usize> = blocks.iter().map(|block| sizes[block.task].1 * block.padded()).collect();
                    prop_assert!(packed.iter().sum::<usize>() <= MAX_PACKED || packed.iter().filter(|&&packed| packed > 0).count() == 1);
                },
            }
            prop_assert!(seen.iter().flatten().all(|&times| times == 1));
        }
    }
}
