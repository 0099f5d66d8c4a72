//! Sockets of both kinds, and operations on them that end by a deadline.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

/// Longest overrun of a deadline. The system's timeout changes only beyond it, so that a fast peer
/// costs no system calls.
const SLACK: Duration = Duration::from_millis(5);

/// The origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerAddress {
    Ip(IpAddr),
    /// A process of this machine, by user id.
    User(u32),
}

/// The address of a server, as both ends of a connection see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Tcp(SocketAddr),
    /// A Unix socket: only processes of this user can reach the server.
    Local,
}

impl Endpoint {
    /// Returns the bytes that stand for it in proofs: address and port. An IPv4 address has the
    /// same ones at an IPv6 socket; scopes are left out, since each machine has its own numbers.
    pub(super) fn to_bytes(self) -> [u8; 18] {
        let mut bytes = [0; 18];
        if let Endpoint::Tcp(address) = self {
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            bytes[..16].copy_from_slice(&ip.octets());
            bytes[16..].copy_from_slice(&address.port().to_be_bytes());
        }
        bytes
    }
}

/// A stream socket, which several threads may use at once.
pub trait Socket: AsFd + Send + Sync + 'static {
    /// Returns the address of the server if this is its end of the connection.
    ///
    /// # Errors
    /// If the system refuses.
    fn own_endpoint(&self) -> io::Result<Endpoint>;

    /// Returns the address of the server if this is the client's end of the connection.
    ///
    /// # Errors
    /// If the connection is closed.
    fn peer_endpoint(&self) -> io::Result<Endpoint>;

    /// Reads what has arrived, up to the length of `into`.
    ///
    /// # Errors
    /// As [`Read::read`].
    fn read_some(&self, into: &mut [u8]) -> io::Result<usize>;

    /// Writes as many bytes as the system takes.
    ///
    /// # Errors
    /// As [`Write::write`].
    fn write_some(&self, from: &[u8]) -> io::Result<usize>;

    /// Sets how long one read may take.
    ///
    /// # Errors
    /// If the system refuses.
    fn set_read_limit(&self, limit: Option<Duration>) -> io::Result<()>;

    /// Sets how long one write may take.
    ///
    /// # Errors
    /// If the system refuses.
    fn set_write_limit(&self, limit: Option<Duration>) -> io::Result<()>;

    /// Makes operations that would wait fail instead.
    ///
    /// # Errors
    /// If the system refuses.
    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()>;

    /// Prepares an authenticated socket for messages.
    ///
    /// # Errors
    /// If the system refuses.
    fn prepare(&self) -> io::Result<()>;

    /// Ends the connection in both directions; a thread that waits for it wakes up.
    fn close(&self);
}

impl Socket for TcpStream {
    fn own_endpoint(&self) -> io::Result<Endpoint> {
        self.local_addr().map(Endpoint::Tcp)
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.peer_addr().map(Endpoint::Tcp)
    }

    fn read_some(&self, into: &mut [u8]) -> io::Result<usize> {
        (&*self).read(into)
    }

    fn write_some(&self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn set_read_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }

    fn set_write_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_write_timeout(limit)
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        TcpStream::set_nonblocking(self, nonblocking)
    }

    fn prepare(&self) -> io::Result<()> {
        use nix::sys::socket::{setsockopt, sockopt};
        self.set_nodelay(true)?;
        // Without these a peer whose machine is off would be waited for without end.
        setsockopt(self, sockopt::KeepAlive, &true)?;
        setsockopt(self, sockopt::TcpKeepIdle, &30)?;
        setsockopt(self, sockopt::TcpKeepInterval, &10)?;
        setsockopt(self, sockopt::TcpKeepCount, &6)?;
        Ok(())
    }

    fn close(&self) {
        // It fails if the peer was first.
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Socket for UnixStream {
    fn own_endpoint(&self) -> io::Result<Endpoint> {
        Ok(Endpoint::Local)
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        Ok(Endpoint::Local)
    }

    fn read_some(&self, into: &mut [u8]) -> io::Result<usize> {
        (&*self).read(into)
    }

    fn write_some(&self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn set_read_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }

    fn set_write_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_write_timeout(limit)
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        UnixStream::set_nonblocking(self, nonblocking)
    }

    fn prepare(&self) -> io::Result<()> {
        Ok(())
    }

    fn close(&self) {
        // It fails if the peer was first.
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// The system's timeout of one direction of a socket, as it was last set.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Armed(Option<Duration>);

impl Armed {
    /// Returns the state after the limit was set to this.
    pub(super) fn at(limit: Duration) -> Armed {
        Armed(Some(limit))
    }

    /// Returns the limit to set so that one operation ends by `deadline`, if it must change. An
    /// operation that ends early is repeated, so only a longer limit is wrong.
    fn change(&mut self, deadline: Instant, now: Instant) -> io::Result<Option<Duration>> {
        let left = deadline.saturating_duration_since(now);
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let suffices = self.0.is_some_and(|armed| armed <= left + SLACK);
        // A much shorter limit would wake the thread again and again.
        let is_close = self.0.is_some_and(|armed| armed >= left / 8);
        if suffices && is_close {
            return Ok(None);
        }
        self.0 = Some(left);
        Ok(self.0)
    }
}

/// Reads of a socket that end by a deadline.
pub(super) struct DeadlineReader<'a, S> {
    pub(super) socket: &'a S,
    pub(super) armed: &'a mut Armed,
    /// None to wait without end.
    pub(super) deadline: Option<Instant>,
}

impl<S: Socket> Read for DeadlineReader<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(deadline) = self.deadline
                && let Some(limit) = self.armed.change(deadline, Instant::now())?
            {
                self.socket.set_read_limit(Some(limit))?;
            }
            match self.socket.read_some(into) {
                Err(error) if is_early_end(&error) => {}
                result => return result,
            }
        }
    }
}

/// Writes to a socket that end by a deadline.
pub(super) struct DeadlineWriter<'a, S> {
    pub(super) socket: &'a S,
    pub(super) armed: &'a mut Armed,
    pub(super) deadline: Instant,
}

impl<S: Socket> Write for DeadlineWriter<'_, S> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        loop {
            if let Some(limit) = self.armed.change(self.deadline, Instant::now())? {
                self.socket.set_write_limit(Some(limit))?;
            }
            match self.socket.write_some(from) {
                Err(error) if is_early_end(&error) => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// True if an operation ended because of a signal or the system's timeout.
fn is_early_end(error: &io::Error) -> bool {
    let kind = error.kind();
    kind == ErrorKind::Interrupted || kind == ErrorKind::WouldBlock || kind == ErrorKind::TimedOut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_peer_does_not_extend_the_deadline() {
        let (reader, writer) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            while writer.write_some(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        let mut armed = Armed::default();
        let mut timed = DeadlineReader {
            socket: &reader,
            armed: &mut armed,
            deadline: Some(start + Duration::from_millis(200)),
        };
        let error = timed.read_exact(&mut [0; 1000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let took = start.elapsed();
        assert!(
            took >= Duration::from_millis(200) && took < Duration::from_secs(2),
            "{took:?}"
        );
    }
}
