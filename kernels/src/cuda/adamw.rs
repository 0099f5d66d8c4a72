//! Launches of the AdamW kernel in `source/adamw.cu`.

use super::launch::{
    BLOCKS_PER_MULTIPROCESSOR, BlockShape, Gpu, KernelLaunch, THREADS, Variant, arguments,
};
use crate::adamw_update::{AdamWUpdate, Scalars};
use tch::Kind;

/// Applies one update, as [`crate::adamw`] does. Tensors are contiguous, and `stored` is bf16.
pub(crate) fn adamw(gpu: &dyn Gpu, update: &AdamWUpdate, scalars: Scalars) {
    let AdamWUpdate {
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        stored,
    } = update;
    let count = master.numel();
    // A thread reads packs of four fp32 elements, and of four bf16 elements from `stored`.
    let masters = Variant::of(&[master, gradient, exp_avg, exp_avg_sq], count);
    let stored_aligned = stored
        .as_ref()
        .is_none_or(|stored| (stored.data_ptr() as usize).is_multiple_of(8));
    let kind = stored.as_ref().map_or(Kind::Float, |stored| stored.kind());
    let variant = Variant {
        kind,
        vectors: masters.vectors && stored_aligned,
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
            block: BlockShape {
                threads_per_row: THREADS,
                rows: 1,
            },
            shared: 0,
            arguments: &arguments,
        },
        master,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adamw::tests::{cases, ours_and_libtorch, state},
        cuda::tests::{close, test_gpu, with_cases},
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(with_cases(40))]
        #[test]
        fn it_matches_libtorch(
            case in cases(),
            count in prop_oneof![0i64..5000, (0i64..2000).prop_map(|n| n * 8)],
        ) {
            let (gpu, device) = test_gpu();
            let step_by = |update: &AdamWUpdate, config, step, scale| {
                adamw(gpu, update, Scalars::of(config, step, scale));
            };
            let [update, theirs] = ours_and_libtorch(case, count, device, step_by);
            for (ours, theirs) in state(&update).into_iter().zip(state(&theirs)) {
                close(ours, theirs, 1e-5)?;
            }
            if let Some(stored) = &update.stored {
                prop_assert!(stored.equal(&update.master.to_kind(Kind::BFloat16)));
            }
        }
    }
}
