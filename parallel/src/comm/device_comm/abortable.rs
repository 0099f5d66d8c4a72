//! A vendor's communicator that an abort destroys: no thread uses it then.

use super::library::Library;
use parking_lot::Mutex;
use std::{
    ffi::c_void,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

/// A call that takes longer waits in the library for other ranks, and only an abort ends it.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct AbortableComm<L: Library> {
    library: &'static L,
    comm: L::Comm,
    /// Set before the abort, so that later calls are refused.
    aborted: AtomicBool,
    /// Held during each call.
    calling: Mutex<()>,
}

impl<L> AbortableComm<L>
where
    L: Library,
{
    pub(super) fn new(library: &'static L, comm: L::Comm) -> AbortableComm<L> {
        AbortableComm {
            library,
            comm,
            aborted: false.into(),
            calling: Mutex::default(),
        }
    }

    /// Runs calls of the library. Those of other threads wait meanwhile.
    ///
    /// # Errors
    /// If a call fails, or the group was aborted.
    pub(super) fn call<T>(
        &self,
        calls: impl FnOnce(&L::Comm) -> Result<T, String>,
    ) -> Result<T, String> {
        let _calling = self.calling.lock();
        if self.aborted.load(Ordering::SeqCst) {
            return Err("the group was aborted".into());
        }
        calls(&self.comm)
    }

    /// Returns why queued operations cannot complete. `None` after an abort, and while another
    /// thread's call is in progress: it may wait for other ranks.
    pub(super) fn failure(&self) -> Option<String> {
        let _calling = self.calling.try_lock()?;
        if self.aborted.load(Ordering::SeqCst) {
            return None;
        }
        self.library.failure(&self.comm)
    }

    /// Aborts the operations on `stream`. Later calls return errors.
    pub(super) fn abort(&self, stream: *mut c_void) {
        if self.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        // Without the lock, this is the abort during a call that libraries allow.
        let _calling = self.calling.try_lock_for(CALL_TIMEOUT);
        self.library.abort(&self.comm, stream);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};
    use std::{
        sync::{Arc, Barrier, atomic::AtomicUsize, mpsc::channel},
        thread,
        time::Instant,
    };
    use tch::Kind;

    /// A library whose aborts free the communicator.
    #[derive(Default)]
    struct Freeing {
        /// Uses of a communicator while it is freed, or later.
        misuses: AtomicUsize,
    }

    /// Memory that an abort frees. Tools that find races see accesses to it.
    struct Handle {
        memory: *mut u64,
        users: AtomicUsize,
        is_freed: AtomicBool,
    }

    // SAFETY: the tests count uses of the memory by two threads at once.
    unsafe impl Send for Handle {}
    // SAFETY: as above.
    unsafe impl Sync for Handle {}

    impl Freeing {
        fn leak() -> &'static Freeing {
            Box::leak(Box::default())
        }

        fn touch(&self, handle: &Handle) -> Result<(), String> {
            handle.users.fetch_add(1, Ordering::SeqCst);
            // Gives an abort the time to come in between.
            thread::yield_now();
            let is_freed = handle.is_freed.load(Ordering::SeqCst);
            if is_freed {
                self.misuses.fetch_add(1, Ordering::SeqCst);
            } else {
                // SAFETY: the memory was not freed just now.
                unsafe { *handle.memory += 1 };
            }
            handle.users.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    }

    impl Library for Freeing {
        type Comm = Handle;
        const NAME: &'static str = "freeing";

        fn new_id(&self) -> Result<Vec<u8>, String> {
            Ok(Vec::new())
        }
        fn join(&self, _id: &[u8], _rank: usize, _size: usize) -> Result<Handle, String> {
            Ok(Handle {
                memory: Box::into_raw(Box::new(0)),
                users: 0.into(),
                is_freed: false.into(),
            })
        }
        fn abort(&self, handle: &Handle, _stream: *mut c_void) {
            let was_freed = handle.is_freed.swap(true, Ordering::SeqCst);
            if was_freed || handle.users.load(Ordering::SeqCst) > 0 {
                self.misuses.fetch_add(1, Ordering::SeqCst);
                return;
            }
            // SAFETY: freed once, and used by nothing else.
            drop(unsafe { Box::from_raw(handle.memory) });
        }
        fn failure(&self, handle: &Handle) -> Option<String> {
            self.touch(handle).err()
        }
        fn supports_reduction(&self, _kind: Kind, _operation: &str) -> bool {
            true
        }
        unsafe fn all_reduce(
            &self,
            to: &LaunchTarget<Self>,
            _data: *mut c_void,
            _elements: Elements,
            _op: ReduceOp,
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
        unsafe fn broadcast(
            &self,
            to: &LaunchTarget<Self>,
            _data: *mut c_void,
            _elements: Elements,
            _root: usize,
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
        unsafe fn all_gather(
            &self,
            to: &LaunchTarget<Self>,
            _out: *mut c_void,
            _data: *mut c_void,
            _elements: Elements,
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
        unsafe fn reduce_scatter(
            &self,
            to: &LaunchTarget<Self>,
            _out: *mut c_void,
            _data: *mut c_void,
            _elements: Elements,
            _op: ReduceOp,
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
        unsafe fn all_to_all(
            &self,
            to: &LaunchTarget<Self>,
            _out: Parts,
            _data: Parts,
            _kind: Kind,
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
        unsafe fn messages(
            &self,
            to: &LaunchTarget<Self>,
            _messages: &[Message],
        ) -> Result<(), String> {
            self.touch(to.comm)
        }
    }

    fn no_stream() -> *mut c_void {
        std::ptr::null_mut()
    }

    fn join(library: &'static Freeing) -> AbortableComm<Freeing> {
        AbortableComm::new(library, library.join(&[], 0, 1).unwrap())
    }

    /// Queues an operation as a device's communicator does.
    fn queue(comm: &AbortableComm<Freeing>) -> Result<(), String> {
        comm.call(|handle| {
            let target = LaunchTarget {
                comm: handle,
                stream: no_stream(),
            };
            // SAFETY: the library accesses no device memory.
            unsafe { comm.library.messages(&target, &[]) }
        })
    }

    #[test]
    fn no_thread_uses_what_an_abort_has_freed() {
        let library = Freeing::leak();
        for _ in 0..200 {
            let comm = join(library);
            let start = Barrier::new(5);
            thread::scope(|scope| {
                for aborts in [false, true, true] {
                    let comm = &comm;
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        if aborts {
                            thread::yield_now();
                            comm.abort(no_stream());
                        }
                        while queue(comm).is_ok() {}
                    });
                    if aborts {
                        scope.spawn(move || {
                            start.wait();
                            for _ in 0..20 {
                                assert_eq!(comm.failure(), None);
                            }
                        });
                    }
                }
            });
            assert_eq!(queue(&comm), Err("the group was aborted".into()));
            assert_eq!(comm.failure(), None);
        }
        assert_eq!(library.misuses.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn an_abort_does_not_wait_for_a_call_that_only_it_ends() {
        let comm = Arc::new(join(Freeing::leak()));
        let (entered, has_entered) = channel();
        let stuck = comm.clone();
        let call = thread::spawn(move || {
            stuck.call(|handle| {
                entered.send(()).unwrap();
                while !handle.is_freed.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(10));
                }
                Err::<(), String>("aborted".into())
            })
        });
        has_entered.recv().unwrap();
        let start = Instant::now();
        // The thread that watches operations does not wait for it either.
        assert_eq!(comm.failure(), None);
        assert!(start.elapsed() < CALL_TIMEOUT / 2);
        comm.abort(no_stream());
        assert_eq!(call.join().unwrap(), Err("aborted".into()));
        assert!(start.elapsed() < 5 * CALL_TIMEOUT);
    }
}
