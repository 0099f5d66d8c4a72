//! The memory that a keeper may take.

/// The memory that a keeper may take, and what was granted but is not in its slots yet.
#[derive(Debug)]
pub(super) struct Budget {
    pub(super) limit: Option<u64>,
    /// Granted, and not in a slot yet.
    pub(super) granted: u64,
    /// Granted, and not taken from the machine yet.
    pub(super) outstanding: u64,
}

impl Budget {
    pub(super) fn new(limit: Option<u64>) -> Budget {
        Budget {
            limit,
            granted: 0,
            outstanding: 0,
        }
    }
}
