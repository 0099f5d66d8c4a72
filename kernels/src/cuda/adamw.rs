//! AdamW, `source/adamw.cu`.

use super::{BLOCKS_PER_MULTIPROCESSOR, Gpu, KernelLaunch, THREADS, Variant, arguments};
use crate::adamw::{AdamWUpdate, Scalars};
use tch::Kind;

/// One update, of tensors that lie without gaps, `stored` bf16; see [`crate::adamw`].
pub(crate) fn adamw(gpu: &dyn Gpu, update: &AdamWUpdate, scalars: Scalars) {
    let AdamWUpdate {
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        stored,
    } = update;
    let count = master.numel();
    // Four of fp32 are read together, and as many of bf16.
    let four = Variant::of(&[master, gradient, exp_avg, exp_avg_sq], count);
    let aligned = stored
        .as_ref()
        .is_none_or(|stored| (stored.data_ptr() as usize).is_multiple_of(8));
    let kind = stored.as_ref().map_or(Kind::Float, |stored| stored.kind());
    let variant = Variant {
        kind,
        vectors: four.vectors && aligned,
    };
    let packs = count / if variant.vectors { 4 } else { 1 };
    let blocks = packs
        .div_ceil(THREADS)
        .min(BLOCKS_PER_MULTIPROCESSOR * gpu.multiprocessors());
    let Scalars {
        inverse_scale,
        decay_factor,
        beta1,
        beta2,
        step_size,
        inverse_root_correction,
        eps,
    } = scalars;
    let arguments = arguments![
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        stored.as_ref(),
        count,
        inverse_scale,
        decay_factor,
        beta1,
        beta2,
        step_size,
        inverse_root_correction,
        eps,
    ];
    gpu.run(
        &KernelLaunch {
            name: "adamw",
            variant,
            blocks,
            block: (THREADS, 1),
            shared: 0,
            arguments: &arguments,
        },
        master,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adamw::tests::{cases, ours_and_libtorch, state};
    use crate::cuda::tests::{close, test_gpu};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn it_is_libtorchs_update(
            case in cases(), count in prop_oneof![0i64..5000, (0i64..2000).prop_map(|n| n * 8)],
        ) {
            let (gpu, device) = test_gpu();
            let [update, theirs] = ours_and_libtorch(case, count, device, |update, config, step, scale| {
                adamw(gpu, update, Scalars::of(config, step, scale));
            });
            for (ours, theirs) in state(&update).into_iter().zip(state(&theirs)) {
                close(ours, theirs, 1e-5)?;
            }
            if let Some(stored) = &update.stored {
                prop_assert!(stored.equal(&update.master.to_kind(Kind::BFloat16)));
            }
        }
    }
}
