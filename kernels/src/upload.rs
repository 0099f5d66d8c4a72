//! Copies of numbers to a device for which the host does not wait.

use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Copies lists of int32 numbers to a device in one copy; returns a tensor for each.
///
/// The copy is queued from page-locked memory on the current stream, so that neither the host nor
/// the device waits. The tensors share their memory.
///
/// # Errors
/// If there is no page-locked memory.
pub fn upload(lists: &[&[i32]], device: Device) -> Result<Vec<Tensor>, Error> {
    if device == Device::Cpu {
        return Ok(lists.iter().map(|list| Tensor::from_slice(list)).collect());
    }
    let total: usize = lists.iter().map(|list| list.len()).sum();
    let pinned = torch_ext::pinned((total * size_of::<i32>()) as i64)?.view_dtype(Kind::Int);
    let mut start = 0;
    for list in lists {
        assert!(
            start + list.len() <= pinned.numel(),
            "the lists fit the buffer"
        );
        // SAFETY: the buffer was allocated for all lists, and no other reference to it exists yet.
        unsafe {
            let data = pinned.data_ptr().cast::<i32>().add(start);
            std::ptr::copy_nonoverlapping(list.as_ptr(), data, list.len());
        }
        start += list.len();
    }
    // libtorch reuses the page-locked memory only after the copy.
    let there = pinned.to_device_(device, Kind::Int, true, false);
    let mut start = 0;
    let parts = lists.iter().map(|list| {
        let part = there.narrow(0, start, list.len() as i64);
        start += list.len() as i64;
        part
    });
    Ok(parts.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::test_gpu;

    #[test]
    fn each_list_arrives() {
        let lists: [&[i32]; 3] = [&[1, -2], &[], &[3, 4, 5]];
        let tensors = upload(&lists, test_gpu().1).unwrap();
        let back = |tensor: &Tensor| Vec::<i32>::try_from(tensor.to_device(Device::Cpu)).unwrap();
        assert_eq!(tensors.len(), lists.len());
        for (tensor, list) in tensors.iter().zip(lists) {
            assert_eq!(back(tensor), list);
        }
        assert!(upload(&[&[]], test_gpu().1).unwrap()[0].size() == [0]);
    }
}
