//! Context parallelism: sequences split over ranks, and attention across them.
//!
//! *Ring* (arXiv 2310.01889): ranks send keys and values around a ring. Each rank computes
//! attention with its own queries and joins the blocks by their log-sum-exps. A rank has one chunk
//! from the front of a sequence and its mirror image from the back (zig-zag). This gives every rank
//! an equal part of the work under the causal mask.
//!
//! *Ulysses* (arXiv 2309.14509): an all-to-all gives each rank all positions of some heads, and
//! another one returns the results.
// Shapes: B batch, H query heads, G key/value heads, S sequence, s of it on a rank, d head width,
// R ranks.

use crate::collectives::all_to_all;
use crate::{CommError, Communicator, Work};
use kernels::{repeat_heads, sum_repeated_heads};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Attention across the ranks that split a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContextKind {
    /// Ring attention (arXiv 2310.01889): ranks send keys and values around a ring. Any number of
    /// heads works.
    #[default]
    Ring,
    /// DeepSpeed Ulysses (arXiv 2309.14509): ranks split the heads during attention. The number of
    /// ranks must divide the number of heads.
    Ulysses,
}

/// Returns the positions of a sequence of `length` that rank `rank` of `ranks` has, in its order.
pub fn positions(kind: ContextKind, length: usize, rank: usize, ranks: usize) -> Vec<i64> {
    let range = |part: usize, parts: usize| {
        let start = length * part / parts;
        let end = length * (part + 1) / parts;
        start as i64..end as i64
    };
    match kind {
        _ if ranks == 1 => range(0, 1).collect(),
        ContextKind::Ring => {
            let front = range(rank, 2 * ranks);
            let back = range(2 * ranks - 1 - rank, 2 * ranks);
            front.chain(back).collect()
        }
        ContextKind::Ulysses => range(rank, ranks).collect(),
    }
}

/// The queries and keys of a block that the causal mask lets meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CausalBlock {
    /// The rank's own keys: causal.
    Own,
    /// Keys of an earlier rank: all queries see the first half.
    Earlier,
    /// Keys of a later rank: the second half of the queries sees all.
    Later,
}

/// The positions of a block's queries and keys among those of their ranks.
struct BlockParts {
    queries: Range<i64>,
    keys: Range<i64>,
}

impl CausalBlock {
    fn new(rank: usize, key_rank: usize) -> CausalBlock {
        match key_rank.cmp(&rank) {
            Ordering::Equal => CausalBlock::Own,
            Ordering::Less => CausalBlock::Earlier,
            Ordering::Greater => CausalBlock::Later,
        }
    }

    /// Returns the parts that meet if each rank has `length` positions.
    fn parts(self, length: i64) -> BlockParts {
        let half = length / 2;
        let all = 0..length;
        match self {
            CausalBlock::Own => BlockParts {
                queries: all.clone(),
                keys: all,
            },
            CausalBlock::Earlier => BlockParts {
                queries: all,
                keys: 0..half,
            },
            CausalBlock::Later => BlockParts {
                queries: half..2 * half,
                keys: all,
            },
        }
    }
}

/// Returns the positions `part` of `t` `[B, heads, positions, d]` or `[B, heads, positions]`.
fn narrow(t: &Tensor, part: &Range<i64>) -> Tensor {
    t.narrow(2, part.start, part.end - part.start)
}

/// The operands of attention that ranks compute block by block.
struct RingAttention {
    group: Arc<dyn Communicator>,
    scale: f64,
    /// The document of each position `[B, S]`, if tokens see only their own document.
    documents: Option<Tensor>,
    /// Length of the whole sequence.
    length: usize,
    /// `[B, H, s, d]`.
    q: Tensor,
    /// This rank's keys and values `[2, B, G, s, d]`.
    kv: Tensor,
    heads_per_kv_head: i64,
}

/// Keys and values that a rank has received, and the tensor that was sent with them.
struct Visit<'a> {
    block: CausalBlock,
    /// The rank that the keys and values belong to.
    key_rank: usize,
    kv: &'a Tensor,
    carried: Option<&'a Tensor>,
}

impl RingAttention {
    /// Returns the additive mask `[B, 1, queries, keys]` of a block, if documents are separated.
    fn mask(&self, block: CausalBlock, key_rank: usize) -> Option<Tensor> {
        let documents = self.documents.as_ref()?;
        let rank = self.group.rank();
        let ranks = self.group.size();
        let positions_of = |rank: usize, part: Range<i64>| {
            let all = positions(ContextKind::Ring, self.length, rank, ranks);
            let part = &all[part.start as usize..part.end as usize];
            Tensor::from_slice(part).to_device(documents.device())
        };
        let parts = block.parts((self.length / ranks) as i64);
        let queries = positions_of(rank, parts.queries);
        let keys = positions_of(key_rank, parts.keys);
        let query_documents = documents.index_select(1, &queries).unsqueeze(2);
        let key_documents = documents.index_select(1, &keys).unsqueeze(1);
        let causal = queries.unsqueeze(1).ge_tensor(&keys.unsqueeze(0));
        let visible = query_documents
            .eq_tensor(&key_documents)
            .logical_and(&causal)
            .unsqueeze(1);
        // Finite, so that a query without a visible key has a log-sum-exp. Its weight in the joined
        // result is zero.
        let mask = Tensor::zeros(visible.size().as_slice(), (self.q.kind(), visible.device()));
        Some(mask.masked_fill(&visible.logical_not(), -1e9))
    }

    /// Returns the operands of a visited block.
    fn operands(&self, visit: &Visit, parts: &BlockParts) -> BlockOperands {
        let keys_or_values = |index: i64| {
            let part = narrow(&visit.kv.get(index), &parts.keys);
            repeat_heads(&part, self.heads_per_kv_head)
        };
        let mask = self.mask(visit.block, visit.key_rank);
        BlockOperands {
            q: narrow(&self.q, &parts.queries),
            k: keys_or_values(0),
            v: keys_or_values(1),
            causal: visit.block == CausalBlock::Own && mask.is_none(),
            mask,
            scale: self.scale,
        }
    }

    /// Visits the blocks of all ranks, this rank's own first.
    ///
    /// While `visit` computes with one rank's keys and values, those of the next are received.
    /// `carried` is sent along with the keys and values. Every rank changes it, and it returns to
    /// this one.
    fn rotate(
        &self,
        mut carried: Option<Tensor>,
        mut visit: impl FnMut(Visit),
    ) -> Result<Option<Tensor>, CommError> {
        let rank = self.group.rank();
        let ranks = self.group.size();
        let next = (rank + 1) % ranks;
        let previous = (rank + ranks - 1) % ranks;
        let mut kv = self.kv.shallow_clone();
        for step in 0..ranks {
            let key_rank = (rank + ranks - step) % ranks;
            let arriving = kv.empty_like();
            let mut works = Vec::new();
            if step + 1 < ranks {
                works.push(self.group.send(&kv, next, 0)?);
                works.push(self.group.recv(&arriving, previous, 0)?);
            }
            visit(Visit {
                block: CausalBlock::new(rank, key_rank),
                key_rank,
                kv: &kv,
                carried: carried.as_ref(),
            });
            if let Some(sum) = &carried {
                let arriving = sum.empty_like();
                let sent = self.group.send(sum, next, 1)?;
                let received = self.group.recv(&arriving, previous, 1)?;
                sent.wait()?;
                received.wait()?;
                carried = Some(arriving);
            }
            works.into_iter().try_for_each(Work::wait)?;
            kv = arriving;
        }
        Ok(carried)
    }

    /// Returns the attention of this rank's queries over all keys.
    fn forward(&self) -> Result<Attention, CommError> {
        let options = (Kind::Float, self.q.device());
        let size = self.q.size();
        let positions = size[2];
        let joined = Attention {
            out: Tensor::zeros(size.as_slice(), options),
            lse: Tensor::full(&size[..3], f64::NEG_INFINITY, options),
        };
        self.rotate(None, |visit| {
            let parts = visit.block.parts(positions);
            let block = self.operands(&visit, &parts).forward();
            joined.narrow(&parts.queries).join(&block);
        })?;
        Ok(Attention {
            out: joined.out.to_kind(self.q.kind()),
            lse: joined.lse,
        })
    }

    /// Returns the gradients of queries, keys and values, given that of the output.
    fn backward(&self, grad: &Tensor, result: &Attention) -> Result<Gradients, CommError> {
        let options = (Kind::Float, self.q.device());
        let size = self.q.size();
        let positions = size[2];
        let grad_q = Tensor::zeros(size.as_slice(), options);
        let grad_kv = Tensor::zeros(self.kv.size().as_slice(), options);
        let returned = self.rotate(Some(grad_kv), |visit| {
            let parts = visit.block.parts(positions);
            let gradients = self.operands(&visit, &parts).backward(
                &narrow(grad, &parts.queries),
                &result.narrow(&parts.queries),
            );
            let sum_heads = |grad: &Tensor| sum_repeated_heads(grad, self.heads_per_kv_head);
            let grad_kv = visit.carried.expect("gradients are sent with the keys");
            add(&narrow(&grad_q, &parts.queries), &gradients.q);
            add(
                &narrow(&grad_kv.get(0), &parts.keys),
                &sum_heads(&gradients.k),
            );
            add(
                &narrow(&grad_kv.get(1), &parts.keys),
                &sum_heads(&gradients.v),
            );
        })?;
        let kind = self.q.kind();
        let grad_kv = returned.expect("gradients return").to_kind(kind);
        Ok(Gradients {
            q: grad_q.to_kind(kind),
            k: grad_kv.get(0),
            v: grad_kv.get(1),
        })
    }
}

fn add(to: &Tensor, addend: &Tensor) {
    let _ = to.shallow_clone().g_add_(addend);
}

/// Computes causal attention of this rank's queries over the keys and values of all ranks.
///
/// `query` and the result are `[B, H, s, d]`; `key` and `value` are `[B, G, s, d]`. The ranks of
/// `group` split sequences as [`positions`] says. `documents` `[B, S]` gives the document of each
/// position of the whole sequence, if tokens see only their own document.
///
/// # Collective
/// All ranks of the group, in forward and in backward.
///
/// # Errors
/// If a transfer fails.
pub fn ring_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    documents: Option<&Tensor>,
    scale: f64,
    group: &Arc<dyn Communicator>,
) -> Result<Tensor, Error> {
    let size = query.size();
    let heads = size[1];
    let positions = size[2];
    let ring = tch::no_grad(|| RingAttention {
        group: group.clone(),
        scale,
        documents: documents.map(Tensor::shallow_clone),
        length: positions as usize * group.size(),
        q: query.detach().contiguous(),
        kv: Tensor::stack(&[key, value], 0).contiguous(),
        heads_per_kv_head: heads / key.size()[1],
    });
    let result = tch::no_grad(|| ring.forward())?;
    let out = result.out.shallow_clone();
    let mut outputs = attach_backward(&[query, key, value], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Err(Error::new("ring attention: the output has no gradient"));
        };
        let Gradients { q, k, v } = ring.backward(&grad.contiguous(), &result)?;
        Ok(vec![Some(q), Some(k), Some(v)])
    })?;
    Ok(outputs.remove(0))
}

/// Number of queries per tile of unfused attention.
const QUERY_TILE: i64 = 512;

/// An attention result, or a part of it.
struct Attention {
    /// `[B, H, queries, d]`.
    out: Tensor,
    /// Log-sum-exps of the scores `[B, H, queries]` in fp32.
    lse: Tensor,
}

impl Attention {
    fn narrow(&self, queries: &Range<i64>) -> Attention {
        Attention {
            out: narrow(&self.out, queries),
            lse: narrow(&self.lse, queries),
        }
    }

    /// Adds the attention over other keys, in place.
    fn join(mut self, other: &Attention) {
        // Both outputs are averages of values; their weights are exp(lse).
        let joined = self.lse.logaddexp(&other.lse);
        let weight = |lse: &Tensor| (lse - &joined).exp().unsqueeze(-1);
        let own = &self.out * weight(&self.lse);
        let sum = own + other.out.to_kind(Kind::Float) * weight(&other.lse);
        self.out.copy_(&sum);
        self.lse.copy_(&joined);
    }
}

/// The gradients of attention's operands.
struct Gradients {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// Attention of some queries over some keys and values, all `[B, H, positions, d]`.
struct BlockOperands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Additive mask `[B, 1, queries, keys]`.
    mask: Option<Tensor>,
    causal: bool,
    scale: f64,
}

impl BlockOperands {
    fn forward(&self) -> Attention {
        let BlockOperands { q, k, v, .. } = self;
        if q.device() == Device::Cpu {
            let (out, lse) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                q,
                k,
                v,
                0.0,
                self.causal,
                self.mask.as_ref(),
                self.scale,
            );
            return Attention { out, lse };
        }
        let mut outs = Vec::new();
        let mut lses = Vec::new();
        for tile in self.query_tiles() {
            let scores = self.scores(&tile);
            let lse = scores.logsumexp([-1i64].as_slice(), false);
            let weights = (scores - lse.unsqueeze(-1)).exp().to_kind(v.kind());
            outs.push(weights.matmul(v));
            lses.push(lse);
        }
        Attention {
            out: Tensor::cat(&outs, 2),
            lse: Tensor::cat(&lses, 2),
        }
    }

    /// Returns this block's gradients, given the attention over all blocks and its gradient.
    fn backward(&self, grad: &Tensor, result: &Attention) -> Gradients {
        if self.q.device() != Device::Cpu {
            return self.unfused_backward(grad, result);
        }
        let (q, k, v) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            &self.q,
            &self.k,
            &self.v,
            &result.out,
            &result.lse,
            0.0,
            self.causal,
            self.mask.as_ref(),
            self.scale,
        );
        Gradients { q, k, v }
    }

    fn unfused_backward(&self, grad: &Tensor, result: &Attention) -> Gradients {
        let BlockOperands { q, k, v, scale, .. } = self;
        let mut grad_q = Vec::new();
        let mut grad_k = k.to_kind(Kind::Float).zeros_like();
        let mut grad_v = v.to_kind(Kind::Float).zeros_like();
        let product = grad.to_kind(Kind::Float) * result.out.to_kind(Kind::Float);
        let delta = product.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        for tile in self.query_tiles() {
            let lse = narrow(&result.lse, &tile).unsqueeze(-1);
            let weights = (self.scores(&tile) - lse).exp();
            let grad = narrow(grad, &tile);
            let weights_t = weights.transpose(2, 3);
            grad_v += weights_t.matmul(&grad.to_kind(Kind::Float));
            let grad_weights = grad.matmul(&v.transpose(2, 3)).to_kind(Kind::Float);
            let grad_scores = weights * (grad_weights - narrow(&delta, &tile)) * *scale;
            let grad_scores = grad_scores.to_kind(q.kind());
            grad_q.push(grad_scores.matmul(k));
            let grad_scores_t = grad_scores.transpose(2, 3);
            grad_k += grad_scores_t.matmul(&narrow(q, &tile)).to_kind(Kind::Float);
        }
        Gradients {
            q: Tensor::cat(&grad_q, 2),
            k: grad_k,
            v: grad_v,
        }
    }

    /// Returns the scaled and masked scores of the queries in `tile`: `[B, H, tile, keys]` in fp32.
    fn scores(&self, tile: &Range<i64>) -> Tensor {
        let q = narrow(&self.q, tile);
        let scores = q.matmul(&self.k.transpose(2, 3)).to_kind(Kind::Float) * self.scale;
        match &self.mask {
            Some(mask) => scores + narrow(mask, tile).to_kind(Kind::Float),
            None if self.causal => {
                let shape = [q.size()[2], self.k.size()[2]];
                let later = Tensor::ones(shape, (Kind::Bool, q.device())).triu(tile.start + 1);
                scores.masked_fill(&later, -1e9)
            }
            None => scores,
        }
    }

    fn query_tiles(&self) -> impl Iterator<Item = Range<i64>> + use<> {
        let queries = self.q.size()[2];
        let tile = move |start: i64| start..(start + QUERY_TILE).min(queries);
        (0..queries).step_by(QUERY_TILE as usize).map(tile)
    }
}

/// Exchanges this rank's positions of all heads for all positions of its own heads.
///
/// The input is `[B, H, s, d]`, the result `[B, H / R, S, d]`.
///
/// # Collective
/// All ranks of the group, in forward and in backward, as for [`heads_to_sequence`].
///
/// # Errors
/// If the transfer fails.
pub fn sequence_to_heads(x: &Tensor, group: &Arc<dyn Communicator>) -> Result<Tensor, Error> {
    let ranks = group.size() as i64;
    let size = x.size();
    let batch = size[0];
    let heads = size[1];
    let own = size[2];
    let width = size[3];
    let by_head = x
        .contiguous()
        .view([batch, ranks, heads / ranks, own, width])
        .permute([1, 0, 2, 3, 4]);
    let splits = vec![1; ranks as usize];
    let by_position = all_to_all(&by_head.contiguous(), group, &splits, &splits)?;
    Ok(by_position
        .permute([1, 2, 0, 3, 4])
        .reshape([batch, heads / ranks, ranks * own, width]))
}

/// Exchanges all positions of this rank's heads for its own positions of all heads.
///
/// The input is `[B, H / R, S, d]`, the result `[B, H, s, d]`.
///
/// # Errors
/// If the transfer fails.
pub fn heads_to_sequence(x: &Tensor, group: &Arc<dyn Communicator>) -> Result<Tensor, Error> {
    let ranks = group.size() as i64;
    let size = x.size();
    let batch = size[0];
    let heads = size[1];
    let length = size[2];
    let width = size[3];
    let by_position = x
        .contiguous()
        .view([batch, heads, ranks, length / ranks, width])
        .permute([2, 0, 1, 3, 4]);
    let splits = vec![1; ranks as usize];
    let by_head = all_to_all(&by_position.contiguous(), group, &splits, &splits)?;
    Ok(by_head
        .permute([1, 0, 2, 3, 4])
        .reshape([batch, ranks * heads, length / ranks, width]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Cpu, run_on_threads};
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use std::time::Duration;

    fn indices(range: &Range<i64>) -> Range<usize> {
        range.start as usize..range.end as usize
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_position_is_on_one_rank_and_the_ring_sees_each_pair_once(
            ranks in 1usize..9,
            half in 1usize..6,
        ) {
            let length = 2 * ranks * half;
            for kind in [ContextKind::Ring, ContextKind::Ulysses] {
                let of_rank = |rank| positions(kind, length, rank, ranks);
                let mut all: Vec<i64> = (0..ranks).flat_map(of_rank).collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..length as i64).collect::<Vec<_>>());
            }
            let of_rank = |rank| positions(ContextKind::Ring, length, rank, ranks);
            let mut pairs = Vec::new();
            for rank in 0..ranks {
                let mut seen = 0;
                let own = of_rank(rank);
                for key_rank in 0..ranks {
                    let block = CausalBlock::new(rank, key_rank);
                    let theirs = of_rank(key_rank);
                    let parts = block.parts(own.len() as i64);
                    for query in &own[indices(&parts.queries)] {
                        for key in &theirs[indices(&parts.keys)] {
                            prop_assert!(block == CausalBlock::Own || query > key);
                            if query >= key {
                                pairs.push((*query, *key));
                                seen += 1;
                            }
                        }
                    }
                }
                // The zig-zag gives every rank an equal part.
                prop_assert_eq!(seen * ranks, length * (length + 1) / 2);
            }
            prop_assert_eq!(pairs.len(), length * (length + 1) / 2);
        }
    }

    fn random(shape: &[i64]) -> Tensor {
        Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0)
    }

    /// Computes plain attention over the whole sequence.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, documents: Option<&Tensor>) -> Tensor {
        let length = q.size()[2];
        let causal = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0);
        let visible = match documents {
            Some(documents) => documents
                .unsqueeze(2)
                .eq_tensor(&documents.unsqueeze(1))
                .unsqueeze(1)
                .logical_and(&causal),
            None => causal,
        };
        let scores = q.matmul(&repeat_heads(k, 2).transpose(2, 3)) * 0.3;
        scores
            .masked_fill(&visible.logical_not(), f64::NEG_INFINITY)
            .softmax(-1, Kind::Float)
            .matmul(&repeat_heads(v, 2))
    }

    /// Queries, keys, values and the gradient of the result, for whole sequences.
    struct Case {
        operands: [Tensor; 4],
        documents: Option<Tensor>,
    }

    impl Case {
        fn copy(&self) -> Case {
            Case {
                operands: self.operands.each_ref().map(Tensor::copy),
                documents: self.documents.as_ref().map(Tensor::copy),
            }
        }

        /// Returns the positions of `rank`, and there the result and the operands' gradients.
        fn compute_part(
            &self,
            kind: ContextKind,
            group: &Arc<dyn Communicator>,
        ) -> (Tensor, [Tensor; 4]) {
            let length = self.operands[0].size()[2] as usize;
            let own = positions(kind, length, group.rank(), group.size());
            let own = Tensor::from_slice(&own);
            let documents = self.documents.as_ref();
            let [q, k, v, grad] = self.operands.each_ref().map(|t| t.index_select(2, &own));
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let out = match kind {
                ContextKind::Ring => ring_attention(&q, &k, &v, documents, 0.3, group).unwrap(),
                ContextKind::Ulysses => {
                    let [q, k, v] = [&q, &k, &v].map(|t| sequence_to_heads(t, group).unwrap());
                    heads_to_sequence(&plain(&q, &k, &v, documents), group).unwrap()
                }
            };
            (&out * grad).sum(Kind::Float).backward();
            (own, [out.detach(), q.grad(), k.grad(), v.grad()])
        }
    }

    #[test]
    fn both_kinds_are_attention_over_the_whole_sequence() {
        let ranks = 3usize;
        let documents = [0i64, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3].repeat(2);
        let documents = Tensor::from_slice(&documents).view([2, 12]);
        for packed in [false, true] {
            let operands = [6, 3, 3, 6].map(|heads| random(&[2, heads, 12, 4]));
            let case = Case {
                operands,
                documents: packed.then(|| documents.copy()),
            };
            let [q, k, v, grad] = case.operands.each_ref().map(Tensor::copy);
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let expected = plain(&q, &k, &v, case.documents.as_ref());
            (&expected * grad).sum(Kind::Float).backward();
            let whole = [expected.detach(), q.grad(), k.grad(), v.grad()];
            for kind in [ContextKind::Ring, ContextKind::Ulysses] {
                let shared = Mutex::new(case.copy());
                let parts = run_on_threads(ranks, Duration::from_secs(20), move |world| {
                    let case = shared.lock().copy();
                    case.compute_part(kind, &world.all("context").unwrap())
                });
                for (own, parts) in parts {
                    for (part, whole) in parts.iter().zip(&whole) {
                        let whole = whole.index_select(2, &own);
                        let close = part.allclose(&whole, 1e-4, 1e-5, false);
                        assert!(close, "{kind:?}, packed {packed}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_kernel_and_the_formula_have_the_same_gradients() {
        let [q, k, v, grad] = [0; 4].map(|_| random(&[2, 3, 600, 8]));
        let block = BlockOperands {
            q,
            k,
            v,
            mask: None,
            causal: true,
            scale: 0.4,
        };
        let result = block.forward();
        let scores = block.scores(&(0..600));
        let lse = scores.logsumexp([-1i64].as_slice(), false);
        assert!(result.lse.allclose(&lse, 1e-4, 1e-5, false));
        let kernel = block.backward(&grad, &result);
        let formula = block.unfused_backward(&grad, &result);
        for (kernel, formula) in [
            (kernel.q, formula.q),
            (kernel.k, formula.k),
            (kernel.v, formula.v),
        ] {
            assert!(kernel.allclose(&formula, 1e-3, 1e-4, false));
        }
    }
}
