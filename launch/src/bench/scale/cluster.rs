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

struct StartUpSeries {
    seconds: Series,
    requests: Series,
    bytes: Series,
    files: Series,
}

/// Prints the costs of starting real ranks, and then of simulated ones. Each of these asks as much
/// as a rank of the largest real run does on average.
pub(super) fn start_up(args: &ScaleArgs) -> Result<()> {
    let mut series = StartUpSeries {
        seconds: Series::new("time until all ranks have joined", "N x requests", "s"),
        requests: Series::new("requests to the store", "N x groups", "requests"),
        bytes: Series::new("bytes through the store", "N x groups", "bytes"),
        files: Series::new("open files of a rank", "groups x log N", "files"),
    };
    let mut traffic_per_rank = StoreTraffic::default();
    for &ranks in &args.measured {
        let joins = join_for_real(ranks)?;
        traffic_per_rank = series.print_measured(ranks, &joins);
    }
    // Above 16 members a group costs a rank the same: only one rank in 128 is also in the further
    // levels of trees.
    for &ranks in &args.ranks {
        series.simulate(SimulatedClients {
            ranks,
            traffic_per_rank,
            threads: args.threads,
        })?;
    }
    Ok(())
}

impl StartUpSeries {
    /// Returns the mean traffic of a rank.
    fn print_measured(&mut self, ranks: usize, joins: &[JoinCost]) -> StoreTraffic {
        let origin = Origin::Measured;
        let total: StoreTraffic = joins.iter().map(|join| join.total).sum();
        let seconds: f64 = joins.iter().map(|join| join.seconds).sum();
        let files: f64 = joins.iter().map(|join| join.files_per_rank).sum();
        self.seconds.print(ranks, seconds, origin);
        self.requests.print(ranks, total.requests as f64, origin);
        self.bytes.print(ranks, total.bytes as f64, origin);
        self.files.print(ranks, files, origin);
        StoreTraffic {
            requests: total.requests.div_ceil(ranks as u64),
            bytes: total.bytes.div_ceil(ranks as u64),
        }
    }

    fn simulate(&mut self, clients: SimulatedClients) -> Result<()> {
        let ranks = clients.ranks;
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
