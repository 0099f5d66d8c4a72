//! Views of matrices in the memory of tensors.
//!
//! A view is a pointer and strides. libtorch would allocate a tensor for each slice, and the GEMM
//! of one expert needs three.

use std::marker::PhantomData;
use tch::{Kind, Tensor};

/// The output and inputs of one GEMM, `out = left right`.
pub(crate) struct GemmOperands<'a> {
    pub(crate) out: Matrix<'a>,
    pub(crate) left: Matrix<'a>,
    pub(crate) right: Matrix<'a>,
}

impl GemmOperands<'_> {
    pub(crate) fn of_tensors<'a>(
        out: &'a Tensor,
        left: &'a Tensor,
        right: &'a Tensor,
    ) -> GemmOperands<'a> {
        GemmOperands {
            out: Matrix::of(out),
            left: Matrix::of(left),
            right: Matrix::of(right),
        }
    }
}

/// A view of a matrix in host memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) data: *mut u8,
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Bytes from one row to the next, or the element size if there is one row.
    pub(crate) row_stride: usize,
    /// Bytes from one column to the next, or the element size if there is one column.
    pub(crate) column_stride: usize,
    tensor: PhantomData<&'a Tensor>,
}

impl<'a> Matrix<'a> {
    /// Returns a view of a tensor `[R, C]`.
    pub(crate) fn of(tensor: &'a Tensor) -> Matrix<'a> {
        let Ok([rows, columns]) = <[i64; 2]>::try_from(tensor.size()) else {
            panic!("not a matrix: shape {:?}", tensor.size())
        };
        let stride = tensor.stride();
        Matrix::at(
            tensor.data_ptr().cast(),
            tensor.kind(),
            [rows, columns],
            [stride[0], stride[1]],
        )
    }

    /// Returns views of the matrices of a tensor `[N, R, C]`.
    pub(crate) fn each_of(tensor: &'a Tensor) -> impl Iterator<Item = Matrix<'a>> {
        let Ok([count, rows, columns]) = <[i64; 3]>::try_from(tensor.size()) else {
            panic!("not a batch of matrices: shape {:?}", tensor.size())
        };
        let stride = tensor.stride();
        let kind = tensor.kind();
        let data = tensor.data_ptr().cast::<u8>();
        let matrix_stride = stride[0] as usize * kind.elt_size_in_bytes();
        (0..count as usize).map(move |index| {
            let data = data.wrapping_add(index * matrix_stride);
            Matrix::at(data, kind, [rows, columns], [stride[1], stride[2]])
        })
    }

    fn at(data: *mut u8, kind: Kind, sizes: [i64; 2], strides: [i64; 2]) -> Matrix<'a> {
        let [rows, columns] = sizes.map(|size| size as usize);
        let size = kind.elt_size_in_bytes();
        let bytes = |dim: usize| {
            if sizes[dim] == 1 {
                size
            } else {
                strides[dim] as usize * size
            }
        };
        Matrix {
            data,
            kind,
            rows,
            columns,
            row_stride: bytes(0),
            column_stride: bytes(1),
            tensor: PhantomData,
        }
    }

    pub(crate) fn slice_rows(self, start: usize, len: usize) -> Matrix<'a> {
        assert!(
            start + len <= self.rows,
            "{len} rows from {start} of a matrix with {} rows",
            self.rows
        );
        Matrix {
            data: self.data.wrapping_add(start * self.row_stride),
            rows: len,
            ..self
        }
    }

    pub(crate) fn slice_columns(self, start: usize, len: usize) -> Matrix<'a> {
        self.transposed().slice_rows(start, len).transposed()
    }

    pub(crate) fn transposed(self) -> Matrix<'a> {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Returns the bytes of an element.
    pub(crate) fn element_size(&self) -> usize {
        self.kind.elt_size_in_bytes()
    }

    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.column_stride == self.element_size()
    }

    pub(crate) fn has_contiguous_columns(&self) -> bool {
        self.row_stride == self.element_size()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tensors::{sizes, tests::randn};
    use proptest::prelude::*;
    use tch::kind::FLOAT_CPU;

    /// Returns a random matrix inside a larger one, so that its rows are not adjacent.
    pub(crate) fn random(rows: i64, columns: i64, transposed: bool, kind: Kind) -> Tensor {
        let (outer, inner) = if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let all = randn(&[outer + 3, inner + 3], kind);
        let slice = all.narrow(0, 1, outer).narrow(1, 2, inner);
        if transposed { slice.tr() } else { slice }
    }

    /// Returns the elements of an fp32 matrix, row by row.
    fn read(matrix: &Matrix) -> Vec<f32> {
        let mut elements = Vec::new();
        for row in 0..matrix.rows {
            for column in 0..matrix.columns {
                let offset = row * matrix.row_stride + column * matrix.column_stride;
                let at = matrix.data.wrapping_add(offset).cast::<f32>();
                // SAFETY: the address is inside the tensor, which this test checks.
                elements.push(unsafe { at.read() });
            }
        }
        elements
    }

    fn elements(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.contiguous().flatten(0, -1)).unwrap()
    }

    proptest! {
        #[test]
        fn slices_match_libtorch(
            count in 1i64..4,
            limits in [1i64..7, 1i64..7],
            starts in [0usize..7, 0usize..7],
            lens in [0usize..7, 0usize..7],
            transposed: bool,
        ) {
            let all = Tensor::arange(count * 6 * 6, FLOAT_CPU).view([count, 6, 6]);
            let all = all
                .narrow(1, 0, limits[0].min(6))
                .narrow(2, 0, limits[1].min(6));
            let all = if transposed { all.transpose(1, 2) } else { all };
            let [_, rows, columns] = sizes(&all);
            let sizes = [rows, columns];
            let starts = [0, 1].map(|dim| starts[dim].min(sizes[dim]));
            let lens = [0, 1].map(|dim| lens[dim].min(sizes[dim] - starts[dim]));
            for (index, matrix) in Matrix::each_of(&all).enumerate() {
                let plain = all.get(index as i64);
                prop_assert_eq!(read(&Matrix::of(&plain)), elements(&plain));
                let rows = matrix.slice_rows(starts[0], lens[0]);
                let slice = rows.slice_columns(starts[1], lens[1]);
                let narrow = |x: &Tensor, dim: usize| {
                    x.narrow(dim as i64, starts[dim] as i64, lens[dim] as i64)
                };
                let plain = narrow(&narrow(&plain, 0), 1);
                prop_assert_eq!(read(&slice.transposed()), elements(&plain.tr()));
            }
        }
    }
}
