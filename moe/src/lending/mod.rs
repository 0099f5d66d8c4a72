//! Expert lending: an owner sends an expert's weights to helpers, which compute part of its tokens.
//!
//! [`assignment`] says which rank computes which share of an expert's tokens, [`least_loaded`] plans it,
//! and [`calibrate`] measures what a transfer costs. `transfer` moves the weights and their gradients.

pub mod assignment;
pub mod calibrate;
pub mod least_loaded;
pub(crate) mod transfer;
pub(crate) mod weights;
