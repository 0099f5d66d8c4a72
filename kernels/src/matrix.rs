//! Matrices in the memory of tensors. Parts of them are numbers, where libtorch makes a tensor of each: an expert's rows and weights
//! are three for each product.

use std::marker::PhantomData;
use tch::{Kind, Tensor};

/// A matrix whose tensor is in host memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) data: *mut u8,
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Bytes from one row to the next; from one number to the next where there is one row.
    pub(crate) row: usize,
    /// Bytes from one column to the next; from one number to the next where there is one column.
    pub(crate) column: usize,
    tensor: PhantomData<&'a Tensor>,
}

impl<'a> Matrix<'a> {
    /// Of a tensor `[R, C]`.
    pub(crate) fn of(tensor: &'a Tensor) -> Matrix<'a> {
        let Ok([rows, columns]) = <[i64; 2]>::try_from(tensor.size()) else {
            panic!("{:?} is no matrix", tensor.size())
        };
        let stride = tensor.stride();
        Matrix::at(
            tensor.data_ptr().cast(),
            tensor.kind(),
            [rows, columns],
            [stride[0], stride[1]],
        )
    }

    /// Those of a tensor `[N, R, C]`.
    pub(crate) fn each_of(tensor: &'a Tensor) -> impl Iterator<Item = Matrix<'a>> {
        let Ok([count, rows, columns]) = <[i64; 3]>::try_from(tensor.size()) else {
            panic!("{:?} are no matrices", tensor.size())
        };
        let stride = tensor.stride();
        let kind = tensor.kind();
        let data = tensor.data_ptr().cast::<u8>();
        let apart = stride[0] as usize * kind.elt_size_in_bytes();
        (0..count as usize).map(move |index| {
            let data = data.wrapping_add(index * apart);
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
            row: bytes(0),
            column: bytes(1),
            tensor: PhantomData,
        }
    }

    /// `len` rows from `start` on.
    pub(crate) fn slice_rows(self, start: usize, len: usize) -> Matrix<'a> {
        assert!(
            start + len <= self.rows,
            "{start} and {len} of {} rows",
            self.rows
        );
        Matrix {
            data: self.data.wrapping_add(start * self.row),
            rows: len,
            ..self
        }
    }

    /// `len` columns from `start` on.
    pub(crate) fn slice_columns(self, start: usize, len: usize) -> Matrix<'a> {
        self.transposed().slice_rows(start, len).transposed()
    }

    pub(crate) fn transposed(self) -> Matrix<'a> {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row: self.column,
            column: self.row,
            ..self
        }
    }

    /// Bytes of a number.
    pub(crate) fn size(&self) -> usize {
        self.kind.elt_size_in_bytes()
    }

    /// Whether the numbers of a row lie beside each other.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.column == self.size()
    }

    /// Whether those of a column do.
    pub(crate) fn has_contiguous_columns(&self) -> bool {
        self.row == self.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    /// The numbers of an fp32 matrix, row by row.
    fn read(matrix: &Matrix) -> Vec<f32> {
        let at = |row: usize, column: usize| {
            let at = matrix
                .data
                .wrapping_add(row * matrix.row + column * matrix.column);
            // SAFETY: inside the tensor, which is what is tested.
            unsafe { at.cast::<f32>().read() }
        };
        (0..matrix.rows)
            .flat_map(|row| (0..matrix.columns).map(move |column| at(row, column)))
            .collect()
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.contiguous().flatten(0, -1)).unwrap()
    }

    proptest! {
        #[test]
        fn parts_are_those_of_libtorch(
            (count, rows, columns) in (1i64..4, 1i64..7, 1i64..7), from in (0usize..7, 0usize..7), len in (0usize..7, 0usize..7),
            turned: bool,
        ) {
            let all = Tensor::arange(count * 6 * 6, (Kind::Float, Device::Cpu)).view([count, 6, 6]);
            let all = all.narrow(1, 0, rows.min(6)).narrow(2, 0, columns.min(6));
            let all = if turned { all.transpose(1, 2) } else { all };
            let size = all.size();
            let some = |dim: usize, from: usize, len: usize| {
                let from = from.min(size[dim] as usize);
                (from, len.min(size[dim] as usize - from))
            };
            let (rows, columns) = (some(1, from.0, len.0), some(2, from.1, len.1));
            for (index, matrix) in Matrix::each_of(&all).enumerate() {
                let plain = all.get(index as i64);
                prop_assert_eq!(read(&Matrix::of(&plain)), numbers(&plain));
                let part = matrix.slice_rows(rows.0, rows.1).slice_columns(columns.0, columns.1).transposed();
                let plain = plain.narrow(0, rows.0 as i64, rows.1 as i64).narrow(1, columns.0 as i64, columns.1 as i64);
                prop_assert_eq!(read(&part), numbers(&plain.tr()));
            }
        }
    }
}
