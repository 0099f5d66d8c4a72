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
    use tch::{Device, Tensor};

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
            for (ours, theirs) in state(&update)
                .into_iter()
                .zip(state(&theirs))
            {
                close(ours, theirs, 1e-5)?;
            }
            if let Some(stored) = &update.stored {
                prop_assert!(
                    stored.equal(
                        &update
                            .master
                            .to_kind(Kind::BFloat16)
                    )
                );
            }
        }
    }

    #[test]
    fn each_weight_is_rounded_to_the_nearest_and_ties_to_even() {
        let (gpu, device) = test_gpu();
        // Each bf16 number, and numbers around the middle between it and the next one.
        let lower_halves = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let numbers: Vec<f32> = (0..1u32 << 16)
            .flat_map(|upper| lower_halves.map(|lower| f32::from_bits(upper << 16 | lower)))
            .collect();
        let numbers = Tensor::from_slice(&numbers);
        let count = numbers.numel() as i64;
        // A step that changes no weight.
        let scalars = Scalars {
            inverse_scale: 1.0,
            decay_factor: 1.0,
            beta1: 0.9,
            beta2: 0.9,
            step_size: 0.0,
            inverse_root_correction: 1.0,
            eps: 1.0,
        };
        // Packs, and single elements.
        for shift in [0, 1] {
            let zeros = |kind| {
                let all = Tensor::zeros([count + 1], (kind, device));
                all.narrow(0, shift, count)
            };
            let update = AdamWUpdate {
                master: zeros(Kind::Float),
                gradient: zeros(Kind::Float),
                exp_avg: zeros(Kind::Float),
                exp_avg_sq: zeros(Kind::Float),
                stored: Some(zeros(Kind::BFloat16)),
            };
            update.master.shallow_clone().copy_(&numbers);
            adamw(gpu, &update, scalars);
            let stored = update.stored.unwrap().to_device(Device::Cpu);
            let nan = numbers.isnan();
            assert_eq!(stored.isnan(), nan);
            let bits = |x: &Tensor| x.view_dtype(Kind::Int16).masked_fill(&nan, 0);
            assert_eq!(bits(&stored), bits(&numbers.to_kind(Kind::BFloat16)));
        }
    }
}
