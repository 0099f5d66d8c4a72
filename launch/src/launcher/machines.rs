//! The machines of a run: this one, and those whose agents have joined.

use super::agent::{AgentCommand, AgentReport, Hello, HelloReply, send_line};
use super::assignment::Assignment;
use super::processes::{FailedRank, RankProcesses};
use super::spawn::{KEEPER_START_TIMEOUT, spawn_keeper};
use crate::keeper::{KeeperSettings, Ready};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How often answers are looked for.
const TICK: Duration = Duration::from_millis(10);
/// Ranks that were killed are gone within this time.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// The launcher's own machine is number 0.
pub(super) struct Machines<'a> {
    dir: PathBuf,
    local_ranks: RankProcesses<'a>,
    /// The address at which other machines reach this one; None where there are none.
    own_address: Option<IpAddr>,
    agents: Arc<Mutex<Vec<Agent>>>,
    /// Counts orders about ranks, and about keepers.
    number: u64,
    keeper_requests: u64,
    /// Ranks of the present attempt on each machine.
    assigned: Vec<Vec<usize>>,
    /// How long an agent is waited for.
    join_timeout: Duration,
    /// Signals to stop.
    signals: Arc<AtomicUsize>,
}

/// What is known of another machine.
#[derive(Default)]
struct Agent {
    /// None while it is not there.
    writer: Option<TcpStream>,
    address: Option<IpAddr>,
    number: u64,
    running: usize,
    failed: Vec<FailedRank>,
    keepers: BTreeMap<u64, Result<(i32, Ready), String>>,
}

impl<'a> Machines<'a> {
    /// This one alone.
    pub(super) fn local(
        local_ranks: RankProcesses<'a>,
        dir: &Path,
        signals: Arc<AtomicUsize>,
    ) -> Machines<'a> {
        Machines {
            dir: dir.to_path_buf(),
            local_ranks,
            own_address: None,
            agents: Arc::default(),
            number: 0,
            keeper_requests: 0,
            assigned: Vec::new(),
            join_timeout: Duration::ZERO,
            signals,
        }
    }

    /// This one, and `others`, of `per_machine` ranks each, whose agents come to `at`.
    ///
    /// # Errors
    /// When this machine cannot listen there.
    pub(super) fn listen(
        alone: Machines<'a>,
        at: SocketAddr,
        others: usize,
        per_machine: usize,
        join_timeout: Duration,
    ) -> Result<(Machines<'a>, SocketAddr)> {
        let listener = TcpListener::bind(at).map_err(|e| {
            anyhow!("cannot listen at {at}: {e}; --rdzv names a free port of the machine with --node-rank 0, which is this one")
        })?;
        let at = listener.local_addr().context("cannot see the port")?;
        let agents: Arc<Mutex<Vec<Agent>>> =
            Arc::new(Mutex::new((0..others).map(|_| Agent::default()).collect()));
        let joined = agents.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let joined = joined.clone();
                std::thread::spawn(move || serve(stream, &joined, per_machine));
            }
        });
        let mut machines = alone;
        machines.own_address = Some(at.ip());
        machines.agents = agents;
        machines.join_timeout = join_timeout;
        Ok((machines, at))
    }

    fn agents(&self) -> MutexGuard<'_, Vec<Agent>> {
        self.agents.lock()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.agents().len() + 1
    }

    /// The address of a machine for others; None where there is one machine.
    pub(super) fn address(&self, machine: usize) -> Option<IpAddr> {
        match machine {
            0 => self.own_address,
            other => self.agents().get(other - 1)?.address,
        }
    }

    /// Waits until the agents of all `wanted` machines are there.
    ///
    /// # Errors
    /// When one does not come in time: which.
    pub(super) fn wait_for(&self, wanted: &[usize]) -> Result<()> {
        let before = self.signals.load(Ordering::SeqCst);
        let began = Instant::now();
        let mut said = Instant::now();
        loop {
            let missing: Vec<String> = {
                let agents = self.agents();
                let absent =
                    |machine: &&usize| **machine > 0 && agents[**machine - 1].writer.is_none();
                // A machine is wanted once for each of its ranks.
                wanted
                    .iter()
                    .filter(absent)
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .map(usize::to_string)
                    .collect()
            };
            if missing.is_empty() {
                return Ok(());
            }
            if self.signals.load(Ordering::SeqCst) > before {
                bail!(
                    "stopped while machines {} had not joined",
                    missing.join(", ")
                );
            }
            if began.elapsed() > self.join_timeout {
                bail!(
                    "machines {} did not join within {:.0?}: start the same command there with --node-rank",
                    missing.join(", "),
                    self.join_timeout
                );
            }
            if said.elapsed() > Duration::from_secs(5) {
                eprintln!("waiting for machines {}", missing.join(", "));
                said = Instant::now();
            }
            std::thread::sleep(TICK);
        }
    }

    /// Sends an order; a machine that cannot be reached is lost, which is noticed by its ranks.
    fn send(&self, machine: usize, order: &AgentCommand) {
        let mut agents = self.agents();
        let agent = &mut agents[machine - 1];
        if let Some(writer) = &mut agent.writer
            && send_line(writer, order).is_err()
        {
            agent.writer = None;
        }
    }

    fn send_all(&self, order: &AgentCommand) {
        let others = self.agents().len();
        (1..=others).for_each(|machine| self.send(machine, order));
    }

    /// Starts ranks, each on a machine.
    pub(super) fn start(&mut self, assignments: Vec<(usize, Assignment)>) -> Result<()> {
        self.number += 1;
        let mut by_machine: Vec<Vec<Assignment>> =
            (0..=self.agents().len()).map(|_| Vec::new()).collect();
        for (machine, assignment) in assignments {
            by_machine[machine].push(assignment);
        }
        self.assigned = by_machine
            .iter()
            .map(|list| list.iter().map(|a| a.rank).collect())
            .collect();
        for (machine, assignments) in by_machine.into_iter().enumerate() {
            match machine {
                0 => self.local_ranks.start(&assignments)?,
                other => self.send(
                    other,
                    &AgentCommand::Start {
                        number: self.number,
                        assignments,
                    },
                ),
            }
        }
        Ok(())
    }

    /// Has as many processes stand by as there are ranks.
    pub(super) fn stand_by(&mut self) {
        for (machine, ranks) in self.assigned.clone().into_iter().enumerate() {
            match machine {
                0 => self.local_ranks.stand_by(ranks.len()),
                other => self.send(other, &AgentCommand::StandBy { count: ranks.len() }),
            }
        }
    }

    pub(super) fn running(&mut self) -> usize {
        let mut running = self.local_ranks.running();
        for (agent, ranks) in self.agents().iter().zip(self.assigned.iter().skip(1)) {
            let heard = agent.writer.is_some() && agent.number == self.number;
            // Until it has told otherwise they have only just been started. Those of a lost machine are no more.
            running += if heard {
                agent.running
            } else if agent.writer.is_some() {
                ranks.len()
            } else {
                0
            };
        }
        running
    }

    pub(super) fn failed(&mut self) -> Vec<FailedRank> {
        let mut failed = self.local_ranks.failed();
        for (index, (agent, ranks)) in self
            .agents()
            .iter()
            .zip(self.assigned.iter().skip(1))
            .enumerate()
        {
            match (&agent.writer, ranks.first()) {
                (None, Some(&rank)) => failed.push(FailedRank {
                    rank,
                    status: Signal::SIGKILL as i32,
                    report: None,
                    lost: Some(format!("machine {} is gone", index + 1)),
                }),
                (Some(_), _) if agent.number == self.number => {
                    failed.extend(agent.failed.iter().cloned())
                }
                _ => {}
            }
        }
        failed
    }

    pub(super) fn signal(&self, signal: Signal) {
        self.local_ranks.signal(signal);
        self.send_all(&AgentCommand::Signal {
            signal: signal as i32,
        });
    }

    /// Ends every rank that still runs, everywhere.
    pub(super) fn kill(&mut self) {
        self.end_ranks(false);
    }

    /// Those too that stand by.
    pub(super) fn kill_all(&mut self) {
        self.end_ranks(true);
    }

    fn end_ranks(&mut self, standby: bool) {
        self.number += 1;
        self.send_all(&AgentCommand::Kill {
            number: self.number,
            standby,
        });
        if standby {
            self.local_ranks.kill_all()
        } else {
            self.local_ranks.kill()
        }
        let began = Instant::now();
        // The next attempt must not meet the last one's ranks. An agent that does not do it is lost.
        loop {
            let number = self.number;
            let mut agents = self.agents();
            let busy = |agent: &&mut Agent| {
                agent.writer.is_some() && (agent.number != number || agent.running > 0)
            };
            if agents.iter_mut().find(busy).is_none() {
                break;
            }
            if began.elapsed() > KILL_TIMEOUT {
                agents.iter_mut().filter(busy).for_each(Agent::mark_lost);
                break;
            }
            drop(agents);
            std::thread::sleep(TICK);
        }
        self.assigned.iter_mut().for_each(Vec::clear);
    }

    /// Starts a keeper on a machine: its process there, and where this machine is, itself.
    pub(super) fn start_keeper(
        &mut self,
        machine: usize,
        node: usize,
        mut orders: KeeperSettings,
    ) -> Result<(i32, Ready, Option<Child>)> {
        if machine == 0 {
            if let Some(own) = self.own_address {
                orders.listen.set_ip(own);
            }
            let (child, ready) = spawn_keeper(&self.dir, node, &orders)?;
            return Ok((child.id() as i32, ready, Some(child)));
        }
        self.wait_for(&[machine])?;
        self.keeper_requests += 1;
        let number = self.keeper_requests;
        self.send(
            machine,
            &AgentCommand::Keeper {
                number,
                node,
                orders,
            },
        );
        let began = Instant::now();
        loop {
            let mut agents = self.agents();
            if let Some(started) = agents[machine - 1].keepers.remove(&number) {
                let (pid, ready) =
                    started.map_err(|reason| anyhow!("machine {machine}: {reason}"))?;
                return Ok((pid, ready, None));
            }
            if agents[machine - 1].writer.is_none() || began.elapsed() > KEEPER_START_TIMEOUT + TICK
            {
                bail!("machine {machine} did not start a keeper");
            }
            drop(agents);
            std::thread::sleep(TICK);
        }
    }

    /// Ends a keeper of another machine, if that can be reached.
    pub(super) fn kill_keeper(&self, machine: usize, pid: i32) {
        if machine > 0 && machine <= self.agents().len() {
            self.send(machine, &AgentCommand::KillKeeper { pid });
        }
    }

    /// Lets the agents go, with the launcher's own result.
    pub(super) fn end(&self, code: u8) {
        self.send_all(&AgentCommand::End { code });
    }
}

/// Whatever the reason for leaving, agents know that it is on purpose.
impl Drop for Machines<'_> {
    fn drop(&mut self) {
        self.end(1);
    }
}

impl Agent {
    fn mark_lost(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Its reader ends too.
            let _ = writer.shutdown(Shutdown::Both);
        }
    }
}

/// Hears one agent until it is gone.
fn serve(mut stream: TcpStream, agents: &Mutex<Vec<Agent>>, per_machine: usize) {
    let _ = stream.set_nodelay(true);
    let (Ok(reader), Ok(peer)) = (stream.try_clone(), stream.peer_addr()) else {
        return;
    };
    let mut lines = BufReader::new(reader).lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let Ok(hello) = serde_json::from_str::<Hello>(&first) else {
        return;
    };
    let lock = || agents.lock();
    {
        let mut agents = lock();
        let machines = agents.len() + 1;
        let refused = match &hello {
            Hello { machine, .. } if *machine == 0 || *machine >= machines => Some(format!(
                "--node-rank {machine} is none of 1 to {} that may join",
                machines - 1
            )),
            Hello { machine, .. } if agents[machine - 1].writer.is_some() => Some(format!(
                "there is a machine with --node-rank {machine} already"
            )),
            Hello { ranks, .. } if *ranks != per_machine => Some(format!(
                "it was started with -n {ranks}, and the launcher with -n {per_machine}"
            )),
            Hello { version, .. } if version != env!("CARGO_PKG_VERSION") => Some(format!(
                "it runs moerun {version} and the launcher {}: install the same version on every machine",
                env!("CARGO_PKG_VERSION")
            )),
            _ => None,
        };
        if let Some(reason) = refused {
            let _ = send_line(&mut stream, &HelloReply::Refused(reason));
            return;
        }
        if send_line(&mut stream, &HelloReply::Accepted).is_err() {
            return;
        }
        let agent = &mut agents[hello.machine - 1];
        *agent = Agent {
            writer: Some(stream),
            address: Some(peer.ip()),
            ..Agent::default()
        };
    }
    for line in lines {
        let Some(report) = line
            .ok()
            .and_then(|line| serde_json::from_str::<AgentReport>(&line).ok())
        else {
            break;
        };
        let mut agents = lock();
        let agent = &mut agents[hello.machine - 1];
        match report {
            AgentReport::Ranks {
                number,
                running,
                failed,
            } => {
                (agent.number, agent.running, agent.failed) = (number, running, failed);
            }
            AgentReport::Keeper { number, started } => drop(agent.keepers.insert(number, started)),
        }
    }
    lock()[hello.machine - 1].mark_lost();
}
