//! Saves a matrix from two ranks and loads it for three: a checkpoint does not depend on the layout.

use anyhow::Result;
use checkpoint::{Checkpoint, Staging, TensorSlice, list};
use std::path::Path;
use tch::{Kind, Tensor};

const ROWS: i64 = 6;
const COLUMNS: i64 = 4;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 2)?;
    for (rank, rows) in load(folder.path(), 3)?.into_iter().enumerate() {
        println!("rank {rank} of 3 loads {:?}: {rows}", rows.size());
    }
    Ok(())
}

/// Returns the rows of `rank` when `ranks` ranks split the matrix evenly.
fn rows_of(rank: i64, ranks: i64) -> TensorSlice {
    let rows = ROWS / ranks;
    TensorSlice {
        offset: vec![rank * rows, 0],
        shape: vec![rows, COLUMNS],
        ..TensorSlice::whole("weight", &[ROWS, COLUMNS])
    }
}

fn save(root: &Path, ranks: i64) -> Result<()> {
    let weight = Tensor::arange(ROWS * COLUMNS, (Kind::Float, tch::Device::Cpu));
    let weight = weight.view([ROWS, COLUMNS]);
    let staging = Staging::new(root, 1);
    staging.begin()?;
    let mut shards = Vec::new();
    for rank in 0..ranks {
        let slice = rows_of(rank, ranks);
        let values = weight.narrow(0, slice.offset[0], slice.shape[0]).copy();
        shards.push(staging.write_shard(rank as usize, vec![(slice, values)])?);
    }
    staging.commit(shards, 1, serde_json::json!({"step": 1}))?;
    Ok(())
}

fn load(root: &Path, ranks: i64) -> Result<Vec<Tensor>> {
    let mut checkpoint = Checkpoint::open(&list(root)?[0])?;
    let mut parts = Vec::new();
    for rank in 0..ranks {
        parts.push(checkpoint.tensor(&rows_of(rank, ranks))?);
    }
    Ok(parts)
}

#[test]
fn three_ranks_read_what_two_ranks_wrote() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 2).unwrap();
    let whole = Tensor::cat(&load(folder.path(), 3).unwrap(), 0);
    let expected = Tensor::arange(ROWS * COLUMNS, (Kind::Float, tch::Device::Cpu));
    assert_eq!(whole.view([-1]), expected);
}
