//! The machines of a run: the launcher's own, and those whose agents have joined.

use super::{
    agent_protocol::{AgentCommand, AgentReport, Hello, HelloReply, StartedKeeper, send_line},
    processes::{FailedRank, RankProcesses},
    spawn::{KEEPER_START_TIMEOUT, spawn_keeper},
};
use crate::{
    hint::{WithHint, hinted},
    keeper::{KeeperSettings, Ready},
    protocol::Assignment,
    signals::Signals,
};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use parking_lot::{Mutex, MutexGuard};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    time::{Duration, Instant},
};

const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The time within which killed ranks must be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// The time between two messages that machines are missing.
const REMINDER_INTERVAL: Duration = Duration::from_secs(5);

/// Machine 0 is the launcher's own.
pub(super) struct Machines<'a> {
    dir: PathBuf,
    local_ranks: RankProcesses<'a>,
    /// Address at which other machines reach this one; None in a run on one machine.
    own_address: Option<IpAddr>,
    agents: Arc<Mutex<Vec<Agent>>>,
    /// Number of the last command about ranks.
    number: u64,
    keeper_requests: u64,
    /// Ranks of the current generation on each machine.
    assigned: Vec<Vec<usize>>,
    join_timeout: Duration,
    signals: Signals,
}

/// The other machines that a launcher waits for.
pub(super) struct Join {
    pub(super) address: SocketAddr,
    /// Number of machines besides the launcher's.
    pub(super) others: usize,
    pub(super) ranks_per_machine: usize,
    pub(super) timeout: Duration,
}

/// A rank's assignment and the machine it runs on.
pub(super) struct PlacedRank {
    pub(super) machine: usize,
    pub(super) assignment: Assignment,
}

/// A keeper's process; `child` is None on another machine.
pub(super) struct KeeperProcess {
    pub(super) pid: i32,
    pub(super) ready: Ready,
    pub(super) child: Option<Child>,
}

/// The last report of another machine.
#[derive(Default)]
struct Agent {
    /// None while the agent is not connected.
    writer: Option<TcpStream>,
    address: Option<IpAddr>,
    number: u64,
    running: usize,
    failed: Vec<FailedRank>,
    /// Replies to keeper requests, by number.
    keepers: BTreeMap<u64, Result<StartedKeeper, String>>,
}

impl<'a> Machines<'a> {
    /// Returns the launcher's machine alone.
    pub(super) fn local(
        local_ranks: RankProcesses<'a>,
        dir: &Path,
        signals: Signals,
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

    /// Accepts the agents of other machines from now on. Returns the address it listens at.
    ///
    /// # Errors
    /// If this machine cannot listen at `join.address`.
    pub(super) fn listen(&mut self, join: &Join) -> Result<SocketAddr> {
        let address = join.address;
        let listener = TcpListener::bind(address)
            .with_context(|| format!("cannot listen at {address}"))
            .hint("--rdzv must name a free port of this machine, the one with --node-rank 0")?;
        let address = listener
            .local_addr()
            .context("cannot read the port of the listener")?;
        self.own_address = Some(address.ip());
        self.join_timeout = join.timeout;
        let agents = (0..join.others).map(|_| Agent::default()).collect();
        self.agents = Arc::new(Mutex::new(agents));
        let agents = self.agents.clone();
        let ranks_per_machine = join.ranks_per_machine;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let agents = agents.clone();
                std::thread::spawn(move || serve(stream, &agents, ranks_per_machine));
            }
        });
        Ok(address)
    }

    fn agents(&self) -> MutexGuard<'_, Vec<Agent>> {
        self.agents.lock()
    }

    pub(super) fn count(&self) -> usize {
        self.agents().len() + 1
    }

    /// Returns a machine's address for the others; None in a run on one machine.
    pub(super) fn address(&self, machine: usize) -> Option<IpAddr> {
        match machine {
            0 => self.own_address,
            other => self.agents().get(other - 1)?.address,
        }
    }

    /// Waits until the agents of all `wanted` machines have joined. Machines may be repeated.
    ///
    /// # Errors
    /// If one does not join in time, or a signal arrives.
    pub(super) fn wait_for(&self, wanted: &[usize]) -> Result<()> {
        let signals_before = self.signals.stop_count();
        let began = Instant::now();
        let mut reminded = Instant::now();
        loop {
            let missing = self.missing(wanted);
            if missing.is_empty() {
                return Ok(());
            }
            let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
            let missing = missing.join(", ");
            if self.signals.stop_count() > signals_before {
                bail!("stopped while waiting for machines {missing}");
            }
            if began.elapsed() > self.join_timeout {
                let timeout = self.join_timeout;
                return Err(hinted(
                    anyhow!("machines {missing} did not join within {timeout:.0?}"),
                    "start the same command there with --node-rank",
                ));
            }
            if reminded.elapsed() > REMINDER_INTERVAL {
                eprintln!("waiting for machines {missing}");
                reminded = Instant::now();
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn missing(&self, wanted: &[usize]) -> BTreeSet<usize> {
        let agents = self.agents();
        let is_missing = |machine: usize| machine > 0 && agents[machine - 1].writer.is_none();
        let wanted = wanted.iter().copied();
        wanted.filter(|&machine| is_missing(machine)).collect()
    }

    /// Sends a command. A machine that cannot be reached is lost, and its ranks with it.
    fn send(&self, machine: usize, command: &AgentCommand) {
        let mut agents = self.agents();
        let agent = &mut agents[machine - 1];
        if let Some(writer) = &mut agent.writer
            && send_line(writer, command).is_err()
        {
            agent.writer = None;
        }
    }

    fn send_all(&self, command: &AgentCommand) {
        for machine in 1..self.count() {
            self.send(machine, command);
        }
    }

    pub(super) fn start(&mut self, ranks: Vec<PlacedRank>) -> Result<()> {
        self.number += 1;
        let mut by_machine: Vec<Vec<Assignment>> = vec![Vec::new(); self.count()];
        for PlacedRank {
            machine,
            assignment,
        } in ranks
        {
            by_machine[machine].push(assignment);
        }
        let numbers = |assignments: &Vec<Assignment>| {
            let assignments = assignments.iter();
            assignments.map(|assignment| assignment.rank).collect()
        };
        self.assigned = by_machine.iter().map(numbers).collect();
        for (machine, assignments) in by_machine.into_iter().enumerate() {
            if machine == 0 {
                self.local_ranks.start(&assignments)?;
            } else {
                let number = self.number;
                let command = AgentCommand::Start {
                    number,
                    assignments,
                };
                self.send(machine, &command);
            }
        }
        Ok(())
    }

    /// Keeps a standby process for each rank.
    pub(super) fn stand_by(&mut self) {
        let counts: Vec<usize> = self.assigned.iter().map(Vec::len).collect();
        for (machine, count) in counts.into_iter().enumerate() {
            if machine == 0 {
                self.local_ranks.stand_by(count);
            } else {
                self.send(machine, &AgentCommand::StandBy { count });
            }
        }
    }

    pub(super) fn running(&mut self) -> usize {
        let mut running = self.local_ranks.running();
        for (agent, ranks) in self.agents().iter().zip(self.assigned.iter().skip(1)) {
            running += match &agent.writer {
                // The ranks of a lost machine are gone.
                None => 0,
                Some(_) if agent.number == self.number => agent.running,
                // The agent has not reported since their start.
                Some(_) => ranks.len(),
            };
        }
        running
    }

    pub(super) fn failed(&mut self) -> Vec<FailedRank> {
        let mut failed = self.local_ranks.failed();
        let agents = self.agents.lock();
        for (index, agent) in agents.iter().enumerate() {
            let machine = index + 1;
            let first_rank = self.assigned.get(machine).and_then(|ranks| ranks.first());
            match (&agent.writer, first_rank) {
                (None, Some(&rank)) => failed.push(FailedRank {
                    rank,
                    status: Signal::SIGKILL as i32,
                    report: None,
                    lost: Some(format!("machine {machine} is gone")),
                }),
                (Some(_), _) if agent.number == self.number => {
                    failed.extend(agent.failed.iter().cloned());
                }
                _ => {}
            }
        }
        failed
    }

    pub(super) fn signal(&self, signal: Signal) {
        self.local_ranks.signal(signal);
        let signal = signal as i32;
        self.send_all(&AgentCommand::Signal { signal });
    }

    /// Kills every rank on all machines.
    pub(super) fn kill(&mut self) {
        self.end_ranks(false);
    }

    /// Also kills the standby processes.
    pub(super) fn kill_all(&mut self) {
        self.end_ranks(true);
    }

    fn end_ranks(&mut self, standby: bool) {
        self.number += 1;
        let number = self.number;
        self.send_all(&AgentCommand::Kill { number, standby });
        if standby {
            self.local_ranks.kill_all();
        } else {
            self.local_ranks.kill();
        }
        let began = Instant::now();
        // Ranks of the next generation must not meet those of the last. An agent that does not
        // kill its ranks is lost.
        loop {
            let mut agents = self.agents();
            let busy = |agent: &&mut Agent| {
                let is_done = agent.number == number && agent.running == 0;
                agent.writer.is_some() && !is_done
            };
            let give_up = began.elapsed() > KILL_TIMEOUT;
            let mut any_busy = false;
            for agent in agents.iter_mut().filter(busy) {
                any_busy = true;
                if give_up {
                    agent.mark_lost();
                }
            }
            if !any_busy || give_up {
                break;
            }
            drop(agents);
            std::thread::sleep(POLL_INTERVAL);
        }
        for ranks in &mut self.assigned {
            ranks.clear();
        }
    }

    pub(super) fn start_keeper(
        &mut self,
        machine: usize,
        node: usize,
        mut settings: KeeperSettings,
    ) -> Result<KeeperProcess> {
        if machine > 0 {
            return self.start_remote_keeper(machine, node, settings);
        }
        if let Some(address) = self.own_address {
            settings.listen.set_ip(address);
        }
        let (child, ready) = spawn_keeper(&self.dir, node, &settings)?;
        Ok(KeeperProcess {
            pid: child.id() as i32,
            ready,
            child: Some(child),
        })
    }

    fn start_remote_keeper(
        &mut self,
        machine: usize,
        node: usize,
        settings: KeeperSettings,
    ) -> Result<KeeperProcess> {
        self.wait_for(&[machine])?;
        self.keeper_requests += 1;
        let number = self.keeper_requests;
        let command = AgentCommand::StartKeeper {
            number,
            node,
            settings,
        };
        self.send(machine, &command);
        let began = Instant::now();
        loop {
            let mut agents = self.agents();
            let agent = &mut agents[machine - 1];
            if let Some(started) = agent.keepers.remove(&number) {
                let StartedKeeper { pid, ready } =
                    started.map_err(|reason| anyhow!("machine {machine}: {reason}"))?;
                let child = None;
                return Ok(KeeperProcess { pid, ready, child });
            }
            let timed_out = began.elapsed() > KEEPER_START_TIMEOUT + POLL_INTERVAL;
            if agent.writer.is_none() || timed_out {
                bail!("machine {machine} did not start a keeper");
            }
            drop(agents);
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Kills a keeper of another machine, if that can be reached.
    pub(super) fn kill_keeper(&self, machine: usize, pid: i32) {
        if machine > 0 && machine < self.count() {
            self.send(machine, &AgentCommand::KillKeeper { pid });
        }
    }

    /// Ends the agents, which exit with the launcher's status.
    pub(super) fn end(&self, code: u8) {
        self.send_all(&AgentCommand::End { code });
    }
}

/// Tells the agents to exit, for whatever reason the launcher does.
impl Drop for Machines<'_> {
    fn drop(&mut self) {
        self.end(1);
    }
}

impl Agent {
    fn mark_lost(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Also ends the thread that reads from the connection.
            let _ = writer.shutdown(Shutdown::Both);
        }
    }

    fn take_report(&mut self, report: AgentReport) {
        match report {
            AgentReport::Ranks {
                number,
                running,
                failed,
            } => {
                self.number = number;
                self.running = running;
                self.failed = failed;
            }
            AgentReport::Keeper { number, started } => {
                self.keepers.insert(number, started);
            }
        }
    }
}

/// Receives an agent's reports until it is gone.
fn serve(mut stream: TcpStream, agents: &Mutex<Vec<Agent>>, ranks_per_machine: usize) {
    let _ = stream.set_nodelay(true);
    let Ok(reader) = stream.try_clone() else {
        return;
    };
    let Ok(peer) = stream.peer_addr() else {
        return;
    };
    let mut lines = BufReader::new(reader).lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let Ok(hello) = serde_json::from_str::<Hello>(&first) else {
        return;
    };
    {
        let mut agents = agents.lock();
        if let Some(reason) = refusal(&hello, &agents, ranks_per_machine) {
            let _ = send_line(&mut stream, &HelloReply::Refused(reason));
            return;
        }
        if send_line(&mut stream, &HelloReply::Accepted).is_err() {
            return;
        }
        agents[hello.machine - 1] = Agent {
            writer: Some(stream),
            address: Some(peer.ip()),
            ..Agent::default()
        };
    }
    for line in lines {
        let Ok(line) = line else { break };
        let Ok(report) = serde_json::from_str(&line) else {
            break;
        };
        agents.lock()[hello.machine - 1].take_report(report);
    }
    agents.lock()[hello.machine - 1].mark_lost();
}

/// Returns the reason to refuse an agent, if there is one.
fn refusal(hello: &Hello, agents: &[Agent], ranks_per_machine: usize) -> Option<String> {
    const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");
    let Hello {
        machine,
        ranks,
        version,
    } = hello;
    let last = agents.len();
    if !(1..=last).contains(machine) {
        return Some(format!("--node-rank {machine} is not between 1 and {last}"));
    }
    if agents[machine - 1].writer.is_some() {
        return Some(format!("--node-rank {machine} has already joined"));
    }
    if *ranks != ranks_per_machine {
        return Some(format!(
            "it was started with -n {ranks}, and the launcher with -n {ranks_per_machine}"
        ));
    }
    if version != OWN_VERSION {
        return Some(format!(
            "it runs moerun {version} and the launcher {OWN_VERSION}: install the same version \
             on every machine"
        ));
    }
    None
}
