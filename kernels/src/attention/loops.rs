//! Our own loops for causal attention, on the kernels of module `gemm`.
//!
//! The keys and values of a head are packed once, for all query heads that they serve. The loops
//! run over blocks of queries and, for each, over blocks of the keys that it sees. The scores of
//! two blocks fit the cache. A thread works on whole key heads, so the number of threads changes no
//! bit.

use super::{HEAD_MULTIPLE, options::AttentionOptions};
use crate::{
    exponential::exp,
    gemm::{
        Avx2, Avx512, InstructionSet, instructions,
        kernel::{CacheLine, Kernel, LANES, Operand, ROWS, Store, TileOutput, mask, reserve_units},
    },
    number::{Bf16, Number},
    rows::on_threads,
    tensors::{empty_as, empty_f32, sizes},
};
use std::{cell::RefCell, ops::Range, slice};
use tch::{Device, Kind, Tensor};

const _: () = assert!(HEAD_MULTIPLE.is_multiple_of(LANES), "rows of whole vectors");

/// Queries of a block, a multiple of a tile and of a pair.
const QUERIES: usize = 48;
/// Number of keys of a block.
const KEYS: usize = 256;
/// Elements from one row of scores to the next: a power of two would map rows to few cache sets.
const ROW: usize = KEYS + LANES;

/// Returns the instruction set for these inputs if our loops support them and are the faster path.
///
/// Queries are `[B, H, S, dk]`, keys `[B, G, S, dk]` and values `[B, G, S, dv]`.
pub(super) fn supports_attention(
    [query, key, value]: [&Tensor; 3],
    options: &AttentionOptions,
) -> Option<InstructionSet> {
    let kind = query.kind();
    let fits = |x: &Tensor| {
        let contiguous = x.stride()[3] == 1;
        let whole_lanes = x.size()[3] % HEAD_MULTIPLE as i64 == 0;
        x.device() == Device::Cpu && x.kind() == kind && contiguous && whole_lanes
    };
    let [batch, heads, length] = sizes(key);
    // libtorch splits a head over threads, but computes the scores outside of a window.
    let busy_threads = batch * heads * length / options.keys_per_query(length).max(1);
    let supported = [query, key, value].into_iter().all(fits)
        && busy_threads >= torch_ext::max_parallel_ranges();
    instructions(kind).filter(|_| supported)
}

/// Does what [`attention`](super::attention) does, for inputs that [`supports_attention`] accepts.
pub(super) fn attention(
    inputs: [&Tensor; 3],
    options: &AttentionOptions,
    instructions: InstructionSet,
) -> (Tensor, Tensor) {
    let kind = inputs[0].kind();
    if let Some(wide) = widened(inputs, instructions) {
        let (out, lse) = attention(wide.each_ref(), options, instructions);
        return (out.to_kind(kind), lse);
    }
    let [query, key, value] = inputs;
    let task = AttentionTask::new(inputs, options);
    let out = in_token_order(query, task.value_width);
    let lse = empty_f32(query, [task.batch, task.heads, task.length]);
    let views = ForwardViews {
        query: HeadView::new(query),
        key: HeadView::new(key),
        value: HeadView::new(value),
        out: HeadView::new(&out),
        lse: task.lse_view(&lse),
    };
    task.on_threads(|at, buffers| {
        // SAFETY: the processor has the instructions, the caller has compared the sizes, and the
        // key head belongs to this thread.
        unsafe {
            match (instructions, kind) {
                (InstructionSet::Avx2, _) => {
                    forward_avx2::<Avx2<f32>, f32>(&task, &views, at, buffers)
                }
                (_, Kind::BFloat16) => {
                    forward_avx512::<Avx512<true>, Bf16>(&task, &views, at, buffers)
                }
                _ => forward_avx512::<Avx512<false>, f32>(&task, &views, at, buffers),
            }
        }
    });
    (out, lse)
}

/// Does what [`attention_backward`](super::attention_backward) does, for inputs that
/// [`supports_attention`] accepts.
pub(super) fn attention_backward(
    grad: &Tensor,
    inputs: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    options: &AttentionOptions,
    instructions: InstructionSet,
) -> [Tensor; 3] {
    let kind = grad.kind();
    if let Some(wide_inputs) = widened(inputs, instructions) {
        let [grad, out] = [grad, out].map(|x| x.to_kind(Kind::Float));
        let grads = attention_backward(
            &grad,
            wide_inputs.each_ref(),
            &out,
            lse,
            options,
            instructions,
        );
        return grads.map(|grad| grad.to_kind(kind));
    }
    let [query, key, value] = inputs;
    let task = AttentionTask::new(inputs, options);
    let grads = [
        in_token_order(query, task.key_width),
        in_token_order(key, task.key_width),
        in_token_order(value, task.value_width),
    ];
    let views = BackwardViews {
        query: HeadView::new(query),
        key: HeadView::new(key),
        value: HeadView::new(value),
        out: HeadView::new(out),
        lse: task.lse_view(lse),
        grad: HeadView::new(grad),
        grad_query: HeadView::new(&grads[0]),
        grad_key: HeadView::new(&grads[1]),
        grad_value: HeadView::new(&grads[2]),
    };
    task.on_threads(|at, buffers| {
        // SAFETY: as in `attention`.
        unsafe {
            match (instructions, kind) {
                (InstructionSet::Avx2, _) => {
                    backward_avx2::<Avx2<f32>, f32>(&task, &views, at, buffers)
                }
                (_, Kind::BFloat16) => {
                    backward_avx512::<Avx512<true>, Bf16>(&task, &views, at, buffers)
                }
                _ => backward_avx512::<Avx512<false>, f32>(&task, &views, at, buffers),
            }
        }
    });
    grads
}

/// Returns the inputs in fp32 if the instruction set cannot read their bf16.
fn widened(inputs: [&Tensor; 3], instructions: InstructionSet) -> Option<[Tensor; 3]> {
    let bf16 = inputs[0].kind() == Kind::BFloat16;
    let unreadable = instructions == InstructionSet::Avx2 && bf16;
    unreadable.then(|| inputs.map(|x| x.to_kind(Kind::Float)))
}

/// Returns an uninitialized tensor `[B, H, S, width]` for `x` `[B, H, S, d]`, with memory order
/// `[B, S, H, width]`.
///
/// The next operation reads the rows of all heads of a token.
fn in_token_order(x: &Tensor, width: usize) -> Tensor {
    let [batch, heads, length] = sizes(x);
    empty_as(x, [batch, length, heads, width]).transpose(1, 2)
}

/// A key or query head of a sequence in the batch.
#[derive(Clone, Copy)]
struct Head {
    batch: usize,
    head: usize,
}

/// A view of a tensor by rows, with strides in bytes.
#[derive(Clone, Copy)]
struct HeadView {
    data: *mut u8,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
}

struct ForwardViews {
    query: HeadView,
    key: HeadView,
    value: HeadView,
    out: HeadView,
    lse: HeadView,
}

struct BackwardViews {
    query: HeadView,
    key: HeadView,
    value: HeadView,
    out: HeadView,
    lse: HeadView,
    grad: HeadView,
    grad_query: HeadView,
    grad_key: HeadView,
    grad_value: HeadView,
}

// SAFETY: a thread writes only the rows of its own heads.
unsafe impl Sync for HeadView {}

impl HeadView {
    fn new(x: &Tensor) -> HeadView {
        let bytes = x.kind().elt_size_in_bytes();
        let stride: Vec<usize> = x
            .stride()
            .iter()
            .map(|&stride| stride as usize * bytes)
            .collect();
        HeadView {
            data: x.data_ptr().cast(),
            batch_stride: stride[0],
            head_stride: stride[1],
            row_stride: stride[2],
        }
    }

    /// Returns the address of a row.
    fn at(&self, Head { batch, head }: Head, row: usize) -> *mut u8 {
        let head = batch * self.batch_stride + head * self.head_stride;
        self.data.wrapping_add(head + row * self.row_stride)
    }

    /// Returns `width` elements of a row.
    ///
    /// # Safety
    /// The row has as many elements of type T, and no other thread writes them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row<T>(&self, head: Head, row: usize, width: usize) -> &mut [T] {
        // SAFETY: as the caller promises.
        unsafe { slice::from_raw_parts_mut(self.at(head, row).cast(), width) }
    }
}

struct AttentionTask {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    length: usize,
    /// Width of a query and of a key.
    key_width: usize,
    /// Width of a value and of an output.
    value_width: usize,
    scale: f32,
    /// Number of keys that a query sees, at most `length`.
    window: usize,
}

/// Buffers of a thread, which stay allocated.
#[derive(Default)]
struct Buffers {
    keys: Vec<CacheLine>,
    values: Vec<CacheLine>,
    natural_keys: Vec<CacheLine>,
    queries: Vec<CacheLine>,
    grads: Vec<CacheLine>,
    scores: Vec<CacheLine>,
    grad_scores: Vec<CacheLine>,
    rounded: [Vec<CacheLine>; 3],
    sums: [Vec<CacheLine>; 3],
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl AttentionTask {
    fn new([query, key, value]: [&Tensor; 3], options: &AttentionOptions) -> AttentionTask {
        let [batch, heads, length, key_width] = sizes(query);
        let [_, kv_heads] = sizes(key);
        let [_, _, _, value_width] = sizes(value);
        AttentionTask {
            batch,
            heads,
            kv_heads,
            length,
            key_width,
            value_width,
            scale: options.scale as f32,
            window: options.keys_per_query(length),
        }
    }

    /// Returns the first keys of the blocks that a block of queries sees, multiples of `alignment`.
    fn key_blocks(&self, queries: &Range<usize>, alignment: usize) -> impl Iterator<Item = usize> {
        let first = (queries.start + 1).saturating_sub(self.window) / alignment * alignment;
        (first..queries.end).step_by(KEYS)
    }

    /// Returns the part of `keys` that a query sees, relative to their start.
    fn visible(&self, query: usize, keys: &Range<usize>) -> Range<usize> {
        let end = (query + 1).saturating_sub(keys.start).min(keys.len());
        let hidden = (query + 1).saturating_sub(self.window + keys.start);
        hidden.min(end)..end
    }

    /// Returns a view of contiguous log-sum-exps `[B, H, S]` fp32.
    fn lse_view(&self, lse: &Tensor) -> HeadView {
        let row_stride = size_of::<f32>();
        let head_stride = self.length * row_stride;
        HeadView {
            data: lse.data_ptr().cast(),
            batch_stride: self.heads * head_stride,
            head_stride,
            row_stride,
        }
    }

    /// Calls `body` for the key heads of all sequences.
    fn on_threads(&self, body: impl Fn(Head, &mut Buffers) + Sync) {
        on_threads(self.batch * self.kv_heads, |item| {
            let kv_head = Head {
                batch: item / self.kv_heads,
                head: item % self.kv_heads,
            };
            BUFFERS.with_borrow_mut(|buffers| body(kv_head, buffers));
        });
    }

    /// Returns the query heads that a key head serves.
    fn query_heads(&self, kv_head: Head) -> impl Iterator<Item = Head> + use<> {
        let Head { batch, head } = kv_head;
        let times = self.heads / self.kv_heads;
        (head * times..(head + 1) * times).map(move |head| Head { batch, head })
    }
}

/// The destination of a GEMM.
#[derive(Clone, Copy)]
struct GemmOutput {
    data: *mut f32,
    /// Elements from one row to the next.
    row_stride: usize,
    store: Store,
}

/// The left operand of a GEMM: the address of each row, and the bytes between a row's units.
#[derive(Clone, Copy)]
struct LeftRows<F> {
    row: F,
    step: usize,
}

/// A matrix `[rows, width]`, packed as the right operand of a GEMM.
struct PackedMatrix {
    data: *const CacheLine,
    units: usize,
    columns: usize,
}

impl PackedMatrix {
    /// Packs `rows` rows at `from`, `row_stride` bytes apart, each a step of the inner dimension.
    ///
    /// # Safety
    /// The rows are readable, and the processor has the features.
    unsafe fn natural<K>(
        from: *const u8,
        row_stride: usize,
        rows: usize,
        width: usize,
        to: &mut Vec<CacheLine>,
    ) -> PackedMatrix
    where
        K: Kernel,
    {
        let from = Operand {
            data: from,
            inner: row_stride,
            outer: K::SIZE,
            len: rows,
        };
        // SAFETY: as the caller promises.
        unsafe { PackedMatrix::new::<K>(&from, width, to) }
    }

    /// Packs the transpose: each row becomes a column.
    ///
    /// # Safety
    /// The rows are readable, and the processor has the features.
    unsafe fn transposed<K>(
        from: *const u8,
        row_stride: usize,
        rows: usize,
        width: usize,
        to: &mut Vec<CacheLine>,
    ) -> PackedMatrix
    where
        K: Kernel,
    {
        let from = Operand {
            data: from,
            inner: K::SIZE,
            outer: row_stride,
            len: width,
        };
        // SAFETY: as the caller promises.
        unsafe { PackedMatrix::new::<K>(&from, rows, to) }
    }

    unsafe fn new<K>(from: &Operand, columns: usize, to: &mut Vec<CacheLine>) -> PackedMatrix
    where
        K: Kernel,
    {
        let units = from.len.div_ceil(K::PER_UNIT);
        let data = reserve_units(to, units * columns.next_multiple_of(LANES));
        // SAFETY: `reserve_units` has made room; the caller promises the rest.
        unsafe { K::pack_right(from, 0..units, 0..columns, data) };
        PackedMatrix {
            data,
            units,
            columns,
        }
    }

    /// Multiplies `rows` rows of `left` by units and columns of this matrix.
    ///
    /// # Safety
    /// All operands have these sizes, and `columns` starts at a multiple of a tile's width.
    unsafe fn gemm<K>(
        &self,
        units: Range<usize>,
        columns: Range<usize>,
        rows: usize,
        left: LeftRows<impl Fn(usize) -> *const u8>,
        out: GemmOutput,
    ) where
        K: Kernel,
    {
        let wide = K::LINES * LANES;
        for first in (0..rows).step_by(ROWS) {
            let here = (rows - first).min(ROWS);
            let row = |i: usize| (left.row)(first + i.min(here - 1));
            let lefts: [*const u8; ROWS] = std::array::from_fn(row);
            for column in columns.clone().step_by(wide) {
                // Always whole panels: the buffer has room for scores beyond `columns`.
                let there = (self.columns - column).min(wide);
                let lines = there.div_ceil(LANES);
                let offset = first * out.row_stride + (column - columns.start);
                let tile = TileOutput {
                    data: out.data.wrapping_add(offset).cast(),
                    row_stride: out.row_stride * size_of::<f32>(),
                    rows: here,
                    mask: mask(there - (lines - 1) * LANES),
                    store: out.store,
                };
                let panel = self.units * (column / LANES) + units.start * lines;
                // SAFETY: columns before this one fill whole panels.
                unsafe {
                    let right = self.data.add(panel);
                    K::tile(lines, units.len(), &lefts, left.step, right, &tile);
                }
            }
        }
    }
}

/// Grows the buffer to hold `rows` rows of `width` fp32 elements, and returns its address.
fn floats(buffer: &mut Vec<CacheLine>, rows: usize, width: usize) -> *mut f32 {
    reserve_units(buffer, rows * width).cast()
}

/// Compiles a function of a key head for the features of a processor.
macro_rules! with_target_features {
    ($name:ident, $features:literal, $function:ident, $views:ty) => {
        /// # Safety
        /// The processor has the features; otherwise as for the function itself.
        #[target_feature(enable = $features)]
        unsafe fn $name<K: Kernel, T: Number>(
            task: &AttentionTask,
            views: &$views,
            kv_head: Head,
            buffers: &mut Buffers,
        ) {
            // SAFETY: as the caller promises.
            unsafe { $function::<K, T>(task, views, kv_head, buffers) }
        }
    };
}

with_target_features!(
    forward_avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma",
    forward,
    ForwardViews
);
with_target_features!(forward_avx2, "avx2,fma", forward, ForwardViews);
with_target_features!(
    backward_avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma",
    backward,
    BackwardViews
);
with_target_features!(backward_avx2, "avx2,fma", backward, BackwardViews);

/// Computes the output and log-sum-exps of the query heads of a key head.
///
/// # Safety
/// The processor has the features, [`supports_attention`] accepts the tensors of the views, and no
/// other thread works on this key head.
#[inline(always)]
unsafe fn forward<K, T>(
    task: &AttentionTask,
    views: &ForwardViews,
    kv_head: Head,
    buffers: &mut Buffers,
) where
    K: Kernel,
    T: Number,
{
    let AttentionTask {
        length,
        key_width,
        value_width,
        scale,
        ..
    } = *task;
    let ForwardViews {
        query,
        key,
        value,
        out,
        lse,
    } = views;
    let bf16 = K::PER_UNIT == 2;
    let steps = key_width / K::PER_UNIT;
    let sums = floats(&mut buffers.sums[0], QUERIES, value_width);
    let scores = floats(&mut buffers.scores, QUERIES, ROW);
    let rounded = reserve_units(&mut buffers.rounded[0], QUERIES * ROW / 2).cast::<Bf16>();
    let to_scores = GemmOutput {
        data: scores,
        row_stride: ROW,
        store: Store::Set,
    };
    let to_sums = GemmOutput {
        data: sums,
        row_stride: value_width,
        store: Store::Add,
    };
    // SAFETY: as the caller promises; the buffers have the sizes that are reserved here.
    unsafe {
        let keys = PackedMatrix::transposed::<K>(
            key.at(kv_head, 0),
            key.row_stride,
            length,
            key_width,
            &mut buffers.keys,
        );
        let values = PackedMatrix::natural::<K>(
            value.at(kv_head, 0),
            value.row_stride,
            length,
            value_width,
            &mut buffers.values,
        );
        for head in task.query_heads(kv_head) {
            for start in (0..length).step_by(QUERIES) {
                let rows = (length - start).min(QUERIES);
                let block = start..start + rows;
                let mut highest = [f32::NEG_INFINITY; QUERIES];
                let mut totals = [0f32; QUERIES];
                slice::from_raw_parts_mut(sums, rows * value_width).fill(0.0);
                for first in task.key_blocks(&block, K::LINES * LANES) {
                    let here = (block.end - first).min(KEYS);
                    let columns = first..first + here;
                    let queries = LeftRows {
                        row: |row: usize| query.at(head, start + row).cast_const(),
                        step: 4,
                    };
                    keys.gemm::<K>(0..steps, columns.clone(), rows, queries, to_scores);
                    for row in 0..rows {
                        let row_scores = slice::from_raw_parts_mut(scores.add(row * ROW), here);
                        let valid = task.visible(start + row, &columns);
                        let factor = weights(
                            row_scores,
                            valid,
                            scale,
                            &mut highest[row],
                            &mut totals[row],
                        );
                        if factor != 1.0 {
                            let sums = sums.add(row * value_width);
                            let sums = slice::from_raw_parts_mut(sums, value_width);
                            for x in sums {
                                *x *= factor;
                            }
                        }
                        if bf16 {
                            round_padded(row_scores, rounded.add(row * ROW));
                        }
                    }
                    let weights = LeftRows {
                        row: |row: usize| {
                            if bf16 {
                                rounded.add(row * ROW).cast::<u8>().cast_const()
                            } else {
                                scores.add(row * ROW).cast::<u8>().cast_const()
                            }
                        },
                        step: 4,
                    };
                    let units = first / K::PER_UNIT..(first + here).div_ceil(K::PER_UNIT);
                    values.gemm::<K>(units, 0..value_width, rows, weights, to_sums);
                }
                for row in 0..rows {
                    let inverse = 1.0 / totals[row];
                    let lse = lse.row::<f32>(head, start + row, 1);
                    lse[0] = highest[row] + totals[row].ln();
                    let out = out.row::<T>(head, start + row, value_width);
                    let sums = slice::from_raw_parts(sums.add(row * value_width), value_width);
                    for (out, x) in out.iter_mut().zip(sums) {
                        *out = T::narrow(x * inverse);
                    }
                }
            }
        }
    }
}

/// Rounds a row to bf16 and appends a zero, which completes the last pair of an odd row.
///
/// # Safety
/// `to` has room for one element more than `from`.
#[inline(always)]
unsafe fn round_padded(from: &[f32], to: *mut Bf16) {
    // SAFETY: as the caller promises.
    let to = unsafe { slice::from_raw_parts_mut(to, from.len() + 1) };
    for (to, x) in to.iter_mut().zip(from) {
        *to = Bf16::narrow(*x);
    }
    to[from.len()] = Bf16::narrow(0.0);
}

/// Replaces the scores in `valid` by `exp(score * scale - highest)`, and the others by zero.
///
/// `highest` is the running maximum of scaled scores and `sum` the running sum of weights. Returns
/// the factor by which the weights of earlier blocks change.
#[inline(always)]
fn weights(
    scores: &mut [f32],
    valid: Range<usize>,
    scale: f32,
    highest: &mut f32,
    total: &mut f32,
) -> f32 {
    scores[..valid.start].fill(0.0);
    scores[valid.end..].fill(0.0);
    let valid = &mut scores[valid];
    if valid.is_empty() {
        return 1.0;
    }
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, few) = valid.as_chunks::<LANES>();
    for chunk in whole {
        for (most, &x) in lanes.iter_mut().zip(chunk) {
            *most = larger(*most, x);
        }
    }
    for (most, &x) in lanes.iter_mut().zip(few) {
        *most = larger(*most, x);
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, larger) * scale;
    let new = larger(*highest, largest);
    let factor = if *highest == f32::NEG_INFINITY {
        0.0
    } else {
        exp(*highest - new)
    };
    let mut lanes = [0f32; LANES];
    let (whole, few) = valid.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (total, x) in lanes.iter_mut().zip(chunk) {
            *x = exp(x.mul_add(scale, -new));
            *total += *x;
        }
    }
    for (total, x) in lanes.iter_mut().zip(few) {
        *x = exp(x.mul_add(scale, -new));
        *total += *x;
    }
    *total = *total * factor + lanes.iter().sum::<f32>();
    *highest = new;
    factor
}

/// Returns the maximum, or `most` if `x` is NaN: a comparison and a selection in vector code.
#[inline(always)]
fn larger(most: f32, x: f32) -> f32 {
    if x > most { x } else { most }
}

/// Computes the gradients of a key head and its query heads.
///
/// # Safety
/// As for [`forward`].
#[inline(always)]
unsafe fn backward<K, T>(
    task: &AttentionTask,
    views: &BackwardViews,
    kv_head: Head,
    buffers: &mut Buffers,
) where
    K: Kernel,
    T: Number,
{
    let AttentionTask {
        length,
        key_width,
        value_width,
        scale,
        ..
    } = *task;
    let BackwardViews {
        query,
        key,
        value,
        out,
        lse,
        grad,
        ..
    } = views;
    let bf16 = K::PER_UNIT == 2;
    let key_steps = key_width / K::PER_UNIT;
    let value_steps = value_width / K::PER_UNIT;
    let [sums, key_sums, value_sums] = &mut buffers.sums;
    let sums = floats(sums, QUERIES, key_width);
    let key_sums = floats(key_sums, length, key_width);
    let value_sums = floats(value_sums, length, value_width);
    let scores = floats(&mut buffers.scores, QUERIES, ROW);
    let grad_scores = floats(&mut buffers.grad_scores, QUERIES, ROW);
    let [weight_pairs, grad_score_pairs, rounded] = &mut buffers.rounded;
    let weight_pairs = floats(weight_pairs, QUERIES / 2, ROW);
    let grad_score_pairs = floats(grad_score_pairs, QUERIES / 2, ROW);
    let rounded = reserve_units(rounded, QUERIES * ROW / 2).cast::<Bf16>();
    let to_scores = GemmOutput {
        data: scores,
        row_stride: ROW,
        store: Store::Set,
    };
    let to_grad_scores = GemmOutput {
        data: grad_scores,
        ..to_scores
    };
    let to_sums = GemmOutput {
        data: sums,
        row_stride: key_width,
        store: Store::Add,
    };
    // SAFETY: as the caller promises; the buffers have the sizes that are reserved here.
    unsafe {
        let key_rows = key.at(kv_head, 0);
        let value_rows = value.at(kv_head, 0);
        let keys = PackedMatrix::transposed::<K>(
            key_rows,
            key.row_stride,
            length,
            key_width,
            &mut buffers.keys,
        );
        let values = PackedMatrix::transposed::<K>(
            value_rows,
            value.row_stride,
            length,
            value_width,
            &mut buffers.values,
        );
        let natural_keys = PackedMatrix::natural::<K>(
            key_rows,
            key.row_stride,
            length,
            key_width,
            &mut buffers.natural_keys,
        );
        slice::from_raw_parts_mut(key_sums, length * key_width).fill(0.0);
        slice::from_raw_parts_mut(value_sums, length * value_width).fill(0.0);
        for head in task.query_heads(kv_head) {
            for start in (0..length).step_by(QUERIES) {
                let rows = (length - start).min(QUERIES);
                let block = start..start + rows;
                let queries = PackedMatrix::natural::<K>(
                    query.at(head, start),
                    query.row_stride,
                    rows,
                    key_width,
                    &mut buffers.queries,
                );
                let grads = PackedMatrix::natural::<K>(
                    grad.at(head, start),
                    grad.row_stride,
                    rows,
                    value_width,
                    &mut buffers.grads,
                );
                // D in the paper: the dot products of the rows of the output and its gradient.
                let delta: [f32; QUERIES] = std::array::from_fn(|row| {
                    if row < rows {
                        let out = out.row::<T>(head, start + row, value_width);
                        dot(out, grad.row::<T>(head, start + row, value_width))
                    } else {
                        0.0
                    }
                });
                slice::from_raw_parts_mut(sums, rows * key_width).fill(0.0);
                for first in task.key_blocks(&block, K::LINES * LANES) {
                    let here = (block.end - first).min(KEYS);
                    let columns = first..first + here;
                    let query_rows = LeftRows {
                        row: |row: usize| query.at(head, start + row).cast_const(),
                        step: 4,
                    };
                    let steps = 0..key_steps;
                    keys.gemm::<K>(steps, columns.clone(), rows, query_rows, to_scores);
                    let grad_rows = LeftRows {
                        row: |row: usize| grad.at(head, start + row).cast_const(),
                        step: 4,
                    };
                    let steps = 0..value_steps;
                    values.gemm::<K>(steps, columns.clone(), rows, grad_rows, to_grad_scores);
                    for (row, &delta) in delta[..rows].iter().enumerate() {
                        let scores = slice::from_raw_parts_mut(scores.add(row * ROW), here);
                        let grad_scores =
                            slice::from_raw_parts_mut(grad_scores.add(row * ROW), here);
                        let valid = task.visible(start + row, &columns);
                        let of_row = RowScalars {
                            scale,
                            lse: lse.row::<f32>(head, start + row, 1)[0],
                            delta,
                        };
                        softmax_gradients(scores, grad_scores, valid, of_row);
                        if bf16 {
                            round_padded(grad_scores, rounded.add(row * ROW));
                        }
                    }
                    if bf16 {
                        interleave_bf16_rows(scores, rows, here, weight_pairs);
                        interleave_bf16_rows(grad_scores, rows, here, grad_score_pairs);
                    }
                    // The left operands of the three GEMMs below.
                    let grad_score_rows = if bf16 {
                        rounded.cast::<u8>().cast_const()
                    } else {
                        grad_scores.cast::<u8>().cast_const()
                    };
                    let weight_columns = if bf16 { weight_pairs } else { scores };
                    let grad_score_columns = if bf16 { grad_score_pairs } else { grad_scores };
                    let units = first / K::PER_UNIT..(first + here).div_ceil(K::PER_UNIT);
                    let left = LeftRows {
                        row: |row: usize| grad_score_rows.add(row * ROW * K::SIZE),
                        step: 4,
                    };
                    natural_keys.gemm::<K>(units, 0..key_width, rows, left, to_sums);
                    let units = 0..rows.div_ceil(K::PER_UNIT);
                    for (columns, right, sums) in [
                        (weight_columns, &grads, value_sums),
                        (grad_score_columns, &queries, key_sums),
                    ] {
                        let width = right.columns;
                        let left = LeftRows {
                            row: |key: usize| columns.add(key).cast::<u8>().cast_const(),
                            step: ROW * 4,
                        };
                        let out = GemmOutput {
                            data: sums.add(first * width),
                            row_stride: width,
                            store: Store::Add,
                        };
                        right.gemm::<K>(units.clone(), 0..width, here, left, out);
                    }
                }
                for row in 0..rows {
                    let sums = slice::from_raw_parts(sums.add(row * key_width), key_width);
                    narrow(
                        sums,
                        views.grad_query.row::<T>(head, start + row, key_width),
                    );
                }
            }
        }
        for row in 0..length {
            let key_sums = slice::from_raw_parts(key_sums.add(row * key_width), key_width);
            narrow(key_sums, views.grad_key.row::<T>(kv_head, row, key_width));
            let value_sums = value_sums.add(row * value_width);
            let value_sums = slice::from_raw_parts(value_sums, value_width);
            narrow(
                value_sums,
                views.grad_value.row::<T>(kv_head, row, value_width),
            );
        }
    }
}

/// The scalars of a row in the gradient of softmax.
#[derive(Clone, Copy)]
struct RowScalars {
    scale: f32,
    lse: f32,
    delta: f32,
}

/// Replaces the scores in `valid` by weights, and the gradients of these weights by those of the
/// scores. The other elements become zero.
#[inline(always)]
fn softmax_gradients(
    scores: &mut [f32],
    grad_scores: &mut [f32],
    valid: Range<usize>,
    scalars: RowScalars,
) {
    let RowScalars { scale, lse, delta } = scalars;
    let seen = scores[valid.clone()].iter_mut();
    for (score, grad) in seen.zip(&mut grad_scores[valid.clone()]) {
        *score = exp(score.mul_add(scale, -lse));
        *grad = *score * (*grad - delta) * scale;
    }
    for hidden in [scores, grad_scores] {
        hidden[..valid.start].fill(0.0);
        hidden[valid.end..].fill(0.0);
    }
}

/// Rounds rows to bf16 and interleaves each two of them by columns. Zeros follow an odd last row.
///
/// # Safety
/// `from` has `rows` rows and `to` half as many, of `width` elements that are [`ROW`] apart.
#[inline(always)]
unsafe fn interleave_bf16_rows(source: *const f32, rows: usize, row_width: usize, pairs: *mut f32) {
    for row in (0..rows).step_by(2) {
        // SAFETY: as the caller promises.
        let first = unsafe { slice::from_raw_parts(source.add(row * ROW), row_width) };
        // SAFETY: as the caller promises.
        let pairs = unsafe {
            let pairs = pairs.add(row / 2 * ROW).cast::<u32>();
            slice::from_raw_parts_mut(pairs, row_width)
        };
        if row + 1 < rows {
            // SAFETY: as the caller promises.
            let second = unsafe { slice::from_raw_parts(source.add((row + 1) * ROW), row_width) };
            for (pairs, (a, b)) in pairs.iter_mut().zip(first.iter().zip(second)) {
                *pairs = rounded(*a) >> 16 | rounded(*b) & 0xffff_0000;
            }
        } else {
            for (pairs, a) in pairs.iter_mut().zip(first) {
                *pairs = rounded(*a) >> 16;
            }
        }
    }
}

/// Returns bits whose upper half is the bf16 nearest to `x`, ties to even. `x` is not NaN.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1))
}

#[inline(always)]
fn dot<T>(a: &[T], b: &[T]) -> f32
where
    T: Number,
{
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += a[lane].wide() * b[lane].wide();
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn narrow<T>(from: &[f32], to: &mut [T])
where
    T: Number,
{
    for (to, x) in to.iter_mut().zip(from) {
        *to = T::narrow(*x);
    }
}
