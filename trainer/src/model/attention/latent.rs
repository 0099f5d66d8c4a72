//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv
//! 2412.19437, section 2.1.1).
//!
//! Keys and values of all heads are products of one narrow latent vector per token. One further
//! key, which rotates, is shared by all heads; each head's key is that one followed by its own part
//! without rotation. Queries may come from a latent vector, too.
// Shapes: B batch, s positions of a sequence on this rank, T = B * s tokens, R tensor-parallel
// ranks, D hidden, H heads of this rank, q and c widths of the latents, r and n widths of a key's
// parts with and without rotation, v width of a value.

use super::{
    Attention, AttentionKeys, AttentionPlan, HeadKeys, HeadRows, grouped::QkNorm,
    saved::SavedAttention,
};
use crate::{
    config::{layout::RecomputedPart, limits::MAX_WIDTH},
    model::{
        activations::{Activations, BlockShape, FP32_BYTES},
        batch::BatchContext,
        core_attention::CoreAttention,
        core_plan::CorePlan,
        largest_scores::LargestScores,
        norm::{Norm, norm_spec},
        rope::Rope,
        rotary_part::RotaryPart,
        score_rows::{BlockScoreRows, ScorePart, ScoreRows},
        spec::{Dim, ParamSpec, Role, Split},
        weights::WeightBuilder,
        work::Flops,
    },
    problems::Problems,
};
use parallel::{Activation, Weight, linear, linears, tensor::TensorParallel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;
use torch_ext::Error;

/// Term added to the mean square in the norms of latents, whatever `model.norm_eps` is: released
/// checkpoints and Hugging Face transformers use this value.
const LATENT_NORM_EPS: f64 = 1e-6;

/// Multi-head latent attention: keys and values come from a narrow vector per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LatentConfig {
    /// Width of the vector that queries come from. By default they come from the residual stream.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    #[serde(default)]
    pub query_rank: Option<usize>,
    /// Width of the vector that keys and values come from.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub kv_rank: usize,
    /// Width of the part of queries and keys that does not rotate.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub nope_dim: usize,
    /// Width of the part of queries and keys that rotates. All heads share this part of the key.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub rope_dim: usize,
    /// Width of values.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub value_dim: usize,
}

/// The plan of multi-head latent attention.
#[derive(Debug, Clone)]
pub(crate) struct LatentAttention {
    pub(crate) model: AttentionKeys,
    pub(crate) config: LatentConfig,
}

/// Descriptions of the parameters of one block.
struct LatentSpecs {
    /// `[q, D]`, and the norm of the queries' latent.
    query_down: Option<[ParamSpec; 2]>,
    /// `[heads x (r + n), D]`, or `[.., q]`.
    query: ParamSpec,
    /// `[c + r, D]`.
    kv_down: ParamSpec,
    kv_norm: ParamSpec,
    /// `[heads x (n + v), c]`.
    kv_up: ParamSpec,
    /// `[D, heads x v]`.
    output: ParamSpec,
}

impl LatentSpecs {
    fn new(plan: &LatentAttention, block: &str) -> LatentSpecs {
        let config = &plan.config;
        let heads = plan.model.heads as u64;
        let hidden = Dim::hidden(plan.model.hidden);
        let matrix = |part, dims: [Dim; 2], split| {
            ParamSpec::single(block, part, &dims, split, Role::Matrix)
        };
        let wide = |key, width: usize| Dim::new(key, heads.saturating_mul(width as u64));
        let kv_latent = Dim::new("model.attention.latent.kv_rank", config.kv_rank as u64);
        let query_latent = config
            .query_rank
            .map(|rank| Dim::new("model.attention.latent.query_rank", rank as u64));
        let queries = wide(
            "model.heads x (rope_dim + nope_dim)",
            config.rope_dim.saturating_add(config.nope_dim),
        );
        let keys_and_values = wide(
            "model.heads x (nope_dim + value_dim)",
            config.nope_dim.saturating_add(config.value_dim),
        );
        let values = wide("model.heads x value_dim", config.value_dim);
        let latent_and_key = Dim::new(
            "model.attention.latent.kv_rank + rope_dim",
            config.kv_rank.saturating_add(config.rope_dim) as u64,
        );
        LatentSpecs {
            query_down: query_latent.map(|rank| {
                [
                    matrix("query_down", [rank, hidden], Split::Whole),
                    norm_spec(block, "query_norm", rank, Split::Whole),
                ]
            }),
            query: matrix(
                "query",
                [queries, query_latent.unwrap_or(hidden)],
                Split::heads(0, heads),
            ),
            kv_down: matrix("kv_down", [latent_and_key, hidden], Split::Whole),
            kv_norm: norm_spec(block, "kv_norm", kv_latent, Split::Whole),
            kv_up: matrix(
                "kv_up",
                [keys_and_values, kv_latent],
                Split::heads(0, heads),
            ),
            output: ParamSpec {
                writes_residual: true,
                ..matrix("output", [hidden, values], Split::heads(1, heads))
            },
        }
    }

    /// Returns the descriptions in the order of use.
    fn into_list(self) -> Vec<ParamSpec> {
        let mut list: Vec<ParamSpec> = self.query_down.into_iter().flatten().collect();
        list.extend([
            self.query,
            self.kv_down,
            self.kv_norm,
            self.kv_up,
            self.output,
        ]);
        list
    }
}

impl LatentAttention {
    /// Returns the width of a query and of a key.
    fn key_dim(&self) -> usize {
        self.config.rope_dim + self.config.nope_dim
    }
}

impl AttentionPlan for LatentAttention {
    fn specs(&self, block: &str) -> Vec<ParamSpec> {
        LatentSpecs::new(self, block).into_list()
    }

    fn score_rows(&self) -> BlockScoreRows {
        let LatentConfig {
            nope_dim,
            rope_dim,
            value_dim,
            ..
        } = self.config;
        let of_query = |rows, makes| ScoreRows {
            part: "query",
            head_rows: rope_dim + nope_dim,
            rows,
            makes,
        };
        BlockScoreRows {
            heads: self.model.heads,
            key_heads: self.model.heads,
            parts: vec![
                of_query(0..rope_dim, ScorePart::QueryOfSharedKey),
                of_query(rope_dim..rope_dim + nope_dim, ScorePart::Query),
                ScoreRows {
                    part: "kv_up",
                    head_rows: nope_dim + value_dim,
                    rows: 0..nope_dim,
                    makes: ScorePart::Key,
                },
            ],
        }
    }

    fn head_keys(&self) -> HeadKeys {
        HeadKeys {
            kv_heads: None,
            head_dim: None,
        }
    }

    fn rotary_part(&self) -> RotaryPart {
        RotaryPart {
            width: self.config.rope_dim,
            width_key: "model.attention.latent.rope_dim",
            scales_softmax: true,
        }
    }

    fn head_rows(&self, part: &str, rotary: u64) -> Option<HeadRows> {
        let LatentConfig {
            kv_rank, nope_dim, ..
        } = self.config;
        match part {
            "query" => Some(HeadRows {
                heads: self.model.heads as u64,
                width: rotary + nope_dim as u64,
                rotary: 0..rotary,
            }),
            // The latent, and the part of the key that all heads share.
            "kv_down" => Some(HeadRows {
                heads: 1,
                width: kv_rank as u64 + rotary,
                rotary: kv_rank as u64..kv_rank as u64 + rotary,
            }),
            _ => None,
        }
    }

    fn core_plan(&self) -> CorePlan {
        CorePlan {
            heads: self.model.heads,
            key_width: self.key_dim(),
            value_width: self.config.value_dim,
            window: None,
            sinks: false,
        }
    }

    fn widest(&self) -> usize {
        let LatentConfig {
            query_rank,
            kv_rank,
            nope_dim,
            rope_dim,
            value_dim,
        } = self.config;
        let per_head = nope_dim.saturating_add(rope_dim.max(value_dim));
        let latent = kv_rank
            .saturating_add(rope_dim)
            .max(query_rank.unwrap_or(0));
        self.model.heads.saturating_mul(per_head).max(latent)
    }

    fn flops(&self, length: usize) -> Flops {
        let per_position = self.model.heads * (self.key_dim() + self.config.value_dim);
        Flops {
            activations: 2.0 * per_position as f64 * length as f64,
            ..Flops::of_specs(&self.specs(""))
        }
    }

    fn activations(&self, at: &BlockShape) -> Activations {
        let config = &self.config;
        let heads = (self.model.heads / at.mesh.tensor) as u64;
        let of_heads = |width: usize| at.tokens * heads * width as u64 * at.element;
        let latents = |width: usize| at.own_tokens * width as u64 * at.element;
        let keys = of_heads(self.key_dim());
        // Values are a part of the product that also has the keys' parts without rotation.
        let keys_and_values = of_heads(config.nope_dim + config.value_dim);
        let values = of_heads(config.value_dim);
        let log_sum_exps = at.tokens * heads * FP32_BYTES;
        // Each latent before and after its norm.
        let mut saved = 2 * latents(config.query_rank.unwrap_or(0));
        saved += 2 * latents(config.kv_rank + config.rope_dim);
        let keeps_output = at.recompute.keeps(RecomputedPart::Attention);
        saved += 2 * keys;
        saved += if keeps_output && at.sequences.in_ring {
            // A ring copies the values out of the product, and has its output by heads besides the
            // one by tokens.
            3 * values
        } else {
            keys_and_values + values
        };
        if keeps_output {
            saved += log_sum_exps;
        }
        let norm = at.own_tokens * self.model.hidden as u64 * FP32_BYTES;
        Activations {
            saved,
            transient: 3 * keys
                + 2 * keys_and_values
                + values
                + 4 * norm
                + self.core_plan().tile_bytes(at),
        }
    }

    fn problems(&self, problems: &mut Problems) {
        let model = &self.model;
        let given = [
            (model.kv_heads.is_some(), "model.kv_heads"),
            (model.head_dim.is_some(), "model.head_dim"),
            (model.qk_norm != QkNorm::None, "model.qk_norm"),
        ];
        for (_, key) in given.iter().filter(|(is_given, _)| *is_given) {
            problems.add(format!(
                "model.attention is latent, which has no {key}: leave it out"
            ));
        }
    }

    fn heads(&self) -> usize {
        self.model.heads
    }

    fn build(&self, builder: &mut WeightBuilder, name: &str) -> Box<dyn Attention> {
        let specs = LatentSpecs::new(self, name);
        let ctx = builder.ctx;
        let tensor = ctx.groups.tensor.clone();
        let query_down = specs.query_down.map(|[down, norm]| QueryDown {
            matrix: builder.add(&down),
            norm: builder.add_norm(&norm, LATENT_NORM_EPS),
        });
        let heads = self.model.heads as i64 / tensor.size() as i64;
        Box::new(LatentHeads {
            query_down,
            query: builder.add(&specs.query),
            kv_down: builder.add(&specs.kv_down),
            kv_norm: builder.add_norm(&specs.kv_norm, LATENT_NORM_EPS),
            kv_up: builder.add(&specs.kv_up),
            output: builder.add(&specs.output),
            kv_rank: self.config.kv_rank as i64,
            nope_dim: self.config.nope_dim as i64,
            rope_dim: self.config.rope_dim as i64,
            value_dim: self.config.value_dim as i64,
            heads,
            tensor,
            attention: SavedAttention {
                core: CoreAttention {
                    scale: self.model.score_scale.of_width(self.key_dim())
                        * self.model.latent_scale_factor,
                    window: None,
                    sinks: None,
                    window_masks: builder.window_masks.clone(),
                    largest_scores: LargestScores::default(),
                    kv_head_of_query: (0..heads).collect(),
                    context: ctx.groups.context.clone(),
                    kind: ctx.context_attention,
                },
                keeps_output: ctx.recompute.keeps(RecomputedPart::Attention),
            },
        })
    }
}

/// This rank's part of multi-head latent attention. Ranks hold the matrices to the latents whole
/// and apply them to their own tokens; they split the matrices from the latents by heads.
struct LatentHeads {
    query_down: Option<QueryDown>,
    query: Weight,
    kv_down: Weight,
    kv_norm: Norm,
    kv_up: Weight,
    output: Weight,
    kv_rank: i64,
    nope_dim: i64,
    rope_dim: i64,
    value_dim: i64,
    /// Heads of this rank.
    heads: i64,
    tensor: TensorParallel,
    attention: SavedAttention,
}

/// Map to the latent of queries.
struct QueryDown {
    matrix: Weight,
    norm: Norm,
}

impl Attention for LatentHeads {
    fn forward(
        &self,
        x: &Activation,
        batch: &BatchContext,
        rope: Option<&Rope>,
    ) -> Result<Tensor, Error> {
        let sequences = batch.sequences;
        let query = self.queries(x)?;
        let query = self.split_heads(&query, sequences);
        let (shared_key, keys_and_values) = self.keys_and_values(x)?;
        let shared_key = shared_key
            .view([sequences, -1, 1, self.rope_dim])
            .transpose(1, 2);
        let (query, shared_key) = match rope {
            Some(rope) => (rope.apply(&query, batch)?, rope.apply(&shared_key, batch)?),
            None => (query, shared_key),
        };
        let keys_and_values = self.split_heads(&keys_and_values, sequences);
        let own_key = keys_and_values.narrow(3, 0, self.nope_dim);
        let value = keys_and_values.narrow(3, self.nope_dim, self.value_dim);
        let shared_key = shared_key.expand([-1, self.heads, -1, -1], false);
        let key = Tensor::cat(&[shared_key, own_key], 3);
        let documents = batch.documents.as_ref();
        let mixed = self.attention.attend(&query, &key, &value, documents)?;
        let merged = mixed
            .transpose(1, 2)
            .reshape([-1, self.heads * self.value_dim]);
        self.tensor
            .row_parallel(&merged, |merged| linear(merged, &self.output))
    }

    fn largest_scores(&self) -> &LargestScores {
        &self.attention.core.largest_scores
    }
}

impl LatentHeads {
    /// Returns the queries of this rank's heads for all tokens, `[T, H * (r + n)]`.
    fn queries(&self, x: &Activation) -> Result<Tensor, Error> {
        let latent = match &self.query_down {
            None => None,
            Some(QueryDown { matrix, norm }) => {
                let latent = linears(x, &[matrix])?.remove(0);
                Some(Activation::kept(&norm.apply(&latent)?))
            }
        };
        let input = latent.as_ref().unwrap_or(x);
        let project = |input: &Activation| linears(input, &[&self.query]);
        Ok(self.tensor.column_parallel(input, project)?.remove(0))
    }

    /// Returns for all tokens the key that all heads share, `[T, r]`, and the keys and values of
    /// this rank's heads, `[T, H * (n + v)]`.
    fn keys_and_values(&self, x: &Activation) -> Result<(Tensor, Tensor), Error> {
        let down = linears(x, &[&self.kv_down])?.remove(0);
        let latent = self.kv_norm.apply(&down.narrow(1, 0, self.kv_rank))?;
        let shared_key = down.narrow(1, self.kv_rank, self.rope_dim);
        let joined = Activation::kept(&Tensor::cat(&[latent, shared_key], 1));
        let mut parts = self.tensor.column_parallel(&joined, |joined| {
            let columns = |x: &Tensor| x.narrow(1, 0, self.kv_rank).contiguous();
            let kv_rank = self.kv_rank;
            let saved = joined.saved();
            let latent = Activation::recomputable(columns(&joined.value), move || {
                Ok(saved.get()?.narrow(1, 0, kv_rank).contiguous())
            });
            let mut parts = linears(&latent, &[&self.kv_up])?;
            parts.push(joined.value.narrow(1, self.kv_rank, self.rope_dim));
            Ok(parts)
        })?;
        // On one rank this is a view with gaps, which rotation would copy in several steps.
        let shared_key = parts.remove(1).contiguous();
        Ok((shared_key, parts.remove(0)))
    }

    /// Maps `[T, H * width]` to `[B, H, s, width]`.
    fn split_heads(&self, x: &Tensor, sequences: i64) -> Tensor {
        x.view([sequences, -1, self.heads, x.size()[1] / self.heads])
            .transpose(1, 2)
    }
}
