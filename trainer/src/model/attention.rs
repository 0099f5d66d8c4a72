//! Grouped-query attention (arXiv 2305.13245) with rotary position embedding.
// Shapes: B batch, S sequence (s of it on this rank), T = B * s tokens, D hidden, H query heads and
// G key/value heads of this rank, d head width.

use super::{
    activations::{Activations, BlockShape, FP32_BYTES},
    core_attention::CoreAttention,
    documents::Documents,
    norm::{norm_spec, rms_norm, split_rms_norm},
    rope::Rope,
    spec::{Dim, ParamSpec, Role, Split, SplitDim, Stack},
    weights::WeightBuilder,
};
use crate::config::{ModelConfig, QkNorm, RecomputedPart};
use parallel::{
    Activation, Weight, linear, linears, recompute::recomputed, tensor::TensorParallel,
};
use std::{ops::Range, sync::Arc};
use tch::Tensor;
use torch_ext::Error;

pub(crate) struct Attention {
    query: Weight,
    key: Weight,
    value: Weight,
    output: Weight,
    norms: Option<(Weight, Weight)>,
    heads: i64,
    /// Key and value heads that this rank computes.
    kv_heads: i64,
    /// Key and value heads that its queries use, among the computed ones.
    used_kv_heads: Range<i64>,
    head_dim: i64,
    norm_eps: f64,
    qk_norm: QkNorm,
    /// True if ranks split key heads as they split query heads.
    splits_kv_heads: bool,
    tensor: TensorParallel,
    core_attention: CoreAttention,
    /// True if the output of core attention is saved for backward.
    save_output: bool,
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
    fn new(config: &ModelConfig, tensor: &TensorParallel) -> HeadRanges {
        let heads = config.heads as i64;
        let kv_heads = config.kv_heads() as i64;
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
        let computed = if config.qk_norm == QkNorm::Full {
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
pub(crate) struct AttentionSpecs {
    query: ParamSpec,
    key: ParamSpec,
    value: ParamSpec,
    /// Norms of queries and of keys.
    norms: Option<[ParamSpec; 2]>,
    output: ParamSpec,
}

impl AttentionSpecs {
    /// Describes the parameters of the block with this global name.
    pub(crate) fn new(config: &ModelConfig, block: &str) -> AttentionSpecs {
        let head_dim = config.head_dim() as u64;
        let heads = config.heads as u64;
        let kv_heads = config.kv_heads() as u64;
        let hidden = Dim::hidden(config);
        let queries = Dim::new("model.heads x head_dim", heads.saturating_mul(head_dim));
        let keys = Dim::new(
            "model.kv_heads x head_dim",
            kv_heads.saturating_mul(head_dim),
        );
        let of_heads = |dim, units| {
            Split::Tensor(SplitDim {
                dim,
                units,
                fused: 1,
            })
        };
        let matrix = |part, dims: [Dim; 2], split, writes_residual| ParamSpec {
            block: block.to_string(),
            part,
            dims: dims.to_vec(),
            stack: Stack::Single,
            split,
            role: Role::Matrix,
            writes_residual,
        };
        let norms = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some([
                norm_spec(block, "query_norm", queries, of_heads(0, heads)),
                norm_spec(block, "key_norm", keys, of_heads(0, kv_heads)),
            ]),
            QkNorm::Head => {
                let width = Dim::new("model.head_dim", head_dim);
                Some(
                    ["query_norm", "key_norm"]
                        .map(|part| norm_spec(block, part, width, Split::Whole)),
                )
            }
        };
        AttentionSpecs {
            query: matrix("query", [queries, hidden], of_heads(0, heads), false),
            key: matrix("key", [keys, hidden], of_heads(0, kv_heads), false),
            value: matrix("value", [keys, hidden], of_heads(0, kv_heads), false),
            norms,
            output: matrix("output", [hidden, queries], of_heads(1, heads), true),
        }
    }

    /// Returns the descriptions in the order of use.
    pub(crate) fn into_list(self) -> Vec<ParamSpec> {
        let mut list = vec![self.query, self.key, self.value];
        list.extend(self.norms.into_iter().flatten());
        list.push(self.output);
        list
    }
}

/// Returns the bytes of activations of one attention block on a rank.
pub(crate) fn activations(config: &ModelConfig, at: &BlockShape) -> Activations {
    let width = config.head_dim() as u64;
    let heads = (config.heads / at.mesh.tensor) as u64;
    let kv_heads = if config.kv_heads().is_multiple_of(at.mesh.tensor) {
        config.kv_heads() / at.mesh.tensor
    } else {
        config.kv_heads()
    };
    let queries = at.tokens * heads * width * at.element;
    let keys = at.tokens * kv_heads as u64 * width * at.element;
    let log_sum_exps = at.tokens * heads * FP32_BYTES;
    let keeps_output = at.recompute.keeps(RecomputedPart::Attention);
    // libtorch's own attention saves keys and values once per query head.
    let repeats_keys = !(at.mesh.context > 1 || at.on_host);
    let mut saved = if keeps_output && repeats_keys {
        4 * queries + log_sum_exps
    } else if keeps_output {
        2 * queries + 2 * keys + log_sum_exps
    } else {
        2 * queries + 2 * keys
    };
    if config.qk_norm != QkNorm::None {
        saved += queries + keys;
    }
    // Gradients of what is saved, and four fp32 rows per token for a norm.
    let norm = at.own_tokens * config.hidden as u64 * FP32_BYTES;
    Activations {
        saved,
        transient: 4 * queries + 4 * norm,
    }
}

impl Attention {
    pub(crate) fn new(builder: &mut WeightBuilder, name: &str) -> Attention {
        let config = builder.config;
        let ctx = builder.ctx;
        let tensor = ctx.groups.tensor.clone();
        let heads = config.heads as i64;
        let head_dim = config.head_dim() as i64;
        let ranges = HeadRanges::new(config, &tensor);
        let specs = AttentionSpecs::new(config, name);
        let query = builder.add(&specs.query);
        let key = builder.add(&specs.key);
        let value = builder.add(&specs.value);
        let norms = specs.norms.map(|norms| {
            let [query_norm, key_norm] = norms.map(|norm| builder.add(&norm));
            (query_norm, key_norm)
        });
        let output = builder.add(&specs.output);
        let wide = |heads: &Range<i64>| heads.start * head_dim..heads.end * head_dim;
        let used_rows = |weight: Weight| {
            if ranges.computed == ranges.held {
                return weight;
            }
            let rows = wide(&ranges.computed);
            weight.narrow_rows(rows.start, rows.end - rows.start)
        };
        let first_computed = ranges.computed.start;
        Attention {
            query,
            key: used_rows(key),
            value: used_rows(value),
            output,
            norms,
            heads: heads / tensor.size() as i64,
            kv_heads: ranges.computed.end - first_computed,
            used_kv_heads: ranges.needed.start - first_computed..ranges.needed.end - first_computed,
            head_dim,
            norm_eps: config.norm_eps,
            qk_norm: config.qk_norm,
            splits_kv_heads: ranges.splits_kv_heads,
            tensor,
            core_attention: core_attention(builder, &ranges),
            save_output: ctx.recompute.keeps(RecomputedPart::Attention),
        }
    }

    /// Maps this rank's rows `[T / ranks, D]` of `batch` sequences to the same shape.
    ///
    /// # Collective
    /// All ranks of the tensor group and of the context group.
    pub(crate) fn forward(
        &self,
        x: &Activation,
        batch: i64,
        rope: &Rope,
        documents: Option<&Arc<Documents>>,
    ) -> Result<Tensor, Error> {
        let weights = [&self.query, &self.key, &self.value];
        let mut projected = self.tensor.column_parallel(x, |x| linears(x, &weights))?;
        let value = projected.remove(2);
        let mut key = projected.remove(1);
        let mut query = projected.remove(0);
        if let (QkNorm::Full, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            let group = self.tensor.group();
            query = split_rms_norm(&query, query_norm, self.norm_eps, group)?;
            key = if self.splits_kv_heads {
                split_rms_norm(&key, key_norm, self.norm_eps, group)?
            } else {
                rms_norm(&key, key_norm, self.norm_eps)?
            };
        }
        let mut query = self.split_heads(&query, batch, self.heads);
        let mut key = self.split_heads(&key, batch, self.kv_heads);
        if let (QkNorm::Head, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            query = rms_norm(&query, query_norm, self.norm_eps)?;
            key = rms_norm(&key, key_norm, self.norm_eps)?;
        }
        let query = rope.apply(&query)?;
        let key = rope.apply(&self.used_heads(&key))?;
        let value = self.used_heads(&self.split_heads(&value, batch, self.kv_heads));
        let mixed = self.attend(&query, &key, &value, documents)?;
        let merged = mixed
            .transpose(1, 2)
            .reshape([-1, self.heads * self.head_dim]);
        self.tensor
            .row_parallel(&merged, |merged| linear(merged, &self.output))
    }

    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        documents: Option<&Arc<Documents>>,
    ) -> Result<Tensor, Error> {
        if self.save_output {
            let documents = documents.map(Arc::as_ref);
            return self.core_attention.attend(query, key, value, documents);
        }
        let core_attention = self.core_attention.clone();
        let documents = documents.cloned();
        let attend = move |x: &[Tensor]| {
            let documents = documents.as_ref().map(Arc::as_ref);
            let out = core_attention.attend(&x[0], &x[1], &x[2], documents)?;
            Ok(vec![out])
        };
        Ok(recomputed(&[query, key, value], attend)?.remove(0))
    }

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

fn core_attention(builder: &WeightBuilder, ranges: &HeadRanges) -> CoreAttention {
    let config = builder.config;
    let ctx = builder.ctx;
    let head_dim = config.head_dim() as f64;
    // Maximal update parametrization divides by the width itself, not by its root.
    let scale = if config.mup.is_some() {
        1.0 / head_dim
    } else {
        1.0 / head_dim.sqrt()
    };
    let first = ranges.needed.start;
    let kv_head = |head: i64| head / ranges.queries_per_kv - first;
    CoreAttention {
        scale,
        window: None,
        sinks: None,
        window_masks: builder.window_masks.clone(),
        kv_head_of_query: ranges.queries.clone().map(kv_head).collect(),
        context: ctx.groups.context.clone(),
        kind: ctx.context_attention,
    }
}
