//! Attention between queries, keys and values, on one rank or over ranks that split sequences.
// Shapes: B batch, s positions on this rank, H query heads, G key/value heads, d head width.

use super::documents::Documents;
use kernels::{AttentionOptions, repeat_heads};
use parallel::{
    Communicator,
    context::{ContextKind, heads_to_sequence, ring_attention, sequence_to_heads},
};
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::{Error, attach_backward};

/// Causal attention: `kernels::attention` on the CPU, libtorch's fused kernel elsewhere (cuDNN's on
/// Hopper and Blackwell).
#[derive(Clone)]
pub(crate) struct CoreAttention {
    pub(crate) scale: f64,
    /// The key head of each query head.
    pub(crate) kv_head_of_query: Vec<i64>,
    pub(crate) context: Arc<dyn Communicator>,
    pub(crate) kind: ContextKind,
}

impl CoreAttention {
    /// Maps a query `[B, H, s, d]`, a key and a value `[B, G, s, d]` to `[B, H, s, d]`.
    ///
    /// # Collective
    /// All ranks of the context group.
    pub(crate) fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        documents: Option<&Documents>,
    ) -> Result<Tensor, Error> {
        let kv_heads = key.size()[1];
        let is_even = self.is_even(kv_heads);
        if self.context.size() > 1 && self.kind == ContextKind::Ring {
            let document_ids = documents.map(Documents::document_ids);
            let ring_heads = |x: &Tensor| {
                if is_even {
                    x.shallow_clone()
                } else {
                    self.expand_heads(x)
                }
            };
            return ring_attention(
                query,
                &ring_heads(key),
                &ring_heads(value),
                document_ids.as_ref(),
                self.scale,
                &self.context,
            );
        }
        if self.context.size() == 1 {
            return if is_even {
                self.attend_whole(query, key, value, documents)
            } else {
                let key = self.expand_heads(key);
                let value = self.expand_heads(value);
                self.attend_whole(query, &key, &value, documents)
            };
        }
        // Unexpanded key heads are sent if the ranks can split them, too.
        let expand_early = !is_even || kv_heads % self.context.size() as i64 != 0;
        let sent_heads = |x: &Tensor| {
            if expand_early {
                self.expand_heads(x)
            } else {
                x.shallow_clone()
            }
        };
        let query = sequence_to_heads(query, &self.context)?;
        let key = sequence_to_heads(&sent_heads(key), &self.context)?;
        let value = sequence_to_heads(&sent_heads(value), &self.context)?;
        let out = self.attend_whole(&query, &key, &value, documents)?;
        heads_to_sequence(&out, &self.context)
    }

    /// True if every key head serves the same number of neighboring query heads. Where ranks split
    /// the query heads of one key head, some key heads serve fewer.
    fn is_even(&self, kv_heads: i64) -> bool {
        let times = self.kv_head_of_query.len() as i64 / kv_heads;
        self.kv_head_of_query
            .iter()
            .enumerate()
            .all(|(head, &kv)| head as i64 / times == kv)
    }

    /// Repeats key heads so that each query head has one.
    fn expand_heads(&self, x: &Tensor) -> Tensor {
        let kv_heads = x.size()[1];
        if self.is_even(kv_heads) {
            let times = self.kv_head_of_query.len() as i64 / kv_heads;
            return repeat_heads(x, times);
        }
        let index = Tensor::from_slice(&self.kv_head_of_query);
        x.index_select(1, &index.to_device(x.device()))
    }

    /// Attends over sequences that are whole on this rank.
    fn attend_whole(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        documents: Option<&Documents>,
    ) -> Result<Tensor, Error> {
        if documents.is_none() && query.device() == Device::Cpu {
            return causal(query, key, value, self.scale);
        }
        let times = query.size()[1] / key.size()[1];
        let mask = documents.map(|documents| documents.mask(query.kind()));
        let is_causal = mask.is_none();
        let shares_key_heads = times > 1 && shares_key_heads(query.device(), is_causal);
        let times = if shares_key_heads { 1 } else { times };
        let key = repeat_heads(key, times);
        let value = repeat_heads(value, times);
        Ok(Tensor::scaled_dot_product_attention(
            query,
            &key,
            &value,
            mask.as_ref(),
            0.0,
            is_causal,
            self.scale,
            shares_key_heads,
        ))
    }
}

/// True if libtorch's fused attention reads a key head once for all its query heads. With a mask,
/// some GPUs would fall back to a matrix of all scores.
fn shares_key_heads(device: Device, is_causal: bool) -> bool {
    matches!(device, Device::Cuda(_)) && is_causal
}

/// Calls [`kernels::attention`] and attaches its backward.
fn causal(query: &Tensor, key: &Tensor, value: &Tensor, scale: f64) -> Result<Tensor, Error> {
    let options = AttentionOptions {
        scale,
        window: None,
    };
    let saved = [query, key, value].map(Tensor::detach);
    let (out, lse) = tch::no_grad(|| kernels::attention(query, key, value, &options));
    let result = out.detach();
    let mut outputs = attach_backward(&[query, key, value], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Err(Error::new("attention without a gradient"));
        };
        let saved = saved.each_ref();
        let grads = kernels::attention_backward(grad, saved, &result, &lse, &options);
        Ok(grads.map(Some).into())
    })?;
    Ok(outputs.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn shared_key_heads_give_what_repeated_ones_give() {
        assert!(shares_key_heads(Device::Cuda(0), true));
        assert!(!shares_key_heads(Device::Cuda(0), false));
        assert!(!shares_key_heads(Device::Cpu, true) && !shares_key_heads(Device::Mps, true));
        let random = |heads: i64| Tensor::randn([2, heads, 5, 8], (Kind::Float, Device::Cpu));
        let [query, key, value] = [random(6), random(2), random(2)];
        let attend = |key: &Tensor, value: &Tensor, shared| {
            let mask = None::<&Tensor>;
            Tensor::scaled_dot_product_attention(&query, key, value, mask, 0.0, true, 0.3, shared)
        };
        let repeated = attend(&repeat_heads(&key, 3), &repeat_heads(&value, 3), false);
        assert!(attend(&key, &value, true).allclose(&repeated, 1e-6, 1e-6, false));
    }
}
