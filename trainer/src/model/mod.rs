//! The decoder: embedding, transformer layers with dense or MoE feed-forward, output layer.
// Shapes: B batch, S sequence, T = B * S tokens, D hidden, F ffn, V vocabulary, E experts, L of
// them on this rank.

pub(crate) mod activations;
pub(crate) mod attention;
mod batch;
mod bias;
mod build;
mod build_context;
mod core_attention;
pub(crate) mod core_plan;
pub(crate) mod decoder;
mod documents;
mod embedding;
pub(crate) mod experts;
pub(crate) mod feed_forward;
pub(crate) mod init;
mod largest_scores;
mod layer;
pub(crate) mod loss;
pub(crate) mod moe_block;
pub(crate) mod norm;
mod options;
pub(crate) mod parameters;
pub(crate) mod part;
pub(crate) mod position;
pub(crate) mod replicas;
pub(crate) mod role;
pub(crate) mod rope;
pub(crate) mod rope_scaling;
mod rotary_part;
mod rules;
pub(crate) mod score_rows;
mod share;
pub(crate) mod slices;
pub(crate) mod spec;
pub(crate) mod vocabulary;
mod weights;
mod window_masks;
mod work;

use crate::{
    Error,
    config::{ModelConfig, documents::DocumentRules},
    model::parameters::{Parameters, Unit},
};
use attention::Attention;
use documents::{DocumentPositions, Documents, positions_in_documents};
use embedding::embed;
use layer::{FeedForward, Layer, with_gathered_weights};
use loss::{VocabularyRows, cross_entropy};
use moe::{
    MoeLayer, MoeStats,
    balance::{BalanceScope, BatchTotals, RouterStats, load_balance_loss, z_loss},
};
use moe_block::RouterBias;
use norm::Norm;
use parallel::{Weight, collectives::gather_from_group, tensor::TensorParallel};
use std::{ops::Range, sync::Arc};
use tch::{Kind, Tensor};

pub(crate) use batch::BatchContext;
pub use build_context::BuildContext;
pub use decoder::ParameterCount;
pub(crate) use experts::LocalExperts;
pub(crate) use loss::{IGNORED, LossScale, with_gradient};
pub use part::{ModelPart, PipelineSplit, StagePart, split_layers};
pub use share::Share;

/// This rank's part of a decoder, and its parameters.
pub struct Model {
    config: ModelConfig,
    part: ModelPart,
    /// Every parameter, in order of use.
    pub parameters: Parameters,
    /// Set if the rank has the first stage or a share of the vocabulary.
    embedding: Option<VocabularyWeight>,
    stages: Vec<Stage>,
    /// Set if the rank has the last stage or a share of the vocabulary.
    head: Option<VocabularyWeight>,
    tensor: TensorParallel,
    /// Rows of embedding and output layer on this rank.
    rows: Range<usize>,
    /// This rank's positions of a sequence, if context parallelism splits sequences.
    positions: Option<Tensor>,
    documents: Option<DocumentRules>,
}

/// This rank's rows of the embedding or of the output layer.
struct VocabularyWeight {
    weight: Weight,
    unit: Arc<Unit>,
}

struct Stage {
    layers: Vec<(Arc<Layer>, Arc<Unit>)>,
    /// Range among the MoE layers of the model.
    moe_layers: Range<usize>,
    /// The final norm, in the last stage.
    norm: Option<(Norm, Arc<Unit>)>,
}

/// Output of one stage for one microbatch.
pub struct ForwardOutput {
    /// `[T, D]`; normalized if the stage is the last.
    pub hidden_td: Tensor,
    /// Router statistics of each MoE layer.
    pub stats: Vec<RouterStats>,
    /// Routing and transfers of each MoE layer.
    pub moe_stats: Vec<MoeStats>,
}

/// A stage's contributions to the auxiliary losses of the whole step, each `[]` fp32.
pub struct AuxLosses {
    /// Weighted sum that enters the total loss.
    pub total: Tensor,
    /// Load-balancing loss, not weighted and without gradient.
    pub load_balance: Tensor,
    /// Router z-loss, not weighted and without gradient.
    pub z: Tensor,
}

/// One microbatch's contributions to the losses of the whole step, each `[]` fp32. Their sums over
/// ranks and microbatches are the losses of the step.
pub struct Losses {
    /// Total loss, from which backward starts.
    pub total: Tensor,
    /// Cross-entropy per counted token, in nats, without gradient.
    pub cross_entropy: Tensor,
    /// `None` without MoE layers.
    pub aux: Option<AuxLosses>,
}

impl Model {
    /// Selects this rank's positions of `x_bs` `[B, S]`.
    pub(crate) fn own_positions(&self, x_bs: &Tensor) -> Tensor {
        match &self.positions {
            Some(positions) => x_bs.index_select(1, positions),
            None => x_bs.shallow_clone(),
        }
    }

    /// Sets the treatment of documents in a model of one rank, which has all positions.
    pub(crate) fn set_documents(&mut self, rules: Option<DocumentRules>) {
        self.documents = rules;
    }

    /// True if all stages read the tokens, to find the documents that share a sequence.
    pub(crate) fn reads_documents(&self) -> bool {
        self.documents.is_some()
    }

    /// Returns the positions of whole sequences `tokens_bs` `[B, S]` int64 within documents, of the
    /// same shape and in host memory, if they begin at 0 in each document.
    ///
    /// # Errors
    /// If the tokens cannot be read.
    pub(crate) fn document_positions(&self, tokens_bs: &Tensor) -> Result<Option<Tensor>, Error> {
        let rules = self.documents.filter(|rules| rules.reset_positions);
        let positions = rules.map(|rules| positions_in_documents(tokens_bs, rules.end));
        Ok(positions.transpose()?)
    }

    /// Returns the context of whole sequences `tokens_bs` `[B, S]` int64 on the model's device,
    /// with what [`Model::document_positions`] returns for them, on the same device.
    pub(crate) fn batch_context(
        &self,
        tokens_bs: &Tensor,
        positions_bs: Option<&Tensor>,
    ) -> BatchContext {
        let masked = self.documents.filter(|rules| rules.mask);
        let documents = masked.map(|rules| Arc::new(Documents::new(tokens_bs, rules.end)));
        let own = positions_bs.map(|positions| self.own_positions(positions));
        BatchContext {
            sequences: tokens_bs.size()[0],
            documents,
            positions: own.map(|own| Arc::new(DocumentPositions::new(own))),
        }
    }

    /// Returns the tensor-parallel ranks.
    pub(crate) fn tensor(&self) -> &TensorParallel {
        &self.tensor
    }

    /// Maps `tokens_bs` `[B, S]` int64 through all layers of a whole model.
    ///
    /// # Collective
    /// All ranks of the expert group.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn forward(&self, tokens_bs: &Tensor) -> Result<ForwardOutput, Error> {
        let positions = self.document_positions(tokens_bs)?;
        let positions = positions.map(|positions| positions.to_device(tokens_bs.device()));
        let batch = self.batch_context(tokens_bs, positions.as_ref());
        self.forward_stage(0, &self.embed(tokens_bs)?, &batch)
    }

    /// Returns the first stage's input `[T, D]` for this rank's positions `tokens_bs` `[B, s]`
    /// int64.
    ///
    /// # Collective
    /// All ranks of the tensor group.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn embed(&self, tokens_bs: &Tensor) -> Result<Tensor, Error> {
        let embedding = self.embedding.as_ref();
        let VocabularyWeight { weight, unit } = embedding.expect("the first stage is here");
        unit.gather()?;
        let out = embed(&tokens_bs.flatten(0, -1), weight, &self.rows, &self.tensor)?;
        unit.release();
        Ok(out)
    }

    /// Maps `x_td` `[T, D]`, this rank's tokens of `batch`, through model chunk `chunk`.
    ///
    /// # Collective
    /// All ranks that work on the stage.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn forward_stage(
        &self,
        chunk: usize,
        x_td: &Tensor,
        batch: &BatchContext,
    ) -> Result<ForwardOutput, Error> {
        let stage = &self.stages[chunk];
        let multiplier = self.config.embedding_factor();
        let mut x = if self.part.stages[chunk].first && multiplier != 1.0 {
            x_td * multiplier
        } else {
            x_td.shallow_clone()
        };
        let mut stats = vec![];
        let mut moe_stats = vec![];
        let unit = |index: usize| stage.layers.get(index).map(|(_, unit)| unit);
        for (index, (layer, own)) in stage.layers.iter().enumerate() {
            let previous = index.checked_sub(1).and_then(unit);
            let next = unit(index + 1);
            let (out, aux_output) =
                with_gathered_weights(&x, own, previous, next, |x| layer.forward(x, batch))?;
            x = out;
            if let Some((router_stats, layer_stats)) = aux_output {
                stats.push(router_stats);
                moe_stats.push(layer_stats);
            }
        }
        if let Some((norm, own)) = &stage.norm {
            let previous = stage.layers.len().checked_sub(1).and_then(unit);
            (x, ()) = with_gathered_weights(&x, own, previous, None, |x| Ok((norm.apply(x)?, ())))?;
        }
        Ok(ForwardOutput {
            hidden_td: x,
            stats,
            moe_stats,
        })
    }

    /// Returns a whole model's losses for one microbatch, against `labels_bs` `[B, S]` int64.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn losses(
        &self,
        output: &ForwardOutput,
        labels_bs: &Tensor,
        totals: &BatchTotals,
    ) -> Result<Losses, Error> {
        let loss = self.cross_entropy(&output.hidden_td, labels_bs, totals)?;
        let cross_entropy = loss.detach();
        let aux = self.aux_losses(0, &output.stats, totals);
        let total = match &aux {
            Some(aux) => loss + &aux.total,
            None => loss,
        };
        Ok(Losses {
            total,
            cross_entropy,
            aux,
        })
    }

    /// Returns the cross-entropy of the last stage's output `[T, D]` against `labels_bs` `[B, s]`
    /// int64, the same on all ranks of the tensor group.
    ///
    /// # Collective
    /// All ranks of the tensor group.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn cross_entropy(
        &self,
        hidden_td: &Tensor,
        labels_bs: &Tensor,
        totals: &BatchTotals,
    ) -> Result<Tensor, Error> {
        let head = self.head.as_ref();
        let VocabularyWeight { weight, unit } = head.expect("the last stage is here");
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
        let scale = self.loss_scale(totals);
        let loss = cross_entropy(&hidden_td, weight, &labels_t, scale, &own)?;
        unit.release();
        Ok(loss)
    }

    /// Returns the scaling of the cross-entropy: the mean over the counted tokens of the step.
    pub(crate) fn loss_scale(&self, totals: &BatchTotals) -> LossScale {
        LossScale {
            // Without a counted token every loss is 0, and 0 times this must not be NaN.
            factor: 1.0 / totals.counted_tokens.max(1.0),
            logits_divisor: self.config.logits_divisor(),
        }
    }

    /// Returns the auxiliary losses of model chunk `chunk`, `None` without MoE layers.
    pub(crate) fn aux_losses(
        &self,
        chunk: usize,
        stats: &[RouterStats],
        totals: &BatchTotals,
    ) -> Option<AuxLosses> {
        let moe = self.config.moe.as_ref().filter(|_| !stats.is_empty())?;
        // Counts of the whole batch cover all layers of the model.
        let moe_layers = &self.stages[chunk].moe_layers;
        let first = moe_layers.start as i64;
        let count = moe_layers.len() as i64;
        let counts = totals.counts_le.map(|all| all.narrow(0, first, count));
        let totals = BatchTotals {
            counts_le: counts.as_ref(),
            ..*totals
        };
        let load_balance =
            load_balance_loss(stats, moe.top_k, moe.load_balance_pool_layers, &totals);
        let z = z_loss(stats, &totals);
        let mut total = &load_balance * moe.load_balance;
        if moe.z_loss > 0.0 {
            total = total + &z * moe.z_loss;
        }
        Some(AuxLosses {
            total,
            load_balance: load_balance.detach(),
            z: z.detach(),
        })
    }

    /// Returns logits `[T, V]` in fp32 for hidden states `[T, D]` of a whole model.
    pub fn logits(&self, hidden_td: &Tensor) -> Tensor {
        let head = self.head.as_ref().expect("the last stage is here");
        let matrix = head.weight.value();
        kernels::gemm(hidden_td, &matrix.tr()).to_kind(Kind::Float) / self.config.logits_divisor()
    }

    /// Gives each MoE layer without a loss-free balancing bias one of zeros, if `is_saved` returns
    /// true for its global name. Routers with a trained bias get none: it is their only bias.
    pub(crate) fn add_biases(&self, is_saved: impl Fn(&str) -> bool) {
        let moe = self.config.moe.as_ref();
        if moe.is_some_and(|moe| moe.router.bias == Some(RouterBias::Trained)) {
            return;
        }
        for (_, moe, experts) in self.local_moe_layers() {
            let mut bias = moe.weights.bias.lock();
            if bias.is_none() && is_saved(&bias_name(experts)) {
                let router = moe.weights.router.value();
                let experts = router.size()[0];
                *bias = Some(Tensor::zeros([experts], (Kind::Float, router.device())));
            }
        }
    }

    /// Returns the loss-free balancing biases: index among the model's MoE layers, global name, and
    /// the bias `[E]`.
    pub fn biases(&self) -> impl Iterator<Item = (usize, String, Tensor)> {
        self.local_moe_layers().filter_map(|(index, moe, experts)| {
            let bias = moe.weights.bias.lock();
            let bias = bias.as_ref()?.shallow_clone();
            Some((index, bias_name(experts), bias))
        })
    }

    /// Returns the MoE layers on this rank, with their index among the model's MoE layers.
    pub(crate) fn local_moe_layers(
        &self,
    ) -> impl Iterator<Item = (usize, &MoeLayer, &LocalExperts)> {
        self.stages.iter().flat_map(|stage| {
            let layers = stage.layers.iter();
            let moe_layers = layers.filter_map(|(layer, _)| match &layer.feed_forward {
                FeedForward::Moe(block) => Some((&block.layer, &block.experts)),
                FeedForward::Dense(_) => None,
            });
            let numbered = stage.moe_layers.clone().zip(moe_layers);
            numbered.map(|(index, (moe, experts))| (index, moe, experts))
        })
    }

    /// Starts to measure the largest attention score of each head.
    pub(crate) fn begin_largest_scores(&self) {
        for (_, attention) in self.local_attention() {
            attention.largest_scores().begin();
        }
    }

    /// Ends measuring and returns the largest attention score of each head, by layer and query head
    /// of the whole model; negative infinity for heads of other ranks.
    ///
    /// # Errors
    /// If earlier work on the device failed.
    pub(crate) fn take_largest_scores(&self) -> Result<Vec<f32>, Error> {
        let heads = self.config.heads;
        let first = self.tensor.local_range(heads as i64).start as usize;
        let taken = |(layer, attention): (usize, &dyn Attention)| {
            Some((layer, attention.largest_scores().take()?))
        };
        let measured: Vec<_> = self.local_attention().filter_map(taken).collect();
        let mut all = vec![f32::NEG_INFINITY; self.config.layers * heads];
        if measured.is_empty() {
            return Ok(all);
        }
        let tensors: Vec<&Tensor> = measured.iter().map(|(_, largest)| largest).collect();
        let fetched = Vec::<f32>::try_from(Tensor::f_cat(&tensors, 0)?)?;
        let own_heads = fetched.len() / measured.len();
        for ((layer, _), largest) in measured.iter().zip(fetched.chunks_exact(own_heads)) {
            let start = layer * heads + first;
            all[start..start + own_heads].copy_from_slice(largest);
        }
        Ok(all)
    }

    /// Returns the attention of this rank's layers, with the index of the layer.
    fn local_attention(&self) -> impl Iterator<Item = (usize, &dyn Attention)> {
        let stages = self.part.stages.iter().zip(&self.stages);
        stages.flat_map(|(part, stage)| {
            let layers = stage.layers.iter();
            let attention = layers.map(|(layer, _)| layer.attention.as_ref());
            part.layers.clone().zip(attention)
        })
    }

    /// Returns the range of model chunk `chunk` among the model's MoE layers.
    pub(crate) fn moe_layers(&self, chunk: usize) -> Range<usize> {
        self.stages[chunk].moe_layers.clone()
    }

    /// True if the load-balancing loss spans the whole step, so that backward needs all token
    /// counts in advance.
    pub fn counts_whole_batch(&self) -> bool {
        let moe = self.config.moe.as_ref();
        moe.is_some_and(|moe| {
            moe.load_balance_over == BalanceScope::Batch && moe.load_balance > 0.0
        })
    }

    /// Returns the shape of the whole model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns which part of the model this rank has.
    pub fn part(&self) -> &ModelPart {
        &self.part
    }

    /// Calls `body` with this rank's rows of the embedding, gathered, and their range, under
    /// vocabulary parallelism.
    pub(crate) fn with_embedding<T>(
        &self,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_vocabulary_weight(&self.embedding, body)
    }

    /// Returns the same without gathering, which adding gradients does not need.
    pub(crate) fn own_embedding(&self) -> (&Weight, &Range<usize>) {
        let embedding = self.embedding.as_ref().expect("the vocabulary is shared");
        (&embedding.weight, &self.rows)
    }

    /// Calls `body` as [`Model::with_embedding`] does, for the output layer.
    pub(crate) fn with_head<T>(
        &self,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_vocabulary_weight(&self.head, body)
    }

    fn with_vocabulary_weight<T>(
        &self,
        vocabulary_weight: &Option<VocabularyWeight>,
        body: impl FnOnce(&Weight, &Range<usize>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let VocabularyWeight { weight, unit } = vocabulary_weight
            .as_ref()
            .expect("the vocabulary is shared");
        unit.gather()?;
        let out = body(weight, &self.rows);
        unit.release();
        out
    }

    /// Marks gathered and rounded weights as stale after an update.
    pub(crate) fn mark_stale(&self) {
        for vocabulary_weight in self.embedding.iter().chain(&self.head) {
            vocabulary_weight.unit.mark_stale();
        }
        for stage in &self.stages {
            for (_, unit) in &stage.layers {
                unit.mark_stale();
            }
            if let Some((_, unit)) = &stage.norm {
                unit.mark_stale();
            }
        }
        for (_, moe, _) in self.local_moe_layers() {
            moe.gemm.mark_stale();
        }
    }
}

fn bias_name(experts: &LocalExperts) -> String {
    decoder::selection_bias_name(&experts.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Dtype, process_groups::ProcessGroups};
    use parallel::Cpu;
    use serde_json::{Value, json};

    #[test]
    fn saved_selection_biases_return_except_where_a_bias_is_trained() {
        let count = |bias: Value| {
            let config: ModelConfig = serde_json::from_value(json!({
                "layers": 2, "hidden": 8, "heads": 2, "vocab_size": 11,
                "moe": {"experts": 3, "top_k": 1, "ffn": 5, "router": {"bias": bias}},
            }))
            .unwrap();
            let groups = ProcessGroups::single_rank();
            let ctx = BuildContext::single_rank(4, Dtype::Fp32, &Cpu, &groups);
            let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
            model.add_biases(|name| name == "layers.1.moe.bias");
            model.biases().count()
        };
        assert_eq!(count(Value::Null), 1);
        assert_eq!(count(json!("frozen")), 2);
        assert_eq!(count(json!("trained")), 0);
    }

    #[test]
    fn documents_of_a_sequence_are_computed_as_if_they_were_alone() {
        let grouped = json!({"grouped": {"window": {"size": 3, "layers": [1]}, "sinks": true}});
        let latent = json!({"latent": {
            "kv_rank": 5, "nope_dim": 2, "rope_dim": 4, "value_dim": 3,
        }});
        for attention in [grouped, latent] {
            let config: ModelConfig = serde_json::from_value(json!({
                "layers": 2, "hidden": 8, "heads": 2, "vocab_size": 11, "ffn": 12, "init_std": 0.5,
                "attention": attention,
            }))
            .unwrap();
            let groups = ProcessGroups::single_rank();
            let documents = Some(DocumentRules {
                end: 7,
                mask: true,
                reset_positions: true,
            });
            let ctx = BuildContext {
                documents,
                ..BuildContext::single_rank(9, Dtype::Fp32, &Cpu, &groups)
            };
            let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
            let forward = |tokens: &[i64]| {
                let tokens = Tensor::from_slice(tokens).view([1, -1]);
                tch::no_grad(|| model.forward(&tokens).unwrap().hidden_td)
            };
            let packed = [1, 2, 3, 7, 7, 4, 2, 7, 5];
            let together = forward(&packed);
            let mut start = 0;
            for document in packed.split_inclusive(|&token| token == 7) {
                let length = document.len() as i64;
                let part = together.narrow(0, start, length);
                assert!(part.allclose(&forward(document), 1e-5, 1e-6, false));
                start += length;
            }
        }
    }
}
