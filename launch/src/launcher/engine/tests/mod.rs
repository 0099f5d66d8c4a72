//! Plays situations against the engine in a simulated cluster.

mod random;
mod repairs;
mod scale;
mod situations;
mod takeover;
mod world;
