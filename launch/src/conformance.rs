//! `moerun conformance`: the suites that every device and communicator must pass, on this machine.

use crate::{cli::ConformanceArgs, local_ranks::run_on_ranks};
use anyhow::{Result, bail};
use parallel::{accelerator, conformance};
use std::process::ExitCode;

pub(crate) fn run(args: &ConformanceArgs) -> Result<ExitCode> {
    run_on_ranks(args.nproc_per_node, |env| {
        let device = accelerator(&args.device, env.local_rank)?;
        let mut outcomes = conformance::accelerator(device.as_ref());
        outcomes.extend(conformance::communicator(
            env,
            args.backend,
            device.as_ref(),
        )?);
        let mut failed = 0;
        for outcome in &outcomes {
            match &outcome.problem {
                Some(problem) => {
                    failed += 1;
                    eprintln!("rank {}: fail {}: {problem}", env.rank, outcome.name);
                }
                None if env.rank == 0 => println!("ok   {}", outcome.name),
                None => {}
            }
        }
        if failed > 0 {
            bail!("{failed} of {} requirements are not met", outcomes.len());
        }
        Ok(())
    })
}
