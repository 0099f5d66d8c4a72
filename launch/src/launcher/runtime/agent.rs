//! Agent: starts ranks and keepers on a remote machine for the launcher, which decides everything.
//!
//! An agent that loses its launcher ends its ranks, preserves its keepers, and waits for another
//! launcher.

use super::{
    machine::{Machine, ORPHAN_TIMEOUT},
    machine_protocol::{HEARTBEAT_INTERVAL, Hello, HelloReply, MachineCommand, MachineReport},
    queue::Queue,
};
use crate::{
    cli::TrainArgs,
    config_file,
    hint::{self, hinted},
    launcher::{identity::machine_identity, token},
    signals::{Signals, StopMode},
};
use anyhow::{Context, Result, anyhow, bail};
use checkpoint::{
    run_folder::RunFolder,
    secure::{Connection, Error, FrameReader, FrameWriter, Purpose, Secret, connect_tcp},
};
use std::{
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

/// The launcher may start after its agents.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(600);
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest `restart.heartbeat_timeout_s` that the configuration allows.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(1_000_000_000);
/// The time after which an agent says that it waits for the launcher.
const SILENT_WAIT: Duration = Duration::from_secs(5);

/// Runs the agent of `machine` until the launcher at `head` ends the run.
pub(crate) fn run(
    args: &TrainArgs,
    machine: usize,
    head: &str,
    signals: &Signals,
) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    let dir = config.run.dir.clone();
    RunFolder::create_inside(&dir.join("logs"))?;
    signals.set_mode(StopMode::Count);
    let mut agent = Agent {
        args,
        dir,
        head,
        number: machine,
        signals,
        machine: None,
        taken_since: None,
        stops: 0,
    };
    let mut timeout = RENDEZVOUS_TIMEOUT;
    loop {
        let session = match agent.join(timeout) {
            Ok(session) => session,
            Err(error) if signals.stop_count() > 0 => {
                eprintln!("error: {}", hint::message(&error));
                return Ok(ExitCode::from(signals.exit_status()));
            }
            Err(error) => return Err(error),
        };
        if let Some(status) = agent.serve(session)? {
            return Ok(ExitCode::from(status));
        }
        // Keepers stay: another launcher may continue from their memory.
        timeout = ORPHAN_TIMEOUT;
    }
}

struct Agent<'a> {
    args: &'a TrainArgs,
    dir: PathBuf,
    head: &'a str,
    /// Number of this machine.
    number: usize,
    signals: &'a Signals,
    /// None until the first launcher has accepted this machine.
    machine: Option<Machine>,
    /// The time at which another agent first had this machine's number.
    taken_since: Option<Instant>,
    /// Number of signals that a launcher was told of.
    stops: usize,
}

/// A connection to a launcher.
struct Session {
    commands: Queue<Option<MachineCommand>>,
    writer: FrameWriter<TcpStream>,
}

impl Agent<'_> {
    /// Connects to a launcher that accepts this machine.
    fn join(&mut self, timeout: Duration) -> Result<Session> {
        let began = Instant::now();
        let mut announced = false;
        loop {
            let error = match self.try_join()? {
                Ok(session) => return Ok(session),
                Err(error) => error,
            };
            let head = self.head;
            if self.signals.stop_count() > self.stops {
                bail!("stopped while waiting for the launcher at {head}");
            }
            if began.elapsed() > timeout {
                return Err(hinted(
                    anyhow!("no launcher answers at {head}: {error}"),
                    "start moerun with --node-rank 0 there",
                ));
            }
            if !announced && began.elapsed() > SILENT_WAIT {
                eprintln!("waiting for the launcher at {head} ({error})");
                announced = true;
            }
            std::thread::sleep(RECONNECT_INTERVAL);
        }
    }

    /// Returns the reason if no launcher answers yet. The error is one that waiting does not cure.
    fn try_join(&mut self) -> Result<Result<Session, String>> {
        let head = self.head;
        let secret = match token::find(self.args, &self.dir)? {
            Some(secret) => secret,
            None => return Ok(Err(token::missing(&self.dir))),
        };
        let addresses = head.to_socket_addrs();
        let Some(address) = addresses.ok().and_then(|mut found| found.next()) else {
            return Ok(Err(format!("the name of {head} cannot be resolved")));
        };
        let mut connection = match connect_tcp(address, &secret, Purpose::AGENT, CONNECT_TIMEOUT) {
            Ok(connection) => connection,
            Err(Error::Unauthenticated) => {
                return Ok(Err(format!("the token differs: {}", token::advice())));
            }
            Err(error) => return Ok(Err(error.to_string())),
        };
        let own = connection.socket().local_addr();
        let own = own.context("cannot read this machine's address")?.ip();
        let greeted = connection
            .send(&self.hello())
            .and_then(|()| connection.receive(Some(CONNECT_TIMEOUT)));
        match greeted {
            Err(error) => Ok(Err(error.to_string())),
            Ok(HelloReply::Taken { timeout_s }) => match seconds(timeout_s) {
                Ok(timeout) => self.taken(timeout).map(Err),
                Err(reason) => Ok(Err(reason)),
            },
            Ok(HelloReply::Refused(reason)) if self.machine.is_some() => Ok(Err(reason)),
            Ok(HelloReply::Refused(reason)) => {
                bail!("the launcher at {head} refused this machine: {reason}")
            }
            Ok(HelloReply::Accepted { timeout_s }) => match seconds(timeout_s) {
                Ok(timeout) => {
                    self.accepted(own, address, secret);
                    Ok(Ok(Session::start(connection, timeout)?))
                }
                Err(reason) => Ok(Err(reason)),
            },
        }
    }

    fn hello(&self) -> Hello {
        let machine = self.machine.as_ref();
        Hello {
            machine: self.number,
            ranks: self.args.nproc_per_node,
            version: env!("CARGO_PKG_VERSION").to_string(),
            identity: machine_identity(),
            keepers: machine.map_or(Vec::new(), Machine::keepers),
        }
    }

    /// Returns the reason to try again, for as long as the launcher may not have noticed that an
    /// earlier agent of this machine is gone.
    fn taken(&mut self, timeout: Duration) -> Result<String> {
        let timeout = timeout + CONNECT_TIMEOUT;
        let since = *self.taken_since.get_or_insert_with(Instant::now);
        let reason = format!("--node-rank {} has already joined", self.number);
        if since.elapsed() > timeout {
            let head = self.head;
            bail!("the launcher at {head} refused this machine: {reason}");
        }
        Ok(reason)
    }

    fn accepted(&mut self, own: IpAddr, launcher: SocketAddr, secret: Secret) {
        let number = self.number;
        self.taken_since = None;
        eprintln!("machine {number} ({own}) joined the launcher at {launcher}");
        match &mut self.machine {
            Some(machine) => machine.serve_another(secret),
            None => {
                let limit = self.args.nproc_per_node;
                let machine = Machine::new(self.args, &self.dir, secret, Some(own), limit);
                self.machine = Some(machine);
            }
        }
    }

    /// Returns the status to exit with, or None if the launcher is gone.
    fn serve(&mut self, mut session: Session) -> Result<Option<u8>> {
        let head = self.head;
        let machine = self
            .machine
            .as_mut()
            .context("no launcher has accepted this machine")?;
        let mut last_sent = Instant::now();
        let gone = loop {
            match session.commands.pop(machine.poll_interval()) {
                Some(Some(MachineCommand::End { status })) => {
                    machine.kill_ranks();
                    return Ok(Some(status));
                }
                Some(Some(command)) => machine.handle(command),
                Some(None) => break "the connection was closed".to_string(),
                None => {}
            }
            let mut reports = machine.reports();
            let count = self.signals.stop_count();
            if let (true, Some(signal)) = (count > self.stops, self.signals.last_stop()) {
                self.stops = count;
                let signal = signal as i32;
                reports.push(MachineReport::Stop { signal, count });
            }
            if self.signals.take_checkpoint_requests() > 0 {
                reports.push(MachineReport::CheckpointWanted);
            }
            if reports.is_empty() && last_sent.elapsed() >= HEARTBEAT_INTERVAL {
                reports.push(MachineReport::Heartbeat);
            }
            let sent = reports.iter().try_for_each(|report| {
                last_sent = Instant::now();
                session.writer.send(report)
            });
            if let Err(error) = sent {
                break error.to_string();
            }
        };
        let _ = session.writer.socket().shutdown(Shutdown::Both);
        machine.kill_ranks();
        if self.signals.stop_count() > 0 {
            let status = self.signals.exit_status();
            eprintln!("error: the launcher at {head} is gone ({gone})");
            return Ok(Some(status));
        }
        eprintln!(
            "the launcher at {head} is gone ({gone}): ended the ranks of this machine; its keepers \
             stay for an hour, and this agent waits for another launcher"
        );
        Ok(None)
    }
}

impl Session {
    fn start(connection: Connection<TcpStream>, timeout: Duration) -> Result<Session> {
        let Connection { reader, writer } = connection;
        let commands = Queue::new();
        let received = commands.clone();
        std::thread::Builder::new()
            .name("commands".into())
            .spawn(move || receive_commands(reader, timeout, &received))
            .context("cannot start a thread")?;
        Ok(Session { commands, writer })
    }
}

/// Returns a launcher's timeout, which is in the range of the configuration's.
fn seconds(timeout_s: f64) -> Result<Duration, String> {
    let timeout = Duration::try_from_secs_f64(timeout_s).ok();
    timeout
        .filter(|timeout| !timeout.is_zero() && *timeout <= LONGEST_TIMEOUT)
        .ok_or_else(|| format!("its timeout of {timeout_s} s is out of range"))
}

/// Passes commands on until the connection ends, or the launcher gives no sign of life.
fn receive_commands(
    mut reader: FrameReader<TcpStream>,
    timeout: Duration,
    commands: &Queue<Option<MachineCommand>>,
) {
    while let Ok(command) = reader.receive(Some(timeout)) {
        commands.push(Some(command));
    }
    commands.push(None);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launchers_timeout_has_a_range() {
        for wrong in [-1.0, 0.0, 1e10, 1e300, f64::NAN, f64::INFINITY] {
            let error = seconds(wrong).unwrap_err();
            assert!(error.contains("out of range"), "{error}");
        }
        assert_eq!(seconds(10.0), Ok(Duration::from_secs(10)));
        assert_eq!(seconds(1e9), Ok(LONGEST_TIMEOUT));
    }
}
