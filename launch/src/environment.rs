//! Detects from environment variables which launcher started this process, and as which rank.
//! Nothing else reads these variables.

use crate::hint::{hinted, one_line};
use anyhow::{Result, anyhow, bail};
use parallel::{MpiLaunch, RankEnv, Rendezvous, Secret, StoreAccess};
use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
};

/// Process id of the `moerun` launcher, with which its ranks end.
pub(crate) const LAUNCHER_PID: &str = "MOERUN_LAUNCHER_PID";
/// Variable of the process that forks itself for each rank. Its standard input is a socket to the
/// launcher or agent.
pub(crate) const FORKS_RANKS: &str = "MOERUN_FORKS_RANKS";
/// Variable that turns the fork server off if it is 0.
const FORK_SERVER: &str = "MOERUN_FORK_SERVER";
/// Secret of the store of `moerun`'s own ranks. Other users cannot read a process's environment.
const STORE_SECRET: &str = "MOERUN_STORE_SECRET";

/// Most ranks of a run, and most nodes.
const MAX_RANKS: u64 = 65_536;
/// Slurm numbers jobs and steps with 32 bits.
const MAX_SLURM_ID: u64 = u32::MAX as u64;
/// Most threads of a rank.
const MAX_THREADS: u64 = 4096;
/// Longest number in a node list, with leading zeros.
const MAX_NUMBER_LEN: usize = 20;
/// Most brackets in a node name.
const MAX_BRACKETS: usize = 8;
/// Most restarts by torchrun.
const MAX_RESTARTS: u64 = 1_000_000_000;
const PORTS: RangeInclusive<u64> = 1..=65_535;

/// Returns the number of threads that `OMP_NUM_THREADS` asks for, if it is set. Of a list for
/// nested parallelism it is the first.
///
/// # Errors
/// If it is no number from 1 to 4096.
pub(crate) fn requested_threads() -> Result<Option<usize>> {
    threads_in(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn threads_in(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<usize>> {
    let name = "OMP_NUM_THREADS";
    let first = |name: &str| {
        let list = variable(name)?;
        let first = list.split(',').next().unwrap_or_default();
        Some(first.trim().to_string())
    };
    let env = Variables(&first);
    if !env.has(name) {
        return Ok(None);
    }
    env.number(name, name, 1..=MAX_THREADS).map(Some)
}

/// Returns the process id of the `moerun` that started this process, if one did.
///
/// # Errors
/// If the variable has been set to something else.
pub(crate) fn launcher_pid() -> Result<Option<String>> {
    let Ok(pid) = std::env::var(LAUNCHER_PID) else {
        return Ok(None);
    };
    if pid.parse::<u32>().is_err() {
        return Err(hinted(
            anyhow!("{LAUNCHER_PID}={} is no process id", one_line(&pid)),
            format!("unset {LAUNCHER_PID}: moerun sets it itself"),
        ));
    }
    Ok(Some(pid))
}

/// True if `moerun` itself started this process, which then gets its assignment on stdin.
pub(crate) fn launched_by_moerun() -> bool {
    std::env::var(LAUNCHER_PID).is_ok()
}

/// True if this process forks itself for each rank of its machine.
pub(crate) fn forks_ranks() -> bool {
    std::env::var_os(FORKS_RANKS).is_some()
}

/// True if ranks come from a fork server, which `MOERUN_FORK_SERVER=0` turns off.
///
/// # Errors
/// If the variable is neither 0 nor 1.
pub(crate) fn wants_fork_server() -> Result<bool> {
    match std::env::var(FORK_SERVER).as_deref() {
        Err(_) | Ok("" | "1") => Ok(true),
        Ok("0") => Ok(false),
        Ok(other) => Err(hinted(
            anyhow!("{FORK_SERVER}={} is neither 0 nor 1", one_line(other)),
            format!("unset {FORK_SERVER}, or set it to 0 to load libtorch in each rank"),
        )),
    }
}

/// A rank and what started it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetectedRank {
    pub(crate) env: RankEnv,
    /// Name that messages give to the launcher, such as `srun`.
    pub(crate) launcher: &'static str,
}

/// Returns the rank of this process; None if no launcher started it.
///
/// # Errors
/// If variables are missing, wrong or contradictory.
pub(crate) fn detect_rank() -> Result<Option<DetectedRank>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    detect(&variable, cfg!(feature = "mpi"))
}

/// Returns the variables that [`detect_rank`] reads, in torchrun's form.
pub(crate) fn torchrun_variables(env: &RankEnv) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("RANK", env.rank.to_string()),
        ("WORLD_SIZE", env.world_size.to_string()),
        ("LOCAL_RANK", env.local_rank.to_string()),
        ("LOCAL_WORLD_SIZE", env.local_world_size.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", env.attempt.to_string()),
    ];
    match &env.rendezvous {
        Rendezvous::Launcher(StoreAccess { address, secret }) => variables.extend([
            ("MASTER_ADDR", address.ip().to_string()),
            ("MASTER_PORT", address.port().to_string()),
            (STORE_SECRET, secret.to_hex()),
        ]),
        Rendezvous::Store {
            host,
            port,
            launcher_serves,
        } => {
            let agent_store = if *launcher_serves { "True" } else { "False" };
            variables.extend([
                ("MASTER_ADDR", host.clone()),
                ("MASTER_PORT", port.to_string()),
                ("TORCHELASTIC_USE_AGENT_STORE", agent_store.to_string()),
            ]);
        }
        Rendezvous::Mpi => {}
    }
    variables
}

/// Names of the variables by which a launcher describes a rank.
#[derive(Clone, Copy)]
struct RankVariables {
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    local_world_size: &'static str,
}

const TORCHRUN: RankVariables = RankVariables {
    rank: "RANK",
    world_size: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_world_size: "LOCAL_WORLD_SIZE",
};

const OPEN_MPI: RankVariables = RankVariables {
    rank: "OMPI_COMM_WORLD_RANK",
    world_size: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_world_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
};

const PMI: RankVariables = RankVariables {
    rank: "PMI_RANK",
    world_size: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    local_world_size: "MPI_LOCALNRANKS",
};

/// Decides by the variables that `variable` finds.
///
/// The launcher nearest to the process wins. Torchrun may run under mpirun or srun, and mpirun in a
/// Slurm job, and the outer launcher's variables are then still set.
fn detect(
    variable: &dyn Fn(&str) -> Option<String>,
    has_mpi: bool,
) -> Result<Option<DetectedRank>> {
    let env = Variables(variable);
    if env.has("RANK") {
        return env.torchrun().map(Some);
    }
    for name in ["WORLD_SIZE", "LOCAL_RANK"] {
        if let Some(value) = variable(name) {
            return Err(hinted(
                anyhow!("{name}={value} is set but RANK is not"),
                format!("set RANK, MASTER_ADDR and MASTER_PORT too, or unset {name}"),
            ));
        }
    }
    let is_slurm_step = env.has("SLURM_PROCID") && env.has("SLURM_STEP_ID");
    if env.has(OPEN_MPI.rank) {
        env.mpi("mpirun (Open MPI)", OPEN_MPI, has_mpi)
    } else if env.has(PMI.rank) && !is_slurm_step {
        env.mpi("mpiexec (PMI)", PMI, has_mpi)
    } else if is_slurm_step {
        env.slurm()
    } else {
        Ok(None)
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

/// A variable that is set.
struct Variable {
    name: &'static str,
    value: String,
}

impl Variables<'_> {
    fn has(&self, name: &str) -> bool {
        self.0(name).is_some()
    }

    /// Returns a number of a range, which must be set because `because` is.
    fn number<T: TryFrom<u64>>(
        &self,
        name: &str,
        because: &str,
        range: RangeInclusive<u64>,
    ) -> Result<T> {
        let Some(text) = self.0(name) else {
            return Err(hinted(
                anyhow!("{because} is set but {name} is not"),
                format!("unset {because}, or set both"),
            ));
        };
        let number = text.parse().ok().filter(|number| range.contains(number));
        match number.and_then(|number| T::try_from(number).ok()) {
            Some(number) => Ok(number),
            None => {
                let text = one_line(&text);
                let least = range.start();
                let most = range.end();
                bail!("{name}={text} is not a number in range: it must be from {least} to {most}")
            }
        }
    }

    fn number_or<T: TryFrom<u64>>(
        &self,
        name: &str,
        default: T,
        range: RangeInclusive<u64>,
    ) -> Result<T> {
        if self.has(name) {
            self.number(name, name, range)
        } else {
            Ok(default)
        }
    }

    /// Returns a number of ranks.
    fn size(&self, name: &str, because: &str) -> Result<usize> {
        self.number(name, because, 1..=MAX_RANKS)
    }

    /// Returns the index of a rank or node.
    fn index(&self, name: &str, because: &str) -> Result<usize> {
        self.number(name, because, 0..=MAX_RANKS - 1)
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        self.number_or(name, default, 1..=MAX_RANKS)
    }

    fn index_or(&self, name: &str, default: usize) -> Result<usize> {
        self.number_or(name, default, 0..=MAX_RANKS - 1)
    }

    fn interface(&self) -> Option<String> {
        self.0("GLOO_SOCKET_IFNAME")
    }

    /// Returns the store that `MASTER_ADDR` and `MASTER_PORT` name.
    fn store(&self, because: &str) -> Result<Rendezvous> {
        let Some(host) = self.0("MASTER_ADDR") else {
            return Err(hinted(
                anyhow!("{because} is set but MASTER_ADDR is not"),
                format!("unset {because}, or set the variables that torchrun sets"),
            ));
        };
        let port = self.number("MASTER_PORT", "MASTER_ADDR", PORTS)?;
        if let Some(secret) = self.0(STORE_SECRET) {
            return own_store(&host, port, &secret);
        }
        let agent_store = self.0("TORCHELASTIC_USE_AGENT_STORE");
        Ok(Rendezvous::Store {
            host,
            port,
            launcher_serves: agent_store.is_some_and(|value| value == "True"),
        })
    }

    fn torchrun(&self) -> Result<DetectedRank> {
        let rank = self.index("RANK", "RANK")?;
        let world_size = self.size("WORLD_SIZE", "RANK")?;
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.index_or("LOCAL_RANK", rank)?,
            local_world_size: self.size_or("LOCAL_WORLD_SIZE", world_size)?,
            rendezvous: self.store("RANK")?,
            mpi_launch: MpiLaunch::No,
            attempt: self.number_or("TORCHELASTIC_RESTART_COUNT", 0, 0..=MAX_RESTARTS)?,
            interface: self.interface(),
            address: None,
            gloo_tls: None,
        };
        self.check_mpi_agrees(&env)?;
        let launcher = if self.has("TORCHELASTIC_RUN_ID") {
            "torchrun"
        } else {
            "RANK, WORLD_SIZE and MASTER_ADDR"
        };
        let env = check_ranks(env, TORCHRUN)?;
        Ok(DetectedRank { env, launcher })
    }

    /// Refuses a rank that mpirun's variables contradict.
    ///
    /// If their numbers of ranks differ, mpirun started torchrun, not the ranks.
    fn check_mpi_agrees(&self, env: &RankEnv) -> Result<()> {
        let Some(mpi_rank) = self.0(OPEN_MPI.rank) else {
            return Ok(());
        };
        let mpi_size = self.size(OPEN_MPI.world_size, OPEN_MPI.rank);
        let is_same_world = mpi_size.is_ok_and(|size| size == env.world_size);
        let rank = env.rank;
        if is_same_world && mpi_rank != rank.to_string() {
            return Err(hinted(
                anyhow!("RANK={rank} and OMPI_COMM_WORLD_RANK={mpi_rank} contradict each other"),
                "unset RANK to run under mpirun",
            ));
        }
        Ok(())
    }

    fn mpi(
        &self,
        launcher: &'static str,
        names: RankVariables,
        has_mpi: bool,
    ) -> Result<Option<DetectedRank>> {
        let rank = self.index(names.rank, names.rank)?;
        let world_size = self.size(names.world_size, names.rank)?;
        if world_size == 1 {
            return Ok(None);
        }
        let rendezvous = if self.has("MASTER_ADDR") {
            self.store("MASTER_ADDR")?
        } else if has_mpi {
            Rendezvous::Mpi
        } else {
            let name = names.rank;
            return Err(hinted(
                anyhow!(
                    "{launcher} started this process ({name}={rank}), but this moerun was built \
                     without MPI"
                ),
                "run ./scripts/setup --mpi and build with --features mpi; or let the ranks meet \
                 over TCP: on all of them set MASTER_ADDR to the machine of rank 0 and \
                 MASTER_PORT to a free port there",
            ));
        };
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.index_or(names.local_rank, rank)?,
            local_world_size: self.size_or(names.local_world_size, world_size)?,
            rendezvous,
            mpi_launch: MpiLaunch::Yes,
            attempt: 0,
            interface: self.interface(),
            address: None,
            gloo_tls: None,
        };
        let env = check_ranks(env, names)?;
        Ok(Some(DetectedRank { env, launcher }))
    }

    /// Reads the variables of a Slurm step: <https://slurm.schedmd.com/srun.html>, "Output
    /// environment variables".
    fn slurm(&self) -> Result<Option<DetectedRank>> {
        let because = "SLURM_PROCID";
        let total = if self.has("SLURM_STEP_NUM_TASKS") {
            "SLURM_STEP_NUM_TASKS"
        } else {
            "SLURM_NTASKS"
        };
        let rank = self.index(because, because)?;
        let world_size = self.size(total, because)?;
        // A step of one task is a shell or a launcher.
        if world_size == 1 {
            return Ok(None);
        }
        let tasks = self.step_or_job("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")?;
        let names = RankVariables {
            rank: because,
            world_size: total,
            local_rank: "SLURM_LOCALID",
            local_world_size: tasks.name,
        };
        let local_world_size = self.slurm_local_world_size(&tasks, names, world_size)?;
        let mpi_launch = if self.has("PMIX_RANK") || self.has("PMI_RANK") {
            MpiLaunch::Possible
        } else {
            MpiLaunch::No
        };
        let rendezvous = self.slurm_store()?;
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.index(names.local_rank, because)?,
            local_world_size,
            rendezvous,
            mpi_launch,
            attempt: 0,
            interface: self.interface(),
            address: None,
            gloo_tls: None,
        };
        let env = check_ranks(env, names)?;
        let launcher = "srun";
        Ok(Some(DetectedRank { env, launcher }))
    }

    /// Returns a variable of the Slurm step, or else of its job.
    fn step_or_job(&self, step: &'static str, job: &'static str) -> Result<Variable> {
        for name in [step, job] {
            if let Some(value) = self.0(name) {
                return Ok(Variable { name, value });
            }
        }
        Err(hinted(
            anyhow!("SLURM_PROCID is set but neither {step} nor {job} is"),
            "start the ranks with srun",
        ))
    }

    fn slurm_local_world_size(
        &self,
        tasks: &Variable,
        names: RankVariables,
        world_size: usize,
    ) -> Result<usize> {
        let Variable { name, value } = tasks;
        let node = self.index("SLURM_NODEID", names.rank)?;
        let Some(tasks) = tasks_per_node(value) else {
            let value = one_line(value);
            bail!(
                "{name}={value} is not of the form 2(x3),1 with at most {MAX_RANKS} nodes and tasks"
            );
        };
        let sum: usize = tasks.iter().sum();
        if sum != world_size {
            let total = names.world_size;
            bail!("{name}={tasks:?} has {sum} tasks but {total}={world_size}");
        }
        match tasks.get(node) {
            Some(&count) => Ok(count),
            None => bail!("SLURM_NODEID={node} but {name} has {} nodes", tasks.len()),
        }
    }

    /// Returns a store on the first node, at a port derived from the job and step.
    fn slurm_store(&self) -> Result<Rendezvous> {
        let nodes = self.step_or_job("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")?;
        let Variable { name, value } = nodes;
        let Some(nodes) = expand_node_list(&value) else {
            let value = one_line(&value);
            bail!("{name}={value} is not a valid node list of at most {MAX_RANKS} nodes");
        };
        let host = match self.0("MASTER_ADDR") {
            Some(host) => host,
            None if nodes.len() == 1 => Ipv4Addr::LOCALHOST.to_string(),
            None => nodes[0].clone(),
        };
        // Steps of one job, and jobs that share a machine, get different ports.
        let job: u64 = self.number_or("SLURM_JOB_ID", 0, 0..=MAX_SLURM_ID)?;
        let step: u64 = self.number("SLURM_STEP_ID", "SLURM_PROCID", 0..=MAX_SLURM_ID)?;
        let derived = 20_000 + (job * 13 + step) % 10_000;
        Ok(Rendezvous::Store {
            host,
            port: self.number_or("MASTER_PORT", derived as u16, PORTS)?,
            launcher_serves: false,
        })
    }
}

/// Returns the authenticated store of a `moerun` that started this process.
fn own_store(host: &str, port: u16, secret: &str) -> Result<Rendezvous> {
    let access = host.parse().ok().zip(Secret::from_hex(secret));
    let Some((ip, secret)) = access else {
        return Err(hinted(
            anyhow!("{STORE_SECRET} is set, but it or MASTER_ADDR is not what moerun sets"),
            format!("unset {STORE_SECRET}: moerun sets it itself"),
        ));
    };
    let address = SocketAddr::new(ip, port);
    Ok(Rendezvous::Launcher(StoreAccess { address, secret }))
}

/// Refuses impossible ranks and sizes.
fn check_ranks(env: RankEnv, names: RankVariables) -> Result<RankEnv> {
    let RankVariables {
        rank,
        world_size,
        local_rank,
        local_world_size,
    } = names;
    check_below(rank, env.rank, world_size, env.world_size)?;
    check_below(
        local_rank,
        env.local_rank,
        local_world_size,
        env.local_world_size,
    )?;
    if env.local_world_size > env.world_size {
        let local = env.local_world_size;
        let world = env.world_size;
        bail!("{local_world_size}={local} is more than {world_size}={world}");
    }
    Ok(env)
}

fn check_below(name: &str, rank: usize, size_name: &str, size: usize) -> Result<()> {
    if rank >= size {
        bail!("{name}={rank} is not below {size_name}={size}");
    }
    Ok(())
}

/// Returns the number of tasks of each node, from a list such as `2(x3),1`.
fn tasks_per_node(text: &str) -> Option<Vec<usize>> {
    let most = MAX_RANKS as usize;
    let number = |text: &str| text.parse().ok().filter(|&number: &usize| number <= most);
    let mut tasks = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, number(times.strip_suffix(')')?)?),
            None => (part, 1),
        };
        tasks.extend(std::iter::repeat_n(number(count)?, times));
        if tasks.len() > most {
            return None;
        }
    }
    Some(tasks)
}

/// Returns the nodes of a Slurm node list such as `gpu[01-03,07],login`, in order.
fn expand_node_list(text: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        // A comma inside brackets does not end a name.
        let mut depth = 0;
        let end = rest.char_indices().find(|&(_, c)| {
            depth += i32::from(c == '[') - i32::from(c == ']');
            c == ',' && depth == 0
        });
        let end = end.map_or(rest.len(), |(end, _)| end);
        let name = &rest[..end];
        if name.matches('[').count() > MAX_BRACKETS {
            return None;
        }
        found.extend(expand_brackets(name)?);
        if found.len() > MAX_RANKS as usize {
            return None;
        }
        rest = rest[end..].strip_prefix(',').unwrap_or("");
    }
    (!found.is_empty()).then_some(found)
}

/// Expands a name with any number of brackets.
fn expand_brackets(name: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = name.split_once('[') else {
        return (!name.is_empty() && !name.contains(']')).then(|| vec![name.to_string()]);
    };
    let (ranges, after) = rest.split_once(']')?;
    let tails = if after.is_empty() {
        vec![String::new()]
    } else {
        expand_brackets(after)?
    };
    let mut found = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let low: u64 = first.parse().ok()?;
        let high: u64 = last.parse().ok()?;
        if high < low || first.len() > MAX_NUMBER_LEN {
            return None;
        }
        let count = (high - low)
            .saturating_add(1)
            .saturating_mul(tails.len() as u64);
        if count.saturating_add(found.len() as u64) > MAX_RANKS {
            return None;
        }
        for number in low..=high {
            // Leading zeros are part of the name.
            let number = format!("{number:0width$}", width = first.len());
            found.extend(tails.iter().map(|tail| format!("{before}{number}{tail}")));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::message;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn detect_in(text: &str) -> Result<Option<DetectedRank>> {
        let pairs: BTreeMap<&str, &str> = text
            .split_whitespace()
            .map(|pair| pair.split_once('=').unwrap())
            .collect();
        detect(&|name| pairs.get(name).map(|value| value.to_string()), true)
    }

    fn ranks(started: &DetectedRank) -> (usize, usize, usize, usize) {
        let env = &started.env;
        (
            env.rank,
            env.world_size,
            env.local_rank,
            env.local_world_size,
        )
    }

    const SLURM: &str = "SLURM_PROCID=3 SLURM_STEP_ID=2 SLURM_STEP_NUM_TASKS=5 SLURM_LOCALID=0 \
        SLURM_NODEID=1 SLURM_TASKS_PER_NODE=3,2 SLURM_JOB_NODELIST=gpu[09-10] SLURM_JOB_ID=77";

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        assert_eq!(
            detect_in("HOME=/root SLURM_PROCID=0 SLURM_NTASKS=4").unwrap(),
            None,
            "a batch script is not a step"
        );
        let torch = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=head \
            MASTER_PORT=29500";
        let started = detect_in(torch).unwrap().unwrap();
        assert_eq!(
            (ranks(&started), started.launcher),
            ((5, 8, 1, 4), "RANK, WORLD_SIZE and MASTER_ADDR")
        );
        assert_eq!(
            detect_in(&format!("{torch} TORCHELASTIC_RUN_ID=x"))
                .unwrap()
                .unwrap()
                .launcher,
            "torchrun"
        );
        let mpi = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 \
            OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let started = detect_in(&format!("{mpi} {SLURM}")).unwrap().unwrap();
        assert_eq!(
            (ranks(&started), started.launcher),
            ((2, 4, 0, 2), "mpirun (Open MPI)"),
            "mpirun in a Slurm job"
        );
        assert_eq!(
            (started.env.rendezvous, started.env.mpi_launch),
            (Rendezvous::Mpi, MpiLaunch::Yes)
        );
        let started = detect_in("PMI_RANK=1 PMI_SIZE=3 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=3")
            .unwrap()
            .unwrap();
        assert_eq!(
            (ranks(&started), started.launcher),
            ((1, 3, 1, 3), "mpiexec (PMI)")
        );
        let started = detect_in(SLURM).unwrap().unwrap();
        assert_eq!((ranks(&started), started.launcher), ((3, 5, 0, 2), "srun"));
        let port = 20_000 + 77 * 13 + 2;
        assert_eq!(
            started.env.rendezvous,
            Rendezvous::Store {
                host: "gpu09".into(),
                port,
                launcher_serves: false
            }
        );
        let started = detect_in(&format!(
            "{SLURM} PMIX_RANK=3 MASTER_PORT=5 MASTER_ADDR=other"
        ))
        .unwrap()
        .unwrap();
        assert_eq!(
            started.env.rendezvous,
            Rendezvous::Store {
                host: "other".into(),
                port: 5,
                launcher_serves: false
            }
        );
        assert_eq!(started.env.mpi_launch, MpiLaunch::Possible);
        // mpirun started torchrun twice.
        assert_eq!(
            ranks(
                &detect_in(&format!(
                    "{torch} OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2"
                ))
                .unwrap()
                .unwrap()
            )
            .0,
            5
        );
    }

    #[test]
    fn ranks_on_one_machine_meet_on_its_loopback_device() {
        let one_node = "SLURM_PROCID=1 SLURM_STEP_ID=2 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 \
            SLURM_NODEID=0 SLURM_TASKS_PER_NODE=2 SLURM_JOB_NODELIST=gpu09";
        let host = |text: &str| match detect_in(text).unwrap().unwrap().env.rendezvous {
            Rendezvous::Store { host, .. } => host,
            other => panic!("{other:?}"),
        };
        assert_eq!(host(one_node), "127.0.0.1");
        assert_eq!(host(&format!("{one_node} MASTER_ADDR=head")), "head");

        let store = StoreAccess {
            address: "127.0.0.1:77".parse().unwrap(),
            secret: Secret::random().unwrap(),
        };
        let env = RankEnv::single_node(1, 2, store);
        let variables = torchrun_variables(&env).into_iter();
        let text: Vec<String> = variables
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let text = text.join(" ");
        assert_eq!(detect_in(&text).unwrap().unwrap().env, env);
        let wrong = detect_in(&format!("{text} {STORE_SECRET}=12")).unwrap_err();
        assert!(message(&wrong).contains(&format!("unset {STORE_SECRET}")));
    }

    #[test]
    fn a_single_process_is_no_rank() {
        assert_eq!(
            detect_in("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1").unwrap(),
            None
        );
        assert_eq!(
            detect_in("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1").unwrap(),
            None
        );
    }

    #[test]
    fn wrong_variables_are_named() {
        for (text, expected) in [
            ("RANK=0 WORLD_SIZE=2", "RANK is set but MASTER_ADDR is not"),
            (
                "RANK=0 MASTER_ADDR=a MASTER_PORT=1",
                "RANK is set but WORLD_SIZE is not",
            ),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a",
                "MASTER_ADDR is set but MASTER_PORT is not",
            ),
            (
                "RANK=x WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
                "RANK=x is not a number",
            ),
            (
                "RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
                "RANK=2 is not below WORLD_SIZE=2",
            ),
            (
                "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999",
                "MASTER_PORT=99999 is not a number in range",
            ),
            ("WORLD_SIZE=2", "WORLD_SIZE=2 is set but RANK is not"),
            (
                "OMPI_COMM_WORLD_RANK=1",
                "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not",
            ),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 \
                 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2",
                "RANK=0 and OMPI_COMM_WORLD_RANK=1 contradict each other",
            ),
            (
                &SLURM.replace("3,2", "3,3"),
                "SLURM_TASKS_PER_NODE=[3, 3] has 6 tasks but SLURM_STEP_NUM_TASKS=5",
            ),
            (
                &SLURM.replace("NODEID=1", "NODEID=2"),
                "SLURM_NODEID=2 but SLURM_TASKS_PER_NODE has 2 nodes",
            ),
            (
                &SLURM.replace("gpu[09-10]", "gpu[09"),
                "SLURM_JOB_NODELIST=gpu[09 is not a valid node list",
            ),
            (
                &SLURM.replace("LOCALID=0", "LOCALID=2"),
                "SLURM_LOCALID=2 is not below SLURM_TASKS_PER_NODE=2",
            ),
        ] {
            let error = detect_in(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let only = |name: &str| name.starts_with("OMPI").then(|| "2".to_string());
        let error = message(&detect(&only, false).unwrap_err());
        assert!(
            error.contains("built without MPI") && error.contains("MASTER_ADDR"),
            "{error}"
        );
    }

    #[test]
    fn node_lists_are_expanded_as_slurm_writes_them() {
        let all = |text| expand_node_list(text).unwrap().join(" ");
        assert_eq!(all("login"), "login");
        assert_eq!(all("a,b[1-2,5],c"), "a b1 b2 b5 c");
        assert_eq!(all("gpu[098-101]"), "gpu098 gpu099 gpu100 gpu101");
        assert_eq!(
            all("rack[1-2]node[01-02].site"),
            "rack1node01.site rack1node02.site rack2node01.site rack2node02.site"
        );
        for wrong in ["", "a[1", "a]1", "a[3-1]", "a[x]", ",a"] {
            assert_eq!(expand_node_list(wrong), None, "{wrong}");
        }
        assert_eq!(tasks_per_node("2(x3),1").unwrap(), [2, 2, 2, 1]);
        assert_eq!(tasks_per_node("2(x"), None);
    }

    #[test]
    fn numbers_far_out_of_range_are_refused_by_name() {
        let torch = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1";
        let huge = u64::MAX.to_string();
        let beyond = format!("{huge}0");
        let mut texts = Vec::new();
        for value in ["99999999999", &huge, &beyond, "-1", "nan", "1e9", "0x10"] {
            for (name, text) in [
                ("WORLD_SIZE", torch),
                ("RANK", torch),
                ("LOCAL_RANK", torch),
                ("LOCAL_WORLD_SIZE", torch),
                ("MASTER_PORT", torch),
                ("TORCHELASTIC_RESTART_COUNT", torch),
                ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK=0"),
                (
                    "OMPI_COMM_WORLD_LOCAL_SIZE",
                    "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2",
                ),
                ("PMI_SIZE", "PMI_RANK=0"),
                ("MPI_LOCALRANKID", "PMI_RANK=0 PMI_SIZE=2"),
                ("SLURM_JOB_ID", SLURM),
                ("SLURM_STEP_ID", SLURM),
                ("SLURM_PROCID", SLURM),
                ("SLURM_STEP_NUM_TASKS", SLURM),
                ("SLURM_LOCALID", SLURM),
                ("SLURM_NODEID", SLURM),
            ] {
                texts.push((
                    format!("{text} {name}={value}"),
                    format!("{name}={value} is not"),
                ));
            }
        }
        for value in [
            "1(x99999999999)",
            "99999999999",
            "1(x65536),1",
            "3,2(x)",
            "1(x-1)",
        ] {
            let text = format!("{SLURM} SLURM_TASKS_PER_NODE={value}");
            texts.push((
                text,
                format!("SLURM_TASKS_PER_NODE={value} is not of the form"),
            ));
        }
        for value in [
            "a[1-99999999]",
            "a[1-60000]b[1-60000]",
            "a[0000000000000000000000001-2]",
            "a[1][1][1][1][1][1][1][1][1]",
            "a[1-40000],b[1-40000]",
        ] {
            let text = format!("{SLURM} SLURM_JOB_NODELIST={value}");
            texts.push((
                text,
                format!("SLURM_JOB_NODELIST={value} is not a valid node list"),
            ));
        }
        for (text, expected) in texts {
            let error = detect_in(&text).expect_err(&text).to_string();
            assert!(error.contains(&expected), "{text}: {error}");
        }
    }

    #[test]
    fn threads_are_a_number_or_the_first_of_a_list() {
        let threads = |text: &str| threads_in(&|_| Some(text.to_string()));
        assert_eq!(threads("4").unwrap(), Some(4));
        assert_eq!(threads("3,2").unwrap(), Some(3));
        assert_eq!(threads_in(&|_| None).unwrap(), None);
        for wrong in ["0", "-1", "99999999999", "many", "1e3", ","] {
            let error = threads(wrong).unwrap_err().to_string();
            assert!(
                error.contains("OMP_NUM_THREADS=") && error.contains("from 1 to 4096"),
                "{error}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_variables_give_a_rank_or_an_error(
            values in proptest::collection::vec(any::<Option<u8>>(), 18),
            has_mpi: bool,
        ) {
            let names = [
                "RANK",
                "WORLD_SIZE",
                "LOCAL_RANK",
                "LOCAL_WORLD_SIZE",
                "MASTER_PORT",
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
                "PMI_RANK",
                "PMI_SIZE",
                "SLURM_PROCID",
                "SLURM_STEP_ID",
                "SLURM_STEP_NUM_TASKS",
                "SLURM_LOCALID",
                "SLURM_NODEID",
                "SLURM_TASKS_PER_NODE",
                "SLURM_JOB_NODELIST",
            ];
            let var = |name: &str| {
                if name == "MASTER_ADDR" {
                    return Some("a".to_string());
                }
                let index = names.iter().position(|known| *known == name)?;
                values[index].map(|value| (value % 6).to_string())
            };
            if let Ok(Some(started)) = detect(&var, has_mpi) {
                let env = started.env;
                prop_assert!(env.rank < env.world_size && env.local_rank < env.local_world_size);
                prop_assert!(env.local_world_size <= env.world_size);
            }
        }
    }
}
