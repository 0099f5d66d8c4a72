//! A folder of a chosen size in the form of Qwen3-MoE, and its import and export without a run.

use crate::{
    Error,
    config::{Dtype, ModelConfig, MoeConfig, QkNorm},
    families::expression::express,
    hub::{
        export::{ExportOptions, Form, write_folder},
        model_folder::ModelFolder,
        values::ModelValues,
    },
    model::{Share, decoder::model_specs, position::ShardPosition, spec::Stack},
};
use checkpoint::{TensorSlice, advise_huge_pages};
use parallel::own_rows;
use safetensors::Dtype as StoredDtype;
use std::{
    path::{Path, PathBuf},
    time::Instant,
};
use tch::{Device, Kind, Tensor};

/// Sizes of the model, except for its layers.
const VOCABULARY: usize = 32_768;
const HIDDEN: usize = 2048;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const EXPERTS: usize = 64;
const FFN: usize = 768;

/// The part of a folder that a rank read.
#[derive(Debug, Clone, Copy)]
pub struct ReadPart {
    /// Bytes of the values in bf16.
    pub bytes: u64,
    /// Seconds from opening the folder to the last value.
    pub seconds: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_resident: u64,
    /// Bytes of the rank's weights in memory, those that other ranks read for it included.
    pub weights: u64,
}

fn model(layers: usize) -> ModelConfig {
    ModelConfig {
        kv_heads: Some(KV_HEADS),
        head_dim: Some(HIDDEN / HEADS),
        qk_norm: QkNorm::Head,
        moe: Some(MoeConfig::new(EXPERTS, 8, FFN)),
        ..ModelConfig::new(VOCABULARY, HIDDEN, layers, HEADS)
    }
}

/// Values that cost nothing to make: reading and writing do not depend on them.
struct Constant;

impl ModelValues for Constant {
    fn values(&self, slice: &TensorSlice, _is_selection_bias: bool) -> Result<Tensor, Error> {
        let options = (Kind::BFloat16, Device::Cpu);
        Ok(Tensor::full(slice.shape.as_slice(), 0.01, options))
    }
}

fn options(output: &Path) -> ExportOptions {
    ExportOptions {
        checkpoint: PathBuf::new(),
        output: output.to_path_buf(),
        dtype: Some(Dtype::Bf16),
        source: None,
        shard_bytes: None,
    }
}

/// Writes a folder of about `bytes` in bf16, and returns their number.
///
/// # Errors
/// If a file cannot be written.
pub fn write_synthetic_folder(folder: &Path, bytes: u64) -> Result<u64, Error> {
    let of_layers = |layers| 2 * model(layers).num_parameters().total as u64;
    let of_layer = of_layers(2) - of_layers(1);
    let layers = (bytes.saturating_sub(of_layers(0)) / of_layer).max(1) as usize;
    let model = model(layers);
    let (family, config) = express(&model)?;
    let form = Form::without_tokenizer(family, config, StoredDtype::BF16);
    let report = write_folder(&options(folder), &Constant, &model, None, &form, &|_, _| ())?;
    Ok(report.bytes)
}

/// Use that a rank makes of the memory of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartAction {
    /// Reads its part of the folder.
    Read,
    /// Only writes zeros: no import can take less time for memory that was never used.
    Fill,
}

/// Reads what rank `rank` of `ranks` reads of a folder if they divide the experts: its experts, and
/// its share of all other rows. The values become those of `dtype`.
///
/// # Errors
/// If the folder is damaged.
pub fn read_part(
    folder: &Path,
    rank: usize,
    ranks: usize,
    dtype: Dtype,
    action: PartAction,
) -> Result<ReadPart, Error> {
    let kind = dtype.kind();
    let started = Instant::now();
    let folder = ModelFolder::open(folder)?;
    let mut position = ShardPosition::alone();
    position.expert = Share { rank, ranks };
    let mut targets = Vec::new();
    let mut from_others = Vec::new();
    let mut bytes = 0;
    let mut weights = 0;
    for spec in model_specs(folder.model()) {
        let experts: Vec<usize> = spec.own_experts(&position).collect();
        for slice in spec.slices(&position, &experts) {
            let whole = Tensor::empty(slice.shape.as_slice(), (kind, Device::Cpu));
            weights += (kind.elt_size_in_bytes() * whole.numel()) as u64;
            let rows = match spec.stack {
                Stack::Experts(_) => 0..slice.shape[0],
                Stack::Single | Stack::GroupOfOne => own_rows(slice.shape[0], rank, ranks),
            };
            let count = rows.end - rows.start;
            if count == 0 {
                continue;
            }
            let part = whole.narrow(0, rows.start, count);
            let after = rows.start + count;
            from_others.push(whole.narrow(0, 0, rows.start));
            from_others.push(whole.narrow(0, after, slice.shape[0] - after));
            bytes += 2 * part.numel() as u64;
            let mut of_part = slice;
            of_part.offset[0] += rows.start;
            of_part.shape[0] = count;
            targets.push((of_part, part));
        }
    }
    let kept: Vec<Tensor> = targets
        .iter()
        .map(|(_, part)| part.shallow_clone())
        .collect();
    match action {
        PartAction::Read => folder.read(targets, &|_, _| ())?,
        PartAction::Fill => {
            for part in &kept {
                advise_huge_pages(part);
                let _ = part.shallow_clone().zero_();
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    // Other ranks would send these.
    for part in &mut from_others {
        let _ = part.zero_();
    }
    let peak_resident = parallel::peak_resident()?;
    drop(kept);
    Ok(ReadPart {
        bytes,
        seconds,
        peak_resident,
        weights,
    })
}

/// Writes the model of a folder to another one, as an export does, and returns the seconds.
///
/// # Errors
/// If a file cannot be read or written.
pub fn rewrite_folder(folder: &Path, output: &Path) -> Result<f64, Error> {
    let started = Instant::now();
    let source = ModelFolder::open(folder)?;
    let form = Form::of_source(&source, None);
    let model = source.model();
    let values = &source.reader;
    write_folder(
        &options(output),
        values,
        model,
        Some(&source),
        &form,
        &|_, _| (),
    )?;
    Ok(started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_read_a_folder_once_together() {
        let folder = tempfile::tempdir().unwrap();
        let written = folder.path().join("written");
        // One layer is the smallest model.
        let bytes = write_synthetic_folder(&written, 1).unwrap();
        let parts =
            [0, 1].map(|rank| read_part(&written, rank, 2, Dtype::Bf16, PartAction::Read).unwrap());
        let read: u64 = parts.iter().map(|part| part.bytes).sum();
        let headers = bytes - read;
        assert!(headers < 1 << 20, "{read} of {bytes} bytes");
        let copy = folder.path().join("copy");
        rewrite_folder(&written, &copy).unwrap();
        let file = "model.safetensors";
        let [one, other] = [&written, &copy].map(|at| std::fs::read(at.join(file)).unwrap());
        assert!(one == other, "an export of the folder is the folder");
    }
}
