//! `moerun inspect`: pictures and statistics from the files of a run.

mod heat;
pub(crate) mod routing;
