//! The largest scores of attention, which fused kernels do not return.
// Shapes: B batch, H query heads, G key heads, Q queries, K keys, dk width of both.

use super::{block::ScoreMask, heads::repeat_heads};
use crate::profile::{Cost, span};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Most elements of a tile over all sequences and heads. They bound the memory.
const TILE_ELEMENTS: i64 = 1 << 24;
/// Least side of a tile.
const MIN_SIDE: i64 = 64;

/// Raises `largest` `[H]` fp32 to the largest scaled score of each query head, over all pairs of a
/// query and a key that it sees.
///
/// Queries are `[B, H, Q, dk]` and keys `[B, G, K, dk]`. Each key head serves `H / G` consecutive
/// query heads. `scale` is positive. Products are rounded to the dtype of the inputs. Tiles of 2^24
/// scores bound the memory, and those without a visible pair are skipped: the cost is one of the
/// two GEMMs of attention.
pub fn raise_to_largest_scores(
    largest: &Tensor,
    query: &Tensor,
    key: &Tensor,
    mask: ScoreMask,
    scale: f64,
) {
    let size = query.size();
    let rows = size[0] * size[1];
    let side = ((TILE_ELEMENTS / rows.max(1)) as f64).sqrt() as i64;
    let tiles = tiles(size[2], key.size()[2], side.max(MIN_SIDE), mask);
    let cost = || {
        let pairs: i64 = tiles.iter().map(Tile::pairs).sum();
        Cost {
            flops: 2.0 * (rows * size[3]) as f64 * pairs as f64,
            ..Cost::passes(1.0, query).plus(Cost::passes(1.0, key))
        }
    };
    span("attention", "largest scores", cost, || {
        let key = repeat_heads(key, size[1] / key.size()[1]);
        for tile in &tiles {
            let found = tile.largest_product(query, &key, mask) * scale;
            let raised = largest.maximum(&found);
            largest.shallow_clone().copy_(&raised);
        }
    });
}

/// Queries and keys, some of which see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tile {
    queries: Range<i64>,
    keys: Range<i64>,
    /// True if a query may not see a key.
    is_masked: bool,
}

/// Divides all pairs into tiles, and leaves out those that causal masks hide.
fn tiles(queries: i64, keys: i64, side: i64, mask: ScoreMask) -> Vec<Tile> {
    let parts = |len: i64| {
        let part = move |start: i64| start..(start + side).min(len);
        (0..len).step_by(side as usize).map(part)
    };
    let tile = |queries: Range<i64>, keys: Range<i64>| {
        // Distances of a query from the keys before it.
        let farthest = queries.end - 1 - keys.start;
        let nearest = queries.start - (keys.end - 1);
        let is_masked = match mask {
            ScoreMask::None => false,
            ScoreMask::Added(_) => true,
            ScoreMask::Causal(window) => {
                let window = window.unwrap_or(i64::MAX);
                if farthest < 0 || nearest >= window {
                    return None;
                }
                nearest < 0 || farthest >= window
            }
        };
        Some(Tile {
            queries,
            keys,
            is_masked,
        })
    };
    parts(queries)
        .flat_map(|queries| parts(keys).filter_map(move |keys| tile(queries.clone(), keys)))
        .collect()
}

impl Tile {
    fn pairs(&self) -> i64 {
        (self.queries.end - self.queries.start) * (self.keys.end - self.keys.start)
    }

    /// Returns the largest product of each head `[H]` in fp32, negative infinity without a visible
    /// pair. Keys have a head per query head.
    fn largest_product(&self, query: &Tensor, key: &Tensor, mask: ScoreMask) -> Tensor {
        let query = narrow(query, 2, &self.queries);
        let key = narrow(key, 2, &self.keys);
        let mut products = query.matmul(&key.transpose(2, 3));
        if let Some(hidden) = self.hidden(mask, &products) {
            let _ = products.masked_fill_(&hidden, f64::NEG_INFINITY);
        }
        let all_but_heads = [0i64, 2, 3];
        products
            .amax(all_but_heads.as_slice(), false)
            .to_kind(Kind::Float)
    }

    /// Returns the pairs of a query and a key that it does not see, in a shape that expands to that
    /// of `products`.
    fn hidden(&self, mask: ScoreMask, products: &Tensor) -> Option<Tensor> {
        match mask {
            ScoreMask::Added(mask) => {
                let mask = narrow(&narrow(mask, 2, &self.queries), 3, &self.keys);
                Some(mask.ne(0.0))
            }
            ScoreMask::Causal(window) if self.is_masked => {
                let shape = &products.size()[2..];
                let diagonal = self.queries.start - self.keys.start;
                let all = Tensor::ones(shape, (Kind::Bool, products.device()));
                let earlier = all.tril(diagonal);
                let visible = match window {
                    Some(window) => earlier.triu(diagonal + 1 - window),
                    None => earlier,
                };
                Some(visible.logical_not())
            }
            ScoreMask::Causal(_) | ScoreMask::None => None,
        }
    }
}

fn narrow(x: &Tensor, dim: i64, part: &Range<i64>) -> Tensor {
    x.narrow(dim, part.start, part.end - part.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{added_mask, causal_part};
    use proptest::prelude::*;
    use tch::{Device, kind::FLOAT_CPU};

    /// Computes all scores of all pairs.
    fn dense(query: &Tensor, key: &Tensor, visible: &Tensor, scale: f64) -> Tensor {
        let key = repeat_heads(key, query.size()[1] / key.size()[1]);
        let scores = query.matmul(&key.transpose(2, 3)) * scale;
        let seen = scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
        seen.amax([0i64, 2, 3].as_slice(), false)
    }

    fn random(heads: i64, length: i64) -> Tensor {
        Tensor::randn([2, heads, length, 8], FLOAT_CPU)
    }

    fn all_pairs(queries: i64, keys: i64) -> Tensor {
        Tensor::ones([1, 1, queries, keys], (Kind::Bool, Device::Cpu))
    }

    fn largest(query: &Tensor, key: &Tensor, mask: ScoreMask) -> Tensor {
        let heads = query.size()[1];
        let largest = Tensor::full([heads], f64::NEG_INFINITY, FLOAT_CPU);
        raise_to_largest_scores(&largest, query, key, mask, 0.4);
        largest
    }

    #[test]
    fn scores_are_those_of_a_dense_computation_with_every_mask() {
        // More than one tile: 2 x 64 heads give tiles of 362 positions.
        let length = 400;
        for kv_heads in [64, 16] {
            let query = random(64, length);
            let key = random(kv_heads, length);
            for window in [None, Some(1), Some(20), Some(375), Some(400)] {
                let visible = causal_part(&all_pairs(length, length), window);
                let expected = dense(&query, &key, &visible, 0.4);
                let causal = largest(&query, &key, ScoreMask::Causal(window));
                assert!(causal.allclose(&expected, 1e-5, 1e-6, false), "{window:?}");
                let mask = added_mask(&visible, Kind::Float);
                let added = largest(&query, &key, ScoreMask::Added(&mask));
                assert!(added.allclose(&expected, 1e-5, 1e-6, false), "{window:?}");
            }
            let some_queries = query.narrow(2, 0, 30);
            let expected = dense(&some_queries, &key, &all_pairs(30, length), 0.4);
            let all = largest(&some_queries, &key, ScoreMask::None);
            assert!(all.allclose(&expected, 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn larger_numbers_stay_and_hidden_keys_count_nowhere() {
        let query = random(2, 5);
        let key = random(1, 5);
        let known = Tensor::from_slice(&[1e3f32, -1e3]);
        raise_to_largest_scores(&known, &query, &key, ScoreMask::None, 0.4);
        let expected = dense(&query, &key, &all_pairs(5, 5), 0.4);
        assert_eq!(known.double_value(&[0]), 1e3);
        assert!((known.double_value(&[1]) - expected.double_value(&[1])).abs() < 1e-6);
        // Scores beyond the number that hides keys elsewhere.
        let none = added_mask(&all_pairs(5, 5).logical_not(), Kind::Float);
        let hidden = largest(&(query * 1e6), &key, ScoreMask::Added(&none));
        assert!(
            Vec::<f64>::try_from(hidden)
                .unwrap()
                .iter()
                .all(|x| *x == f64::NEG_INFINITY)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn tiles_have_every_visible_pair_once(
            length in 1i64..40,
            side in 1i64..12,
            window in prop_oneof![Just(None), (1i64..50).prop_map(Some)],
        ) {
            let sees = |query: i64, key: i64| {
                query >= key && window.is_none_or(|window| query - key < window)
            };
            let mut pairs = Vec::new();
            for tile in tiles(length, length, side, ScoreMask::Causal(window)) {
                let of_tile: Vec<_> = tile
                    .queries
                    .clone()
                    .flat_map(|query| tile.keys.clone().map(move |key| (query, key)))
                    .collect();
                let seen = of_tile.iter().filter(|(query, key)| sees(*query, *key)).count();
                prop_assert!(seen > 0);
                prop_assert_eq!(tile.is_masked, seen < of_tile.len());
                pairs.extend(of_tile.into_iter().filter(|(query, key)| sees(*query, *key)));
            }
            pairs.sort_unstable();
            let all = (0..length).flat_map(|query| (0..length).map(move |key| (query, key)));
            let expected: Vec<_> = all.filter(|(query, key)| sees(*query, *key)).collect();
            prop_assert_eq!(pairs, expected);
        }
    }
}
