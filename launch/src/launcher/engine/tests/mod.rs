//! Plays situations against the engine in a simulated cluster.

mod random;
mod repairs;
mod situations;
mod world;
