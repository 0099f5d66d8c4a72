//! Facts of a microbatch that all layers use.

use super::documents::Documents;
use std::sync::Arc;

/// Facts of a microbatch that all layers use.
#[derive(Clone)]
pub(crate) struct BatchContext {
    pub(crate) sequences: i64,
    /// Set if tokens attend only within their document.
    pub(crate) documents: Option<Arc<Documents>>,
}
