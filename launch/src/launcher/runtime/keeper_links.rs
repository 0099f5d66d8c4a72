//! Connections to keepers: a thread for requests and one for events of each.

use super::queue::Queue;
use crate::launcher::engine::{
    LONG_TIMEOUT,
    command::KeeperRequest,
    event::{Answer, Event, Failed},
    keepers::KeeperId,
    requests::RequestId,
};
use checkpoint::keeper::{Closer, Error, EventStream, Peer, Secret};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    hash::{BuildHasher, Hasher, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

/// The time after which a thread without requests looks whether it is still needed.
const IDLE_INTERVAL: Duration = Duration::from_secs(3600);

enum Order {
    Ask {
        id: RequestId,
        request: KeeperRequest,
    },
    End,
}

struct Link {
    address: SocketAddr,
    orders: Queue<Order>,
    connections: Connections,
}

/// The connections to a keeper, which end with its link: one that hangs answers none of them.
#[derive(Clone, Default)]
struct Connections(Arc<Mutex<Open>>);

#[derive(Default)]
struct Open {
    has_ended: bool,
    closers: Vec<Closer>,
}

impl Connections {
    fn add(&self, closer: Closer) {
        let mut open = self.0.lock();
        if open.has_ended {
            closer.close();
        }
        open.closers.retain(Closer::is_open);
        open.closers.push(closer);
    }

    fn have_ended(&self) -> bool {
        self.0.lock().has_ended
    }

    fn end(&self) {
        let mut open = self.0.lock();
        open.has_ended = true;
        for closer in open.closers.drain(..) {
            closer.close();
        }
    }
}

pub(super) struct KeeperLinks {
    /// Distinguishes this launcher from others of the run.
    launcher: u64,
    secret: Secret,
    reply_timeout: Duration,
    events: Queue<Event>,
    links: BTreeMap<KeeperId, Link>,
}

fn failed(error: Error) -> Failed {
    match error {
        // The keeper is alive.
        Error::Refused(_) | Error::Busy | Error::TooLong { .. } => {
            Failed::Refused(error.to_string())
        }
        Error::TimedOut => Failed::Silent(error.to_string()),
        error => Failed::Lost(error.to_string()),
    }
}

/// A request that failed.
struct Broken {
    failed: Failed,
    /// A new connection, if the old one cannot be used and the keeper answers.
    successor: Option<Peer>,
}

/// Finds out whether a keeper is lost, or only a connection to it: one that answers is alive.
fn examine(error: Error, connect: impl FnOnce() -> Result<Peer, Error>) -> Broken {
    let failed = failed(error);
    if let Failed::Lost(reason) = &failed
        && let Ok(peer) = connect()
    {
        let reason = format!("{reason}; it answers on another connection");
        return Broken {
            failed: Failed::Refused(reason),
            successor: Some(peer),
        };
    }
    Broken {
        failed,
        successor: None,
    }
}

impl KeeperLinks {
    pub(super) fn new(
        secret: Secret,
        reply_timeout: Duration,
        events: Queue<Event>,
    ) -> KeeperLinks {
        KeeperLinks {
            // The standard library seeds it at random.
            launcher: RandomState::new().build_hasher().finish(),
            secret,
            reply_timeout,
            events,
            links: BTreeMap::new(),
        }
    }

    pub(super) fn connect(&mut self, id: RequestId, keeper: KeeperId, address: SocketAddr) {
        let orders = Queue::new();
        let connections = Connections::default();
        let link = Link {
            address,
            orders: orders.clone(),
            connections: connections.clone(),
        };
        self.links.insert(keeper, link);
        let connector = Connector {
            launcher: self.launcher,
            keeper,
            address,
            secret: self.secret.clone(),
            reply_timeout: self.reply_timeout,
            events: self.events.clone(),
            connections,
        };
        let spawned = std::thread::Builder::new().spawn(move || connector.run(id, &orders));
        if let Err(error) = spawned {
            let reply = Err(Failed::Lost(format!("cannot start a thread: {error}")));
            self.events.push_now(Event::Reply { id, reply });
        }
    }

    pub(super) fn disconnect(&mut self, keeper: KeeperId) {
        if let Some(link) = self.links.remove(&keeper) {
            link.orders.push(Order::End);
            link.connections.end();
        }
    }

    pub(super) fn ask(&self, id: RequestId, keeper: KeeperId, request: KeeperRequest) {
        let Some(link) = self.links.get(&keeper) else {
            let reply = Err(Failed::Lost("it is not connected".into()));
            self.events.push_now(Event::Reply { id, reply });
            return;
        };
        let is_long = matches!(
            request,
            KeeperRequest::Verify(_) | KeeperRequest::Rebuild(_) | KeeperRequest::Protect { .. }
        );
        if !is_long {
            link.orders.push(Order::Ask { id, request });
            return;
        }
        let connect = self.long_connector(keeper);
        let connect_again = self.long_connector(keeper);
        let events = self.events.clone();
        let ask = move || {
            let reply = connect().map_err(failed).and_then(|mut peer| {
                ask(&mut peer, request).map_err(|error| examine(error, connect_again).failed)
            });
            events.push(Event::Reply { id, reply });
        };
        if let Err(error) = std::thread::Builder::new().spawn(ask) {
            let reply = Err(Failed::Refused(format!("cannot start a thread: {error}")));
            self.events.push_now(Event::Reply { id, reply });
        }
    }

    /// Returns what opens a connection for requests that take long.
    pub(super) fn long_connector(
        &self,
        keeper: KeeperId,
    ) -> impl FnOnce() -> Result<Peer, Error> + Send + use<> {
        let link = self.links.get(&keeper);
        let link = link.map(|link| (link.address, link.connections.clone()));
        let secret = self.secret.clone();
        move || {
            let (address, connections) = link.ok_or(Error::Closed)?;
            let peer = Peer::connect(address, &secret, LONG_TIMEOUT)?;
            connections.add(peer.closer());
            Ok(peer)
        }
    }
}

/// Connects to one keeper.
#[derive(Clone)]
struct Connector {
    launcher: u64,
    keeper: KeeperId,
    address: SocketAddr,
    secret: Secret,
    reply_timeout: Duration,
    events: Queue<Event>,
    connections: Connections,
}

impl Connector {
    fn run(self, id: RequestId, orders: &Queue<Order>) {
        let mut peer = match self.connect() {
            Ok(peer) => peer,
            Err(error) => {
                let reply = Err(failed(error));
                self.events.push(Event::Reply { id, reply });
                return;
            }
        };
        let reply = Ok(Answer::Done);
        self.events.push(Event::Reply { id, reply });
        loop {
            let (id, request) = match orders.pop(IDLE_INTERVAL) {
                Some(Order::Ask { id, request }) => (id, request),
                Some(Order::End) => return,
                None => continue,
            };
            let reply = ask(&mut peer, request).map_err(|error| {
                let broken = examine(error, || self.connect_for_requests());
                if let Some(successor) = broken.successor {
                    peer = successor;
                }
                broken.failed
            });
            let is_lost = matches!(reply, Err(Failed::Lost(_) | Failed::Silent(_)));
            self.events.push(Event::Reply { id, reply });
            if is_lost {
                return;
            }
        }
    }

    /// Opens a connection for requests and one for events.
    fn connect(&self) -> Result<Peer, Error> {
        let stream = self.subscribe()?;
        let peer = self.connect_for_requests()?;
        let connector = self.clone();
        let spawned = std::thread::Builder::new().spawn(move || connector.forward_events(stream));
        spawned.map_err(Error::from)?;
        Ok(peer)
    }

    fn connect_for_requests(&self) -> Result<Peer, Error> {
        let peer = Peer::connect(self.address, &self.secret, self.reply_timeout)?;
        self.connections.add(peer.closer());
        Ok(peer)
    }

    fn subscribe(&self) -> Result<EventStream, Error> {
        let peer = Peer::connect(self.address, &self.secret, self.reply_timeout)?;
        let stream = peer.subscribe(self.launcher)?;
        self.connections.add(stream.closer());
        Ok(stream)
    }

    /// Forwards events until the keeper is gone. One that has ended a stream, but answers, gets
    /// another: the launcher abandons the snapshots whose events it missed.
    fn forward_events(&self, mut stream: EventStream) {
        let keeper = self.keeper;
        loop {
            let mut has_events = false;
            let error = stream.for_each_event(|event| {
                has_events = true;
                self.events.push(Event::Keeper { keeper, event });
            });
            let failed = failed(error);
            let is_wanted = has_events && !self.connections.have_ended();
            if let Failed::Lost(reason) = &failed
                && is_wanted
                && let Ok(successor) = self.subscribe()
            {
                let address = self.address;
                tracing::warn!("the events of the keeper at {address} were interrupted: {reason}");
                stream = successor;
                continue;
            }
            self.events.push(Event::KeeperGone { keeper, failed });
            return;
        }
    }
}

fn ask(peer: &mut Peer, request: KeeperRequest) -> Result<Answer, Error> {
    match request {
        KeeperRequest::Inventory => return Ok(Answer::Inventory(peer.inventory()?)),
        KeeperRequest::Verify(id) => return Ok(Answer::Damaged(peer.verify(id)?.chunks)),
        KeeperRequest::SetUp { topology, node } => peer.set_up(&topology, node)?,
        KeeperRequest::Commit(snapshot) => peer.commit(&snapshot)?,
        KeeperRequest::Abandon(id) => peer.abandon(id)?,
        KeeperRequest::Pin(id) => peer.pin(id)?,
        KeeperRequest::Unpin => peer.unpin()?,
        KeeperRequest::SelectRestore { snapshot, holders } => {
            peer.select_restore(snapshot.as_ref(), &holders)?;
        }
        KeeperRequest::Stop => peer.stop()?,
        KeeperRequest::Rebuild(rebuilds) => {
            for rebuild in rebuilds {
                peer.rebuild(rebuild)?;
            }
        }
        KeeperRequest::Protect {
            snapshot,
            node,
            sources,
        } => peer.protect(&snapshot, node, &sources)?,
    }
    Ok(Answer::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::keeper::serve::{self, Settings};
    use std::{sync::mpsc::channel, time::Instant};

    const LONG: Duration = Duration::from_secs(20);
    const KEEPER: KeeperId = KeeperId(1);

    fn serve_keeper(secret: &Secret) -> SocketAddr {
        let settings = Settings {
            socket: format!("moerun-test/links/{}", secret.name()),
            secret: secret.clone(),
            listen: ([127, 0, 0, 1], 0).into(),
            memory_limit: None,
            orphan_timeout: Duration::from_secs(60),
        };
        let (sender, address) = channel();
        std::thread::spawn(move || {
            serve::run(settings, |address| {
                let _ = sender.send(address);
                Ok(())
            })
        });
        address.recv().unwrap()
    }

    /// Waits for the reply to a request, and panics if the launcher loses the keeper.
    fn reply_to(events: &Queue<Event>, wanted: u64) -> Result<Answer, Failed> {
        let began = Instant::now();
        while began.elapsed() < LONG {
            match events.pop(LONG) {
                Some(Event::Reply { id, reply }) if id == RequestId(wanted) => return reply,
                Some(Event::KeeperGone { failed, .. }) => panic!("it was given up: {failed:?}"),
                _ => {}
            }
        }
        panic!("no reply to {wanted}");
    }

    fn wait_for_event(events: &Queue<Event>, is_wanted: impl Fn(&Event) -> bool) {
        let began = Instant::now();
        while began.elapsed() < LONG {
            if events.pop(LONG).is_some_and(|event| is_wanted(&event)) {
                return;
            }
        }
        panic!("no such event");
    }

    #[test]
    fn a_keeper_is_lost_if_it_answers_on_no_connection() {
        let none = || Err(Error::Closed);
        let lost = examine(Error::Protocol("garbage".into()), none).failed;
        assert_eq!(lost, Failed::Lost("garbage".into()));
        let silent = examine(Error::TimedOut, none).failed;
        assert!(matches!(silent, Failed::Silent(_)), "{silent:?}");
        let too_long = Error::TooLong {
            bytes: 9,
            limit: 8,
            label: "keeper",
        };
        let refused = examine(too_long, none).failed;
        assert!(matches!(refused, Failed::Refused(_)), "{refused:?}");
    }

    #[test]
    fn a_keeper_that_answers_survives_its_connections() {
        let secret = Secret::random().unwrap();
        let address = serve_keeper(&secret);
        let events = Queue::new();
        let mut links = KeeperLinks::new(secret, LONG, events.clone());
        links.connect(RequestId(1), KEEPER, address);
        reply_to(&events, 1).unwrap();
        let is_heartbeat = |event: &Event| matches!(event, Event::Keeper { .. });
        wait_for_event(&events, is_heartbeat);
        for closer in &links.links[&KEEPER].connections.0.lock().closers {
            closer.close();
        }
        links.ask(RequestId(2), KEEPER, KeeperRequest::Inventory);
        let refused = reply_to(&events, 2).unwrap_err();
        assert!(matches!(refused, Failed::Refused(_)), "{refused:?}");
        assert!(
            refused
                .reason()
                .ends_with("it answers on another connection")
        );
        links.ask(RequestId(3), KEEPER, KeeperRequest::Inventory);
        assert!(matches!(reply_to(&events, 3), Ok(Answer::Inventory(_))));
        wait_for_event(&events, is_heartbeat);
        links.ask(RequestId(4), KEEPER, KeeperRequest::Stop);
        reply_to(&events, 4).unwrap();
    }
}
