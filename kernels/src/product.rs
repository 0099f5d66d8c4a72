//! Matrix products in fp32 on processors for which libtorch's library has no kernel of their vector width: MKL gives AMD's its
//! kernel of 256 bits, where those with AVX-512 do twice as much (docs/performance.md). Everything else goes to libtorch.

use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// Multiplications that are worth a thread.
const GRAIN: usize = 1 << 18;
/// Rows or columns of a part are a multiple of this, so that kernels have whole tiles.
const TILE: usize = 64;

/// `left right`, of matrices.
pub fn product(left: &Tensor, right: &Tensor) -> Tensor {
    if !ours(&[left, right]) {
        return left.matmul(right);
    }
    let out = Tensor::empty([left.size()[0], right.size()[1]], (left.kind(), left.device()));
    multiply(&out, left, right, false);
    out
}

/// `out = left right`, of matrices of one dtype.
pub fn product_into(out: &Tensor, left: &Tensor, right: &Tensor) {
    match ours(&[out, left, right]) {
        true => multiply(out, left, right, false),
        false => drop(left.mm_out(out, right)),
    }
}

/// `sum += left right`, of matrices; `sum` is fp32 whatever the dtype of the others.
pub fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor) {
    if left.kind() == Kind::BFloat16 && ours(&[sum]) {
        // Twice the work of a product in 16 bits, and yet as fast: nothing is rounded, written, read and added up beside it.
        return add_product(sum, &left.to_kind(Kind::Float), &right.to_kind(Kind::Float));
    }
    if ours(&[sum, left, right]) {
        multiply(sum, left, right, true);
        return;
    }
    let mut sum = sum.shallow_clone();
    if left.kind() == sum.kind() {
        let _ = sum.addmm_(left, right);
    } else {
        let _ = sum.g_add_(&left.matmul(right).to_kind(Kind::Float));
    }
}

/// Whether this processor is one of those, and the tensors are what is multiplied here.
fn ours(tensors: &[&Tensor]) -> bool {
    static WIDER: OnceLock<bool> = OnceLock::new();
    *WIDER.get_or_init(wider_than_libtorchs)
        && tensors.iter().all(|x| x.device() == Device::Cpu && x.kind() == Kind::Float && x.dim() == 2)
}

#[cfg(target_arch = "x86_64")]
fn wider_than_libtorchs() -> bool {
    // MKL has kernels of all widths for Intel's own.
    let id = std::arch::x86_64::__cpuid(0);
    let vendor: Vec<u8> = [id.ebx, id.edx, id.ecx].iter().flat_map(|part| part.to_le_bytes()).collect();
    std::is_x86_feature_detected!("avx512f") && vendor != b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn wider_than_libtorchs() -> bool {
    false
}

/// A matrix in memory: where it begins, and how far it is to the next row and the next column.
#[derive(Clone, Copy)]
struct Matrix {
    data: *mut f32,
    row: isize,
    column: isize,
}

// SAFETY: threads write parts that do not overlap.
unsafe impl Sync for Matrix {}

impl Matrix {
    fn of(tensor: &Tensor) -> Matrix {
        let strides = tensor.stride();
        Matrix { data: tensor.data_ptr().cast(), row: strides[0] as isize, column: strides[1] as isize }
    }

    fn at(self, row: usize, column: usize) -> *mut f32 {
        self.data.wrapping_offset(row as isize * self.row + column as isize * self.column)
    }
}

/// `out = left right`, or `out += left right`.
fn multiply(out: &Tensor, left: &Tensor, right: &Tensor, adds: bool) {
    let size = |tensor: &Tensor, dim: usize| tensor.size()[dim] as usize;
    let (m, k, n) = (size(left, 0), size(left, 1), size(right, 1));
    assert!(
        out.size() == [m as i64, n as i64] && right.size()[0] == k as i64,
        "{:?} x {:?} is not {:?}",
        left.size(),
        right.size(),
        out.size()
    );
    let (to, left, right) = (Matrix::of(out), Matrix::of(left), Matrix::of(right));
    // The longer side is shared out.
    let by_rows = m >= n;
    let (long, short) = if by_rows { (m, n) } else { (n, m) };
    let tiles = long.div_ceil(TILE);
    torch_ext::parallel_for(tiles, (GRAIN / (TILE * short * k).max(1)).max(1), |_, range| {
        let (start, end) = (range.start * TILE, (range.end * TILE).min(long));
        let (to, left, right) = (to, left, right);
        let (rows, columns) = if by_rows { (start..end, 0..n) } else { (0..m, start..end) };
        // SAFETY: all pointers and strides are those of tensors that live through the call, and of the sizes that were compared;
        // this part of the result is this thread's alone.
        unsafe {
            gemm::gemm(
                rows.len(),
                columns.len(),
                k,
                to.at(rows.start, columns.start),
                to.column,
                to.row,
                adds,
                left.at(rows.start, 0),
                left.column,
                left.row,
                right.at(0, columns.start),
                right.column,
                right.row,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn random(rows: i64, columns: i64, transposed: bool) -> Tensor {
        match transposed {
            true => Tensor::randn([columns, rows], (Kind::Float, Device::Cpu)).tr(),
            false => Tensor::randn([rows, columns], (Kind::Float, Device::Cpu)),
        }
    }

    fn close(ours: &Tensor, plain: &Tensor) {
        assert!(ours.to_kind(Kind::Double).allclose(plain, 1e-4, 1e-4, false), "{:?}", ours.size());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn it_is_the_product_however_matrices_lie(
            (m, k, n) in (0i64..150, 0i64..90, 0i64..150), lie in 0u8..8, threads in 1i32..4, adds: bool,
        ) {
            tch::set_num_threads(threads);
            let (left, right) = (random(m, k, lie & 1 > 0), random(k, n, lie & 2 > 0));
            // A part of a larger matrix.
            let out = random(m + 2, n + 3, lie & 4 > 0).narrow(0, 1, m).narrow(1, 2, n);
            let wide = |x: &Tensor| x.to_kind(Kind::Double);
            let mut plain = wide(&left).matmul(&wide(&right));
            if adds {
                plain += wide(&out);
            }
            multiply(&out, &left, &right, adds);
            close(&out, &plain);
        }
    }

    #[test]
    fn what_others_multiply_goes_to_them() {
        let (left, right) = (random(4, 5, false).to_kind(Kind::BFloat16), random(5, 6, true).to_kind(Kind::BFloat16));
        let plain = left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double));
        let sum = Tensor::ones([4, 6], (Kind::Float, Device::Cpu));
        add_product(&sum, &left, &right);
        assert!(sum.to_kind(Kind::Double).allclose(&(&plain + 1.0), 2e-2, 2e-2, false));
        let out = product(&left, &right);
        product_into(&out, &left, &right);
        assert!(out.to_kind(Kind::Double).allclose(&plain, 2e-2, 2e-2, false));
        let (left, right) = (random(4, 5, false), random(5, 6, true));
        close(&product(&left, &right), &left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double)));
    }
}
