//! What each rank will hold, estimated before anything starts: bytes of tensors as plain arithmetic.
//!
//! Parameters are exact. Activations are what the layers' autograd nodes keep, for as many microbatches as the schedule
//! holds at once; expert load is taken as even.

use crate::config::{Config, Dtype, MoeConfig, QkNorm, RecomputedPart};
use crate::model::parameters::Replicas;
use crate::model::{ModelPart, StagePart, VocabularyShard};
use crate::process_groups::zero_rank_and_size;
use parallel::pipeline::simulate::simulate;
use parallel::{BucketPlan, Coordinates, GroupKind, Mesh, own_rows, plan_buckets};

/// fp32 logits of the output layer's loss that exist at once take up to this many bytes.
const LOGITS_CHUNK_BYTES: u64 = 16 << 20;

/// What a rank holds, in bytes.
#[derive(Debug, Clone)]
pub struct RankMemory {
    /// The rank.
    pub rank: usize,
    /// Where it sits.
    pub at: Coordinates,
    /// Its layers, a range for each stage.
    pub stages: Vec<StagePart>,
    /// Elements of its parameters, without what it shares out.
    pub parameters: u64,
    /// Weights as the model computes with them.
    pub weights: u64,
    /// Gradients during a step.
    pub gradients: u64,
    /// Moments, and fp32 masters where the model is bf16; none with `optimizer.offload`.
    pub optimizer: u64,
    /// Moments and fp32 masters in the host's memory, beside a device that has its own: not part of [`RankMemory::total`].
    pub host: u64,
    /// Microbatches whose activations exist at once, and what they are.
    pub held: f64,
    /// Kept from forward to backward.
    pub activations: u64,
    /// The largest of what exists only briefly: a layer's backward, the loss, gathered weights.
    pub transient: u64,
}

impl RankMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.transient
    }
}

/// One parameter of a rank.
struct ParameterShape {
    rows: u64,
    cols: u64,
    replicas: Replicas,
    /// Parameters that are gathered together.
    unit: usize,
}

/// Sizes that layers share, as one rank sees them.
struct Sizes<'a> {
    config: &'a Config,
    mesh: Mesh,
    /// Tokens of a microbatch on the ranks that split its matrices, and on this rank between blocks.
    tokens: u64,
    own_tokens: u64,
    /// Bytes of an element.
    element: u64,
}

impl Sizes<'_> {
    fn heads(&self) -> (u64, u64) {
        let model = &self.config.model;
        let tensor = self.mesh.shape().tensor;
        let own = model.heads / tensor;
        let kv = model.kv_heads();
        let held = if kv.is_multiple_of(tensor) {
            kv / tensor
        } else {
            kv
        };
        (own as u64, held as u64)
    }

    /// The shapes of layer `index`, in order.
    fn layer(&self, index: usize, unit: usize) -> Vec<ParameterShape> {
        let model = &self.config.model;
        let shape = self.mesh.shape();
        let hidden = model.hidden as u64;
        let width = model.head_dim() as u64;
        let (heads, kv) = self.heads();
        let of_kv = if model.kv_heads().is_multiple_of(shape.tensor) {
            Replicas::Dense
        } else {
            Replicas::Stage
        };
        let tensor = shape.tensor as u64;
        let mut shapes = Vec::new();
        let mut add = |rows: u64, cols: u64, replicas| {
            shapes.push(ParameterShape {
                rows,
                cols,
                replicas,
                unit,
            })
        };
        add(hidden, 1, Replicas::Stage);
        add(heads * width, hidden, Replicas::Dense);
        add(kv * width, hidden, of_kv);
        add(kv * width, hidden, of_kv);
        match model.qk_norm {
            QkNorm::None => {}
            QkNorm::Full => {
                add(heads * width, 1, Replicas::Dense);
                add(kv * width, 1, of_kv);
            }
            QkNorm::Head => (0..2).for_each(|_| add(width, 1, Replicas::Stage)),
        }
        add(hidden, heads * width, Replicas::Dense);
        add(hidden, 1, Replicas::Stage);
        let mut swiglu = |copies: u64, ffn: u64, replicas| {
            add(copies * 2 * ffn, hidden, replicas);
            add(copies * hidden, ffn, replicas);
        };
        match model.moe_config(index) {
            None => swiglu(1, model.ffn.unwrap_or(0) as u64 / tensor, Replicas::Dense),
            Some(moe) => {
                swiglu(
                    (moe.experts / shape.expert) as u64,
                    (moe.ffn / shape.expert_tensor) as u64,
                    Replicas::Expert,
                );
                if moe.shared_experts > 0 {
                    swiglu(
                        1,
                        (moe.shared_experts * moe.ffn) as u64 / tensor,
                        Replicas::Dense,
                    );
                }
                add(moe.experts as u64, hidden, Replicas::Stage);
            }
        }
        shapes
    }

    /// Rows at this rank's experts, and rows that it gets back.
    fn routed_tokens(&self, moe: &MoeConfig) -> u64 {
        self.own_tokens * (moe.top_k * self.mesh.shape().expert_tensor) as u64
    }

    /// Bytes of layer `index` from forward to backward, and of its backward's own tensors.
    fn activations(&self, index: usize) -> (u64, u64) {
        let model = &self.config.model;
        let recompute = &self.config.parallel.recompute;
        let shape = self.mesh.shape();
        let keeps = |part| recompute.keeps(part);
        let hidden = model.hidden as u64;
        let width = model.head_dim() as u64;
        let b = self.element;
        let (heads, kv) = self.heads();
        let queries = self.tokens * heads * width * b;
        let keys = self.tokens * kv * width * b;
        let stream = self.own_tokens * hidden * b;
        // Inputs of both norms, and their outputs.
        let mut kept = 2 * stream
            + if keeps(RecomputedPart::Norm) {
                2 * stream
            } else {
                0
            };
        // libtorch's own attention keeps keys and values once for every query head.
        let ring = shape.context > 1;
        let on_host = self.config.run.device == "cpu";
        let repeated = !(ring || on_host && self.config.data.eod_token.is_none());
        kept += match keeps(RecomputedPart::Attention) {
            // The output, too, and log-sum-exps.
            true if repeated => 4 * queries + self.tokens * heads * 4,
            true => 2 * queries + 2 * keys + self.tokens * heads * 4,
            false => 2 * queries + 2 * keys,
        };
        if model.qk_norm != QkNorm::None {
            kept += queries + keys;
        }
        // Backward of attention: gradients of what it keeps; of a norm, four rows in fp32.
        let mut transient = 4 * queries + 4 * self.own_tokens * hidden * 4;
        let mut swiglu = |rows: u64, ffn: u64| {
            let product = rows * 2 * ffn * b;
            let half = rows * ffn * b;
            kept += if keeps(RecomputedPart::Experts) {
                product
            } else {
                0
            };
            // Gradients of the product and of the activation, the activation, the rows' gradient.
            transient = transient.max(product + 3 * half + 3 * rows * hidden * b);
        };
        let tensor = shape.tensor as u64;
        match model.moe_config(index) {
            None => swiglu(self.tokens, model.ffn.unwrap_or(0) as u64 / tensor),
            Some(moe) => {
                let rows = self.routed_tokens(moe);
                swiglu(rows, (moe.ffn / shape.expert_tensor) as u64);
                if moe.shared_experts > 0 {
                    swiglu(self.tokens, (moe.shared_experts * moe.ffn) as u64 / tensor);
                }
                // Rows at the experts and back, router scores, indices.
                kept += if keeps(RecomputedPart::Dispatch) {
                    rows * hidden * b
                } else {
                    0
                };
                kept +=
                    rows * hidden * b + 3 * self.own_tokens * moe.experts as u64 * 4 + 4 * rows * 8;
            }
        }
        if recompute.recomputes_layer(index) {
            (stream, transient + kept)
        } else {
            (kept, transient)
        }
    }
}

impl Config {
    /// What each of `ranks` ranks will hold.
    ///
    /// # Errors
    /// When the configuration cannot run on them.
    pub fn memory(&self, ranks: usize) -> Result<Vec<RankMemory>, String> {
        let mesh = self.mesh(0, ranks)?;
        let plan = self.pipeline_plan(self.microbatches(&mesh))?;
        let order = &plan.schedule.order;
        let timeline = simulate(&plan.schedule, &self.costs(order, &plan.layers));
        (0..ranks)
            .map(|rank| {
                let mesh = self.mesh(rank, ranks)?;
                let at = mesh.coordinates();
                let shape = mesh.shape();
                let shared = order.vocabulary.is_some();
                let tensor = (at.tensor, shape.tensor);
                let stages = mesh.group(GroupKind::Pipeline).len();
                let part = ModelPart::for_rank(
                    (at.pipeline, stages),
                    order.placement,
                    &plan.layers,
                    shared,
                    tensor,
                );
                Ok(self.rank_memory(mesh, part, timeline.peak_microbatches[at.pipeline]))
            })
            .collect()
    }

    fn rank_memory(&self, mesh: Mesh, part: ModelPart, held: f64) -> RankMemory {
        let shape = mesh.shape();
        let model = &self.model;
        let parallel = &self.parallel;
        let tokens = (self.train.micro_batch * self.data.sequence_length / shape.context) as u64;
        let own_tokens = tokens / shape.tensor as u64;
        let element = if self.train.dtype == Dtype::Bf16 {
            2
        } else {
            4
        };
        let sizes = Sizes {
            config: self,
            mesh,
            tokens,
            own_tokens,
            element,
        };
        let hidden = model.hidden as u64;

        // Parameters, in the model's order.
        let at = mesh.coordinates();
        let shard = part.vocabulary.unwrap_or(VocabularyShard {
            rank: at.tensor,
            ranks: shape.tensor,
        });
        let rows = shard.rows(model.vocab_size).len() as u64;
        let shared = part.vocabulary.is_some();
        let split_tied_embedding =
            model.tie_embeddings && !shared && part.has_first() != part.has_last();
        let embedding_replicas = if split_tied_embedding {
            Replicas::TiedEmbedding
        } else {
            Replicas::Dense
        };
        let mut unit = 0;
        let mut shapes = Vec::new();
        let has_embedding = shared || part.has_first();
        if has_embedding {
            shapes.push(ParameterShape {
                rows,
                cols: hidden,
                replicas: embedding_replicas,
                unit,
            });
        }
        for layer in part.stages.iter().flat_map(|stage| stage.layers.clone()) {
            unit += 1;
            shapes.extend(sizes.layer(layer, unit));
        }
        if part.has_last() {
            unit += 1;
            shapes.push(ParameterShape {
                rows: hidden,
                cols: 1,
                replicas: Replicas::Stage,
                unit,
            });
        }
        if (shared || part.has_last()) && !(model.tie_embeddings && has_embedding) {
            unit += 1;
            shapes.push(ParameterShape {
                rows,
                cols: hidden,
                replicas: embedding_replicas,
                unit,
            });
        }

        // Of each, what is kept here, and what a rank sends when it is gathered.
        let sharing = |replicas| zero_rank_and_size(&mesh, parallel, replicas);
        let own = |shape: &ParameterShape| {
            let (rank, ranks) = sharing(shape.replicas);
            let own = own_rows(shape.rows as i64, rank, ranks);
            (own.end - own.start) as u64 * shape.cols
        };
        let whole = |shape: &ParameterShape| shape.rows * shape.cols;
        let kept: u64 = shapes.iter().map(own).sum();
        let all: u64 = shapes.iter().map(whole).sum();
        let is_shared = |shape: &&ParameterShape| sharing(shape.replicas).1 > 1;
        let mut transient = 0;
        let weights = match parallel.zero {
            3 => {
                // A layer's weights and the next one's, as they arrive and as they are used.
                let of_unit = |unit: usize| {
                    shapes
                        .iter()
                        .filter(is_shared)
                        .filter(|s| s.unit == unit)
                        .map(whole)
                        .sum::<u64>()
                };
                transient += (0..=unit)
                    .map(|unit| of_unit(unit) * element)
                    .max()
                    .unwrap_or(0)
                    * 3;
                shapes
                    .iter()
                    .map(|s| if is_shared(&s) { own(s) } else { whole(s) })
                    .sum::<u64>()
                    * element
            }
            _ => all * element,
        };
        let of_gradients = match parallel.zero {
            0 => all * 4,
            1 => (all + shapes.iter().filter(is_shared).map(own).sum::<u64>()) * 4,
            _ => {
                let divided: Vec<&ParameterShape> = shapes.iter().filter(is_shared).collect();
                let lengths: Vec<(usize, usize)> = divided
                    .iter()
                    .map(|s| (whole(s) as usize, s.replicas as usize))
                    .collect();
                let buckets = plan_buckets(&lengths, (parallel.bucket_mib * 262144.0) as usize);
                // One that is added to; two as they are sent, and a rank's share of each as it arrives.
                let travelling = |bucket: &BucketPlan| {
                    let (_, ranks) = sharing(divided[bucket.members[0]].replicas);
                    3 * bucket.len as u64 + 2 * (bucket.len / ranks) as u64
                };
                transient += buckets.iter().map(travelling).max().unwrap_or(0) * 4;
                shapes
                    .iter()
                    .map(|s| if is_shared(&s) { own(s) } else { whole(s) })
                    .sum::<u64>()
                    * 4
            }
        };
        // In fp32 the weights are the masters, but where those are on the host.
        let offloaded = self.optimizer.offload && self.run.device != "cpu";
        let (optimizer, host) = match (offloaded, element) {
            (true, _) => (0, 12 * kept),
            (false, 2) => (12 * kept, 0),
            (false, _) => (8 * kept, 0),
        };

        let mut activations = 0;
        let mut largest = 0;
        // A chunk of logits, and what is computed beside it.
        let logits = LOGITS_CHUNK_BYTES.min(tokens * rows * 4);
        for stage in &part.stages {
            for layer in stage.layers.clone() {
                let (kept, backward) = sizes.activations(layer);
                activations += kept;
                largest = largest.max(backward);
            }
            if stage.last {
                activations += 2 * own_tokens * hidden * element;
                largest = largest.max(if shared {
                    0
                } else {
                    3 * logits + 2 * tokens * hidden * element
                });
            }
        }
        if shared {
            // The softmax of a microbatch, from S to T; fp32 logits are few at once.
            largest += 2 * logits + tokens * rows * element + 6 * tokens * hidden * element;
        }
        RankMemory {
            rank: mesh.rank(),
            at,
            stages: part.stages,
            parameters: kept,
            weights,
            gradients: of_gradients,
            optimizer,
            host,
            held,
            activations: (activations as f64 * held) as u64,
            transient: transient + largest,
        }
    }
}
