//! The keeper's decisions: a state, and a function for each thing that can happen.
//!
//! Nothing here reads a clock, a file or a socket, or starts a thread: `cargo x tidy pure_files`
//! checks that. Time is an argument. A function changes the [`State`], returns what the caller has
//! to know, and leaves [`Effect`]s for the daemon to carry out: memory to free, events to send,
//! snapshots to encode.
//!
//! | event | function |
//! |---|---|
//! | request of the launcher, a tool or a keeper | [`State::decide`], which may return a [`Job`] |
//! | the job ended | [`State::finish_job`] |
//! | request of a rank | [`State::decide_for_rank`], which may return a [`RankJob`] |
//! | a rank came or went | [`State::connect_rank`], [`State::disconnect_rank`] |
//! | a thread waits for a part | [`State::poll_read`] |
//! | memory is wanted | [`State::grant`] |
//! | a signal | [`State::signal`] |
//! | time passed | [`State::tick`] |

mod allocation;
mod budget;
mod check;
mod ending;
mod generations;
mod lifetime;
mod parity;
mod parity_store;
mod rank_requests;
mod rank_table;
mod reads;
mod requests;
mod slots;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use allocation::Grant;
pub(crate) use lifetime::{End, Life, Lifetime};
pub(crate) use parity_store::StripeId;
pub(crate) use rank_requests::{RankDecision, RankJob};
pub(crate) use rank_table::RankSession;
pub(crate) use reads::{PartRead, ReadStep, ReadablePart, RestoreSource};
pub(crate) use requests::{Decision, Job};
pub(crate) use state::{Effect, Membership, State};
