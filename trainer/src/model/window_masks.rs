//! Masks for devices whose fused attention has no sliding window.

use super::documents::mask_for_device;
use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc};
use tch::{Kind, Tensor};

/// Masks of causal attention in windows, one for each size of a window. The layers of a model share
/// them, since each keeps its mask until backward.
#[derive(Clone, Default)]
pub(crate) struct WindowMasks {
    by_window: Arc<Mutex<BTreeMap<i64, WindowMask>>>,
}

struct WindowMask {
    /// Dtype of the queries.
    kind: Kind,
    mask: Tensor,
}

impl WindowMasks {
    /// Returns the mask `[1, 1, S, S]` for queries `[B, H, S, d]`, in the form that their device
    /// takes.
    pub(crate) fn mask(&self, query: &Tensor, window: i64) -> Tensor {
        let length = query.size()[2];
        let kind = query.kind();
        let device = query.device();
        let mut by_window = self.by_window.lock();
        // Sequences of another length, as in generation, replace the mask.
        let known = by_window.get(&window).filter(|known| {
            let fits = known.mask.size()[3] == length;
            fits && known.kind == kind && known.mask.device() == device
        });
        if let Some(known) = known {
            return known.mask.shallow_clone();
        }
        let all = Tensor::ones([1, 1, length, length], (Kind::Bool, device));
        let mask = mask_for_device(&kernels::causal_part(&all, Some(window)), kind);
        let made = WindowMask {
            kind,
            mask: mask.shallow_clone(),
        };
        by_window.insert(window, made);
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, kind::FLOAT_CPU};

    #[test]
    fn layers_share_a_mask_until_the_length_changes() {
        let masks = WindowMasks::default();
        let query = |length: i64| Tensor::zeros([1, 2, length, 8], FLOAT_CPU);
        let mask = masks.mask(&query(5), 2);
        let visible = mask.eq(0.0).to_kind(Kind::Int64).view([5, 5]);
        let band = |row: i64| [0i64, 1, 2, 3, 4].map(|key| i64::from(row - 2 < key && key <= row));
        let expected = Tensor::from_slice(&[0, 1, 2, 3, 4].map(band).concat()).view([5, 5]);
        assert_eq!(visible, expected);
        let again = masks.clone().mask(&query(5), 2);
        assert_eq!(again.data_ptr(), mask.data_ptr());
        assert_ne!(masks.mask(&query(5), 3), mask);
        assert_eq!(masks.mask(&query(4), 2).size(), [1, 1, 4, 4]);
        let wide = Tensor::zeros([1, 2, 4, 8], (Kind::BFloat16, Device::Cpu));
        assert_eq!(masks.mask(&wide, 2).kind(), Kind::BFloat16);
    }
}
