//! A c10d store whose operations a Rust object carries out.

use crate::{Error, Store, callback::guarded, ffi};
use std::{
    ffi::{c_char, c_void},
    time::Duration,
};

/// An operation of a [`StoreBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StoreOperation {
    /// Sets each key to the value at the same index.
    Set,
    /// Waits for all keys and returns their values.
    Get,
    /// Adds `number` to a counter, in decimal text, and returns its new value as the number.
    Add,
    /// Sets the key to the second value if it has the first, or is missing and the first is empty.
    /// Returns the key's value afterwards, or the first value if the key is missing.
    CompareSet,
    /// Returns 1 as the number if all keys are set.
    Check,
    /// Waits for all keys.
    Wait,
    /// Deletes the keys, and returns the count of deleted ones as the number.
    Delete,
    /// Returns the count of keys as the number.
    Count,
    /// Appends the value to that of the key.
    Append,
}

impl StoreOperation {
    const ALL: [StoreOperation; 9] = [
        StoreOperation::Set,
        StoreOperation::Get,
        StoreOperation::Add,
        StoreOperation::CompareSet,
        StoreOperation::Check,
        StoreOperation::Wait,
        StoreOperation::Delete,
        StoreOperation::Count,
        StoreOperation::Append,
    ];

    /// Returns the operation with this number.
    pub fn from_number(number: u8) -> Option<StoreOperation> {
        StoreOperation::ALL.get(usize::from(number)).copied()
    }
}

/// An operation with its operands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreRequest {
    pub operation: StoreOperation,
    pub keys: Vec<Vec<u8>>,
    pub values: Vec<Vec<u8>>,
    pub number: i64,
    /// The longest wait for keys.
    pub timeout: Duration,
}

/// The result of an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreReply {
    pub number: i64,
    pub values: Vec<Vec<u8>>,
}

/// A key-value store outside of libtorch, such as a client of a server.
pub trait StoreBackend: Send + Sync {
    /// Carries out an operation.
    ///
    /// # Errors
    /// If a key does not appear in time, or the store is gone.
    fn call(&self, request: StoreRequest) -> Result<StoreReply, Error>;

    /// Returns another client of the same store.
    ///
    /// # Errors
    /// If the store cannot be reached.
    fn reconnect(&self) -> Result<Box<dyn StoreBackend>, Error>;
}

/// A boxed box, because a pointer to a trait object has two words.
type State = Box<dyn StoreBackend>;

impl Store {
    /// Returns a store whose operations `backend` carries out, with `timeout` for its waits.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn custom(backend: Box<dyn StoreBackend>, timeout: Duration) -> Result<Store, Error> {
        let mut out = std::ptr::null_mut();
        let state = into_raw(backend);
        // SAFETY: the store takes ownership of the state and frees it once with `drop_state`.
        ffi::check(unsafe {
            let timeout_ms = timeout.as_millis() as i64;
            ffi::mtx_store_custom(state, call, clone_state, drop_state, timeout_ms, &mut out)
        })?;
        Ok(Store(out))
    }
}

fn into_raw(backend: Box<dyn StoreBackend>) -> *mut c_void {
    let state: Box<State> = Box::new(backend);
    Box::into_raw(state) as *mut c_void
}

unsafe extern "C" fn call(
    state: *mut c_void,
    request: *const ffi::StoreRequest,
    number: *mut i64,
    values: *mut c_void,
) -> *mut c_char {
    guarded(|| {
        // SAFETY: `state` is the box of `into_raw`, which the caller keeps until `drop_state`.
        let backend = unsafe { &*(state as *const State) };
        // SAFETY: the request and its arrays live through the call.
        let request = unsafe { to_request(&*request)? };
        let reply = backend.call(request)?;
        for value in &reply.values {
            // SAFETY: `values` is the caller's vector, which copies the bytes.
            unsafe { ffi::mtx_push_value(values, value.as_ptr(), value.len()) }
        }
        // SAFETY: `number` is an out-parameter.
        unsafe { *number = reply.number }
        Ok(())
    })
}

unsafe extern "C" fn clone_state(state: *mut c_void, out: *mut *mut c_void) -> *mut c_char {
    guarded(|| {
        // SAFETY: as in `call`.
        let backend = unsafe { &*(state as *const State) };
        let clone = into_raw(backend.reconnect()?);
        // SAFETY: `out` is an out-parameter, whose value the caller owns.
        unsafe { *out = clone }
        Ok(())
    })
}

unsafe extern "C" fn drop_state(state: *mut c_void) {
    // SAFETY: C++ calls this once, with the pointer of `into_raw`.
    drop(unsafe { Box::from_raw(state as *mut State) });
}

/// # Safety
/// The arrays of `request` must be live.
unsafe fn to_request(request: &ffi::StoreRequest) -> Result<StoreRequest, Error> {
    let operation = StoreOperation::from_number(request.operation)
        .ok_or_else(|| Error::new("unknown operation of a store"))?;
    Ok(StoreRequest {
        operation,
        // SAFETY: the caller's promise.
        keys: unsafe { copy(request.keys, request.num_keys) },
        // SAFETY: the caller's promise.
        values: unsafe { copy(request.values, request.num_values) },
        number: request.number,
        timeout: Duration::from_millis(request.timeout_ms.max(0) as u64),
    })
}

/// # Safety
/// `first` must point to `count` live arrays.
unsafe fn copy(first: *const ffi::Bytes, count: usize) -> Vec<Vec<u8>> {
    let slice = |bytes: &ffi::Bytes| {
        if bytes.size == 0 {
            return Vec::new();
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(bytes.data, bytes.size) }.to_vec()
    };
    if count == 0 {
        return Vec::new();
    }
    // SAFETY: the caller's promise.
    let all = unsafe { std::slice::from_raw_parts(first, count) };
    all.iter().map(slice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// Records requests, and answers each with its keys.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<StoreRequest>>>);

    impl StoreBackend for Recorder {
        fn call(&self, request: StoreRequest) -> Result<StoreReply, Error> {
            self.0.lock().push(request.clone());
            if request.keys.iter().any(|key| key == b"in/panic") {
                panic!("a panic in a store");
            }
            if request.keys.iter().any(|key| key == b"in/wrong") {
                return Err(Error::new("no such key"));
            }
            Ok(StoreReply {
                number: 7,
                values: request.keys,
            })
        }
        fn reconnect(&self) -> Result<Box<dyn StoreBackend>, Error> {
            Ok(Box::new(self.clone()))
        }
    }

    #[test]
    fn operations_reach_the_backend_with_their_operands() {
        let recorder = Recorder::default();
        let timeout = Duration::from_millis(1234);
        let store = Store::custom(Box::new(recorder.clone()), timeout).unwrap();
        let store = store.prefixed("in").unwrap();
        assert_eq!(store.get("a").unwrap(), b"in/a");
        store.set("b", &[0, 255]).unwrap();
        assert_eq!(store.add("n", -2).unwrap(), 7);
        assert!(store.contains("c").unwrap());
        let seen = recorder.0.lock().clone();
        let operations: Vec<_> = seen.iter().map(|request| request.operation).collect();
        use StoreOperation::{Add, Check, Get, Set};
        assert_eq!(operations, [Get, Set, Add, Check]);
        assert_eq!(seen[1].values, [[0, 255]]);
        assert_eq!((seen[2].number, seen[2].timeout), (-2, timeout));
        for (key, expected) in [("wrong", "no such key"), ("panic", "a panic in a store")] {
            let error = store.get(key).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
