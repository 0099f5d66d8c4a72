//! Document boundaries, across which tokens do not attend.

use parking_lot::Mutex;
use tch::{Kind, Tensor};

/// The document of each position of a microbatch.
pub(crate) struct Documents {
    /// `[B, S]` int64.
    document_ids: Mutex<Tensor>,
    /// `[B, 1, S, S]`: true if a query attends to a key. Made on first use, because only ranks
    /// with whole sequences need it.
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

    /// Returns the causal mask within documents, `[B, 1, S, S]`.
    pub(crate) fn mask(&self) -> Tensor {
        let mut mask = self.mask.lock();
        let make = || {
            let document_ids = self.document_ids();
            let queries = document_ids.unsqueeze(2);
            let keys = document_ids.unsqueeze(1);
            queries.eq_tensor(&keys).tril(0).unsqueeze(1)
        };
        mask.get_or_insert_with(make).shallow_clone()
    }
}
