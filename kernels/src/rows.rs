//! Rows of tensors in host memory, shared out over threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::{Device, Kind, Tensor};

/// Numbers that are worth a thread.
const GRAIN: usize = 8192;
/// Parts for each thread: one that was held up leaves the rest of its parts to others.
const PARTS_PER_THREAD: usize = 4;

/// The dtype of tensors that loops here can go through: in host memory, each without gaps, all of the same dtype.
pub(crate) fn host_kind(tensors: &[&Tensor]) -> Option<Kind> {
    let kind = tensors[0].kind();
    let fits = |tensor: &&Tensor| {
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous()
    };
    (matches!(kind, Kind::Float | Kind::BFloat16) && tensors.iter().all(fits)).then_some(kind)
}

/// Calls `body` for each number below `count`, on whichever thread is free.
pub(crate) fn on_threads(count: usize, body: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    torch_ext::parallel_for(count, 1, |_, _| {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= count {
                return;
            }
            body(item);
        }
    });
}

/// How many parts [`for_rows`] makes.
pub(crate) fn parts(count: usize, width: usize) -> usize {
    let worth = (count * width).div_ceil(GRAIN).min(count).max(1);
    match torch_ext::max_parallel_ranges() {
        1 => 1,
        threads => worth.min(threads * PARTS_PER_THREAD),
    }
}

/// Goes through `count` rows of about `width` numbers, on as many threads as that is worth, in [`parts`]: `body` gets the number of
/// its part, and its rows.
pub(crate) fn for_rows(count: usize, width: usize, body: impl Fn(usize, Range<usize>) + Sync) {
    let parts = parts(count, width);
    on_threads(parts, |part| {
        let rows = count * part / parts..count * (part + 1) / parts;
        if !rows.is_empty() {
            body(part, rows);
        }
    });
}

/// A tensor's numbers.
pub(crate) struct Numbers<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: threads get parts of it that do not overlap where they write (`Numbers::part_mut`).
unsafe impl<T: Send + Sync> Sync for Numbers<T> {}

impl<T> Numbers<T> {
    /// # Safety
    /// The tensor is in host memory, without gaps, holds numbers of type T, and outlives this.
    pub(crate) unsafe fn of(tensor: &Tensor) -> Numbers<T> {
        Numbers {
            data: tensor.data_ptr().cast(),
            len: tensor.numel(),
        }
    }

    /// Rows of `width` numbers.
    pub(crate) fn part(&self, rows: &Range<usize>, width: usize) -> &[T] {
        let range = rows.start * width..rows.end * width;
        assert!(range.end <= self.len);
        if range.is_empty() {
            return &[];
        }
        // SAFETY: inside the tensor, as `of` was promised and the line above checks.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// Rows of `width` numbers, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes these meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part_mut(&self, rows: &Range<usize>, width: usize) -> &mut [T] {
        let range = rows.start * width..rows.end * width;
        assert!(range.end <= self.len);
        if range.is_empty() {
            return &mut [];
        }
        // SAFETY: as above, and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

/// A tensor's int64 numbers, to read.
pub(crate) struct Indices<'a>(&'a [i64]);

impl Indices<'_> {
    /// # Safety
    /// The tensor is in host memory, without gaps, and int64.
    pub(crate) unsafe fn of(tensor: &Tensor) -> Indices<'_> {
        match tensor.numel() {
            0 => Indices(&[]),
            // SAFETY: as the caller promises.
            len => Indices(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) }),
        }
    }

    /// Rows of `width` numbers.
    pub(crate) fn part(&self, rows: &Range<usize>, width: usize) -> &[i64] {
        &self.0[rows.start * width..rows.end * width]
    }
}

/// Calls a generic function for the dtype at hand.
macro_rules! for_kind {
    ($kind:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        match $kind {
            tch::Kind::Float => $function::<f32>($($argument),*),
            _ => $function::<$crate::number::Bf16>($($argument),*),
        }
    };
}
pub(crate) use for_kind;
