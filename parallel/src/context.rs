//! Context parallelism: every sequence over several ranks, and attention across them.
//!
//! *Ring* (arXiv 2310.01889): keys and values go round while each rank attends with its own queries; blocks are joined by
//! their log-sum-exps. A rank has one chunk from the front of a sequence and its mirror image from the back (zig-zag), so
//! that the causal mask leaves every rank as much to do. *Ulysses* (arXiv 2309.14509): an all-to-all gives each rank all
//! positions of some heads, and another brings them back.
// Shapes: B batch, H query heads, G key/value heads, S sequence, s of it on a rank, d head width, R ranks.

use crate::collectives::all_to_all;
use crate::{CommError, Communicator};
use kernels::{repeat_heads, sum_repeated_heads};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// How ranks that split sequences attend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContextKind {
    /// Keys and values go round; any number of heads.
    #[default]
    Ring,
    /// Heads are shared out during attention: as many ranks as divide them.
    Ulysses,
}

/// The positions of a sequence of `length` that rank `rank` of `ranks` has, in its order.
pub fn positions(kind: ContextKind, length: usize, rank: usize, ranks: usize) -> Vec<i64> {
    let range = |part: usize, parts: usize| {
        (length * part / parts) as i64..(length * (part + 1) / parts) as i64
    };
    match kind {
        _ if ranks == 1 => range(0, 1).collect(),
        ContextKind::Ring => range(rank, 2 * ranks)
            .chain(range(2 * ranks - 1 - rank, 2 * ranks))
            .collect(),
        ContextKind::Ulysses => range(rank, ranks).collect(),
    }
}

/// Which queries and keys of a block see each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CausalBlock {
    /// The rank's own: causal.
    Own,
    /// Keys of an earlier rank: all queries see the first half.
    Earlier,
    /// Keys of a later rank: the second half of the queries sees all.
    Later,
}

impl CausalBlock {
    fn of(rank: usize, key_rank: usize) -> CausalBlock {
        match key_rank.cmp(&rank) {
            std::cmp::Ordering::Equal => CausalBlock::Own,
            std::cmp::Ordering::Less => CausalBlock::Earlier,
            std::cmp::Ordering::Greater => CausalBlock::Later,
        }
    }

    /// The queries, and the keys and values, that take part: `(start, len)` of the rank's `length` positions.
    fn parts(self, length: i64) -> ((i64, i64), (i64, i64)) {
        let half = length / 2;
        match self {
            CausalBlock::Own => ((0, length), (0, length)),
            CausalBlock::Earlier => ((0, length), (0, half)),
            CausalBlock::Later => ((half, half), (0, length)),
        }
    }
}

/// What ring attention keeps for a block.
struct RingAttention {
    group: Arc<dyn Communicator>,
    scale: f64,
    /// `[B, S]`: the document of each position, where tokens see only their own.
    documents: Option<Tensor>,
    length: usize,
}

impl RingAttention {
    /// The additive mask `[B, 1, queries, keys]` of a block, where documents are kept apart.
    fn mask(&self, block: CausalBlock, key_rank: usize, kind: Kind) -> Option<Tensor> {
        let documents = self.documents.as_ref()?;
        let rank = self.group.rank();
        let ranks = self.group.size();
        let at = |rank: usize, (start, len): (i64, i64)| {
            let all = positions(ContextKind::Ring, self.length, rank, ranks);
            Tensor::from_slice(&all[start as usize..(start + len) as usize])
                .to_device(documents.device())
        };
        let (queries, keys) = block.parts((self.length / ranks) as i64);
        let queries = at(rank, queries);
        let keys = at(key_rank, keys);
        let own = documents.index_select(1, &queries).unsqueeze(2);
        let theirs = documents.index_select(1, &keys).unsqueeze(1);
        let causal = queries.unsqueeze(1).ge_tensor(&keys.unsqueeze(0));
        let seen = own.eq_tensor(&theirs).logical_and(&causal).unsqueeze(1);
        // Finite, so that a query that sees nothing of a block has a log-sum-exp; it weighs nothing in the whole.
        Some(
            Tensor::zeros(seen.size().as_slice(), (kind, seen.device()))
                .masked_fill(&seen.logical_not(), -1e9),
        )
    }

    /// Goes through the blocks, this rank's own first: `visit` gets each with its keys and values `[2, B, G, s, d]`, while
    /// those of the next are on their way. `carried` goes along with the keys and values, and comes home.
    fn rotate(
        &self,
        own: &Tensor,
        mut carried: Option<Tensor>,
        mut visit: impl FnMut(CausalBlock, usize, &Tensor, Option<&Tensor>),
    ) -> Result<Option<Tensor>, CommError> {
        let rank = self.group.rank();
        let ranks = self.group.size();
        let next = (rank + 1) % ranks;
        let previous = (rank + ranks - 1) % ranks;
        let mut keys_values = own.shallow_clone();
        for step in 0..ranks {
            let key_rank = (rank + ranks - step) % ranks;
            let arriving = keys_values.empty_like();
            let mut works = Vec::new();
            if step + 1 < ranks {
                works.push(self.group.send(&keys_values, next, 0)?);
                works.push(self.group.recv(&arriving, previous, 0)?);
            }
            visit(
                CausalBlock::of(rank, key_rank),
                key_rank,
                &keys_values,
                carried.as_ref(),
            );
            if let Some(sum) = &carried {
                let theirs = sum.empty_like();
                let sent = self.group.send(sum, next, 1)?;
                let received = self.group.recv(&theirs, previous, 1)?;
                sent.wait()?;
                received.wait()?;
                carried = Some(theirs);
            }
            works.into_iter().try_for_each(crate::Work::wait)?;
            keys_values = arriving;
        }
        Ok(carried)
    }
}

/// Causal attention of queries `[B, H, s, d]` at this rank's positions over keys and values `[B, G, s, d]` of all ranks of
/// `group`, which split sequences of `length` as [`positions`] says: `[B, H, s, d]`. `documents` `[B, S]` says which
/// document each position of the whole sequence belongs to, where tokens see only their own.
///
/// # Collective
/// All ranks of the group, forward and backward.
///
/// # Errors
/// When a transfer fails.
pub fn ring_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    documents: Option<&Tensor>,
    scale: f64,
    group: &Arc<dyn Communicator>,
) -> Result<Tensor, Error> {
    let failed = |e: CommError| Error::new(e.to_string());
    let size = query.size();
    let batch = size[0];
    let heads = size[1];
    let own = size[2];
    let width = size[3];
    let ring = RingAttention {
        group: group.clone(),
        scale,
        documents: documents.map(Tensor::shallow_clone),
        length: own as usize * group.size(),
    };
    let times = heads / key.size()[1];
    let (q, kv) = tch::no_grad(|| {
        (
            query.detach().contiguous(),
            Tensor::stack(&[key, value], 0).contiguous(),
        )
    });
    let out = Tensor::zeros([batch, heads, own, width], (Kind::Float, q.device()));
    let lse = Tensor::full(
        [batch, heads, own],
        f64::NEG_INFINITY,
        (Kind::Float, q.device()),
    );
    tch::no_grad(|| {
        ring.rotate(&kv, None, |block, key_rank, kv, _| {
            let (queries, keys) = block.parts(own);
            let part = |t: &Tensor, (start, len): (i64, i64)| t.narrow(2, start, len);
            let mask = ring.mask(block, key_rank, q.kind());
            let k = repeat_heads(&part(&kv.get(0), keys), times);
            let v = repeat_heads(&part(&kv.get(1), keys), times);
            let causal = block == CausalBlock::Own && mask.is_none();
            let (block_out, block_lse) =
                block_attention(&part(&q, queries), &k, &v, mask.as_ref(), causal, scale);
            // Both are averages of values; their weights are exp(lse).
            let mut out = part(&out, queries);
            let mut lse = part(&lse, queries);
            let joined = lse.logaddexp(&block_lse);
            let weight = |lse: &Tensor| (lse - &joined).exp().unsqueeze(-1);
            let both = &out * weight(&lse) + block_out.to_kind(Kind::Float) * weight(&block_lse);
            out.copy_(&both);
            lse.copy_(&joined);
        })
    })
    .map_err(failed)?;
    let out = tch::no_grad(|| out.to_kind(q.kind()));
    let kept = out.shallow_clone();
    let mut outputs = attach_backward(&[query, key, value], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Err(Error::new("attention without a gradient"));
        };
        let grad = grad.contiguous();
        let grad_q = Tensor::zeros([batch, heads, own, width], (Kind::Float, q.device()));
        let grad_kv = Tensor::zeros(kv.size().as_slice(), (Kind::Float, q.device()));
        let home = ring
            .rotate(&kv, Some(grad_kv), |block, key_rank, kv, carried| {
                let (queries, keys) = block.parts(own);
                let part = |t: &Tensor, (start, len): (i64, i64)| t.narrow(2, start, len);
                let mask = ring.mask(block, key_rank, q.kind());
                let k = repeat_heads(&part(&kv.get(0), keys), times);
                let v = repeat_heads(&part(&kv.get(1), keys), times);
                let causal = block == CausalBlock::Own && mask.is_none();
                let (dq, dk, dv) = block_attention_backward(
                    &part(&grad, queries),
                    [&part(&q, queries), &k, &v],
                    &part(&kept, queries),
                    &part(&lse, queries),
                    mask.as_ref(),
                    causal,
                    ring.scale,
                );
                let add = |to: Tensor, what: Tensor| {
                    let _ = to.shallow_clone().g_add_(&what);
                };
                add(part(&grad_q, queries), dq);
                let carried = carried.expect("gradients travel with the keys and values");
                add(part(&carried.get(0), keys), sum_repeated_heads(&dk, times));
                add(part(&carried.get(1), keys), sum_repeated_heads(&dv, times));
            })
            .map_err(failed)?;
        let home = home.expect("what carried comes home").to_kind(q.kind());
        Ok(vec![
            Some(grad_q.to_kind(q.kind())),
            Some(home.get(0)),
            Some(home.get(1)),
        ])
    })?;
    Ok(outputs.remove(0))
}

/// Queries that are worked on at once where no kernel does it.
const QUERY_TILE: i64 = 512;

/// Attention of one block, and its log-sum-exps `[B, H, queries]` fp32.
fn block_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> (Tensor, Tensor) {
    if q.device() == Device::Cpu {
        return Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, mask, scale,
        );
    }
    let mut outs = Vec::new();
    let mut lses = Vec::new();
    for_each_query_tile(q.size()[2], |start, len| {
        let scores = scores(&q.narrow(2, start, len), k, mask, causal, scale, start);
        let lse = scores.logsumexp([-1i64].as_slice(), false);
        outs.push(
            (scores - lse.unsqueeze(-1))
                .exp()
                .to_kind(v.kind())
                .matmul(v),
        );
        lses.push(lse);
    });
    (Tensor::cat(&outs, 2), Tensor::cat(&lses, 2))
}

/// The gradients of queries, keys and values of one block, given the output and the log-sum-exps over all blocks.
fn block_attention_backward(
    grad: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    if q.device() == Device::Cpu {
        return Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, mask, scale,
        );
    }
    unfused_attention_backward(grad, [q, k, v], out, lse, mask, causal, scale)
}

fn unfused_attention_backward(
    grad: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    let mut dqs = Vec::new();
    let mut dk = k.to_kind(Kind::Float).zeros_like();
    let mut dv = v.to_kind(Kind::Float).zeros_like();
    let delta = (grad.to_kind(Kind::Float) * out.to_kind(Kind::Float)).sum_dim_intlist(
        [-1i64].as_slice(),
        true,
        Kind::Float,
    );
    for_each_query_tile(q.size()[2], |start, len| {
        let part = |t: &Tensor| t.narrow(2, start, len);
        let weights =
            (scores(&part(q), k, mask, causal, scale, start) - part(lse).unsqueeze(-1)).exp();
        let grad = part(grad);
        dv += weights.transpose(2, 3).matmul(&grad.to_kind(Kind::Float));
        let grad_weights = grad.matmul(&v.transpose(2, 3)).to_kind(Kind::Float);
        let grad_scores = (weights * (grad_weights - part(&delta)) * scale).to_kind(q.kind());
        dqs.push(grad_scores.matmul(k));
        dk += grad_scores
            .transpose(2, 3)
            .matmul(&part(q))
            .to_kind(Kind::Float);
    });
    (Tensor::cat(&dqs, 2), dk, dv)
}

/// `[B, H, queries, keys]` fp32 of queries that begin at `start` of the block.
fn scores(
    q: &Tensor,
    k: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
    start: i64,
) -> Tensor {
    let scores = q.matmul(&k.transpose(2, 3)).to_kind(Kind::Float) * scale;
    let queries = q.size()[2];
    let keys = k.size()[2];
    match mask {
        Some(mask) => scores + mask.narrow(2, start, queries).to_kind(Kind::Float),
        None if causal => {
            let later = Tensor::ones([queries, keys], (Kind::Bool, q.device())).triu(start + 1);
            scores.masked_fill(&later, -1e9)
        }
        None => scores,
    }
}

fn for_each_query_tile(queries: i64, mut body: impl FnMut(i64, i64)) {
    let mut start = 0;
    while start < queries {
        let len = QUERY_TILE.min(queries - start);
        body(start, len);
        start += len;
    }
}

/// All positions of this rank's heads from this rank's positions of all heads: `[B, H, s, d]` to `[B, H / R, S, d]`.
///
/// # Collective
/// All ranks of the group, forward and backward; so for [`heads_to_sequence`].
///
/// # Errors
/// When the transfer fails.
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

/// This rank's positions of all heads: `[B, H / R, S, d]` to `[B, H, s, d]`.
///
/// # Errors
/// When the transfer fails.
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_position_is_on_one_rank_and_the_ring_sees_each_pair_once(ranks in 1usize..9, half in 1usize..6) {
            let length = 2 * ranks * half;
            for kind in [ContextKind::Ring, ContextKind::Ulysses] {
                let mut all: Vec<i64> = (0..ranks).flat_map(|rank| positions(kind, length, rank, ranks)).collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..length as i64).collect::<Vec<_>>());
            }
            let mut pairs = Vec::new();
            for rank in 0..ranks {
                let mut seen = 0;
                let own = positions(ContextKind::Ring, length, rank, ranks);
                for key_rank in 0..ranks {
                    let block = CausalBlock::of(rank, key_rank);
                    let theirs = positions(ContextKind::Ring, length, key_rank, ranks);
                    let ((q, queries), (k, keys)) = block.parts(own.len() as i64);
                    for query in &own[q as usize..(q + queries) as usize] {
                        for key in &theirs[k as usize..(k + keys) as usize] {
                            prop_assert!(block == CausalBlock::Own || query > key);
                            if query >= key {
                                pairs.push((*query, *key));
                                seen += 1;
                            }
                        }
                    }
                }
                // The zig-zag: as much for every rank.
                prop_assert_eq!(seen * ranks, length * (length + 1) / 2);
            }
            prop_assert_eq!(pairs.len(), length * (length + 1) / 2);
        }
    }

    /// Plain attention over the whole sequence.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, documents: Option<&Tensor>) -> Tensor {
        let length = q.size()[2];
        let causal = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0);
        let seen = match documents {
            Some(documents) => documents
                .unsqueeze(2)
                .eq_tensor(&documents.unsqueeze(1))
                .unsqueeze(1)
                .logical_and(&causal),
            None => causal,
        };
        let scores = q.matmul(&repeat_heads(k, 2).transpose(2, 3)) * 0.3;
        scores
            .masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
            .softmax(-1, Kind::Float)
            .matmul(&repeat_heads(v, 2))
    }

    #[test]
    fn both_kinds_are_attention_over_the_whole_sequence() {
        let ranks = 3usize;
        let length = 12usize;
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        for packed in [false, true] {
            let documents = packed.then(|| {
                Tensor::from_slice(&[0i64, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3].repeat(2)).view([2, 12])
            });
            let all = [
                random(&[2, 6, 12, 4]),
                random(&[2, 3, 12, 4]),
                random(&[2, 3, 12, 4]),
                random(&[2, 6, 12, 4]),
            ];
            let leaves: Vec<Tensor> = all[..3]
                .iter()
                .map(|t| t.copy().set_requires_grad(true))
                .collect();
            let expected = plain(&leaves[0], &leaves[1], &leaves[2], documents.as_ref());
            (&expected * &all[3]).sum(Kind::Float).backward();
            for kind in [ContextKind::Ring, ContextKind::Ulysses] {
                let shared = Mutex::new((
                    all.each_ref().map(Tensor::copy),
                    documents.as_ref().map(Tensor::copy),
                ));
                let parts = run_on_threads(ranks, Duration::from_secs(20), move |world| {
                    let (all, documents) = {
                        let shared = shared.lock();
                        (
                            shared.0.each_ref().map(Tensor::copy),
                            shared.1.as_ref().map(Tensor::copy),
                        )
                    };
                    let group = world.all("context").unwrap();
                    let at = Tensor::from_slice(&positions(kind, length, world.rank(), ranks));
                    let own = |t: &Tensor| t.index_select(2, &at).set_requires_grad(true);
                    let [q, k, v] = [0, 1, 2].map(|index| own(&all[index]));
                    let out = match kind {
                        ContextKind::Ring => {
                            ring_attention(&q, &k, &v, documents.as_ref(), 0.3, &group).unwrap()
                        }
                        ContextKind::Ulysses => {
                            let [q, k, v] =
                                [&q, &k, &v].map(|t| sequence_to_heads(t, &group).unwrap());
                            heads_to_sequence(&plain(&q, &k, &v, documents.as_ref()), &group)
                                .unwrap()
                        }
                    };
                    (&out * all[3].index_select(2, &at))
                        .sum(Kind::Float)
                        .backward();
                    (at, [out.detach(), q.grad(), k.grad(), v.grad()])
                });
                let whole = [
                    &expected.detach(),
                    &leaves[0].grad(),
                    &leaves[1].grad(),
                    &leaves[2].grad(),
                ];
                for (at, of_rank) in parts {
                    for (part, whole) in of_rank.iter().zip(whole) {
                        let whole = whole.index_select(2, &at);
                        assert!(
                            part.allclose(&whole, 1e-4, 1e-5, false),
                            "{kind:?}, packed {packed}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_kernel_and_the_formula_have_the_same_gradients() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let [q, k, v, grad] = [0; 4].map(|_| random(&[2, 3, 600, 8]));
        let (out, lse) = block_attention(&q, &k, &v, None, true, 0.4);
        let scores = scores(&q, &k, None, true, 0.4, 0);
        assert!(lse.allclose(
            &scores.logsumexp([-1i64].as_slice(), false),
            1e-4,
            1e-5,
            false
        ));
        let (a, b, c) = block_attention_backward(&grad, [&q, &k, &v], &out, &lse, None, true, 0.4);
        let (d, e, f) =
            unfused_attention_backward(&grad, [&q, &k, &v], &out, &lse, None, true, 0.4);
        for (kernel, formula) in [(a, d), (b, e), (c, f)] {
            assert!(kernel.allclose(&formula, 1e-3, 1e-4, false));
        }
    }
}
