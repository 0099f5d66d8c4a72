//! The decoder: embedding, pre-norm transformer layers with dense or mixture-of-experts feed-forward, output layer.
// Shapes: B batch, S sequence, T = B * S tokens, D hidden, F ffn, V vocabulary, E experts, L of them on this rank.

mod attention;
mod embedding;
mod loss;
mod norm;
mod part;
mod rope;
pub(crate) mod vocabulary;

use crate::Error;
use crate::config::{Dtype, ModelConfig, MoeConfig};
use crate::parameters::{Init, Parameters, Replicas, Traits};
use attention::Attention;
use checkpoint::Place;
use embedding::embed;
use loss::cross_entropy;
use moe::balance::{BatchTotals, RouterStats, Statistics, load_balance_loss, z_loss};
use moe::dispatch::Dispatcher;
use moe::experts::grouped_swiglu;
use moe::{MoeLayer, MoeWeights, Router};
use norm::rms_norm;
use parallel::{Accelerator, Communicator, Weight};
use rope::Rope;
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};

pub(crate) use loss::{IGNORED, with_gradient};
pub use part::{ModelPart, StagePart, VocabularyShard, split_layers};

/// This rank's part of a decoder, and its parameters.
pub struct Model {
    config: ModelConfig,
    part: ModelPart,
    /// Every parameter, in order of use.
    pub parameters: Parameters,
    /// Where the first stage, or a share of the vocabulary, is here.
    embedding: Option<Weight>,
    stages: Vec<Stage>,
    /// Where the last stage, or a share of the vocabulary, is here.
    head: Option<Weight>,
    rope: Rope,
}

struct Stage {
    layers: Vec<Layer>,
    /// Which of the model's mixture layers are here.
    mixtures: Range<usize>,
    /// Of the last stage.
    norm: Option<Weight>,
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

/// What the layers of one stage computed for one microbatch.
pub struct ForwardOutput {
    /// `[T, D]`, of the last stage normed.
    pub hidden_td: Tensor,
    /// One entry for each mixture layer.
    pub stats: Vec<RouterStats>,
    /// Choices of each expert among this rank's tokens, `[layers][E]`.
    pub choices: Vec<Vec<i64>>,
    /// Rows that this rank's experts worked on, for each mixture layer.
    pub rows: Vec<i64>,
}

/// A stage's contribution to the auxiliary losses of the whole step.
pub(crate) struct Auxiliary {
    /// The weighted sum, to enter the total loss; None where there is nothing.
    pub total: Option<Tensor>,
    /// The load-balancing loss, not weighted.
    pub load_balance: f64,
    /// The router z-loss, not weighted.
    pub z: f64,
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
    /// The part `part` of the model that `config` and `seed` describe, with the experts that belong to this rank of
    /// `expert_group`.
    pub fn new(
        config: &ModelConfig,
        part: ModelPart,
        sequence_length: usize,
        dtype: Dtype,
        seed: u64,
        device: &dyn Accelerator,
        expert_group: &Arc<dyn Communicator>,
    ) -> Model {
        let kind = if dtype == Dtype::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let mut parameters = Parameters::new(kind, seed);
        let hidden = config.hidden as i64;
        let width = config.mup.as_ref().map_or(1.0, |mup| mup.width);
        let normal = |std: f64, lr_scale: f64| Traits { init: Init::Normal(std), decay: true, lr_scale };
        let ends = normal(config.init_std, 1.0);
        let matrix = normal(config.init_std / width.sqrt(), 1.0 / width);
        let norm = Traits { init: Init::Ones, decay: false, lr_scale: 1.0 };
        // Matrices that write to the residual stream start smaller by its depth (GPT-2; also Granite's code).
        let writes = normal(config.init_std / width.sqrt() / (2.0 * config.layers as f64).sqrt(), 1.0 / width);

        let embedding = (part.vocabulary.is_some() || part.has_first())
            .then(|| end(&mut parameters, device, config, &part, "embedding", ends));
        if embedding.is_some() && config.tie_embeddings && part.vocabulary.is_none() && !part.has_last() {
            parameters.last_has_a_copy();
        }
        let mut layer = |index: usize| {
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
                    let layer = moe_layer(&mut parameters, device, moe, &name, hidden, matrix, writes, expert_group);
                    FeedForward::Moe(Box::new(layer))
                }
            };
            Layer { attention_norm, attention, feed_forward_norm, feed_forward }
        };
        let mixtures_before = |layer: usize| (0..layer).filter(|&index| config.moe_of(index).is_some()).count();
        let mut stages: Vec<Stage> = Vec::new();
        for stage in &part.stages {
            let layers = stage.layers.clone().map(&mut layer).collect();
            let mixtures = mixtures_before(stage.layers.start)..mixtures_before(stage.layers.end);
            stages.push(Stage { layers, mixtures, norm: None });
        }
        if let Some(last) = part.stages.iter().position(|stage| stage.last) {
            stages[last].norm = Some(parameters.dense(device, "norm", &[hidden], norm));
        }
        let head = (part.vocabulary.is_some() || part.has_last()).then(|| match &embedding {
            Some(embedding) if config.tie_embeddings => embedding.shared(),
            None if config.tie_embeddings => {
                parameters.copy_of_first(device, "embedding", &[config.vocab_size as i64, hidden], ends)
            }
            _ => end(&mut parameters, device, config, &part, "head", ends),
        });
        let rope = Rope::new(device, sequence_length, config.head_dim(), config.rope_theta);
        Model { config: config.clone(), part, parameters, embedding, stages, head, rope }
    }

    /// A whole model: `tokens_bs` `[B, S]` int64 through all layers.
    ///
    /// # Collective
    /// All ranks of the expert group.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward(&self, tokens_bs: &Tensor) -> Result<ForwardOutput, Error> {
        let (batch, _) = tokens_bs.size2()?;
        self.forward_stage(0, &self.embed(tokens_bs)?, batch)
    }

    /// The first stage's input `[T, D]` for `tokens_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// libtorch's message.
    pub(crate) fn embed(&self, tokens_bs: &Tensor) -> Result<Tensor, Error> {
        let weight = self.embedding.as_ref().expect("the first stage is here");
        Ok(embed(&tokens_bs.flatten(0, -1), weight)?)
    }

    /// Stage number `chunk` of this rank on `x_td` `[T, D]`, the tokens of `batch` sequences.
    ///
    /// # Collective
    /// All ranks of the expert group.
    ///
    /// # Errors
    /// When a collective fails.
    pub(crate) fn forward_stage(&self, chunk: usize, x_td: &Tensor, batch: i64) -> Result<ForwardOutput, Error> {
        let stage = &self.stages[chunk];
        let (embedding, residual) = self.config.mup.as_ref().map_or((1.0, 1.0), |mup| (mup.embedding, mup.residual));
        let scaled = self.part.stages[chunk].first && embedding != 1.0;
        let mut x = if scaled { x_td * embedding } else { x_td.shallow_clone() };
        let (tokens, length) = (x_td.size()[0], x_td.size()[0] / batch);
        let join = |x: Tensor, branch: Tensor| if residual == 1.0 { x + branch } else { x + branch * residual };
        let (mut stats, mut choices, mut rows) = (vec![], vec![], vec![]);
        for layer in &stage.layers {
            let normed = rms_norm(&x, &layer.attention_norm, self.config.norm_eps)?;
            x = join(x, layer.attention.forward(&normed, batch, &self.rope)?);
            let normed = rms_norm(&x, &layer.feed_forward_norm, self.config.norm_eps)?;
            let branch = match &layer.feed_forward {
                FeedForward::Dense(gate_up, down) => grouped_swiglu(&normed, gate_up, down, &[tokens])?,
                FeedForward::Moe(moe) => {
                    let output = moe.forward(&normed, length as usize)?;
                    stats.push(output.stats);
                    choices.push(output.choices);
                    rows.push(output.rows);
                    output.hidden_td
                }
            };
            x = join(x, branch);
        }
        if let Some(norm) = &stage.norm {
            x = rms_norm(&x, norm, self.config.norm_eps)?;
        }
        Ok(ForwardOutput { hidden_td: x, stats, choices, rows })
    }

    /// A whole model's part of the step's losses for one microbatch, against `labels_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn losses(&self, output: &ForwardOutput, labels_bs: &Tensor, totals: &BatchTotals) -> Result<Losses, Error> {
        let loss = self.cross_entropy(&output.hidden_td, labels_bs, totals)?;
        let cross_entropy = loss.double_value(&[]);
        let Auxiliary { total, load_balance, z } = self.auxiliary(0, &output.stats, totals);
        let total = total.map_or(loss.shallow_clone(), |auxiliary| loss + auxiliary);
        Ok(Losses { total, cross_entropy, load_balance, z })
    }

    /// The cross-entropy of the last stage's output `[T, D]` against `labels_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// libtorch's message.
    pub(crate) fn cross_entropy(
        &self,
        hidden_td: &Tensor,
        labels_bs: &Tensor,
        totals: &BatchTotals,
    ) -> Result<Tensor, Error> {
        let head = self.head.as_ref().expect("the last stage is here");
        Ok(cross_entropy(hidden_td, head, &labels_bs.flatten(0, -1), 1.0 / totals.tokens, self.logits_divisor())?)
    }

    /// Stage number `chunk`'s auxiliary losses.
    pub(crate) fn auxiliary(&self, chunk: usize, stats: &[RouterStats], totals: &BatchTotals) -> Auxiliary {
        let mut out = Auxiliary { total: None, load_balance: 0.0, z: 0.0 };
        let Some(moe) = self.config.moe.as_ref().filter(|_| !stats.is_empty()) else { return out };
        // Counts of the whole batch are there for all layers.
        let mixtures = &self.stages[chunk].mixtures;
        let counts = totals.counts_le.map(|counts| counts.narrow(0, mixtures.start as i64, mixtures.len() as i64));
        let totals = BatchTotals { counts_le: counts.as_ref(), ..*totals };
        let loss = load_balance_loss(stats, moe.top_k, moe.load_balance_pool_layers, &totals);
        out.load_balance = loss.double_value(&[]);
        let mut total = loss * moe.load_balance;
        let loss = z_loss(stats, &totals);
        out.z = loss.double_value(&[]);
        if moe.z_loss > 0.0 {
            total = total + loss * moe.z_loss;
        }
        out.total = Some(total);
        out
    }

    /// Logits `[T, V]` fp32 of a whole model's hidden states `[T, D]`.
    pub fn logits(&self, hidden_td: &Tensor) -> Tensor {
        let head = self.head.as_ref().expect("the last stage is here");
        hidden_td.matmul(&head.value().tr()).to_kind(Kind::Float) / self.logits_divisor()
    }

    /// The loss-free balancing biases where the model has them: number among the model's mixture layers, global name,
    /// `[E]`.
    pub fn biases(&self) -> impl Iterator<Item = (usize, String, Tensor)> {
        self.part.stages.iter().zip(&self.stages).flat_map(|(part, stage)| {
            let mut mixture = stage.mixtures.clone();
            part.layers.clone().zip(&stage.layers).filter_map(move |(index, layer)| match &layer.feed_forward {
                FeedForward::Moe(moe) => {
                    let number = mixture.next()?;
                    let bias = moe.weights.bias.as_ref()?;
                    Some((number, format!("layers.{index}.moe.bias"), bias.shallow_clone()))
                }
                FeedForward::Dense(..) => None,
            })
        })
    }

    /// Which of the model's mixture layers stage number `chunk` has.
    pub(crate) fn mixtures(&self, chunk: usize) -> Range<usize> {
        self.stages[chunk].mixtures.clone()
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

    /// What of the model is here.
    pub fn part(&self) -> &ModelPart {
        &self.part
    }

    /// This rank's rows of the embedding and of the output layer, where the vocabulary is shared out.
    pub(crate) fn shared_vocabulary(&self) -> Option<(&Weight, &Weight, Range<usize>)> {
        let rows = self.part.vocabulary?.rows(self.config.vocab_size);
        Some((self.embedding.as_ref()?, self.head.as_ref()?, rows))
    }

    /// What logits are divided by.
    pub(crate) fn logits_divisor(&self) -> f64 {
        self.config.mup.as_ref().map_or(1.0, |mup| mup.width)
    }
}

/// The embedding or the output layer: all of it, or this rank's rows.
fn end(
    parameters: &mut Parameters,
    device: &dyn Accelerator,
    config: &ModelConfig,
    part: &ModelPart,
    name: &str,
    traits: Traits,
) -> Weight {
    let shape = [config.vocab_size as i64, config.hidden as i64];
    match part.vocabulary {
        None => parameters.dense(device, name, &shape, traits),
        Some(shard) => {
            let rows = shard.rows(config.vocab_size);
            let place = Place {
                name: name.to_string(),
                global: shape.to_vec(),
                offset: vec![rows.start as i64, 0],
                shape: vec![rows.len() as i64, shape[1]],
            };
            parameters.sharded(device, place, traits)
        }
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
        parameters.stacked(device, vec![format!("{name}.{part}")], &shape, Replicas::Dense, traits)
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
    let gate_up = parameters.stacked(device, names("gate_up"), &[2 * ffn, hidden], Replicas::Expert, matrix);
    let down = parameters.stacked(device, names("down"), &[hidden, ffn], Replicas::Expert, writes);
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
