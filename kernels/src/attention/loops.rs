//! The loops of causal attention, with the innermost ones of `gemm`.
//!
//! A head's keys and values are packed once, for all the query heads that they serve. Queries come in blocks, keys in blocks of
//! those; scores of a block of both live in a buffer that fits the cache. Threads work on key heads for themselves, so their number
//! changes no bit.

use crate::exponential::exp;
use crate::gemm::kernel::{CacheLine, Kernel, LANES, Operand, ROWS, Store, TileOutput, mask, room};
use crate::gemm::{Avx2, Avx512, InstructionSet, instructions};
use crate::number::{Bf16, Number};
use crate::rows::on_threads;
use std::cell::RefCell;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Queries of a block: of whole tiles and pairs.
const QUERIES: usize = 48;
/// Keys of a block.
const KEYS: usize = 256;
/// Numbers from one row of scores to the next: rows of a power of two would share few places of the cache.
const ROW: usize = KEYS + LANES;

/// By which instructions these loops attend on this processor, if they do: of queries `[B, H, S, d]`, keys and values `[B, G, S, d]`.
pub(super) fn supports_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Option<InstructionSet> {
    let kind = query.kind();
    let fits = |x: &Tensor| x.device() == Device::Cpu && x.kind() == kind && x.stride()[3] == 1;
    let fit = [query, key, value].into_iter().all(fits)
        && query.size()[3] % LANES as i64 == 0
        && (key.size()[0] * key.size()[1]) as usize >= torch_ext::max_parallel_ranges();
    instructions(kind).filter(|_| fit)
}

/// As [`attention`](super::attention), by what [`supports_attention`] says.
pub(super) fn attention(inputs: [&Tensor; 3], scale: f64, by: InstructionSet) -> (Tensor, Tensor) {
    let kind = inputs[0].kind();
    if let Some(wide) = widened(inputs, by) {
        let [query, key, value] = &wide;
        let (out, lse) = attention([query, key, value], scale, by);
        return (out.to_kind(kind), lse);
    }
    let [query, key, value] = inputs;
    let out = like(query);
    let lse = Tensor::empty(&query.size()[..3], (Kind::Float, Device::Cpu));
    let task = AttentionTask::new(query, key, scale);
    let views = [query, key, value, &out].map(HeadView::new);
    let lses = task.lses(&lse);
    task.on_threads(|at, buffers| {
        // SAFETY: `supports_attention` has asked the processor, and the caller compared the sizes; a key head is this thread's alone.
        unsafe {
            match (by, kind) {
                (InstructionSet::Avx2, _) => {
                    forward_avx2::<Avx2<f32>, f32>(&task, &views, lses, at, buffers)
                }
                (_, Kind::BFloat16) => {
                    forward_avx512::<Avx512<true>, Bf16>(&task, &views, lses, at, buffers)
                }
                _ => forward_avx512::<Avx512<false>, f32>(&task, &views, lses, at, buffers),
            }
        }
    });
    (out, lse)
}

/// As [`attention_backward`](super::attention_backward), by what [`supports_attention`] says.
pub(super) fn attention_backward(
    grad: &Tensor,
    inputs: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    scale: f64,
    by: InstructionSet,
) -> [Tensor; 3] {
    let kind = grad.kind();
    if let Some(wide) = widened(inputs, by) {
        let [query, key, value] = &wide;
        let [grad, out] = [grad, out].map(|x| x.to_kind(Kind::Float));
        return attention_backward(&grad, [query, key, value], &out, lse, scale, by)
            .map(|grad| grad.to_kind(kind));
    }
    let [query, key, value] = inputs;
    let grads = inputs.map(like);
    let task = AttentionTask::new(query, key, scale);
    let views = [
        query, key, value, out, grad, &grads[0], &grads[1], &grads[2],
    ]
    .map(HeadView::new);
    let lses = task.lses(lse);
    task.on_threads(|at, buffers| {
        // SAFETY: as in forward.
        unsafe {
            match (by, kind) {
                (InstructionSet::Avx2, _) => {
                    backward_avx2::<Avx2<f32>, f32>(&task, &views, lses, at, buffers)
                }
                (_, Kind::BFloat16) => {
                    backward_avx512::<Avx512<true>, Bf16>(&task, &views, lses, at, buffers)
                }
                _ => backward_avx512::<Avx512<false>, f32>(&task, &views, lses, at, buffers),
            }
        }
    });
    grads
}

/// In fp32, what these instructions do not read in bf16.
fn widened(inputs: [&Tensor; 3], by: InstructionSet) -> Option<[Tensor; 3]> {
    let narrow = by == InstructionSet::Avx2 && inputs[0].kind() == Kind::BFloat16;
    narrow.then(|| inputs.map(|x| x.to_kind(Kind::Float)))
}

/// A tensor of the same shape, in memory `[B, S, H, d]`: what follows goes on with rows of all heads.
fn like(x: &Tensor) -> Tensor {
    let size = x.size();
    Tensor::empty(
        [size[0], size[2], size[1], size[3]],
        (x.kind(), Device::Cpu),
    )
    .transpose(1, 2)
}

/// One of the tensors: where it is, and bytes from one sequence, head and position to the next.
#[derive(Clone, Copy)]
struct HeadView {
    data: *mut u8,
    batch: usize,
    head: usize,
    row: usize,
}

// SAFETY: threads write the rows of their own heads alone.
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
            batch: stride[0],
            head: stride[1],
            row: stride[2],
        }
    }

    /// Where a row is.
    fn at(&self, batch: usize, head: usize, row: usize) -> *mut u8 {
        self.data
            .wrapping_add(batch * self.batch + head * self.head + row * self.row)
    }

    /// The numbers of a row.
    ///
    /// # Safety
    /// There are so many of type T, and nobody else writes them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn numbers<T>(
        &self,
        (batch, head, row): (usize, usize, usize),
        width: usize,
    ) -> &mut [T] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at(batch, head, row).cast(), width) }
    }
}

struct AttentionTask {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    length: usize,
    width: usize,
    scale: f32,
}

/// What a thread needs, and keeps.
#[derive(Default)]
struct Buffers {
    keys: Vec<CacheLine>,
    values: Vec<CacheLine>,
    natural: Vec<CacheLine>,
    queries: Vec<CacheLine>,
    grads: Vec<CacheLine>,
    scores: Vec<CacheLine>,
    others: Vec<CacheLine>,
    rounded: [Vec<CacheLine>; 3],
    sums: [Vec<CacheLine>; 3],
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl AttentionTask {
    fn new(query: &Tensor, key: &Tensor, scale: f64) -> AttentionTask {
        let size: Vec<usize> = query.size().iter().map(|&size| size as usize).collect();
        let kv_heads = key.size()[1] as usize;
        AttentionTask {
            batch: size[0],
            heads: size[1],
            kv_heads,
            length: size[2],
            width: size[3],
            scale: scale as f32,
        }
    }

    /// The log-sum-exps `[B, H, S]` fp32.
    fn lses(&self, lse: &Tensor) -> HeadView {
        let row = size_of::<f32>();
        let head = self.length * row;
        HeadView {
            data: lse.data_ptr().cast(),
            batch: self.heads * head,
            head,
            row,
        }
    }

    /// Calls `body` for every sequence and key head.
    fn on_threads(&self, body: impl Fn((usize, usize), &mut Buffers) + Sync) {
        on_threads(self.batch * self.kv_heads, |item| {
            BUFFERS.with_borrow_mut(|buffers| {
                body((item / self.kv_heads, item % self.kv_heads), buffers)
            });
        });
    }

    /// The query heads that a key head serves.
    fn query_heads(&self, kv_head: usize) -> Range<usize> {
        let times = self.heads / self.kv_heads;
        kv_head * times..(kv_head + 1) * times
    }
}

/// A matrix `[rows, width]` packed to be the right one of a product.
struct PackedMatrix {
    data: *const CacheLine,
    units: usize,
    /// Columns in all.
    columns: usize,
}

impl PackedMatrix {
    /// Of `rows` rows at `from`, `row` bytes apart, each a step of the inner dimension.
    ///
    /// # Safety
    /// They can be read, and the processor has the features.
    unsafe fn natural<K: Kernel>(
        from: *const u8,
        row: usize,
        rows: usize,
        width: usize,
        to: &mut Vec<CacheLine>,
    ) -> PackedMatrix {
        let from = Operand {
            data: from,
            inner: row,
            outer: K::SIZE,
            len: rows,
        };
        // SAFETY: as the caller promises.
        unsafe { PackedMatrix::new::<K>(&from, width, to) }
    }

    /// The transpose of that: each row a column.
    ///
    /// # Safety
    /// As above.
    unsafe fn transposed<K: Kernel>(
        from: *const u8,
        row: usize,
        rows: usize,
        width: usize,
        to: &mut Vec<CacheLine>,
    ) -> PackedMatrix {
        let from = Operand {
            data: from,
            inner: K::SIZE,
            outer: row,
            len: width,
        };
        // SAFETY: as above.
        unsafe { PackedMatrix::new::<K>(&from, rows, to) }
    }

    unsafe fn new<K: Kernel>(
        from: &Operand,
        columns: usize,
        to: &mut Vec<CacheLine>,
    ) -> PackedMatrix {
        let units = from.len.div_ceil(K::PER_UNIT);
        let data = room(to, units * columns.next_multiple_of(LANES));
        // SAFETY: `room` has made enough of it; the rest is the caller's promise.
        unsafe { K::right(from, 0..units, 0..columns, data) };
        PackedMatrix {
            data,
            units,
            columns,
        }
    }

    /// Multiplies `rows` rows, `step` bytes from one of their units to the next, by steps `units` and columns `columns` of this:
    /// rows of fp32 at `out`, `out_row` bytes apart.
    ///
    /// # Safety
    /// All of it is there; `columns` begins at a multiple of a tile's.
    unsafe fn gemm<K: Kernel>(
        &self,
        units: Range<usize>,
        columns: Range<usize>,
        rows: usize,
        left: impl Fn(usize) -> *const u8,
        step: usize,
        (out, out_row, store): (*mut f32, usize, Store),
    ) {
        let wide = K::LINES * LANES;
        for first in (0..rows).step_by(ROWS) {
            let here = (rows - first).min(ROWS);
            let left: [*const u8; ROWS] = std::array::from_fn(|i| left(first + i.min(here - 1)));
            for column in columns.clone().step_by(wide) {
                // Whole panels: of scores that nobody asked for there is room, too.
                let there = (self.columns - column).min(wide);
                let lines = there.div_ceil(LANES);
                let place = out
                    .wrapping_add(first * out_row / 4 + (column - columns.start))
                    .cast();
                let out = TileOutput {
                    data: place,
                    row: out_row,
                    rows: here,
                    mask: mask(there - (lines - 1) * LANES),
                    store,
                };
                // SAFETY: columns before this one fill whole panels.
                unsafe {
                    let right = self
                        .data
                        .add(self.units * (column / LANES) + units.start * lines);
                    K::tile(lines, units.len(), &left, step, right, &out);
                }
            }
        }
    }
}

/// Memory for `rows` rows of `width` numbers of four bytes.
fn floats(buffer: &mut Vec<CacheLine>, rows: usize, width: usize) -> *mut f32 {
    room(buffer, rows * width).cast()
}

/// A function of all of a key head, made for the features of a processor.
macro_rules! with_target_features {
    ($name:ident, $features:literal, $function:ident, $views:literal) => {
        /// # Safety
        /// The processor has the features; the rest as for the function itself.
        #[target_feature(enable = $features)]
        unsafe fn $name<K: Kernel, T: Number>(
            task: &AttentionTask,
            views: &[HeadView; $views],
            lses: HeadView,
            at: (usize, usize),
            buffers: &mut Buffers,
        ) {
            // SAFETY: as the caller promises.
            unsafe { $function::<K, T>(task, views, lses, at, buffers) }
        }
    };
}

with_target_features!(
    forward_avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma",
    forward,
    4
);
with_target_features!(forward_avx2, "avx2,fma", forward, 4);
with_target_features!(
    backward_avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma",
    backward,
    8
);
with_target_features!(backward_avx2, "avx2,fma", backward, 8);

/// # Safety
/// The processor has the features, views are as `supports_attention` says, and nobody else works on this key head.
#[inline(always)]
unsafe fn forward<K: Kernel, T: Number>(
    task: &AttentionTask,
    [query, key, value, out]: &[HeadView; 4],
    lses: HeadView,
    (batch, kv_head): (usize, usize),
    buffers: &mut Buffers,
) {
    let AttentionTask {
        length,
        width,
        scale,
        ..
    } = *task;
    let bf16 = K::PER_UNIT == 2;
    let steps = width / K::PER_UNIT;
    let sums = floats(&mut buffers.sums[0], QUERIES, width);
    let scores = floats(&mut buffers.scores, QUERIES, ROW);
    let rounded = room(&mut buffers.rounded[0], QUERIES * ROW / 2).cast::<Bf16>();
    // SAFETY: as the caller promises; buffers have the sizes that are named here.
    unsafe {
        let keys = PackedMatrix::transposed::<K>(
            key.at(batch, kv_head, 0),
            key.row,
            length,
            width,
            &mut buffers.keys,
        );
        let values = PackedMatrix::natural::<K>(
            value.at(batch, kv_head, 0),
            value.row,
            length,
            width,
            &mut buffers.values,
        );
        for head in task.query_heads(kv_head) {
            for start in (0..length).step_by(QUERIES) {
                let rows = (length - start).min(QUERIES);
                let seen = start + rows;
                let mut most = [f32::NEG_INFINITY; QUERIES];
                let mut sum = [0f32; QUERIES];
                std::slice::from_raw_parts_mut(sums, rows * width).fill(0.0);
                for first in (0..seen).step_by(KEYS) {
                    let here = (seen - first).min(KEYS);
                    let left = |row: usize| query.at(batch, head, start + row).cast_const();
                    let to = (scores, ROW * 4, Store::Set);
                    keys.gemm::<K>(0..steps, first..first + here, rows, left, 4, to);
                    for row in 0..rows {
                        let all = std::slice::from_raw_parts_mut(scores.add(row * ROW), here);
                        let valid = (start + row + 1).saturating_sub(first).min(here);
                        let factor = weights(all, valid, scale, &mut most[row], &mut sum[row]);
                        if factor != 1.0 {
                            let sums = std::slice::from_raw_parts_mut(sums.add(row * width), width);
                            sums.iter_mut().for_each(|x| *x *= factor);
                        }
                        if bf16 {
                            let to =
                                std::slice::from_raw_parts_mut(rounded.add(row * ROW), here + 1);
                            to.iter_mut()
                                .zip(&*all)
                                .for_each(|(to, x)| *to = Bf16::narrow(*x));
                            // The other one of a pair.
                            to[here] = Bf16::narrow(0.0);
                        }
                    }
                    let left = |row: usize| {
                        if bf16 {
                            rounded.add(row * ROW).cast::<u8>().cast_const()
                        } else {
                            scores.add(row * ROW).cast::<u8>().cast_const()
                        }
                    };
                    let units = first / K::PER_UNIT..(first + here).div_ceil(K::PER_UNIT);
                    values.gemm::<K>(
                        units,
                        0..width,
                        rows,
                        left,
                        4,
                        (sums, width * 4, Store::Add),
                    );
                }
                let lse = lses.numbers::<f32>((batch, head, start), rows);
                for row in 0..rows {
                    let over = 1.0 / sum[row];
                    lse[row] = most[row] + sum[row].ln();
                    let to = out.numbers::<T>((batch, head, start + row), width);
                    let sums = std::slice::from_raw_parts(sums.add(row * width), width);
                    to.iter_mut()
                        .zip(sums)
                        .for_each(|(to, x)| *to = T::narrow(x * over));
                }
            }
        }
    }
}

/// Makes `exp(score * scale - most)` of the first `valid` scores and nothing of the others. `most` is the largest so far and `sum`
/// that of the weights so far; gives what earlier ones are to be multiplied by.
#[inline(always)]
fn weights(scores: &mut [f32], valid: usize, scale: f32, most: &mut f32, sum: &mut f32) -> f32 {
    let (valid, rest) = scores.split_at_mut(valid);
    rest.fill(0.0);
    if valid.is_empty() {
        return 1.0;
    }
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, few) = valid.as_chunks::<LANES>();
    for chunk in whole {
        lanes
            .iter_mut()
            .zip(chunk)
            .for_each(|(most, &x)| *most = if x > *most { x } else { *most });
    }
    lanes
        .iter_mut()
        .zip(few)
        .for_each(|(most, &x)| *most = if x > *most { x } else { *most });
    let largest = lanes.iter().fold(
        f32::NEG_INFINITY,
        |most, &x| if x > most { x } else { most },
    ) * scale;
    let new = if largest > *most { largest } else { *most };
    let factor = if *most == f32::NEG_INFINITY {
        0.0
    } else {
        exp(*most - new)
    };
    let mut lanes = [0f32; LANES];
    let (whole, few) = valid.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (sum, x) in lanes.iter_mut().zip(chunk) {
            *x = exp(x.mul_add(scale, -new));
            *sum += *x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(few) {
        *x = exp(x.mul_add(scale, -new));
        *sum += *x;
    }
    *sum = *sum * factor + lanes.iter().sum::<f32>();
    *most = new;
    factor
}

/// # Safety
/// As for [`forward`].
#[inline(always)]
unsafe fn backward<K: Kernel, T: Number>(
    task: &AttentionTask,
    [
        query,
        key,
        value,
        out,
        grad,
        grad_query,
        grad_key,
        grad_value,
    ]: &[HeadView; 8],
    lses: HeadView,
    (batch, kv_head): (usize, usize),
    buffers: &mut Buffers,
) {
    let AttentionTask {
        length,
        width,
        scale,
        ..
    } = *task;
    let bf16 = K::PER_UNIT == 2;
    let steps = width / K::PER_UNIT;
    let [sums, key_sums, value_sums] = &mut buffers.sums;
    let sums = floats(sums, QUERIES, width);
    let key_sums = floats(key_sums, length, width);
    let value_sums = floats(value_sums, length, width);
    let scores = floats(&mut buffers.scores, QUERIES, ROW);
    let others = floats(&mut buffers.others, QUERIES, ROW);
    let [weights, pairs, rows_of] = &mut buffers.rounded;
    let weights = floats(weights, QUERIES / 2, ROW);
    let pairs = floats(pairs, QUERIES / 2, ROW);
    let rows_of = room(rows_of, QUERIES * ROW / 2).cast::<Bf16>();
    // SAFETY: as the caller promises; buffers have the sizes that are named here.
    unsafe {
        let key_rows = key.at(batch, kv_head, 0);
        let value_rows = value.at(batch, kv_head, 0);
        let keys =
            PackedMatrix::transposed::<K>(key_rows, key.row, length, width, &mut buffers.keys);
        let values = PackedMatrix::transposed::<K>(
            value_rows,
            value.row,
            length,
            width,
            &mut buffers.values,
        );
        let natural =
            PackedMatrix::natural::<K>(key_rows, key.row, length, width, &mut buffers.natural);
        std::slice::from_raw_parts_mut(key_sums, length * width).fill(0.0);
        std::slice::from_raw_parts_mut(value_sums, length * width).fill(0.0);
        for head in task.query_heads(kv_head) {
            for start in (0..length).step_by(QUERIES) {
                let rows = (length - start).min(QUERIES);
                let seen = start + rows;
                let queries = query.at(batch, head, start);
                let queries = PackedMatrix::natural::<K>(
                    queries,
                    query.row,
                    rows,
                    width,
                    &mut buffers.queries,
                );
                let grads = grad.at(batch, head, start);
                let grads =
                    PackedMatrix::natural::<K>(grads, grad.row, rows, width, &mut buffers.grads);
                let lse = lses.numbers::<f32>((batch, head, start), rows);
                let along: [f32; QUERIES] = std::array::from_fn(|row| {
                    if row < rows {
                        let at = (batch, head, start + row);
                        dot(out.numbers::<T>(at, width), grad.numbers::<T>(at, width))
                    } else {
                        0.0
                    }
                });
                std::slice::from_raw_parts_mut(sums, rows * width).fill(0.0);
                for first in (0..seen).step_by(KEYS) {
                    let here = (seen - first).min(KEYS);
                    let left = |row: usize| query.at(batch, head, start + row).cast_const();
                    let to = (scores, ROW * 4, Store::Set);
                    keys.gemm::<K>(0..steps, first..first + here, rows, left, 4, to);
                    let left = |row: usize| grad.at(batch, head, start + row).cast_const();
                    let to = (others, ROW * 4, Store::Set);
                    values.gemm::<K>(0..steps, first..first + here, rows, left, 4, to);
                    for row in 0..rows {
                        let scores = std::slice::from_raw_parts_mut(scores.add(row * ROW), here);
                        let others = std::slice::from_raw_parts_mut(others.add(row * ROW), here);
                        let valid = (start + row + 1).saturating_sub(first).min(here);
                        gradients(scores, others, valid, (scale, lse[row], along[row]));
                        if bf16 {
                            let to =
                                std::slice::from_raw_parts_mut(rows_of.add(row * ROW), here + 1);
                            to.iter_mut()
                                .zip(&*others)
                                .for_each(|(to, x)| *to = Bf16::narrow(*x));
                            to[here] = Bf16::narrow(0.0);
                        }
                    }
                    if bf16 {
                        interleave_bf16_rows(scores, rows, here, weights);
                        interleave_bf16_rows(others, rows, here, pairs);
                    }
                    // The first operands of the three products: rows of scores' gradients, and columns of both.
                    let (of_rows, of_weights, of_scores): (*const u8, *const f32, *const f32) =
                        if bf16 {
                            (rows_of.cast::<u8>(), weights, pairs)
                        } else {
                            (others.cast::<u8>(), scores, others)
                        };
                    let units = first / K::PER_UNIT..(first + here).div_ceil(K::PER_UNIT);
                    let row = |row: usize| of_rows.add(row * ROW * K::SIZE);
                    natural.gemm::<K>(units, 0..width, rows, row, 4, (sums, width * 4, Store::Add));
                    let units = 0..rows.div_ceil(K::PER_UNIT);
                    for (from, by, to) in [
                        (of_weights, &grads, value_sums),
                        (of_scores, &queries, key_sums),
                    ] {
                        let column = |key: usize| from.add(key).cast::<u8>();
                        let to = (to.add(first * width), width * 4, Store::Add);
                        by.gemm::<K>(units.clone(), 0..width, here, column, ROW * 4, to);
                    }
                }
                for row in 0..rows {
                    let to = grad_query.numbers::<T>((batch, head, start + row), width);
                    narrow(std::slice::from_raw_parts(sums.add(row * width), width), to);
                }
            }
        }
        for row in 0..length {
            let at = (batch, kv_head, row);
            narrow(
                std::slice::from_raw_parts(key_sums.add(row * width), width),
                grad_key.numbers::<T>(at, width),
            );
            narrow(
                std::slice::from_raw_parts(value_sums.add(row * width), width),
                grad_value.numbers::<T>(at, width),
            );
        }
    }
}

/// Makes weights of scores, and of the weights' gradients those of the scores: of the first `valid`, and nothing of the others.
#[inline(always)]
fn gradients(
    scores: &mut [f32],
    others: &mut [f32],
    valid: usize,
    (scale, lse, along): (f32, f32, f32),
) {
    for (score, other) in scores[..valid].iter_mut().zip(&mut others[..valid]) {
        *score = exp(score.mul_add(scale, -lse));
        *other = *score * (*other - along) * scale;
    }
    scores[valid..].fill(0.0);
    others[valid..].fill(0.0);
}

/// Rounds rows to bf16, two rows' numbers of a column beside each other; after an odd row come zeros.
///
/// # Safety
/// There are `rows` rows at `from` and half as many at `to`, of `width` numbers, [`ROW`] apart.
#[inline(always)]
unsafe fn interleave_bf16_rows(from: *const f32, rows: usize, width: usize, to: *mut f32) {
    for row in (0..rows).step_by(2) {
        // SAFETY: as the caller promises.
        let (first, to) = unsafe {
            let first = std::slice::from_raw_parts(from.add(row * ROW), width);
            (
                first,
                std::slice::from_raw_parts_mut(to.add(row / 2 * ROW).cast::<u32>(), width),
            )
        };
        if row + 1 < rows {
            // SAFETY: as above.
            let second = unsafe { std::slice::from_raw_parts(from.add((row + 1) * ROW), width) };
            for (to, (a, b)) in to.iter_mut().zip(first.iter().zip(second)) {
                *to = rounded(*a) >> 16 | rounded(*b) & 0xffff_0000;
            }
        } else {
            to.iter_mut()
                .zip(first)
                .for_each(|(to, a)| *to = rounded(*a) >> 16);
        }
    }
}

/// The bits of a number that is not NaN, whose upper half is bf16, to nearest and ties to even.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1))
}

#[inline(always)]
fn dot<T: Number>(a: &[T], b: &[T]) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += a[lane].wide() * b[lane].wide();
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn narrow<T: Number>(from: &[f32], to: &mut [T]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, x)| *to = T::narrow(*x));
}
