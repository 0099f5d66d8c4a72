//! Custom autograd nodes with Rust closures.

use crate::{Error, callback::guarded, ffi};
use std::ffi::{c_char, c_void};
use tch::Tensor;
use torch_sys::C_tensor;

type BackwardClosure =
    Box<dyn FnMut(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Error> + Send>;

/// Makes `outputs`, which were computed from `inputs` outside of autograd, part of the graph.
///
/// Autograd passes the gradients of the outputs to `backward`, which returns a gradient or `None`
/// for each input. If gradients are disabled or no input requires one, `outputs` are returned
/// unchanged and `backward` is dropped. The closure and its tensors are freed with the graph. It is
/// `Send` because on a GPU the backward runs on another thread. `outputs` must be floating point
/// and must not already require grad.
///
/// # Errors
/// libtorch's message if the outputs cannot get a history.
pub fn attach_backward<F>(
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    backward: F,
) -> Result<Vec<Tensor>, Error>
where
    F: FnMut(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Error> + Send + 'static,
{
    // SAFETY: the function reads a thread-local flag.
    let enabled = unsafe { ffi::mtx_grad_enabled() };
    if !enabled || !inputs.iter().any(|t| t.requires_grad()) {
        return Ok(outputs);
    }
    let closure: Box<BackwardClosure> = Box::new(Box::new(backward));
    let inputs: Vec<_> = inputs.iter().map(|t| t.as_ptr() as *mut C_tensor).collect();
    let pointers: Vec<_> = outputs
        .iter()
        .map(|t| t.as_ptr() as *mut C_tensor)
        .collect();
    // SAFETY: the tensors live through the call. The node takes ownership of the closure and frees
    // it exactly once with `drop_backward`.
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
        // SAFETY: `state` is the box of `attach_backward`, and the node's lock excludes a second
        // caller.
        let closure = unsafe { &mut *(state as *mut BackwardClosure) };
        // SAFETY: `grads` is an array of this length.
        let grads = unsafe { std::slice::from_raw_parts(grads, num_grads) };
        // SAFETY: `out` is an array of this length.
        let out = unsafe { std::slice::from_raw_parts_mut(out, num_out) };
        let grads: Vec<Option<Tensor>> = grads
            .iter()
            // SAFETY: a non-null pointer is a live tensor of the caller, which gets a second
            // handle.
            .map(|&grad| (!grad.is_null()).then(|| unsafe { Tensor::clone_from_ptr(grad) }))
            .collect();
        let results = tch::no_grad(|| closure(&grads))?;
        if results.len() != out.len() {
            return Err(Error::new(format!(
                "backward closure: {} gradients for {} inputs",
                results.len(),
                out.len()
            )));
        }
        for (slot, result) in out.iter_mut().zip(results) {
            // The caller takes ownership of the pointer.
            *slot = result.map_or(std::ptr::null_mut(), |tensor| {
                std::mem::ManuallyDrop::new(tensor).as_ptr() as *mut C_tensor
            });
        }
        Ok(())
    })
}

unsafe extern "C" fn drop_backward(state: *mut c_void) {
    // SAFETY: C++ calls this once, with the pointer of `attach_backward`.
    drop(unsafe { Box::from_raw(state as *mut BackwardClosure) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };
    use tch::Kind;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn the_closure_computes_gradients_and_is_dropped_with_the_graph() {
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
        let saved_a = a.detach();
        let saved_b = b.detach();
        let out = attach_backward(&[&a, &b], vec![product], move |grads| {
            let _held = &counted;
            let grad = grads[0].as_ref().unwrap();
            Ok(vec![Some(grad * &saved_b), Some(grad * &saved_a)])
        })
        .unwrap();
        (&out[0] * 2.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(a.grad()).unwrap(), [6., 8.]);
        assert_eq!(Vec::<f32>::try_from(b.grad()).unwrap(), [2., 4.]);
        drop(out);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_error_and_a_panic_in_backward_become_errors() {
        for panics in [false, true] {
            let a = leaf(&[1.]);
            let expected = if panics {
                "the closure panicked"
            } else {
                "the closure failed"
            };
            let out = attach_backward(&[&a], vec![a.detach() * 2.0], move |_| {
                if panics {
                    panic!("{expected}")
                } else {
                    Err(Error::new(expected))
                }
            })
            .unwrap();
            let error = out[0].sum(Kind::Float).f_backward().unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
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
        let error = out[0].f_backward().unwrap_err();
        assert!(error.to_string().contains("ran twice"), "{error}");
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
