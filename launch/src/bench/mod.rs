//! `moerun bench`: prints one JSON object per line on standard output, and nothing else there.

pub(crate) mod collectives;
mod figures;
mod floor;
pub(crate) mod import;
pub(crate) mod layouts;
pub(crate) mod memory;
pub(crate) mod moe_layer;
mod moe_line;
mod moe_step;
pub(crate) mod pipeline;
pub(crate) mod recompute;
mod runner;
pub(crate) mod scale;
pub(crate) mod snapshot;
pub(crate) mod step;
mod workload;
