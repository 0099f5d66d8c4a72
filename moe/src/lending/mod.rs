//! Expert lending: an owner sends an expert's weights to helpers, which compute part of its tokens.
//!
//! [`least_loaded`] plans which owner computes which share of an expert's tokens: an
//! [`assignment`]. [`calibrate`] measures what a transfer costs. `transfer` moves weights and
//! gradients, and `weights` holds them on the helper.

pub mod assignment;
pub mod calibrate;
pub mod least_loaded;
mod load_tree;
mod published;
pub(crate) mod transfer;
pub(crate) mod weights;
