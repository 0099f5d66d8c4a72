//! Trained models, loaded whole on the CPU of this process.

pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod loaded;
pub(crate) mod routing;
pub(crate) mod score;
