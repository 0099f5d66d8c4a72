//! A rank's connection to a store server.

use super::{
    StoreAccess,
    message::{Reply, Request},
};
use parking_lot::Mutex;
use secure_link::{Connection, Purpose};
use std::{
    net::TcpStream,
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
pub(crate) fn connect(access: &StoreAccess, timeout: Duration) -> Result<Store, Error> {
    let client = StoreClient::connect(access, timeout)?;
    Store::custom(Box::new(client), timeout)
}

struct StoreClient {
    access: StoreAccess,
    timeout: Duration,
    /// None after a failure: an answer that is late must not be taken for that of a later request.
    connection: Mutex<Option<Connection<TcpStream>>>,
}

impl StoreClient {
    fn connect(access: &StoreAccess, timeout: Duration) -> Result<StoreClient, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let StoreAccess { address, secret } = access;
            let error = match secure_link::connect_tcp(*address, secret, Purpose::STORE, left) {
                Ok(connection) => {
                    return Ok(StoreClient {
                        access: access.clone(),
                        timeout,
                        connection: Mutex::new(Some(connection)),
                    });
                }
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

    fn exchange(
        connection: &mut Connection<TcpStream>,
        request: StoreRequest,
    ) -> Result<Reply, secure_link::Error> {
        let timeout = request.timeout.saturating_add(REPLY_TIMEOUT);
        connection.send(&Request::from(request))?;
        connection.receive(Some(timeout))
    }
}

impl StoreBackend for StoreClient {
    fn call(&self, request: StoreRequest) -> Result<StoreReply, Error> {
        let mut held = self.connection.lock();
        let address = self.access.address;
        let Some(mut connection) = held.take() else {
            let reason = format!("lost the connection to the store at {address}");
            return Err(Error::new(reason));
        };
        match StoreClient::exchange(&mut connection, request) {
            Ok(reply) => {
                *held = Some(connection);
                match reply {
                    Reply::Done(values) => Ok(values.into()),
                    Reply::Failed(reason) => Err(Error::new(reason)),
                }
            }
            Err(error) => Err(Error::new(format!("the store at {address}: {error}"))),
        }
    }

    fn reconnect(&self) -> Result<Box<dyn StoreBackend>, Error> {
        let client = StoreClient::connect(&self.access, self.timeout)?;
        Ok(Box::new(client))
    }
}
