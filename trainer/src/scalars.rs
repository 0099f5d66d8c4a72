//! Copies of scalars to host memory. The host waits for a device once, for all of them.

use crate::Error;
use tch::{Kind, Tensor};

/// Copies the scalars of all lists to host memory in one copy. They are on one device, and those of
/// a list have one dtype.
///
/// # Errors
/// If earlier work on the device failed.
pub(crate) fn fetch_scalars<const LISTS: usize>(
    lists: [&[Tensor]; LISTS],
) -> Result<[Vec<f64>; LISTS], Error> {
    let filled = lists.iter().filter(|list| !list.is_empty());
    let widened = filled.map(|list| Tensor::f_stack(list, 0)?.f_to_kind(Kind::Double));
    let widened = widened.collect::<Result<Vec<_>, _>>()?;
    let mut fetched = Vec::new();
    if !widened.is_empty() {
        fetched = Vec::<f64>::try_from(Tensor::f_cat(&widened, 0)?)?;
    }
    let mut fetched = fetched.into_iter();
    Ok(lists.map(|list| fetched.by_ref().take(list.len()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_list_gets_its_own_values() {
        let third = 1.0f32 / 3.0;
        let single = [Tensor::from(third), Tensor::from(f32::MIN_POSITIVE)];
        let double = [Tensor::from(1.0f64 / 3.0)];
        let fetched = fetch_scalars([&single, &[], &double]).unwrap();
        let expected = [
            vec![f64::from(third), f64::from(f32::MIN_POSITIVE)],
            vec![],
            vec![1.0 / 3.0],
        ];
        assert_eq!(fetched, expected);
        let [first, second] = fetch_scalars([&[], &[]]).unwrap();
        assert!(first.is_empty() && second.is_empty());
    }
}
