//! The part of queries and keys that rotary position embedding works on.

/// The part of queries and keys of which rotary position embedding rotates all or some elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RotaryPart {
    pub(crate) width: usize,
    /// The configuration's key, or expression of keys, for the width.
    pub(crate) width_key: &'static str,
    /// True if the scale of the softmax includes the factor of YaRN's `mscale_all_dim`.
    pub(crate) scales_softmax: bool,
}
