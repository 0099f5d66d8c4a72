//! Messages between a store's clients and its server.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use torch_ext::{StoreOperation, StoreReply, StoreRequest};

/// A [`StoreRequest`] as it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    operation: u8,
    keys: Vec<Vec<u8>>,
    values: Vec<Vec<u8>>,
    number: i64,
    timeout_ms: u64,
}

impl From<StoreRequest> for Request {
    fn from(request: StoreRequest) -> Request {
        Request {
            operation: request.operation as u8,
            keys: request.keys,
            values: request.values,
            number: request.number,
            timeout_ms: request.timeout.as_millis() as u64,
        }
    }
}

impl Request {
    /// Returns the request; None if no operation has its number.
    pub(super) fn decoded(self) -> Option<StoreRequest> {
        Some(StoreRequest {
            operation: StoreOperation::from_number(self.operation)?,
            keys: self.keys,
            values: self.values,
            number: self.number,
            timeout: Duration::from_millis(self.timeout_ms),
        })
    }
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reply {
    Done(Values),
    /// The reason of the failure.
    Failed(String),
}

/// A [`StoreReply`] as it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Values {
    number: i64,
    values: Vec<Vec<u8>>,
}

impl From<StoreReply> for Values {
    fn from(reply: StoreReply) -> Values {
        Values {
            number: reply.number,
            values: reply.values,
        }
    }
}

impl From<Values> for StoreReply {
    fn from(reply: Values) -> StoreReply {
        StoreReply {
            number: reply.number,
            values: reply.values,
        }
    }
}
