//! Measurements for `moerun bench`, without a run around them.

pub(crate) mod copy_timer;
pub(crate) mod import;
pub(crate) mod reference;
