//! Attention between queries, keys and values, on one rank or over ranks that split sequences.
// Shapes: B batch, S sequence, s positions of it on this rank, H query heads, G key/value heads, dk
// width of queries and keys, dv of values.

use super::{documents::Documents, largest_scores::LargestScores, window_masks::WindowMasks};
use kernels::{
    AttentionOptions, ScoreMask, added_mask, attention, attention_backward, block_attention,
    block_attention_backward, raise_to_largest_scores, repeat_heads,
};
use parallel::{
    AttentionResult, Communicator, Weight, attention_node,
    context::{ContextKind, RingOptions, heads_to_sequence, ring_attention, sequence_to_heads},
};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Causal attention, with an optional sliding window and attention sinks.
///
/// On the CPU, the kernels of crate `kernels` skip the keys outside of a window. Elsewhere it is
/// libtorch's fused kernel (cuDNN's on Hopper and Blackwell), which masks them, or with sinks
/// unfused GEMMs in tiles of queries, because the fused kernels have no sinks. Windows and sinks
/// have only been run on CPUs.
#[derive(Clone)]
pub(crate) struct CoreAttention {
    pub(crate) scale: f64,
    /// Number of positions that a query sees: its own and those just before it. All earlier ones if
    /// unset.
    pub(crate) window: Option<i64>,
    /// A logit per query head of this rank `[H]`: one more key of the softmax, without a value.
    pub(crate) sinks: Option<Weight>,
    pub(crate) window_masks: WindowMasks,
    /// Raised by the scores of every forward pass while they are measured.
    pub(crate) largest_scores: LargestScores,
    /// The key head of each query head.
    pub(crate) kv_head_of_query: Vec<i64>,
    pub(crate) context: Arc<dyn Communicator>,
    pub(crate) kind: ContextKind,
}

impl CoreAttention {
    /// Maps a query `[B, H, s, dk]`, a key `[B, G, s, dk]` and a value `[B, G, s, dv]` to
    /// `[B, H, s, dv]`.
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
        let largest = self.largest_scores.of_heads(query);
        let kv_heads = key.size()[1];
        let is_even = self.is_even(kv_heads);
        let even_heads = |x: &Tensor| {
            if is_even {
                x.shallow_clone()
            } else {
                self.expand_heads(x)
            }
        };
        if self.context.size() == 1 {
            let inputs = [query, &even_heads(key), &even_heads(value)];
            return self.attend_whole(inputs, documents, self.sinks.as_ref(), largest);
        }
        if self.kind == ContextKind::Ring {
            let document_ids = documents.map(Documents::document_ids);
            let options = RingOptions {
                scale: self.scale,
                window: self.window,
                documents: document_ids.as_ref(),
                sinks: self.sinks.as_ref(),
                largest_scores: largest.as_ref(),
            };
            let key = even_heads(key);
            let value = even_heads(value);
            return ring_attention(query, &key, &value, &options, &self.context);
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
        let own_heads = query.size()[1];
        let first_head = self.context.rank() as i64 * own_heads;
        let sinks = self.sinks.as_ref();
        let sinks = sinks.map(|sinks| sinks.narrow_rows(first_head, own_heads));
        let largest = largest.map(|largest| largest.narrow(0, first_head, own_heads));
        let inputs = [&query, &key, &value];
        let out = self.attend_whole(inputs, documents, sinks.as_ref(), largest)?;
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

    /// Attends over sequences that are whole on this rank. `sinks` are those of the query heads.
    /// Raises `largest` `[H]` to the largest scores.
    fn attend_whole(
        &self,
        inputs: [&Tensor; 3],
        documents: Option<&Documents>,
        sinks: Option<&Weight>,
        largest: Option<Tensor>,
    ) -> Result<Tensor, Error> {
        let [query, key, _] = inputs;
        let on_cpu = query.device() == Device::Cpu;
        let window = self.window.filter(|&window| window < query.size()[2]);
        let mask = documents.map(|documents| documents.mask(query.kind(), window));
        if let Some(largest) = largest {
            let mask = mask.as_ref().map(|mask| as_added(mask, query.kind()));
            let mask = score_mask(mask.as_ref(), window);
            tch::no_grad(|| raise_to_largest_scores(&largest, query, key, mask, self.scale));
        }
        if on_cpu && mask.is_none() {
            return causal(inputs, self.scale, window, sinks);
        }
        if on_cpu || sinks.is_some() {
            return masked(inputs, mask, self.scale, window, sinks);
        }
        let window_mask = || window.map(|window| self.window_masks.mask(query, window));
        Ok(fused(
            inputs,
            mask.or_else(window_mask).as_ref(),
            self.scale,
        ))
    }
}

/// Calls [`kernels::attention`] and attaches its backward.
fn causal(
    inputs: [&Tensor; 3],
    scale: f64,
    window: Option<i64>,
    sinks: Option<&Weight>,
) -> Result<Tensor, Error> {
    let options = AttentionOptions { scale, window };
    let [query, key, value] = inputs;
    let (out, lse) = tch::no_grad(|| attention(query, key, value, &options));
    let saved = inputs.map(Tensor::detach);
    let result = AttentionResult { out, lse };
    attention_node(inputs, result, sinks, move |grad, result| {
        let AttentionResult { out, lse } = result;
        Ok(attention_backward(
            grad,
            saved.each_ref(),
            out,
            lse,
            &options,
        ))
    })
}

/// Calls [`kernels::block_attention`] with a mask, or causally in a window without one, and
/// attaches its backward.
fn masked(
    inputs: [&Tensor; 3],
    mask: Option<Tensor>,
    scale: f64,
    window: Option<i64>,
    sinks: Option<&Weight>,
) -> Result<Tensor, Error> {
    let kind = inputs[0].kind();
    let mask = mask.map(|mask| as_added(&mask, kind));
    let (out, lse) = tch::no_grad(|| {
        let mask = score_mask(mask.as_ref(), window);
        block_attention(inputs, mask, scale)
    });
    let saved = inputs.map(Tensor::detach);
    let result = AttentionResult { out, lse };
    attention_node(inputs, result, sinks, move |grad, result| {
        let AttentionResult { out, lse } = result;
        let mask = score_mask(mask.as_ref(), window);
        let grads = block_attention_backward(grad, saved.each_ref(), out, lse, mask, scale);
        Ok(grads.map(|grad| grad.to_kind(kind)))
    })
}

/// Returns the mask that is added to scores, of one that is or of visible keys.
fn as_added(mask: &Tensor, kind: Kind) -> Tensor {
    match mask.kind() {
        Kind::Bool => added_mask(mask, kind),
        _ => mask.shallow_clone(),
    }
}

fn score_mask(mask: Option<&Tensor>, window: Option<i64>) -> ScoreMask<'_> {
    mask.map_or(ScoreMask::Causal(window), ScoreMask::Added)
}

/// Calls libtorch's fused attention.
fn fused([query, key, value]: [&Tensor; 3], mask: Option<&Tensor>, scale: f64) -> Tensor {
    let is_causal = mask.is_none();
    let times = query.size()[1] / key.size()[1];
    let shares_key_heads = times > 1 && shares_key_heads(query.device(), is_causal);
    let times = if shares_key_heads { 1 } else { times };
    Tensor::scaled_dot_product_attention(
        query,
        &repeat_heads(key, times),
        &repeat_heads(value, times),
        mask,
        0.0,
        is_causal,
        scale,
        shares_key_heads,
    )
}

/// True if libtorch's fused attention reads a key head once for all its query heads. With a mask,
/// some GPUs would fall back to a matrix of all scores.
fn shares_key_heads(device: Device, is_causal: bool) -> bool {
    matches!(device, Device::Cuda(_)) && is_causal
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{
        Cpu, GradientBuckets, Replication, context::positions, recompute::recomputed,
        run_on_threads,
    };
    use parking_lot::Mutex;
    use std::time::Duration;
    use tch::kind::{FLOAT_CPU, INT64_CPU};

    /// Attention over whole sequences, and the gradient of its output.
    struct Case {
        operands: [Tensor; 4],
        /// Tokens `[B, S]`, of which 7 ends a document.
        tokens: Option<Tensor>,
        window: Option<i64>,
        sinks: Option<Tensor>,
        kv_head_of_query: Vec<i64>,
        recomputes: bool,
    }

    /// Results at some positions: the output and the gradients of queries, keys and values; and a
    /// contribution to the gradient of the sinks.
    struct Results {
        positions: Tensor,
        at_positions: [Tensor; 4],
        sinks: Option<Tensor>,
        /// The largest score of each head that was seen.
        largest: Tensor,
    }

    impl Case {
        fn copy(&self) -> Case {
            let copy = |t: &Option<Tensor>| t.as_ref().map(Tensor::copy);
            Case {
                operands: self.operands.each_ref().map(Tensor::copy),
                tokens: copy(&self.tokens),
                window: self.window,
                sinks: copy(&self.sinks),
                kv_head_of_query: self.kv_head_of_query.clone(),
                recomputes: self.recomputes,
            }
        }

        fn documents(&self) -> Option<Arc<Documents>> {
            let tokens = self.tokens.as_ref();
            tokens.map(|tokens| Arc::new(Documents::new(tokens, 7)))
        }

        /// Computes the formula in fp64.
        fn expected(&self) -> Results {
            let [q, k, v, grad] = self.operands.each_ref().map(|t| t.to_kind(Kind::Double));
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let sinks = self
                .sinks
                .as_ref()
                .map(|t| t.to_kind(Kind::Double).set_requires_grad(true));
            let [batch, heads, length] = [0, 1, 2].map(|dim| q.size()[dim]);
            let kv_heads = Tensor::from_slice(&self.kv_head_of_query);
            let position = Tensor::arange(length, INT64_CPU);
            let distance = position.unsqueeze(1) - position.unsqueeze(0);
            let near = distance.lt(self.window.unwrap_or(length));
            let mut visible = distance.ge(0).logical_and(&near);
            if let Some(documents) = self.documents() {
                let ids = documents.document_ids();
                let same = ids.unsqueeze(2).eq_tensor(&ids.unsqueeze(1));
                visible = same.unsqueeze(1).logical_and(&visible);
            }
            let keys = k.index_select(1, &kv_heads).transpose(2, 3);
            let mut scores =
                (q.matmul(&keys) * 0.3).masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
            let largest = scores.detach().amax([0i64, 2, 3].as_slice(), false);
            if let Some(sinks) = &sinks {
                let column = sinks
                    .view([1, heads, 1, 1])
                    .expand([batch, heads, length, 1], false);
                scores = Tensor::cat(&[scores, column], -1);
            }
            let weights = scores.softmax(-1, Kind::Double).narrow(-1, 0, length);
            let out = weights.matmul(&v.index_select(1, &kv_heads));
            (&out * grad).sum(Kind::Double).backward();
            Results {
                positions: position,
                at_positions: [out.detach(), q.grad(), k.grad(), v.grad()],
                sinks: sinks.map(|sinks| sinks.grad()),
                largest,
            }
        }

        /// Computes a rank's part of the results.
        fn on_rank(&self, kind: ContextKind, context: Arc<dyn Communicator>) -> Results {
            let length = self.operands[0].size()[2] as usize;
            let own = positions(kind, length, context.rank(), context.size());
            let own = Tensor::from_slice(&own);
            let [q, k, v, grad] = self.operands.each_ref().map(|t| t.index_select(2, &own));
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let unused = || Tensor::zeros([1], FLOAT_CPU);
            let sinks = Weight::new(self.sinks.as_ref().map_or_else(unused, Tensor::copy));
            let alone = [Replication::alone()];
            let buckets =
                GradientBuckets::new(&[(sinks.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
            buckets.begin(1);
            let largest_scores = LargestScores::default();
            largest_scores.begin();
            let core_attention = CoreAttention {
                scale: 0.3,
                window: self.window,
                sinks: self.sinks.as_ref().map(|_| sinks.clone()),
                window_masks: WindowMasks::default(),
                largest_scores: largest_scores.clone(),
                kv_head_of_query: self.kv_head_of_query.clone(),
                context,
                kind,
            };
            let documents = self.documents();
            let attend = move |x: &[Tensor]| {
                let documents = documents.as_deref();
                let out = core_attention.attend(&x[0], &x[1], &x[2], documents)?;
                Ok(vec![out])
            };
            let out = if self.recomputes {
                recomputed(&[&q, &k, &v], attend)
            } else {
                attend(&[&q, &k, &v].map(Tensor::shallow_clone))
            };
            let out = out.unwrap().remove(0);
            (&out * grad).sum(Kind::Float).backward();
            Results {
                positions: own,
                at_positions: [out.detach(), q.grad(), k.grad(), v.grad()],
                sinks: self
                    .sinks
                    .as_ref()
                    .map(|_| buckets.gradient(0).copy().view([-1])),
                largest: largest_scores.take().unwrap(),
            }
        }

        /// Asserts that ranks together compute the formula.
        fn check(&self, kind: ContextKind, ranks: usize, tolerance: f64) {
            let setting = format!(
                "{kind:?}, {ranks} ranks, window {:?}, documents {}, sinks {}",
                self.window,
                self.tokens.is_some(),
                self.sinks.is_some()
            );
            let expected = self.expected();
            let shared = Mutex::new(self.copy());
            let parts = run_on_threads(ranks, Duration::from_secs(20), move |world| {
                let case = shared.lock().copy();
                case.on_rank(kind, world.all("context").unwrap())
            });
            let close = |ours: &Tensor, expected: &Tensor| {
                let ours = ours.to_kind(Kind::Double);
                ours.allclose(expected, tolerance, tolerance, false)
            };
            for part in &parts {
                for (ours, whole) in part.at_positions.iter().zip(&expected.at_positions) {
                    let whole = whole.index_select(2, &part.positions);
                    assert!(close(ours, &whole), "{setting}");
                }
            }
            let none = expected.largest.full_like(f64::NEG_INFINITY);
            let largest = parts.iter().map(|part| &part.largest);
            let largest = largest.fold(none, |most, part| most.maximum(part));
            assert!(
                close(&largest, &expected.largest),
                "largest scores, {setting}"
            );
            if let Some(whole) = expected.sinks {
                let parts = parts.iter().filter_map(|part| part.sinks.as_ref());
                let sum = parts.fold(whole.zeros_like(), |sum, part| sum + part);
                assert!(close(&sum, &whole), "sinks, {setting}");
            }
        }
    }

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, FLOAT_CPU)
    }

    #[test]
    fn windows_sinks_and_documents_are_the_formula_on_any_number_of_ranks() {
        let tokens = [1i64, 2, 7, 3, 3, 3, 3, 3, 3, 7, 1, 7, 1, 2, 3, 4].repeat(2);
        let tokens = Tensor::from_slice(&tokens).view([2, 16]);
        let mut cases = 0;
        for kv_head_of_query in [vec![0, 0, 1, 1], vec![0, 1, 1, 1]] {
            for window in [None, Some(1), Some(4), Some(16)] {
                for packed in [false, true] {
                    for with_sinks in [false, true] {
                        let value_width = if with_sinks { 16 } else { 24 };
                        let x = |heads: i64, width: i64| random(&[2, heads, 16, width]);
                        let case = Case {
                            operands: [x(4, 16), x(2, 16), x(2, value_width), x(4, value_width)],
                            tokens: packed.then(|| tokens.copy()),
                            window,
                            sinks: with_sinks.then(|| random(&[4])),
                            kv_head_of_query: kv_head_of_query.clone(),
                            recomputes: cases % 3 == 0,
                        };
                        cases += 1;
                        case.check(ContextKind::Ring, 1, 1e-5);
                        case.check(ContextKind::Ring, 2, 1e-5);
                        case.check(ContextKind::Ulysses, 2, 1e-5);
                        case.check(ContextKind::Ring, 4, 1e-5);
                        case.check(ContextKind::Ulysses, 4, 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn every_way_to_attend_in_a_window_agrees() {
        let x = [4, 2, 2].map(|heads| random(&[2, heads, 90, 16]));
        let [q, k, v] = x.each_ref();
        let mask = WindowMasks::default().mask(q, 9);
        let with_mask = fused([q, k, v], Some(&mask), 0.3);
        let causal = causal([q, k, v], 0.3, Some(9), None).unwrap();
        let block = masked([q, k, v], None, 0.3, Some(9), None).unwrap();
        assert!(causal.allclose(&with_mask, 1e-5, 1e-5, false));
        assert!(block.allclose(&with_mask, 1e-5, 1e-5, false));
    }

    #[test]
    fn on_the_cpu_documents_give_the_bits_of_fused_attention() {
        let tokens = Tensor::randint(40, [2, 700], INT64_CPU);
        let documents = Documents::new(&tokens, 7);
        for kind in [Kind::Float, Kind::BFloat16] {
            let mask = documents.mask(kind, None);
            let leaf = |heads: i64| {
                let x = random(&[2, 700, heads, 16]).to_kind(kind);
                x.transpose(1, 2).set_requires_grad(true)
            };
            let grad = random(&[2, 4, 700, 16]).to_kind(kind);
            let [q, k, v] = [4, 2, 2].map(leaf);
            let results = |out: Tensor| {
                (&out * &grad).sum(Kind::Float).backward();
                let grads = [&q, &k, &v].map(|x| {
                    let grad = x.grad().copy();
                    let _ = x.grad().zero_();
                    grad
                });
                (out.detach(), grads)
            };
            let fused = results(fused([&q, &k, &v], Some(&mask), 0.3));
            let ours = masked([&q, &k, &v], Some(mask.shallow_clone()), 0.3, None, None).unwrap();
            assert_eq!(results(ours), fused, "{kind:?}");
        }
    }

    #[test]
    fn shared_key_heads_give_what_repeated_ones_give() {
        assert!(shares_key_heads(Device::Cuda(0), true));
        assert!(!shares_key_heads(Device::Cuda(0), false));
        assert!(!shares_key_heads(Device::Cpu, true) && !shares_key_heads(Device::Mps, true));
        let [query, key, value] = [6, 2, 2].map(|heads| random(&[2, heads, 5, 8]));
        let attend = |key: &Tensor, value: &Tensor, shared| {
            let mask = None::<&Tensor>;
            Tensor::scaled_dot_product_attention(&query, key, value, mask, 0.0, true, 0.3, shared)
        };
        let repeated = attend(&repeat_heads(&key, 3), &repeat_heads(&value, 3), false);
        assert!(attend(&key, &value, true).allclose(&repeated, 1e-6, 1e-6, false));
    }
}
