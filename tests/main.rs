//! Whole-system tests: real processes, real faults. One program, which is built faster than one for each file, and in which the tests of
//! one file run while those of another wait.

mod agreement;
mod ascend;
mod balance;
mod configs;
mod doctor;
mod drawn_layouts;
mod faults;
mod fixture;
mod launchers;
mod layouts;
mod machines;
mod measuring;
mod plans;
mod runs;
mod wrong_inputs;
