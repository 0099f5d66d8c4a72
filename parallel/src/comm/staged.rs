//! Tensors of a device on their way through host memory, for libraries that carry no other.

use tch::{Device, Tensor};

/// What an operation works on.
pub(crate) struct Staged {
    /// In host memory: the tensors themselves where they are there.
    pub(crate) host: Vec<Tensor>,
    /// What the first of them is copied copy_back to.
    copy_back: Option<Tensor>,
}

impl Staged {
    /// Of `tensors`, the first of which the operation may write.
    pub(crate) fn new(tensors: &[&Tensor], writes: bool) -> Staged {
        let copy_back = tensors
            .first()
            .filter(|first| writes && first.device() != Device::Cpu);
        Staged {
            host: tensors.iter().map(|tensor| to_host(tensor)).collect(),
            copy_back: copy_back.map(|x| x.shallow_clone()),
        }
    }

    /// Brings the result to where it belongs. The operation is done.
    pub(crate) fn finish(self) {
        if let Some(mut copy_back) = self.copy_back {
            tch::no_grad(|| copy_back.copy_(&self.host[0]));
        }
    }
}

/// In memory that the device copies to by itself, where there is such memory left.
fn to_host(tensor: &Tensor) -> Tensor {
    if tensor.device() == Device::Cpu {
        return tensor.shallow_clone();
    }
    let pinned = || {
        let bytes =
            torch_ext::pinned((tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64).ok()?;
        let mut host = bytes
            .f_view_dtype(tensor.kind())
            .ok()?
            .view(tensor.size().as_slice());
        tch::no_grad(|| host.copy_(tensor));
        Some(host)
    };
    pinned().unwrap_or_else(|| tensor.to_device(Device::Cpu))
}
