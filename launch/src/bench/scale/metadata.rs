//! Metadata of snapshots: messages about them, the launcher's memory of all keepers' answers, and
//! the heads of all ranks' parts, made up, parsed and assembled as each rank of a restart does if
//! its layout has changed.

use super::{Origin, Series, reference};
use anyhow::{Context, Result, bail};
use checkpoint::{
    Checkpoint, Error, ImageHeader, ImageLayout, TensorSlice, keeper::message_bytes::SimulatedRun,
};
use serde_json::Value;
use std::{io, path::Path, time::Instant};
use tch::Kind;

/// Slices in the head of a rank: the parameters of four layers.
const SLICES_PER_RANK: usize = 52;

/// Rows of a tensor that a rank holds.
const ROWS_PER_RANK: i64 = 4;

const COLUMNS: i64 = 64;

/// The tensors of a stage, which its ranks split by rows.
struct Stage {
    number: usize,
    ranks: usize,
}

const MIB: f64 = (1u64 << 20) as f64;

/// Bytes of saved state for each rank: those of 780 billion parameters on 4,096.
const STATE_PER_RANK: u64 = 2_300_000_000;

/// Prints the lengths of messages about snapshots, and the costs of all keepers' answers for the
/// launcher.
pub(super) fn messages(sizes: &[usize]) -> Result<()> {
    let mut commit = Series::new("bytes of a commit to a keeper", "N", "bytes");
    let mut inventory = Series::new("bytes of a keeper's inventory", "N", "bytes");
    let mut seconds = Series::new("time to decode all inventories", "N x K", "s");
    let mut memory = Series::new("memory of all inventories at the launcher", "N + K", "MiB");
    for &ranks in sizes {
        let run = SimulatedRun {
            ranks,
            ranks_per_node: reference::RANKS_PER_MACHINE,
            state_bytes: STATE_PER_RANK * ranks as u64,
        };
        let bytes = run.message_bytes()?;
        commit.print(ranks, bytes.commit as f64, Origin::Simulated);
        inventory.print(ranks, bytes.inventory as f64, Origin::Simulated);
        let before = resident_bytes()?;
        let mut inventories = Vec::new();
        let time = run.receive_inventories(|inventory| inventories.push(inventory))?;
        seconds.print(ranks, time.as_secs_f64(), Origin::Simulated);
        let grown = resident_bytes()?.saturating_sub(before);
        memory.print(ranks, grown as f64 / MIB, Origin::Simulated);
    }
    Ok(())
}

/// Returns the memory of this process in bytes.
fn resident_bytes() -> Result<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").context("cannot read memory use")?;
    let resident = pages.split_whitespace().nth(1);
    let resident: Option<u64> = resident.and_then(|pages| pages.parse().ok());
    Ok(resident.context("cannot read memory use")? * rustix::param::page_size() as u64)
}

/// Prints the costs of the heads of all ranks.
pub(super) fn restart(sizes: &[usize]) -> Result<()> {
    let mut bytes = Series::new("bytes of all heads", "N x slices of a rank", "bytes");
    let mut parse = Series::new("time to parse all heads", "N x slices of a rank", "s");
    let mut assemble = Series::new("time to assemble all heads", "N x slices of a rank", "s");
    for &ranks in sizes {
        let texts = heads(ranks)?;
        let total: usize = texts.iter().map(Vec::len).sum();
        bytes.print(ranks, total as f64, Origin::Simulated);
        let begun = Instant::now();
        let headers = texts
            .iter()
            .map(|text| ImageHeader::read(text, Path::new("bench scale")));
        let headers = headers.collect::<Result<Vec<_>, Error>>()?;
        parse.print(ranks, begun.elapsed().as_secs_f64(), Origin::Simulated);
        drop(texts);
        let begun = Instant::now();
        let no_part = |rank: usize| {
            let path = format!("part {rank}");
            let cause = io::Error::from(io::ErrorKind::NotFound);
            Err(Error::Io {
                action: "cannot open",
                path,
                cause,
            })
        };
        Checkpoint::from_parts("bench scale", 1, headers, Box::new(no_part))?;
        assemble.print(ranks, begun.elapsed().as_secs_f64(), Origin::Simulated);
    }
    Ok(())
}

/// Returns the heads of all ranks' parts.
fn heads(ranks: usize) -> Result<Vec<Vec<u8>>> {
    let mesh = reference::config(ranks)?.mesh(0, ranks);
    let mesh = mesh.map_err(|error| anyhow::anyhow!(error))?;
    let stages = mesh.shape().pipeline;
    if !ranks.is_multiple_of(stages) {
        bail!("{ranks} ranks do not divide into {stages} stages");
    }
    let mut heads = Vec::new();
    for number in 0..stages {
        let stage = Stage {
            number,
            ranks: ranks / stages,
        };
        for rank in 0..stage.ranks {
            heads.push(stage.head(rank, stages)?);
        }
    }
    Ok(heads)
}

impl Stage {
    fn head(&self, rank: usize, stages: usize) -> Result<Vec<u8>, Error> {
        let slice = |number: usize| {
            let slice = TensorSlice {
                name: format!("layers.{}.weight.{number}", self.number),
                global_shape: vec![ROWS_PER_RANK * self.ranks as i64, COLUMNS],
                offset: vec![ROWS_PER_RANK * rank as i64, 0],
                shape: vec![ROWS_PER_RANK, COLUMNS],
            };
            (slice, Kind::Float)
        };
        let held: Vec<_> = (0..SLICES_PER_RANK).map(slice).collect();
        let tensors = SLICES_PER_RANK * stages;
        ImageLayout::plan(&held, tensors, &[], &Value::Null)?.encode_header(&Value::Null)
    }
}
