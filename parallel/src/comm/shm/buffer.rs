//! The bytes of tensors that an operation accesses, and the result of the operation.

use std::sync::{Arc, OnceLock};
use tch::Tensor;

/// A tensor that is kept for its bytes.
struct SyncTensor(Tensor);

// SAFETY: several threads only use the address of the tensor's bytes. Access to them is limited by
// the contracts of `Buffer::bytes` and `Buffer::bytes_mut`.
unsafe impl Sync for SyncTensor {}

/// Bytes of a tensor, which they keep alive.
#[derive(Clone)]
pub(super) struct Buffer {
    tensor: Arc<SyncTensor>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Returns the bytes of a contiguous tensor in host memory.
    pub(super) fn new(tensor: &Tensor) -> Buffer {
        let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
        Buffer {
            tensor: Arc::new(SyncTensor(tensor.shallow_clone())),
            start: 0,
            len,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn part(&self, start: usize, len: usize) -> Buffer {
        assert!(start + len <= self.len, "bytes of the tensor");
        Buffer {
            tensor: self.tensor.clone(),
            start: self.start + start,
            len,
        }
    }

    fn data(&self) -> *mut u8 {
        let tensor = &self.tensor.0;
        // SAFETY: inside the tensor, as `part` checks. An empty tensor's address may be null, to
        // which this adds zero.
        unsafe { tensor.data_ptr().cast::<u8>().add(self.start) }
    }

    /// # Safety
    /// The bytes are not written meanwhile.
    pub(super) unsafe fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `Shm::start` checks that the tensor is contiguous and in host memory, so it has
        // these bytes; the caller promises the rest.
        unsafe { std::slice::from_raw_parts(self.data(), self.len) }
    }

    /// # Safety
    /// The bytes are neither read nor written meanwhile, except through the result.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn bytes_mut(&self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data(), self.len) }
    }

    pub(super) fn copy_from(&self, other: &Buffer) {
        if self.len > 0 {
            assert_eq!(self.len, other.len);
            // SAFETY: both have this many bytes, which may be the same ones.
            unsafe { std::ptr::copy(other.data(), self.data(), self.len) };
        }
    }
}

/// The result of an operation, once it is complete.
#[derive(Clone, Default)]
pub(super) struct Completion(Arc<OnceLock<Result<(), String>>>);

impl Completion {
    pub(super) fn set(&self, result: Result<(), String>) {
        let _ = self.0.set(result);
    }

    pub(super) fn get(&self) -> Option<Result<(), String>> {
        self.0.get().cloned()
    }
}
