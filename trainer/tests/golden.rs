//! Models compared with HF transformers: logits, losses, every gradient, and weights after clipped
//! AdamW steps. scripts/golden/models.py writes the golden files.

use moe::{
    Score,
    balance::{BalanceScope, BatchTotals},
};
use parallel::{Accelerator, Communicator, GradientBuckets, Local, Replication};
use std::{path::Path, sync::Arc};
use tch::{Kind, Tensor};
use trainer::{
    BuildContext, Losses, Model, ModelPart, Optimizer, Parameters, ProcessGroups, StageRanks,
    config::{Dtype, ModelConfig, MoeConfig, MupConfig, OptimizerConfig, QkNorm, RouterConfig},
};

struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let folder = std::env::var_os("MOERUN_TEST_GOLDEN").map_or(here, Into::into);
        let path = folder.join(format!("{name}.safetensors"));
        Golden {
            bytes: std::fs::read(path).unwrap(),
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file
            .tensor(name)
            .unwrap_or_else(|_| panic!("the golden file has no {name}"));
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => tch::Kind::Float,
            safetensors::Dtype::I64 => tch::Kind::Int64,
            other => panic!("{name} is {other:?}"),
        };
        Tensor::from_data_size(view.data(), &shape, kind)
    }

    fn names(&self, kind: &str) -> Vec<String> {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        file.names()
            .iter()
            .filter_map(|name| Some(name.strip_prefix(kind)?.to_string()))
            .collect()
    }
}

fn config(moe: MoeConfig, kv_heads: usize) -> ModelConfig {
    ModelConfig {
        kv_heads: Some(kv_heads),
        moe: Some(moe),
        rope_theta: 1e6,
        ..ModelConfig::new(96, 32, 2, 4)
    }
}

fn experts(experts: usize, top_k: usize, ffn: usize, normalize: bool) -> MoeConfig {
    MoeConfig {
        router: RouterConfig {
            score: Score::Softmax,
            normalize: Some(normalize),
            ..RouterConfig::default()
        },
        // HF's loss is top_k times ours, taken once over all layers.
        load_balance: 0.01 * top_k as f64,
        load_balance_over: BalanceScope::Microbatch,
        load_balance_pool_layers: true,
        ..MoeConfig::new(experts, top_k, ffn)
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
    let stored = golden.names("weight/").len();
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
    fn open(name: &str, config: &ModelConfig) -> GoldenModel {
        let golden = Golden::open(name);
        let groups = ProcessGroups::single_rank();
        // scripts/gpu-check runs this test on a GPU.
        let device = std::env::var("MOERUN_TEST_DEVICE").unwrap_or("cpu".into());
        let device = parallel::accelerator(&device, 0).unwrap();
        let ctx = BuildContext::single_rank(64, Dtype::Fp32, device.as_ref(), &groups);
        let model = Model::new(config, ModelPart::whole(config.layers), &ctx);
        load_weights(&model, &golden);
        let parameters = model.parameters.iter();
        let weights: Vec<_> = parameters.map(|p| (p.weight.clone(), 0)).collect();
        let single = [Replication::alone()];
        let gradients =
            GradientBuckets::new(&weights, &single, 1 << 20, true, device.as_ref()).unwrap();
        let input_ids = device.upload(&golden.tensor("input_ids"));
        // transformers shifts labels itself.
        let unshifted = if golden.names("labels").is_empty() {
            input_ids.shallow_clone()
        } else {
            device.upload(&golden.tensor("labels"))
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
    fn assert_first_step(&self, figures: [(&str, f64); 4], tolerance: f64) {
        for (figure, ours) in figures {
            let theirs = self.golden.tensor(figure).double_value(&[0]);
            let is_equal = (ours - theirs).abs() < 1e-5 * theirs;
            assert!(is_equal, "{figure}: {ours} and {theirs}");
        }
        assert_gradients(&self.model, &self.gradients, &self.golden, tolerance);
    }
}

fn check(name: &str, config: ModelConfig, tolerance: f64) {
    let run = GoldenModel::open(name, &config);
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
            let top_k = config.moe.as_ref().unwrap().top_k as f64;
            let figures = [
                ("loss", losses.cross_entropy.double_value(&[])),
                ("aux_loss", load_balance(&losses) * top_k),
                ("total_loss", losses.total.double_value(&[])),
                ("grad_norm", norm),
            ];
            run.assert_first_step(figures, tolerance);
        }
        optimizer
            .step(parameters, gradients, step, 1e-2, norm, device)
            .unwrap();
    }
    // With muP, learning rates differ by parameter; transformers has no such optimizer.
    if config.mup.is_none() {
        assert_updated_weights(model, golden);
    }
}

fn load_balance(losses: &Losses) -> f64 {
    let aux = losses.aux.as_ref().unwrap();
    aux.load_balance.double_value(&[])
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
fn mixtral() {
    check("mixtral", config(experts(4, 2, 48, true), 2), 1e-4);
}

#[test]
fn olmoe() {
    let config = ModelConfig {
        qk_norm: QkNorm::Full,
        rope_theta: 10_000.0,
        ..config(experts(8, 3, 24, false), 4)
    };
    check("olmoe", config, 1e-4);
}

#[test]
fn granite_with_mup_multipliers() {
    let mup = MupConfig {
        width: 2.0,
        embedding: 12.0,
        residual: 0.22,
    };
    let config = ModelConfig {
        rope_theta: 10_000.0,
        tie_embeddings: true,
        mup: Some(mup),
        ..config(experts(6, 2, 24, true), 2)
    };
    check("granite", config, 1e-4);
}

#[test]
fn masked_labels_are_labels_of_minus_100() {
    check("mixtral-masked", config(experts(4, 2, 48, true), 2), 1e-5);
}

#[test]
fn masked_labels_in_microbatches_of_which_one_has_no_counted_token() {
    // Each sequence is a microbatch; no label of the second one counts.
    let mut moe = experts(4, 2, 48, true);
    moe.load_balance_over = BalanceScope::Batch;
    let top_k = moe.top_k as f64;
    let config = config(moe, 2);
    let run = GoldenModel::open("mixtral-masked", &config);
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
    let mut figures = [0.0; 3];
    for sequence in 0..sequences {
        let output = model.forward(&input_of(sequence)).unwrap();
        let labels = labels.narrow(0, sequence, 1);
        let losses = model.losses(&output, &labels, &totals).unwrap();
        losses.total.backward();
        figures[0] += losses.cross_entropy.double_value(&[]);
        figures[1] += load_balance(&losses) * top_k;
        figures[2] += losses.total.double_value(&[]);
    }
    gradients.finish().unwrap();
    let parameters = &model.parameters;
    let norm = optimizer(parameters, device.as_ref()).grad_norm(parameters, gradients);
    let [loss, aux_loss, total_loss] = figures;
    let figures = [
        ("loss", loss),
        ("aux_loss", aux_loss),
        ("total_loss", total_loss),
        ("grad_norm", norm.unwrap()),
    ];
    run.assert_first_step(figures, 1e-5);
}
