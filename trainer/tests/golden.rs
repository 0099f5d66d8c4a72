//! Models compared with HF transformers: logits, losses, every gradient, and weights after clipped
//! AdamW steps. scripts/golden/models.py writes the golden files; each of them is tested.

use moe::balance::{BalanceScope, BatchTotals};
use parallel::{Accelerator, Communicator, GradientBuckets, Local, Replication};
use safetensors::SafeTensors;
use serde_json::Value;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use tch::{Kind, Tensor};
use trainer::{
    BuildContext, Losses, Model, ModelPart, Optimizer, Parameters, ProcessGroups, StageRanks,
    config::{DocumentRules, Dtype, ModelConfig, OptimizerConfig},
};

/// A golden file: tensors, and in its metadata the model and the tolerance of gradients.
struct Golden {
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
}

/// Returns the folder of the golden files.
fn folder() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let golden: PathBuf = std::env::var_os("MOERUN_TEST_GOLDEN").map_or(here, Into::into);
    golden.join("models")
}

/// Returns the names of all golden models.
fn names() -> Vec<String> {
    let files = std::fs::read_dir(folder()).unwrap();
    let name = |file: std::io::Result<std::fs::DirEntry>| {
        let file = file.unwrap().file_name().into_string().unwrap();
        Some(file.strip_suffix(".safetensors")?.to_string())
    };
    let mut names: Vec<String> = files.filter_map(name).collect();
    names.sort();
    names
}

impl Golden {
    fn open(name: &str) -> Golden {
        let path = folder().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = metadata.metadata().clone();
        Golden {
            bytes,
            metadata: metadata.expect("the file has metadata"),
        }
    }

    /// Returns the configuration of the model.
    fn config(&self) -> ModelConfig {
        serde_json::from_str(&self.metadata["model"]).unwrap()
    }

    /// Returns the rules of documents that share a sequence.
    fn documents(&self) -> Option<DocumentRules> {
        let rules: Value = serde_json::from_str(self.metadata.get("documents")?).unwrap();
        Some(DocumentRules {
            end: rules["end"].as_u64().unwrap() as u32,
            mask: rules["mask"].as_bool().unwrap(),
            reset_positions: rules["reset_positions"].as_bool().unwrap(),
        })
    }

    /// Returns the largest relative difference of a gradient.
    fn tolerance(&self) -> f64 {
        self.metadata["tolerance"].parse().unwrap()
    }

    fn tensor(&self, name: &str) -> Tensor {
        let found = self.find(name);
        found.unwrap_or_else(|| panic!("the golden file has no {name}"))
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => tch::Kind::Float,
            safetensors::Dtype::I64 => tch::Kind::Int64,
            other => panic!("{name} is {other:?}"),
        };
        Some(Tensor::from_data_size(view.data(), &shape, kind))
    }

    /// Returns the number of tensors of a kind.
    fn count(&self, kind: &str) -> usize {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let names = file.names();
        names.iter().filter(|name| name.starts_with(kind)).count()
    }
}

/// Returns the largest difference over the largest value.
fn difference(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.size(), golden.size());
    let ours = ours.to_device(golden.device());
    let largest = golden.abs().max().double_value(&[]);
    (ours - golden).abs().max().double_value(&[]) / largest.max(1e-12)
}

fn load_weights(model: &Model, golden: &Golden) {
    let mut loaded = 0;
    for parameter in model.parameters.iter() {
        for (slice, part) in parameter.slices(&parameter.master) {
            let value = golden.tensor(&format!("weight/{}", slice.name));
            tch::no_grad(|| part.shallow_clone().copy_(&value));
            loaded += 1;
        }
    }
    for (_, name, bias) in model.biases() {
        let value = golden.find(&format!("bias/{name}"));
        if let Some(value) = value {
            tch::no_grad(|| bias.shallow_clone().copy_(&value));
            loaded += 1;
        }
    }
    let stored = golden.count("weight/") + golden.count("bias/");
    assert_eq!(loaded, stored, "the model has every golden weight");
}

fn assert_gradients(model: &Model, gradients: &GradientBuckets, golden: &Golden, tolerance: f64) {
    for (index, parameter) in model.parameters.iter().enumerate() {
        for (slice, grad) in parameter.slices(&gradients.gradient(index)) {
            let expected = golden.tensor(&format!("grad/{}", slice.name));
            let worst = difference(&grad, &expected);
            let close = worst < tolerance;
            assert!(close, "the gradient of {slice:?} differs by {worst}");
        }
    }
}

fn assert_updated_weights(model: &Model, golden: &Golden) {
    for parameter in model.parameters.iter() {
        for (slice, part) in parameter.slices(&parameter.master) {
            let expected = golden.tensor(&format!("after/{}", slice.name));
            let worst = difference(&part, &expected);
            assert!(worst < 1e-3, "{slice:?} after 3 steps differs by {worst}");
        }
    }
}

/// A model with the weights of a golden file, on the device under test.
struct GoldenModel {
    golden: Golden,
    device: Box<dyn Accelerator>,
    model: Model,
    gradients: GradientBuckets,
    input_ids: Tensor,
    /// The next token of each position, -100 if it does not count.
    labels: Tensor,
}

impl GoldenModel {
    fn new(golden: Golden, config: &ModelConfig) -> GoldenModel {
        let groups = ProcessGroups::single_rank();
        // scripts/gpu-check runs this test on a GPU.
        let device = std::env::var("MOERUN_TEST_DEVICE").unwrap_or("cpu".into());
        let device = parallel::accelerator(&device, 0).unwrap();
        let input_ids = device.upload(&golden.tensor("input_ids"));
        let length = input_ids.size()[1] as usize;
        let ctx = BuildContext {
            documents: golden.documents(),
            ..BuildContext::single_rank(length, Dtype::Fp32, device.as_ref(), &groups)
        };
        let model = Model::new(config, ModelPart::whole(config.layers), &ctx);
        load_weights(&model, &golden);
        let parameters = model.parameters.iter();
        let weights: Vec<_> = parameters.map(|p| (p.weight.clone(), 0)).collect();
        let single = [Replication::alone()];
        let gradients =
            GradientBuckets::new(&weights, &single, 1 << 20, true, device.as_ref()).unwrap();
        // transformers shifts labels itself.
        let unshifted = match golden.find("labels") {
            Some(labels) => device.upload(&labels),
            None => input_ids.shallow_clone(),
        };
        let labels = unshifted.roll([-1], [1]);
        let _ = labels.narrow(1, labels.size()[1] - 1, 1).fill_(-100);
        GoldenModel {
            golden,
            device,
            model,
            gradients,
            input_ids,
            labels,
        }
    }

    fn totals(&self) -> BatchTotals<'static> {
        let counted = self.labels.not_equal(-100).sum(Kind::Int64);
        BatchTotals {
            groups: 1.0,
            positions: self.labels.numel() as f64,
            counted_tokens: counted.int64_value(&[]) as f64,
            counts_le: None,
        }
    }

    /// Compares the figures and gradients of the first step.
    fn assert_first_step(&self, figures: &Figures) {
        let mut expected = vec![
            ("loss", figures.loss),
            ("total_loss", figures.total_loss),
            ("grad_norm", figures.grad_norm),
        ];
        if let Some(moe) = &self.model.config().moe
            && moe.load_balance > 0.0
        {
            // transformers counts a token once per chosen expert.
            expected.push(("aux_loss", figures.load_balance * moe.top_k as f64));
        }
        for (figure, ours) in expected {
            let theirs = self.golden.tensor(figure).double_value(&[0]);
            let is_equal = (ours - theirs).abs() < 1e-5 * theirs;
            assert!(is_equal, "{figure}: {ours} and {theirs}");
        }
        let tolerance = self.golden.tolerance();
        assert_gradients(&self.model, &self.gradients, &self.golden, tolerance);
    }
}

/// Figures of the first step.
#[derive(Default)]
struct Figures {
    loss: f64,
    /// Zero without MoE layers.
    load_balance: f64,
    total_loss: f64,
    grad_norm: f64,
}

impl Figures {
    /// Adds the losses of a microbatch.
    fn add(&mut self, losses: &Losses) {
        self.loss += losses.cross_entropy.double_value(&[]);
        self.total_loss += losses.total.double_value(&[]);
        if let Some(aux) = &losses.aux {
            self.load_balance += aux.load_balance.double_value(&[]);
        }
    }
}

fn check(golden: Golden) {
    let config = golden.config();
    let run = GoldenModel::new(golden, &config);
    let GoldenModel {
        golden,
        device,
        model,
        gradients,
        input_ids,
        labels,
    } = &run;
    let device = device.as_ref();
    let parameters = &model.parameters;
    let mut optimizer = optimizer(parameters, device);
    let (batch, length) = input_ids.size2().unwrap();
    for step in 1..=3 {
        gradients.begin(1);
        let output = model.forward(input_ids).unwrap();
        let losses = model.losses(&output, labels, &run.totals()).unwrap();
        losses.total.backward();
        gradients.finish().unwrap();
        let norm = optimizer.grad_norm(parameters, gradients).unwrap();
        if step == 1 {
            let logits = model.logits(&output.hidden_td).view([batch, length, -1]);
            assert!(difference(&logits, &golden.tensor("logits")) < 1e-5);
            let mut figures = Figures {
                grad_norm: norm,
                ..Figures::default()
            };
            figures.add(&losses);
            run.assert_first_step(&figures);
        }
        optimizer
            .step(parameters, gradients, step, 1e-2, norm, device)
            .unwrap();
    }
    // With muP, learning rates differ by parameter; transformers has no such optimizer. Files of
    // models with documents have no later weights.
    if config.mup.is_none() && golden.documents().is_none() {
        assert_updated_weights(model, golden);
    }
}

fn optimizer(parameters: &Parameters, device: &dyn Accelerator) -> Optimizer {
    let settings = OptimizerConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    };
    let world: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
    Optimizer::new(
        &settings,
        1.0,
        parameters,
        device,
        world,
        StageRanks::alone(),
    )
    .unwrap()
}

#[test]
fn models_equal_those_of_other_implementations() {
    let names = names();
    assert!(!names.is_empty());
    for name in names {
        eprintln!("{name}");
        check(Golden::open(&name));
    }
}

#[test]
fn masked_labels_in_microbatches_of_which_one_has_no_counted_token() {
    // Each sequence is a microbatch; no label of the second one counts.
    let golden = Golden::open("mixtral-masked");
    let mut config = golden.config();
    let moe = config.moe.as_mut().unwrap();
    moe.load_balance_over = BalanceScope::Batch;
    let run = GoldenModel::new(golden, &config);
    let GoldenModel {
        device,
        model,
        gradients,
        input_ids,
        labels,
        ..
    } = &run;
    let sequences = input_ids.size()[0];
    assert!(labels.get(1).eq(-100).all().int64_value(&[]) == 1);
    let input_of = |sequence: i64| input_ids.narrow(0, sequence, 1);
    let counts_of = |sequence: i64| {
        let output = tch::no_grad(|| model.forward(&input_of(sequence)).unwrap());
        let stats = output.stats.iter();
        let counts: Vec<Tensor> = stats.map(|s| s.counts_ge.squeeze_dim(0)).collect();
        Tensor::stack(&counts, 0)
    };
    let counts_le = (1..sequences)
        .map(counts_of)
        .fold(counts_of(0), |a, b| a + b);
    let totals = BatchTotals {
        counts_le: Some(&counts_le),
        ..run.totals()
    };
    gradients.begin(sequences as usize);
    let mut figures = Figures::default();
    for sequence in 0..sequences {
        let output = model.forward(&input_of(sequence)).unwrap();
        let labels = labels.narrow(0, sequence, 1);
        let losses = model.losses(&output, &labels, &totals).unwrap();
        losses.total.backward();
        figures.add(&losses);
    }
    gradients.finish().unwrap();
    let parameters = &model.parameters;
    let norm = optimizer(parameters, device.as_ref()).grad_norm(parameters, gradients);
    figures.grad_norm = norm.unwrap();
    run.assert_first_step(&figures);
}
