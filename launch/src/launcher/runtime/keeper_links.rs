//! Connections to keepers: a thread for requests and one for events of each.

use super::queue::Queue;
use crate::launcher::engine::{
    LONG_TIMEOUT,
    command::KeeperRequest,
    event::{Answer, Event, Failed},
    keepers::KeeperId,
    requests::RequestId,
};
use checkpoint::keeper::{Closer, Error, Peer, Secret};
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
        Error::Refused(_) | Error::Busy => Failed::Refused(error.to_string()),
        Error::TimedOut => Failed::Silent(error.to_string()),
        error => Failed::Lost(error.to_string()),
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
        let events = self.events.clone();
        let ask = move || {
            let reply = connect().and_then(|mut peer| ask(&mut peer, request));
            let reply = reply.map_err(failed);
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
            let reply = ask(&mut peer, request).map_err(failed);
            let is_lost = matches!(reply, Err(Failed::Lost(_) | Failed::Silent(_)));
            self.events.push(Event::Reply { id, reply });
            if is_lost {
                return;
            }
        }
    }

    /// Opens a connection for requests and one for events.
    fn connect(&self) -> Result<Peer, Error> {
        let connect = || Peer::connect(self.address, &self.secret, self.reply_timeout);
        let stream = connect()?.subscribe(self.launcher)?;
        self.connections.add(stream.closer());
        let peer = connect()?;
        self.connections.add(peer.closer());
        let keeper = self.keeper;
        let events = self.events.clone();
        let receive = move || {
            let error = stream.for_each_event(|event| events.push(Event::Keeper { keeper, event }));
            let failed = failed(error);
            events.push(Event::KeeperGone { keeper, failed });
        };
        let spawned = std::thread::Builder::new().spawn(receive);
        spawned.map_err(Error::from)?;
        Ok(peer)
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
