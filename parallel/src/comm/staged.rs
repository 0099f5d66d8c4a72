//! Staging of device tensors in host memory, for libraries that only access the latter.

use tch::{Device, Tensor};

/// The tensors of an operation, in host memory.
pub(crate) struct Staged {
    /// The tensors themselves, or copies of those that are on a device.
    pub(crate) host: Vec<Tensor>,
    /// The device tensor that receives the result `host[0]`.
    result: Option<Tensor>,
}

impl Staged {
    /// Stages `tensors`; `writes` is true if the operation writes the first of them.
    pub(crate) fn new(tensors: &[&Tensor], writes: bool) -> Staged {
        let result = tensors
            .first()
            .filter(|first| writes && first.device() != Device::Cpu);
        Staged {
            host: tensors.iter().map(|tensor| to_host(tensor)).collect(),
            result: result.map(|tensor| tensor.shallow_clone()),
        }
    }

    /// Copies the result to its device, after the operation.
    pub(crate) fn finish(self) {
        if let Some(mut result) = self.result {
            tch::no_grad(|| result.copy_(&self.host[0]));
        }
    }
}

impl Staged {
    /// Replaces the result by `values`, after an operation that did not write it.
    pub(crate) fn finish_with(self, values: &Tensor) {
        let mut result = self.result.unwrap_or_else(|| self.host[0].shallow_clone());
        tch::no_grad(|| result.copy_(&values.view_as(&result)));
    }

    /// Replaces the result by one with these bytes, after an operation that did not write it.
    pub(crate) fn finish_with_bytes(self, bytes: &Tensor) {
        let kind = self.host[0].kind();
        let values = bytes.view([-1]).view_dtype(kind);
        self.finish_with(&values);
    }
}

/// Copies a tensor to host memory, pinned if possible: the device copies to that directly.
fn to_host(tensor: &Tensor) -> Tensor {
    if tensor.device() == Device::Cpu {
        return tensor.shallow_clone();
    }
    let kind = tensor.kind();
    let pinned = || {
        // The thread may be one of this crate's: it starts what waited for the group to be joined.
        torch_ext::use_device(tensor.device()).ok()?;
        let bytes = torch_ext::pinned((tensor.numel() * kind.elt_size_in_bytes()) as i64).ok()?;
        let flat = bytes.f_view_dtype(kind).ok()?;
        let mut host = flat.view(tensor.size().as_slice());
        tch::no_grad(|| host.copy_(tensor));
        Some(host)
    };
    pinned().unwrap_or_else(|| tensor.to_device(Device::Cpu))
}
