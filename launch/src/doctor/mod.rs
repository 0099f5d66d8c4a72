//! `moerun doctor`: what could keep a run from working here, before it does, and what to do about it.

mod machine;
mod ranks;

use crate::cli::DoctorArgs;
use crate::config_file;
use crate::environment::{self, Started};
use crate::local_ranks::on_ranks;
use anyhow::Result;
use parallel::ByMpi;
use std::process::ExitCode;
use trainer::config::Config;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    what: &'static str,
    /// What was seen.
    seen: String,
    verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Fine,
    /// A run works, but not as well: what to do.
    Warning(String),
    /// A run does not work: what to do.
    Fault(String),
}

impl Finding {
    fn fine(what: &'static str, seen: impl Into<String>) -> Finding {
        Finding {
            what,
            seen: seen.into(),
            verdict: Verdict::Fine,
        }
    }

    fn warning(what: &'static str, seen: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding {
            what,
            seen: seen.into(),
            verdict: Verdict::Warning(mend.into()),
        }
    }

    fn fault(what: &'static str, seen: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding {
            what,
            seen: seen.into(),
            verdict: Verdict::Fault(mend.into()),
        }
    }

    fn print(&self) {
        let (mark, mend) = match &self.verdict {
            Verdict::Fine => ("ok   ", None),
            Verdict::Warning(mend) => ("WARN ", Some(mend)),
            Verdict::Fault(mend) => ("FAULT", Some(mend)),
        };
        println!("{mark} {}: {}", self.what, self.seen);
        mend.into_iter()
            .for_each(|mend| println!("      mend: {mend}"));
    }

    fn is_fault(&self) -> bool {
        matches!(self.verdict, Verdict::Fault(_))
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
    let started = environment::rank()?;
    // Ranks that this command itself started leave the machine to it.
    let looks = match &started {
        None => true,
        Some(Started { env, .. }) => env.local_rank == 0 && !environment::is_launched(),
    };
    let local = started
        .as_ref()
        .map_or(args.nproc_per_node, |started| started.env.local_world_size);
    let total = started
        .as_ref()
        .map_or(args.nproc_per_node, |started| started.env.world_size);
    let by_mpi = started
        .as_ref()
        .is_some_and(|started| started.env.by_mpi == ByMpi::Yes);
    let mut faults = 0;
    if looks {
        for finding in look(args, config.as_ref(), (local, total), by_mpi) {
            finding.print();
            faults += usize::from(finding.is_fault());
        }
    }
    let backend = config
        .as_ref()
        .map_or(parallel::Backend::Auto, |config| config.run.communicator);
    let device = config.as_ref().map_or("cpu", |config| &config.run.device);
    let together = on_ranks(args.nproc_per_node, |env| {
        ranks::measure(env, backend, device)
    });
    match together {
        Ok(code) if code == ExitCode::SUCCESS => {}
        Ok(_) => faults += 1,
        Err(error) => {
            Finding::fault(
                "ranks",
                format!("{error:#}"),
                "see the message of the rank above",
            )
            .print();
            faults += 1;
        }
    }
    if faults > 0 {
        println!(
            "{faults} fault{} to mend",
            if faults == 1 { "" } else { "s" }
        );
        return Ok(ExitCode::FAILURE);
    }
    println!("nothing is in the way");
    Ok(ExitCode::SUCCESS)
}

fn look(
    args: &DoctorArgs,
    config: Option<&Config>,
    (local, total): (usize, usize),
    by_mpi: bool,
) -> Vec<Finding> {
    let mut findings = vec![
        machine::libtorch(),
        machine::processors(local),
        machine::memory(config, local, total),
        machine::shared_memory(local),
        machine::open_files(local),
    ];
    findings.extend(machine::port(args.master_port));
    findings.push(machine::graphics(config));
    findings.extend(machine::npus(config));
    findings.push(machine::mpi(config, by_mpi));
    findings.extend(config.map(machine::disk));
    findings
}
