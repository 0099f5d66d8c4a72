//! `moerun plan survival`: how likely it is that nothing has to come from disk, and what failures cost.

use crate::cli::SurvivalArgs;
use anyhow::{Result, bail};
use checkpoint::survival::Cluster;
use checkpoint::{Redundancy, redundancy_groups};
use std::process::ExitCode;

pub(crate) fn run(args: &SurvivalArgs) -> Result<ExitCode> {
    for (option, value) in [
        ("--mtbf-h", args.mtbf_h),
        ("--shape", args.shape),
        ("--window-s", args.window_s),
        ("--days", args.days),
        ("--nodes", args.nodes as f64),
    ] {
        if value.is_nan() || value <= 0.0 {
            bail!("{option} is {value}; it must be above 0");
        }
    }
    let mut schemes = vec![
        Redundancy::None,
        Redundancy::Copies(1),
        Redundancy::Copies(2),
    ];
    for &parity in &args.parity {
        schemes.extend(
            args.data
                .iter()
                .map(|&data| Redundancy::Parity { data, parity }),
        );
    }
    let failures = args.nodes as f64 * args.days * 24.0 / args.mtbf_h;
    println!(
        "{} nodes, one failure in {:.0} h each: {failures:.1} failures of nodes in {} days",
        args.nodes, args.mtbf_h, args.days
    );
    println!(
        "each loses {:.0} s in the mean: half of {} s between snapshots, and {} s to restart: {:.3}% of the run",
        args.interval_s / 2.0 + args.restart_s,
        args.interval_s,
        args.restart_s,
        failures * (args.interval_s / 2.0 + args.restart_s) / (args.days * 864.0)
    );
    let simulated = if args.simulate > 0 { "  simulated" } else { "" };
    println!(
        "{:28}{:>9}{:>16}{simulated}{:>16}",
        "",
        "memory",
        "one window",
        format!("{} days", args.days)
    );
    for redundancy in schemes {
        let groups = match redundancy_groups(&vec![0; args.nodes], redundancy) {
            Ok(groups) => groups,
            Err(reason) => {
                println!("{:28}{reason}", redundancy.to_string());
                continue;
            }
        };
        let groups: Vec<usize> = groups.iter().map(Vec::len).collect();
        let survives = redundancy.max_losses();
        // What a node keeps of others, in sizes of its own state.
        let extra: f64 = groups
            .iter()
            .map(|&n| (n * survives) as f64 / (n - survives) as f64)
            .sum::<f64>()
            / args.nodes as f64;
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
        println!(
            "{:28}{:>8.2}x{:>16.9}{simulated}{:>16.6}",
            redundancy.to_string(),
            1.0 + extra,
            cluster.window_survival(),
            cluster.run_survival(args.days * 24.0)
        );
    }
    Ok(ExitCode::SUCCESS)
}
