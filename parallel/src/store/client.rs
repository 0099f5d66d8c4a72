//! A rank's connection to a store server.

use super::{
    StoreAccess, TrafficCounter,
    message::{Reply, Request},
};
use parking_lot::Mutex;
use secure_link::{Connection, Purpose};
use std::{
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};
use torch_ext::{Error, Store, StoreBackend, StoreReply, StoreRequest};

/// The time for an answer, in addition to the wait that the request allows.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause after an attempt to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Connects to a store, whose server may start within `timeout`. Waits have that limit, too.
///
/// # Errors
/// If no server answers in time, or it does not know the secret.
#[cfg(test)]
pub(crate) fn connect(access: &StoreAccess, timeout: Duration) -> Result<Store, Error> {
    connect_counted(access, timeout, Arc::default())
}

/// Connects to a store, whose server may start within `timeout`, and counts what the client asks of
/// it. Waits have that limit, too.
///
/// # Errors
/// If no server answers in time, or it does not know the secret.
pub(crate) fn connect_counted(
    access: &StoreAccess,
    timeout: Duration,
    traffic: Arc<TrafficCounter>,
) -> Result<Store, Error> {
    let client = StoreClient::connect(access.clone(), timeout, traffic)?;
    Store::custom(Box::new(client), timeout)
}

struct StoreClient {
    access: StoreAccess,
    timeout: Duration,
    connection: Mutex<SpareConnection>,
    traffic: Arc<TrafficCounter>,
}

/// The connection that no request uses at present. While one thread waits for a key, others open
/// connections of their own: the rank that sets the key may first wait for one of them.
#[derive(Default)]
struct SpareConnection {
    connection: Option<Connection<TcpStream>>,
    /// True after a failure: the store has ended.
    is_lost: bool,
}

impl StoreClient {
    fn connect(
        access: StoreAccess,
        timeout: Duration,
        traffic: Arc<TrafficCounter>,
    ) -> Result<StoreClient, Error> {
        let spare = SpareConnection {
            connection: Some(open(&access, timeout)?),
            is_lost: false,
        };
        Ok(StoreClient {
            access,
            timeout,
            connection: Mutex::new(spare),
            traffic,
        })
    }

    fn exchange(
        connection: &mut Connection<TcpStream>,
        request: StoreRequest,
    ) -> Result<Reply, secure_link::Error> {
        let timeout = request.timeout.saturating_add(REPLY_TIMEOUT);
        connection.send(&Request::from(request))?;
        connection.receive(Some(timeout))
    }
}

/// Opens a connection, for which it tries until `timeout` has passed.
fn open(access: &StoreAccess, timeout: Duration) -> Result<Connection<TcpStream>, Error> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let StoreAccess { address, secret } = access;
        let error = match secure_link::connect_tcp(*address, secret, Purpose::STORE, left) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        // The server may start later, or be busy.
        let may_pass = matches!(
            error,
            secure_link::Error::Connection(_)
                | secure_link::Error::Closed
                | secure_link::Error::Busy
                | secure_link::Error::TimedOut
        );
        if !may_pass || Instant::now() + RETRY_INTERVAL > deadline {
            return Err(Error::new(error.to_string()));
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

impl StoreBackend for StoreClient {
    fn call(&self, request: StoreRequest) -> Result<StoreReply, Error> {
        let address = self.access.address;
        let spare = {
            let mut spare = self.connection.lock();
            if spare.is_lost {
                let reason = format!("lost the connection to the store at {address}");
                return Err(Error::new(reason));
            }
            spare.connection.take()
        };
        let mut connection = match spare {
            Some(connection) => connection,
            None => open(&self.access, self.timeout)?,
        };
        self.traffic.count_request(&request);
        match StoreClient::exchange(&mut connection, request) {
            Ok(reply) => {
                self.connection.lock().connection = Some(connection);
                match reply {
                    Reply::Done(values) => {
                        let reply = StoreReply::from(values);
                        self.traffic.count_reply(&reply);
                        Ok(reply)
                    }
                    Reply::Failed(reason) => Err(Error::new(reason)),
                }
            }
            Err(error) => {
                self.connection.lock().is_lost = true;
                Err(Error::new(format!("the store at {address}: {error}")))
            }
        }
    }

    fn reconnect(&self) -> Result<Box<dyn StoreBackend>, Error> {
        let access = self.access.clone();
        let client = StoreClient::connect(access, self.timeout, self.traffic.clone())?;
        Ok(Box::new(client))
    }
}
