//! Plays situations against the engine in a simulated cluster.

mod random;
mod situations;
mod world;
