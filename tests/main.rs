//! Whole-system tests with real processes and real faults.
//!
//! One test binary builds faster than one per file, and runs tests of several files at once.

mod agent_ports;
mod agreement;
mod ascend;
mod balance;
mod benches;
mod cli;
mod configs;
mod damaged_checkpoints;
mod data_sources;
mod defaults;
mod device_variables;
mod doctor;
mod documents;
mod drawn_layouts;
mod faults;
mod fixture;
mod forks;
mod gpu_check;
mod keeper_ports;
mod kills;
mod large_states;
mod launchers;
mod layouts;
mod loss_masks;
mod machine_faults;
mod machines;
mod many_ranks;
mod model_folders;
mod optimizers;
mod outages;
mod plans;
mod ports;
mod previous_version;
mod resume_changes;
mod run_folders;
mod runs;
mod schedules;
mod stops;
mod strict_numbers;
mod supply_chain;
mod wrong_inputs;
