//! Per-device state that libtorch keeps: random generators, allocators, queued work.

use crate::{Error, ffi};
use std::ffi::c_int;
use std::sync::OnceLock;
use tch::{Device, Tensor};
use torch_sys::C_tensor;

/// c10's number of the device type, and the index (-1 where there is only one).
fn code(device: Device) -> (c_int, c_int) {
    match device {
        Device::Cpu => (0, -1),
        Device::Cuda(index) => (1, index as c_int),
        // How tch reads the NPU's PrivateUse1.
        Device::Mps => (20, crate::npu::npu_index().unwrap_or(0)),
        Device::Vulkan => (10, 0),
    }
}

/// The state of the device's default random generator: a `[bytes]` uint8 tensor on the CPU.
///
/// # Errors
/// libtorch's message, when the device is not there.
pub fn generator_state(device: Device) -> Result<Tensor, Error> {
    let (kind, index) = code(device);
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `out` receives a new tensor that we own.
    unsafe {
        ffi::check(ffi::mtx_generator_state(kind, index, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Puts back what [`generator_state`] gave.
///
/// # Errors
/// libtorch's message, when the state does not belong to such a device.
pub fn set_generator_state(device: Device, state: &Tensor) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: `state` is a live tensor.
    ffi::check(unsafe {
        ffi::mtx_set_generator_state(kind, index, state.as_ptr() as *mut C_tensor)
    })
}

/// Host memory of a fixed place, `[bytes]` uint8, from and to which the process's GPU or NPU copies by itself.
///
/// # Errors
/// Where there is no such device, or no memory.
pub fn pinned(bytes: i64) -> Result<Tensor, Error> {
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `out` receives a new tensor that we own.
    unsafe {
        ffi::check(ffi::mtx_pinned(bytes, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Waits until all work queued on the device is done.
///
/// # Errors
/// libtorch's message, an earlier asynchronous failure included.
pub fn synchronize(device: Device) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: plain numbers.
    ffi::check(unsafe { ffi::mtx_synchronize(kind, index) })
}

/// Counts host memory of tensors from here on; those that exist already stay out of the count.
///
/// # Errors
/// libtorch's message.
pub fn count_host_memory() -> Result<(), Error> {
    static ONCE: OnceLock<Result<(), Error>> = OnceLock::new();
    // SAFETY: installs an allocator that lives as long as the process.
    ONCE.get_or_init(|| ffi::check(unsafe { ffi::mtx_count_host_memory() }))
        .clone()
}

/// Bytes that tensors hold on the device now, and held at most: by its caching allocator, on the CPU as counted since
/// [`count_host_memory`].
///
/// # Errors
/// Where the device is not there.
pub fn allocator_bytes(device: Device) -> Result<(i64, i64), Error> {
    let (kind, index) = code(device);
    let mut current = 0;
    let mut peak = 0;
    // SAFETY: two out-parameters that live through the call.
    ffi::check(unsafe { ffi::mtx_allocator_bytes(kind, index, &mut current, &mut peak) })?;
    Ok((current, peak))
}

/// Counts what is held at most anew from here.
///
/// # Errors
/// Where the device is not there.
pub fn reset_peak(device: Device) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: plain numbers.
    ffi::check(unsafe { ffi::mtx_reset_peak(kind, index) })
}

/// Keeps freed host memory in the process for the next tensor. By default glibc gives every large buffer back to the
/// kernel, which then clears its pages again at the next step: a third of a bf16 step on a CPU.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        // From malloc.h: requests served by mmap, and the free memory at the top of the heap that is given back.
        const M_MMAP_MAX: c_int = -4;
        const M_TRIM_THRESHOLD: c_int = -1;
        // SAFETY: plain numbers; the calls change where later allocations come from.
        unsafe {
            ffi::mallopt(M_MMAP_MAX, 0);
            ffi::mallopt(M_TRIM_THRESHOLD, -1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_restored_generator_draws_the_same_numbers() {
        let state = generator_state(Device::Cpu).unwrap();
        let draw = || Vec::<f32>::try_from(Tensor::rand([8], (Kind::Float, Device::Cpu))).unwrap();
        let first = draw();
        assert_ne!(first, draw());
        set_generator_state(Device::Cpu, &state).unwrap();
        assert_eq!(first, draw());
    }

    #[test]
    fn host_memory_is_counted_while_tensors_hold_it() {
        count_host_memory().unwrap();
        let before = allocator_bytes(Device::Cpu).unwrap().0;
        let tensor = Tensor::zeros([1 << 22], (Kind::Float, Device::Cpu));
        let (during, peak) = allocator_bytes(Device::Cpu).unwrap();
        // Other tests have small tensors at the same time.
        assert!(
            (during - before - (16 << 20)).abs() < 1 << 20 && peak >= during,
            "{before} {during} {peak}"
        );
        drop(tensor);
        reset_peak(Device::Cpu).unwrap();
        let (after, peak) = allocator_bytes(Device::Cpu).unwrap();
        assert!((after - before).abs() < 1 << 20, "{before} {after}");
        assert!((peak - after).abs() < 1 << 20, "{peak} {after}");
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        assert!(set_generator_state(Device::Cpu, &Tensor::from_slice(&[1u8, 2])).is_err());
    }
}
