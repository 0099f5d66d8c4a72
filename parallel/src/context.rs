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

use crate::{
    AttentionResult, CommError, Communicator, Weight, Work, attention_node, collectives::all_to_all,
};
use kernels::{
    AttentionOptions, ScoreMask, attention, attention_backward, block_attention,
    block_attention_backward, raise_to_largest_scores,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{cmp::Ordering, ops::Range, sync::Arc};
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

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

/// A part of a rank's queries that meets a part of a rank's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    /// Among the positions of the queries' rank.
    queries: Range<i64>,
    /// Among the positions of the keys' rank.
    keys: Range<i64>,
    visibility: Visibility,
}

/// The keys of a block that its queries see, within one document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visibility {
    /// Every query sees every key.
    All,
    /// Queries and keys have equal positions; a query sees earlier ones, in a window if there is
    /// one.
    Causal,
    /// The window hides some of the keys from some of the queries, which come later.
    Window,
}

/// The division of a sequence among the ranks of a ring.
#[derive(Debug, Clone, Copy)]
struct RingLayout {
    ranks: usize,
    /// Positions of a rank: a chunk from the front of the sequence and one from the back.
    positions: i64,
    /// Number of positions that a query sees.
    window: Option<i64>,
}

impl RingLayout {
    /// Returns the blocks of a rank's queries and the keys of `key_rank`.
    fn blocks(&self, rank: usize, key_rank: usize) -> Vec<Block> {
        match self.window {
            Some(window) => self.blocks_in_window(rank, key_rank, window),
            None => vec![self.block_without_window(rank, key_rank)],
        }
    }

    fn block_without_window(&self, rank: usize, key_rank: usize) -> Block {
        let half = self.positions / 2;
        let all = 0..self.positions;
        match key_rank.cmp(&rank) {
            Ordering::Equal => Block {
                queries: all.clone(),
                keys: all,
                visibility: Visibility::Causal,
            },
            // All queries see the first half of an earlier rank's keys.
            Ordering::Less => Block {
                queries: all,
                keys: 0..half,
                visibility: Visibility::All,
            },
            // The second half of the queries sees all keys of a later rank.
            Ordering::Greater => Block {
                queries: half..2 * half,
                keys: all,
                visibility: Visibility::All,
            },
        }
    }

    fn blocks_in_window(&self, rank: usize, key_rank: usize, window: i64) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (query_half, query_chunk) in (0..).zip(self.chunks(rank)) {
            for (key_half, key_chunk) in (0..).zip(self.chunks(key_rank)) {
                // From positions of the sequence to those of the rank.
                let on_rank = |part: Range<i64>, chunks: i64| {
                    let shift = chunks * (self.positions / 2);
                    part.start + shift..part.end + shift
                };
                let block = self.chunk_block(query_chunk, key_chunk, window);
                blocks.extend(block.map(|block| Block {
                    queries: on_rank(block.queries, query_half - query_chunk),
                    keys: on_rank(block.keys, key_half - key_chunk),
                    visibility: block.visibility,
                }));
            }
        }
        blocks
    }

    /// Returns the parts of two chunks that meet, in positions of the sequence.
    fn chunk_block(&self, query_chunk: i64, key_chunk: i64, window: i64) -> Option<Block> {
        let half = self.positions / 2;
        let queries = query_chunk * half..(query_chunk + 1) * half;
        let keys = key_chunk * half..(key_chunk + 1) * half;
        if query_chunk == key_chunk {
            return Some(Block {
                queries,
                keys,
                visibility: Visibility::Causal,
            });
        }
        let queries = queries.start..queries.end.min(keys.end - 1 + window);
        let keys = keys.start.max(queries.start + 1 - window)..keys.end;
        if query_chunk < key_chunk || queries.is_empty() || keys.is_empty() {
            return None;
        }
        let farthest = queries.end - 1 - keys.start;
        let visibility = if farthest < window {
            Visibility::All
        } else {
            Visibility::Window
        };
        Some(Block {
            queries,
            keys,
            visibility,
        })
    }

    /// Returns the two chunks of a rank, among `2 * ranks` of a sequence.
    fn chunks(&self, rank: usize) -> [i64; 2] {
        [rank, 2 * self.ranks - 1 - rank].map(|chunk| chunk as i64)
    }

    /// Returns the distances around the ring at which a rank needs keys, in increasing order from
    /// zero.
    fn distances(&self) -> Vec<usize> {
        let is_needed = |distance: &usize| {
            (0..self.ranks)
                .any(|rank| !self.blocks(rank, self.key_rank(rank, *distance)).is_empty())
        };
        (0..self.ranks).filter(is_needed).collect()
    }

    /// Returns the rank whose keys are on `rank` after `distance` steps around the ring.
    fn key_rank(&self, rank: usize, distance: usize) -> usize {
        (rank + self.ranks - distance) % self.ranks
    }
}

/// Returns the positions `part` of `t` `[B, heads, positions, d]` or `[B, heads, positions]`.
fn narrow(t: &Tensor, part: &Range<i64>) -> Tensor {
    t.narrow(2, part.start, part.end - part.start)
}

/// The operands of attention that ranks compute block by block.
struct RingAttention {
    group: Arc<dyn Communicator>,
    layout: RingLayout,
    /// The layout's distances, which cost a search.
    distances: Vec<usize>,
    scale: f64,
    /// The document of each position `[B, S]`, if tokens see only their own document.
    documents: Option<Tensor>,
    /// `[B, H, s, dk]`.
    q: Tensor,
    /// This rank's keys and values, one after the other.
    kv: Tensor,
    /// `[B, G, s, dk]` and `[B, G, s, dv]`.
    kv_shapes: [Vec<i64>; 2],
}

/// Keys and values that a rank has received, and the tensor that was sent with them.
struct Visit<'a> {
    /// The rank that the keys and values belong to.
    key_rank: usize,
    kv: &'a Tensor,
    carried: Option<&'a Tensor>,
}

impl RingAttention {
    fn new(
        [query, key, value]: [&Tensor; 3],
        options: &RingOptions,
        group: &Arc<dyn Communicator>,
    ) -> RingAttention {
        let kv_shapes = [key.size(), value.size()];
        let numel = (key.numel() + value.numel()) as i64;
        let kv = Tensor::empty([numel], (key.kind(), key.device()));
        for (part, x) in key_and_value(&kv, &kv_shapes).iter_mut().zip([key, value]) {
            part.copy_(&x.detach());
        }
        let layout = RingLayout {
            ranks: group.size(),
            positions: query.size()[2],
            window: options.window,
        };
        RingAttention {
            group: group.clone(),
            layout,
            distances: layout.distances(),
            scale: options.scale,
            documents: options.documents.map(Tensor::shallow_clone),
            q: query.detach().contiguous(),
            kv,
            kv_shapes,
        }
    }

    /// Returns the mask `[1 or B, 1, queries, keys]` that is added to the scores of a block.
    fn added_mask(&self, block: &Block, key_rank: usize) -> Tensor {
        let RingLayout {
            ranks,
            positions: own,
            window,
        } = self.layout;
        let length = own as usize * ranks;
        let positions_of = |rank: usize, part: &Range<i64>| {
            let all = positions(ContextKind::Ring, length, rank, ranks);
            let part = &all[part.start as usize..part.end as usize];
            Tensor::from_slice(part).to_device(self.q.device())
        };
        let queries = positions_of(self.group.rank(), &block.queries);
        let keys = positions_of(key_rank, &block.keys);
        let seen_from = |first: &Tensor| first.unsqueeze(1).ge_tensor(&keys.unsqueeze(0));
        let mut visible = seen_from(&queries);
        if let Some(window) = window {
            visible = visible.logical_and(&seen_from(&(&queries - window)).logical_not());
        }
        if let Some(documents) = &self.documents {
            let of_queries = documents.index_select(1, &queries).unsqueeze(2);
            let of_keys = documents.index_select(1, &keys).unsqueeze(1);
            let same = of_queries.eq_tensor(&of_keys).unsqueeze(1);
            visible = same.logical_and(&visible);
        } else {
            visible = visible.unsqueeze(0).unsqueeze(0);
        }
        // Finite, so that a query without a visible key has a log-sum-exp. Its weight in the joined
        // result is zero.
        kernels::added_mask(&visible, self.q.kind())
    }

    fn mask(&self, block: &Block, key_rank: usize) -> BlockMask {
        let fits = |window: i64| window >= block.queries.end - block.queries.start;
        let window = self.layout.window.filter(|&window| !fits(window));
        match block.visibility {
            _ if self.documents.is_some() => BlockMask::Added(self.added_mask(block, key_rank)),
            Visibility::All => BlockMask::None,
            Visibility::Causal => BlockMask::Causal(window),
            Visibility::Window => BlockMask::Added(self.added_mask(block, key_rank)),
        }
    }

    /// Returns the operands of a block of visited keys.
    fn operands(&self, visit: &Visit, block: &Block) -> BlockOperands {
        let [k, v] = key_and_value(visit.kv, &self.kv_shapes);
        BlockOperands {
            q: narrow(&self.q, &block.queries),
            k: narrow(&k, &block.keys),
            v: narrow(&v, &block.keys),
            mask: self.mask(block, visit.key_rank),
            scale: self.scale,
        }
    }

    /// Visits the keys and values of all ranks with blocks, this rank's own first.
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
        let mut kv = self.kv.shallow_clone();
        for (step, &distance) in self.distances.iter().enumerate() {
            let further = self.distances.get(step + 1);
            let stride = further.unwrap_or(&ranks) - distance;
            let next = (rank + stride) % ranks;
            let previous = self.layout.key_rank(rank, stride);
            let arriving = further.map(|_| kv.empty_like());
            let mut works = Vec::new();
            if let Some(arriving) = &arriving {
                works.push(self.group.send(&kv, next, 0)?);
                works.push(self.group.recv(arriving, previous, 0)?);
            }
            visit(Visit {
                key_rank: self.layout.key_rank(rank, distance),
                kv: &kv,
                carried: carried.as_ref(),
            });
            if let Some(sum) = carried.take_if(|_| stride < ranks) {
                let arriving = sum.empty_like();
                let sent = self.group.send(&sum, next, 1)?;
                let received = self.group.recv(&arriving, previous, 1)?;
                sent.wait()?;
                received.wait()?;
                carried = Some(arriving);
            }
            works.into_iter().try_for_each(Work::wait)?;
            if let Some(arriving) = arriving {
                kv = arriving;
            }
        }
        Ok(carried)
    }

    /// Returns the attention of this rank's queries over all keys. Raises `largest_scores` to its
    /// largest scores.
    fn forward(&self, largest_scores: Option<&Tensor>) -> Result<AttentionResult, CommError> {
        let options = (Kind::Float, self.q.device());
        let mut size = self.q.size();
        let lse = Tensor::full(&size[..3], f64::NEG_INFINITY, options);
        size[3] = self.kv_shapes[1][3];
        let out = Tensor::zeros(size, options);
        let joined = AttentionResult { out, lse };
        self.rotate(None, |visit| {
            for block in self.layout.blocks(self.group.rank(), visit.key_rank) {
                let operands = self.operands(&visit, &block);
                if let Some(largest) = largest_scores {
                    let BlockOperands { q, k, scale, .. } = &operands;
                    raise_to_largest_scores(largest, q, k, operands.score_mask(), *scale);
                }
                let attention = operands.forward();
                join(narrow_result(&joined, &block.queries), &attention);
            }
        })?;
        Ok(AttentionResult {
            out: joined.out.to_kind(self.q.kind()),
            lse: joined.lse,
        })
    }

    /// Returns the gradients of queries, keys and values, given that of the output.
    fn backward(&self, grad: &Tensor, result: &AttentionResult) -> Result<[Tensor; 3], CommError> {
        let options = (Kind::Float, self.q.device());
        let grad_q = Tensor::zeros(self.q.size(), options);
        let grad_kv = Tensor::zeros(self.kv.size(), options);
        let returned = self.rotate(Some(grad_kv), |visit| {
            let grad_kv = visit.carried.expect("gradients are sent with the keys");
            let [grad_k, grad_v] = key_and_value(grad_kv, &self.kv_shapes);
            for block in self.layout.blocks(self.group.rank(), visit.key_rank) {
                let [q, k, v] = self.operands(&visit, &block).backward(
                    &narrow(grad, &block.queries),
                    &narrow_result(result, &block.queries),
                );
                add(&narrow(&grad_q, &block.queries), &q);
                add(&narrow(&grad_k, &block.keys), &k);
                add(&narrow(&grad_v, &block.keys), &v);
            }
        })?;
        let kind = self.q.kind();
        let grad_kv = returned.expect("gradients return").to_kind(kind);
        let [k, v] = key_and_value(&grad_kv, &self.kv_shapes);
        Ok([grad_q.to_kind(kind), k, v])
    }
}

/// Returns views of keys and values that are one after the other in `kv`.
fn key_and_value(kv: &Tensor, shapes: &[Vec<i64>; 2]) -> [Tensor; 2] {
    let [key, value] = shapes;
    let num_keys: i64 = key.iter().product();
    let num_values: i64 = value.iter().product();
    [
        kv.narrow(0, 0, num_keys).view(key.as_slice()),
        kv.narrow(0, num_keys, num_values).view(value.as_slice()),
    ]
}

fn add(to: &Tensor, addend: &Tensor) {
    let _ = to.shallow_clone().g_add_(addend);
}

/// Scores and visible keys of [`ring_attention`].
#[derive(Clone, Copy)]
pub struct RingOptions<'a> {
    /// Factor of the scores.
    pub scale: f64,
    /// Number of positions that a query sees: its own and those just before it. All earlier ones if
    /// unset.
    pub window: Option<i64>,
    /// The document of each position of the whole sequence `[B, S]`, if tokens see only their own
    /// document.
    pub documents: Option<&'a Tensor>,
    /// Logits `[H]` of attention sinks.
    pub sinks: Option<&'a Weight>,
    /// `[H]` fp32, which the forward pass raises to the largest scaled score of each head.
    pub largest_scores: Option<&'a Tensor>,
}

/// Computes causal attention of this rank's queries over the keys and values of all ranks.
///
/// Queries are `[B, H, s, dk]`, keys `[B, G, s, dk]`, values `[B, G, s, dv]` and the result is
/// `[B, H, s, dv]`. The ranks of `group` split sequences as [`positions`] says. Keys and values
/// skip ranks in whose windows none of them are. Not yet run on hardware other than CPUs.
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
    options: &RingOptions,
    group: &Arc<dyn Communicator>,
) -> Result<Tensor, Error> {
    let inputs = [query, key, value];
    let ring = tch::no_grad(|| RingAttention::new(inputs, options, group));
    let result = tch::no_grad(|| ring.forward(options.largest_scores))?;
    attention_node(inputs, result, options.sinks, move |grad, result| {
        Ok(ring.backward(&grad.contiguous(), result)?)
    })
}

/// Returns the part of a result that some queries have.
fn narrow_result(result: &AttentionResult, queries: &Range<i64>) -> AttentionResult {
    AttentionResult {
        out: narrow(&result.out, queries),
        lse: narrow(&result.lse, queries),
    }
}

/// Adds the attention over other keys to `result`, in place.
fn join(mut result: AttentionResult, other: &AttentionResult) {
    // Both outputs are averages of values; their weights are exp(lse).
    let joined = result.lse.logaddexp(&other.lse);
    let weight = |lse: &Tensor| (lse - &joined).exp().unsqueeze(-1);
    let own = &result.out * weight(&result.lse);
    let sum = own + other.out.to_kind(Kind::Float) * weight(&other.lse);
    result.out.copy_(&sum);
    result.lse.copy_(&joined);
}

/// The mask of a block's scores.
enum BlockMask {
    None,
    /// Causal, in a window if there is one.
    Causal(Option<i64>),
    Added(Tensor),
}

/// Attention of some queries `[B, H, queries, dk]` over keys and values `[B, G, keys, d]`.
struct BlockOperands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: f64,
}

impl BlockOperands {
    fn forward(&self) -> AttentionResult {
        let BlockOperands { q, k, v, .. } = self;
        let (out, lse) = match self.window_on_cpu() {
            Some(options) => attention(q, k, v, &options),
            None => block_attention([q, k, v], self.score_mask(), self.scale),
        };
        AttentionResult { out, lse }
    }

    /// Returns this block's gradients, given the attention over all blocks and its gradient.
    fn backward(&self, grad: &Tensor, result: &AttentionResult) -> [Tensor; 3] {
        let BlockOperands { q, k, v, .. } = self;
        let AttentionResult { out, lse } = result;
        match self.window_on_cpu() {
            Some(options) => attention_backward(grad, [q, k, v], out, &lse.contiguous(), &options),
            None => {
                let mask = self.score_mask();
                block_attention_backward(grad, [q, k, v], out, lse, mask, self.scale)
            }
        }
    }

    /// Returns the options of attention in a window, for which the CPU has a kernel.
    fn window_on_cpu(&self) -> Option<AttentionOptions> {
        match self.mask {
            BlockMask::Causal(Some(window)) if self.q.device() == Device::Cpu => {
                Some(AttentionOptions {
                    scale: self.scale,
                    window: Some(window),
                })
            }
            _ => None,
        }
    }

    fn score_mask(&self) -> ScoreMask<'_> {
        match &self.mask {
            BlockMask::None => ScoreMask::None,
            BlockMask::Causal(window) => ScoreMask::Causal(*window),
            BlockMask::Added(mask) => ScoreMask::Added(mask),
        }
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
    use crate::{Accelerator, Cpu, GradientBuckets, Replication, run_on_threads};
    use kernels::repeat_heads;
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
            window in prop_oneof![Just(None), (1i64..100).prop_map(Some)],
        ) {
            let length = 2 * ranks * half;
            for kind in [ContextKind::Ring, ContextKind::Ulysses] {
                let of_rank = |rank| positions(kind, length, rank, ranks);
                let mut all: Vec<i64> = (0..ranks).flat_map(of_rank).collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..length as i64).collect::<Vec<_>>());
            }
            let layout = RingLayout {
                ranks,
                positions: 2 * half as i64,
                window,
            };
            let sees = |query: i64, key: i64| {
                query >= key && window.is_none_or(|window| query - key < window)
            };
            let of_rank = |rank| positions(ContextKind::Ring, length, rank, ranks);
            let distances = layout.distances();
            let mut pairs = Vec::new();
            for rank in 0..ranks {
                let mut seen = 0;
                let own = of_rank(rank);
                for &distance in &distances {
                    let key_rank = layout.key_rank(rank, distance);
                    let theirs = of_rank(key_rank);
                    for block in layout.blocks(rank, key_rank) {
                        let mut hidden = 0;
                        for &query in &own[indices(&block.queries)] {
                            for &key in &theirs[indices(&block.keys)] {
                                if sees(query, key) {
                                    pairs.push((query, key));
                                    seen += 1;
                                } else {
                                    hidden += 1;
                                }
                            }
                        }
                        match block.visibility {
                            Visibility::All => prop_assert_eq!(hidden, 0),
                            Visibility::Window => prop_assert!(hidden > 0),
                            Visibility::Causal => {
                                prop_assert_eq!(&block.queries, &block.keys);
                                prop_assert_eq!(rank, key_rank);
                            }
                        }
                    }
                }
                // The zig-zag gives every rank an equal part.
                if window.is_none() {
                    prop_assert_eq!(seen * ranks, length * (length + 1) / 2);
                }
            }
            pairs.sort_unstable();
            let all = (0..length as i64).flat_map(|query| (0..=query).map(move |key| (query, key)));
            let expected: Vec<_> = all.filter(|&(query, key)| sees(query, key)).collect();
            prop_assert_eq!(pairs, expected);
            // A short window reaches only the chunk before its own, on a neighboring rank.
            if window.is_some_and(|window| window <= half as i64 + 1) {
                prop_assert!(distances.iter().all(|d| [0, 1, ranks - 1].contains(d)));
            }
        }
    }

    fn random(shape: &[i64]) -> Tensor {
        Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0)
    }

    /// Queries, keys, values and the gradient of the result, for whole sequences.
    struct Case {
        operands: [Tensor; 4],
        documents: Option<Tensor>,
        window: Option<i64>,
        sinks: Option<Tensor>,
    }

    /// Results of a rank.
    struct RankPart {
        /// Positions of the rank.
        own: Tensor,
        /// The output and the gradients of queries, keys and values.
        parts: [Tensor; 4],
        /// The rank's contribution to the gradient of the sinks.
        sinks: Option<Tensor>,
    }

    impl Case {
        fn copy(&self) -> Case {
            let copy = |t: &Option<Tensor>| t.as_ref().map(Tensor::copy);
            Case {
                operands: self.operands.each_ref().map(Tensor::copy),
                documents: copy(&self.documents),
                window: self.window,
                sinks: copy(&self.sinks),
            }
        }

        /// Computes plain attention over the whole sequence.
        fn plain(&self, [q, k, v]: [&Tensor; 3], sinks: Option<&Tensor>) -> Tensor {
            let [batch, heads, length] = [0, 1, 2].map(|dim| q.size()[dim]);
            let all = Tensor::ones([length, length], (Kind::Bool, Device::Cpu));
            let mut visible = kernels::causal_part(&all, self.window);
            if let Some(documents) = &self.documents {
                let same = documents.unsqueeze(2).eq_tensor(&documents.unsqueeze(1));
                visible = same.unsqueeze(1).logical_and(&visible);
            }
            let mut scores = (q.matmul(&repeat_heads(k, 2).transpose(2, 3)) * 0.3)
                .masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
            if let Some(sinks) = sinks {
                let sinks = sinks.view([1, heads, 1, 1]);
                let column = sinks.expand([batch, heads, length, 1], false);
                scores = Tensor::cat(&[scores, column], -1);
            }
            let weights = scores.softmax(-1, Kind::Float).narrow(-1, 0, length);
            weights.matmul(&repeat_heads(v, 2))
        }

        /// Returns the output over whole sequences and the gradients of operands and sinks.
        fn compute_whole(&self) -> ([Tensor; 4], Option<Tensor>) {
            let [q, k, v, grad] = self.operands.each_ref().map(Tensor::copy);
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let sinks = self
                .sinks
                .as_ref()
                .map(|t| t.copy().set_requires_grad(true));
            let out = self.plain([&q, &k, &v], sinks.as_ref());
            (&out * grad).sum(Kind::Float).backward();
            let whole = [out.detach(), q.grad(), k.grad(), v.grad()];
            (whole, sinks.map(|sinks| sinks.grad()))
        }

        fn compute_part(&self, kind: ContextKind, group: &Arc<dyn Communicator>) -> RankPart {
            let length = self.operands[0].size()[2] as usize;
            let own = positions(kind, length, group.rank(), group.size());
            let own = Tensor::from_slice(&own);
            let [q, k, v, grad] = self.operands.each_ref().map(|t| t.index_select(2, &own));
            let [q, k, v] = [q, k, v].map(|t| t.set_requires_grad(true));
            let weight = Weight::new(self.sinks.as_ref().map_or(random(&[1]), Tensor::copy));
            let alone = [Replication::alone()];
            let buckets =
                GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
            buckets.begin(1);
            let out = match kind {
                ContextKind::Ring => {
                    let options = RingOptions {
                        scale: 0.3,
                        window: self.window,
                        documents: self.documents.as_ref(),
                        sinks: self.sinks.as_ref().map(|_| &weight),
                        largest_scores: None,
                    };
                    ring_attention(&q, &k, &v, &options, group).unwrap()
                }
                ContextKind::Ulysses => {
                    let [q, k, v] = [&q, &k, &v].map(|t| sequence_to_heads(t, group).unwrap());
                    heads_to_sequence(&self.plain([&q, &k, &v], None), group).unwrap()
                }
            };
            (&out * grad).sum(Kind::Float).backward();
            let sinks = self
                .sinks
                .as_ref()
                .map(|_| buckets.gradient(0).copy().view([-1]));
            RankPart {
                own,
                parts: [out.detach(), q.grad(), k.grad(), v.grad()],
                sinks,
            }
        }

        /// Asserts that ranks together compute what one computes.
        fn check(&self, kind: ContextKind, ranks: usize) {
            let told = format!("{kind:?}, {ranks} ranks, window {:?}", self.window);
            let (whole, whole_sinks) = self.compute_whole();
            let shared = Mutex::new(self.copy());
            let parts = run_on_threads(ranks, Duration::from_secs(20), move |world| {
                let case = shared.lock().copy();
                case.compute_part(kind, &world.all("context").unwrap())
            });
            for part in &parts {
                for (ours, whole) in part.parts.iter().zip(&whole) {
                    let whole = whole.index_select(2, &part.own);
                    assert!(ours.allclose(&whole, 1e-4, 1e-5, false), "{told}");
                }
            }
            if let Some(whole) = whole_sinks {
                let sum = parts
                    .iter()
                    .filter_map(|part| part.sinks.as_ref())
                    .fold(whole.zeros_like(), |sum, part| sum + part);
                assert!(sum.allclose(&whole, 1e-4, 1e-5, false), "sinks, {told}");
            }
        }
    }

    #[test]
    fn both_kinds_are_attention_over_the_whole_sequence() {
        let documents = [0i64, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3].repeat(2);
        let documents = Tensor::from_slice(&documents).view([2, 12]);
        for packed in [false, true] {
            for window in [None, Some(1), Some(3), Some(7), Some(12)] {
                for value_width in [4, 6] {
                    let widths = [4, 4, value_width, value_width];
                    let shapes = std::iter::zip([6, 3, 3, 6], widths);
                    let mut operands = shapes.map(|(heads, width)| random(&[2, heads, 12, width]));
                    let operands = [(); 4].map(|()| operands.next().unwrap());
                    let case = Case {
                        operands,
                        documents: packed.then(|| documents.copy()),
                        window,
                        sinks: (value_width == 6).then(|| random(&[6]) * 3.0),
                    };
                    case.check(ContextKind::Ring, 3);
                    if case.sinks.is_none() {
                        case.check(ContextKind::Ulysses, 3);
                    }
                }
            }
        }
    }

    #[test]
    fn long_windows_use_the_kernel_inside_a_chunk() {
        let random = |heads: i64, width: i64| random(&[1, heads, 768, width]);
        let case = Case {
            operands: [random(4, 16), random(2, 16), random(2, 32), random(4, 32)],
            documents: None,
            window: Some(40),
            sinks: Some(Tensor::from_slice(&[0.5f32, -1.0, 2.0, 0.0])),
        };
        case.check(ContextKind::Ring, 2);
        case.check(ContextKind::Ring, 4);
    }
}
