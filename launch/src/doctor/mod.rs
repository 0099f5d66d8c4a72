//! `moerun doctor`: what could keep a run from working here, before it does, and what to do about it.

mod machine;
mod ranks;

use crate::cli::DoctorArgs;
use crate::config_file;
use crate::environment::{self, DetectedRank};
use crate::local_ranks::run_on_ranks;
use anyhow::Result;
use parallel::MpiLaunch;
use std::process::ExitCode;
use trainer::config::Config;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    what: &'static str,
    /// Measured value.
    detail: String,
    verdict: Severity,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Severity {
    Ok,
    /// A run works, but not as well: what to do.
    Warn(String),
    /// A run does not work: what to do.
    Fail(String),
}

impl Finding {
    fn ok(what: &'static str, detail: impl Into<String>) -> Finding {
        Finding {
            what,
            detail: detail.into(),
            verdict: Severity::Ok,
        }
    }

    fn warn(what: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding {
            what,
            detail: detail.into(),
            verdict: Severity::Warn(fix.into()),
        }
    }

    fn fail(what: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding {
            what,
            detail: detail.into(),
            verdict: Severity::Fail(fix.into()),
        }
    }

    fn print(&self) {
        let (mark, fix) = match &self.verdict {
            Severity::Ok => ("ok   ", None),
            Severity::Warn(fix) => ("warn ", Some(fix)),
            Severity::Fail(fix) => ("fail", Some(fix)),
        };
        println!("{mark} {}: {}", self.what, self.detail);
        fix.into_iter().for_each(|fix| println!("      fix: {fix}"));
    }

    fn failed(&self) -> bool {
        matches!(self.verdict, Severity::Fail(_))
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let config = args.config.as_ref().map(|path| {
        config_file::load(&crate::cli::ConfigArgs {
            config: path.clone(),
            set: args.set.clone(),
        })
    });
    let config = config.transpose()?;
    let started = environment::detect_rank()?;
    // Ranks that this command itself started leave the machine to it.
    let checks_machine = match &started {
        None => true,
        Some(DetectedRank { env, .. }) => env.local_rank == 0 && !environment::launched_by_moerun(),
    };
    let local = started
        .as_ref()
        .map_or(args.nproc_per_node, |started| started.env.local_world_size);
    let total = started
        .as_ref()
        .map_or(args.nproc_per_node, |started| started.env.world_size);
    let mpi_launch = started
        .as_ref()
        .is_some_and(|started| started.env.mpi_launch == MpiLaunch::Yes);
    let mut problems = 0;
    if checks_machine {
        for finding in check_machine(args, config.as_ref(), (local, total), mpi_launch) {
            finding.print();
            problems += usize::from(finding.failed());
        }
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
            Finding::fail(
                "ranks",
                format!("{error:#}"),
                "see the message of the rank above",
            )
            .print();
            problems += 1;
        }
    }
    if problems > 0 {
        println!(
            "{problems} fault{} to fix",
            if problems == 1 { "" } else { "s" }
        );
        return Ok(ExitCode::FAILURE);
    }
    println!("no problems found");
    Ok(ExitCode::SUCCESS)
}

fn check_machine(
    args: &DoctorArgs,
    config: Option<&Config>,
    (local, total): (usize, usize),
    mpi_launch: bool,
) -> Vec<Finding> {
    let mut findings = vec![
        machine::libtorch(),
        machine::processors(local),
        machine::memory(config, local, total),
        machine::shared_memory(local),
        machine::open_files(local),
    ];
    findings.extend(machine::port(args.master_port));
    findings.push(machine::gpus(config));
    findings.extend(machine::npus(config));
    findings.push(machine::mpi(config, mpi_launch));
    findings.extend(config.map(machine::disk));
    findings
}
