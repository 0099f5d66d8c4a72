//! c10d's key-value stores and Gloo process group.

use crate::{Error, ffi};
use std::{
    ffi::{c_int, c_void},
    net::{IpAddr, TcpListener},
    os::fd::IntoRawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tch::Tensor;
use torch_sys::C_tensor;

/// A key-value store for the rendezvous of ranks.
pub struct Store(pub(crate) ffi::Handle);

// SAFETY: c10d's stores guard their state with a mutex.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to c10d's TCP store at `host:port`, which does not authenticate its clients.
    ///
    /// # Errors
    /// If no server answers within `timeout`.
    pub fn connect_tcp(host: &str, port: u16, timeout: Duration) -> Result<Store, Error> {
        let host = ffi::c_string(host)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: `host` lives through the call, and `out` receives an owned handle.
        ffi::check(unsafe {
            ffi::mtx_store_connect(host.as_ptr(), port, millis(timeout), &mut out)
        })?;
        Ok(Store(out))
    }

    /// Serves c10d's TCP store on a bound socket, and nowhere else.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn serve_tcp(listener: TcpListener, timeout: Duration) -> Result<Store, Error> {
        let address = listener.local_addr();
        let address = address.map_err(|error| Error::new(error.to_string()))?;
        // The process is a client of its own server.
        let host = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_string(),
            IpAddr::V6(ip) if ip.is_unspecified() => "::1".to_string(),
            ip => ip.to_string(),
        };
        let host = ffi::c_string(&host)?;
        let fd = listener.into_raw_fd();
        let mut out = std::ptr::null_mut();
        // SAFETY: the server takes over the socket, `host` lives through the call, and `out`
        // receives an owned handle.
        ffi::check(unsafe {
            ffi::mtx_store_serve(fd, host.as_ptr(), address.port(), millis(timeout), &mut out)
        })?;
        Ok(Store(out))
    }

    /// Returns a view of this store that puts `prefix` before every key.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn prefixed(&self, prefix: &str) -> Result<Store, Error> {
        let prefix = ffi::c_string(prefix)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: the store is live, and `out` receives an owned handle.
        ffi::check(unsafe { ffi::mtx_store_prefix(self.0, prefix.as_ptr(), &mut out) })?;
        Ok(Store(out))
    }

    /// Returns the port of a TCP store.
    ///
    /// # Errors
    /// If this is not a TCP store.
    pub fn port(&self) -> Result<u16, Error> {
        let mut port = 0;
        // SAFETY: the store is live, and the pointer is an out-parameter.
        ffi::check(unsafe { ffi::mtx_store_port(self.0, &mut port) })?;
        Ok(port)
    }

    /// Sets the value of `key`.
    ///
    /// # Errors
    /// If the server is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = ffi::c_string(key)?;
        // SAFETY: the store is live, and the value is copied before the call returns.
        ffi::check(unsafe { ffi::mtx_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Waits for `key` and returns its value.
    ///
    /// # Errors
    /// If the key does not appear within the store's timeout, or the server is gone.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
        let key = ffi::c_string(key)?;
        let mut data = std::ptr::null_mut();
        let mut size = 0;
        // SAFETY: on success `data` is a buffer of `size` bytes, which is copied and freed here.
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
    /// If the server is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = ffi::c_string(key)?;
        let mut out = 0;
        // SAFETY: the store is live, and the pointer is an out-parameter.
        ffi::check(unsafe { ffi::mtx_store_add(self.0, key.as_ptr(), amount, &mut out) })?;
        Ok(out)
    }

    /// Appends to the value of `key`, which may be missing.
    ///
    /// # Errors
    /// If the server is gone.
    pub fn append(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = ffi::c_string(key)?;
        // SAFETY: as for `set`.
        ffi::check(unsafe {
            ffi::mtx_store_append(self.0, key.as_ptr(), value.as_ptr(), value.len())
        })
    }

    /// Returns true if `key` is set.
    ///
    /// # Errors
    /// If the server is gone.
    pub fn contains(&self, key: &str) -> Result<bool, Error> {
        let key = ffi::c_string(key)?;
        let mut out = false;
        // SAFETY: the store is live, and the pointer is an out-parameter.
        ffi::check(unsafe { ffi::mtx_store_check(self.0, key.as_ptr(), &mut out) })?;
        Ok(out)
    }

    /// Waits for `key` for `timeout`, whatever the store's own timeout is.
    ///
    /// # Errors
    /// If the key does not appear in time, or the server is gone.
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<(), Error> {
        let key = ffi::c_string(key)?;
        // SAFETY: the store is live, and `key` lives through the call.
        ffi::check(unsafe { ffi::mtx_store_wait(self.0, key.as_ptr(), millis(timeout)) })
    }

    /// Waits for all keys and returns their values in the order of the keys, with one request.
    ///
    /// # Errors
    /// As for [`Store::get`].
    pub fn multi_get(&self, keys: &[String]) -> Result<Vec<Vec<u8>>, Error> {
        let keys = keys.iter().map(|key| ffi::c_string(key));
        let keys = keys.collect::<Result<Vec<_>, Error>>()?;
        let pointers: Vec<_> = keys.iter().map(|key| key.as_ptr()).collect();
        let mut values: Vec<Vec<u8>> = Vec::with_capacity(keys.len());
        let state = (&raw mut values).cast();
        // SAFETY: the store and the keys live through the call, which calls `take_value` only
        // meanwhile, with the state that it expects.
        ffi::check(unsafe {
            ffi::mtx_store_multi_get(self.0, pointers.as_ptr(), keys.len(), take_value, state)
        })?;
        Ok(values)
    }
}

/// Adds a value to the `Vec<Vec<u8>>` at `state`.
unsafe extern "C" fn take_value(state: *mut c_void, data: *const u8, size: usize) {
    // SAFETY: `multi_get` passes its own list, which nothing else uses during the call.
    let values = unsafe { &mut *state.cast::<Vec<Vec<u8>>>() };
    let value = match size {
        0 => Vec::new(),
        // SAFETY: the caller's array of `size` bytes.
        _ => unsafe { std::slice::from_raw_parts(data, size) }.to_vec(),
    };
    values.push(value);
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { ffi::mtx_store_free(self.0) }
    }
}

/// The operation of a reduction over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReduceOp {
    Sum = 0,
    Min = 3,
    Max = 4,
}

/// The address on which Gloo listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GlooAddress {
    /// An address or host name of this machine.
    Host(String),
    /// A network interface, such as `eth0`.
    Interface(String),
    /// The address to which this machine's host name resolves.
    Default,
}

/// Files in PEM format with which Gloo encrypts its connections. Both sides of a connection check
/// that the authority signed the other's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlooTls {
    pub key: PathBuf,
    pub certificate: PathBuf,
    pub authority: PathBuf,
}

/// The socket at which Gloo listens for other ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlooDevice {
    pub address: GlooAddress,
    pub tls: Option<GlooTls>,
    /// Networks from which ranks may connect; any if empty.
    pub peers: Vec<PeerNetwork>,
}

/// Addresses whose first `prefix` bits are those of `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerNetwork {
    pub address: IpAddr,
    pub prefix: u8,
}

impl GlooDevice {
    /// Returns a device that listens at this address, without encryption, for anyone.
    pub fn at(address: GlooAddress) -> GlooDevice {
        GlooDevice {
            address,
            tls: None,
            peers: Vec::new(),
        }
    }

    /// Calls `use_device` with the C form of this device.
    fn with_raw<T>(&self, use_device: impl FnOnce(&ffi::GlooDevice) -> T) -> Result<T, Error> {
        let text = |text: &str| ffi::c_string(text);
        let file = |path: &Path| match path.to_str() {
            Some(path) => ffi::c_string(path),
            None => Err(Error::new(format!("{}: not valid UTF-8", path.display()))),
        };
        let (address, interface) = match &self.address {
            GlooAddress::Host(host) => (text(host)?, text("")?),
            GlooAddress::Interface(name) => (text("")?, text(name)?),
            GlooAddress::Default => (text("")?, text("")?),
        };
        let files = match &self.tls {
            Some(tls) => {
                check_tls()?;
                [&tls.key, &tls.certificate, &tls.authority].map(|path| file(path))
            }
            None => ["", "", ""].map(text),
        };
        let [key, certificate, authority] = files;
        let key = key?;
        let certificate = certificate?;
        let authority = authority?;
        let raw = |peer: &PeerNetwork| ffi::PeerNetwork {
            address: match peer.address {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            },
            prefix: peer.prefix,
        };
        let peers: Vec<ffi::PeerNetwork> = self.peers.iter().map(raw).collect();
        Ok(use_device(&ffi::GlooDevice {
            address: address.as_ptr(),
            interface: interface.as_ptr(),
            key: key.as_ptr(),
            certificate: certificate.as_ptr(),
            authority: authority.as_ptr(),
            peers: peers.as_ptr(),
            num_peers: peers.len(),
        }))
    }
}

/// Checks that libtorch finds the library with which Gloo encrypts.
///
/// # Errors
/// If the library is missing.
pub fn check_tls() -> Result<(), Error> {
    // The names that libtorch's Gloo opens.
    let names = ["libssl.so.1.1", "libssl.so"];
    // SAFETY: OpenSSL's initializers have no preconditions.
    let opens = |name: &&str| unsafe { libloading::Library::new(*name) }.is_ok();
    if names.iter().any(opens) {
        return Ok(());
    }
    let names = names.join(" nor ");
    let install = "install OpenSSL's development package (libssl-dev or openssl-devel)";
    let reason = format!("Gloo cannot encrypt here, because there is neither {names}: {install}");
    Err(Error::new(reason))
}

/// A Gloo process group. All ranks must call its operations in the same order.
pub struct Gloo(ffi::Handle);

// SAFETY: ProcessGroupGloo queues operations under a mutex, and its workers run them.
unsafe impl Send for Gloo {}
// SAFETY: as above.
unsafe impl Sync for Gloo {}

macro_rules! start {
    ($function:ident, $($argument:expr),*) => {{
        let mut work = std::ptr::null_mut();
        // SAFETY: all handles and tensors are live. On success `work` is an owned handle that keeps
        // the tensors of the operation alive.
        ffi::check(unsafe { ffi::$function($($argument,)* &mut work) })?;
        Ok(Work(work))
    }};
}

impl Gloo {
    /// Joins the group of `size` ranks that share `store`. Blocks until all ranks have joined.
    ///
    /// # Errors
    /// If a rank does not join within `timeout`, or the address is not this machine's.
    pub fn new(
        store: &Store,
        rank: usize,
        size: usize,
        timeout: Duration,
        device: &GlooDevice,
    ) -> Result<Gloo, Error> {
        let mut out = std::ptr::null_mut();
        let rank = rank as c_int;
        let size = size as c_int;
        let timeout_ms = millis(timeout);
        // SAFETY: the store and the device are live, and `out` receives an owned handle.
        let code = device.with_raw(|device| unsafe {
            ffi::mtx_gloo_new(store.0, rank, size, timeout_ms, device, &mut out)
        })?;
        ffi::check(code)?;
        Ok(Gloo(out))
    }

    /// Reduces `tensor` over all ranks, in place.
    ///
    /// # Errors
    /// If the operation cannot be queued. The [`Work`] reports later failures.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, Error> {
        start!(mtx_gloo_all_reduce, self.0, raw(tensor), op as u8)
    }

    /// Copies `tensor` of rank `root` to all ranks.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, Error> {
        start!(mtx_gloo_broadcast, self.0, raw(tensor), root as i64)
    }

    /// Concatenates `input` of all ranks along dimension 0 into `output`.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, Error> {
        start!(mtx_gloo_all_gather, self.0, raw(output), raw(input))
    }

    /// Reduces `input` over all ranks and scatters the result along dimension 0 into `output`.
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

    /// Sends `input_splits[r]` rows to rank `r` and receives `output_splits[r]` rows from it.
    ///
    /// A split may be zero. Callers must check that splits add up: Gloo finds errors only while the
    /// operation runs.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
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
            "all_to_all: numbers of splits differ"
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

    /// Starts a barrier, which completes when every rank has called it.
    ///
    /// # Errors
    /// As [`Gloo::all_reduce`].
    pub fn barrier(&self) -> Result<Work, Error> {
        start!(mtx_gloo_barrier, self.0)
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once; the destructor joins Gloo's threads.
        unsafe { ffi::mtx_gloo_free(self.0) }
    }
}

/// A pending operation of a [`Gloo`] group.
#[must_use = "an operation is only complete after a wait"]
pub struct Work(ffi::Handle);

// SAFETY: c10d's Work guards its state with a mutex.
unsafe impl Send for Work {}
// SAFETY: as above.
unsafe impl Sync for Work {}

impl Work {
    /// Returns true if the operation has completed or failed.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn is_completed(&self) -> Result<bool, Error> {
        let mut out = false;
        // SAFETY: the handle is live, and the pointer is an out-parameter.
        ffi::check(unsafe { ffi::mtx_work_is_completed(self.0, &mut out) })?;
        Ok(out)
    }

    /// Waits for a collective, and returns early if `aborted` returns true.
    ///
    /// # Errors
    /// The failure of the operation (a lost peer, a timeout), or that the group was aborted.
    pub fn wait(&self, aborted: impl Fn() -> bool) -> Result<(), Error> {
        // The wait is sliced so that it notices another thread's abort soon.
        const SLICE: Duration = Duration::from_millis(200);
        loop {
            let started = Instant::now();
            // SAFETY: the handle is live.
            match ffi::check(unsafe { ffi::mtx_work_wait(self.0, millis(SLICE)) }) {
                Ok(()) => return Ok(()),
                // The operation may have completed after the slice ended, so its own result counts.
                Err(_) if self.is_completed()? => {
                    // SAFETY: the handle is live.
                    return ffi::check(unsafe { ffi::mtx_work_wait(self.0, 0) });
                }
                Err(error) if started.elapsed() < SLICE => return Err(error),
                Err(_) if aborted() => return Err(Error::new("the group was aborted")),
                Err(_) => {}
            }
        }
    }

    /// Waits for a send or receive, with the timeout of the group.
    ///
    /// Gloo cannot wait for these in slices.
    ///
    /// # Errors
    /// The failure of the operation.
    pub fn wait_point_to_point(&self) -> Result<(), Error> {
        // SAFETY: the handle is live.
        ffi::check(unsafe { ffi::mtx_work_wait(self.0, 0) })
    }

    /// Aborts a send or receive for which another thread waits.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn abort(&self) -> Result<(), Error> {
        // SAFETY: the handle is live.
        ffi::check(unsafe { ffi::mtx_work_abort(self.0) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
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

    fn serve() -> Store {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Store::serve_tcp(listener, Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn a_store_serves_its_clients() {
        let second = Duration::from_secs(1);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Store::serve_tcp(listener, second).unwrap();
        let client = Store::connect_tcp("127.0.0.1", server.port().unwrap(), second).unwrap();
        client.set("a", b"one").unwrap();
        assert_eq!(server.get("a").unwrap(), b"one");
        assert_eq!(client.add("n", 2).unwrap() + client.add("n", 3).unwrap(), 7);
        let inner = client.prefixed("inner").unwrap();
        assert!(!inner.contains("a").unwrap() && client.contains("a").unwrap());
        let error = inner.get("missing").unwrap_err().to_string();
        assert!(error.to_lowercase().contains("time"), "{error}");
        let keys = ["a", "n", "empty"].map(String::from);
        server.set("empty", b"").unwrap();
        let values = client.multi_get(&keys).unwrap();
        assert_eq!(values, [&b"one"[..], b"5", b""]);
        client.wait("a", second).unwrap();
        let began = Instant::now();
        assert!(inner.wait("missing", second / 5).is_err());
        assert!(began.elapsed() < second, "{:?}", began.elapsed());
    }

    #[test]
    fn a_store_listens_at_its_address_only() {
        let server = serve();
        let at = |host: &str| std::net::TcpStream::connect((host, server.port().unwrap()));
        assert!(at("127.0.0.1").is_ok());
        // On all interfaces it would answer here, too.
        assert!(at("127.0.0.2").is_err());
    }

    /// Exchanges rows between two ranks and returns what this rank receives.
    ///
    /// Rank 0 holds [0 1 2]; it keeps [0] and sends [1 2] to rank 1. Rank 1 holds [3 4] and sends
    /// both to rank 0.
    fn exchange(rank: usize, port: u16) -> Vec<i64> {
        let timeout = Duration::from_secs(20);
        let store = Store::connect_tcp("127.0.0.1", port, timeout).unwrap();
        let device = GlooDevice::at(GlooAddress::Host("127.0.0.1".into()));
        let group = Gloo::new(&store, rank, 2, timeout, &device).unwrap();
        let inputs: [&[i64]; 2] = [&[0, 1, 2], &[3, 4]];
        let splits = [[1, 2], [2, 0]][rank];
        let input = Tensor::from_slice(inputs[rank]);
        let received: i64 = splits.iter().sum();
        let output = Tensor::zeros([received], (tch::Kind::Int64, tch::Device::Cpu));
        let work = group.all_to_all(&output, &input, &splits, &splits);
        work.unwrap().wait(|| false).unwrap();
        Vec::try_from(output).unwrap()
    }

    #[test]
    fn two_ranks_exchange_uneven_splits() {
        let server = serve();
        let port = server.port().unwrap();
        let ranks: Vec<_> = (0..2)
            .map(|rank| std::thread::spawn(move || exchange(rank, port)))
            .collect();
        let results: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
        assert_eq!(results, [vec![0, 3, 4], vec![1, 2]]);
    }
}
