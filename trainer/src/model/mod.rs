//! The decoder: embedding, pre-norm transformer layers with dense or mixture-of-experts feed-forward, output layer.
// Shapes: B batch, S sequence, T = B * S tokens, D hidden, F ffn, V vocabulary, E experts, L of them on this rank.

mod attention;
mod embedding;
mod experts;
mod init;
mod layer;
mod loss;
mod norm;
pub(crate) mod parameters;
mod part;
mod rope;
pub(crate) mod vocabulary;

use crate::Error;
use crate::config::{Config, Dtype, ModelConfig, MoeConfig, RecomputeConfig, RecomputedPart};
use crate::model::parameters::{Init, ParameterOptions, Parameters, Replicas, Unit, slice};
use crate::process_groups::ProcessGroups;
use attention::Attention;
use checkpoint::TensorSlice;
use embedding::embed;
use experts::{ExpertShape, gate_up_boxes};
use layer::{FeedForward, Layer, with_gathered_weights};
use loss::{VocabularyRows, cross_entropy};
use moe::balance::{BalanceScope, BatchTotals, RouterStats, load_balance_loss, z_loss};
use moe::dispatch::Dispatcher;
use moe::experts::GemmPrecision;
use moe::{MoeLayer, MoeStats, MoeWeights, Router, SavePolicy};
use norm::rms_norm;
use parallel::collectives::gather_from_group;
use parallel::context::{ContextKind, positions};
use parallel::tensor::TensorParallel;
use parallel::{Accelerator, Weight};
use parking_lot::Mutex;
use rope::Rope;
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};

pub(crate) use attention::Documents;
pub(crate) use experts::LocalExperts;
pub(crate) use loss::{IGNORED, with_gradient};
pub use part::{ModelPart, StagePart, VocabularyShard, split_layers};

/// What a model is made with, besides its shape.
pub struct BuildContext<'a> {
    /// Tokens it sees at once.
    pub sequence_length: usize,
    /// Its arithmetic.
    pub dtype: Dtype,
    /// The arithmetic of routed experts' products.
    pub expert_gemm: GemmPrecision,
    /// Decides first values.
    pub seed: u64,
    /// Where it is.
    pub device: &'a dyn Accelerator,
    /// The ranks it works with.
    pub ranks: &'a ProcessGroups,
    /// How ranks that split sequences attend.
    pub context_attention: ContextKind,
    /// What backward computes again.
    pub recompute: RecomputeConfig,
    /// Whether the optimizer's state, fp32 masters among it, is in the host's memory and not on the device.
    pub offload: bool,
}

impl<'a> BuildContext<'a> {
    /// What `config` says.
    pub fn from_config(
        config: &Config,
        device: &'a dyn Accelerator,
        ranks: &'a ProcessGroups,
    ) -> BuildContext<'a> {
        BuildContext {
            sequence_length: config.data.sequence_length,
            dtype: config.train.dtype,
            expert_gemm: if config.train.fp8_experts {
                GemmPrecision::Fp8
            } else {
                GemmPrecision::Model
            },
            seed: config.run.seed,
            device,
            ranks,
            context_attention: config.parallel.context_attention,
            recompute: config.parallel.recompute.clone(),
            offload: config.optimizer.offload && !device.computes_on_host(),
        }
    }

    /// One rank that keeps everything.
    pub fn single_rank(
        sequence_length: usize,
        dtype: Dtype,
        device: &'a dyn Accelerator,
        ranks: &'a ProcessGroups,
    ) -> BuildContext<'a> {
        let context_attention = ContextKind::Ring;
        let recompute = RecomputeConfig::default();
        let expert_gemm = GemmPrecision::Model;
        let offload = false;
        BuildContext {
            sequence_length,
            dtype,
            expert_gemm,
            seed: 0,
            device,
            ranks,
            context_attention,
            recompute,
            offload,
        }
    }
}

/// This rank's part of a decoder, and its parameters.
pub struct Model {
    config: ModelConfig,
    part: ModelPart,
    /// Every parameter, in order of use.
    pub parameters: Parameters,
    /// Where the first stage, or a share of the vocabulary, is here.
    embedding: Option<VocabularyWeight>,
    stages: Vec<Stage>,
    /// Where the last stage, or a share of the vocabulary, is here.
    head: Option<VocabularyWeight>,
    rope: Arc<Rope>,
    tensor: TensorParallel,
    /// The rows of the ends that are here.
    rows: Range<usize>,
    /// This rank's positions of a sequence, where others have the rest.
    positions: Option<Tensor>,
}

/// The embedding or the output layer.
struct VocabularyWeight {
    weight: Weight,
    unit: Arc<Unit>,
}

struct Stage {
    layers: Vec<(Arc<Layer>, Arc<Unit>)>,
    /// Which of the model's MoE layers are here.
    moe_layers: Range<usize>,
    /// Of the last stage.
    norm: Option<(Weight, Arc<Unit>)>,
}

/// What the layers of one stage computed for one microbatch.
pub struct ForwardOutput {
    /// `[T, D]`, of the last stage normed.
    pub hidden_td: Tensor,
    /// One entry for each MoE layer.
    pub stats: Vec<RouterStats>,
    /// What each MoE layer did.
    pub moe_stats: Vec<MoeStats>,
}

/// A stage's contribution to the auxiliary losses of the whole step.
pub(crate) struct AuxLosses {
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
    /// The part `part` of the model that `config` and the seed describe; of its matrices and experts what belongs to this
    /// rank.
    pub fn new(config: &ModelConfig, part: ModelPart, ctx: &BuildContext) -> Model {
        let BuildContext { device, ranks, .. } = *ctx;
        let kind = ctx.dtype.kind();
        let mut parameters = Parameters::new(
            kind,
            ctx.seed,
            ranks.zero,
            ranks.replications.clone(),
            ctx.offload,
        );
        let hidden = config.hidden as i64;
        let width = config.mup.as_ref().map_or(1.0, |mup| mup.width);
        let normal = |std: f64, lr_scale: f64| ParameterOptions {
            init: Init::Normal(std),
            decay: true,
            lr_scale,
        };
        let ends = normal(config.init_std, 1.0);
        let matrix = normal(config.init_std / width.sqrt(), 1.0 / width);
        let norm = ParameterOptions {
            init: Init::Ones,
            decay: false,
            lr_scale: 1.0,
        };
        // Matrices that write to the residual stream start smaller by its depth (GPT-2; also Granite's code).
        let writes = normal(
            config.init_std / width.sqrt() / (2.0 * config.layers as f64).sqrt(),
            1.0 / width,
        );

        let shard = part.vocabulary.unwrap_or(VocabularyShard {
            rank: ranks.tensor.rank(),
            ranks: ranks.tensor.size(),
        });
        let rows = shard.rows(config.vocab_size);
        let end = |parameters: &mut Parameters, name: &str, replicas| {
            let along = rows.start as i64..rows.end as i64;
            let place = slice(name, &[config.vocab_size as i64, hidden], 0, &along);
            let first = parameters.len();
            let weight = parameters.one(device, place, replicas, ends);
            VocabularyWeight {
                weight,
                unit: Arc::new(parameters.unit(first)),
            }
        };
        let shared = part.vocabulary.is_some();
        // A tied embedding whose ends are on different ranks.
        let split_tied_embedding =
            config.tie_embeddings && !shared && part.has_first() != part.has_last();
        let embedding_replicas = if split_tied_embedding {
            Replicas::TiedEmbedding
        } else {
            Replicas::Dense
        };
        let embedding = (shared || part.has_first())
            .then(|| end(&mut parameters, "embedding", embedding_replicas));
        let mut layer = |index: usize| {
            let first = parameters.len();
            let layer = layer(&mut parameters, ctx, config, index, matrix, writes);
            (Arc::new(layer), Arc::new(parameters.unit(first)))
        };
        let moe_layers_before = |layer: usize| {
            (0..layer)
                .filter(|&index| config.moe_config(index).is_some())
                .count()
        };
        let mut stages: Vec<Stage> = Vec::new();
        for stage in &part.stages {
            let layers = stage.layers.clone().map(&mut layer).collect();
            let moe_layers =
                moe_layers_before(stage.layers.start)..moe_layers_before(stage.layers.end);
            stages.push(Stage {
                layers,
                moe_layers,
                norm: None,
            });
        }
        if let Some(last) = part.stages.iter().position(|stage| stage.last) {
            let first = parameters.len();
            let weight = parameters.one(
                device,
                TensorSlice::whole("norm", &[hidden]),
                Replicas::Stage,
                norm,
            );
            stages[last].norm = Some((weight, Arc::new(parameters.unit(first))));
        }
        let head = (shared || part.has_last()).then(|| match &embedding {
            Some(VocabularyWeight { weight, unit }) if config.tie_embeddings => VocabularyWeight {
                weight: weight.tied(),
                unit: unit.clone(),
            },
            None if config.tie_embeddings => end(&mut parameters, "embedding", embedding_replicas),
            _ => end(&mut parameters, "head", Replicas::Dense),
        });
        let context = &ranks.context;
        let length = ctx.sequence_length;
        let positions = positions(
            ctx.context_attention,
            length,
            context.rank(),
            context.size(),
        );
        let rope = Arc::new(Rope::new(
            device,
            &positions,
            config.head_dim(),
            config.rope_theta,
        ));
        let positions =
            (context.size() > 1).then(|| device.upload(&Tensor::from_slice(&positions)));
        let config = config.clone();
        let tensor = ranks.tensor.clone();
        Model {
            config,
            part,
            parameters,
            embedding,
            stages,
            head,
            rope,
            tensor,
            rows,
            positions,
        }
    }

    /// Of `x_bs` `[B, S]` the positions that this rank has.
    pub(crate) fn own_positions(&self, x_bs: &Tensor) -> Tensor {
        self.positions.as_ref().map_or_else(
            || x_bs.shallow_clone(),
            |positions| x_bs.index_select(1, positions),
        )
    }

    /// The ranks that split matrices.
    pub(crate) fn tensor(&self) -> &TensorParallel {
        &self.tensor
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
        self.forward_stage(0, &self.embed(tokens_bs)?, batch, None)
    }

    /// The first stage's input `[T, D]` for this rank's positions `tokens_bs` `[B, s]` int64.
    ///
    /// # Collective
    /// All ranks of the tensor group.
    ///
    /// # Errors
    /// When a collective fails.
    pub(crate) fn embed(&self, tokens_bs: &Tensor) -> Result<Tensor, Error> {
        let VocabularyWeight { weight, unit } =
            self.embedding.as_ref().expect("the first stage is here");
        unit.gather()?;
        let out = embed(&tokens_bs.flatten(0, -1), weight, &self.rows, &self.tensor)?;
        unit.release();
        Ok(out)
    }

    /// Stage number `chunk` of this rank on `x_td` `[T, D]`, this rank's tokens of `batch` sequences.
    ///
    /// # Collective
    /// All ranks that work on the stage.
    ///
    /// # Errors
    /// When a collective fails.
    pub(crate) fn forward_stage(
        &self,
        chunk: usize,
        x_td: &Tensor,
        batch: i64,
        documents: Option<&Arc<Documents>>,
    ) -> Result<ForwardOutput, Error> {
        let stage = &self.stages[chunk];
        let embedding = self.config.mup.as_ref().map_or(1.0, |mup| mup.embedding);
        let scaled = self.part.stages[chunk].first && embedding != 1.0;
        let mut x = if scaled {
            x_td * embedding
        } else {
            x_td.shallow_clone()
        };
        let mut stats = vec![];
        let mut moe_stats = vec![];
        let unit = |index: usize| stage.layers.get(index).map(|(_, unit)| unit);
        for (index, (layer, own)) in stage.layers.iter().enumerate() {
            let previous = index.checked_sub(1).and_then(unit);
            let (out, aux_output) =
                with_gathered_weights(&x, own, previous, unit(index + 1), |x| {
                    layer.forward(x, batch, &self.rope, documents)
                })?;
            x = out;
            if let Some((of_layer, did)) = aux_output {
                stats.push(of_layer);
                moe_stats.push(did);
            }
        }
        if let Some((norm, own)) = &stage.norm {
            let previous = stage.layers.len().checked_sub(1).and_then(unit);
            let eps = self.config.norm_eps;
            (x, ()) = with_gathered_weights(&x, own, previous, None, |x| {
                Ok((rms_norm(x, norm, eps)?, ()))
            })?;
        }
        Ok(ForwardOutput {
            hidden_td: x,
            stats,
            moe_stats,
        })
    }

    /// A whole model's part of the step's losses for one microbatch, against `labels_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn losses(
        &self,
        output: &ForwardOutput,
        labels_bs: &Tensor,
        totals: &BatchTotals,
    ) -> Result<Losses, Error> {
        let loss = self.cross_entropy(&output.hidden_td, labels_bs, totals)?;
        let cross_entropy = loss.double_value(&[]);
        let AuxLosses {
            total,
            load_balance,
            z,
        } = self.aux_losses(0, &output.stats, totals);
        let total = total.map_or(loss.shallow_clone(), |auxiliary| loss + auxiliary);
        Ok(Losses {
            total,
            cross_entropy,
            load_balance,
            z,
        })
    }

    /// The cross-entropy of the last stage's output `[T, D]` against `labels_bs` `[B, s]` int64: the same on all ranks of the
    /// tensor group.
    ///
    /// # Collective
    /// All ranks of the tensor group.
    ///
    /// # Errors
    /// When a collective fails.
    pub(crate) fn cross_entropy(
        &self,
        hidden_td: &Tensor,
        labels_bs: &Tensor,
        totals: &BatchTotals,
    ) -> Result<Tensor, Error> {
        let VocabularyWeight { weight, unit } = self.head.as_ref().expect("the last stage is here");
        let group = self.tensor.group();
        let hidden_td = match group.size() {
            1 => hidden_td.shallow_clone(),
            _ => gather_from_group(hidden_td, group)?,
        };
        let own = VocabularyRows {
            rows: self.rows.clone(),
            total: self.config.vocab_size,
            group,
        };
        unit.gather()?;
        let labels_t = labels_bs.flatten(0, -1);
        let loss = cross_entropy(
            &hidden_td,
            weight,
            &labels_t,
            1.0 / totals.tokens,
            self.logits_divisor(),
            &own,
        )?;
        unit.release();
        Ok(loss)
    }

    /// Stage number `chunk`'s auxiliary losses.
    pub(crate) fn aux_losses(
        &self,
        chunk: usize,
        stats: &[RouterStats],
        totals: &BatchTotals,
    ) -> AuxLosses {
        let mut out = AuxLosses {
            total: None,
            load_balance: 0.0,
            z: 0.0,
        };
        let Some(moe) = self.config.moe.as_ref().filter(|_| !stats.is_empty()) else {
            return out;
        };
        // Counts of the whole batch are there for all layers.
        let moe_layers = &self.stages[chunk].moe_layers;
        let counts = totals
            .counts_le
            .map(|counts| counts.narrow(0, moe_layers.start as i64, moe_layers.len() as i64));
        let totals = BatchTotals {
            counts_le: counts.as_ref(),
            ..*totals
        };
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
        kernels::gemm(hidden_td, &head.weight.value().tr()).to_kind(Kind::Float)
            / self.logits_divisor()
    }

    /// The loss-free balancing biases where the model has them: number among the model's MoE layers, global name,
    /// `[E]`.
    pub fn biases(&self) -> impl Iterator<Item = (usize, String, Tensor)> {
        self.local_moe_layers().filter_map(|(number, moe, held)| {
            let bias = moe.weights.bias.as_ref()?.lock().shallow_clone();
            Some((number, format!("{}.bias", held.name), bias))
        })
    }

    /// The MoE layers that are here, with their numbers among the model's.
    pub(crate) fn local_moe_layers(
        &self,
    ) -> impl Iterator<Item = (usize, &MoeLayer, &LocalExperts)> {
        self.stages.iter().flat_map(|stage| {
            let moe_layers =
                stage
                    .layers
                    .iter()
                    .filter_map(|(layer, _)| match &layer.feed_forward {
                        FeedForward::Moe(moe, held) => Some((moe.as_ref(), held)),
                        FeedForward::Dense { .. } => None,
                    });
            stage
                .moe_layers
                .clone()
                .zip(moe_layers)
                .map(|(number, (moe, held))| (number, moe, held))
        })
    }

    /// Which of the model's MoE layers stage number `chunk` has.
    pub(crate) fn moe_layers(&self, chunk: usize) -> Range<usize> {
        self.stages[chunk].moe_layers.clone()
    }

    /// Whether load balance is measured over the whole step, so that its counts must be known before backward.
    pub fn counts_whole_batch(&self) -> bool {
        let moe = self.config.moe.as_ref();
        moe.is_some_and(|moe| {
            moe.load_balance_over == BalanceScope::Batch && moe.load_balance > 0.0
        })
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What of the model is here.
    pub fn part(&self) -> &ModelPart {
        &self.part
    }

    /// Calls `body` with this rank's rows of the embedding, where the vocabulary is shared out, and their numbers.
    pub(crate) fn with_embedding<T>(
        &self,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_vocabulary_weight(&self.embedding, body)
    }

    /// The same where only gradients are added, so that no rows need be gathered.
    pub(crate) fn own_embedding(&self) -> (&Weight, &Range<usize>) {
        let end = self
            .embedding
            .as_ref()
            .expect("a schedule with passes of the vocabulary shares it out");
        (&end.weight, &self.rows)
    }

    /// As [`Model::with_embedding`], for the output layer.
    pub(crate) fn with_head<T>(
        &self,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_vocabulary_weight(&self.head, body)
    }

    fn with_vocabulary_weight<T>(
        &self,
        end: &Option<VocabularyWeight>,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let VocabularyWeight { weight, unit } = end
            .as_ref()
            .expect("a schedule with passes of the vocabulary shares it out");
        unit.gather()?;
        let out = body(weight, &self.rows);
        unit.release();
        out
    }

    /// Says that ranks have changed the rows of weights that they keep.
    pub(crate) fn mark_stale(&self) {
        self.embedding
            .iter()
            .chain(&self.head)
            .for_each(|end| end.unit.mark_stale());
        for stage in &self.stages {
            stage.layers.iter().for_each(|(_, unit)| unit.mark_stale());
            stage.norm.iter().for_each(|(_, unit)| unit.mark_stale());
        }
    }

    /// What logits are divided by.
    pub(crate) fn logits_divisor(&self) -> f64 {
        self.config.mup.as_ref().map_or(1.0, |mup| mup.width)
    }
}

fn layer(
    parameters: &mut Parameters,
    ctx: &BuildContext,
    config: &ModelConfig,
    index: usize,
    matrix: ParameterOptions,
    writes: ParameterOptions,
) -> Layer {
    let BuildContext {
        device,
        ranks,
        recompute,
        ..
    } = ctx;
    let hidden = config.hidden as i64;
    let name = format!("layers.{index}");
    let norm = |parameters: &mut Parameters, part: &str| {
        let options = ParameterOptions {
            init: Init::Ones,
            decay: false,
            lr_scale: 1.0,
        };
        parameters.one(
            *device,
            TensorSlice::whole(format!("{name}.{part}"), &[hidden]),
            Replicas::Stage,
            options,
        )
    };
    let attention_norm = norm(parameters, "attention_norm");
    let attention = Attention::new(
        parameters,
        ctx,
        config,
        &format!("{name}.attention"),
        matrix,
        writes,
    );
    let feed_forward_norm = norm(parameters, "feed_forward_norm");
    let feed_forward = match config.moe_config(index) {
        None => {
            let ffn = config.ffn.unwrap_or(0) as i64;
            let (gate_up, down) = swiglu(
                parameters,
                ctx,
                &format!("{name}.mlp"),
                hidden,
                ffn,
                matrix,
                writes,
            );
            let keep = recompute.keeps(RecomputedPart::Experts);
            FeedForward::Dense {
                gate_up,
                down,
                tensor: ranks.tensor.clone(),
                keep,
            }
        }
        Some(moe) => {
            let name = format!("{name}.moe");
            let (moe, held) = moe_layer(parameters, ctx, moe, &name, hidden, matrix, writes);
            FeedForward::Moe(Box::new(moe), held)
        }
    };
    Layer {
        attention_norm,
        attention,
        feed_forward_norm,
        feed_forward,
        norm_eps: config.norm_eps,
        residual: config.mup.as_ref().map_or(1.0, |mup| mup.residual),
        keep_norms: recompute.keeps(RecomputedPart::Norm),
        keep: !recompute.recomputes_layer(index),
    }
}

/// Gate and up `[1, 2F, D]`, down `[1, D, F]`; of F this rank's part.
fn swiglu(
    parameters: &mut Parameters,
    ctx: &BuildContext,
    name: &str,
    hidden: i64,
    ffn: i64,
    matrix: ParameterOptions,
    writes: ParameterOptions,
) -> (Weight, Weight) {
    let device = ctx.device;
    let tensor = &ctx.ranks.tensor;
    let part = tensor.local_range(ffn);
    let own = part.end - part.start;
    let boxes = gate_up_boxes(&format!("{name}.gate_up"), ffn, hidden, &part);
    let gate_up = parameters.add(
        device,
        &[1, 2 * own, hidden],
        boxes,
        Replicas::Dense,
        matrix,
    );
    let boxes = vec![slice(&format!("{name}.down"), &[hidden, ffn], 1, &part)];
    let down = parameters.add(device, &[1, hidden, own], boxes, Replicas::Dense, writes);
    (
        gate_up.scale_uses(tensor.uses_per_forward()),
        down.scale_uses(tensor.uses_per_forward()),
    )
}

fn moe_layer(
    parameters: &mut Parameters,
    ctx: &BuildContext,
    config: &MoeConfig,
    name: &str,
    hidden: i64,
    matrix: ParameterOptions,
    writes: ParameterOptions,
) -> (MoeLayer, LocalExperts) {
    let BuildContext {
        device,
        ranks,
        recompute,
        ..
    } = ctx;
    let num_experts = config.experts;
    let place = TensorSlice::whole(format!("{name}.gate"), &[num_experts as i64, hidden]);
    let gate = parameters.one(*device, place, Replicas::Stage, matrix);
    // Neighbours split the same experts.
    let slices = ranks.topology.slices;
    let owner = ranks.experts.rank() / slices;
    let slice_of = ranks.experts.rank() % slices;
    let local = num_experts * slices / ranks.experts.size();
    let ffn = config.ffn as i64;
    let each = ffn / slices as i64;
    let part = each * slice_of as i64..each * (slice_of as i64 + 1);
    let own = owner * local..(owner + 1) * local;
    let held = LocalExperts {
        name: name.to_string(),
        gate_up: parameters.len(),
        down: parameters.len() + 1,
        shape: ExpertShape { hidden, ffn, part },
        own: own.clone(),
    };
    let experts: Vec<usize> = own.collect();
    let shape = [local as i64, 2 * each, hidden];
    let gate_up = parameters.add(
        *device,
        &shape,
        held.shape.gate_up(name, &experts),
        Replicas::Expert,
        matrix,
    );
    let shape = [local as i64, hidden, each];
    let down = parameters.add(
        *device,
        &shape,
        held.shape.down(name, &experts),
        Replicas::Expert,
        writes,
    );
    let shared = (config.shared_experts > 0).then(|| {
        let ffn = (config.shared_experts * config.ffn) as i64;
        swiglu(
            parameters,
            ctx,
            &format!("{name}.shared"),
            hidden,
            ffn,
            matrix,
            writes,
        )
    });
    let bias = (config.bias_update_rate > 0.0)
        .then(|| Mutex::new(device.zeros(&[num_experts as i64], Kind::Float)));
    let router = Router {
        num_experts,
        top_k: config.top_k,
        score: config.router.score,
        normalize: config.router.normalize,
        scale: config.router.scale,
        groups: config.router.groups,
        top_groups: config.router.top_groups,
        even_groups: config.router.even_groups,
        force_balance: config.router.force_balance,
    };
    let least_loaded = ranks.least_loaded.clone();
    let hierarchy = ranks.hierarchy.clone();
    let chunks = ranks.expert_chunks;
    let gate_up = gate_up.scale_uses(chunks);
    let down = down.scale_uses(chunks);
    let layer = MoeLayer {
        router,
        dispatcher: Dispatcher::new(
            ranks.experts.clone(),
            num_experts,
            ranks.topology.clone(),
            least_loaded,
            hierarchy,
            chunks,
        ),
        balance_scope: config.load_balance_over,
        tensor: ranks.tensor.clone(),
        sequence: ranks.sequence.clone(),
        gemm: ctx.expert_gemm,
        keep: SavePolicy {
            dispatched: recompute.keeps(RecomputedPart::Dispatch),
            experts: recompute.keeps(RecomputedPart::Experts),
        },
        weights: MoeWeights {
            router: gate,
            bias,
            gate_up_proj: gate_up,
            down_proj: down,
            shared,
        },
    };
    (layer, held)
}
