//! Biases of groups of rows: each row has the vector of its group added.
// Shapes: R rows, E groups, N width.

use crate::{RowGroups, add_rows::add_rows, tensors::FIRST_DIM};
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Adds to each of `rows` `[R, N]` the vector of its group, of `biases` `[E, N]`.
///
/// # Errors
/// If the groups cannot be copied to the device.
pub fn add_group_bias(rows: &Tensor, biases: &Tensor, groups: &RowGroups) -> Result<(), Error> {
    if rows.device() == Device::Cpu {
        for (group, mut own) in row_ranges(rows, groups) {
            let bias = biases.get(group);
            let _ = own.g_add_(&bias);
        }
        return Ok(());
    }
    let group_of_row = group_of_rows(rows, groups)?;
    let of_rows = biases.index_select(0, &group_of_row);
    let _ = rows.shallow_clone().g_add_(&of_rows);
    Ok(())
}

/// Adds the sum of each group's `rows` `[R, N]` to its row of `sums` `[E, N]` fp32: the gradient of
/// [`add_group_bias`].
///
/// # Errors
/// If the groups cannot be copied to the device.
pub fn sum_groups(sums: &Tensor, rows: &Tensor, groups: &RowGroups) -> Result<(), Error> {
    if rows.device() == Device::Cpu {
        for (group, own) in row_ranges(rows, groups) {
            let rows_summed = own.sum_dim_intlist(FIRST_DIM, false, Kind::Float);
            let mut sum = sums.get(group);
            let _ = sum.g_add_(&rows_summed);
        }
        return Ok(());
    }
    let group_of_row = group_of_rows(rows, groups)?;
    add_rows(sums, &group_of_row, &rows.contiguous());
    Ok(())
}

/// Returns each group that has rows, with them.
fn row_ranges(rows: &Tensor, groups: &RowGroups) -> Vec<(i64, Tensor)> {
    let mut ranges = Vec::new();
    let mut start = 0;
    for (group, &len) in groups.counts().iter().enumerate() {
        if len > 0 {
            ranges.push((group as i64, rows.narrow(0, start, len)));
        }
        start += len;
    }
    ranges
}

/// Returns the group of each row, int64 `[R]`, without waiting for a device.
fn group_of_rows(rows: &Tensor, groups: &RowGroups) -> Result<Tensor, Error> {
    let ends = groups.ends(rows.device())?;
    let index = Tensor::arange(groups.num_rows(), (Kind::Int, rows.device()));
    Ok(index.bucketize(&ends, false, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_the_bias_of_its_group() {
        let groups = RowGroups::new(vec![2, 0, 1]);
        let biases = Tensor::from_slice(&[1f32, 2., 10., 20., 100., 200.]).view([3, 2]);
        let rows = Tensor::from_slice(&[0f32, 0., 1., 1., 2., 2.]).view([3, 2]);
        add_group_bias(&rows, &biases, &groups).unwrap();
        let expected = Tensor::from_slice(&[1f32, 2., 2., 3., 102., 202.]).view([3, 2]);
        assert_eq!(rows, expected);
        let sums = Tensor::ones([3, 2], (Kind::Float, Device::Cpu));
        sum_groups(&sums, &rows, &groups).unwrap();
        let expected = Tensor::from_slice(&[4f32, 6., 1., 1., 103., 203.]).view([3, 2]);
        assert_eq!(sums, expected);
    }

    #[test]
    fn columns_of_a_matrix_take_a_bias() {
        let groups = RowGroups::new(vec![1, 1]);
        let matrix = Tensor::zeros([2, 3], (Kind::BFloat16, Device::Cpu));
        let biases = Tensor::from_slice(&[1f32, 2.]).view([2, 1]);
        let column = matrix.narrow(1, 1, 1);
        add_group_bias(&column, &biases.to_kind(Kind::BFloat16), &groups).unwrap();
        let expected = Tensor::from_slice(&[0f32, 1., 0., 0., 2., 0.]).view([2, 3]);
        assert_eq!(matrix.to_kind(Kind::Float), expected);
    }

    #[test]
    fn the_group_of_each_row_is_known_without_counts() {
        let rows = Tensor::zeros([5, 1], (Kind::Float, Device::Cpu));
        let found = group_of_rows(&rows, &RowGroups::new(vec![0, 2, 0, 3, 0])).unwrap();
        assert_eq!(found, Tensor::from_slice(&[1i64, 1, 3, 3, 3]));
    }
}
