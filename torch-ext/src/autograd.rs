//! Custom autograd nodes.

use crate::{Error, ffi};
use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;
use torch_sys::C_tensor;

type BackwardClosure =
    Box<dyn FnMut(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Error> + Send>;

/// Makes `outputs`, computed from `inputs` outside of autograd, part of the graph: their gradients are handed
/// to `backward`, which returns one gradient (or none) for each input.
///
/// Where gradients are off or no input requires one, `outputs` come back untouched and `backward` is dropped.
/// The closure and the tensors it owns are freed with the graph. It is `Send` because on a GPU the backward
/// runs on another thread. `outputs` must be floating point and must not require grad already.
///
/// # Errors
/// libtorch's message, when the outputs cannot be given a history.
pub fn attach_backward<F>(
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    backward: F,
) -> Result<Vec<Tensor>, Error>
where
    F: FnMut(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Error> + Send + 'static,
{
    // SAFETY: reads a thread-local flag.
    let tracked = unsafe { ffi::mtx_grad_enabled() } && inputs.iter().any(|t| t.requires_grad());
    if !tracked {
        return Ok(outputs);
    }
    let closure: Box<BackwardClosure> = Box::new(Box::new(backward));
    let inputs: Vec<_> = inputs.iter().map(|t| t.as_ptr() as *mut C_tensor).collect();
    let pointers: Vec<_> = outputs
        .iter()
        .map(|t| t.as_ptr() as *mut C_tensor)
        .collect();
    // SAFETY: all pointers are live tensors for the duration of the call; the node takes ownership of the closure
    // and frees it exactly once through `drop_backward`.
    ffi::check(unsafe {
        ffi::mtx_attach_backward(
            inputs.as_ptr(),
            inputs.len(),
            pointers.as_ptr(),
            pointers.len(),
            Box::into_raw(closure) as *mut c_void,
            run_backward,
            drop_backward,
        )
    })?;
    Ok(outputs)
}

unsafe extern "C" fn run_backward(
    state: *mut c_void,
    grads: *const *mut C_tensor,
    num_grads: usize,
    out: *mut *mut C_tensor,
    num_out: usize,
) -> *mut c_char {
    guarded(|| {
        // SAFETY: `state` is the box made in `attach_backward`, and the node's lock excludes a second caller;
        // `grads` and `out` are arrays of the given lengths.
        let (closure, grads, out) = unsafe {
            (
                &mut *(state as *mut BackwardClosure),
                std::slice::from_raw_parts(grads, num_grads),
                std::slice::from_raw_parts_mut(out, num_out),
            )
        };
        let grads: Vec<Option<Tensor>> = grads
            .iter()
            // SAFETY: each non-null pointer is a live tensor owned by the caller; a second handle to it is made.
            .map(|&grad| (!grad.is_null()).then(|| unsafe { Tensor::clone_from_ptr(grad) }))
            .collect();
        let results = tch::no_grad(|| closure(&grads))?;
        if results.len() != out.len() {
            return Err(Error::new(format!(
                "a backward closure returned {} gradients for {} inputs",
                results.len(),
                out.len()
            )));
        }
        for (slot, result) in out.iter_mut().zip(results) {
            // The pointer's owner is the caller from here on.
            *slot = result.map_or(std::ptr::null_mut(), |tensor| {
                std::mem::ManuallyDrop::new(tensor).as_ptr() as *mut C_tensor
            });
        }
        Ok(())
    })
}

unsafe extern "C" fn drop_backward(state: *mut c_void) {
    // SAFETY: called once, with the pointer that `attach_backward` made.
    drop(unsafe { Box::from_raw(state as *mut BackwardClosure) });
}

/// Runs a callback so that neither its error nor its panic unwinds into C++: null, or a message from malloc.
fn guarded(body: impl FnOnce() -> Result<(), Error>) -> *mut c_char {
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
            .unwrap_or_else(|| "panic in a backward closure".to_string()),
    };
    let bytes = message.as_bytes();
    // SAFETY: the buffer holds the message and its terminating NUL; C++ frees it with `free`.
    unsafe {
        let buffer = ffi::malloc(bytes.len() + 1) as *mut u8;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
        *buffer.add(bytes.len()) = 0;
        buffer as *mut c_char
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tch::Kind;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn gradients_flow_through_the_closure_which_is_dropped_with_the_graph() {
        struct Counted(Arc<AtomicUsize>);
        impl Drop for Counted {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let dropped = Arc::new(AtomicUsize::new(0));
        let counted = Counted(dropped.clone());
        let a = leaf(&[1., 2.]);
        let b = leaf(&[3., 4.]);
        let product = tch::no_grad(|| &a * &b);
        let saved = (a.detach(), b.detach());
        let out = attach_backward(&[&a, &b], vec![product], move |grads| {
            let _held = &counted;
            let grad = grads[0].as_ref().unwrap();
            Ok(vec![Some(grad * &saved.1), Some(grad * &saved.0)])
        })
        .unwrap();
        (&out[0] * 2.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(a.grad()).unwrap(), [6., 8.]);
        assert_eq!(Vec::<f32>::try_from(b.grad()).unwrap(), [2., 4.]);
        drop(out);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_error_and_a_panic_in_backward_arrive_as_errors() {
        for panics in [false, true] {
            let a = leaf(&[1.]);
            let out = attach_backward(&[&a], vec![a.detach() * 2.0], move |_| {
                if panics {
                    panic!("the closure panicked")
                } else {
                    Err(Error::new("the closure failed"))
                }
            })
            .unwrap();
            let error = out[0]
                .sum(Kind::Float)
                .f_backward()
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(if panics {
                    "the closure panicked"
                } else {
                    "the closure failed"
                }),
                "{error}"
            );
        }
    }

    #[test]
    fn a_second_backward_is_refused() {
        let a = leaf(&[1.]);
        let out = attach_backward(&[&a], vec![a.detach() * 2.0], |g| {
            Ok(vec![g[0].as_ref().map(|g| g * 2.0)])
        })
        .unwrap();
        out[0].backward();
        assert!(
            out[0]
                .f_backward()
                .unwrap_err()
                .to_string()
                .contains("ran twice")
        );
    }

    #[test]
    fn without_grad_mode_nothing_is_recorded() {
        let a = leaf(&[1.]);
        let out =
            tch::no_grad(|| attach_backward(&[&a], vec![a.detach() * 2.0], |_| Ok(vec![None])))
                .unwrap();
        assert!(!out[0].requires_grad());
    }
}
