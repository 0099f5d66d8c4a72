//! Reductions of 16-bit floating-point numbers, whose types MPI does not have.

use super::{check, ffi};
use half::{bf16, f16};
use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
};

/// A sum, a minimum and a maximum for each type, in this order.
pub(super) struct Reductions {
    pub(super) bf16: [ffi::MPI_Op; 3],
    pub(super) f16: [ffi::MPI_Op; 3],
}

impl Reductions {
    pub(super) fn create() -> Result<Reductions, String> {
        Ok(Reductions {
            bf16: [
                register(sum::<bf16>)?,
                register(min::<bf16>)?,
                register(max::<bf16>)?,
            ],
            f16: [
                register(sum::<f16>)?,
                register(min::<f16>)?,
                register(max::<f16>)?,
            ],
        })
    }
}

type Combine = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_int, *mut ffi::MPI_Datatype);

fn register(combine: Combine) -> Result<ffi::MPI_Op, String> {
    let mut op = MaybeUninit::uninit();
    // SAFETY: the function has MPI's signature and lives as long as the program.
    unsafe {
        check(ffi::MPI_Op_create(Some(combine), 1, op.as_mut_ptr()))?;
        Ok(op.assume_init())
    }
}

/// A 16-bit number that is combined as fp32 and rounded once.
trait HalfPrecision: Copy {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl HalfPrecision for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

impl HalfPrecision for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> f16 {
        f16::from_f32(value)
    }
}

/// # Safety
/// `from` and `into` are arrays of `length` numbers.
unsafe fn combine<T: HalfPrecision>(
    from: *mut c_void,
    into: *mut c_void,
    length: *mut c_int,
    with: fn(f32, f32) -> f32,
) {
    // SAFETY: as the caller promises.
    let length = unsafe { *length } as usize;
    // SAFETY: as above.
    let from = unsafe { std::slice::from_raw_parts(from.cast::<T>(), length) };
    // SAFETY: as above.
    let into = unsafe { std::slice::from_raw_parts_mut(into.cast::<T>(), length) };
    for (into, from) in into.iter_mut().zip(from) {
        *into = T::narrow(with(into.widen(), from.widen()));
    }
}

unsafe extern "C" fn sum<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes two arrays of this length.
    unsafe { combine::<T>(a, b, n, |x, y| x + y) }
}

unsafe extern "C" fn min<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes two arrays of this length.
    unsafe { combine::<T>(a, b, n, f32::min) }
}

unsafe extern "C" fn max<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes two arrays of this length.
    unsafe { combine::<T>(a, b, n, f32::max) }
}
