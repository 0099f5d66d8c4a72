//! QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): after an update, the weights of queries and
//! keys shrink in heads whose attention logits exceeded a threshold.
//!
//! A head with the largest logit `s` above the threshold `t` has the factor `t / s`, all others 1.
//! In multi-head latent attention, whose heads share the rotating part of the key, this is the
//! paper's rule: the root of the factor for both other parts, the factor for the rotating query.
//! In grouped attention, query heads with factors of their own share a key. The key then gets the
//! root of the smallest of them, and each query what is left of its own factor.

use crate::model::score_rows::{BlockScoreRows, ScorePart};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// QK-clip (Kimi K2, arXiv 2507.20534, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QkClipConfig {
    /// Largest attention logit, after scaling, that leaves a head as it is.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub threshold: f64,
}

impl Default for QkClipConfig {
    fn default() -> QkClipConfig {
        QkClipConfig { threshold: 100.0 }
    }
}

/// Factors on rows of a block's parameters, by the name of the parameter within the block.
pub(crate) type RowFactors = BTreeMap<&'static str, Vec<f32>>;

impl QkClipConfig {
    /// True if a head with this largest logit is clipped.
    pub(crate) fn clips(&self, largest: f32) -> bool {
        f64::from(largest) > self.threshold
    }

    /// Returns the factor on the logits of a head with this largest one.
    fn factor(&self, largest: f32) -> f64 {
        if self.clips(largest) {
            self.threshold / f64::from(largest.min(f32::MAX))
        } else {
            1.0
        }
    }

    /// Plans the factors on all rows of a block, given the largest logit of each query head. Empty
    /// if no head is clipped.
    pub(crate) fn row_factors(&self, block: &BlockScoreRows, largest: &[f32]) -> RowFactors {
        let mut factors = RowFactors::new();
        if !largest.iter().any(|&largest| self.clips(largest)) {
            return factors;
        }
        let of_heads: Vec<f64> = largest
            .iter()
            .map(|&largest| self.factor(largest))
            .collect();
        let queries_per_key = block.heads / block.key_heads;
        let groups = of_heads.chunks_exact(queries_per_key);
        let of_keys: Vec<f64> = groups
            .map(|group| group.iter().copied().fold(1.0, f64::min).sqrt())
            .collect();
        let of_queries: Vec<f64> = (of_heads.iter().enumerate())
            .map(|(head, factor)| factor / of_keys[head / queries_per_key])
            .collect();
        for part in &block.parts {
            let by_head = match part.makes {
                ScorePart::Query => &of_queries,
                ScorePart::Key => &of_keys,
                ScorePart::QueryOfSharedKey => &of_heads,
            };
            let rows = by_head.len() * part.head_rows;
            let rows = factors.entry(part.part).or_insert_with(|| vec![1.0; rows]);
            for (of_head, factor) in rows.chunks_exact_mut(part.head_rows).zip(by_head) {
                of_head[part.rows.clone()].fill(*factor as f32);
            }
        }
        factors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::score_rows::ScoreRows;
    use proptest::prelude::*;

    /// A block with a value row after the key rows of each head, as latent attention has.
    fn block(heads: usize, key_heads: usize) -> BlockScoreRows {
        let rows = |part, head_rows, rows, makes| ScoreRows {
            part,
            head_rows,
            rows,
            makes,
        };
        BlockScoreRows {
            heads,
            key_heads,
            parts: vec![
                rows("query", 3, 0..1, ScorePart::QueryOfSharedKey),
                rows("query", 3, 1..3, ScorePart::Query),
                rows("key", 3, 0..2, ScorePart::Key),
            ],
        }
    }

    proptest! {
        #[test]
        fn each_head_gets_its_factor_and_other_rows_stay(
            key_heads in 1usize..4,
            queries_per_key in 1usize..4,
            largest in prop::collection::vec(prop_oneof![-5f32..0.5, 0.5f32..1e6], 9),
            threshold in 0.1f64..2.0,
        ) {
            let heads = key_heads * queries_per_key;
            let clip = QkClipConfig { threshold };
            let largest = &largest[..heads];
            let factors = clip.row_factors(&block(heads, key_heads), largest);
            prop_assert_eq!(factors.is_empty(), largest.iter().all(|&s| !clip.clips(s)));
            let parts = factors.get("query").zip(factors.get("key"));
            let Some([query, key]) = parts.map(<[_; 2]>::from) else {
                return Ok(());
            };
            prop_assert_eq!([query.len(), key.len()], [3 * heads, 3 * key_heads]);
            for (head, &largest) in largest.iter().enumerate() {
                let query = &query[3 * head..][..3];
                let key = &key[3 * (head / queries_per_key)..][..3];
                let expected = (threshold / f64::from(largest)) as f32;
                let expected = if clip.clips(largest) { expected } else { 1.0 };
                let is_expected = |factor: f32| (factor / expected - 1.0).abs() < 1e-5;
                // Both parts of the score get the same factor.
                prop_assert!(is_expected(query[0]));
                prop_assert!(is_expected(query[1] * key[0]) && is_expected(query[2] * key[1]));
                prop_assert!(key[0] <= 1.0 && key[2] == 1.0);
                if queries_per_key == 1 {
                    prop_assert!((query[1] - key[0]).abs() <= 1e-6 * key[0]);
                }
            }
        }
    }

    #[test]
    fn no_logit_gives_a_factor_that_is_not_finite() {
        let clip = QkClipConfig::default();
        let factors = clip.row_factors(&block(2, 1), &[f32::INFINITY, f32::NAN]);
        assert!(factors.values().flatten().all(|factor| factor.is_finite()));
        assert!(clip.row_factors(&block(1, 1), &[100.0]).is_empty());
    }
}
