//! Streams and events of any device that has them, by c10's device guard.
//!
//! The same code serves CUDA and PrivateUse1 backends.

use crate::{
    Error,
    ffi::{self, Handle},
};
use std::ffi::c_void;
use tch::Tensor;
use torch_sys::C_tensor;

/// A queue of work on a device.
pub struct Stream(Handle);

/// A point in the queue of a stream.
pub struct Event(Handle);

// SAFETY: a c10::Stream consists of three integers.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: any thread may record, query and wait for an event (c10/core/Event.h), if only one thread
// at a time changes it.
unsafe impl Send for Event {}
// SAFETY: an event is only read after `Stream::record` has created it.
unsafe impl Sync for Event {}

/// The priority of a stream, if the device has priorities. Each has a pool of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// That of the stream on which a device computes by default.
    Normal,
    High,
}

impl Priority {
    /// The number of different streams in the pool of CUDA or torch_npu for one priority.
    pub const STREAMS: usize = 32;
}

impl Stream {
    /// Returns the stream on which this thread queues work for the device of `like`.
    ///
    /// # Errors
    /// libtorch's message; a CPU has no streams.
    pub fn current(like: &Tensor) -> Result<Stream, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the tensor is live, and `out` is an out-parameter.
        ffi::check(unsafe { ffi::mtx_stream_current(like.as_ptr() as *mut C_tensor, &mut out) })?;
        Ok(Stream(out))
    }

    /// Returns a stream from the pool of the device of `like`, round-robin.
    ///
    /// The pool has [`Priority::STREAMS`] streams; then it returns the first one again.
    ///
    /// # Errors
    /// As [`Stream::current`].
    pub fn from_pool(like: &Tensor, priority: Priority) -> Result<Stream, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the tensor is live, and `out` is an out-parameter.
        ffi::check(unsafe {
            let is_high = priority == Priority::High;
            ffi::mtx_stream_from_pool(like.as_ptr() as *mut C_tensor, is_high, &mut out)
        })?;
        Ok(Stream(out))
    }

    /// Makes this the current stream of the calling thread.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn make_current(&self) -> Result<(), Error> {
        // SAFETY: the stream is live.
        ffi::check(unsafe { ffi::mtx_stream_make_current(self.0) })
    }

    /// Records that queued work of this stream uses `tensor`, which belongs to another stream.
    ///
    /// When the tensor is freed, the allocator reuses its memory only after that work.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn record_tensor(&self, tensor: &Tensor) -> Result<(), Error> {
        // SAFETY: the stream and the tensor are live.
        ffi::check(unsafe {
            ffi::mtx_stream_record_tensor(self.0, tensor.as_ptr() as *mut C_tensor)
        })
    }

    /// Returns the vendor's handle (`cudaStream_t`, `aclrtStream`), which lives as long as the
    /// process.
    ///
    /// # Errors
    /// If the backend does not provide it.
    pub fn handle(&self) -> Result<*mut c_void, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the stream is live, and `out` is an out-parameter.
        ffi::check(unsafe { ffi::mtx_stream_handle(self.0, &mut out) })?;
        Ok(out)
    }

    /// Records an event at the end of the queue.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn record(&self) -> Result<Event, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the stream is live, and `out` is an out-parameter.
        ffi::check(unsafe { ffi::mtx_event_record(self.0, &mut out) })?;
        Ok(Event(out))
    }

    /// Makes later work of this stream wait for `event`, without blocking the host.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: the stream and the event are live.
        ffi::check(unsafe { ffi::mtx_event_block(event.0, self.0) })
    }
}

impl Event {
    /// Returns true if the device has reached the event.
    ///
    /// # Errors
    /// The message of an asynchronous failure of earlier work.
    pub fn is_done(&self) -> Result<bool, Error> {
        let mut done = false;
        // SAFETY: the event is live, and `done` is an out-parameter.
        ffi::check(unsafe { ffi::mtx_event_query(self.0, &mut done) })?;
        Ok(done)
    }

    /// Blocks the host until the device has reached the event.
    ///
    /// # Errors
    /// The message of an asynchronous failure of earlier work.
    pub fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event is live.
        ffi::check(unsafe { ffi::mtx_event_synchronize(self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { ffi::mtx_stream_free(self.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once. An event may be destroyed before the device
        // reaches it.
        unsafe { ffi::mtx_event_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn a_cpu_has_no_stream_pool() {
        let host = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        assert!(Stream::from_pool(&host, Priority::High).is_err());
    }
}
