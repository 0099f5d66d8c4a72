//! Grouped-query attention (arXiv 2305.13245) with rotary positions: causal attention on the CPU by `kernels::attention`, else by
//! libtorch's fused kernel.
// Shapes: B batch, S sequence (s of it on this rank), T = B * s tokens, D hidden, H query heads, G key/value heads (of this
// rank), d head width.

use super::norm::{rms_norm, split_rms_norm};
use super::rope::Rope;
use crate::config::{ModelConfig, QkNorm, RecomputedPart};
use crate::model::BuildContext;
use crate::model::parameters::{Init, ParameterOptions, Parameters, Replicas, slice};
use kernels::repeat_heads;
use parallel::context::{ContextKind, heads_to_sequence, ring_attention, sequence_to_heads};
use parallel::recompute::recomputed;
use parallel::tensor::TensorParallel;
use parallel::{Activation, Communicator, Weight, linear, linears};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::{Error, attach_backward};

/// Which document each position belongs to, where tokens see only their own.
pub(crate) struct Documents {
    /// `[B, S]` int64.
    document_ids: Mutex<Tensor>,
    /// `[B, 1, S, S]`: whether a query sees a key. Made where a rank has whole sequences.
    mask: Mutex<Option<Tensor>>,
}

impl Documents {
    /// Of the sequences `tokens_bs` `[B, S]`, in which `end` ends a document.
    pub(crate) fn of(tokens_bs: &Tensor, end: u32) -> Documents {
        let ends = tokens_bs.eq(i64::from(end)).to_kind(tch::Kind::Int64);
        // The token that ends a document is its last.
        Documents {
            document_ids: Mutex::new(ends.cumsum(1, tch::Kind::Int64) - ends),
            mask: Mutex::new(None),
        }
    }

    fn document_ids(&self) -> Tensor {
        self.document_ids.lock().shallow_clone()
    }

    fn mask(&self) -> Tensor {
        let mut mask = self.mask.lock();
        let make = || {
            let document_ids = self.document_ids();
            let same = document_ids
                .unsqueeze(2)
                .eq_tensor(&document_ids.unsqueeze(1));
            same.tril(0).unsqueeze(1)
        };
        mask.get_or_insert_with(make).shallow_clone()
    }
}

pub(crate) struct Attention {
    query: Weight,
    key: Weight,
    value: Weight,
    output: Weight,
    norms: Option<(Weight, Weight)>,
    heads: i64,
    /// Key and value heads that are computed here, and those of them that queries here use.
    kv_heads: i64,
    used: Range<i64>,
    head_dim: i64,
    norm_eps: f64,
    qk_norm: QkNorm,
    /// Whether key heads are split as query heads are.
    split: bool,
    tensor: TensorParallel,
    core_attention: CoreAttention,
    keep: bool,
}

impl Attention {
    pub(crate) fn new(
        parameters: &mut Parameters,
        ctx: &BuildContext,
        config: &ModelConfig,
        name: &str,
        matrix: ParameterOptions,
        output: ParameterOptions,
    ) -> Attention {
        let BuildContext { device, ranks, .. } = ctx;
        let tensor = ranks.tensor.clone();
        let heads = config.heads as i64;
        let kv_heads = config.kv_heads() as i64;
        let head_dim = config.head_dim() as i64;
        let hidden = config.hidden as i64;
        let own = tensor.local_range(heads);
        // Of fewer key heads than ranks, or a number that does not divide, every rank holds all and uses what it needs.
        let split = kv_heads % tensor.size() as i64 == 0;
        let per_kv = heads / kv_heads;
        let needed = own.start / per_kv..(own.end - 1) / per_kv + 1;
        let (held, of_kv) = if split {
            (needed.clone(), Replicas::Dense)
        } else {
            (0..kv_heads, Replicas::Stage)
        };
        let wide = |range: &Range<i64>| range.start * head_dim..range.end * head_dim;
        let mut one = |part: &str, shape: &[i64], dim, along: &Range<i64>, replicas, options| {
            let place = slice(&format!("{name}.{part}"), shape, dim, along);
            parameters
                .one(*device, place, replicas, options)
                .scale_uses(if part.ends_with("norm") {
                    1
                } else {
                    tensor.uses_per_forward()
                })
        };
        let of_query = [heads * head_dim, hidden];
        let of_key = [kv_heads * head_dim, hidden];
        let query = one("query", &of_query, 0, &wide(&own), Replicas::Dense, matrix);
        let key = one("key", &of_key, 0, &wide(&held), of_kv, matrix);
        let value = one("value", &of_key, 0, &wide(&held), of_kv, matrix);
        let norm = ParameterOptions {
            init: Init::Ones,
            decay: false,
            lr_scale: 1.0,
        };
        let norms = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some((
                one(
                    "query_norm",
                    &of_query[..1],
                    0,
                    &wide(&own),
                    Replicas::Dense,
                    norm,
                ),
                one("key_norm", &of_key[..1], 0, &wide(&held), of_kv, norm),
            )),
            QkNorm::Head => {
                let mut whole =
                    |part| one(part, &[head_dim], 0, &(0..head_dim), Replicas::Stage, norm);
                Some((whole("query_norm"), whole("key_norm")))
            }
        };
        let output = one(
            "output",
            &[hidden, heads * head_dim],
            1,
            &wide(&own),
            Replicas::Dense,
            output,
        );
        // A norm over all key heads needs them all.
        let computed = if config.qk_norm == QkNorm::Full {
            held.clone()
        } else {
            needed.clone()
        };
        let (key, value) = if computed == held {
            (key, value)
        } else {
            let rows = wide(&computed);
            let part = |weight: &Weight| weight.narrow_rows(rows.start, rows.end - rows.start);
            (part(&key), part(&value))
        };
        // Maximal update parameterisation scales by the width itself, not its root.
        let scale = if config.mup.is_some() {
            1.0 / head_dim as f64
        } else {
            1.0 / (head_dim as f64).sqrt()
        };
        let kv_head_of_query: Vec<i64> = own.map(|head| head / per_kv - needed.start).collect();
        let core_attention = CoreAttention {
            scale,
            kv_head_of_query,
            context: ranks.context.clone(),
            kind: ctx.context_attention,
        };
        Attention {
            query,
            key,
            value,
            output,
            norms,
            heads: heads / tensor.size() as i64,
            kv_heads: computed.end - computed.start,
            used: needed.start - computed.start..needed.end - computed.start,
            head_dim,
            norm_eps: config.norm_eps,
            qk_norm: config.qk_norm,
            split,
            tensor,
            core_attention,
            keep: ctx.recompute.keeps(RecomputedPart::Attention),
        }
    }

    /// This rank's rows `[T / ranks, D]` of `batch` sequences to the same shape.
    pub(crate) fn forward(
        &self,
        x: &Activation,
        batch: i64,
        rope: &Rope,
        documents: Option<&Arc<Documents>>,
    ) -> Result<Tensor, Error> {
        let mut projected = self
            .tensor
            .column_parallel(x, |x| linears(x, &[&self.query, &self.key, &self.value]))?;
        let value = projected.remove(2);
        let mut key = projected.remove(1);
        let mut query = projected.remove(0);
        if let (QkNorm::Full, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            query = split_rms_norm(&query, query_norm, self.norm_eps, self.tensor.group())?;
            key = if self.split {
                split_rms_norm(&key, key_norm, self.norm_eps, self.tensor.group())?
            } else {
                rms_norm(&key, key_norm, self.norm_eps)?
            };
        }
        let mut query = self.heads(&query, batch, self.heads);
        let mut key = self.heads(&key, batch, self.kv_heads);
        if let (QkNorm::Head, Some((query_norm, key_norm))) = (self.qk_norm, &self.norms) {
            query = rms_norm(&query, query_norm, self.norm_eps)?;
            key = rms_norm(&key, key_norm, self.norm_eps)?;
        }
        let used = |x: &Tensor| {
            if self.used.end - self.used.start == self.kv_heads {
                x.shallow_clone()
            } else {
                x.narrow(1, self.used.start, self.used.end - self.used.start)
            }
        };
        let query = rope.apply(&query)?;
        let key = rope.apply(&used(&key))?;
        let value = used(&self.heads(&value, batch, self.kv_heads));
        let mixed = if self.keep {
            self.core_attention
                .attend(&query, &key, &value, documents.map(Arc::as_ref))?
        } else {
            let core_attention = self.core_attention.clone();
            let documents = documents.cloned();
            let attend = move |x: &[Tensor]| {
                Ok(vec![core_attention.attend(
                    &x[0],
                    &x[1],
                    &x[2],
                    documents.as_ref().map(Arc::as_ref),
                )?])
            };
            recomputed(&[&query, &key, &value], attend)?.remove(0)
        };
        let merged = mixed
            .transpose(1, 2)
            .reshape([-1, self.heads * self.head_dim]);
        self.tensor
            .row_parallel(&merged, |merged| linear(merged, &self.output))
    }

    /// `[T, heads * d]` to `[B, heads, s, d]`.
    fn heads(&self, x: &Tensor, batch: i64, heads: i64) -> Tensor {
        x.view([batch, -1, heads, self.head_dim]).transpose(1, 2)
    }
}

/// What happens between queries, keys and values.
#[derive(Clone)]
struct CoreAttention {
    scale: f64,
    /// The key head of each query head.
    kv_head_of_query: Vec<i64>,
    context: Arc<dyn Communicator>,
    kind: ContextKind,
}

impl CoreAttention {
    /// `[B, H, s, d]`, `[B, G, s, d]` twice, to `[B, H, s, d]`.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        documents: Option<&Documents>,
    ) -> Result<Tensor, Error> {
        let kv_heads = key.size()[1];
        let times = self.kv_head_of_query.len() as i64 / kv_heads;
        // Key heads serve neighbours; where ranks split those of one, some serve fewer.
        let even = self
            .kv_head_of_query
            .iter()
            .enumerate()
            .all(|(head, &kv)| head as i64 / times == kv);
        let serve = |x: &Tensor| {
            if even {
                repeat_heads(x, times)
            } else {
                x.index_select(
                    1,
                    &Tensor::from_slice(&self.kv_head_of_query).to_device(x.device()),
                )
            }
        };
        if self.context.size() > 1 && self.kind == ContextKind::Ring {
            let document_ids = documents.map(Documents::document_ids);
            let (key, value) = if even {
                (key.shallow_clone(), value.shallow_clone())
            } else {
                (serve(key), serve(value))
            };
            return ring_attention(
                query,
                &key,
                &value,
                document_ids.as_ref(),
                self.scale,
                &self.context,
            );
        }
        let whole = |query: &Tensor, key: &Tensor, value: &Tensor| {
            if documents.is_none() && query.device() == Device::Cpu {
                return causal(query, key, value, self.scale);
            }
            let times = query.size()[1] / key.size()[1];
            let key = repeat_heads(key, times);
            let value = repeat_heads(value, times);
            let mask = documents.map(Documents::mask);
            let causal = mask.is_none();
            Ok(Tensor::scaled_dot_product_attention(
                query,
                &key,
                &value,
                mask.as_ref(),
                0.0,
                causal,
                self.scale,
                false,
            ))
        };
        if self.context.size() == 1 {
            return if even {
                whole(query, key, value)
            } else {
                whole(query, &serve(key), &serve(value))
            };
        }
        // Key heads travel as they are where they can be shared out, too.
        let early = !even || kv_heads % self.context.size() as i64 != 0;
        let before = |x: &Tensor| if early { serve(x) } else { x.shallow_clone() };
        let query = sequence_to_heads(query, &self.context)?;
        let key = sequence_to_heads(&before(key), &self.context)?;
        let value = sequence_to_heads(&before(value), &self.context)?;
        heads_to_sequence(&whole(&query, &key, &value)?, &self.context)
    }
}

/// [`kernels::attention`] with its gradients.
fn causal(query: &Tensor, key: &Tensor, value: &Tensor, scale: f64) -> Result<Tensor, Error> {
    let kept = [query, key, value].map(Tensor::detach);
    let (out, lse) = tch::no_grad(|| kernels::attention(query, key, value, scale));
    let result = out.detach();
    let mut outputs = attach_backward(&[query, key, value], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Err(Error::new("attention without a gradient"));
        };
        Ok(
            kernels::attention_backward(grad, kept.each_ref(), &result, &lse, scale)
                .map(Some)
                .into(),
        )
    })?;
    Ok(outputs.remove(0))
}
