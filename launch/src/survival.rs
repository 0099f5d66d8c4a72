//! `moerun plan survival`: the probability that a run never needs its checkpoints, and the cost of
//! failures.

use crate::cli::SurvivalArgs;
use anyhow::{Result, bail};
use checkpoint::{Redundancy, redundancy_groups, survival::Cluster};
use std::process::ExitCode;

/// Most lives of nodes that a simulation draws: a minute of work.
const MAX_DRAWN: u64 = 1_000_000_000;

pub(crate) fn run(args: &SurvivalArgs) -> Result<ExitCode> {
    let drawn = args.simulate.saturating_mul(args.nodes as u64);
    if drawn > MAX_DRAWN {
        bail!(
            "--simulate {} x --nodes {} are {drawn} lives of nodes; at most {MAX_DRAWN} are drawn",
            args.simulate,
            args.nodes
        );
    }
    print_failures(args);
    let simulated = if args.simulate > 0 { "  simulated" } else { "" };
    let days = format!("{} days", args.days);
    println!(
        "{:28}{:>9}{:>16}{simulated}{days:>16}",
        "", "memory", "one window"
    );
    for redundancy in schemes(args) {
        print_scheme(args, redundancy);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_failures(args: &SurvivalArgs) {
    let SurvivalArgs {
        nodes,
        days,
        mtbf_h,
        interval_s,
        restart_s,
        ..
    } = args;
    let failures = *nodes as f64 * days * 24.0 / mtbf_h;
    println!(
        "{nodes} nodes, one failure in {mtbf_h:.0} h each: {failures:.1} node failures \
         in {days} days"
    );
    let lost_s = interval_s / 2.0 + restart_s;
    let percent = failures * lost_s / (days * 864.0);
    println!(
        "each costs {lost_s:.0} s on average: half of {interval_s} s between snapshots, and \
         {restart_s} s to restart: {percent:.3}% of the run"
    );
}

fn schemes(args: &SurvivalArgs) -> Vec<Redundancy> {
    let mut schemes = vec![
        Redundancy::None,
        Redundancy::Copies(1),
        Redundancy::Copies(2),
    ];
    for &parity in &args.parity {
        for &data in &args.data {
            schemes.push(Redundancy::Parity { data, parity });
        }
    }
    schemes
}

fn print_scheme(args: &SurvivalArgs, redundancy: Redundancy) {
    let name = redundancy.to_string();
    let groups = match redundancy_groups(&vec![0; args.nodes], redundancy) {
        Ok(groups) => groups,
        Err(reason) => {
            println!("{name:28}{reason}");
            return;
        }
    };
    let groups: Vec<usize> = groups.iter().map(Vec::len).collect();
    let survives = redundancy.max_losses();
    // The memory for other nodes' state, in units of a node's own.
    let per_group = |&nodes: &usize| (nodes * survives) as f64 / (nodes - survives) as f64;
    let extra = groups.iter().map(per_group).sum::<f64>() / args.nodes as f64;
    let cluster = Cluster {
        groups,
        max_losses: survives,
        mtbf_h: args.mtbf_h,
        weibull_shape: args.shape,
        window_h: args.window_s / 3600.0,
    };
    let simulated = match args.simulate {
        0 => String::new(),
        trials => format!("{:>11.6}", cluster.simulate(trials, args.seed)),
    };
    let memory = 1.0 + extra;
    let window = cluster.window_survival();
    let run = cluster.run_survival(args.days * 24.0);
    println!("{name:28}{memory:>8.2}x{window:>16.9}{simulated}{run:>16.6}");
}
