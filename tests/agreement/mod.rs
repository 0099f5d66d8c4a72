//! Agreement of two layouts: losses, gradient norms, every gathered gradient and the trained
//! weights.

use checkpoint::TensorSlice;
use dataset::tokens::TokenWriter;
use moe::smallest_gap_during;
use parallel::{Cpu, World, run_on_threads};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, time::Duration};
use tch::Tensor;
use trainer::{Trainer, config::Config};

/// Number of different tokens in the data.
pub(crate) const VOCAB: usize = 64;
/// Length of the data.
pub(crate) const TOKENS: u32 = 6000;
/// Timeout of collectives. These runs are small, so ranks never wait long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// Tokens that can be learned: each depends on the one before it, with pseudo-random noise.
pub(crate) fn write_data(folder: &Path) {
    write_tokens(folder, "tokens", TOKENS, 1);
    write_tokens(folder, "others", TOKENS / 8, 99);
}

fn write_tokens(folder: &Path, name: &str, count: u32, seed: u64) {
    let mut writer = TokenWriter::create(&folder.join(name), VOCAB).unwrap();
    let mut state = seed;
    let mut token = 0u64;
    let tokens: Vec<u32> = (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            token = (token * 5 + 1 + (state >> 62)) % VOCAB as u64;
            token as u32
        })
        .collect();
    writer.push(&tokens).unwrap();
    writer.finish().unwrap();
}

/// An MoE configuration with softmax routing and every auxiliary loss.
pub(crate) fn softmax(over: &str) -> Value {
    json!({"experts": 8, "top_k": 2, "ffn": 16, "shared_experts": 1, "load_balance": 0.05,
        "load_balance_over": over,
           "z_loss": 0.01})
}

/// An MoE configuration with sigmoid routing, limited groups and the loss-free bias.
pub(crate) fn sigmoid(over: &str) -> Value {
    json!({"experts": 8, "top_k": 2, "ffn": 16, "load_balance": 0.05, "load_balance_over": over,
           "router": {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 1.5},
           "bias_update_rate": 0.01})
}

/// Results of a run, by global name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Trace {
    /// Loss, load-balancing loss, z-loss and gradient norm of each step.
    pub(crate) steps: Vec<[f64; 4]>,
    pub(crate) first_gradients: BTreeMap<String, Vec<f32>>,
    pub(crate) weights: BTreeMap<String, Vec<f32>>,
    /// Validation loss of each source at the end, by its name.
    pub(crate) validation: BTreeMap<String, f64>,
    /// Routed tokens that a helper computed.
    pub(crate) lent_tokens: u64,
    pub(crate) moved: u64,
    /// Largest attention logit of each step, with `optimizer.qk_clip`.
    pub(crate) largest_logits: Vec<f64>,
    pub(crate) clipped_heads: u64,
    /// Smallest gap of a token on rank 0 to other experts, see [`moe::smallest_gap_during`].
    pub(crate) smallest_gap: f64,
}

pub(crate) fn trainer_on(world: &World, config: Config) -> Trainer {
    Trainer::new(config, world, Box::new(Cpu)).unwrap()
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1).contiguous()).unwrap()
}

/// One rank's part of a [`Trace`].
struct RankTrace {
    steps: Vec<[f64; 4]>,
    first_gradients: Vec<(TensorSlice, Tensor)>,
    weights: Vec<(TensorSlice, Tensor)>,
    validation: BTreeMap<String, f64>,
    lent_tokens: u64,
    moved: u64,
    largest_logits: Vec<f64>,
    clipped_heads: u64,
    smallest_gap: f64,
}

/// Returns the routed tokens of one token in all layers.
fn tokens_routed_per_token(config: &Config) -> u64 {
    let moe = config.model.moe.as_ref();
    moe.map_or(0, |moe| moe.top_k * config.model.num_moe_layers()) as u64
}

/// A tensor that is gathered slice by slice from the ranks.
type Gathered = BTreeMap<String, Tensor>;

/// Writes a rank's slice into the gathered tensor. Replicas must be bit-identical.
pub(crate) fn gather(into: &mut Gathered, slice: &TensorSlice, part: &Tensor) {
    let unknown = || {
        Tensor::full(
            slice.global_shape.as_slice(),
            f64::NAN,
            (tch::Kind::Float, part.device()),
        )
    };
    let mut known = into
        .entry(slice.name.clone())
        .or_insert_with(unknown)
        .shallow_clone();
    for (dim, (&offset, &size)) in slice.offset.iter().zip(&slice.shape).enumerate() {
        known = known.narrow(dim as i64, offset, size);
    }
    if !known.isnan().any().int64_value(&[]).eq(&1) {
        assert_eq!(known, *part, "{} differs between replicas", slice.name);
    }
    tch::no_grad(|| known.copy_(part));
}

pub(crate) fn trace_of(ranks: usize, config: Config) -> Trace {
    trace_of_biased(ranks, config, |_| {})
}

/// Like `run`, with `change` applied to each rank's trainer before the first step.
pub(crate) fn trace_of_biased(ranks: usize, config: Config, change: fn(&Trainer)) -> Trace {
    tch::set_num_threads(1);
    let steps = config.train.steps;
    assert_eq!(config.problems(ranks), Vec::<String>::new());
    let parts = run_on_threads(ranks, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        if config.model.from.is_some() {
            trainer.resume(&mut |warning| panic!("{warning}")).unwrap();
        }
        change(&trainer);
        let held = trainer
            .model()
            .parameters
            .iter()
            .map(|parameter| parameter.master.numel() as u64)
            .sum::<u64>();
        let own = world.rank()..world.rank() + 1;
        let planned = config.memory_of(own, ranks).unwrap();
        assert_eq!(planned[0].memory.parameters, held, "as planned");
        let (first_norm, first_gap) = smallest_gap_during(|| trainer.forward_backward().unwrap());
        let mut first_gradients = Vec::new();
        for (index, parameter) in trainer.model().parameters.iter().enumerate() {
            for (slice, part) in parameter.slices(&trainer.gradients().gradient(index)) {
                first_gradients.push((slice.clone(), part.copy()));
            }
        }
        let mut lent_tokens = 0;
        let mut moved = 0;
        let mut largest_logits = Vec::new();
        let mut clipped_heads = 0;
        let mut tokens = 0;
        let step = |_| {
            let (record, _) = trainer.train_step(false).unwrap();
            if let Some(moe) = record.moe {
                let routed = (record.tokens - tokens) * tokens_routed_per_token(&config);
                assert_eq!(moe.routed_tokens, routed);
                lent_tokens += moe.lent_tokens.total;
            }
            tokens = record.tokens;
            moved += record.moved_experts.unwrap_or(0);
            largest_logits.extend(record.qk_clip.map(|clip| clip.largest_logit));
            clipped_heads += record.qk_clip.map_or(0, |clip| clip.clipped_heads);
            [
                record.loss,
                record.load_balance_loss,
                record.z_loss,
                record.grad_norm,
            ]
        };
        let (steps, gap): (Vec<[f64; 4]>, f64) =
            smallest_gap_during(|| (0..steps).map(step).collect());
        let smallest_gap = gap.min(first_gap);
        assert_eq!(first_norm, steps[0][3]);
        let validation = trainer.validate().unwrap();
        let validation = validation.map_or(BTreeMap::new(), |metrics| metrics.validation);
        let mut weights = Vec::new();
        for parameter in trainer.model().parameters.iter() {
            for (slice, part) in parameter.slices(&parameter.master) {
                weights.push((slice.clone(), part.copy()));
            }
        }
        for (_, name, bias) in trainer.model().biases() {
            weights.push((TensorSlice::whole(name, &bias.size()), bias.copy()));
        }
        RankTrace {
            steps,
            first_gradients,
            weights,
            validation,
            lent_tokens,
            moved,
            largest_logits,
            clipped_heads,
            smallest_gap,
        }
    });
    let mut first_gradients = Gathered::new();
    let mut weights = Gathered::new();
    let first = &parts[0];
    for rank in &parts {
        assert_eq!(
            rank.steps, first.steps,
            "every rank reports the same figures"
        );
        assert_eq!(rank.validation, first.validation);
        for (slice, part) in &rank.first_gradients {
            gather(&mut first_gradients, slice, part);
        }
        for (slice, part) in &rank.weights {
            gather(&mut weights, slice, part);
        }
    }
    let by_name = |gathered: Gathered| {
        gathered
            .into_iter()
            .map(|(name, tensor)| (name, values(&tensor)))
            .collect()
    };
    Trace {
        steps: first.steps.clone(),
        first_gradients: by_name(first_gradients),
        weights: by_name(weights),
        validation: first.validation.clone(),
        lent_tokens: first.lent_tokens,
        moved: first.moved,
        largest_logits: first.largest_logits.clone(),
        clipped_heads: first.clipped_heads,
        smallest_gap: first.smallest_gap,
    }
}

/// Returns the relative difference of two tensors: norm of the difference over the norm.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b))).max(1e-12)
}

pub(crate) fn assert_same(what: &str, trace: &Trace, single: &Trace) {
    assert_within(what, trace, single, 1e-5);
}

/// Compares two runs. Relative differences are at most `tolerance`.
pub(crate) fn assert_within(what: &str, trace: &Trace, single: &Trace, tolerance: f64) {
    for (step, (ours, reference)) in trace.steps.iter().zip(&single.steps).enumerate() {
        for (figure, (a, b)) in ["loss", "load balance", "z", "grad norm"]
            .iter()
            .zip(ours.iter().zip(reference))
        {
            assert!(
                (a - b).abs() <= tolerance * b.abs(),
                "{what}: {figure} at step {}: {a} and {b}",
                step + 1
            );
        }
    }
    let sources = single.validation.keys();
    assert!(trace.validation.keys().eq(sources), "{what}: other sources");
    for (source, loss) in &trace.validation {
        let reference = single.validation[source];
        assert!(
            (loss - reference).abs() <= tolerance * reference,
            "{what}: validation of {source}: {loss} and {reference}"
        );
    }
    for (kind, ours, reference) in [
        ("gradient", &trace.first_gradients, &single.first_gradients),
        ("weight", &trace.weights, &single.weights),
    ] {
        assert!(
            ours.keys().eq(reference.keys()),
            "{what}: the {kind}s have other names"
        );
        for (name, values) in ours {
            let far = distance(values, &reference[name]);
            assert!(far <= tolerance, "{what}: {kind} of {name} is {far} away");
        }
    }
}
