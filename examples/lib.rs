//! Small programs on moerun's library crates. Run one with
//! `cargo run -p examples --example NAME`:
//!
//! - `compare_schedules` simulates every pipeline schedule and compares time and memory;
//! - `lend_experts` plans which ranks compute an overloaded expert;
//! - `reshard_checkpoint` saves a matrix from two ranks and loads it for three.
