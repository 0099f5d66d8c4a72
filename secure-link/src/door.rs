//! Accepting connections: one thread per port holds all that are not authenticated yet.

use super::{
    descriptors::Descriptors,
    error::Error,
    frame::Connection,
    greeting::{Greeting, Verdict, acceptance},
    pace::{self, Pace},
    places::Places,
    proof::{BUSY, DENIED, HELLO_LEN, Session, Side},
    purpose::Purpose,
    refusals::{Refusal, RefusalCounts, Refusals},
    secret::{self, Secret},
    socket::{PeerAddress, Socket},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Backlog, getsockopt, listen, sockopt::PeerCredentials},
    unistd::Uid,
};
use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A pause after an accept that failed, for instance for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Interval of the log lines about refusals.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Connections that the system may hold until they are accepted.
const BACKLOG: i32 = 512;
/// Connections that are accepted before others are looked at.
const MAX_ACCEPTS: usize = 32;

/// The limits of a [`Door`].
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections that are not authenticated yet.
    pub unauthenticated: usize,
    /// Most connections that are authenticated.
    pub authenticated: usize,
    /// The time for a whole handshake.
    pub handshake_timeout: Duration,
    /// Number of file descriptors that connections leave free.
    pub reserved_descriptors: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            unauthenticated: 128,
            authenticated: 4096,
            handshake_timeout: Duration::from_secs(5),
            reserved_descriptors: 64,
        }
    }
}

/// A socket that connections arrive at.
pub trait Listener: AsFd + Send + 'static {
    type Socket: Socket;

    /// Accepts a connection, if one waits. Returns the reason if it must be refused at once.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if none waits.
    fn accept_one(&self) -> io::Result<Result<Arrival<Self::Socket>, Refusal>>;
}

/// A connection that has just arrived.
#[derive(Debug)]
pub struct Arrival<S> {
    pub(super) socket: S,
    pub(super) address: PeerAddress,
}

impl Listener for TcpListener {
    type Socket = TcpStream;

    fn accept_one(&self) -> io::Result<Result<Arrival<TcpStream>, Refusal>> {
        let (socket, peer) = self.accept()?;
        let address = PeerAddress::Ip(peer.ip());
        Ok(Ok(Arrival { socket, address }))
    }
}

impl Listener for UnixListener {
    type Socket = UnixStream;

    fn accept_one(&self) -> io::Result<Result<Arrival<UnixStream>, Refusal>> {
        let (socket, _) = self.accept()?;
        let Ok(peer) = getsockopt(&socket, PeerCredentials) else {
            return Ok(Err(Refusal::Closed));
        };
        if peer.uid() != Uid::effective().as_raw() {
            return Ok(Err(Refusal::OtherUser));
        }
        let address = PeerAddress::User(peer.uid());
        Ok(Ok(Arrival { socket, address }))
    }
}

/// An authenticated connection and its origin.
#[derive(Debug)]
pub struct Admitted<S> {
    pub connection: Connection<S>,
    pub address: PeerAddress,
    /// To be kept as long as the connection.
    pub ticket: Ticket,
}

/// A port at which authenticated peers are admitted, until this is dropped. Connections that were
/// admitted stay.
#[derive(Debug)]
pub struct Door {
    refusals: Arc<Refusals>,
    /// Its other end belongs to the thread, which ends when this one is closed.
    _open: UnixStream,
}

impl Door {
    /// Starts the thread that accepts connections at `listener`. It calls `serve` with each peer
    /// that proves the secret, in a thread of its own.
    ///
    /// # Errors
    /// If the system cannot configure the listener or start the thread.
    pub fn open<L: Listener>(
        listener: L,
        secret: Secret,
        purpose: Purpose,
        limits: Limits,
        serve: impl Fn(Admitted<L::Socket>) + Send + Sync + 'static,
    ) -> Result<Door, Error> {
        let flags = nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        let (open, closed) = UnixStream::pair()?;
        let refusals = Arc::new(Refusals::default());
        let now = Instant::now();
        let porter = Porter {
            listener,
            closed,
            secret,
            purpose,
            limits,
            serve: Arc::new(serve),
            authenticated: Arc::default(),
            refusals: refusals.clone(),
            places: Places::new(limits.unauthenticated, limits.handshake_timeout),
            pace: Pace::new(now),
            descriptors: Descriptors::new(limits.reserved_descriptors),
            waiting: BTreeMap::new(),
            next_key: 0,
            resume_at: now,
            log: RefusalLog {
                next: now,
                logged: RefusalCounts::default(),
            },
        };
        thread::Builder::new()
            .name(format!("{} door", purpose.label))
            .spawn(move || porter.run())?;
        Ok(Door {
            refusals,
            _open: open,
        })
    }

    /// Returns the counts of refused connections.
    pub fn refusals(&self) -> &Arc<Refusals> {
        &self.refusals
    }
}

/// A connection whose peer has not proven the secret yet.
struct Waiting<S> {
    socket: S,
    address: PeerAddress,
    greeting: Greeting,
}

/// The thread of a door.
struct Porter<L: Listener, F> {
    listener: L,
    /// Readable once the [`Door`] is dropped.
    closed: UnixStream,
    secret: Secret,
    purpose: Purpose,
    limits: Limits,
    serve: Arc<F>,
    /// Number of authenticated connections.
    authenticated: Arc<AtomicUsize>,
    refusals: Arc<Refusals>,
    places: Places,
    pace: Pace,
    descriptors: Descriptors,
    waiting: BTreeMap<u64, Waiting<L::Socket>>,
    next_key: u64,
    /// No connection is accepted before this time.
    resume_at: Instant,
    log: RefusalLog,
}

/// The result of a wait of the thread.
struct Woken {
    is_closed: bool,
    has_arrivals: bool,
    /// Keys of connections on which bytes have arrived.
    ready: Vec<u64>,
}

impl<L, F> Porter<L, F>
where
    L: Listener,
    F: Fn(Admitted<L::Socket>) + Send + Sync + 'static,
{
    fn run(mut self) {
        loop {
            let Woken {
                is_closed,
                has_arrivals,
                ready,
            } = self.wait();
            if is_closed {
                return;
            }
            for key in ready {
                self.read(key);
            }
            for key in self.places.expire(Instant::now()) {
                self.refuse(key, Refusal::TimedOut);
            }
            if has_arrivals {
                self.accept_some();
            }
            self.log.write(&self.refusals, self.purpose, Instant::now());
        }
    }

    /// Waits for a connection, bytes, a deadline or the end of the door.
    fn wait(&self) -> Woken {
        let now = Instant::now();
        let accepts = now >= self.resume_at;
        let mut wake = self.places.next_deadline();
        let others = [
            (!accepts).then_some(self.resume_at),
            self.log.due(&self.refusals),
        ];
        for time in others.into_iter().flatten() {
            wake = Some(wake.map_or(time, |wake| wake.min(time)));
        }
        let timeout = wake.map_or(PollTimeout::NONE, |time| {
            let left = time.saturating_duration_since(now);
            let millis = left.as_millis().min(60_000) as u16;
            PollTimeout::from(millis.saturating_add(1))
        });
        let listened = if accepts {
            PollFlags::POLLIN
        } else {
            PollFlags::empty()
        };
        let mut polled = vec![
            PollFd::new(self.closed.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), listened),
        ];
        for waiting in self.waiting.values() {
            polled.push(PollFd::new(waiting.socket.as_fd(), PollFlags::POLLIN));
        }
        if poll(&mut polled, timeout).is_err() {
            // A signal, or too little memory for a moment.
            thread::sleep(Duration::from_millis(1));
        }
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let ready = self.waiting.keys().zip(&polled[2..]);
        Woken {
            is_closed: is_ready(&polled[0]),
            has_arrivals: accepts && is_ready(&polled[1]),
            ready: ready
                .filter(|(_, fd)| is_ready(fd))
                .map(|(&key, _)| key)
                .collect(),
        }
    }

    fn accept_some(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            let now = Instant::now();
            if let Some(pause) = self.pace.pause(now) {
                self.resume_at = now + pause;
                return;
            }
            match self.listener.accept_one() {
                Ok(Ok(arrival)) => self.greet(arrival, now),
                Ok(Err(refusal)) => {
                    self.pace.spend(pace::CHEAP);
                    self.refusals.count(refusal);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.on_failed_accept(&error, now),
            }
        }
    }

    /// Frees a place in the backlog if descriptors are used up, and pauses.
    fn on_failed_accept(&mut self, error: &io::Error, now: Instant) {
        let number = Errno::from_raw(error.raw_os_error().unwrap_or(0));
        if matches!(number, Errno::EMFILE | Errno::ENFILE) {
            let listener = &self.listener;
            self.descriptors
                .use_spare(|| drop(listener.accept_one().map(drop)));
            self.refusals.count(Refusal::NoDescriptor);
            self.resume_at = now + ACCEPT_PAUSE;
        } else if !matches!(number, Errno::ECONNABORTED | Errno::EINTR) {
            self.resume_at = now + ACCEPT_PAUSE;
        }
    }

    /// Sends a new connection the first message and gives it a place.
    fn greet(&mut self, arrival: Arrival<L::Socket>, now: Instant) {
        let Arrival { socket, address } = arrival;
        self.pace.spend(1.0);
        if self.descriptors.is_reserved(socket.as_fd().as_raw_fd()) {
            let _ = socket.set_nonblocking(true);
            let _ = socket.write_some(BUSY);
            return self.refusals.count(Refusal::NoDescriptor);
        }
        let Ok(nonce) = secret::random_bytes() else {
            return self.refusals.count(Refusal::NoThread);
        };
        let Ok(endpoint) = socket.own_endpoint() else {
            return self.refusals.count(Refusal::Closed);
        };
        let greeting = Greeting::new(nonce, endpoint);
        let hello = greeting.hello();
        // The buffer of a new socket has room for this.
        let sent = socket
            .set_nonblocking(true)
            .and_then(|()| socket.write_some(&hello));
        if !sent.is_ok_and(|len| len == HELLO_LEN) {
            return self.refusals.count(Refusal::Closed);
        }
        let key = self.next_key;
        self.next_key += 1;
        if let Some(evicted) = self.places.enter(key, address, now) {
            self.refuse(evicted, Refusal::Evicted);
        }
        let waiting = Waiting {
            socket,
            address,
            greeting,
        };
        self.waiting.insert(key, waiting);
    }

    /// Reads what has arrived of a handshake.
    fn read(&mut self, key: u64) {
        let Some(waiting) = self.waiting.get_mut(&key) else {
            return;
        };
        let missing = waiting.greeting.missing();
        let len = match waiting.socket.read_some(missing) {
            Ok(0) => return self.refuse(key, Refusal::Closed),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == ErrorKind::Interrupted => return,
            Err(_) => return self.refuse(key, Refusal::Closed),
        };
        match waiting.greeting.receive(len, &self.secret, self.purpose) {
            Verdict::Incomplete => {}
            Verdict::Refused(refusal) => self.refuse(key, refusal),
            Verdict::Accepted(session) => self.admit(key, &session),
        }
    }

    fn take(&mut self, key: u64) -> Option<Waiting<L::Socket>> {
        self.places.leave(key);
        self.waiting.remove(&key)
    }

    /// Closes a connection with a message about the reason.
    fn refuse(&mut self, key: u64, refusal: Refusal) {
        let Some(Waiting { socket, .. }) = self.take(key) else {
            return;
        };
        self.refusals.count(refusal);
        let message = match refusal {
            Refusal::Evicted | Refusal::Full | Refusal::NoDescriptor | Refusal::NoThread => BUSY,
            _ => DENIED,
        };
        // The peer may be gone.
        let _ = socket.write_some(message);
        socket.close();
    }

    /// Lets an authenticated peer in, if there is room.
    fn admit(&mut self, key: u64, session: &Session) {
        self.pace.refund();
        if self.authenticated.load(Ordering::SeqCst) >= self.limits.authenticated {
            return self.refuse(key, Refusal::Full);
        }
        let Some(Waiting {
            socket, address, ..
        }) = self.take(key)
        else {
            return;
        };
        let ticket = Ticket::new(&self.authenticated);
        let serve = self.serve.clone();
        let acceptance = acceptance(session, &self.secret, self.purpose);
        let session = *session;
        let secret = self.secret.clone();
        let purpose = self.purpose;
        let serving = move || {
            let begin = || {
                socket.set_nonblocking(false)?;
                socket.prepare()?;
                socket.write_some(&acceptance)
            };
            if begin().is_ok_and(|len| len == HELLO_LEN) {
                let connection = Connection::new(socket, &session, &secret, purpose, Side::Server);
                serve(Admitted {
                    connection,
                    address,
                    ticket,
                });
            }
        };
        let name = purpose.label.to_string();
        // The peer sees a closed connection and tries again.
        if thread::Builder::new().name(name).spawn(serving).is_err() {
            self.refusals.count(Refusal::NoThread);
        }
    }
}

/// A place among the authenticated connections of a [`Door`], until it is dropped.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    fn new(authenticated: &Arc<AtomicUsize>) -> Ticket {
        authenticated.fetch_add(1, Ordering::SeqCst);
        Ticket(authenticated.clone())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The log of refusals, with at most one line per interval.
struct RefusalLog {
    /// No line is written before this time.
    next: Instant,
    logged: RefusalCounts,
}

impl RefusalLog {
    /// Returns the time of the next line, if there is something to log.
    fn due(&self, refusals: &Refusals) -> Option<Instant> {
        (refusals.counts() != self.logged).then_some(self.next)
    }

    fn write(&mut self, refusals: &Refusals, purpose: Purpose, now: Instant) {
        let counts = refusals.counts();
        if counts == self.logged || now < self.next {
            return;
        }
        let new = counts.total() - self.logged.total();
        self.logged = counts;
        self.next = now + LOG_INTERVAL;
        let label = purpose.label;
        tracing::warn!("refused {new} connections at the {label} port; since the start: {counts}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{connect_local, connect_tcp};
    use std::{
        io::{Read, Write},
        net::SocketAddr,
        os::linux::net::SocketAddrExt,
        sync::atomic::AtomicU64,
    };

    const TIMEOUT: Duration = Duration::from_secs(10);

    struct Port {
        door: Door,
        address: SocketAddr,
        secret: Secret,
    }

    /// Opens a door that doubles numbers.
    fn port(limits: Limits) -> Port {
        let secret = Secret::random().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let door = Door::open(listener, secret.clone(), Purpose::AGENT, limits, double).unwrap();
        Port {
            door,
            address,
            secret,
        }
    }

    fn double<S: Socket>(admitted: Admitted<S>) {
        let mut connection = admitted.connection;
        while let Ok(number) = connection.receive::<u64>(None) {
            if connection.send(&(2 * number)).is_err() {
                return;
            }
        }
    }

    impl Port {
        fn ask(&self, secret: &Secret, purpose: Purpose) -> Result<u64, Error> {
            let mut connection = connect_tcp(self.address, secret, purpose, TIMEOUT)?;
            connection.send(&21u64)?;
            connection.receive(Some(TIMEOUT))
        }

        /// Checks that the secret still opens the door.
        fn check_open(&self) {
            assert_eq!(self.ask(&self.secret, Purpose::AGENT).unwrap(), 42);
        }

        fn counts(&self) -> RefusalCounts {
            self.door.refusals().counts()
        }

        /// Waits until the counts are as expected.
        fn wait_for(&self, is_right: impl Fn(RefusalCounts) -> bool) {
            let start = Instant::now();
            while !is_right(self.counts()) {
                assert!(start.elapsed() < TIMEOUT, "{:?}", self.counts());
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn peers_need_the_secret_and_the_purpose() {
        let port = port(Limits::default());
        port.check_open();
        let wrong = port.ask(&Secret::random().unwrap(), Purpose::AGENT);
        assert!(matches!(wrong, Err(Error::Unauthenticated)), "{wrong:?}");
        let wrong = port.ask(&port.secret, Purpose::KEEPER);
        assert!(matches!(wrong, Err(Error::Unauthenticated)), "{wrong:?}");
        port.wait_for(|counts| counts.unauthenticated == 2);
    }

    /// An attacker between a client and a port.
    struct Relay {
        /// Its connection to the port.
        attacked: TcpStream,
        /// The client's connection to it.
        stream: TcpStream,
        proof: [u8; 72],
        victim: thread::JoinHandle<Result<(), Error>>,
    }

    /// Has a client answer the greeting of the port, which an attacker passes on.
    fn relay(port: &Port, purpose: Purpose) -> Relay {
        let mut attacked = TcpStream::connect(port.address).unwrap();
        let mut hello = [0; HELLO_LEN];
        attacked.read_exact(&mut hello).unwrap();
        let trap = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = trap.local_addr().unwrap();
        let secret = port.secret.clone();
        let victim = thread::spawn(move || {
            connect_tcp(address, &secret, purpose, Duration::from_secs(1)).map(drop)
        });
        let (mut stream, _) = trap.accept().unwrap();
        stream.write_all(&hello).unwrap();
        let mut proof = [0; 72];
        stream.read_exact(&mut proof).unwrap();
        Relay {
            attacked,
            stream,
            proof,
            victim,
        }
    }

    impl Relay {
        /// Sends the victim's proof to the attacked port, which must deny it. Returns its answer.
        fn pass_proof_on(&mut self) -> [u8; 8] {
            self.attacked.write_all(&self.proof).unwrap();
            let mut answer = [0; 8];
            self.attacked.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, DENIED);
            answer
        }

        /// Sends the victim an answer, which it must refuse.
        fn answer_victim(mut self, answer: &[u8]) {
            self.stream.write_all(answer).unwrap();
            let result = self.victim.join().unwrap();
            assert!(matches!(result, Err(Error::Unauthenticated)), "{result:?}");
        }
    }

    #[test]
    fn a_reflected_proof_is_refused() {
        let port = port(Limits::default());
        // A server for the victim: the attacker sends it its own hello, and repeats its proof.
        let mut relay = relay(&port, Purpose::KEEPER);
        // A proof for a keeper is of no use at an agents' port, nor is it the server's proof.
        relay.pass_proof_on();
        let reflected = [super::super::proof::ACCEPTED.as_slice(), &relay.proof[40..]].concat();
        relay.answer_victim(&reflected);
    }

    /// The attacker has the address of a server that has ended, and passes on what it receives to
    /// another server of the same purpose.
    #[test]
    fn a_relayed_handshake_is_refused() {
        let port = port(Limits::default());
        let mut relay = relay(&port, Purpose::AGENT);
        let answer = relay.pass_proof_on();
        relay.answer_victim(&answer);
        port.wait_for(|counts| counts.unauthenticated == 1);
    }

    /// Both ends see the same address, whatever the client dialed and the server listens at.
    #[test]
    fn servers_at_all_addresses_admit_their_clients() {
        for (listened, dialed) in [
            ("0.0.0.0:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.2"),
            ("0.0.0.0:0", "0.0.0.0"),
            ("127.0.0.1:0", "::ffff:127.0.0.1"),
            ("[::]:0", "127.0.0.1"),
            ("[::]:0", "::1"),
            ("[::]:0", "::"),
            ("[::1]:0", "::1"),
        ] {
            let Ok(listener) = TcpListener::bind(listened) else {
                assert!(listened.starts_with('['), "{listened}");
                continue;
            };
            let secret = Secret::random().unwrap();
            let address = SocketAddr::new(
                dialed.parse().unwrap(),
                listener.local_addr().unwrap().port(),
            );
            let limits = Limits::default();
            let door = Door::open(listener, secret.clone(), Purpose::AGENT, limits, double);
            let _door = door.unwrap();
            let connected = connect_tcp(address, &secret, Purpose::AGENT, TIMEOUT).map(drop);
            assert!(connected.is_ok(), "{listened}, {dialed}: {connected:?}");
        }
    }

    #[test]
    fn garbage_and_slow_peers_are_refused_within_the_deadline() {
        let limits = Limits {
            handshake_timeout: Duration::from_millis(500),
            ..Limits::default()
        };
        let port = port(limits);
        let mut garbage = TcpStream::connect(port.address).unwrap();
        garbage.write_all(&[b'G'; 4096]).unwrap();
        port.wait_for(|counts| counts.malformed == 1);
        let mut slow = TcpStream::connect(port.address).unwrap();
        let start = Instant::now();
        let mut sent = 0;
        while slow
            .write_all(&super::super::proof::MAGIC[sent % 8..][..1])
            .is_ok()
        {
            sent += 1;
            thread::sleep(Duration::from_millis(40));
            assert!(start.elapsed() < TIMEOUT, "it was not refused");
        }
        port.wait_for(|counts| counts.timed_out + counts.malformed == 2);
        port.check_open();
    }

    #[test]
    fn a_client_enters_past_a_thousand_idle_connections() {
        let port = port(Limits::default());
        let mut idle = Vec::new();
        for _ in 0..1000 {
            // Other tests share this process's descriptors.
            idle.extend(TcpStream::connect(port.address));
        }
        let start = Instant::now();
        port.check_open();
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        assert!(port.counts().evicted + port.counts().no_descriptor > 500);
        drop(idle);
        port.check_open();
    }

    #[test]
    fn a_flood_does_not_keep_a_client_out() {
        let port = port(Limits {
            unauthenticated: 16,
            ..Limits::default()
        });
        let flood_ends = Instant::now() + Duration::from_secs(2);
        let address = port.address;
        let flooding = thread::spawn(move || {
            let mut connections = 0;
            while Instant::now() < flood_ends {
                connections += u64::from(TcpStream::connect(address).is_ok());
            }
            connections
        });
        let mut admitted = 0;
        while Instant::now() < flood_ends {
            port.check_open();
            admitted += 1;
            thread::sleep(Duration::from_millis(50));
        }
        assert!(admitted > 2 && flooding.join().unwrap() > 100, "{admitted}");
    }

    #[test]
    fn a_full_server_says_so_and_lets_the_client_in_later() {
        let port = port(Limits {
            authenticated: 1,
            ..Limits::default()
        });
        let connect = |timeout| connect_tcp(port.address, &port.secret, Purpose::AGENT, timeout);
        let first = connect(TIMEOUT).unwrap();
        let turned_away = connect(Duration::from_millis(100)).map(drop);
        assert!(matches!(turned_away, Err(Error::Busy)), "{turned_away:?}");
        assert!(port.counts().full > 0);
        let leaving = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            drop(first);
        });
        connect(TIMEOUT).unwrap();
        leaving.join().unwrap();
    }

    #[test]
    fn a_closed_port_is_lost_and_a_silent_one_is_not() {
        let port = port(Limits::default());
        let address = port.address;
        drop(port);
        // The thread may take a moment to close the listener.
        let start = Instant::now();
        loop {
            let secret = Secret::random().unwrap();
            let closed = connect_tcp(address, &secret, Purpose::AGENT, Duration::from_millis(500));
            match closed.map(drop) {
                Err(Error::Connection(_)) => break,
                other => assert!(start.elapsed() < TIMEOUT, "{other:?}"),
            }
        }
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let secret = Secret::random().unwrap();
        let timeout = Duration::from_millis(300);
        let start = Instant::now();
        let error = connect_tcp(address, &secret, Purpose::AGENT, timeout).unwrap_err();
        assert!(
            matches!(error, Error::TimedOut) && !error.is_lost(),
            "{error:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn local_peers_are_admitted_by_name() {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let name = format!("moerun-test/door/{}/{number}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let secret = Secret::random().unwrap();
        let limits = Limits::default();
        let door = Door::open(listener, secret.clone(), Purpose::RANK, limits, double).unwrap();
        let mut connection = connect_local(&name, &secret, Purpose::RANK, TIMEOUT).unwrap();
        connection.send(&1u64).unwrap();
        assert_eq!(connection.receive::<u64>(Some(TIMEOUT)).unwrap(), 2);
        assert_eq!(door.refusals().counts(), RefusalCounts::default());
        let missing = connect_local("moerun-test/none", &secret, Purpose::RANK, TIMEOUT);
        assert!(matches!(missing, Err(Error::Connection(_))));
    }
}
