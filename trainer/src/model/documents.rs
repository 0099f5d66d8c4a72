//! Documents that share a sequence: the boundaries across which tokens do not attend, and positions
//! that begin at 0 in each document.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use tch::{Device, Kind, TchError, Tensor};

/// The document of each position of a microbatch.
pub(crate) struct Documents {
    /// `[B, S]` int64.
    document_ids: Mutex<Tensor>,
    /// Masks `[B, 1, S, S]` by their window. Made on first use, because only ranks with whole
    /// sequences need them.
    masks: Mutex<BTreeMap<Option<i64>, Tensor>>,
}

impl Documents {
    /// Finds the documents of `tokens_bs` `[B, S]`, in which the token `end` ends a document.
    pub(crate) fn new(tokens_bs: &Tensor, end: u32) -> Documents {
        let ends = tokens_bs.eq(i64::from(end)).to_kind(Kind::Int64);
        // The token that ends a document is its last.
        let document_ids = ends.cumsum(1, Kind::Int64) - ends;
        Documents {
            document_ids: Mutex::new(document_ids),
            masks: Mutex::default(),
        }
    }

    /// Returns `[B, S]` int64.
    pub(crate) fn document_ids(&self) -> Tensor {
        self.document_ids.lock().shallow_clone()
    }

    /// Returns the causal mask within documents for queries of dtype `kind`, `[B, 1, S, S]`.
    ///
    /// With a `window` a query sees its own position and those just before it, as many in all.
    pub(crate) fn mask(&self, kind: Kind, window: Option<i64>) -> Tensor {
        let mut masks = self.masks.lock();
        let make = || {
            let document_ids = self.document_ids();
            let queries = document_ids.unsqueeze(2);
            let keys = document_ids.unsqueeze(1);
            let same = queries.eq_tensor(&keys).unsqueeze(1);
            mask_for_device(&kernels::causal_part(&same, window), kind)
        };
        masks.entry(window).or_insert_with(make).shallow_clone()
    }
}

/// The position of each of this rank's tokens within its document.
pub(crate) struct DocumentPositions {
    /// `[B, s]` int64.
    positions: Mutex<Tensor>,
}

impl DocumentPositions {
    pub(crate) fn new(positions_bs: Tensor) -> DocumentPositions {
        DocumentPositions {
            positions: Mutex::new(positions_bs),
        }
    }

    /// Returns `[B, s]` int64.
    pub(crate) fn tensor(&self) -> Tensor {
        self.positions.lock().shallow_clone()
    }
}

/// Returns the position of each token of `tokens_bs` `[B, S]` int64 within its document, of that
/// shape and in host memory. The token `end` ends a document; every sequence begins one.
///
/// # Errors
/// If the tokens cannot be read.
pub(super) fn positions_in_documents(tokens_bs: &Tensor, end: u32) -> Result<Tensor, TchError> {
    let (batch, length) = tokens_bs.size2()?;
    let tokens = Vec::<i64>::try_from(tokens_bs.flatten(0, -1))?;
    let mut positions = Vec::with_capacity(tokens.len());
    for sequence in tokens.chunks(length.max(1) as usize) {
        let mut position = 0i64;
        for &token in sequence {
            positions.push(position);
            position = if token == i64::from(end) {
                0
            } else {
                position + 1
            };
        }
    }
    Ok(Tensor::from_slice(&positions).view([batch, length]))
}

/// Returns the mask that attention on the device of `is_visible` takes, for queries of dtype
/// `kind`.
///
/// It is added to scores. libtorch would make such a mask of a boolean one in each layer, and keep
/// all of them until backward. NPUs, whose attention takes boolean masks, get one.
pub(super) fn mask_for_device(is_visible: &Tensor, kind: Kind) -> Tensor {
    match is_visible.device() {
        Device::Cpu | Device::Cuda(_) => kernels::added_mask(is_visible, kind),
        _ => is_visible.shallow_clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn positions_count_the_tokens_since_the_end_of_a_document(
            batch in 1usize..4,
            length in 1usize..20,
            drawn in prop::collection::vec(0i64..4, 60),
        ) {
            let tokens = &drawn[..batch * length];
            let shape = [batch as i64, length as i64];
            let positions = positions_in_documents(&Tensor::from_slice(tokens).view(shape), 2);
            let positions = Vec::<i64>::try_from(positions.unwrap().flatten(0, -1)).unwrap();
            for (number, position) in positions.into_iter().enumerate() {
                let sequence = number / length * length;
                let before = tokens[sequence..number].iter().rev();
                let expected = before.take_while(|&&token| token != 2).count();
                prop_assert_eq!(position, expected as i64);
            }
        }
    }

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
            let mask = documents.mask(kind, None);
            assert_eq!(
                (mask.kind(), mask.size()),
                (kind, vec![2, 1, length, length])
            );
            let random = || Tensor::randn([2, 3, length, 16], (kind, Device::Cpu));
            let x = [(); 3].map(|()| random());
            assert_eq!(attend(&x, &mask), attend(&x, &boolean), "{kind:?}");
            // The same tensor serves every layer.
            assert_eq!(documents.mask(kind, None).data_ptr(), mask.data_ptr());
        }
    }
}
