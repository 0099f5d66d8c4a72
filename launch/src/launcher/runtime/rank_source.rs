//! The source of rank processes: the fork server of this machine, or new processes without it.

use super::rank_child::RankChild;
use crate::{
    environment,
    fork_server::{self, MAX_REPLY_BYTES, Reply},
    signals,
};
use anyhow::{Context, Result, anyhow, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::prctl::set_child_subreaper,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair},
};
use std::{
    collections::VecDeque,
    ffi::OsString,
    io::{PipeWriter, pipe},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// This program, even if its file was replaced since it started.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";
/// Most orders without a reply.
const MAX_ORDERS: usize = 16;
/// The time in which the server must have loaded everything. New processes would load as slowly.
const LOAD_TIMEOUT: Duration = Duration::from_secs(300);
/// The time in which the server must answer an order.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts processes that wait for a rank's assignment.
pub(super) struct RankSource {
    arguments: Vec<OsString>,
    /// None if it is turned off or has failed.
    server: Option<ForkServer>,
}

impl RankSource {
    /// Starts the fork server, if it is wanted. Its ranks get these arguments.
    pub(super) fn start(arguments: Vec<OsString>) -> RankSource {
        let mut source = RankSource::without_server(arguments);
        // The launcher has refused other values.
        if environment::wants_fork_server().unwrap_or(true) {
            match ForkServer::start(&source.arguments) {
                Ok(server) => source.server = Some(server),
                Err(error) => warn(&error),
            }
        }
        source
    }

    pub(super) fn without_server(arguments: Vec<OsString>) -> RankSource {
        RankSource {
            arguments,
            server: None,
        }
    }

    /// Number of processes that are being forked: they come, whether they are wanted or not.
    pub(super) fn ordered(&self) -> usize {
        let server = self.server.as_ref();
        server.map_or(0, |server| server.orders.len())
    }

    /// Returns the next of `wanted` processes. None while the server loads, or if it returns none
    /// until the deadline.
    ///
    /// # Errors
    /// If no process can be started.
    pub(super) fn next(&mut self, wanted: usize, deadline: Instant) -> Result<Option<RankChild>> {
        if wanted == 0 {
            return Ok(None);
        }
        if let Some(server) = &mut self.server {
            match server.next(wanted, deadline) {
                Ok(child) => return Ok(child),
                Err(error) => {
                    warn(&error);
                    self.server = None;
                }
            }
        }
        self.spawn().map(Some)
    }

    /// Starts a process that loads everything itself.
    fn spawn(&self) -> Result<RankChild> {
        let (reader, writer) = pipe().context("cannot make a rank's standard input")?;
        let child = spawn(&self.arguments, reader.into(), &[]).context("cannot start a rank")?;
        Ok(RankChild::new(child.id() as i32, writer))
    }
}

fn warn(error: &anyhow::Error) {
    eprintln!(
        "warning: the fork server of this machine: {error:#}; from now on each rank loads libtorch \
         itself, which takes longer"
    );
}

/// Starts this program again, outside the terminal's process group: Ctrl-C reaches only the
/// launcher, which stops the ranks in order.
fn spawn(
    arguments: &[OsString],
    stdin: OwnedFd,
    variables: &[(&str, &str)],
) -> std::io::Result<Child> {
    let mut command = Command::new(OWN_PROGRAM);
    command
        .arg0("moerun")
        .args(arguments)
        .env(environment::LAUNCHER_PID, std::process::id().to_string())
        .envs(variables.iter().copied())
        .stdin(Stdio::from(stdin))
        .process_group(0);
    signals::while_held(|| command.spawn())
}

/// The process of [`fork_server`], seen from this one.
struct ForkServer {
    process: Child,
    socket: OwnedFd,
    /// The time at which it was started.
    began: Instant,
    is_ready: bool,
    /// Orders without a reply. Their processes exit if this end of their input is closed.
    orders: VecDeque<Order>,
}

struct Order {
    stdin: PipeWriter,
    sent: Instant,
}

impl ForkServer {
    fn start(arguments: &[OsString]) -> Result<ForkServer> {
        // The server's copies become children of this process.
        set_child_subreaper(true).context("cannot adopt processes")?;
        let flags = SocketFlags::CLOEXEC;
        let (socket, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .context("cannot make a socket")?;
        let variables = [(environment::FORKS_RANKS, "1")];
        let process = spawn(arguments, other, &variables).context("cannot be started")?;
        Ok(ForkServer {
            process,
            socket,
            began: Instant::now(),
            is_ready: false,
            orders: VecDeque::new(),
        })
    }

    /// Keeps up to `wanted` orders outstanding and returns the process of the oldest.
    fn next(&mut self, wanted: usize, deadline: Instant) -> Result<Option<RankChild>> {
        if !self.is_ready {
            match self.receive(None)? {
                Some(Reply::Ready) => self.is_ready = true,
                Some(reply) => bail!("unexpected reply {reply:?}"),
                None if self.began.elapsed() > LOAD_TIMEOUT => {
                    bail!("did not load everything within {LOAD_TIMEOUT:?}")
                }
                None => return Ok(None),
            }
        }
        while self.orders.len() < wanted.min(MAX_ORDERS) && self.order()? {}
        match self.receive(Some(deadline))? {
            Some(Reply::Forked(pid)) => self.adopt(pid).map(Some),
            Some(Reply::Failed(reason)) => bail!(reason),
            Some(Reply::Ready) => bail!("it started twice"),
            None => {
                let oldest = self.orders.front();
                if oldest.is_some_and(|oldest| oldest.sent.elapsed() > REPLY_TIMEOUT) {
                    bail!("no reply within {REPLY_TIMEOUT:?}");
                }
                Ok(None)
            }
        }
    }

    /// Orders a process. Returns false if the server has to catch up first.
    fn order(&mut self) -> Result<bool> {
        let (reader, stdin) = pipe().context("cannot make a rank's standard input")?;
        let is_sent = fork_server::order(&self.socket, &reader);
        if !is_sent.map_err(|error| self.gone(error))? {
            return Ok(false);
        }
        let sent = Instant::now();
        self.orders.push_back(Order { stdin, sent });
        Ok(true)
    }

    fn adopt(&mut self, pid: i32) -> Result<RankChild> {
        let order = self.orders.pop_front();
        let order = order.context("it forked a process without an order")?;
        let mut child = RankChild::new(pid, order.stdin);
        child
            .try_wait()
            .context("its processes are not adopted by this one")?;
        Ok(child)
    }

    /// Returns the next reply, or None if there is none until the deadline.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Reply>> {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            // An interrupted wait is a short one.
            let _ = poll(
                &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)],
                timeout,
            );
        }
        let mut bytes = [0; MAX_REPLY_BYTES];
        match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(self.gone(Errno::CONNRESET)),
            Ok((_, length)) => {
                let reply = serde_json::from_slice(&bytes[..length.min(MAX_REPLY_BYTES)]);
                reply.map(Some).context("unexpected reply")
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(self.gone(error)),
        }
    }

    /// Returns the reason why the connection failed: the server's end, if it has one.
    fn gone(&mut self, error: Errno) -> anyhow::Error {
        let _ = self.process.kill();
        match self.process.wait() {
            Ok(status) => anyhow!("it ended ({status})"),
            Err(_) => anyhow!("the connection failed: {error}"),
        }
    }
}

impl Drop for ForkServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use rustix::net::{SendFlags, send};

    fn sleeping() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    /// Returns a server whose side of the socket is the test's.
    fn played() -> (ForkServer, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (socket, other) = pair.unwrap();
        let server = ForkServer {
            process: sleeping(),
            socket,
            began: Instant::now(),
            is_ready: false,
            orders: VecDeque::new(),
        };
        (server, other)
    }

    fn say(other: &OwnedFd, reply: &Reply) {
        let text = serde_json::to_vec(reply).unwrap();
        send(other, &text, SendFlags::empty()).unwrap();
    }

    #[test]
    fn a_server_that_loads_slowly_holds_nothing_up() {
        let (mut server, other) = played();
        let began = Instant::now();
        let deadline = began + Duration::from_secs(60);
        assert!(server.next(3, deadline).unwrap().is_none());
        assert!(server.orders.is_empty() && began.elapsed() < Duration::from_secs(30));
        let mut process = sleeping();
        let pid = process.id();
        say(&other, &Reply::Ready);
        say(&other, &Reply::Forked(pid as i32));
        let rank = server.next(3, deadline).unwrap().expect("it is forked");
        assert_eq!((rank.id(), server.orders.len()), (pid, 2));
        rank.signal(Signal::SIGKILL);
        process.wait().unwrap();
        drop(other);
        let error = server.next(2, deadline).err().unwrap().to_string();
        assert!(error.starts_with("it ended"), "{error}");
    }

    #[test]
    fn a_process_of_another_parent_is_refused() {
        let (mut server, other) = played();
        let deadline = Instant::now() + Duration::from_secs(60);
        say(&other, &Reply::Ready);
        say(&other, &Reply::Forked(1));
        let error = server.next(1, deadline).err().unwrap().to_string();
        assert_eq!(error, "its processes are not adopted by this one");
    }
}
