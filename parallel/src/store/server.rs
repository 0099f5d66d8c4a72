//! The server of a store: one thread for all authenticated connections.

use super::{
    StoreAccess,
    message::{Reply, Request},
    table::{Answer, ClientId, Table},
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use secure_link::{
    Admitted, Buffered, Door, Error, Limits, Purpose, RefusalCounts, Secret, Ticket,
};
use std::{
    collections::{BTreeSet, HashMap},
    io::{self, PipeReader, PipeWriter, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, TryRecvError, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Limits of a [`StoreServer`].
#[derive(Debug, Clone, Copy)]
struct StoreLimits {
    /// Two connections of each rank, and those of ranks that are being replaced.
    clients: usize,
    /// The time for a request that has begun, and for taking an answer.
    message_timeout: Duration,
}

const LIMITS: StoreLimits = StoreLimits {
    clients: 1 << 18,
    message_timeout: Duration::from_secs(30),
};
/// The ranks of a large run connect at the same time.
const MAX_UNAUTHENTICATED: usize = 256;
/// Events that one wait returns.
const MAX_EVENTS: usize = 256;
/// The event of the pipe that announces connections and the end.
const NEWS: u64 = 0;

/// A store that serves authenticated clients until this is dropped.
pub struct StoreServer {
    access: StoreAccess,
    door: Option<Door>,
    thread: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Serves at `address` only; with port 0 at any free port.
    ///
    /// # Errors
    /// If the address is not this machine's, or its port is in use.
    pub fn listen(address: SocketAddr, secret: Secret) -> io::Result<StoreServer> {
        StoreServer::listen_with(address, secret, LIMITS)
    }

    fn listen_with(
        address: SocketAddr,
        secret: Secret,
        limits: StoreLimits,
    ) -> io::Result<StoreServer> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let (reader, writer) = io::pipe()?;
        nix::fcntl::fcntl(
            &reader,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        let (sender, admitted) = channel();
        let server = ServerThread::new(reader, admitted, limits.message_timeout)?;
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || server.run())?;
        let limits = Limits {
            unauthenticated: MAX_UNAUTHENTICATED,
            authenticated: limits.clients,
            ..Limits::default()
        };
        let entrance = Entrance { sender, writer };
        let serve = move |admitted| entrance.pass(admitted);
        let door = Door::open(listener, secret.clone(), Purpose::STORE, limits, serve);
        Ok(StoreServer {
            access: StoreAccess { address, secret },
            door: Some(door.map_err(io::Error::other)?),
            thread: Some(thread),
        })
    }

    /// Serves the ranks of this machine, with a secret of its own.
    ///
    /// # Errors
    /// As [`StoreServer::listen`], or if the system has no random bytes.
    pub fn local() -> io::Result<StoreServer> {
        let secret = Secret::random().map_err(io::Error::other)?;
        StoreServer::listen(SocketAddr::from(([127, 0, 0, 1], 0)), secret)
    }

    /// Returns the address and the secret for clients.
    pub fn access(&self) -> &StoreAccess {
        &self.access
    }

    /// Returns the counts of refused connections.
    pub fn refusals(&self) -> RefusalCounts {
        let door = self.door.as_ref();
        door.map(|door| door.refusals().counts())
            .unwrap_or_default()
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // Its thread holds the pipe, whose end the server's thread waits for.
        self.door = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The way of admitted connections to the server's thread.
struct Entrance {
    sender: Sender<Admitted<TcpStream>>,
    writer: PipeWriter,
}

impl Entrance {
    fn pass(&self, admitted: Admitted<TcpStream>) {
        // Both fail only if the server has ended.
        if self.sender.send(admitted).is_ok() {
            let _ = (&self.writer).write_all(&[0]);
        }
    }
}

struct Client {
    connection: Buffered<TcpStream>,
    /// True while the client waits for keys.
    waits: bool,
    /// True if the system did not take all of an answer.
    is_flushing: bool,
    /// The time by which the request or the answer that has begun must be complete.
    deadline: Option<Instant>,
    /// Its place among the connections that the port admits.
    _ticket: Ticket,
}

struct ServerThread {
    news: PipeReader,
    admitted: Receiver<Admitted<TcpStream>>,
    epoll: Epoll,
    clients: HashMap<ClientId, Client>,
    message_timeout: Duration,
    /// The deadlines of clients with one.
    deadlines: BTreeSet<(Instant, ClientId)>,
    next_id: ClientId,
    table: Table,
}

impl ServerThread {
    fn new(
        news: PipeReader,
        admitted: Receiver<Admitted<TcpStream>>,
        message_timeout: Duration,
    ) -> io::Result<ServerThread> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&news, EpollEvent::new(EpollFlags::EPOLLIN, NEWS))?;
        Ok(ServerThread {
            news,
            admitted,
            epoll,
            clients: HashMap::new(),
            message_timeout,
            deadlines: BTreeSet::new(),
            next_id: NEWS + 1,
            table: Table::default(),
        })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); MAX_EVENTS];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(error) => {
                    tracing::error!("the store has ended: {error}");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() != NEWS {
                    self.serve(event.data(), event.events());
                } else if self.take_news().is_err() {
                    return;
                }
            }
            for answer in self.table.expire(Instant::now()) {
                self.answer(answer);
            }
            self.close_late(Instant::now());
        }
    }

    /// Closes connections on which a request or an answer takes too long.
    fn close_late(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            let limit = self.message_timeout;
            tracing::warn!("the store closes a rank's connection: a message took over {limit:.0?}");
            self.remove(id);
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let late = self.deadlines.first().map(|&(deadline, _)| deadline);
        let deadlines = [self.table.next_deadline(), late].into_iter().flatten();
        let Some(deadline) = deadlines.min() else {
            return EpollTimeout::NONE;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = left.min(Duration::from_secs(60)).as_millis() as u16;
        // Rounded up: a wait of zero would repeat until the deadline.
        EpollTimeout::from(millis + 1)
    }

    /// Adds new connections. Returns an error when the server has been dropped.
    fn take_news(&mut self) -> io::Result<()> {
        let mut bytes = [0; 256];
        match self.news.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        loop {
            match self.admitted.try_recv() {
                Ok(admitted) => self.add(admitted),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }

    fn add(&mut self, admitted: Admitted<TcpStream>) {
        let Ok(connection) = admitted.connection.into_buffered() else {
            return;
        };
        let id = self.next_id;
        self.next_id += 1;
        if self
            .epoll
            .add(connection.socket(), interest(id, false))
            .is_err()
        {
            return;
        }
        let client = Client {
            connection,
            waits: false,
            is_flushing: false,
            deadline: None,
            _ticket: admitted.ticket,
        };
        self.clients.insert(id, client);
    }

    /// Reads and writes what a client's socket allows.
    fn serve(&mut self, id: ClientId, events: EpollFlags) {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush(id);
        }
        if !events.difference(EpollFlags::EPOLLOUT).is_empty()
            && let Err(error) = self.read(id)
        {
            if !matches!(error, Error::Closed) {
                tracing::warn!("the store closes a rank's connection: {error}");
            }
            self.remove(id);
        }
        self.set_deadline(id);
    }

    /// Begins the time for a message that is incomplete, and ends that for a complete one.
    fn set_deadline(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let is_incomplete = client.connection.has_input() || client.is_flushing;
        if client.deadline.is_some() == is_incomplete {
            return;
        }
        if let Some(deadline) = client.deadline.take() {
            self.deadlines.remove(&(deadline, id));
        } else {
            let deadline = Instant::now() + self.message_timeout;
            client.deadline = Some(deadline);
            self.deadlines.insert((deadline, id));
        }
    }

    /// Carries out the requests that have arrived from a client.
    ///
    /// # Errors
    /// If the connection is closed, or carries something else.
    fn read(&mut self, id: ClientId) -> Result<(), Error> {
        let Some(client) = self.clients.get_mut(&id) else {
            return Ok(());
        };
        client.connection.fill()?;
        // Clients await each answer. This bounds their buffers.
        if client.connection.has_input() && (client.waits || client.is_flushing) {
            return Err(Error::Protocol("a request before the last answer".into()));
        }
        let Some(request) = client.connection.next_message::<Request>()? else {
            return Ok(());
        };
        if client.connection.has_input() {
            return Err(Error::Protocol("a request before the last answer".into()));
        }
        let Some(request) = request.decoded() else {
            return Err(Error::Protocol("an unknown operation".into()));
        };
        client.waits = true;
        for answer in self.table.request(id, request, Instant::now()) {
            self.answer(answer);
        }
        Ok(())
    }

    fn answer(&mut self, answer: Answer) {
        let Answer { client: id, reply } = answer;
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.waits = false;
        let queued = client.connection.queue(&reply).or_else(|error| {
            let reason = format!("the store's answer: {error}");
            client.connection.queue(&Reply::Failed(reason))
        });
        match queued {
            Ok(()) => self.flush(id),
            Err(_) => self.remove(id),
        }
        self.set_deadline(id);
    }

    fn flush(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let Ok(is_done) = client.connection.flush() else {
            return self.remove(id);
        };
        if client.is_flushing == is_done {
            client.is_flushing = !is_done;
            let mut event = interest(id, client.is_flushing);
            if self
                .epoll
                .modify(client.connection.socket(), &mut event)
                .is_err()
            {
                self.remove(id);
            }
        }
    }

    fn remove(&mut self, id: ClientId) {
        self.table.leave(id);
        if let Some(client) = self.clients.remove(&id) {
            if let Some(deadline) = client.deadline {
                self.deadlines.remove(&(deadline, id));
            }
            // Closing the socket would do, if no child process had it.
            let _ = self.epoll.delete(client.connection.socket());
        }
    }
}

fn interest(id: ClientId, writes: bool) -> EpollEvent {
    let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
    flags.set(EpollFlags::EPOLLOUT, writes);
    EpollEvent::new(flags, id)
}

#[cfg(test)]
mod tests {
    use super::{super::connect, *};
    use proptest::prelude::*;
    use torch_ext::{StoreOperation, StoreRequest};

    const TIMEOUT: Duration = Duration::from_secs(20);

    type Peer = secure_link::Connection<TcpStream>;

    fn address(server: &StoreServer) -> SocketAddr {
        server.access().address
    }

    #[test]
    fn clients_share_keys_and_wait_for_each_other() {
        let server = StoreServer::local().unwrap();
        let store = connect(server.access(), TIMEOUT).unwrap();
        let access = server.access().clone();
        let other = std::thread::spawn(move || {
            let store = connect(&access, TIMEOUT).unwrap().prefixed("in").unwrap();
            store.add("n", 2).unwrap();
            store.get("large").unwrap()
        });
        // Far more than a socket's buffer.
        let large: Vec<u8> = (0..20 << 20).map(|index| index as u8).collect();
        std::thread::sleep(Duration::from_millis(100));
        store.set("in/large", &large).unwrap();
        assert!(other.join().unwrap() == large);
        assert_eq!(store.add("in/n", 3).unwrap(), 5);
        assert!(!store.contains("n").unwrap());
        let soon = connect(server.access(), Duration::from_millis(300)).unwrap();
        let error = soon.get("missing").unwrap_err().to_string();
        assert!(
            error.contains("timed out") && error.contains("missing"),
            "{error}"
        );
        // The connection is usable after a timeout.
        assert_eq!(soon.get("in/n").unwrap(), b"5");
        let error = soon.set(&"k".repeat(5000), b"").unwrap_err().to_string();
        assert!(error.contains("is longer than"), "{error}");
        drop(server);
        assert!(store.get("in/n").is_err() && store.get("in/n").is_err());
    }

    #[test]
    fn a_wait_does_not_keep_other_threads_from_the_store() {
        let server = StoreServer::local().unwrap();
        let store = std::sync::Arc::new(connect(server.access(), TIMEOUT).unwrap());
        let other = store.clone();
        let waiter = std::thread::spawn(move || other.get("late").unwrap());
        std::thread::sleep(Duration::from_millis(100));
        store.set("late", b"value").unwrap();
        assert_eq!(waiter.join().unwrap(), b"value");
    }

    #[test]
    fn a_client_without_the_secret_is_refused() {
        let server = StoreServer::local().unwrap();
        let mut access = server.access().clone();
        access.secret = Secret::random().unwrap();
        let error = connect(&access, TIMEOUT).err().unwrap().to_string();
        assert!(error.contains("authentication failed"), "{error}");
        assert_eq!(server.refusals().unauthenticated, 1);
        // c10d's first message, with which its clients list all keys.
        let mut stranger = TcpStream::connect(address(&server)).unwrap();
        let listing = b"\0\xce\xf7\x85\x3c\x11";
        stranger.write_all(&listing.repeat(20)).unwrap();
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        assert!(
            answer.starts_with(b"moerun\0") && answer.len() <= 48,
            "{answer:?}"
        );
    }

    #[test]
    fn a_local_store_cannot_be_reached_from_outside() {
        let server = StoreServer::local().unwrap();
        assert!(server.access().is_local());
        let outside = ("127.0.0.2", address(&server).port());
        assert!(TcpStream::connect(outside).is_err());
    }

    #[test]
    fn idle_connections_do_not_keep_clients_out() {
        let server = StoreServer::local().unwrap();
        let first = connect(server.access(), TIMEOUT).unwrap();
        let open = |_| TcpStream::connect_timeout(&address(&server), TIMEOUT).ok();
        // Other tests of this process need descriptors, too.
        let idle: Vec<_> = (0..400).map(open).collect();
        let began = Instant::now();
        let second = connect(server.access(), TIMEOUT).unwrap();
        second.set("key", b"value").unwrap();
        assert_eq!(first.get("key").unwrap(), b"value");
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        assert!(server.refusals().total() > 0);
        drop(idle);
    }

    fn limited(clients: usize, message_timeout: Duration) -> StoreServer {
        let limits = StoreLimits {
            clients,
            message_timeout,
        };
        let secret = Secret::random().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        StoreServer::listen_with(address, secret, limits).unwrap()
    }

    fn authenticated(server: &StoreServer, timeout: Duration) -> Result<Peer, Error> {
        let StoreAccess { address, secret } = server.access();
        secure_link::connect_tcp(*address, secret, Purpose::STORE, timeout)
    }

    #[test]
    fn clients_over_the_limit_are_turned_away_until_one_leaves() {
        let server = limited(2, TIMEOUT);
        let connect = |millis| authenticated(&server, Duration::from_millis(millis));
        let first = connect(20_000).unwrap();
        let _second = connect(20_000).unwrap();
        // The server's thread has them by now.
        std::thread::sleep(Duration::from_millis(100));
        let third = connect(1000).map(drop);
        assert!(third.is_err() && server.refusals().full > 0, "{third:?}");
        drop(first);
        connect(20_000).unwrap();
    }

    #[test]
    fn a_request_that_does_not_end_closes_its_connection() {
        let server = limited(10, Duration::from_millis(300));
        let store = connect(server.access(), TIMEOUT).unwrap();
        let soon = connect(server.access(), Duration::from_millis(900)).unwrap();
        let peer = authenticated(&server, TIMEOUT).unwrap();
        let mut socket = &**peer.socket();
        socket.write_all(&[9, 0]).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        // A client that waits for a key is not late.
        assert!(soon.get("missing").is_err());
        soon.set("key", b"value").unwrap();
        assert_eq!(store.get("key").unwrap(), b"value");
        let ended = socket.read(&mut [0; 8]);
        let is_closed = match &ended {
            Ok(len) => *len == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        assert!(is_closed, "{ended:?}");
    }

    #[test]
    fn an_answer_that_is_not_read_closes_its_connection() {
        // Long enough for a value of this size on a busy machine.
        let server = limited(10, Duration::from_secs(3));
        let store = connect(server.access(), TIMEOUT).unwrap();
        let large = vec![7; 40 << 20];
        store.set("large", &large).unwrap();
        let mut peer = authenticated(&server, TIMEOUT).unwrap();
        let request = StoreRequest {
            operation: StoreOperation::Get,
            keys: vec![b"large".to_vec()],
            values: Vec::new(),
            number: 0,
            timeout: TIMEOUT,
        };
        peer.send(&Request::from(request)).unwrap();
        std::thread::sleep(Duration::from_secs(5));
        let mut socket = &**peer.socket();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut read = 0;
        let mut chunk = vec![0; 1 << 20];
        while let Ok(len @ 1..) = socket.read(&mut chunk) {
            read += len;
        }
        assert!(read < large.len(), "all {read} bytes arrived");
        assert_eq!(store.get("large").unwrap().len(), large.len());
    }

    /// Sends bytes after a right handshake, and waits until the server closes the connection.
    fn send_raw(server: &StoreServer, bytes: &[u8]) {
        let StoreAccess { address, secret } = server.access();
        let connection =
            secure_link::connect_tcp(*address, secret, Purpose::STORE, TIMEOUT).unwrap();
        let mut socket = &**connection.socket();
        let _ = socket.write_all(bytes);
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut answer = Vec::new();
        if let Err(error) = socket.read_to_end(&mut answer) {
            assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "no end");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(250))]
        #[test]
        fn frames_of_any_bytes_end_their_connection_only(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            len in prop_oneof![0u32..400, any::<u32>()],
        ) {
            let server = StoreServer::local().unwrap();
            let store = connect(server.access(), TIMEOUT).unwrap();
            send_raw(&server, &bytes);
            send_raw(&server, &[&len.to_le_bytes()[..], &bytes].concat());
            store.set("key", b"value").unwrap();
            prop_assert_eq!(store.get("key").unwrap(), b"value");
        }

        #[test]
        fn messages_of_any_operands_are_answered(
            operation: u8,
            keys in prop::collection::vec(prop::collection::vec(0u8..3, 0..2), 0..4),
            values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3), 0..4),
            number: i64,
        ) {
            let server = StoreServer::local().unwrap();
            let StoreAccess { address, secret } = server.access();
            let connection = secure_link::connect_tcp(*address, secret, Purpose::STORE, TIMEOUT);
            let mut connection = connection.unwrap();
            let request = (operation, keys, values, number, 10u64);
            connection.send(&request).unwrap();
            let reply = connection.receive::<Reply>(Some(TIMEOUT));
            // An unknown operation ends the connection.
            prop_assert_eq!(reply.is_ok(), operation < 9);
        }
    }
}
