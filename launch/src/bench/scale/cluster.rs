//! Start-up of ranks: real ones as threads of this process, and simulated ones that ask as much of
//! the store.

use super::{Origin, STORE_CONNECTIONS, Series, reference};
use crate::cli::ScaleArgs;
use anyhow::{Context, Result, anyhow};
use parallel::{
    Backend, Cpu, GroupKind, Mesh, RankEnv, SimulatedClients, StoreAccess, StoreLoad, StoreServer,
    World,
};
use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

const TIMEOUT: Duration = Duration::from_secs(600);

/// Requests, or bytes, above which a start-up is projected only.
const MAX_SIMULATED_REQUESTS: f64 = 4e6;
const MAX_SIMULATED_BYTES: f64 = 4e9;

/// The groups that a rank of the reference job joins.
const GROUPS: [GroupKind; 6] = [
    GroupKind::World,
    GroupKind::DenseReplicas,
    GroupKind::Stage,
    GroupKind::Expert,
    GroupKind::ExpertReplicas,
    GroupKind::Pipeline,
];

/// The cost of a start-up, without communicators of a device.
struct StartUp {
    ranks: usize,
    seconds: f64,
    load: StoreLoad,
    /// Files that are open in this process, at both ends of each connection.
    files: usize,
}

/// Requests of one rank to the store in a run of some size.
#[derive(Clone, Copy)]
struct RankLoad {
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
        bytes: Series::new("bytes through the store", "N x groups x keys", "bytes"),
        files: Series::new("open files of ranks and store", "N x peers", "files"),
    };
    let mut loads = Vec::new();
    for &ranks in &args.measured {
        let measured = join_for_real(ranks)?;
        series.print_measured(&measured);
        loads.push(RankLoad {
            ranks,
            requests: measured.load.requests as f64 / ranks as f64,
            bytes: measured.load.bytes as f64 / ranks as f64,
        });
    }
    for &ranks in &args.ranks {
        let load = projected(&loads, ranks).context("--measured needs a size")?;
        series.simulate(load, args.threads)?;
    }
    Ok(())
}

impl StartUpSeries {
    fn print_measured(&mut self, measured: &StartUp) {
        let StartUp { ranks, load, .. } = *measured;
        let origin = Origin::Measured;
        self.seconds.print(ranks, measured.seconds, origin);
        self.requests.print(ranks, load.requests as f64, origin);
        self.bytes.print(ranks, load.bytes as f64, origin);
        self.files.print(ranks, measured.files as f64, origin);
    }

    fn simulate(&mut self, load: RankLoad, threads: usize) -> Result<()> {
        let ranks = load.ranks;
        let requests = load.requests * ranks as f64;
        let bytes = load.bytes * ranks as f64;
        if requests > MAX_SIMULATED_REQUESTS || bytes > MAX_SIMULATED_BYTES {
            self.requests.print(ranks, requests, Origin::Projected);
            self.bytes.print(ranks, bytes, Origin::Projected);
            return Ok(());
        }
        let clients = SimulatedClients {
            ranks,
            connections: STORE_CONNECTIONS,
            load: StoreLoad {
                requests: load.requests.round() as u64,
                bytes: load.bytes.round() as u64,
            },
            threads,
        };
        let server = StoreServer::local().context("cannot serve a store")?;
        let begun = Instant::now();
        clients
            .run(server.access(), TIMEOUT)
            .map_err(|error| anyhow!("simulated ranks: {error}"))?;
        let seconds = begun.elapsed().as_secs_f64();
        let served = server.load();
        let origin = Origin::Simulated;
        self.seconds.print(ranks, seconds, origin);
        self.requests.print(ranks, served.requests as f64, origin);
        self.bytes.print(ranks, served.bytes as f64, origin);
        Ok(())
    }
}

/// Returns the load of a rank in a run of `ranks`, by the power law through the two largest of the
/// measured runs, whose sizes ascend.
fn projected(measured: &[RankLoad], ranks: usize) -> Option<RankLoad> {
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
    Some(RankLoad {
        ranks,
        requests: growth(before.requests, last.requests),
        bytes: growth(before.bytes, last.bytes),
    })
}

/// Starts `ranks` ranks as threads, which join through Gloo as if each was on another machine.
fn join_for_real(ranks: usize) -> Result<StartUp> {
    let files_before = open_files()?;
    let server = StoreServer::local().context("cannot serve a store")?;
    let begun = Instant::now();
    let (joined, outcomes) = channel();
    let threads: Vec<RankThread> = (0..ranks)
        .map(|rank| RankThread::start(rank, ranks, server.access().clone(), joined.clone()))
        .collect();
    drop(joined);
    let mut failure = None;
    for outcome in outcomes.iter().take(ranks) {
        failure = failure.or(outcome.err());
    }
    let seconds = begun.elapsed().as_secs_f64();
    let load = server.load();
    let files = open_files()?.saturating_sub(files_before);
    for thread in threads {
        thread.end()?;
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(StartUp {
            ranks,
            seconds,
            load,
            files,
        }),
    }
}

/// A rank that keeps its groups until its bench ends it.
struct RankThread {
    release: Sender<()>,
    thread: JoinHandle<()>,
}

impl RankThread {
    fn start(
        rank: usize,
        ranks: usize,
        store: StoreAccess,
        joined: Sender<Result<()>>,
    ) -> RankThread {
        let (release, released) = channel();
        let thread = std::thread::spawn(move || {
            // The receivers of both channels live longer, unless the bench has failed.
            let _ = hold_groups(rank, ranks, store, &joined, &released)
                .map_err(|error| joined.send(Err(error)));
        });
        RankThread { release, thread }
    }

    fn end(self) -> Result<()> {
        drop(self.release);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("a rank of the bench panicked"))
    }
}

fn hold_groups(
    rank: usize,
    ranks: usize,
    store: StoreAccess,
    joined: &Sender<Result<()>>,
    released: &Receiver<()>,
) -> Result<()> {
    let mesh = reference::config(ranks)?.mesh(rank, ranks);
    let mesh: Mesh = mesh.map_err(|error| anyhow!(error))?;
    let env = RankEnv::single_node(rank, ranks, store);
    let world = World::join(&env, TIMEOUT, Backend::Gloo, &Cpu)?;
    let mut groups = Vec::new();
    for kind in GROUPS {
        groups.push(world.group(&format!("{kind:?}"), &mesh.group(kind))?);
    }
    let _ = joined.send(Ok(()));
    // Returns when the bench drops the other end.
    let _ = released.recv();
    drop(groups);
    Ok(())
}

/// Returns the number of open files of this process.
fn open_files() -> Result<usize> {
    let files = std::fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")?;
    Ok(files.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(ranks: usize, requests: f64, bytes: f64) -> RankLoad {
        RankLoad {
            ranks,
            requests,
            bytes,
        }
    }

    #[test]
    fn loads_grow_as_they_did_between_the_largest_measured_runs() {
        let measured = [
            load(8, 99.0, 1.0),
            load(16, 20.0, 100.0),
            load(32, 20.0, 200.0),
        ];
        let large = projected(&measured, 3200).unwrap();
        assert_eq!((large.ranks, large.requests), (3200, 20.0));
        assert!((large.bytes - 20_000.0).abs() < 1e-6, "{}", large.bytes);
        let single = projected(&measured[..1], 64).unwrap();
        assert_eq!((single.requests, single.bytes), (99.0, 1.0));
        assert!(projected(&[], 64).is_none());
    }
}
