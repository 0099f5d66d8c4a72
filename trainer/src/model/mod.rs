//! The decoder: embedding, pre-norm transformer layers with dense or mixture-of-experts feed-forward, output layer.
// Shapes: B batch, S sequence, T = B * S tokens, D hidden, F ffn, V vocabulary, E experts, L of them on this rank.

mod attention;
mod embedding;
mod loss;
mod norm;
mod rope;

use crate::Error;
use crate::config::{Dtype, ModelConfig, MoeConfig};
use crate::parameters::{Init, Parameters, Traits};
use attention::Attention;
use embedding::embed;
use loss::cross_entropy;
use moe::balance::{BatchTotals, RouterStats, Statistics, load_balance_loss, z_loss};
use moe::dispatch::Dispatcher;
use moe::experts::grouped_swiglu;
use moe::{MoeLayer, MoeWeights, Router};
use norm::rms_norm;
use parallel::{Accelerator, Communicator, Weight};
use rope::Rope;
use std::sync::Arc;
use tch::{Kind, Tensor};

pub(crate) use loss::IGNORED;

/// A decoder and its parameters on this rank.
pub struct Model {
    config: ModelConfig,
    /// Every parameter, in order of use.
    pub parameters: Parameters,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Weight,
    head: Weight,
    rope: Rope,
}

struct Layer {
    attention_norm: Weight,
    attention: Attention,
    feed_forward_norm: Weight,
    feed_forward: FeedForward,
}

enum FeedForward {
    /// `[1, 2F, D]` and `[1, D, F]`.
    Dense(Weight, Weight),
    Moe(Box<MoeLayer>),
}

/// What the layers computed for one microbatch.
pub struct ForwardOutput {
    /// `[T, D]`, normed.
    pub hidden_td: Tensor,
    /// One entry for each mixture layer.
    pub stats: Vec<RouterStats>,
    /// Choices of each expert among this rank's tokens, `[layers][E]`.
    pub choices: Vec<Vec<i64>>,
    /// Rows that this rank's experts worked on, for each mixture layer.
    pub rows: Vec<i64>,
}

/// This microbatch's contributions to the losses of the whole step; summed over ranks and microbatches they are the
/// step's losses.
pub struct Losses {
    /// What backward starts from.
    pub total: Tensor,
    /// Cross-entropy a token, in nats.
    pub cross_entropy: f64,
    /// The load-balancing loss, not weighted.
    pub load_balance: f64,
    /// The router z-loss, not weighted.
    pub z: f64,
}

impl Model {
    /// The model that `config` and `seed` describe, with the experts that belong to this rank of `expert_group`.
    pub fn new(
        config: &ModelConfig,
        sequence_length: usize,
        dtype: Dtype,
        seed: u64,
        device: &dyn Accelerator,
        expert_group: &Arc<dyn Communicator>,
    ) -> Model {
        let kind = if dtype == Dtype::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let mut parameters = Parameters::new(kind, seed);
        let (hidden, vocab) = (config.hidden as i64, config.vocab_size as i64);
        let width = config.mup.as_ref().map_or(1.0, |mup| mup.width);
        let normal = |std: f64, lr_scale: f64| Traits { init: Init::Normal(std), decay: true, lr_scale };
        let ends = normal(config.init_std, 1.0);
        let matrix = normal(config.init_std / width.sqrt(), 1.0 / width);
        let norm = Traits { init: Init::Ones, decay: false, lr_scale: 1.0 };
        // Matrices that write to the residual stream start smaller by its depth (GPT-2; also Granite's code).
        let writes = normal(config.init_std / width.sqrt() / (2.0 * config.layers as f64).sqrt(), 1.0 / width);

        let embedding = parameters.dense(device, "embedding", &[vocab, hidden], ends);
        let layers = (0..config.layers)
            .map(|index| {
                let name = format!("layers.{index}");
                let attention_norm = parameters.dense(device, &format!("{name}.attention_norm"), &[hidden], norm);
                let attention =
                    Attention::new(&mut parameters, device, config, &format!("{name}.attention"), matrix, writes);
                let feed_forward_norm = parameters.dense(device, &format!("{name}.feed_forward_norm"), &[hidden], norm);
                let feed_forward = match config.moe_of(index) {
                    None => {
                        let ffn = config.ffn.unwrap_or(0) as i64;
                        let (gate_up, down) =
                            swiglu(&mut parameters, device, &format!("{name}.mlp"), hidden, ffn, matrix, writes);
                        FeedForward::Dense(gate_up, down)
                    }
                    Some(moe) => {
                        let name = format!("{name}.moe");
                        let layer =
                            moe_layer(&mut parameters, device, moe, &name, hidden, matrix, writes, expert_group);
                        FeedForward::Moe(Box::new(layer))
                    }
                };
                Layer { attention_norm, attention, feed_forward_norm, feed_forward }
            })
            .collect();
        let final_norm = parameters.dense(device, "norm", &[hidden], norm);
        let head = if config.tie_embeddings {
            embedding.shared()
        } else {
            parameters.dense(device, "head", &[vocab, hidden], ends)
        };
        let rope = Rope::new(device, sequence_length, config.head_dim(), config.rope_theta);
        Model { config: config.clone(), parameters, embedding, layers, norm: final_norm, head, rope }
    }

    /// `tokens_bs` `[B, S]` int64 through all layers.
    ///
    /// # Collective
    /// All ranks of the expert group.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward(&self, tokens_bs: &Tensor) -> Result<ForwardOutput, Error> {
        let (batch, length) = tokens_bs.size2()?;
        let mut x = embed(&tokens_bs.flatten(0, -1), &self.embedding)?;
        let (embedding, residual) = self.config.mup.as_ref().map_or((1.0, 1.0), |mup| (mup.embedding, mup.residual));
        if embedding != 1.0 {
            x = x * embedding;
        }
        let join = |x: Tensor, branch: Tensor| if residual == 1.0 { x + branch } else { x + branch * residual };
        let mut out = ForwardOutput { hidden_td: x.shallow_clone(), stats: vec![], choices: vec![], rows: vec![] };
        for layer in &self.layers {
            let normed = rms_norm(&x, &layer.attention_norm, self.config.norm_eps)?;
            x = join(x, layer.attention.forward(&normed, batch, &self.rope)?);
            let normed = rms_norm(&x, &layer.feed_forward_norm, self.config.norm_eps)?;
            let branch = match &layer.feed_forward {
                FeedForward::Dense(gate_up, down) => grouped_swiglu(&normed, gate_up, down, &[batch * length])?,
                FeedForward::Moe(moe) => {
                    let output = moe.forward(&normed, length as usize)?;
                    out.stats.push(output.stats);
                    out.choices.push(output.choices);
                    out.rows.push(output.rows);
                    output.hidden_td
                }
            };
            x = join(x, branch);
        }
        out.hidden_td = rms_norm(&x, &self.norm, self.config.norm_eps)?;
        Ok(out)
    }

    /// This microbatch's part of the step's losses, against `labels_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn losses(&self, output: &ForwardOutput, labels_bs: &Tensor, totals: &BatchTotals) -> Result<Losses, Error> {
        let labels = labels_bs.flatten(0, -1);
        let mut total =
            cross_entropy(&output.hidden_td, &self.head, &labels, 1.0 / totals.tokens, self.logits_divisor())?;
        let cross_entropy = total.double_value(&[]);
        let (mut load_balance, mut z) = (0.0, 0.0);
        if let Some(moe) = self.config.moe.as_ref().filter(|_| !output.stats.is_empty()) {
            let loss = load_balance_loss(&output.stats, moe.top_k, moe.load_balance_pool_layers, totals);
            load_balance = loss.double_value(&[]);
            total = total + loss * moe.load_balance;
            let loss = z_loss(&output.stats, totals);
            z = loss.double_value(&[]);
            if moe.z_loss > 0.0 {
                total = total + loss * moe.z_loss;
            }
        }
        Ok(Losses { total, cross_entropy, load_balance, z })
    }

    /// Logits `[T, V]` fp32 of hidden states `[T, D]`.
    pub fn logits(&self, hidden_td: &Tensor) -> Tensor {
        hidden_td.matmul(&self.head.value().tr()).to_kind(Kind::Float) / self.logits_divisor()
    }

    /// The loss-free balancing biases with their global names, where the model has them.
    pub fn biases(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForward::Moe(moe) => {
                let bias = moe.weights.bias.as_ref()?;
                Some((format!("layers.{index}.moe.bias"), bias.shallow_clone()))
            }
            FeedForward::Dense(..) => None,
        })
    }

    /// Whether load balance is measured over the whole step, so that its counts must be known before backward.
    pub fn counts_whole_batch(&self) -> bool {
        let moe = self.config.moe.as_ref();
        moe.is_some_and(|moe| moe.load_balance_over == Statistics::Batch && moe.load_balance > 0.0)
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn logits_divisor(&self) -> f64 {
        self.config.mup.as_ref().map_or(1.0, |mup| mup.width)
    }
}

/// Gate and up `[1, 2F, D]`, down `[1, D, F]`.
fn swiglu(
    parameters: &mut Parameters,
    device: &dyn Accelerator,
    name: &str,
    hidden: i64,
    ffn: i64,
    matrix: Traits,
    writes: Traits,
) -> (Weight, Weight) {
    let mut one = |part: &str, shape: [i64; 2], traits| {
        parameters.stacked(device, vec![format!("{name}.{part}")], &shape, false, traits)
    };
    (one("gate_up", [2 * ffn, hidden], matrix), one("down", [hidden, ffn], writes))
}

#[allow(clippy::too_many_arguments)] // A constructor: what it is given is what a layer consists of.
fn moe_layer(
    parameters: &mut Parameters,
    device: &dyn Accelerator,
    config: &MoeConfig,
    name: &str,
    hidden: i64,
    matrix: Traits,
    writes: Traits,
    expert_group: &Arc<dyn Communicator>,
) -> MoeLayer {
    let num_experts = config.experts;
    let gate = parameters.dense(device, &format!("{name}.gate"), &[num_experts as i64, hidden], matrix);
    let local = num_experts / expert_group.size();
    let own = expert_group.rank() * local..(expert_group.rank() + 1) * local;
    let names = |part: &str| own.clone().map(|expert| format!("{name}.experts.{expert}.{part}")).collect();
    let ffn = config.ffn as i64;
    let gate_up = parameters.stacked(device, names("gate_up"), &[2 * ffn, hidden], true, matrix);
    let down = parameters.stacked(device, names("down"), &[hidden, ffn], true, writes);
    let shared = (config.shared_experts > 0).then(|| {
        let ffn = (config.shared_experts * config.ffn) as i64;
        swiglu(parameters, device, &format!("{name}.shared"), hidden, ffn, matrix, writes)
    });
    let bias = (config.bias_update_rate > 0.0).then(|| device.zeros(&[num_experts as i64], Kind::Float));
    let router = Router {
        num_experts,
        top_k: config.top_k,
        score: config.router.score,
        normalize: config.router.normalize,
        scale: config.router.scale,
        groups: config.router.groups,
        top_groups: config.router.top_groups,
    };
    let weights = MoeWeights { gate, bias, gate_up, down, shared };
    MoeLayer {
        router,
        dispatcher: Dispatcher::new(expert_group.clone()),
        statistics: config.load_balance_over,
        weights,
    }
}
