//! Streams and events of any device that has them, through c10's device guard: the same code for CUDA and for backends that
//! come as PrivateUse1.

use crate::ffi::Handle;
use crate::{Error, ffi};
use std::ffi::c_void;
use tch::Tensor;
use torch_sys::C_tensor;

/// A queue of work of one device.
pub struct Stream(Handle);

/// A place in a stream's queue.
pub struct Event(Handle);

// SAFETY: a c10::Stream is three numbers.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: an event may be recorded, waited for and asked from any thread (c10/core/Event.h; one thread at a time changes it).
unsafe impl Send for Event {}
// SAFETY: after it was recorded it is only read.
unsafe impl Sync for Event {}

/// Makes the calling thread work on the device of `like`, for libraries that ask the thread which device it means.
///
/// # Errors
/// libtorch's message.
pub fn set_device(like: &Tensor) -> Result<(), Error> {
    // SAFETY: a live tensor.
    ffi::check(unsafe { ffi::mtx_set_device(like.as_ptr() as *mut C_tensor) })
}

impl Stream {
    /// The one on which this thread queues work for the device of `like`.
    ///
    /// # Errors
    /// libtorch's message: on a host there are no streams.
    pub fn current(like: &Tensor) -> Result<Stream, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: a live tensor and an out-parameter.
        ffi::check(unsafe { ffi::mtx_stream_current(like.as_ptr() as *mut C_tensor, &mut out) })?;
        Ok(Stream(out))
    }

    /// Another one of that device, from its backend's pool (of 32, with CUDA and torch_npu, in turns).
    ///
    /// # Errors
    /// As [`Stream::current`].
    pub fn from_pool(like: &Tensor) -> Result<Stream, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: a live tensor and an out-parameter.
        ffi::check(unsafe { ffi::mtx_stream_from_pool(like.as_ptr() as *mut C_tensor, &mut out) })?;
        Ok(Stream(out))
    }

    /// What this thread queues from here on goes there.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn make_current(&self) -> Result<(), Error> {
        // SAFETY: a live stream.
        ffi::check(unsafe { ffi::mtx_stream_make_current(self.0) })
    }

    /// What is queued here uses `tensor`, which was made on another stream: when it is freed, nobody gets its memory before that is
    /// done.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn record_tensor(&self, tensor: &Tensor) -> Result<(), Error> {
        // SAFETY: a live stream and a live tensor.
        ffi::check(unsafe {
            ffi::mtx_stream_record_tensor(self.0, tensor.as_ptr() as *mut C_tensor)
        })
    }

    /// The vendor's handle of it (`cudaStream_t`, `aclrtStream`), which lives as long as the process.
    ///
    /// # Errors
    /// When the backend does not give it.
    pub fn handle(&self) -> Result<*mut c_void, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: a live stream and an out-parameter.
        ffi::check(unsafe { ffi::mtx_stream_handle(self.0, &mut out) })?;
        Ok(out)
    }

    /// Marks the end of what is queued now.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn record(&self) -> Result<Event, Error> {
        let mut out = std::ptr::null_mut();
        // SAFETY: a live stream and an out-parameter.
        ffi::check(unsafe { ffi::mtx_event_record(self.0, &mut out) })?;
        Ok(Event(out))
    }

    /// What is queued from here on begins after `event`; nobody waits on the host.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: a live stream and a live event.
        ffi::check(unsafe { ffi::mtx_event_block(event.0, self.0) })
    }
}

impl Event {
    /// Whether the device has got there.
    ///
    /// # Errors
    /// An asynchronous failure of earlier work.
    pub fn is_done(&self) -> Result<bool, Error> {
        let mut done = false;
        // SAFETY: a live event and an out-parameter.
        ffi::check(unsafe { ffi::mtx_event_query(self.0, &mut done) })?;
        Ok(done)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by the edge, freed once.
        unsafe { ffi::mtx_stream_free(self.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by the edge, freed once; a recorded event may be destroyed before it happened.
        unsafe { ffi::mtx_event_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn a_host_has_no_streams_beside_its_own() {
        let host = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        assert!(Stream::from_pool(&host).is_err());
    }
}
