//! Attention between any queries and keys, on libtorch's operations.
//!
//! On the CPU they are its fused kernel, which has no windows. No fused kernel of the other devices
//! takes a mask, gives log-sum-exps and differentiates with those of more keys. Without a fused
//! kernel, the scores of a tile of queries and the keys in its reach are a matrix.
// Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, dk and dv widths.

use super::heads::{repeat_heads, sum_repeated_heads};
use crate::tensors::LAST_DIM;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Number of queries per tile of unfused attention, whose scores exist at once.
pub const QUERY_TILE: i64 = 512;

/// The keys that queries see.
#[derive(Debug, Clone, Copy)]
pub enum ScoreMask<'a> {
    /// Every query sees every key.
    None,
    /// Query `i` sees key `i` and those before it, or in a window of `w` the keys from `i - w + 1`
    /// on. There are equal numbers of both.
    Causal(Option<i64>),
    /// A tensor `[1 or B, 1, Q, K]` that is added to the scores, see [`added_mask`].
    Added(&'a Tensor),
}

/// Returns attention `[B, H, Q, dv]` and the log-sum-exp of its scores `[B, H, Q]` fp32.
///
/// The inputs are queries `[B, H, Q, dk]`, keys `[B, G, K, dk]` and values `[B, G, K, dv]`. Each
/// key head serves `H / G` consecutive query heads.
pub fn block_attention(inputs: [&Tensor; 3], mask: ScoreMask, scale: f64) -> (Tensor, Tensor) {
    let block = Block::new(inputs, mask, scale);
    if block.is_fused() {
        block.fused_forward()
    } else {
        block.unfused_forward()
    }
}

/// Returns the gradients of queries, keys and values, in fp32 or in the dtype of the inputs.
///
/// `grad` is the gradient of the output. `out` and `lse` may be those of attention over more keys
/// than these: then the gradients are this block's part.
pub fn block_attention_backward(
    grad: &Tensor,
    inputs: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    mask: ScoreMask,
    scale: f64,
) -> [Tensor; 3] {
    let block = Block::new(inputs, mask, scale);
    let [query, key, value] = if block.is_fused() {
        block.fused_backward(grad, out, lse)
    } else {
        block.unfused_backward(grad, out, lse)
    };
    let times = inputs[0].size()[1] / inputs[1].size()[1];
    let sum_heads = |grad: Tensor| {
        if times == 1 {
            grad
        } else {
            sum_repeated_heads(&grad, times)
        }
    };
    [query, sum_heads(key), sum_heads(value)]
}

/// Operands with a key and a value head per query head.
struct Block<'a> {
    query: &'a Tensor,
    key: Tensor,
    value: Tensor,
    mask: ScoreMask<'a>,
    scale: f64,
}

impl<'a> Block<'a> {
    fn new([query, key, value]: [&'a Tensor; 3], mask: ScoreMask<'a>, scale: f64) -> Block<'a> {
        let times = query.size()[1] / key.size()[1];
        Block {
            query,
            key: repeat_heads(key, times),
            value: repeat_heads(value, times),
            mask,
            scale,
        }
    }

    fn is_on_cpu(&self) -> bool {
        self.query.device() == Device::Cpu
    }

    /// True if libtorch's fused kernel computes the block.
    fn is_fused(&self) -> bool {
        self.is_on_cpu() && !self.has_window()
    }

    /// True if a window hides keys from some queries.
    fn has_window(&self) -> bool {
        let length = self.key.size()[2];
        matches!(self.mask, ScoreMask::Causal(Some(window)) if window < length)
    }

    fn is_causal(&self) -> bool {
        matches!(self.mask, ScoreMask::Causal(_))
    }

    /// Returns the mask that libtorch's kernel adds to the scores.
    fn added_mask(&self) -> Option<&Tensor> {
        match self.mask {
            ScoreMask::Added(mask) => Some(mask),
            ScoreMask::None | ScoreMask::Causal(_) => None,
        }
    }

    /// Returns the width that libtorch's kernel on the CPU computes with, which it wants to be one.
    fn common_width(&self) -> i64 {
        width(&self.key).max(width(&self.value))
    }

    fn fused_forward(&self) -> (Tensor, Tensor) {
        let common = self.common_width();
        let (out, lse) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
            &widen(self.query, common),
            &widen(&self.key, common),
            &widen(&self.value, common),
            0.0,
            self.is_causal(),
            self.added_mask(),
            self.scale,
        );
        (narrow_width(out, width(&self.value)), lse)
    }

    fn fused_backward(&self, grad: &Tensor, out: &Tensor, lse: &Tensor) -> [Tensor; 3] {
        let common = self.common_width();
        let (query, key, value) =
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &widen(grad, common),
                &widen(self.query, common),
                &widen(&self.key, common),
                &widen(&self.value, common),
                &widen(out, common),
                lse,
                0.0,
                self.is_causal(),
                self.added_mask(),
                self.scale,
            );
        let key_width = width(&self.key);
        [
            narrow_width(query, key_width),
            narrow_width(key, key_width),
            narrow_width(value, width(&self.value)),
        ]
    }

    fn unfused_forward(&self) -> (Tensor, Tensor) {
        let mut outs = Vec::new();
        let mut lses = Vec::new();
        for tile in self.query_tiles() {
            let keys = self.keys_of(&tile);
            let scores = self.scores(&tile, &keys);
            let lse = scores.logsumexp(LAST_DIM, false);
            let value = self.operand(&narrow(&self.value, &keys));
            let weights = weights(scores, &lse).to_kind(value.kind());
            outs.push(weights.matmul(&value).to_kind(self.query.kind()));
            lses.push(lse);
        }
        (Tensor::cat(&outs, 2), Tensor::cat(&lses, 2))
    }

    fn unfused_backward(&self, grad: &Tensor, out: &Tensor, lse: &Tensor) -> [Tensor; 3] {
        let mut grad_query = Vec::new();
        let grad_key = self.key.to_kind(Kind::Float).zeros_like();
        let grad_value = self.value.to_kind(Kind::Float).zeros_like();
        let product = grad.to_kind(Kind::Float) * out.to_kind(Kind::Float);
        let delta = product.sum_dim_intlist(LAST_DIM, true, Kind::Float);
        for tile in self.query_tiles() {
            let keys = self.keys_of(&tile);
            let [lse, delta] = [lse, &delta].map(|x| narrow(x, &tile));
            let [query, grad] = [self.query, grad].map(|x| self.operand(&narrow(x, &tile)));
            let [key, value] = [&self.key, &self.value].map(|x| self.operand(&narrow(x, &keys)));
            let weights = weights(self.scores(&tile, &keys), &lse);
            let of_values = weights.transpose(2, 3).matmul(&grad.to_kind(Kind::Float));
            add(&narrow(&grad_value, &keys), &of_values);
            let mut slopes = grad.matmul(&value.transpose(2, 3)).to_kind(Kind::Float);
            slopes -= delta;
            slopes *= weights;
            slopes *= self.scale;
            let grad_scores = slopes.to_kind(query.kind());
            grad_query.push(grad_scores.matmul(&key));
            let of_keys = grad_scores.transpose(2, 3).matmul(&query);
            add(&narrow(&grad_key, &keys), &of_keys);
        }
        [Tensor::cat(&grad_query, 2), grad_key, grad_value]
    }

    /// Returns the scaled and masked scores `[B, H, tile, keys]` of some queries and keys in fp32.
    fn scores(&self, tile: &Range<i64>, keys: &Range<i64>) -> Tensor {
        let query = self.operand(&narrow(self.query, tile));
        let key = self.operand(&narrow(&self.key, keys));
        let mut scores = query.matmul(&key.transpose(2, 3)).to_kind(Kind::Float);
        scores *= self.scale;
        match self.mask {
            ScoreMask::None => scores,
            ScoreMask::Causal(window) => {
                let shape = [query.size()[2], key.size()[2]];
                let diagonal = tile.start - keys.start;
                let visible = Tensor::ones(shape, (Kind::Bool, query.device())).tril(diagonal);
                let visible = match window {
                    Some(window) => visible.triu(diagonal + 1 - window),
                    None => visible,
                };
                scores.masked_fill_(&visible.logical_not(), -1e9)
            }
            ScoreMask::Added(mask) => scores + narrow(mask, tile).to_kind(Kind::Float),
        }
    }

    /// Returns an operand of unfused products, which the CPU computes in fp32.
    fn operand(&self, x: &Tensor) -> Tensor {
        if self.is_on_cpu() {
            x.to_kind(Kind::Float)
        } else {
            x.shallow_clone()
        }
    }

    /// Returns the keys that some query of a tile sees.
    fn keys_of(&self, tile: &Range<i64>) -> Range<i64> {
        match self.mask {
            ScoreMask::Causal(window) => {
                let first = window.map_or(0, |window| tile.start + 1 - window);
                first.max(0)..tile.end
            }
            ScoreMask::None | ScoreMask::Added(_) => 0..self.key.size()[2],
        }
    }

    fn query_tiles(&self) -> impl Iterator<Item = Range<i64>> + use<> {
        let queries = self.query.size()[2];
        let tile = move |start: i64| start..(start + QUERY_TILE).min(queries);
        (0..queries).step_by(QUERY_TILE as usize).map(tile)
    }
}

/// Returns the positions `part` of `x` `[B, heads, positions, ...]`.
fn narrow(x: &Tensor, part: &Range<i64>) -> Tensor {
    x.narrow(2, part.start, part.end - part.start)
}

/// Returns the weights of keys, in place of their fp32 scores and given the log-sum-exps of these.
fn weights(mut scores: Tensor, lse: &Tensor) -> Tensor {
    scores -= lse.unsqueeze(-1);
    scores.exp_()
}

fn add(to: &Tensor, addend: &Tensor) {
    let _ = to.shallow_clone().g_add_(addend);
}

fn width(x: &Tensor) -> i64 {
    x.size()[3]
}

/// Appends zeros to rows up to a width of `common`: neither scores nor outputs change.
fn widen(x: &Tensor, common: i64) -> Tensor {
    match common - width(x) {
        0 => x.shallow_clone(),
        missing => x.constant_pad_nd([0, missing]),
    }
}

/// Returns the first `own` elements of each row, without the memory of the others.
fn narrow_width(x: Tensor, own: i64) -> Tensor {
    if width(&x) == own {
        x
    } else {
        x.narrow(3, 0, own).contiguous()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{added_mask, causal_part};
    use tch::kind::FLOAT_CPU;

    #[test]
    fn the_fused_and_the_unfused_path_agree() {
        let random = |heads: i64, width: i64| Tensor::randn([2, heads, 600, width], FLOAT_CPU);
        let all = Tensor::ones([1, 1, 600, 600], (Kind::Bool, Device::Cpu));
        let added = added_mask(&causal_part(&all, Some(70)), Kind::Float);
        // The fused kernel has no windows, so it gets a mask.
        let masks = [
            (ScoreMask::None, ScoreMask::None),
            (ScoreMask::Causal(None), ScoreMask::Causal(None)),
            (ScoreMask::Added(&added), ScoreMask::Causal(Some(70))),
            (ScoreMask::Causal(Some(600)), ScoreMask::Causal(Some(600))),
            (ScoreMask::Added(&added), ScoreMask::Added(&added)),
        ];
        for (fused_mask, mask) in masks {
            for [key_width, value_width] in [[8, 8], [12, 8], [8, 20]] {
                let [query, key] = [(); 2].map(|()| random(3, key_width));
                let [value, grad] = [(); 2].map(|()| random(3, value_width));
                let inputs = [&query, &key, &value];
                let fused = Block::new(inputs, fused_mask, 0.4);
                assert!(fused.is_fused());
                let (out, lse) = fused.fused_forward();
                let unfused = Block::new(inputs, mask, 0.4);
                let (plain_out, plain_lse) = unfused.unfused_forward();
                assert!(out.allclose(&plain_out, 1e-3, 1e-4, false));
                assert!(lse.allclose(&plain_lse, 1e-4, 1e-5, false));
                let fused = fused.fused_backward(&grad, &out, &lse);
                let unfused = unfused.unfused_backward(&grad, &out, &lse);
                for (fused, unfused) in fused.iter().zip(&unfused) {
                    assert!(fused.allclose(unfused, 1e-3, 1e-4, false), "{mask:?}");
                }
            }
        }
    }

    #[test]
    fn a_tile_needs_the_keys_in_its_reach_alone() {
        let x = Tensor::zeros([1, 1, 1500, 24], FLOAT_CPU);
        let block = |mask| Block::new([&x, &x, &x], mask, 1.0);
        let keys = |mask| {
            let block = block(mask);
            let tiles = block.query_tiles().map(|tile| block.keys_of(&tile));
            tiles.collect::<Vec<_>>()
        };
        assert_eq!(
            keys(ScoreMask::Causal(Some(100))),
            [0..512, 413..1024, 925..1500]
        );
        assert_eq!(keys(ScoreMask::Causal(None)), [0..512, 0..1024, 0..1500]);
        // A window that hides keys is not left to the fused kernel, which would need a mask of all
        // queries and keys.
        assert!(!block(ScoreMask::Causal(Some(1499))).is_fused());
        assert!(block(ScoreMask::Causal(Some(1500))).is_fused());
    }
}
