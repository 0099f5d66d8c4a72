//! Parallel loops over rows of tensors in host memory.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};

/// Elements that are worth a thread.
const GRAIN: usize = 8192;
/// Ranges per thread, so that other threads take over the ranges of a delayed one.
const PARTS_PER_THREAD: usize = 4;

/// Returns the dtype of tensors that our loops on the host can process.
///
/// That needs contiguous tensors in host memory that share a dtype, fp32 or bf16.
pub(crate) fn host_kind(tensors: &[&Tensor]) -> Option<Kind> {
    let kind = tensors[0].kind();
    let fits = |tensor: &&Tensor| {
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous()
    };
    let supported = matches!(kind, Kind::Float | Kind::BFloat16);
    (supported && tensors.iter().all(fits)).then_some(kind)
}

/// Calls `body` for each index below `count`; each thread takes the next index when it is free.
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

/// Returns the number of ranges into which [`for_rows`] divides the rows.
pub(crate) fn parts(count: usize, width: usize) -> usize {
    let worthwhile = (count * width).div_ceil(GRAIN).min(count).max(1);
    match torch_ext::max_parallel_ranges() {
        1 => 1,
        threads => worthwhile.min(threads * PARTS_PER_THREAD),
    }
}

/// Divides `row_count` rows of about `row_width` elements into [`parts`] ranges and calls `body`
/// with the index and the rows of each, in parallel if the work is worth it.
pub(crate) fn for_rows(
    row_count: usize,
    row_width: usize,
    body: impl Fn(usize, Range<usize>) + Sync,
) {
    let parts = parts(row_count, row_width);
    on_threads(parts, |part| {
        let start = row_count * part / parts;
        let end = row_count * (part + 1) / parts;
        let rows = start..end;
        if !rows.is_empty() {
            body(part, rows);
        }
    });
}

/// The data of a contiguous tensor in host memory.
pub(crate) struct HostData<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: the callers of `rows_mut` promise that no two threads write the same elements.
unsafe impl<T> Sync for HostData<T> {}

impl<T> HostData<T>
where
    T: Send + Sync,
{
    /// # Safety
    /// The tensor is contiguous in host memory, has elements of type T, and outlives the result.
    pub(crate) unsafe fn of(tensor: &Tensor) -> HostData<T> {
        HostData {
            data: tensor.data_ptr().cast(),
            len: tensor.numel(),
        }
    }

    /// Returns the data of several tensors.
    ///
    /// # Safety
    /// As for [`HostData::of`].
    pub(crate) unsafe fn of_all<const N: usize>(tensors: [&Tensor; N]) -> [HostData<T>; N] {
        // SAFETY: as the caller promises.
        tensors.map(|tensor| unsafe { HostData::of(tensor) })
    }

    /// Returns rows of `width` elements.
    pub(crate) fn rows(&self, rows: &Range<usize>, width: usize) -> &[T] {
        let range = rows.start * width..rows.end * width;
        assert!(range.end <= self.len);
        if range.is_empty() {
            return &[];
        }
        // SAFETY: the range is inside the tensor, and `of` requires elements of type T.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// Returns mutable rows of `width` elements.
    ///
    /// # Safety
    /// No other reference to these elements is in use.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn rows_mut(&self, rows: &Range<usize>, width: usize) -> &mut [T] {
        let range = rows.start * width..rows.end * width;
        assert!(range.end <= self.len);
        if range.is_empty() {
            return &mut [];
        }
        // SAFETY: as above; the caller promises that the reference is unique.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

/// The data of a contiguous tensor of integers in host memory.
pub(crate) struct Indices<'a, I>(&'a [I]);

impl<I> Indices<'_, I> {
    /// # Safety
    /// The tensor is contiguous in host memory and has elements of type I.
    pub(crate) unsafe fn of(tensor: &Tensor) -> Indices<'_, I> {
        match tensor.numel() {
            0 => Indices(&[]),
            // SAFETY: as the caller promises.
            len => Indices(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) }),
        }
    }

    /// Returns rows of `width` elements.
    pub(crate) fn rows(&self, rows: &Range<usize>, width: usize) -> &[I] {
        &self.0[rows.start * width..rows.end * width]
    }
}

/// Calls a generic function with the element type of a dtype.
macro_rules! for_kind {
    ($kind:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        match $kind {
            tch::Kind::Float => $function::<f32>($($argument),*),
            _ => $function::<$crate::number::Bf16>($($argument),*),
        }
    };
}
pub(crate) use for_kind;
