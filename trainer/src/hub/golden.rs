//! Folders of every family that transformers wrote, compared with what transformers computed:
//! logits, chosen experts, the loss, gradients, and weights after three clipped AdamW steps.
//! `scripts/golden/families.py` writes them.

use super::{folder::TensorTable, model_folder::ModelFolder, reader::FolderReader};
use crate::{
    BuildContext, Model, ModelPart, Optimizer, Parameters, ProcessGroups, StageRanks,
    config::{Dtype, OptimizerConfig},
    families::Family,
    hub::{encoding::LogicalTable, mapping::Mapping},
};
use checkpoint::TensorSlice;
use moe::balance::BatchTotals;
use parallel::{Communicator, Cpu, GradientBuckets, Local, Replication};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tch::{Kind, Tensor};

/// Largest difference of gradients, relative to the largest value.
const GRADIENTS: f64 = 1e-4;
/// Largest such difference of weights after three steps.
const WEIGHTS: f64 = 1e-3;

pub(super) fn families() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families")
}

/// Folders of models that moerun refuses: OLMo 3 scales the frequencies of some layers only.
const REFUSED: [&str; 1] = ["olmo3"];

/// Returns the names of all folders with the results of a training step that moerun can compute.
pub(super) fn names() -> Vec<String> {
    let folders = std::fs::read_dir(families()).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let has_results = entry.path().join("outputs.safetensors").exists();
        has_results.then(|| entry.file_name().into_string().unwrap())
    };
    let mut names: Vec<String> = folders.filter_map(name).collect();
    names.retain(|name| !REFUSED.contains(&name.as_str()));
    names.sort();
    names
}

struct Results {
    path: PathBuf,
}

impl Results {
    fn tensor(&self, name: &str) -> Tensor {
        let found = self.find(name);
        found.unwrap_or_else(|| panic!("{}: no {name}", self.path.display()))
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let bytes = std::fs::read(&self.path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => Kind::Float,
            safetensors::Dtype::I64 => Kind::Int64,
            other => panic!("{name} is {other:?}"),
        };
        Some(Tensor::from_data_size(view.data(), &shape, kind))
    }
}

/// Returns a reader of a file with tensors under the names of a folder.
fn reader_of(folder: &ModelFolder, file: &Path) -> FolderReader {
    let as_folder = tempfile::tempdir().unwrap();
    std::fs::copy(file, as_folder.path().join("model.safetensors")).unwrap();
    let table = TensorTable::read(as_folder.path()).unwrap();
    let table = LogicalTable::new(table, &folder.config).unwrap();
    let has = |name: &str| table.tensors.contains_key(name);
    let mapping = Mapping::new(folder.family, folder.model(), &has).unwrap();
    FolderReader { mapping, table }
}

impl FolderReader {
    fn has(&self, name: &str) -> bool {
        let tensor = self.mapping.tensor(name);
        tensor.is_some_and(|tensor| {
            let mut pieces = tensor.pieces.iter();
            pieces.all(|piece| self.table.tensors.contains_key(&piece.name))
        })
    }
}

/// Returns the largest difference over the largest value.
fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let largest = theirs.abs().max().double_value(&[]);
    (ours - theirs).abs().max().double_value(&[]) / largest.max(1e-12)
}

/// Compares tensors of the model with those of a file.
fn assert_equal<'a>(
    what: &str,
    tensors: impl Iterator<Item = (TensorSlice, Tensor)> + 'a,
    file: &FolderReader,
    tolerance: f64,
) {
    for (slice, ours) in tensors {
        // Rounding alone decides what these become, so their file leaves them out.
        let is_left_out = !file.has(&slice.name);
        if is_left_out && slice.name.ends_with("key_bias") {
            continue;
        }
        let theirs = Tensor::zeros_like(&ours);
        file.read_into(&slice, &theirs).unwrap();
        let worst = difference(&ours, &theirs);
        assert!(
            worst < tolerance,
            "{what} of {} differs by {worst}",
            slice.name
        );
    }
}

fn optimizer(parameters: &Parameters) -> Optimizer {
    let settings = OptimizerConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    };
    let world: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
    let ranks = StageRanks::alone();
    Optimizer::new(&settings, 1.0, parameters, &Cpu, world, ranks).unwrap()
}

fn check(name: &str) {
    let golden = families().join(name);
    let folder = ModelFolder::open(&golden.join("model")).unwrap();
    let results = Results {
        path: golden.join("outputs.safetensors"),
    };
    let input_ids = results.tensor("input_ids");
    let (batch, length) = input_ids.size2().unwrap();
    let groups = ProcessGroups::single_rank();
    let ctx = BuildContext::single_rank(length as usize, Dtype::Fp32, &Cpu, &groups);
    let config = folder.model();
    let model = Model::new(config, ModelPart::whole(config.layers), &ctx);
    folder.load(&model, &|_, _| ()).unwrap();
    let labels = input_ids.roll([-1], [1]);
    let _ = labels.narrow(1, length - 1, 1).fill_(-100);
    let counted = labels.not_equal(-100).sum(Kind::Int64);
    let totals = BatchTotals {
        groups: 1.0,
        positions: labels.numel() as f64,
        counted_tokens: counted.int64_value(&[]) as f64,
        counts_le: None,
    };
    let parameters = &model.parameters;
    let weights: Vec<_> = parameters.iter().map(|p| (p.weight.clone(), 0)).collect();
    let single = [Replication::alone()];
    let gradients = GradientBuckets::new(&weights, &single, 1 << 20, true, &Cpu).unwrap();
    let mut optimizer = optimizer(parameters);
    for step in 1..=3 {
        gradients.begin(1);
        let output = model.forward(&input_ids).unwrap();
        let losses = model.losses(&output, &labels, &totals).unwrap();
        losses.total.backward();
        gradients.finish().unwrap();
        let norm = optimizer.grad_norm(parameters, &gradients).unwrap();
        if step == 1 {
            let logits = model.logits(&output.hidden_td).view([batch, length, -1]);
            let worst = difference(&logits, &results.tensor("logits"));
            assert!(worst < 1e-5, "logits differ by {worst}");
            let moe_layers = (0..config.layers).filter(|&layer| config.moe_config(layer).is_some());
            for (layer, stats) in moe_layers.zip(&output.stats) {
                let (ours, _) = stats.experts_tk.to_kind(Kind::Int64).sort(1, false);
                let theirs = results.tensor(&format!("router_ids.{layer}"));
                assert_eq!(ours, theirs, "experts of layer {layer}");
            }
            for (figure, ours) in [
                ("loss", losses.cross_entropy.double_value(&[])),
                ("grad_norm", norm),
            ] {
                let theirs = results.tensor(figure).double_value(&[0]);
                assert!(
                    (ours - theirs).abs() < 1e-5 * theirs,
                    "{figure}: {ours}, {theirs}"
                );
            }
            let file = reader_of(&folder, &golden.join("gradients.safetensors"));
            let ours = parameters
                .iter()
                .enumerate()
                .flat_map(|(index, parameter)| parameter.slices(&gradients.gradient(index)));
            assert_equal("the gradient", ours, &file, GRADIENTS);
        }
        optimizer
            .step(parameters, &gradients, step, 1e-2, norm, &Cpu)
            .unwrap();
    }
    let file = reader_of(&folder, &golden.join("after.safetensors"));
    let ours = parameters
        .iter()
        .flat_map(|parameter| parameter.slices(&parameter.master));
    assert_equal("the updated weight", ours, &file, WEIGHTS);
}

#[test]
fn folders_compute_what_transformers_computes() {
    let names = names();
    assert!(names.len() >= Family::ALL.len());
    let failed = names
        .iter()
        .filter(|name| !REFUSED.contains(&name.as_str()));
    let failed = failed.filter(|name| {
        eprintln!("{name}");
        std::panic::catch_unwind(|| check(name)).is_err()
    });
    let failed: Vec<&String> = failed.collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn models_that_moerun_cannot_compute_are_refused() {
    for name in REFUSED {
        let refused = ModelFolder::open(&families().join(name).join("model"));
        let message = refused.err().unwrap().to_string();
        assert!(
            message.ends_with(
                "config.json: rope_parameters.sliding_attention: moerun needs the same rotary \
                 embedding as for full_attention"
            ),
            "{message}"
        );
    }
}

#[test]
fn stacks_of_experts_are_those_of_single_ones() {
    let split = ModelFolder::open(&families().join("qwen3_moe/model")).unwrap();
    let stacked = ModelFolder::open(&families().join("qwen3_moe-fused/model")).unwrap();
    for tensor in &split.reader.mapping.tensors {
        let shape: Vec<i64> = tensor.shape.iter().map(|&size| size as i64).collect();
        let slice = TensorSlice::whole(&tensor.name, &shape);
        let [one, other] = [&split, &stacked].map(|folder| {
            let values = Tensor::zeros(&shape, (Kind::Float, tch::Device::Cpu));
            folder.reader.read_into(&slice, &values).unwrap();
            values
        });
        assert_eq!(one, other, "{}", tensor.name);
    }
}
