//! `moerun inspect`: what a run did.

mod heat;
pub(crate) mod routing;
