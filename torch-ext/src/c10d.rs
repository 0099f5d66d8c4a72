//! c10d's stores and Gloo process group.

use crate::{Error, ffi};
use std::ffi::c_int;
use std::time::{Duration, Instant};
use tch::Tensor;
use torch_sys::C_tensor;

/// A key-value store that ranks meet at: torchrun's rendezvous protocol.
pub struct Store(ffi::Handle);

// SAFETY: c10d's stores guard their state with a mutex of their own.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the TCP store at `host:port`, or serves it there (port 0: any free port).
    ///
    /// # Errors
    /// When the port is taken (serving) or nobody answers within `timeout` (connecting).
    pub fn tcp(host: &str, port: u16, is_server: bool, timeout: Duration) -> Result<Store, Error> {
        let host = ffi::c_string(host)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: `host` outlives the call; `out` receives an owned handle.
        ffi::check(unsafe {
            ffi::mtx_store_tcp(host.as_ptr(), port, is_server, millis(timeout), &mut out)
        })?;
        Ok(Store(out))
    }

    /// The same store, with `prefix` put before every key.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn prefixed(&self, prefix: &str) -> Result<Store, Error> {
        let prefix = ffi::c_string(prefix)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: `self.0` is a live store; `out` receives an owned handle.
        ffi::check(unsafe { ffi::mtx_store_prefix(self.0, prefix.as_ptr(), &mut out) })?;
        Ok(Store(out))
    }

    /// The port of a TCP store.
    ///
    /// # Errors
    /// When this is not a TCP store.
    pub fn port(&self) -> Result<u16, Error> {
        let mut port = 0;
        // SAFETY: live store, live out-parameter.
        ffi::check(unsafe { ffi::mtx_store_port(self.0, &mut port) })?;
        Ok(port)
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = ffi::c_string(key)?;
        // SAFETY: live store; the value is copied before the call returns.
        ffi::check(unsafe { ffi::mtx_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Waits for `key` and returns its value.
    ///
    /// # Errors
    /// When the key does not appear within the store's timeout, or the server is gone.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
        let key = ffi::c_string(key)?;
        let mut data = std::ptr::null_mut();
        let mut size = 0;
        // SAFETY: on success `data` is a buffer of `size` bytes, copied here and freed.
        unsafe {
            ffi::check(ffi::mtx_store_get(
                self.0,
                key.as_ptr(),
                &mut data,
                &mut size,
            ))?;
            let value = std::slice::from_raw_parts(data, size).to_vec();
            ffi::mtx_free(data);
            Ok(value)
        }
    }

    /// Adds to the counter `key` and returns its new value.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = ffi::c_string(key)?;
        let mut out = 0;
        // SAFETY: live store, live out-parameter.
        ffi::check(unsafe { ffi::mtx_store_add(self.0, key.as_ptr(), amount, &mut out) })?;
        Ok(out)
    }

    /// Whether `key` is there now.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn contains(&self, key: &str) -> Result<bool, Error> {
        let key = ffi::c_string(key)?;
        let mut out = false;
        // SAFETY: live store, live out-parameter.
        ffi::check(unsafe { ffi::mtx_store_check(self.0, key.as_ptr(), &mut out) })?;
        Ok(out)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: an owned handle, freed once.
        unsafe { ffi::mtx_store_free(self.0) }
    }
}

/// How the values of the ranks are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReduceOp {
    /// The sum.
    Sum = 0,
    /// The least value.
    Min = 3,
    /// The greatest value.
    Max = 4,
}

/// Where Gloo listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GlooAddress {
    /// An address or host name of this machine.
    Host(String),
    /// A network interface, such as `eth0`.
    Interface(String),
    /// The address this machine's host name resolves to.
    Default,
}

/// A Gloo process group. Every rank calls its operations in the same order.
pub struct Gloo(ffi::Handle);

// SAFETY: ProcessGroupGloo queues operations under a mutex; its workers run them.
unsafe impl Send for Gloo {}
// SAFETY: as above.
unsafe impl Sync for Gloo {}

macro_rules! start {
    ($function:ident, $($argument:expr),*) => {{
        let mut work = std::ptr::null_mut();
        // SAFETY: all handles and tensors are live; on success `work` is an owned handle that keeps the tensors
        // of the operation alive.
        ffi::check(unsafe { ffi::$function($($argument,)* &mut work) })?;
        Ok(Work(work))
    }};
}

impl Gloo {
    /// Joins the group of `size` ranks that meets at `store`. Blocks until all are there.
    ///
    /// # Errors
    /// When a rank does not come within `timeout`, or the address is not this machine's.
    pub fn new(
        store: &Store,
        rank: usize,
        size: usize,
        timeout: Duration,
        at: &GlooAddress,
    ) -> Result<Gloo, Error> {
        let (address, interface) = match at {
            GlooAddress::Host(host) => (host.as_str(), ""),
            GlooAddress::Interface(name) => ("", name.as_str()),
            GlooAddress::Default => ("", ""),
        };
        let address = ffi::c_string(address)?;
        let interface = ffi::c_string(interface)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: live store and strings; `out` receives an owned handle.
        ffi::check(unsafe {
            ffi::mtx_gloo_new(
                store.0,
                rank as c_int,
                size as c_int,
                millis(timeout),
                address.as_ptr(),
                interface.as_ptr(),
                &mut out,
            )
        })?;
        Ok(Gloo(out))
    }

    /// Combines `tensor` over all ranks, in place.
    ///
    /// # Errors
    /// When the operation cannot be queued; what happens later is the [`Work`]'s.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, Error> {
        start!(mtx_gloo_all_reduce, self.0, raw(tensor), op as u8)
    }

    /// Copies `tensor` of rank `root` to all.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, Error> {
        start!(mtx_gloo_broadcast, self.0, raw(tensor), root as i64)
    }

    /// Concatenates the ranks' `input` along dim 0 into `output`.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, Error> {
        start!(mtx_gloo_all_gather, self.0, raw(output), raw(input))
    }

    /// Combines the ranks' `input` and leaves each its part along dim 0 in `output`.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, Error> {
        start!(
            mtx_gloo_reduce_scatter,
            self.0,
            raw(output),
            raw(input),
            op as u8
        )
    }

    /// Sends `input_splits[r]` rows to rank `r` and receives `output_splits[r]` rows from it; zero is allowed.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`]. Splits that do not add up are found while it runs: check them first.
    pub fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, Error> {
        assert_eq!(
            output_splits.len(),
            input_splits.len(),
            "one split for each rank on both sides"
        );
        start!(
            mtx_gloo_all_to_all,
            self.0,
            raw(output),
            raw(input),
            output_splits.as_ptr(),
            input_splits.as_ptr(),
            input_splits.len()
        )
    }

    /// Sends `tensor` to rank `to`.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, Error> {
        start!(mtx_gloo_send, self.0, raw(tensor), to as c_int, tag)
    }

    /// Receives into `tensor` from rank `from`.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, Error> {
        start!(mtx_gloo_recv, self.0, raw(tensor), from as c_int, tag)
    }

    /// Completes when every rank has called it.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn barrier(&self) -> Result<Work, Error> {
        start!(mtx_gloo_barrier, self.0)
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: an owned handle, freed once; the destructor joins Gloo's threads.
        unsafe { ffi::mtx_gloo_free(self.0) }
    }
}

/// An operation under way.
#[must_use = "an operation that nobody waits for may not have happened"]
pub struct Work(ffi::Handle);

// SAFETY: c10d's Work guards its state with a mutex.
unsafe impl Send for Work {}
// SAFETY: as above.
unsafe impl Sync for Work {}

impl Work {
    /// Whether it has ended, well or not.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn is_completed(&self) -> Result<bool, Error> {
        let mut out = false;
        // SAFETY: live handle, live out-parameter.
        ffi::check(unsafe { ffi::mtx_work_is_completed(self.0, &mut out) })?;
        Ok(out)
    }

    /// Waits for the end, and gives up between operations when `aborted` says so.
    ///
    /// # Errors
    /// The operation's own failure (a peer gone, a timeout), or that it was given up.
    pub fn wait(&self, aborted: impl Fn() -> bool) -> Result<(), Error> {
        // Collectives can be waited for in slices, so that another thread's abort is seen soon.
        const SLICE: Duration = Duration::from_millis(200);
        loop {
            let started = Instant::now();
            // SAFETY: live handle.
            match ffi::check(unsafe { ffi::mtx_work_wait(self.0, millis(SLICE)) }) {
                Ok(()) => return Ok(()),
                // It may have ended well between the end of the slice and this question: ask for its own result.
                // SAFETY: live handle.
                Err(_) if self.is_completed()? => {
                    return ffi::check(unsafe { ffi::mtx_work_wait(self.0, 0) });
                }
                Err(error) if started.elapsed() < SLICE => return Err(error),
                Err(_) if aborted() => return Err(Error::new("the group was aborted")),
                Err(_) => {}
            }
        }
    }

    /// Waits for a send or receive, whose own timeout is the group's; these cannot be waited for in slices.
    ///
    /// # Errors
    /// The operation's own failure.
    pub fn wait_point_to_point(&self) -> Result<(), Error> {
        // SAFETY: live handle.
        ffi::check(unsafe { ffi::mtx_work_wait(self.0, 0) })
    }

    /// Ends a send or receive that is being waited for by another thread.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn abort(&self) -> Result<(), Error> {
        // SAFETY: live handle.
        ffi::check(unsafe { ffi::mtx_work_abort(self.0) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: an owned handle, freed once.
        unsafe { ffi::mtx_work_free(self.0) }
    }
}

fn raw(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr() as *mut C_tensor
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_serves_its_clients() {
        let second = Duration::from_secs(1);
        let server = Store::tcp("127.0.0.1", 0, true, second).unwrap();
        let client = Store::tcp("127.0.0.1", server.port().unwrap(), false, second).unwrap();
        client.set("a", b"one").unwrap();
        assert_eq!(server.get("a").unwrap(), b"one");
        assert_eq!(client.add("n", 2).unwrap() + client.add("n", 3).unwrap(), 7);
        let inner = client.prefixed("inner").unwrap();
        assert!(!inner.contains("a").unwrap() && client.contains("a").unwrap());
        assert!(
            inner
                .get("missing")
                .unwrap_err()
                .to_string()
                .to_lowercase()
                .contains("time")
        );
    }

    #[test]
    fn a_taken_port_is_an_error() {
        let server = Store::tcp("127.0.0.1", 0, true, Duration::from_secs(1)).unwrap();
        let error = Store::tcp(
            "127.0.0.1",
            server.port().unwrap(),
            true,
            Duration::from_secs(1),
        )
        .err()
        .unwrap();
        assert!(
            error.to_string().contains("address already in use"),
            "{error}"
        );
    }

    #[test]
    fn two_ranks_exchange_uneven_parts() {
        let server = Store::tcp("127.0.0.1", 0, true, Duration::from_secs(20)).unwrap();
        let port = server.port().unwrap();
        let ranks: Vec<_> = (0..2usize)
            .map(|rank| {
                std::thread::spawn(move || {
                    let timeout = Duration::from_secs(20);
                    let store = Store::tcp("127.0.0.1", port, false, timeout).unwrap();
                    let at = GlooAddress::Host("127.0.0.1".into());
                    let group = Gloo::new(&store, rank, 2, timeout, &at).unwrap();
                    // Rank 0 holds [0 1 2] and sends [0] to itself, [1 2] to rank 1; rank 1 sends all to rank 0.
                    let input =
                        Tensor::from_slice(if rank == 0 { &[0i64, 1, 2] } else { &[3i64, 4] });
                    let output = Tensor::zeros(
                        [if rank == 0 { 3 } else { 2 }],
                        (tch::Kind::Int64, tch::Device::Cpu),
                    );
                    let (out, inp): (&[i64], &[i64]) = if rank == 0 {
                        (&[1, 2], &[1, 2])
                    } else {
                        (&[2, 0], &[2, 0])
                    };
                    group
                        .all_to_all(&output, &input, out, inp)
                        .unwrap()
                        .wait(|| false)
                        .unwrap();
                    Vec::<i64>::try_from(output).unwrap()
                })
            })
            .collect();
        let results: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
        assert_eq!(results, [vec![0, 3, 4], vec![1, 2]]);
    }
}
