//! The only reader of the launchers' environment variables: which launcher started this process, and as which rank.

use anyhow::{Result, bail};
use parallel::{MpiLaunch, RankEnv, Rendezvous};

/// Tells a rank that `moerun` itself started it, and with which process id, so that it can end with the launcher.
pub(crate) const LAUNCHER_PID: &str = "MOERUN_LAUNCHER_PID";

/// Whether `moerun` itself started this process; it then says on standard input what the process is to do.
pub(crate) fn launched_by_moerun() -> bool {
    std::env::var(LAUNCHER_PID).is_ok()
}

/// A rank, and who started it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetectedRank {
    pub(crate) env: RankEnv,
    /// For people.
    pub(crate) by: &'static str,
}

/// What this process's environment says; None where no launcher started it.
///
/// # Errors
/// When variables are missing, wrong, or contradict each other: which.
pub(crate) fn detect_rank() -> Result<Option<DetectedRank>> {
    detect(
        &|name| std::env::var(name).ok().filter(|value| !value.is_empty()),
        cfg!(feature = "mpi"),
    )
}

/// The variables that [`detect_rank`] reads, in torchrun's form.
pub(crate) fn torchrun_variables(env: &RankEnv) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("RANK", env.rank.to_string()),
        ("WORLD_SIZE", env.world_size.to_string()),
        ("LOCAL_RANK", env.local_rank.to_string()),
        ("LOCAL_WORLD_SIZE", env.local_world_size.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", env.attempt.to_string()),
    ];
    if let Rendezvous::Store {
        host,
        port,
        launcher_serves,
    } = &env.rendezvous
    {
        variables.extend([
            ("MASTER_ADDR", host.clone()),
            ("MASTER_PORT", port.to_string()),
            (
                "TORCHELASTIC_USE_AGENT_STORE",
                if *launcher_serves { "True" } else { "False" }.to_string(),
            ),
        ]);
    }
    variables
}

/// Decides by the variables that `var` finds. The launcher nearest to the process comes first: torchrun may run under mpirun or
/// srun, and mpirun in a Slurm job, whose variables are still there.
fn detect(var: &dyn Fn(&str) -> Option<String>, has_mpi: bool) -> Result<Option<DetectedRank>> {
    let env = Variables(var);
    if env.has("RANK") {
        return env.torchrun().map(Some);
    }
    for name in ["WORLD_SIZE", "LOCAL_RANK"] {
        if let Some(value) = var(name) {
            bail!(
                "{name}={value} is set and RANK is not: set RANK, MASTER_ADDR and MASTER_PORT too, or unset {name}"
            );
        }
    }
    let open_mpi = [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ];
    let pmi = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
    let in_step = env.has("SLURM_PROCID") && env.has("SLURM_STEP_ID");
    if env.has(open_mpi[0]) {
        env.mpi("mpirun (Open MPI)", open_mpi, has_mpi)
    } else if env.has(pmi[0]) && !in_step {
        env.mpi("mpiexec (PMI)", pmi, has_mpi)
    } else if in_step {
        env.slurm()
    } else {
        Ok(None)
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn has(&self, name: &str) -> bool {
        self.0(name).is_some()
    }

    /// A number that has to be there because `because` is.
    fn number<T: std::str::FromStr>(&self, name: &str, because: &str) -> Result<T> {
        let Some(text) = self.0(name) else {
            bail!("{because} is set but {name} is not: unset {because}, or set both")
        };
        text.parse()
            .or_else(|_| bail!("{name}={text} is not a number that fits"))
    }

    fn number_or<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T> {
        if self.has(name) {
            self.number(name, name)
        } else {
            Ok(default)
        }
    }

    fn interface(&self) -> Option<String> {
        self.0("GLOO_SOCKET_IFNAME")
    }

    /// The store that `MASTER_ADDR` and `MASTER_PORT` name.
    fn store(&self, because: &str) -> Result<Rendezvous> {
        let Some(host) = self.0("MASTER_ADDR") else {
            bail!(
                "{because} is set but MASTER_ADDR is not: unset {because}, or set what torchrun sets"
            );
        };
        let launcher_serves =
            self.0("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        Ok(Rendezvous::Store {
            host,
            port: self.number("MASTER_PORT", "MASTER_ADDR")?,
            launcher_serves,
        })
    }

    fn torchrun(&self) -> Result<DetectedRank> {
        let rank = self.number("RANK", "RANK")?;
        let world_size = self.number("WORLD_SIZE", "RANK")?;
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.number_or("LOCAL_RANK", rank)?,
            local_world_size: self.number_or("LOCAL_WORLD_SIZE", world_size)?,
            rendezvous: self.store("RANK")?,
            mpi_launch: MpiLaunch::No,
            attempt: self.number_or("TORCHELASTIC_RESTART_COUNT", 0)?,
            interface: self.interface(),
            address: None,
        };
        // With as many ranks, mpirun's variables speak of the same ranks; else torchrun runs once on each of its places.
        if let (Some(theirs), Ok(size)) = (
            self.0("OMPI_COMM_WORLD_RANK"),
            self.number::<usize>("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ) && size == world_size
            && theirs != rank.to_string()
        {
            bail!(
                "RANK={rank} and OMPI_COMM_WORLD_RANK={theirs} contradict each other: unset RANK to run under mpirun"
            );
        }
        let by = if self.has("TORCHELASTIC_RUN_ID") {
            "torchrun"
        } else {
            "RANK, WORLD_SIZE and MASTER_ADDR"
        };
        check_ranks(
            env,
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
        )
        .map(|env| DetectedRank { env, by })
    }

    fn mpi(
        &self,
        by: &'static str,
        names: [&'static str; 4],
        has_mpi: bool,
    ) -> Result<Option<DetectedRank>> {
        let rank = self.number(names[0], names[0])?;
        let world_size = self.number(names[1], names[0])?;
        if world_size == 1 {
            return Ok(None);
        }
        let rendezvous = match (self.has("MASTER_ADDR"), has_mpi) {
            (true, _) => self.store("MASTER_ADDR")?,
            (false, true) => Rendezvous::Mpi,
            (false, false) => bail!(
                "{by} started this process ({}={rank}), and this moerun was built without MPI: run ./scripts/setup --mpi and build \
                 with --features mpi, or let the ranks meet over TCP: set MASTER_ADDR to the machine of rank 0 and MASTER_PORT \
                 to a free port there, for all ranks",
                names[0]
            ),
        };
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.number_or(names[2], rank)?,
            local_world_size: self.number_or(names[3], world_size)?,
            rendezvous,
            mpi_launch: MpiLaunch::Yes,
            attempt: 0,
            interface: self.interface(),
            address: None,
        };
        Ok(Some(DetectedRank {
            env: check_ranks(env, names)?,
            by,
        }))
    }

    /// Slurm's variables of a step (srun): <https://slurm.schedmd.com/srun.html>, "Output environment variables".
    fn slurm(&self) -> Result<Option<DetectedRank>> {
        let because = "SLURM_PROCID";
        let total = if self.has("SLURM_STEP_NUM_TASKS") {
            "SLURM_STEP_NUM_TASKS"
        } else {
            "SLURM_NTASKS"
        };
        let rank = self.number(because, because)?;
        let world_size = self.number(total, because)?;
        // A step of one task is a shell, or a launcher of its own.
        if world_size == 1 {
            return Ok(None);
        }
        let either =
            |step: &'static str, job: &'static str| match self.0(step).or_else(|| self.0(job)) {
                Some(value) => Ok((if self.has(step) { step } else { job }, value)),
                None => bail!(
                    "{because} is set but neither {step} nor {job} is: start the ranks by srun"
                ),
            };
        let (tasks_name, tasks) = either("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")?;
        let node: usize = self.number("SLURM_NODEID", because)?;
        let local_world_size = match tasks_per_node(&tasks) {
            Some(tasks) if tasks.iter().sum::<usize>() != world_size => {
                bail!(
                    "{tasks_name}={tasks:?} has {} tasks and {total}={world_size}",
                    tasks.iter().sum::<usize>()
                )
            }
            Some(tasks) => match tasks.get(node) {
                Some(&count) => count,
                None => bail!(
                    "SLURM_NODEID={node}, and {tasks_name} has {} nodes",
                    tasks.len()
                ),
            },
            None => bail!("{tasks_name}={tasks} is not of the form 2(x3),1"),
        };
        let (nodes_name, nodes) = either("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")?;
        let Some(nodes) = expand_node_list(&nodes) else {
            bail!("{nodes_name}={nodes} is not a list of nodes that can be read")
        };
        let host = self.0("MASTER_ADDR").unwrap_or_else(|| nodes[0].clone());
        // Steps of one job, and jobs that share a machine, keep apart.
        let job: u64 = self.number_or("SLURM_JOB_ID", 0)?;
        let step: u64 = self.number("SLURM_STEP_ID", because)?;
        let port = self.number_or("MASTER_PORT", (20_000 + (job * 13 + step) % 10_000) as u16)?;
        let env = RankEnv {
            rank,
            world_size,
            local_rank: self.number("SLURM_LOCALID", because)?,
            local_world_size,
            rendezvous: Rendezvous::Store {
                host,
                port,
                launcher_serves: false,
            },
            mpi_launch: if self.has("PMIX_RANK") || self.has("PMI_RANK") {
                MpiLaunch::Possible
            } else {
                MpiLaunch::No
            },
            attempt: 0,
            interface: self.interface(),
            address: None,
        };
        let names = [because, total, "SLURM_LOCALID", tasks_name];
        Ok(Some(DetectedRank {
            env: check_ranks(env, names)?,
            by: "srun",
        }))
    }
}

/// Refuses ranks that cannot be; `names` are the variables of rank, ranks, rank and ranks of this machine.
fn check_ranks(env: RankEnv, names: [&str; 4]) -> Result<RankEnv> {
    for (part, whole) in [(0, 1), (2, 3)] {
        let (rank, size) = [
            (env.rank, env.world_size),
            (env.local_rank, env.local_world_size),
        ][part / 2];
        if rank >= size {
            bail!(
                "{}={rank} is not below {}={size}",
                names[part],
                names[whole]
            );
        }
    }
    if env.local_world_size > env.world_size {
        bail!(
            "{}={} is more than {}={}",
            names[3],
            env.local_world_size,
            names[1],
            env.world_size
        );
    }
    Ok(env)
}

/// `2(x3),1`: tasks of each node.
fn tasks_per_node(text: &str) -> Option<Vec<usize>> {
    let mut tasks = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        tasks.extend(std::iter::repeat_n(count.parse::<usize>().ok()?, times));
    }
    Some(tasks)
}

/// `gpu[01-03,07],login`: the nodes of a Slurm node list, in order.
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
        found.extend(expand_brackets(&rest[..end])?);
        rest = rest[end..].strip_prefix(',').unwrap_or("");
    }
    (!found.is_empty()).then_some(found)
}

/// One name with any number of brackets.
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
        if high < low || high - low > 1 << 20 {
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
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn of(text: &str) -> Result<Option<DetectedRank>> {
        let pairs: BTreeMap<&str, &str> = text
            .split_whitespace()
            .map(|pair| pair.split_once('=').unwrap())
            .collect();
        detect(&|name| pairs.get(name).map(|value| value.to_string()), true)
    }

    fn place(started: &DetectedRank) -> (usize, usize, usize, usize) {
        let env = &started.env;
        (
            env.rank,
            env.world_size,
            env.local_rank,
            env.local_world_size,
        )
    }

    const SLURM: &str = "SLURM_PROCID=3 SLURM_STEP_ID=2 SLURM_STEP_NUM_TASKS=5 SLURM_LOCALID=0 SLURM_NODEID=1 \
        SLURM_TASKS_PER_NODE=3,2 SLURM_JOB_NODELIST=gpu[09-10] SLURM_JOB_ID=77";

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        assert_eq!(
            of("HOME=/root SLURM_PROCID=0 SLURM_NTASKS=4").unwrap(),
            None,
            "a batch script is no step"
        );
        let torch = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=head MASTER_PORT=29500";
        let started = of(torch).unwrap().unwrap();
        assert_eq!(
            (place(&started), started.by),
            ((5, 8, 1, 4), "RANK, WORLD_SIZE and MASTER_ADDR")
        );
        assert_eq!(
            of(&format!("{torch} TORCHELASTIC_RUN_ID=x"))
                .unwrap()
                .unwrap()
                .by,
            "torchrun"
        );
        let mpi = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let started = of(&format!("{mpi} {SLURM}")).unwrap().unwrap();
        assert_eq!(
            (place(&started), started.by),
            ((2, 4, 0, 2), "mpirun (Open MPI)"),
            "mpirun in a Slurm job"
        );
        assert_eq!(
            (started.env.rendezvous, started.env.mpi_launch),
            (Rendezvous::Mpi, MpiLaunch::Yes)
        );
        let started = of("PMI_RANK=1 PMI_SIZE=3 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=3")
            .unwrap()
            .unwrap();
        assert_eq!(
            (place(&started), started.by),
            ((1, 3, 1, 3), "mpiexec (PMI)")
        );
        let started = of(SLURM).unwrap().unwrap();
        assert_eq!((place(&started), started.by), ((3, 5, 0, 2), "srun"));
        let port = 20_000 + 77 * 13 + 2;
        assert_eq!(
            started.env.rendezvous,
            Rendezvous::Store {
                host: "gpu09".into(),
                port,
                launcher_serves: false
            }
        );
        let started = of(&format!(
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
        // torchrun once on each of two places of mpirun.
        assert_eq!(
            place(
                &of(&format!(
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
    fn one_process_is_no_group() {
        assert_eq!(
            of("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1").unwrap(),
            None
        );
        assert_eq!(
            of("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1").unwrap(),
            None
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
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
                "MASTER_PORT=99999 is not a number that fits",
            ),
            ("WORLD_SIZE=2", "WORLD_SIZE=2 is set and RANK is not"),
            (
                "OMPI_COMM_WORLD_RANK=1",
                "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not",
            ),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2",
                "RANK=0 and OMPI_COMM_WORLD_RANK=1 contradict each other",
            ),
            (
                &SLURM.replace("3,2", "3,3"),
                "SLURM_TASKS_PER_NODE=[3, 3] has 6 tasks and SLURM_STEP_NUM_TASKS=5",
            ),
            (
                &SLURM.replace("NODEID=1", "NODEID=2"),
                "SLURM_NODEID=2, and SLURM_TASKS_PER_NODE has 2 nodes",
            ),
            (
                &SLURM.replace("gpu[09-10]", "gpu[09"),
                "SLURM_JOB_NODELIST=gpu[09 is not a list",
            ),
            (
                &SLURM.replace("LOCALID=0", "LOCALID=2"),
                "SLURM_LOCALID=2 is not below SLURM_TASKS_PER_NODE=2",
            ),
        ] {
            let error = of(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let mpi = |_: &str| Some("2".to_string());
        let only = |name: &str| {
            if name.starts_with("OMPI") {
                mpi(name)
            } else {
                None
            }
        };
        let error = detect(&only, false).unwrap_err().to_string();
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_variables_give_a_rank_or_an_error(values in proptest::collection::vec(any::<Option<u8>>(), 18), has_mpi: bool) {
            let names = [
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE",
                "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID",
                "SLURM_TASKS_PER_NODE", "SLURM_JOB_NODELIST",
            ];
            let var = |name: &str| {
                if name == "MASTER_ADDR" { return Some("a".to_string()) }
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
