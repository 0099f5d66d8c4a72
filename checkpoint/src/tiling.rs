//! The check that slices cover a tensor: every element is in exactly one of them.

use crate::slice::SliceEntry;
use std::collections::HashMap;

/// Dims of a tensor at most. The check visits each of a slice's `2^dims` corners.
const MAX_DIMS: usize = 8;

/// Slices of which an error looks for two that overlap.
const SEARCHED: usize = 256;

/// Returns the number of elements of a tensor, if it is one that memory could hold.
pub(crate) fn elements(shape: &[i64]) -> Option<i64> {
    let mut elements = 1i64;
    for &size in shape {
        elements = elements.checked_mul(size).filter(|_| size >= 0)?;
    }
    Some(elements)
}

/// Checks that `slices` cover a tensor of this shape exactly once.
///
/// # Errors
/// The reason why they do not, without the tensor's name.
pub(crate) fn check_tiling(shape: &[i64], slices: &[SliceEntry]) -> Result<(), String> {
    if shape.len() > MAX_DIMS {
        let dims = shape.len();
        return Err(format!("has {dims} dims, at most {MAX_DIMS} are possible"));
    }
    let whole = elements(shape).ok_or_else(|| format!("has the impossible shape {shape:?}"))?;
    if whole == 0 {
        let is_whole = |slice: &SliceEntry| slice.shape == shape && is_at_origin(slice);
        let fits = slices.len() <= 1 && slices.iter().all(is_whole);
        return fits
            .then_some(())
            .ok_or_else(|| format!("has slices, but no values in its shape {shape:?}"));
    }
    for slice in slices {
        check_inside(shape, slice)?;
    }
    if let [slice] = slices
        && slice.shape == shape
    {
        return Ok(());
    }
    if covers_once(shape, slices) {
        return Ok(());
    }
    Err(fault(whole, slices))
}

fn is_at_origin(slice: &SliceEntry) -> bool {
    slice.offset.len() == slice.shape.len() && slice.offset.iter().all(|&first| first == 0)
}

fn check_inside(shape: &[i64], slice: &SliceEntry) -> Result<(), String> {
    let SliceEntry {
        offset,
        shape: size,
        ..
    } = slice;
    let has_dims = offset.len() == shape.len() && size.len() == shape.len();
    let is_inside = |dim: usize| {
        let end = offset[dim].checked_add(size[dim]);
        offset[dim] >= 0 && size[dim] >= 1 && end.is_some_and(|end| end <= shape[dim])
    };
    if has_dims && (0..shape.len()).all(is_inside) {
        return Ok(());
    }
    Err(format!(
        "has a slice of shape {size:?} at {offset:?}, which is not inside its shape {shape:?}"
    ))
}

/// True if the indicator functions of the slices sum to that of the whole tensor.
///
/// Two such sums are equal if and only if their mixed differences are: each slice contributes 1 or
/// -1 at its corners, and what two neighbors contribute at a common corner cancels.
fn covers_once(shape: &[i64], slices: &[SliceEntry]) -> bool {
    let mut corners: HashMap<Vec<i64>, i64> = HashMap::new();
    let mut add = |offset: &[i64], size: &[i64], weight: i64| {
        for corner in 0..1usize << size.len() {
            let is_end = |dim: usize| corner >> dim & 1 == 1;
            let position = (0..size.len()).map(|dim| {
                let length = if is_end(dim) { size[dim] } else { 0 };
                offset[dim] + length
            });
            let sign = if corner.count_ones() % 2 == 0 { 1 } else { -1 };
            *corners.entry(position.collect()).or_insert(0) += sign * weight;
        }
    };
    add(&vec![0; shape.len()], shape, -1);
    for slice in slices {
        add(&slice.offset, &slice.shape, 1);
    }
    corners.values().all(|&sum| sum == 0)
}

/// Returns the reason why slices inside of a tensor of `whole` elements do not cover it once.
fn fault(whole: i64, slices: &[SliceEntry]) -> String {
    let searched = &slices[..slices.len().min(SEARCHED)];
    for (index, slice) in searched.iter().enumerate() {
        if let Some(other) = searched[..index].iter().find(|other| overlap(slice, other)) {
            return format!("is in two shards, {} and {}", other.file, slice.file);
        }
    }
    let sizes = slices
        .iter()
        .map(|slice| elements(&slice.shape).unwrap_or(0));
    let written: i128 = sizes.map(i128::from).sum();
    format!("is incomplete: {written} of {whole} values were written")
}

fn overlap(one: &SliceEntry, other: &SliceEntry) -> bool {
    (0..one.shape.len()).all(|dim| {
        let start = one.offset[dim].max(other.offset[dim]);
        let end = (one.offset[dim] + one.shape[dim]).min(other.offset[dim] + other.shape[dim]);
        start < end
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slice(offset: &[i64], shape: &[i64]) -> SliceEntry {
        SliceEntry {
            file: 0,
            offset: offset.to_vec(),
            shape: shape.to_vec(),
        }
    }

    /// Counts for each element the slices that hold it.
    fn counts_are_one(shape: &[i64], slices: &[SliceEntry]) -> bool {
        let positions = (0..shape[0]).flat_map(|row| (0..shape[1]).map(move |col| [row, col]));
        positions.into_iter().all(|position| {
            let holds = |slice: &&SliceEntry| {
                (0..2).all(|dim| {
                    let start = slice.offset[dim];
                    (start..start + slice.shape[dim]).contains(&position[dim])
                })
            };
            slices.iter().filter(holds).count() == 1
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn it_agrees_with_counting_every_element(
            rows in 1i64..5,
            cols in 1i64..5,
            cut in (0i64..5, 0i64..5),
            change in prop::option::of((0usize..4, 0usize..2, -1i64..2, any::<bool>())),
        ) {
            let mut slices = Vec::new();
            for (row, height) in [(0, cut.0.min(rows)), (cut.0.min(rows), rows)] {
                for (col, width) in [(0, cut.1.min(cols)), (cut.1.min(cols), cols)] {
                    if height > row && width > col {
                        slices.push(slice(&[row, col], &[height - row, width - col]));
                    }
                }
            }
            if let Some((index, dim, by, moves)) = change {
                let count = slices.len();
                let changed = &mut slices[index % count];
                let list = if moves { &mut changed.offset } else { &mut changed.shape };
                list[dim] += by;
            }
            let shape = [rows, cols];
            let is_inside = slices.iter().all(|slice| check_inside(&shape, slice).is_ok());
            let expected = is_inside && counts_are_one(&shape, &slices);
            prop_assert_eq!(check_tiling(&shape, &slices).is_ok(), expected);
        }
    }

    #[test]
    fn faults_are_described() {
        let check = |shape: &[i64], slices: &[SliceEntry]| check_tiling(shape, slices).unwrap_err();
        let half = slice(&[0, 0], &[1, 3]);
        assert!(check(&[2, 3], std::slice::from_ref(&half)).contains("3 of 6 values"));
        // The number of elements is right, but one row is there twice.
        let twice = [half.clone(), half];
        assert!(check(&[2, 3], &twice).contains("is in two shards, 0 and 0"));
        assert!(check(&[2], &[]).contains("0 of 2 values"));
        assert!(check(&[2], &[slice(&[-1], &[2])]).contains("not inside"));
        assert!(check(&[2], &[slice(&[0], &[-2])]).contains("not inside"));
        assert!(check(&[2], &[slice(&[0, 0], &[2, 1])]).contains("not inside"));
        assert!(check(&[2], &[slice(&[i64::MAX], &[2])]).contains("not inside"));
        assert!(check(&[-2], &[]).contains("impossible shape"));
        assert!(check(&[i64::MAX, 2], &[]).contains("impossible shape"));
        assert!(check(&[1; 60], &[]).contains("60 dims"));
        assert_eq!(check_tiling(&[], &[slice(&[], &[])]), Ok(()));
        assert!(check(&[], &[slice(&[], &[]), slice(&[], &[])]).contains("two shards"));
        assert_eq!(check_tiling(&[0, 3], &[slice(&[0, 0], &[0, 3])]), Ok(()));
        assert!(check(&[0, 3], &[slice(&[0, 0], &[1, 3])]).contains("no values"));
    }
}
