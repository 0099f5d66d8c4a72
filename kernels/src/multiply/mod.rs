//! Products of matrices in fp32 and bf16, all accumulated in fp32, for processors on which libtorch's are slower: several products in
//! one loop over threads, without memory that the kernel has to clear first.
//!
//! The usual way (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008), except that of the left matrix rows
//! are read where they lie, if they lie as a tile reads them. What a tile is and how it is fed is a processor's [`Kernel`].
//!
//! A number of the result is summed up in an order that the inner dimension's length decides alone: neither threads nor the
//! other products change a bit of it.

mod avx2;
mod avx512;
pub(crate) mod kernel;
mod share;

use crate::number::{Bf16, Number};
use crate::rows::on_threads;
pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
use kernel::{Kernel, LANES, Layout, Line, Operand, Out, ROWS, Store, mask, room};
use share::{Wave, share};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;
use tch::{Kind, Tensor};

/// Columns that a thread packs at once: of whole panels.
const CHUNK: usize = 64;
/// The inner dimension of which right matrices are packed at once, where sums are added to: gradients sum up over all tokens, and what
/// is packed is kept.
const SLAB: i64 = 1 << 14;
/// Panels whose sums are kept in fp32 until they can be rounded.
const ROUNDED_PANELS: usize = 64;

/// The place of the result, the left matrix and the right one.
pub(crate) type Product<'a> = (&'a Tensor, &'a Tensor, &'a Tensor);

/// The instructions that loops of our own are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instructions {
    Avx512,
    Avx2,
}

/// Those of this processor that make products of numbers of `kind`, and attend to them, faster than libtorch, if any do.
pub(crate) fn instructions(kind: Kind) -> Option<Instructions> {
    static BEST: OnceLock<(Option<Instructions>, bool)> = OnceLock::new();
    let (best, intel) = *BEST.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        let vendor: Vec<u8> = [id.ebx, id.edx, id.ecx].iter().flat_map(|part| part.to_le_bytes()).collect();
        (Instructions::here().first().copied(), vendor == b"GenuineIntel")
    });
    match (best?, kind) {
        // Intel's have kernels of all widths in MKL, and a unit for tiles that oneDNN uses.
        (Instructions::Avx512, Kind::Float | Kind::BFloat16) if !intel => best,
        (Instructions::Avx2, Kind::Float) if !intel => best,
        // Without AVX-512 oneDNN has nothing for bf16, on anybody's.
        (Instructions::Avx2, Kind::BFloat16) if !std::is_x86_feature_detected!("avx512bw") => best,
        _ => None,
    }
}

impl Instructions {
    /// Those that this processor has, the best first.
    fn here() -> Vec<Instructions> {
        let avx512 = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512vl")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512bf16");
        let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        let all = [(Instructions::Avx512, avx512), (Instructions::Avx2, avx2)];
        all.into_iter().filter_map(|(instructions, there)| there.then_some(instructions)).collect()
    }
}

struct Job {
    out: *mut u8,
    out_row: usize,
    rounds: bool,
    adds: bool,
    left: Operand,
    right: Operand,
    size: share::Size,
}

// SAFETY: threads read operands, and write parts of `out` that do not overlap.
unsafe impl Sync for Job {}

/// Computes `out = left right` of all of them, or `out += left right`, by instructions that this processor has, of operands in
/// fp32 or bf16. They have a contiguous dimension; `out` has contiguous rows, in their dtype or fp32. (`fits` of the caller says so.)
pub(crate) fn multiply(products: &[Product], adds: bool, instructions: Instructions) {
    let deepest = products.iter().map(|(_, left, _)| left.size()[1]).max().unwrap_or(0);
    let splits = adds && deepest > SLAB && products.iter().all(|(out, ..)| out.kind() == Kind::Float);
    if !splits {
        return whole(products, adds, instructions);
    }
    for start in (0..deepest).step_by(SLAB as usize) {
        let slab = |(out, left, right): &Product| {
            let len = (left.size()[1] - start).min(SLAB);
            (len > 0).then(|| (out.shallow_clone(), left.narrow(1, start, len), right.narrow(0, start, len)))
        };
        let slabs: Vec<_> = products.iter().filter_map(slab).collect();
        let borrowed: Vec<Product> = slabs.iter().map(|(out, left, right)| (out, left, right)).collect();
        whole(&borrowed, adds, instructions);
    }
}

fn whole(products: &[Product], adds: bool, instructions: Instructions) {
    let Some(first) = products.first() else { return };
    match (instructions, first.1.kind() == Kind::BFloat16) {
        (Instructions::Avx512, true) => multiply_by::<Avx512<true>>(products, adds),
        (Instructions::Avx512, false) => multiply_by::<Avx512<false>>(products, adds),
        (Instructions::Avx2, true) => multiply_by::<Avx2<Bf16>>(products, adds),
        (Instructions::Avx2, false) => multiply_by::<Avx2<f32>>(products, adds),
    }
}

fn multiply_by<K: Kernel>(products: &[Product], adds: bool) {
    let jobs: Vec<Job> = products.iter().map(|product| job(product, adds)).collect();
    let sizes: Vec<share::Size> = jobs.iter().map(|job| job.size).collect();
    PACKED_RIGHT.with_borrow_mut(|buffer| {
        for wave in share(&sizes, torch_ext::parallel_parts()) {
            let packed = pack_wave::<K>(&jobs, &wave, buffer);
            on_threads(wave.parts.len(), |part| {
                BUFFERS.with_borrow_mut(|buffers| {
                    for piece in &wave.parts[part] {
                        let block = &wave.blocks[piece.block];
                        let right = packed.of(piece.block);
                        // SAFETY: the processor was asked, sizes were compared in `job`, what is needed of the right matrix is packed, and
                        // a piece is this thread's alone.
                        unsafe { work::<K>(&jobs[block.product], &block.columns, right, piece.panels.clone(), buffers) }
                    }
                });
            });
        }
    });
}

/// Right matrices of a wave's blocks, packed: each block's lines from its start on, depth after depth.
struct Packed {
    data: *mut Line,
    starts: Vec<usize>,
}

// SAFETY: threads write parts that do not overlap, and read when all are written.
unsafe impl Sync for Packed {}

impl Packed {
    fn of(&self, block: usize) -> *mut Line {
        self.data.wrapping_add(self.starts[block])
    }
}

/// Some columns of a block, some units deep.
struct Chunk {
    block: usize,
    units: Range<usize>,
    columns: Range<usize>,
}

fn pack_wave<K: Kernel>(jobs: &[Job], wave: &Wave, buffer: &mut Vec<Line>) -> Packed {
    let (mut starts, mut chunks, mut lines) = (Vec::new(), Vec::new(), 0);
    for (index, block) in wave.blocks.iter().enumerate() {
        let units = jobs[block.product].size.1.div_ceil(K::PER_UNIT);
        starts.push(lines);
        lines += units * block.padded() / LANES;
        for unit in (0..units).step_by(K::DEPTH) {
            for column in block.columns.clone().step_by(CHUNK) {
                let columns = column..(column + CHUNK).min(block.columns.end);
                chunks.push(Chunk { block: index, units: unit..(unit + K::DEPTH).min(units), columns });
            }
        }
    }
    let packed = Packed { data: room(buffer, lines * LANES), starts };
    let pack = |Chunk { block: index, units, columns }: &Chunk| {
        let block = &wave.blocks[*index];
        let before = units.start * block.padded() + units.len() * (columns.start - block.columns.start);
        // SAFETY: inside the matrix and the buffer, by their sizes: chunks begin with whole lines.
        unsafe {
            let to = packed.of(*index).add(before / LANES);
            K::right(&jobs[block.product].right, units.clone(), columns.clone(), to);
        }
    };
    match wave.parts.len() {
        1 => chunks.iter().for_each(pack),
        _ => on_threads(chunks.len(), |chunk| pack(&chunks[chunk])),
    }
    packed
}

fn job(&(out, left, right): &Product, adds: bool) -> Job {
    let sizes = [out, left, right].map(|tensor| tensor.size());
    let [m, k, n] = [sizes[1][0], sizes[1][1], sizes[2][1]].map(|size| size as usize);
    assert!(
        sizes[0] == [m as i64, n as i64] && sizes[2][0] == k as i64,
        "{:?} x {:?} is not {:?}",
        sizes[1],
        sizes[2],
        sizes[0]
    );
    let operand = |tensor: &Tensor, inner: usize| {
        let (stride, size) = (tensor.stride(), tensor.kind().elt_size_in_bytes());
        let bytes = |dim: usize| match tensor.size()[dim] {
            // Nobody steps along it.
            1 => size,
            _ => stride[dim] as usize * size,
        };
        Operand { data: tensor.data_ptr().cast(), inner: bytes(inner), outer: bytes(1 - inner), len: k }
    };
    if k == 0 && !adds {
        let _ = out.shallow_clone().zero_();
    }
    Job {
        out: out.data_ptr().cast(),
        out_row: out.stride()[0] as usize * out.kind().elt_size_in_bytes(),
        rounds: out.kind() == Kind::BFloat16,
        adds,
        left: operand(left, 1),
        right: operand(right, 0),
        size: (m, k, n),
    }
}

/// What a thread needs, and keeps.
struct Buffers {
    left: Vec<Line>,
    sums: Vec<Line>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = const { RefCell::new(Buffers { left: Vec::new(), sums: Vec::new() }) };
    /// Of a thread that asks for products.
    static PACKED_RIGHT: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Some panels of some columns of a product, of whose right matrix `right` is what was packed.
///
/// # Safety
/// The processor has the features, the job's tensors live, and nobody else works on these.
unsafe fn work<K: Kernel>(
    job: &Job,
    columns: &Range<usize>,
    right: *const Line,
    panels: Range<usize>,
    buffers: &mut Buffers,
) {
    let (m, k, _) = job.size;
    let (units, width) = (k.div_ceil(K::PER_UNIT), columns.len());
    // Sums that are added to are kept in fp32.
    let kept = job.rounds && (job.adds || units > K::DEPTH);
    let padded = width.next_multiple_of(LANES);
    let sums =
        if kept { room(&mut buffers.sums, ROUNDED_PANELS * ROWS * padded).cast::<f32>() } else { std::ptr::null_mut() };
    let some = if kept { ROUNDED_PANELS } else { panels.len().max(1) };
    let layout = K::layout(&job.left);
    let at_once = K::panels(layout);
    let packed_left = match layout {
        Layout::InPlace => std::ptr::null_mut(),
        _ => room(&mut buffers.left, at_once * ROWS * K::DEPTH.min(units)).cast::<u32>(),
    };
    for start in panels.clone().step_by(some) {
        let panels = start..(start + some).min(panels.end);
        if kept && job.adds {
            // SAFETY: rows of this part of `out`, and as many of the buffer.
            unsafe { widen(job, columns, &panels, sums, padded) };
        }
        for unit in (0..units).step_by(K::DEPTH) {
            let block = unit..(unit + K::DEPTH).min(units);
            let right = right.wrapping_add(unit * padded / LANES);
            for group in panels.clone().step_by(at_once) {
                let group = group..(group + at_once).min(panels.end);
                if layout != Layout::InPlace {
                    let rows = (group.end * ROWS).min(m) - group.start * ROWS;
                    // SAFETY: the left matrix has these, and the buffer room.
                    unsafe { K::left(&job.left, block.clone(), group.start * ROWS, rows, packed_left) };
                }
                let tile = |panel: usize, column: usize| {
                    let rows = (m - panel * ROWS).min(ROWS);
                    let first = packed_left.wrapping_add((panel - group.start) * block.len() * ROWS).cast_const();
                    let row = |i: usize| match layout {
                        Layout::InPlace => {
                            let at = (panel * ROWS + i.min(rows - 1)) * job.left.outer + block.start * 4;
                            job.left.data.wrapping_add(at)
                        }
                        Layout::Rows => first.wrapping_add(i.min(rows - 1) * block.len()).cast(),
                        Layout::Units => first.wrapping_add(i).cast(),
                    };
                    let (left, step) = (std::array::from_fn(row), if layout == Layout::Units { 4 * ROWS } else { 4 });
                    let (data, row) = if kept {
                        (sums.wrapping_add((panel - panels.start) * ROWS * padded).cast::<u8>(), padded * 4)
                    } else {
                        let column = columns.start * if job.rounds { 2 } else { 4 };
                        (job.out.wrapping_add(panel * ROWS * job.out_row + column), job.out_row)
                    };
                    let store = match job.rounds && !kept {
                        true => Store::Round,
                        false if job.adds || unit > 0 => Store::Add,
                        false => Store::Set,
                    };
                    let here = (width - column).min(K::LINES * LANES);
                    let lines = here.div_ceil(LANES);
                    let bytes = if store == Store::Round { 2 } else { 4 };
                    let mask = mask(here - (lines - 1) * LANES);
                    let out = Out { data: data.wrapping_add(column * bytes), row, rows, mask, store };
                    // SAFETY: what was packed, rows that the left matrix has, and a place in `out` that is this piece's; columns before
                    // this one fill whole tiles.
                    unsafe {
                        let right = right.add(block.len() * (column / LANES));
                        K::tile(lines, block.len(), left, step, right, out);
                    }
                };
                let all_columns = || (0..width).step_by(K::LINES * LANES);
                match K::RIGHT_STAYS {
                    true => all_columns().for_each(|column| group.clone().for_each(|panel| tile(panel, column))),
                    false => group.clone().for_each(|panel| all_columns().for_each(|column| tile(panel, column))),
                }
            }
        }
        if kept {
            let rows = (panels.end * ROWS).min(m) - panels.start * ROWS;
            let place = panels.start * ROWS * job.out_row + columns.start * 2;
            // SAFETY: as above.
            unsafe { K::round(sums, padded, width, job.out.add(place), job.out_row, rows) };
        }
    }
}

/// What `out` has of some rows and columns, in bf16, to `sums`, fp32 with rows `padded` apart.
///
/// # Safety
/// It can be read, and `sums` written.
unsafe fn widen(job: &Job, columns: &Range<usize>, panels: &Range<usize>, sums: *mut f32, padded: usize) {
    for row in panels.start * ROWS..(panels.end * ROWS).min(job.size.0) {
        // SAFETY: as the caller promises.
        let (from, to) = unsafe {
            let from = job.out.add(row * job.out_row).cast::<Bf16>().add(columns.start);
            let to = sums.add((row - panels.start * ROWS) * padded);
            (std::slice::from_raw_parts(from, columns.len()), std::slice::from_raw_parts_mut(to, columns.len()))
        };
        to.iter_mut().zip(from).for_each(|(to, x)| *to = x.wide());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product::tests::random;
    use proptest::prelude::*;
    use tch::Device;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn all_instructions_make_the_product(
            (m, k, n) in (0i64..150, 0i64..90, 0i64..300), lie in 0u8..4, threads in 1i32..4, adds: bool, bf16: bool,
            narrow_sum: bool, deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Now and then more than one block, and even: either dimension may be the contiguous one.
            let k = (if deep == 0 { k + 1100 } else { k }) / 2 * 2;
            let (left, right) = (random(m, k, lie & 1 > 0, kind), random(k, n, lie & 2 > 0, kind));
            let before = random(m, n, false, if adds && !narrow_sum { Kind::Float } else { kind });
            let plain = left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double));
            let plain = if adds { plain + before.to_kind(Kind::Double) } else { plain };
            for by in Instructions::here() {
                let out = random(m, n, false, before.kind());
                out.shallow_clone().copy_(&before);
                multiply(&[(&out, &left, &right)], adds, by);
                let off = (out.to_kind(Kind::Double) - &plain).norm().double_value(&[]);
                let tolerance = if bf16 { 5e-3 } else { 1e-6 };
                prop_assert!(off <= tolerance * plain.norm().double_value(&[]), "{:?}: {}", by, off);
                // Threads change no bit.
                let alone = random(m, n, false, before.kind());
                alone.shallow_clone().copy_(&before);
                tch::set_num_threads(1);
                multiply(&[(&alone, &left, &right)], adds, by);
                tch::set_num_threads(threads);
                prop_assert!(alone.equal(&out));
            }
        }
    }

    #[test]
    fn gradients_of_very_many_tokens() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (left, right) = (random(9, 40_000, true, kind), random(40_000, 20, false, kind));
            let plain = left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double)) + 1.0;
            for by in Instructions::here() {
                let sum = Tensor::ones([9, 20], (Kind::Float, Device::Cpu));
                multiply(&[(&sum, &left, &right)], true, by);
                let off = (sum.to_kind(Kind::Double) - &plain).norm().double_value(&[]);
                assert!(off < 1e-5 * plain.norm().double_value(&[]), "{by:?} {kind:?}: {off}");
            }
        }
    }
}
