//! Document boundaries, across which tokens do not attend.

use parking_lot::Mutex;
use tch::{Device, Kind, Tensor};

/// Score of a key of another document or of a later position. Its exponential is zero in every
/// dtype, and unlike infinity it has defined differences.
const MASKED_SCORE: f64 = -65504.0;

/// The document of each position of a microbatch.
pub(crate) struct Documents {
    /// `[B, S]` int64.
    document_ids: Mutex<Tensor>,
    /// `[B, 1, S, S]`. Made on first use, because only ranks with whole sequences need it.
    mask: Mutex<Option<Tensor>>,
}

impl Documents {
    /// Finds the documents of `tokens_bs` `[B, S]`, in which the token `end` ends a document.
    pub(crate) fn new(tokens_bs: &Tensor, end: u32) -> Documents {
        let ends = tokens_bs.eq(i64::from(end)).to_kind(Kind::Int64);
        // The token that ends a document is its last.
        let document_ids = ends.cumsum(1, Kind::Int64) - ends;
        Documents {
            document_ids: Mutex::new(document_ids),
            mask: Mutex::new(None),
        }
    }

    /// Returns `[B, S]` int64.
    pub(crate) fn document_ids(&self) -> Tensor {
        self.document_ids.lock().shallow_clone()
    }

    /// Returns the causal mask within documents for queries of dtype `kind`, `[B, 1, S, S]`.
    ///
    /// It is added to scores. libtorch would make such a mask of a boolean one in each layer, and
    /// keep all of them until backward. NPUs, whose attention takes boolean masks, get one.
    pub(crate) fn mask(&self, kind: Kind) -> Tensor {
        let mut mask = self.mask.lock();
        let make = || {
            let document_ids = self.document_ids();
            let queries = document_ids.unsqueeze(2);
            let keys = document_ids.unsqueeze(1);
            let is_visible = queries.eq_tensor(&keys).tril(0).unsqueeze(1);
            match is_visible.device() {
                Device::Cpu | Device::Cuda(_) => added_to_scores(&is_visible, kind),
                _ => is_visible,
            }
        };
        mask.get_or_insert_with(make).shallow_clone()
    }
}

/// Returns 0 where `is_visible` is true, and [`MASKED_SCORE`] elsewhere.
fn added_to_scores(is_visible: &Tensor, kind: Kind) -> Tensor {
    let scores = Tensor::zeros(is_visible.size(), (kind, is_visible.device()));
    scores.masked_fill(&is_visible.logical_not(), MASKED_SCORE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the output of attention with a mask, and the gradient of the query.
    fn attend(x: &[Tensor; 3], mask: &Tensor) -> [Tensor; 2] {
        let query = x[0].detach().set_requires_grad(true);
        let out = Tensor::scaled_dot_product_attention(
            &query,
            &x[1],
            &x[2],
            Some(mask),
            0.0,
            false,
            0.25,
            false,
        );
        out.square().sum(Kind::Float).backward();
        [out.detach(), query.grad()]
    }

    #[test]
    fn adding_the_mask_gives_the_bits_of_a_boolean_one() {
        // Longer than the blocks of keys in libtorch's kernel: whole blocks are masked.
        let length = 1100;
        let tokens = Tensor::randint(300, [2, length], (Kind::Int64, Device::Cpu));
        for kind in [Kind::Float, Kind::BFloat16] {
            let documents = Documents::new(&tokens, 7);
            let ids = documents.document_ids();
            let boolean = ids.unsqueeze(2).eq_tensor(&ids.unsqueeze(1));
            let boolean = boolean.tril(0).unsqueeze(1);
            let mask = documents.mask(kind);
            assert_eq!(
                (mask.kind(), mask.size()),
                (kind, vec![2, 1, length, length])
            );
            let random = || Tensor::randn([2, 3, length, 16], (kind, Device::Cpu));
            let x = [(); 3].map(|()| random());
            assert_eq!(attend(&x, &mask), attend(&x, &boolean), "{kind:?}");
            // The same tensor serves every layer.
            assert_eq!(documents.mask(kind).data_ptr(), mask.data_ptr());
        }
    }
}
