//! Plays situations against the engine in a simulated cluster.

mod random;
mod repairs;
mod situations;
mod takeover;
mod world;
