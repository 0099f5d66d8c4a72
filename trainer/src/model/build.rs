//! Construction of a rank's part of the model.

use super::{
    Model, Stage, VocabularyWeight,
    attention::Attention,
    build_context::BuildContext,
    experts::{ExpertShape, LocalExperts, gate_up_slices},
    layer::{FeedForward, Layer},
    options::{ParameterOptions, RoleOptions},
    parameters::{Parameters, Replicas, Unit, slice},
    part::{ModelPart, StagePart, VocabularyShard},
    rope::Rope,
};
use crate::config::{ModelConfig, MoeConfig, RecomputedPart};
use checkpoint::TensorSlice;
use moe::{MoeLayer, MoeWeights, Router, SavePolicy, dispatch::Dispatcher};
use parallel::{Weight, context::positions};
use parking_lot::Mutex;
use std::{ops::Range, sync::Arc};
use tch::{Kind, Tensor};

impl Model {
    /// Builds the part `part` of the model that `config` and the seed describe, with the matrices
    /// and experts that belong to this rank.
    pub fn new(config: &ModelConfig, part: ModelPart, ctx: &BuildContext) -> Model {
        kernels::profile::wait_for_device_of(&ctx.device.empty(&[0], Kind::Float));
        let tensor = &ctx.groups.tensor;
        let shard = part.vocabulary.unwrap_or(VocabularyShard {
            rank: tensor.rank(),
            ranks: tensor.size(),
        });
        let rows = shard.rows(config.vocab_size);
        let parameters = Parameters::new(
            ctx.dtype.kind(),
            ctx.seed,
            ctx.groups.zero,
            ctx.groups.replications.clone(),
            ctx.offload,
        );
        let mut builder = Builder {
            parameters,
            ctx,
            config,
            options: RoleOptions::new(config),
            rows: rows.clone(),
        };

        let shares_vocabulary = part.vocabulary.is_some();
        let embedding_replicas = embedding_replicas(config, &part);
        let has_embedding = shares_vocabulary || part.has_first();
        let embedding = has_embedding.then(|| builder.embedding(embedding_replicas));
        let stages = part.stages.iter().map(|stage| builder.stage(stage));
        let mut stages: Vec<Stage> = stages.collect();
        if let Some(last) = part.stages.iter().position(|stage| stage.last) {
            stages[last].norm = Some(builder.final_norm());
        }
        let has_head = shares_vocabulary || part.has_last();
        let head = has_head.then(|| match &embedding {
            Some(embedding) if config.tie_embeddings => VocabularyWeight {
                weight: embedding.weight.tied(),
                unit: embedding.unit.clone(),
            },
            None if config.tie_embeddings => builder.embedding(embedding_replicas),
            _ => builder.vocabulary_weight("head", Replicas::Dense),
        });

        let parameters = builder.parameters;
        let context = &ctx.groups.context;
        let positions = positions(
            ctx.context_attention,
            ctx.sequence_length,
            context.rank(),
            context.size(),
        );
        let rope = Rope::new(ctx.device, &positions, config.head_dim(), config.rope_theta);
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
            rope: Arc::new(rope),
            tensor: tensor.clone(),
            rows,
            positions,
        }
    }
}

/// Returns the replicas of the embedding: all ranks of both ends if it is tied and the ends are on
/// different ranks.
fn embedding_replicas(config: &ModelConfig, part: &ModelPart) -> Replicas {
    let is_split = part.has_first() != part.has_last();
    if config.tie_embeddings && part.vocabulary.is_none() && is_split {
        Replicas::TiedEmbedding
    } else {
        Replicas::Dense
    }
}

/// The parameters so far, and what the next ones are built from.
struct Builder<'a> {
    parameters: Parameters,
    ctx: &'a BuildContext<'a>,
    config: &'a ModelConfig,
    options: RoleOptions,
    /// Rows of the vocabulary on this rank.
    rows: Range<usize>,
}

/// Gate and up `[1, 2F, D]` and down `[1, D, F]`; of F this rank's part.
struct Swiglu {
    gate_up: Weight,
    down: Weight,
}

impl Builder<'_> {
    fn unit_from(&self, first: usize) -> Arc<Unit> {
        Arc::new(self.parameters.unit(first))
    }

    fn add_slice(
        &mut self,
        slice: TensorSlice,
        replicas: Replicas,
        options: ParameterOptions,
    ) -> Weight {
        let device = self.ctx.device;
        self.parameters.add_slice(device, slice, replicas, options)
    }

    fn embedding(&mut self, replicas: Replicas) -> VocabularyWeight {
        self.vocabulary_weight("embedding", replicas)
    }

    fn vocabulary_weight(&mut self, name: &str, replicas: Replicas) -> VocabularyWeight {
        let shape = [self.config.vocab_size as i64, self.config.hidden as i64];
        let rows = self.rows.start as i64..self.rows.end as i64;
        let first = self.parameters.len();
        let slice = slice(name, &shape, 0, &rows);
        let weight = self.add_slice(slice, replicas, self.options.vocabulary);
        VocabularyWeight {
            weight,
            unit: self.unit_from(first),
        }
    }

    fn norm(&mut self, name: String) -> Weight {
        let slice = TensorSlice::whole(name, &[self.config.hidden as i64]);
        self.add_slice(slice, Replicas::Stage, self.options.norm)
    }

    fn final_norm(&mut self) -> (Weight, Arc<Unit>) {
        let first = self.parameters.len();
        let weight = self.norm("norm".to_string());
        (weight, self.unit_from(first))
    }

    fn stage(&mut self, part: &StagePart) -> Stage {
        let config = self.config;
        let has_moe = |index: &usize| config.moe_config(*index).is_some();
        let moe_layers_before = |layer: usize| (0..layer).filter(has_moe).count();
        let mut layers = Vec::new();
        for index in part.layers.clone() {
            let first = self.parameters.len();
            let layer = self.layer(index);
            layers.push((Arc::new(layer), self.unit_from(first)));
        }
        Stage {
            layers,
            moe_layers: moe_layers_before(part.layers.start)..moe_layers_before(part.layers.end),
            norm: None,
        }
    }

    fn layer(&mut self, index: usize) -> Layer {
        let config = self.config;
        let recompute = &self.ctx.recompute;
        let name = format!("layers.{index}");
        let attention_norm = self.norm(format!("{name}.attention_norm"));
        let attention = Attention::new(
            &mut self.parameters,
            self.ctx,
            config,
            &format!("{name}.attention"),
            &self.options,
        );
        let feed_forward_norm = self.norm(format!("{name}.feed_forward_norm"));
        let feed_forward = match config.moe_config(index) {
            None => {
                let ffn = config.ffn.unwrap_or(0);
                let Swiglu { gate_up, down } = self.swiglu(&format!("{name}.mlp"), ffn);
                FeedForward::Dense {
                    gate_up,
                    down,
                    tensor: self.ctx.groups.tensor.clone(),
                    save_gate_up: recompute.keeps(RecomputedPart::Experts),
                }
            }
            Some(moe) => {
                let (layer, experts) = self.moe_layer(&format!("{name}.moe"), moe);
                FeedForward::Moe(Box::new(layer), experts)
            }
        };
        Layer {
            attention_norm,
            attention,
            feed_forward_norm,
            feed_forward,
            norm_eps: config.norm_eps,
            residual: config.mup.as_ref().map_or(1.0, |mup| mup.residual),
            save_norms: recompute.keeps(RecomputedPart::Norm),
            save_activations: !recompute.recomputes_layer(index),
        }
    }

    fn swiglu(&mut self, name: &str, ffn: usize) -> Swiglu {
        let device = self.ctx.device;
        let tensor = &self.ctx.groups.tensor;
        let hidden = self.config.hidden as i64;
        let ffn = ffn as i64;
        let part = tensor.local_range(ffn);
        let own = part.end - part.start;
        let gate_up = self.parameters.add(
            device,
            &[1, 2 * own, hidden],
            gate_up_slices(&format!("{name}.gate_up"), ffn, hidden, &part),
            Replicas::Dense,
            self.options.matrix,
        );
        let down = self.parameters.add(
            device,
            &[1, hidden, own],
            vec![slice(&format!("{name}.down"), &[hidden, ffn], 1, &part)],
            Replicas::Dense,
            self.options.residual,
        );
        let uses = tensor.uses_per_forward();
        Swiglu {
            gate_up: gate_up.scale_uses(uses),
            down: down.scale_uses(uses),
        }
    }

    fn moe_layer(&mut self, name: &str, config: &MoeConfig) -> (MoeLayer, LocalExperts) {
        let ctx = self.ctx;
        let groups = ctx.groups;
        let hidden = self.config.hidden as i64;
        let router_shape = [config.experts as i64, hidden];
        let router_slice = TensorSlice::whole(format!("{name}.gate"), &router_shape);
        let router = self.add_slice(router_slice, Replicas::Stage, self.options.matrix);
        let experts = self.local_experts(name, config);
        let numbers: Vec<usize> = experts.slots.clone().collect();
        let local = numbers.len() as i64;
        let columns = experts.shape.part.end - experts.shape.part.start;
        let gate_up = self.parameters.add(
            ctx.device,
            &[local, 2 * columns, hidden],
            experts.shape.gate_up(name, &numbers),
            Replicas::Expert,
            self.options.matrix,
        );
        let down = self.parameters.add(
            ctx.device,
            &[local, hidden, columns],
            experts.shape.down(name, &numbers),
            Replicas::Expert,
            self.options.residual,
        );
        let shared = (config.shared_experts > 0).then(|| {
            let ffn = config.shared_experts * config.ffn;
            let Swiglu { gate_up, down } = self.swiglu(&format!("{name}.shared"), ffn);
            (gate_up, down)
        });
        let zeros = || ctx.device.zeros(&[config.experts as i64], Kind::Float);
        let bias = (config.bias_update_rate > 0.0).then(zeros);
        let chunks = groups.expert_chunks;
        let dispatcher = Dispatcher::new(
            groups.experts.clone(),
            config.experts,
            groups.topology.clone(),
            groups.least_loaded.clone(),
            groups.hierarchy.clone(),
            chunks,
        );
        let layer = MoeLayer {
            router: moe_router(config),
            dispatcher,
            balance_scope: config.load_balance_over,
            tensor: groups.tensor.clone(),
            sequence: groups.sequence.clone(),
            gemm: ctx.expert_gemm.for_layer(),
            save: SavePolicy {
                dispatched: ctx.recompute.keeps(RecomputedPart::Dispatch),
                experts: ctx.recompute.keeps(RecomputedPart::Experts),
            },
            weights: MoeWeights {
                router,
                bias: Mutex::new(bias),
                gate_up_proj: gate_up.scale_uses(chunks),
                down_proj: down.scale_uses(chunks),
                shared,
            },
        };
        (layer, experts)
    }

    /// Returns which experts, and which columns of them, this rank holds. The next two parameters
    /// must be theirs.
    fn local_experts(&self, name: &str, config: &MoeConfig) -> LocalExperts {
        let groups = self.ctx.groups;
        // Neighboring ranks split the same experts.
        let slices = groups.topology.slices;
        let owner = groups.experts.rank() / slices;
        let slice = (groups.experts.rank() % slices) as i64;
        let local = config.experts * slices / groups.experts.size();
        let ffn = config.ffn as i64;
        let columns = ffn / slices as i64;
        LocalExperts {
            name: name.to_string(),
            gate_up: self.parameters.len(),
            down: self.parameters.len() + 1,
            shape: ExpertShape {
                hidden: self.config.hidden as i64,
                ffn,
                part: columns * slice..columns * (slice + 1),
            },
            slots: owner * local..(owner + 1) * local,
        }
    }
}

fn moe_router(config: &MoeConfig) -> Router {
    let router = &config.router;
    Router {
        num_experts: config.experts,
        top_k: config.top_k,
        score: router.score,
        normalize: config.normalizes(),
        scale: router.scale,
        groups: router.groups,
        top_groups: router.top_groups,
        even_groups: router.even_groups,
        force_balance: router.force_balance,
    }
}
