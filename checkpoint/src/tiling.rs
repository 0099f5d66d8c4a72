//! The check that slices cover a tensor: every element is in exactly one of them.

use crate::slice::SliceEntry;

/// Dims of a tensor at most. The check visits each of a slice's `2^dims` corners.
const MAX_DIMS: usize = 8;

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
    match first_fault(shape, slices) {
        None => Ok(()),
        Some(fault) => Err(describe(&fault, whole, slices)),
    }
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

/// The first element, in the order of its index, that is not in exactly one slice.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    position: Vec<i64>,
    /// True if it is in no slice, false if it is in several.
    is_missing: bool,
}

/// Returns the first fault of slices inside of a tensor of this shape. Takes time in proportion to
/// the slices, but for sorting.
///
/// The indicator functions of the slices must sum to that of the tensor. Two such sums are equal if
/// and only if their mixed differences are: each slice contributes 1 or -1 at its corners, and
/// contributions of neighbors at a common corner cancel. A sum over all corners up to an element
/// counts the slices that hold it, so the first corner that does not cancel is the first fault.
fn first_fault(shape: &[i64], slices: &[SliceEntry]) -> Option<Fault> {
    // In the other dims, all corners are at the same two positions and cancel alike.
    let is_split = |&dim: &usize| slices.iter().any(|slice| slice.shape[dim] != shape[dim]);
    let dims: Vec<usize> = (0..shape.len()).filter(is_split).collect();
    let mut corners: Vec<(u128, i64)> = Vec::with_capacity((slices.len() + 1) << dims.len());
    let mut add = |offset: &[i64], size: &[i64], weight: i64| {
        for corner in 0..1usize << dims.len() {
            let is_end = |bit: usize| corner >> bit & 1 == 1;
            let key = dims.iter().enumerate().fold(0u128, |key, (bit, &dim)| {
                let length = if is_end(bit) { size[dim] } else { 0 };
                key * (shape[dim] as u128 + 1) + (offset[dim] + length) as u128
            });
            let sign = if corner.count_ones() % 2 == 0 { 1 } else { -1 };
            corners.push((key, sign * weight));
        }
    };
    add(&vec![0; shape.len()], shape, -1);
    for slice in slices {
        add(&slice.offset, &slice.shape, 1);
    }
    corners.sort_unstable_by_key(|(key, _)| *key);
    let mut sums = corners
        .chunk_by(|(key, _), (next, _)| key == next)
        .map(|corner| {
            (
                corner[0].0,
                corner.iter().map(|(_, sign)| sign).sum::<i64>(),
            )
        });
    let (mut key, sum) = sums.find(|(_, sum)| *sum != 0)?;
    let mut position = vec![0; shape.len()];
    for &dim in dims.iter().rev() {
        let len = shape[dim] as u128 + 1;
        position[dim] = (key % len) as i64;
        key /= len;
    }
    Some(Fault {
        position,
        is_missing: sum < 0,
    })
}

/// Says why slices inside of a tensor of `whole` elements do not cover it once.
fn describe(fault: &Fault, whole: i64, slices: &[SliceEntry]) -> String {
    let Fault {
        position,
        is_missing,
    } = fault;
    if *is_missing {
        let sizes = slices.iter().map(|slice| elements(&slice.shape));
        let written: i128 = sizes.map(|size| i128::from(size.unwrap_or(0))).sum();
        return format!(
            "is incomplete: {written} of {whole} values were written, and none at {position:?}"
        );
    }
    let holders = slices.iter().filter(|slice| holds(slice, position));
    let files: Vec<String> = holders
        .take(2)
        .map(|slice| slice.file.to_string())
        .collect();
    format!("is in two shards, {}", files.join(" and "))
}

fn holds(slice: &SliceEntry, position: &[i64]) -> bool {
    position.iter().enumerate().all(|(dim, &index)| {
        let start = slice.offset[dim];
        (start..start + slice.shape[dim]).contains(&index)
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

    /// Finds the first element that is not in one slice, by looking at every element.
    fn fault_by_counting(shape: &[i64], slices: &[SliceEntry]) -> Option<String> {
        let whole = elements(shape).unwrap();
        (0..whole).find_map(|index| {
            let mut rest = index;
            let mut position = vec![0; shape.len()];
            for dim in (0..shape.len()).rev() {
                position[dim] = rest % shape[dim];
                rest /= shape[dim];
            }
            let holders = slices.iter().filter(|slice| {
                (0..shape.len()).all(|dim| {
                    let inside = position[dim] - slice.offset[dim];
                    0 <= inside && inside < slice.shape[dim]
                })
            });
            let files: Vec<usize> = holders.map(|slice| slice.file).collect();
            match files[..] {
                [_] => None,
                [] => {
                    let sizes = slices
                        .iter()
                        .map(|slice| slice.shape.iter().product::<i64>());
                    let written: i64 = sizes.sum();
                    Some(format!(
                        "is incomplete: {written} of {whole} values were written, and none at \
                         {position:?}"
                    ))
                }
                [first, second, ..] => Some(format!("is in two shards, {first} and {second}")),
            }
        })
    }

    /// Cuts a box into boxes, as ranks do that split a tensor in several ways.
    fn cut(offset: Vec<i64>, shape: Vec<i64>, cuts: &[(usize, i64)]) -> Vec<SliceEntry> {
        let Some((&(dim, at), cuts)) = cuts.split_first() else {
            return vec![slice(&offset, &shape)];
        };
        let dim = dim % shape.len();
        if shape[dim] < 2 {
            return cut(offset, shape, cuts);
        }
        let at = 1 + at % (shape[dim] - 1);
        let mut first = shape.clone();
        first[dim] = at;
        let mut second_offset = offset.clone();
        second_offset[dim] += at;
        let mut second = shape;
        second[dim] -= at;
        let (left, right) = cuts.split_at(cuts.len() / 2);
        let mut slices = cut(offset, first, left);
        slices.extend(cut(second_offset, second, right));
        slices
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn it_agrees_with_counting_every_element(
            shape in prop::collection::vec(1i64..6, 1..4),
            cuts in prop::collection::vec((0usize..3, 0i64..6), 0..12),
            copies in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            holes in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            moves in prop::collection::vec(
                (any::<prop::sample::Index>(), 0usize..3, -1i64..2, any::<bool>()),
                0..3,
            ),
            faults in 0usize..4,
            order in any::<u64>(),
        ) {
            let mut slices = cut(vec![0; shape.len()], shape.clone(), &cuts);
            if faults & 1 == 1 {
                for copy in copies {
                    slices.push(slices[copy.index(slices.len())].clone());
                }
                for hole in holes {
                    if !slices.is_empty() {
                        slices.remove(hole.index(slices.len()));
                    }
                }
            }
            if faults & 2 == 2 {
                for (moved, dim, by, is_offset) in moves {
                    if slices.is_empty() {
                        break;
                    }
                    let index = moved.index(slices.len());
                    let changed = &mut slices[index];
                    let list = if is_offset { &mut changed.offset } else { &mut changed.shape };
                    list[dim % shape.len()] += by;
                }
            }
            slices.sort_by_key(|slice| {
                let numbers = slice.offset.iter().chain(&slice.shape);
                numbers.fold(order, |key, &n| (key ^ n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            });
            for (file, slice) in slices.iter_mut().enumerate() {
                slice.file = file;
            }
            let outside = slices.iter().find_map(|slice| check_inside(&shape, slice).err());
            let expected = outside.or_else(|| fault_by_counting(&shape, &slices));
            prop_assert_eq!(check_tiling(&shape, &slices).err(), expected);
        }
    }

    /// A check of each pair of slices would compare them five billion times.
    #[test]
    fn a_fault_among_a_hundred_thousand_slices_is_found() {
        let shape = [400, 250];
        let mut slices: Vec<SliceEntry> = (0..400 * 250)
            .map(|index| slice(&[index / 250, index % 250], &[1, 1]))
            .collect();
        slices.reverse();
        for (file, slice) in slices.iter_mut().enumerate() {
            slice.file = file;
        }
        assert_eq!(check_tiling(&shape, &slices), Ok(()));
        let mut overlapping = slices.clone();
        overlapping[70].offset = vec![9, 9];
        let at = slices
            .iter()
            .position(|slice| slice.offset == [9, 9])
            .unwrap();
        let expected = format!("is in two shards, 70 and {at}");
        assert_eq!(check_tiling(&shape, &overlapping), Err(expected));
        slices.remove(at);
        let expected = "is incomplete: 99999 of 100000 values were written, and none at [9, 9]";
        assert_eq!(check_tiling(&shape, &slices), Err(expected.to_string()));
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
