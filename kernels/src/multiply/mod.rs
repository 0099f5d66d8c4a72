//! Products of matrices in fp32 and bf16, all accumulated in fp32, for processors with AVX-512 and its bf16 instructions: several
//! products in one loop over threads, without memory that the kernel has to clear first.
//!
//! The usual way (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008), with two changes: of the left
//! matrix rows are read where they lie, if their inner dimension is contiguous; and a tile is 6 x 64, whose row of four vectors
//! meets six broadcast numbers, so that a product needs less than half a load.
//!
//! A number of the result is summed up in an order that the inner dimension's length decides alone: neither threads nor the
//! other products change a bit of it.

pub(crate) mod pack;
mod share;
pub(crate) mod tile;

use pack::{Operand, per_unit, size};
use share::{Piece, share};
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::{Kind, Tensor};
use tile::{Out, Store};

/// Rows of a tile.
pub(crate) const ROWS: usize = 6;
/// Numbers of a vector.
pub(crate) const LANES: usize = 16;
/// Vectors of a tile's row.
pub(crate) const VECTORS: usize = 4;
/// Units of the inner dimension that are gone along at once: with the columns of a [`Piece`], half a MiB.
const DEPTH: usize = 512;
/// Bytes of a row of the left matrix's transpose that are packed at once, where it has to be.
const PACKED: usize = 192;
/// Panels whose sums are kept in fp32 until they can be rounded.
const ROUNDED_PANELS: usize = 64;

/// 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u32; LANES]);

/// The place of the result, the left matrix and the right one.
pub(crate) type Product<'a> = (&'a Tensor, &'a Tensor, &'a Tensor);

/// Whether this processor is one that is meant.
pub(crate) fn is_for_this_processor() -> bool {
    // Intel's have kernels of all widths in MKL, and a unit for tiles that oneDNN uses.
    let id = std::arch::x86_64::__cpuid(0);
    let vendor: Vec<u8> = [id.ebx, id.edx, id.ecx].iter().flat_map(|part| part.to_le_bytes()).collect();
    vendor != b"GenuineIntel"
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512bf16")
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

/// Computes `out = left right` of all of them, or `out += left right`. Operands are of one dtype, fp32 or bf16, with a contiguous dimension; `out` has contiguous rows, in their
/// dtype or fp32, and is fp32 where it is added to. (`fits` of the caller says so.)
pub(crate) fn multiply(products: &[Product], adds: bool) {
    let Some(first) = products.first() else { return };
    let bf16 = first.1.kind() == Kind::BFloat16;
    let jobs: Vec<Job> = products.iter().map(|product| job(product, adds, bf16)).collect();
    let sizes: Vec<share::Size> = jobs.iter().map(|job| job.size).collect();
    let parts = share(&sizes, torch_ext::parallel_parts());
    let next = AtomicUsize::new(0);
    torch_ext::parallel_for(parts.len(), 1, |_, _| {
        while let Some(pieces) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            BUFFERS.with_borrow_mut(|buffers| {
                for piece in pieces {
                    // SAFETY: the processor was asked, sizes were compared in `job`, and a piece is this thread's alone.
                    unsafe {
                        match bf16 {
                            true => work::<true>(&jobs[piece.product], piece, buffers),
                            false => work::<false>(&jobs[piece.product], piece, buffers),
                        }
                    }
                }
            });
        }
    });
}

fn job(&(out, left, right): &Product, adds: bool, bf16: bool) -> Job {
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
        let stride = tensor.stride();
        let bytes = |dim: usize| match tensor.size()[dim] {
            // Nobody steps along it.
            1 => size(bf16),
            _ => stride[dim] as usize * size(bf16),
        };
        Operand { data: tensor.data_ptr().cast(), inner: bytes(inner), outer: bytes(1 - inner), len: k }
    };
    if k == 0 && !adds {
        let _ = out.shallow_clone().zero_();
    }
    let rounds = out.kind() == Kind::BFloat16;
    Job {
        out: out.data_ptr().cast(),
        out_row: out.stride()[0] as usize * size(rounds),
        rounds,
        adds,
        left: operand(left, 1),
        right: operand(right, 0),
        size: (m, k, n),
    }
}

/// What a thread needs, and keeps.
struct Buffers {
    left: Vec<Line>,
    right: Vec<Line>,
    sums: Vec<Line>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = const { RefCell::new(Buffers { left: Vec::new(), right: Vec::new(), sums: Vec::new() }) };
}

/// Room for `units` units.
pub(crate) fn room(buffer: &mut Vec<Line>, units: usize) -> *mut Line {
    let lines = units.div_ceil(LANES) + 1;
    if buffer.len() < lines {
        buffer.resize(lines, Line([0; LANES]));
    }
    buffer.as_mut_ptr()
}

/// A bit for each number of a vector that is there.
pub(crate) fn mask(there: usize) -> u16 {
    if there >= LANES { u16::MAX } else { (1 << there) - 1 }
}

/// One piece of a product.
///
/// # Safety
/// The processor has the features, the job's tensors live, and nobody else works on this piece.
unsafe fn work<const BF16: bool>(job: &Job, piece: &Piece, buffers: &mut Buffers) {
    let (m, k, _) = job.size;
    let (units, width) = (k.div_ceil(per_unit(BF16)), piece.columns.len());
    // Sums that a second block adds to are kept in fp32.
    let kept = job.rounds && units > DEPTH;
    let padded = width.next_multiple_of(LANES);
    let sums =
        if kept { room(&mut buffers.sums, ROUNDED_PANELS * ROWS * padded).cast::<f32>() } else { std::ptr::null_mut() };
    let direct = job.left.is_along(BF16);
    let some = if kept { ROUNDED_PANELS } else { piece.panels.len().max(1) };
    let packed_right = room(&mut buffers.right, DEPTH.min(units) * padded);
    let at_once = if direct { 1 } else { PACKED / size(BF16) / ROWS };
    let packed_left =
        if direct { std::ptr::null_mut() } else { room(&mut buffers.left, at_once * ROWS * DEPTH.min(units)) };
    for start in piece.panels.clone().step_by(some) {
        let panels = start..(start + some).min(piece.panels.end);
        for unit in (0..units).step_by(DEPTH) {
            let block = unit..(unit + DEPTH).min(units);
            // SAFETY: inside the matrix and the buffer, by their sizes.
            unsafe { pack::right::<BF16>(&job.right, block.clone(), piece.columns.clone(), packed_right) };
            for group in panels.clone().step_by(at_once) {
                let group = group..(group + at_once).min(panels.end);
                if !direct {
                    let rows = (group.end * ROWS).min(m) - group.start * ROWS;
                    // SAFETY: as above; what is not contiguous along the inner dimension is along the other one.
                    unsafe {
                        pack::left::<BF16>(&job.left, block.clone(), group.start * ROWS, rows, packed_left.cast())
                    };
                }
                for panel in group.clone() {
                    let rows = (m - panel * ROWS).min(ROWS);
                    let (left, step) = if direct {
                        let row = |i: usize| (panel * ROWS + i.min(rows - 1)) * job.left.outer + block.start * 4;
                        (std::array::from_fn(|i| job.left.data.wrapping_add(row(i))), 4)
                    } else {
                        let first = packed_left.cast::<u32>().wrapping_add((panel - group.start) * block.len() * ROWS);
                        (std::array::from_fn(|i| first.wrapping_add(i).cast_const().cast()), 4 * ROWS)
                    };
                    let (data, row) = if kept {
                        (sums.wrapping_add((panel - panels.start) * ROWS * padded).cast::<u8>(), padded * 4)
                    } else {
                        let column = piece.columns.start * size(job.rounds);
                        (job.out.wrapping_add(panel * ROWS * job.out_row + column), job.out_row)
                    };
                    let store = match job.rounds && !kept {
                        true => Store::Round,
                        false if job.adds || unit > 0 => Store::Add,
                        false => Store::Set,
                    };
                    let mut right = packed_right.cast_const();
                    for column in (0..width).step_by(VECTORS * LANES) {
                        let columns = (width - column).min(VECTORS * LANES);
                        let lines = columns.div_ceil(LANES);
                        let bytes = if store == Store::Round { 2 } else { 4 };
                        let mask = mask(columns - (lines - 1) * LANES);
                        let out = Out { data: data.wrapping_add(column * bytes), row, rows, mask, store };
                        // SAFETY: what was packed, rows that the left matrix has, and a place in `out` that is this piece's.
                        unsafe {
                            tile::tile_of::<BF16>(lines, block.len(), left, step, right, out);
                            right = right.add(block.len() * lines);
                        }
                    }
                }
            }
        }
        if kept {
            let rows = (panels.end * ROWS).min(m) - panels.start * ROWS;
            let place = panels.start * ROWS * job.out_row + piece.columns.start * 2;
            // SAFETY: as above.
            unsafe { tile::round(sums, padded, width, job.out.add(place), job.out_row, rows) };
        }
    }
}
