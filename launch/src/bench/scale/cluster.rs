//! Start-up of ranks: real ones as threads of this process, and simulated ones that ask as much of
//! the store.

use super::{Origin, Series, reference};
use crate::cli::ScaleArgs;
use anyhow::{Context, Result, anyhow};
use parallel::{
    Backend, GroupKind, SimulatedClients, StoreServer, StoreTraffic,
    start_cost::{JoinCost, PlannedGroup, StartCost, StartPlan},
};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(600);

/// The groups that a rank of the reference job joins.
const GROUPS: [GroupKind; 6] = [
    GroupKind::World,
    GroupKind::DenseReplicas,
    GroupKind::Stage,
    GroupKind::Expert,
    GroupKind::ExpertReplicas,
    GroupKind::Pipeline,
];

/// Mean traffic of a rank in a run of some size.
#[derive(Clone, Copy)]
struct RankTraffic {
    ranks: usize,
    requests: f64,
    bytes: f64,
}

struct StartUpSeries {
    seconds: Series,
    requests: Series,
    bytes: Series,
    files: Series,
}

/// Prints the costs of starting real ranks, and then of simulated ones.
pub(super) fn start_up(args: &ScaleArgs) -> Result<()> {
    let mut series = StartUpSeries {
        seconds: Series::new("time until all ranks have joined", "N x requests", "s"),
        requests: Series::new("requests to the store", "N x groups", "requests"),
        bytes: Series::new("bytes through the store", "N x groups", "bytes"),
        files: Series::new("open files of a rank", "groups x log N", "files"),
    };
    let mut measured = Vec::new();
    for &ranks in &args.measured {
        let joins = join_for_real(ranks)?;
        measured.push(series.print_measured(ranks, &joins));
    }
    for &ranks in &args.ranks {
        let traffic = projected(&measured, ranks).context("--measured needs a size")?;
        series.simulate(traffic, args.threads)?;
    }
    Ok(())
}

impl StartUpSeries {
    fn print_measured(&mut self, ranks: usize, joins: &[JoinCost]) -> RankTraffic {
        let origin = Origin::Measured;
        let total: StoreTraffic = joins.iter().map(|join| join.total).sum();
        let seconds: f64 = joins.iter().map(|join| join.seconds).sum();
        let files: f64 = joins.iter().map(|join| join.files_per_rank).sum();
        self.seconds.print(ranks, seconds, origin);
        self.requests.print(ranks, total.requests as f64, origin);
        self.bytes.print(ranks, total.bytes as f64, origin);
        self.files.print(ranks, files, origin);
        RankTraffic {
            ranks,
            requests: total.requests as f64 / ranks as f64,
            bytes: total.bytes as f64 / ranks as f64,
        }
    }

    fn simulate(&mut self, traffic: RankTraffic, threads: usize) -> Result<()> {
        let ranks = traffic.ranks;
        let clients = SimulatedClients {
            ranks,
            traffic_per_rank: StoreTraffic {
                requests: traffic.requests.round() as u64,
                bytes: traffic.bytes.round() as u64,
            },
            threads,
        };
        let server = StoreServer::local().context("cannot serve a store")?;
        let begun = Instant::now();
        let total = clients.run(server.access(), TIMEOUT);
        let total = total.map_err(|error| anyhow!("simulated ranks: {error}"))?;
        let seconds = begun.elapsed().as_secs_f64();
        let origin = Origin::Simulated;
        self.seconds.print(ranks, seconds, origin);
        self.requests.print(ranks, total.requests as f64, origin);
        self.bytes.print(ranks, total.bytes as f64, origin);
        Ok(())
    }
}

/// Returns the traffic of a rank in a run of `ranks`, by the power law through the two largest of
/// the measured runs, whose sizes ascend.
fn projected(measured: &[RankTraffic], ranks: usize) -> Option<RankTraffic> {
    let last = *measured.last()?;
    let before = measured.iter().rev().nth(1).copied().unwrap_or(last);
    let growth_of_ranks = ranks as f64 / last.ranks as f64;
    let distance = (last.ranks as f64 / before.ranks as f64).ln();
    let growth = |before: f64, last: f64| {
        let exponent = (last / before).ln() / distance;
        // A rank asks for no less in a larger run. One measured run has no exponent.
        let exponent = if exponent > 0.0 { exponent } else { 0.0 };
        last * growth_of_ranks.powf(exponent)
    };
    Some(RankTraffic {
        ranks,
        requests: growth(before.requests, last.requests),
        bytes: growth(before.bytes, last.bytes),
    })
}

/// Starts `ranks` ranks as threads, which join their world and groups as if 8 each were on a
/// machine of their own.
fn join_for_real(ranks: usize) -> Result<Vec<JoinCost>> {
    let mesh = |rank| {
        let mesh = reference::config(ranks)?.mesh(rank, ranks);
        mesh.map_err(|error| anyhow!(error))
    };
    let meshes = (0..ranks).map(mesh).collect::<Result<Vec<_>>>()?;
    let group = |kind: GroupKind| {
        let mut members: Vec<Vec<usize>> = meshes.iter().map(|mesh| mesh.group(kind)).collect();
        members.sort();
        members.dedup();
        PlannedGroup {
            name: format!("{kind:?}"),
            members,
        }
    };
    let plan = StartPlan {
        ranks,
        ranks_per_machine: reference::RANKS_PER_MACHINE,
        backend: Backend::Auto,
        groups: GROUPS.into_iter().map(group).collect(),
    };
    let cost = StartCost::measure(&plan, TIMEOUT)?;
    let mut joins = vec![cost.world];
    joins.extend(cost.groups);
    Ok(joins)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(ranks: usize, requests: f64, bytes: f64) -> RankTraffic {
        RankTraffic {
            ranks,
            requests,
            bytes,
        }
    }

    #[test]
    fn traffic_grows_as_it_did_between_the_largest_measured_runs() {
        let measured = [
            traffic(8, 99.0, 1.0),
            traffic(16, 20.0, 100.0),
            traffic(32, 20.0, 200.0),
        ];
        let large = projected(&measured, 3200).unwrap();
        assert_eq!((large.ranks, large.requests), (3200, 20.0));
        assert!((large.bytes - 20_000.0).abs() < 1e-6, "{}", large.bytes);
        let single = projected(&measured[..1], 64).unwrap();
        assert_eq!((single.requests, single.bytes), (99.0, 1.0));
        assert!(projected(&[], 64).is_none());
    }
}
