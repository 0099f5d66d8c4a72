//! Metrics of a step: the figures that ranks exchange, the records made of them, and the files of
//! rank 0.

mod distribution;
pub(super) mod files;
pub(super) mod rank_figures;
pub(crate) mod records;
pub(super) mod report;
pub(super) mod step_figures;
pub(super) mod summed_figures;
