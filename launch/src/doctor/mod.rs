//! `moerun doctor`: finds problems of a machine and of an experiment before a run, with fixes.

mod data;
mod finding;
mod machine;
mod ranks;

use crate::{
    cli::{ConfigArgs, DoctorArgs},
    config_file,
    environment::{self, DetectedRank},
    local_ranks::run_on_ranks,
};
use anyhow::Result;
use finding::Finding;
use machine::RankCounts;
use parallel::MpiLaunch;
use std::process::ExitCode;
use trainer::config::Config;

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let config = args.config.as_ref().map(|path| {
        config_file::load(&ConfigArgs {
            config: path.clone(),
            set: args.set.clone(),
        })
    });
    let config = config.transpose()?;
    let detected = environment::detect_rank()?;
    let mut problems = 0;
    if checks_machine(detected.as_ref()) {
        for finding in check_machine(args, config.as_ref(), detected.as_ref()) {
            finding.print();
            problems += usize::from(finding.failed());
        }
    }
    if detected.is_none() && !fits(args) {
        not_started(args).print();
        return Ok(conclude(problems));
    }
    let backend = config
        .as_ref()
        .map_or(parallel::Backend::Auto, |config| config.run.backend);
    let device = config.as_ref().map_or("cpu", |config| &config.run.device);
    let together = run_on_ranks(args.nproc_per_node, |env| {
        ranks::measure(env, backend, device)
    });
    match together {
        Ok(code) if code == ExitCode::SUCCESS => {}
        Ok(_) => problems += 1,
        Err(error) => {
            let fix = "see the message of the rank above";
            Finding::fail("ranks", format!("{error:#}"), fix).print();
            problems += 1;
        }
    }
    Ok(conclude(problems))
}

/// True if this machine has a processor for each rank.
fn fits(args: &DoctorArgs) -> bool {
    args.nproc_per_node <= machine::num_processors()
}

fn not_started(args: &DoctorArgs) -> Finding {
    let ranks = args.nproc_per_node;
    let processors = machine::num_processors();
    Finding::warn(
        "ranks",
        format!(
            "{ranks} ranks are more than this machine's {processors} processors: none was started, \
             and only this machine was examined"
        ),
        "give -n the ranks of one machine; to examine several, start doctor under mpirun, srun or \
         torchrun",
    )
}

fn conclude(problems: usize) -> ExitCode {
    match problems {
        0 => println!("no problems found"),
        1 => println!("1 problem found"),
        _ => println!("{problems} problems found"),
    }
    ExitCode::from(u8::from(problems > 0))
}

/// True if this process checks the machine: one per machine, and not a rank that it started itself.
fn checks_machine(detected: Option<&DetectedRank>) -> bool {
    match detected {
        None => true,
        Some(DetectedRank { env, .. }) => env.local_rank == 0 && !environment::launched_by_moerun(),
    }
}

fn check_machine(
    args: &DoctorArgs,
    config: Option<&Config>,
    detected: Option<&DetectedRank>,
) -> Vec<Finding> {
    let env = detected.map(|detected| &detected.env);
    let total = args.nproc_per_node;
    // More ranks than processors are those of several machines.
    let per_node = config.and_then(|config| config.parallel.ranks_per_node);
    let local = if fits(args) {
        total
    } else {
        per_node.unwrap_or(machine::num_processors()).min(total)
    };
    let ranks = RankCounts {
        local: env.map_or(local, |env| env.local_world_size),
        total: env.map_or(total, |env| env.world_size),
    };
    let mpi_launch = env.is_some_and(|env| env.mpi_launch == MpiLaunch::Yes);
    let mut findings = vec![
        machine::libtorch(),
        machine::processors(ranks.local),
        machine::memory(config, ranks),
        machine::shared_memory(config, ranks.local, mpi_launch),
        machine::open_files(config, ranks),
    ];
    findings.extend(machine::port(args.master_port));
    findings.push(machine::gpus(config));
    findings.extend(machine::npus(config));
    findings.push(machine::mpi(config, mpi_launch));
    findings.extend(config.map(machine::disk));
    findings.extend(config.map(data::files));
    if args.verify_data {
        findings.extend(config.map(data::checksums));
    }
    findings
}
