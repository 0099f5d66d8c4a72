//! Core attention whose output is kept for backward or computed again.

use crate::model::{core_attention::CoreAttention, documents::Documents};
use parallel::recompute::recomputed;
use std::sync::Arc;
use tch::Tensor;
use torch_ext::Error;

/// Core attention, and whether its output is kept for backward.
pub(super) struct SavedAttention {
    pub(super) core: CoreAttention,
    /// True if the output is kept.
    pub(super) keeps_output: bool,
}

impl SavedAttention {
    /// Maps a query `[B, H, s, dk]`, a key `[B, G, s, dk]` and a value `[B, G, s, dv]` to
    /// `[B, H, s, dv]`.
    ///
    /// # Collective
    /// All ranks of the context group.
    pub(super) fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        documents: Option<&Arc<Documents>>,
    ) -> Result<Tensor, Error> {
        if self.keeps_output {
            let documents = documents.map(Arc::as_ref);
            return self.core.attend(query, key, value, documents);
        }
        let core = self.core.clone();
        let documents = documents.cloned();
        let attend = move |x: &[Tensor]| {
            let documents = documents.as_ref().map(Arc::as_ref);
            let out = core.attend(&x[0], &x[1], &x[2], documents)?;
            Ok(vec![out])
        };
        Ok(recomputed(&[query, key, value], attend)?.remove(0))
    }
}
