//! Models compared with HF transformers: logits, losses, every gradient, and weights after clipped
//! AdamW steps. scripts/golden/models.py writes the golden files.

use moe::{
    Score,
    balance::{BalanceScope, BatchTotals},
};
use parallel::{Communicator, GradientBuckets, Local, Replication};
use std::{path::Path, sync::Arc};
use tch::Tensor;
use trainer::{
    BuildContext, Model, ModelPart, Optimizer, ProcessGroups,
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
        vocab_size: 96,
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads: Some(kv_heads),
        head_dim: None,
        ffn: None,
        dense_layers: 0,
        moe_every: 1,
        moe: Some(moe),
        rope_theta: 1e6,
        norm_eps: 1e-5,
        qk_norm: QkNorm::None,
        tie_embeddings: false,
        init_std: 0.02,
        mup: None,
    }
}

fn experts(experts: usize, top_k: usize, ffn: usize, normalize: bool) -> MoeConfig {
    MoeConfig {
        router: RouterConfig {
            score: Score::Softmax,
            normalize,
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

fn assert_gradients(model: &Model, gradients: &GradientBuckets, golden: &Golden) {
    for (index, parameter) in model.parameters.iter().enumerate() {
        for (slice, grad) in parameter.slices(&gradients.gradient(index)) {
            let expected = golden.tensor(&format!("grad/{}", slice.name));
            let worst = difference(&grad, &expected);
            assert!(worst < 1e-4, "the gradient of {slice:?} differs by {worst}");
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

fn check(name: &str, config: ModelConfig) {
    let golden = Golden::open(name);
    let world: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
    let groups = ProcessGroups::single_rank();
    // scripts/gpu-check runs this test on a GPU.
    let device = std::env::var("MOERUN_TEST_DEVICE").unwrap_or("cpu".into());
    let device = parallel::accelerator(&device, 0).unwrap();
    let device = device.as_ref();
    let ctx = BuildContext::single_rank(64, Dtype::Fp32, device, &groups);
    let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
    let parameters = &model.parameters;
    load_weights(&model, &golden);

    let weights: Vec<_> = parameters.iter().map(|p| (p.weight.clone(), 0)).collect();
    let single = [Replication::alone()];
    let gradients = GradientBuckets::new(&weights, &single, 1 << 20, true, device).unwrap();
    let settings = OptimizerConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        offload: false,
    };
    let mut optimizer = Optimizer::new(&settings, 1.0, parameters, device, world).unwrap();
    let ids = device.upload(&golden.tensor("input_ids"));
    let (batch, length) = ids.size2().unwrap();
    let labels = ids.roll([-1], [1]);
    let _ = labels.narrow(1, length - 1, 1).fill_(-100);
    let totals = BatchTotals {
        groups: 1.0,
        tokens: (batch * (length - 1)) as f64,
        counts_le: None,
    };

    for step in 1..=3 {
        gradients.begin(1);
        let output = model.forward(&ids).unwrap();
        let losses = model.losses(&output, &labels, &totals).unwrap();
        losses.total.backward();
        gradients.finish().unwrap();
        let norm = optimizer.grad_norm(parameters, &gradients).unwrap();
        if step == 1 {
            let logits = model.logits(&output.hidden_td).view([batch, length, -1]);
            assert!(difference(&logits, &golden.tensor("logits")) < 1e-5);
            let top_k = config.moe.as_ref().unwrap().top_k as f64;
            for (figure, ours) in [
                ("loss", losses.cross_entropy),
                ("aux_loss", losses.load_balance * top_k),
                ("total_loss", losses.total.double_value(&[])),
                ("grad_norm", norm),
            ] {
                let theirs = golden.tensor(figure).double_value(&[0]);
                let is_equal = (ours - theirs).abs() < 1e-5 * theirs;
                assert!(is_equal, "{figure}: {ours} and {theirs}");
            }
            assert_gradients(&model, &gradients, &golden);
        }
        optimizer
            .step(parameters, &gradients, step, 1e-2, norm, device)
            .unwrap();
    }
    // With muP, learning rates differ by parameter; transformers has no such optimizer.
    if config.mup.is_none() {
        assert_updated_weights(&model, &golden);
    }
}

#[test]
fn mixtral() {
    check("mixtral", config(experts(4, 2, 48, true), 2));
}

#[test]
fn olmoe() {
    let config = ModelConfig {
        qk_norm: QkNorm::Full,
        rope_theta: 10_000.0,
        ..config(experts(8, 3, 24, false), 4)
    };
    check("olmoe", config);
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
    check("granite", config);
}
