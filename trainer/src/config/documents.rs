//! The treatment of documents that share a sequence.

/// The treatment of documents that share a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DocumentRules {
    /// Token that ends a document.
    pub end: u32,
    /// True if tokens attend only within their document.
    pub mask: bool,
    /// True if the positions of rotary embedding begin at 0 in each document.
    pub reset_positions: bool,
}
