//! Grouped-query attention (arXiv 2305.13245) with rotary position embedding.
// Shapes: B batch, S sequence (s of it on this rank), T = B * s tokens, D hidden, H query heads and
// G key/value heads of this rank, d head width.

use super::{Attention, AttentionKeys, AttentionPlan, HeadKeys, HeadRows, saved::SavedAttention};
use crate::{
    config::{layer_set::LayerSet, layout::RecomputedPart, limits::MAX_TOKENS},
    model::{
        activations::{Activations, BlockShape, FP32_BYTES},
        batch::BatchContext,
        bias::bias_spec,
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
    problems::{Problems, Quantity},
};
use parallel::{Activation, Weight, add_bias, linear, linears, tensor::TensorParallel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::Tensor;
use torch_ext::Error;

/// RMSNorm of queries and keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// No norm.
    #[default]
    None,
    /// One norm over all heads together (OLMoE).
    Full,
    /// One norm per head (Qwen3).
    Head,
    /// One norm per head, after rotary embedding (Hunyuan).
    HeadAfterRope,
}

/// Grouped-query attention.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupedConfig {
    /// Sliding window. By default a token sees all earlier ones.
    pub window: Option<WindowConfig>,
    /// Multiplies each element of the heads' outputs by the sigmoid of a projection of the block's
    /// input, before the output matrix (Gated Attention, arXiv 2505.06708).
    pub output_gate: bool,
    /// Adds a learned logit per head to the softmax, like that of one more token without a value
    /// (attention sinks, arXiv 2309.17453; gpt-oss).
    pub sinks: bool,
    /// Vectors added to the outputs of the block's matrices.
    pub bias: AttentionBias,
}

/// Biases of an attention block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttentionBias {
    /// No bias.
    #[default]
    None,
    /// Biases for queries, keys and values (Qwen2).
    Qkv,
    /// Biases for queries, keys, values and the output (gpt-oss).
    All,
}

/// Sliding-window attention (Longformer, arXiv 2004.05150; Mistral, arXiv 2310.06825).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WindowConfig {
    /// Number of tokens that a token sees: itself and those just before it.
    #[schemars(range(min = 1, max = MAX_TOKENS))]
    pub size: usize,
    /// Layers with the window.
    #[serde(default = "all_layers")]
    pub layers: LayerSet,
}

fn all_layers() -> LayerSet {
    LayerSet::ALL
}

/// The plan of grouped-query attention.
#[derive(Debug, Clone)]
pub(crate) struct GroupedAttention {
    pub(crate) model: AttentionKeys,
    pub(crate) config: GroupedConfig,
}

/// This rank's part of grouped-query attention.
struct GroupedHeads {
    query: Weight,
    key: Weight,
    value: Weight,
    /// Biases of queries, keys and values.
    biases: Option<[Weight; 3]>,
    /// Logits of the output gate.
    gate: Option<Weight>,
    output: Weight,
    /// Bias of the output, which each rank adds to its own tokens.
    output_bias: Option<Weight>,
    /// Norms of queries and of keys.
    norms: Option<(Norm, Norm)>,
    heads: i64,
    /// Key and value heads that this rank computes.
    kv_heads: i64,
    /// Key and value heads that its queries use, among the computed ones.
    used_kv_heads: Range<i64>,
    head_dim: i64,
    qk_norm: QkNorm,
    /// True if ranks split key heads as they split query heads.
    splits_kv_heads: bool,
    tensor: TensorParallel,
    attention: SavedAttention,
}

/// Heads of one rank, among all heads of the model.
struct HeadRanges {
    queries: Range<i64>,
    queries_per_kv: i64,
    /// Key heads that the queries of this rank use.
    needed: Range<i64>,
    /// Key heads whose weights this rank has.
    held: Range<i64>,
    /// Key heads that this rank computes.
    computed: Range<i64>,
    splits_kv_heads: bool,
}

impl HeadRanges {
    fn new(plan: &GroupedAttention, tensor: &TensorParallel) -> HeadRanges {
        let heads = plan.model.heads as i64;
        let kv_heads = plan.kv_heads() as i64;
        let queries = tensor.local_range(heads);
        let queries_per_kv = heads / kv_heads;
        let first = queries.start / queries_per_kv;
        let last = (queries.end - 1) / queries_per_kv;
        let needed = first..last + 1;
        // If the ranks do not divide the key heads, every rank has all and uses what it needs.
        let splits_kv_heads = kv_heads % tensor.size() as i64 == 0;
        let held = if splits_kv_heads {
            needed.clone()
        } else {
            0..kv_heads
        };
        // A norm over all key heads needs them all.
        let computed = if plan.model.qk_norm == QkNorm::Full {
            held.clone()
        } else {
            needed.clone()
        };
        HeadRanges {
            queries,
            queries_per_kv,
            needed,
            held,
            computed,
            splits_kv_heads,
        }
    }
}

/// Descriptions of the parameters of one attention block.
struct GroupedSpecs {
    query: ParamSpec,
    key: ParamSpec,
    value: ParamSpec,
    /// Norms of queries and of keys.
    norms: Option<[ParamSpec; 2]>,
    /// Biases of queries, keys and values.
    biases: Option<[ParamSpec; 3]>,
    /// A logit per head.
    sinks: Option<ParamSpec>,
    gate: Option<ParamSpec>,
    output: ParamSpec,
    output_bias: Option<ParamSpec>,
}

impl GroupedSpecs {
    /// Describes the parameters of the block with this global name.
    fn new(plan: &GroupedAttention, block: &str) -> GroupedSpecs {
        let head_dim = plan.head_dim() as u64;
        let heads = plan.model.heads as u64;
        let kv_heads = plan.kv_heads() as u64;
        let hidden = Dim::hidden(plan.model.hidden);
        let queries = Dim::new("model.heads x head_dim", heads.saturating_mul(head_dim));
        let keys = Dim::new(
            "model.kv_heads x head_dim",
            kv_heads.saturating_mul(head_dim),
        );
        let matrix = |part, dims: [Dim; 2], split| {
            ParamSpec::single(block, part, &dims, split, Role::Matrix)
        };
        let norms = match plan.model.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some([
                norm_spec(block, "query_norm", queries, Split::heads(0, heads)),
                norm_spec(block, "key_norm", keys, Split::heads(0, kv_heads)),
            ]),
            QkNorm::Head | QkNorm::HeadAfterRope => {
                let width = Dim::new("model.head_dim", head_dim);
                Some(
                    ["query_norm", "key_norm"]
                        .map(|part| norm_spec(block, part, width, Split::Whole)),
                )
            }
        };
        GroupedSpecs {
            query: matrix("query", [queries, hidden], Split::heads(0, heads)),
            key: matrix("key", [keys, hidden], Split::heads(0, kv_heads)),
            value: matrix("value", [keys, hidden], Split::heads(0, kv_heads)),
            norms,
            biases: (plan.config.bias != AttentionBias::None).then(|| {
                [
                    bias_spec(block, "query_bias", queries, Split::heads(0, heads)),
                    bias_spec(block, "key_bias", keys, Split::heads(0, kv_heads)),
                    bias_spec(block, "value_bias", keys, Split::heads(0, kv_heads)),
                ]
            }),
            sinks: plan.config.sinks.then(|| {
                let each = Dim::new("model.heads", heads);
                bias_spec(block, "sinks", each, Split::heads(0, heads))
            }),
            gate: (plan.config.output_gate)
                .then(|| matrix("gate", [queries, hidden], Split::heads(0, heads))),
            output: ParamSpec {
                writes_residual: true,
                ..matrix("output", [hidden, queries], Split::heads(1, heads))
            },
            output_bias: (plan.config.bias == AttentionBias::All)
                .then(|| bias_spec(block, "output_bias", hidden, Split::Whole)),
        }
    }

    /// Returns the descriptions in the order of use.
    fn into_list(self) -> Vec<ParamSpec> {
        let mut list = vec![self.query, self.key, self.value];
        list.extend(self.norms.into_iter().flatten());
        list.extend(self.biases.into_iter().flatten());
        list.extend(self.sinks);
        list.extend(self.gate);
        list.push(self.output);
        list.extend(self.output_bias);
        list
    }
}

impl GroupedAttention {
    fn kv_heads(&self) -> usize {
        self.model.kv_heads.unwrap_or(self.model.heads)
    }

    fn head_dim(&self) -> usize {
        self.model
            .head_dim
            .unwrap_or(self.model.hidden / self.model.heads.max(1))
    }

    /// Returns the key heads of each rank. If the ranks do not divide them, every rank has all.
    fn kv_heads_per_rank(&self, tensor_ranks: usize) -> usize {
        if self.kv_heads().is_multiple_of(tensor_ranks) {
            self.kv_heads() / tensor_ranks
        } else {
            self.kv_heads()
        }
    }

    /// Returns the number of tokens that a token sees; `None` if it sees all earlier ones.
    fn window(&self) -> Option<usize> {
        let window = self.config.window.as_ref();
        let window = window.filter(|window| window.layers.contains(self.model.layer));
        window.map(|window| window.size)
    }

    fn core_attention(
        &self,
        builder: &WeightBuilder,
        ranges: &HeadRanges,
        sinks: Option<Weight>,
    ) -> CoreAttention {
        let ctx = builder.ctx;
        let first = ranges.needed.start;
        let kv_head = |head: i64| head / ranges.queries_per_kv - first;
        CoreAttention {
            scale: self.model.score_scale.of_width(self.head_dim()),
            window: self.window().map(|size| size as i64),
            sinks,
            window_masks: builder.window_masks.clone(),
            largest_scores: LargestScores::default(),
            kv_head_of_query: ranges.queries.clone().map(kv_head).collect(),
            context: ctx.groups.context.clone(),
            kind: ctx.context_attention,
        }
    }
}

impl AttentionPlan for GroupedAttention {
    fn specs(&self, block: &str) -> Vec<ParamSpec> {
        GroupedSpecs::new(self, block).into_list()
    }

    fn score_rows(&self) -> BlockScoreRows {
        let rows = |part, makes| ScoreRows {
            part,
            head_rows: self.head_dim(),
            rows: 0..self.head_dim(),
            makes,
        };
        let mut parts = vec![rows("query", ScorePart::Query), rows("key", ScorePart::Key)];
        if self.config.bias != AttentionBias::None {
            parts.push(rows("query_bias", ScorePart::Query));
            parts.push(rows("key_bias", ScorePart::Key));
        }
        BlockScoreRows {
            heads: self.model.heads,
            key_heads: self.kv_heads(),
            parts,
        }
    }

    fn head_keys(&self) -> HeadKeys {
        HeadKeys {
            kv_heads: Some(self.kv_heads()),
            head_dim: Some(self.head_dim()),
        }
    }

    fn rotary_part(&self) -> RotaryPart {
        let width_key = match self.model.head_dim {
            Some(_) => "model.head_dim",
            None => "model.hidden / heads",
        };
        RotaryPart {
            width: self.head_dim(),
            width_key,
            scales_softmax: false,
        }
    }

    fn head_rows(&self, part: &str, rotary: u64) -> Option<HeadRows> {
        let heads = match part {
            "query" | "query_bias" => self.model.heads,
            "key" | "key_bias" => self.kv_heads(),
            _ => return None,
        };
        Some(HeadRows {
            heads: heads as u64,
            width: self.head_dim() as u64,
            rotary: 0..rotary,
        })
    }

    fn core_plan(&self) -> CorePlan {
        CorePlan {
            heads: self.model.heads,
            key_width: self.head_dim(),
            value_width: self.head_dim(),
            window: self.window(),
            sinks: self.config.sinks,
        }
    }

    fn widest(&self) -> usize {
        self.model.heads.max(self.kv_heads()) * self.head_dim()
    }

    fn flops(&self, length: usize) -> Flops {
        let seen = self.window().map_or(length, |window| window.min(length));
        let scores_and_values = 2 * self.model.heads * self.head_dim();
        Flops {
            activations: 2.0 * scores_and_values as f64 * seen as f64,
            ..Flops::of_specs(&self.specs(""))
        }
    }

    fn activations(&self, at: &BlockShape) -> Activations {
        let width = self.head_dim() as u64;
        let heads = (self.model.heads / at.mesh.tensor) as u64;
        let kv_heads = self.kv_heads_per_rank(at.mesh.tensor) as u64;
        let queries = at.tokens * heads * width * at.element;
        let keys = at.tokens * kv_heads * width * at.element;
        let log_sum_exps = at.tokens * heads * FP32_BYTES;
        let keeps_output = at.recompute.keeps(RecomputedPart::Attention);
        // libtorch's own attention saves keys and values once per query head. It has no sinks.
        let repeats_keys = !(at.mesh.context > 1 || at.on_host || self.config.sinks);
        let mut saved = if keeps_output && repeats_keys {
            4 * queries + log_sum_exps
        } else if keeps_output {
            2 * queries + 2 * keys + log_sum_exps
        } else {
            2 * queries + 2 * keys
        };
        if keeps_output && at.sequences.in_ring {
            // The output by heads, besides the one by tokens.
            saved += queries;
        }
        if self.model.qk_norm != QkNorm::None {
            saved += queries + keys;
        }
        if self.config.output_gate {
            // The sigmoid, and the heads' outputs before and after the gate.
            saved += 2 * queries;
        }
        // Gradients of what is saved, and four fp32 rows per token for a norm.
        let norm = at.own_tokens * self.model.hidden as u64 * FP32_BYTES;
        Activations {
            saved,
            transient: 4 * queries + 4 * norm + self.core_plan().tile_bytes(at),
        }
    }

    fn problems(&self, problems: &mut Problems) {
        let heads = || Quantity::new("model.heads", self.model.heads);
        if self.model.head_dim.is_none() {
            problems.divides(
                Quantity::new("model.hidden", self.model.hidden),
                heads(),
                "or give model.head_dim",
            );
        }
        problems.divides(
            heads(),
            Quantity::new("model.kv_heads", self.kv_heads()),
            "each key head must serve the same number of query heads",
        );
        if let Some(window) = &self.config.window {
            window.layers.problems(
                "model.attention.grouped.window.layers",
                self.model.layers,
                "leave model.attention.grouped.window out",
                problems,
            );
        }
    }

    fn heads(&self) -> usize {
        self.model.heads
    }

    fn build(&self, builder: &mut WeightBuilder, name: &str) -> Box<dyn Attention> {
        let ctx = builder.ctx;
        let tensor = ctx.groups.tensor.clone();
        let head_dim = self.head_dim() as i64;
        let ranges = HeadRanges::new(self, &tensor);
        let specs = GroupedSpecs::new(self, name);
        let query = builder.add(&specs.query);
        let key = builder.add(&specs.key);
        let value = builder.add(&specs.value);
        let norms = specs.norms.map(|norms| {
            let [query_norm, key_norm] =
                norms.map(|norm| builder.add_norm(&norm, self.model.norm_eps));
            (query_norm, key_norm)
        });
        let biases = specs
            .biases
            .map(|biases| biases.map(|bias| builder.add(&bias)));
        let sinks = specs.sinks.map(|sinks| builder.add(&sinks));
        let gate = specs.gate.map(|gate| builder.add(&gate));
        let output = builder.add(&specs.output);
        let output_bias = specs.output_bias.map(|bias| builder.add(&bias));
        let wide = |heads: &Range<i64>| heads.start * head_dim..heads.end * head_dim;
        let used_rows = |weight: Weight| {
            if ranges.computed == ranges.held {
                return weight;
            }
            let rows = wide(&ranges.computed);
            weight.narrow_rows(rows.start, rows.end - rows.start)
        };
        let first_computed = ranges.computed.start;
        Box::new(GroupedHeads {
            query,
            key: used_rows(key),
            value: used_rows(value),
            biases: biases.map(|[query, key, value]| [query, used_rows(key), used_rows(value)]),
            gate,
            output,
            output_bias,
            norms,
            heads: self.model.heads as i64 / tensor.size() as i64,
            kv_heads: ranges.computed.end - first_computed,
            used_kv_heads: ranges.needed.start - first_computed..ranges.needed.end - first_computed,
            head_dim,
            qk_norm: self.model.qk_norm,
            splits_kv_heads: ranges.splits_kv_heads,
            tensor,
            attention: SavedAttention {
                core: self.core_attention(builder, &ranges, sinks),
                keeps_output: ctx.recompute.keeps(RecomputedPart::Attention),
            },
        })
    }
}

impl Attention for GroupedHeads {
    fn forward(
        &self,
        x: &Activation,
        batch: &BatchContext,
        rope: Option<&Rope>,
    ) -> Result<Tensor, Error> {
        let mut weights = vec![&self.query, &self.key, &self.value];
        weights.extend(&self.gate);
        let mut projected = self.tensor.column_parallel(x, |x| linears(x, &weights))?;
        let gate = self.gate.as_ref().and_then(|_| projected.pop());
        if let Some(biases) = &self.biases {
            for (projected, bias) in projected.iter_mut().zip(biases) {
                *projected = add_bias(projected, bias)?;
            }
        }
        let value = projected.remove(2);
        let mut key = projected.remove(1);
        let mut query = projected.remove(0);
        if let (QkNorm::Full, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            let group = self.tensor.group();
            query = query_norm.apply_split(&query, group)?;
            key = if self.splits_kv_heads {
                key_norm.apply_split(&key, group)?
            } else {
                key_norm.apply(&key)?
            };
        }
        let mut query = self.split_heads(&query, batch.sequences, self.heads);
        let mut key = self.split_heads(&key, batch.sequences, self.kv_heads);
        if let (QkNorm::Head, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            query = query_norm.apply(&query)?;
            key = key_norm.apply(&key)?;
        }
        let mut key = self.used_heads(&key);
        if let Some(rope) = rope {
            query = rope.apply(&query, batch)?;
            key = rope.apply(&key, batch)?;
        }
        if let (QkNorm::HeadAfterRope, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            query = query_norm.apply(&query)?;
            key = key_norm.apply(&key)?;
        }
        let value = self.split_heads(&value, batch.sequences, self.kv_heads);
        let value = self.used_heads(&value);
        let documents = batch.documents.as_ref();
        let mixed = self.attention.attend(&query, &key, &value, documents)?;
        let mut merged = mixed
            .transpose(1, 2)
            .reshape([-1, self.heads * self.head_dim]);
        if let Some(gate) = gate {
            merged = merged * gate.sigmoid();
        }
        let out = self
            .tensor
            .row_parallel(&merged, |merged| linear(merged, &self.output))?;
        match &self.output_bias {
            Some(bias) => add_bias(&out, bias),
            None => Ok(out),
        }
    }

    fn largest_scores(&self) -> &LargestScores {
        &self.attention.core.largest_scores
    }
}

impl GroupedHeads {
    /// Maps `[T, heads * d]` to `[B, heads, s, d]`.
    fn split_heads(&self, x: &Tensor, batch: i64, heads: i64) -> Tensor {
        x.view([batch, -1, heads, self.head_dim]).transpose(1, 2)
    }

    fn used_heads(&self, x: &Tensor) -> Tensor {
        let used = &self.used_kv_heads;
        let count = used.end - used.start;
        if count == self.kv_heads {
            x.shallow_clone()
        } else {
            x.narrow(1, used.start, count)
        }
    }
}
