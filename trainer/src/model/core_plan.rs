//! Memory of core attention: masks that layers share, and tiles of scores.

use super::activations::{BlockShape, FP32_BYTES, SequenceShape};
use kernels::{HEAD_MULTIPLE, QUERY_TILE};

/// Number of fp32 tiles of scores that exist at once in backward: the weights, their gradients, and
/// both in the model's dtype.
const SCORE_TILES: u64 = 3;

/// Sizes of core attention in one layer, on all ranks together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CorePlan {
    /// Number of query heads.
    pub(crate) heads: usize,
    /// Width of queries and keys.
    pub(crate) key_width: usize,
    pub(crate) value_width: usize,
    /// Number of tokens that a token sees; `None` if it sees all earlier ones.
    pub(crate) window: Option<usize>,
    /// True if the softmax has attention sinks.
    pub(crate) sinks: bool,
}

/// A mask of scores. Layers with equal masks share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SharedMask {
    /// Documents of a microbatch, in a window if there is one. It lives as long as the microbatch.
    Documents(Option<usize>),
    /// A window alone. A device keeps it as long as the model.
    Window(usize),
}

impl SharedMask {
    /// Returns the number of elements, which have the model's dtype.
    pub(crate) fn elements(self, sequences: &SequenceShape) -> u128 {
        let scores = (sequences.length as u128).pow(2);
        match self {
            SharedMask::Documents(_) => sequences.count as u128 * scores,
            SharedMask::Window(_) => scores,
        }
    }
}

impl CorePlan {
    /// Returns the mask that attention over these sequences needs. Ring attention makes masks of
    /// its own blocks when it needs them, and tiles of scores need none for a window.
    pub(crate) fn mask(&self, sequences: &SequenceShape, on_host: bool) -> Option<SharedMask> {
        if sequences.in_ring {
            return None;
        }
        let window = self.window.filter(|&window| window < sequences.length);
        if sequences.has_documents {
            return Some(SharedMask::Documents(window));
        }
        let is_masked = !on_host && !self.sinks;
        window.filter(|_| is_masked).map(SharedMask::Window)
    }

    /// Returns the bytes of the tiles of scores that exist at once, zero if a fused kernel computes
    /// attention. The estimates for devices other than CPUs are not yet run on hardware.
    pub(crate) fn tile_bytes(&self, at: &BlockShape) -> u64 {
        let SequenceShape {
            count,
            length,
            has_documents,
            in_ring,
        } = at.sequences;
        // With documents, every tile has a part of a mask over all keys.
        let window = self.window.filter(|&window| window < length);
        let window = window.filter(|_| !has_documents);
        let is_tiled = if at.on_host {
            window.is_some() && !self.fits_host_loops()
        } else {
            in_ring || self.sinks
        };
        if !is_tiled {
            return 0;
        }
        // A ring splits positions; Ulysses splits heads.
        let splits = at.mesh.context;
        let keys = if in_ring { length / splits } else { length };
        let heads = self.heads / at.mesh.tensor;
        let heads = if in_ring { heads } else { heads / splits };
        let queries = keys.min(QUERY_TILE as usize);
        let seen = window.map_or(keys, |window| keys.min(queries + window - 1));
        (count * heads * queries * seen) as u64 * FP32_BYTES * SCORE_TILES
    }

    /// True if the loops in host memory that skip keys outside of a window take these widths.
    fn fits_host_loops(&self) -> bool {
        let widths = [self.key_width, self.value_width];
        widths.into_iter().all(|w| w.is_multiple_of(HEAD_MULTIPLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::layout::RecomputeConfig;
    use parallel::MeshShape;

    const PLAN: CorePlan = CorePlan {
        heads: 8,
        key_width: 32,
        value_width: 32,
        window: None,
        sinks: false,
    };

    const SEQUENCES: SequenceShape = SequenceShape {
        count: 2,
        length: 2048,
        has_documents: false,
        in_ring: false,
    };

    #[test]
    fn masks_follow_the_path_that_attention_takes() {
        let window = |window, sinks| CorePlan {
            window: Some(window),
            sinks,
            ..PLAN
        };
        let documents = SequenceShape {
            has_documents: true,
            ..SEQUENCES
        };
        let ring = SequenceShape {
            in_ring: true,
            ..documents
        };
        for (plan, sequences, on_host, mask) in [
            (PLAN, SEQUENCES, false, None),
            (window(64, false), SEQUENCES, true, None),
            (
                window(64, false),
                SEQUENCES,
                false,
                Some(SharedMask::Window(64)),
            ),
            (window(64, true), SEQUENCES, false, None),
            (window(2048, false), SEQUENCES, false, None),
            (PLAN, documents, true, Some(SharedMask::Documents(None))),
            (
                window(64, true),
                documents,
                false,
                Some(SharedMask::Documents(Some(64))),
            ),
            (window(64, false), ring, false, None),
        ] {
            assert_eq!(
                plan.mask(&sequences, on_host),
                mask,
                "{plan:?} {sequences:?}"
            );
        }
        assert_eq!(SharedMask::Window(64).elements(&SEQUENCES), 1 << 22);
        assert_eq!(SharedMask::Documents(None).elements(&SEQUENCES), 2 << 22);
    }

    #[test]
    fn tiles_have_the_keys_that_their_queries_see() {
        let bytes = |plan: CorePlan, on_host, context, in_ring| {
            plan.tile_bytes(&BlockShape {
                mesh: MeshShape {
                    data: 1,
                    tensor: 2,
                    pipeline: 1,
                    context,
                    expert: 1,
                    expert_tensor: 1,
                },
                tokens: 4096,
                own_tokens: 4096,
                element: 4,
                recompute: &RecomputeConfig::default(),
                on_host,
                sequences: SequenceShape {
                    in_ring,
                    ..SEQUENCES
                },
            })
        };
        let tiles = |heads: u64, queries: u64, keys: u64| 2 * heads * queries * keys * 4 * 3;
        let sinks = CorePlan {
            sinks: true,
            ..PLAN
        };
        let window = CorePlan {
            window: Some(100),
            ..PLAN
        };
        let narrow = CorePlan {
            value_width: 24,
            ..window
        };
        let both = CorePlan {
            window: Some(100),
            ..sinks
        };
        // Fused kernels keep no scores.
        for (plan, on_host) in [
            (PLAN, false),
            (window, false),
            (sinks, true),
            (window, true),
        ] {
            assert_eq!(bytes(plan, on_host, 1, false), 0, "{plan:?}");
        }
        assert_eq!(bytes(sinks, false, 1, false), tiles(4, 512, 2048));
        assert_eq!(bytes(both, false, 1, false), tiles(4, 512, 611));
        assert_eq!(bytes(narrow, true, 1, false), tiles(4, 512, 611));
        assert_eq!(bytes(sinks, false, 4, false), tiles(1, 512, 2048));
        assert_eq!(bytes(PLAN, false, 8, true), tiles(4, 256, 256));
    }
}
