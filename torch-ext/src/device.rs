//! The state that libtorch keeps per device: random generators, allocators, queued work.

use crate::{Error, ffi};
use std::{ffi::c_int, sync::OnceLock};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

/// Returns c10's number of the device type and the index, which is -1 for a type with one device.
fn code(device: Device) -> (c_int, c_int) {
    match device {
        Device::Cpu => (0, -1),
        Device::Cuda(index) => (1, index as c_int),
        // tch reads the NPU's PrivateUse1 as MPS.
        Device::Mps => (20, crate::npu::npu_index().unwrap_or(0)),
        Device::Vulkan => (10, 0),
    }
}

/// Returns the state of the device's default random generator, `[bytes]` uint8 on the CPU.
///
/// # Errors
/// libtorch's message if the device does not exist.
pub fn generator_state(device: Device) -> Result<Tensor, Error> {
    let (kind, index) = code(device);
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `out` receives a new tensor that we own.
    unsafe {
        ffi::check(ffi::mtx_generator_state(kind, index, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Restores a state that [`generator_state`] returned.
///
/// # Errors
/// libtorch's message if the state is not that of such a device.
pub fn set_generator_state(device: Device, state: &Tensor) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: `state` is a live tensor.
    ffi::check(unsafe {
        ffi::mtx_set_generator_state(kind, index, state.as_ptr() as *mut C_tensor)
    })
}

/// Allocates page-locked host memory, `[bytes]` uint8, for direct copies by the GPU or NPU.
///
/// # Errors
/// If the process has no such device, or memory is exhausted.
pub fn pinned(bytes: i64) -> Result<Tensor, Error> {
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `out` receives a new tensor that we own.
    unsafe {
        ffi::check(ffi::mtx_pinned(bytes, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Makes the device the current one of the calling thread. Nothing to do on the CPU.
///
/// Every thread that touches a device's tensors, streams or events calls this first. CUDA takes GPU
/// 0 for the device of other threads: their calls would create a context there, which takes half a
/// gigabyte of its memory for each process.
///
/// # Errors
/// libtorch's message if the device does not exist.
pub fn use_device(device: Device) -> Result<(), Error> {
    if device == Device::Cpu {
        return Ok(());
    }
    let (kind, index) = code(device);
    // SAFETY: the arguments are integers.
    ffi::check(unsafe { ffi::mtx_use_device(kind, index) })
}

/// Waits for all work that is queued on the device.
///
/// # Errors
/// libtorch's message, which may be that of an earlier asynchronous failure.
pub fn synchronize(device: Device) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: the arguments are integers.
    ffi::check(unsafe { ffi::mtx_synchronize(kind, index) })
}

/// Starts counting the host memory of tensors. Tensors that already exist are not counted.
///
/// # Errors
/// libtorch's message.
pub fn count_host_memory() -> Result<(), Error> {
    static ONCE: OnceLock<Result<(), Error>> = OnceLock::new();
    // SAFETY: installs an allocator that lives as long as the process.
    ONCE.get_or_init(|| ffi::check(unsafe { ffi::mtx_count_host_memory() }))
        .clone()
}

/// Returns the current and peak bytes of tensors on the device.
///
/// The device's caching allocator counts them. On the CPU, counting starts with
/// [`count_host_memory`].
///
/// # Errors
/// If the device does not exist.
pub fn allocator_bytes(device: Device) -> Result<(i64, i64), Error> {
    let (kind, index) = code(device);
    let mut current = 0;
    let mut peak = 0;
    // SAFETY: the pointers are out-parameters that live through the call.
    ffi::check(unsafe { ffi::mtx_allocator_bytes(kind, index, &mut current, &mut peak) })?;
    Ok((current, peak))
}

/// Resets the peak of [`allocator_bytes`] to the current bytes.
///
/// # Errors
/// If the device does not exist.
pub fn reset_peak(device: Device) -> Result<(), Error> {
    let (kind, index) = code(device);
    // SAFETY: the arguments are integers.
    ffi::check(unsafe { ffi::mtx_reset_peak(kind, index) })
}

/// Makes glibc keep freed host memory in the process for the next tensor.
///
/// By default glibc returns every large buffer to the kernel, which clears the pages again in the
/// next step. That takes a third of a bf16 step on a CPU.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        // Constants of malloc.h: the number of requests that mmap serves, and the free memory at
        // the top of the heap from which the heap shrinks.
        const M_MMAP_MAX: c_int = -4;
        const M_TRIM_THRESHOLD: c_int = -1;
        // SAFETY: the arguments are integers, and only later allocations are affected.
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
        // Other tests hold small tensors at the same time.
        let grown = during - before;
        assert!((grown - (16 << 20)).abs() < 1 << 20, "{before} {during}");
        assert!(peak >= during, "{during} {peak}");
        drop(tensor);
        reset_peak(Device::Cpu).unwrap();
        let (after, peak) = allocator_bytes(Device::Cpu).unwrap();
        assert!((after - before).abs() < 1 << 20, "{before} {after}");
        assert!((peak - after).abs() < 1 << 20, "{peak} {after}");
    }

    #[test]
    fn an_invalid_generator_state_is_an_error() {
        assert!(set_generator_state(Device::Cpu, &Tensor::from_slice(&[1u8, 2])).is_err());
    }
}
