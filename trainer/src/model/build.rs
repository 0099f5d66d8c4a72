//! Construction of a rank's part of the model.

use super::{
    Model, Stage, VocabularyWeight,
    build_context::BuildContext,
    decoder::{attention_name, block_norm_specs, layer_name, stream_norm_spec, vocabulary_spec},
    layer::{FeedForward, Layer},
    moe_block,
    norm::{BlockNorms, Norm, NormNames},
    parameters::Unit,
    part::{HeadWeight, ModelPart, StagePart},
    position::ShardPosition,
    rope::Rope,
    weights::WeightBuilder,
};
use crate::config::{ModelConfig, RecomputedPart};
use parallel::context::positions;
use std::sync::Arc;
use tch::{Kind, Tensor};

impl Model {
    /// Builds the part `part` of the model that `config` and the seed describe, with the matrices
    /// and experts that belong to this rank.
    pub fn new(config: &ModelConfig, part: ModelPart, ctx: &BuildContext) -> Model {
        kernels::profile::wait_for_device_of(&ctx.device.empty(&[0], Kind::Float));
        let position = ShardPosition::in_groups(ctx.groups).with_part(config.tie_embeddings, &part);
        let context = &ctx.groups.context;
        let positions = positions(
            ctx.context_attention,
            ctx.sequence_length,
            context.rank(),
            context.size(),
        );
        let resets_positions = ctx.documents.is_some_and(|rules| rules.reset_positions);
        // Any position may be that of a token in its document.
        let rope_positions = if resets_positions {
            (0..ctx.sequence_length as i64).collect()
        } else {
            positions.clone()
        };
        let width = config.rope.width(config.attention(0).rotary_part().width);
        let frequencies = config
            .rope
            .frequencies(config.rope_theta, width, ctx.sequence_length);
        let mut builder = Builder {
            weights: WeightBuilder::new(config.parameter_rules(), position, ctx),
            config,
            rope: Arc::new(Rope::new(ctx.device, &rope_positions, &frequencies)),
        };
        let ends = part.ends(config.tie_embeddings);
        let embedding = (ends.embedding).then(|| builder.vocabulary_weight("embedding"));
        let stages = part.stages.iter().map(|stage| builder.stage(stage));
        let mut stages: Vec<Stage> = stages.collect();
        if let Some(last) = part.stages.iter().position(|stage| stage.last) {
            stages[last].norm = Some(builder.final_norm());
        }
        let head = match ends.head {
            HeadWeight::None => None,
            HeadWeight::Own => Some(builder.vocabulary_weight("head")),
            HeadWeight::Embedding => embedding.as_ref().map(VocabularyWeight::tied),
            HeadWeight::EmbeddingCopy => Some(builder.vocabulary_weight("embedding")),
        };

        let parameters = builder.weights.parameters;
        let splits_sequences = context.size() > 1;
        let positions =
            splits_sequences.then(|| ctx.device.upload(&Tensor::from_slice(&positions)));
        Model {
            config: config.clone(),
            part,
            parameters,
            embedding,
            stages,
            head,
            tensor: ctx.groups.tensor.clone(),
            rows: position.vocabulary.part(config.vocab_size),
            positions,
            documents: ctx.documents,
        }
    }
}

impl VocabularyWeight {
    /// Returns the same weight for the other end of the model.
    fn tied(&self) -> VocabularyWeight {
        VocabularyWeight {
            weight: self.weight.tied(),
            unit: self.unit.clone(),
        }
    }
}

/// Builds the parts of a model, in the order of use.
struct Builder<'a> {
    weights: WeightBuilder<'a>,
    config: &'a ModelConfig,
    rope: Arc<Rope>,
}

impl Builder<'_> {
    fn vocabulary_weight(&mut self, name: &'static str) -> VocabularyWeight {
        let first = self.weights.parameters.len();
        let weight = self.weights.add(&vocabulary_spec(self.config, name));
        VocabularyWeight {
            weight,
            unit: self.weights.unit_from(first),
        }
    }

    fn final_norm(&mut self) -> (Norm, Arc<Unit>) {
        let first = self.weights.parameters.len();
        let spec = stream_norm_spec(self.config, "", "norm");
        let norm = self.weights.add_norm(&spec, self.config.norm_eps);
        (norm, self.weights.unit_from(first))
    }

    /// Builds a block of the layer with this global name, and the norms around it.
    fn with_norms<T>(
        &mut self,
        layer: &str,
        names: NormNames,
        build: impl FnOnce(&mut Self) -> T,
    ) -> (T, BlockNorms<Norm>) {
        let BlockNorms { input, output } = block_norm_specs(self.config, layer, names);
        let input = input.map(|spec| self.weights.add_norm(&spec, self.config.norm_eps));
        let block = build(self);
        let output = output.map(|spec| self.weights.add_norm(&spec, self.config.norm_eps));
        (block, BlockNorms { input, output })
    }

    fn stage(&mut self, part: &StagePart) -> Stage {
        let config = self.config;
        let has_moe = |index: &usize| config.moe_config(*index).is_some();
        let moe_layers_before = |layer: usize| (0..layer).filter(has_moe).count();
        let mut layers = Vec::new();
        for index in part.layers.clone() {
            let first = self.weights.parameters.len();
            let layer = self.layer(index);
            layers.push((Arc::new(layer), self.weights.unit_from(first)));
        }
        Stage {
            layers,
            moe_layers: moe_layers_before(part.layers.start)..moe_layers_before(part.layers.end),
            norm: None,
        }
    }

    fn layer(&mut self, index: usize) -> Layer {
        let config = self.config;
        let name = layer_name(index);
        let (attention, attention_norms) = self.with_norms(&name, NormNames::ATTENTION, |this| {
            config
                .attention(index)
                .build(&mut this.weights, &attention_name(index))
        });
        let (feed_forward, feed_forward_norms) =
            self.with_norms(&name, NormNames::FEED_FORWARD, |this| {
                this.feed_forward(index, &name)
            });
        let recompute = &self.weights.ctx.recompute;
        Layer {
            attention,
            attention_norms,
            feed_forward,
            feed_forward_norms,
            rope: config
                .rope
                .layers
                .contains(index)
                .then(|| self.rope.clone()),
            residual: config.residual_factor(),
            save_norms: recompute.keeps(RecomputedPart::Norm),
            save_activations: !recompute.recomputes_layer(index),
        }
    }

    fn feed_forward(&mut self, index: usize, layer: &str) -> FeedForward {
        let config = self.config;
        match config.moe_config(index) {
            None => {
                let name = format!("{layer}.mlp");
                FeedForward::Dense(config.dense().build(&mut self.weights, &name))
            }
            Some(moe) => {
                let name = format!("{layer}.moe");
                let block = moe_block::build(&mut self.weights, &name, config.hidden, moe);
                FeedForward::Moe(Box::new(block))
            }
        }
    }
}
