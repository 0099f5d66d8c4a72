//! AdamW, `source/adamw.cu`.

use super::{BLOCKS, Call, Gpu, THREADS, Variant, arguments};
use crate::adamw::{Scalars, Update};
use tch::Kind;

/// One update, of tensors that lie without gaps, `stored` bf16; see [`crate::adamw`].
pub(crate) fn adamw(gpu: &dyn Gpu, update: &Update, scalars: Scalars) {
    let Update { master, gradient, exp_avg, exp_avg_sq, stored } = update;
    let count = master.numel();
    // Four of fp32 are read together, and as many of bf16.
    let four = Variant::of(&[master, gradient, exp_avg, exp_avg_sq], count);
    let aligned = stored.as_ref().is_none_or(|stored| (stored.data_ptr() as usize).is_multiple_of(8));
    let kind = stored.as_ref().map_or(Kind::Float, |stored| stored.kind());
    let variant = Variant { kind, vectors: four.vectors && aligned };
    let packs = count / if variant.vectors { 4 } else { 1 };
    let blocks = packs.div_ceil(THREADS).min(BLOCKS * gpu.multiprocessors());
    let Scalars { over_scale, kept, beta1, beta2, step_size, over_root, eps } = scalars;
    let arguments = arguments![
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        stored.as_ref(),
        count,
        over_scale,
        kept,
        beta1,
        beta2,
        step_size,
        over_root,
        eps,
    ];
    gpu.run(&Call { name: "adamw", variant, blocks, block: (THREADS, 1), shared: 0, arguments: &arguments }, master);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adamw::by_libtorch;
    use crate::cuda::tests::{close, gpu_of_tests};
    use proptest::prelude::*;
    use tch::Tensor;
    use torch_ext::AdamW;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn it_is_libtorchs_update(
            count in prop_oneof![0i64..5000, (0i64..2000).prop_map(|n| n * 8)],
            bf16: bool, scaled: bool, decays: bool, steps in 1u64..4, seed in 0i64..1000,
        ) {
            let (gpu, device) = gpu_of_tests();
            tch::manual_seed(seed);
            let random = || Tensor::randn([count], (Kind::Float, device));
            let (master, zeros) = (random(), random().zeros_like());
            let begin = |stored| {
                let [exp_avg, exp_avg_sq] = [(); 2].map(|()| zeros.copy());
                Update { master: master.copy(), gradient: random(), exp_avg, exp_avg_sq, stored }
            };
            let (update, theirs) = (begin(bf16.then(|| master.to_kind(Kind::BFloat16))), begin(None));
            let weight_decay = if decays { 0.1 } else { 0.0 };
            let config = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, weight_decay, eps: 1e-8 };
            let scale = scaled.then_some(3.0);
            for step in 1..=steps {
                let gradient = random();
                [&update, &theirs].iter().for_each(|side| side.gradient.shallow_clone().copy_(&gradient));
                adamw(gpu, &update, Scalars::of(config, step, scale));
                by_libtorch(&[&theirs], config, step, scale).unwrap();
            }
            let pairs = [
                (&update.master, &theirs.master),
                (&update.exp_avg, &theirs.exp_avg),
                (&update.exp_avg_sq, &theirs.exp_avg_sq),
            ];
            for (ours, theirs) in pairs {
                close(ours, theirs, 1e-5)?;
            }
            if let Some(stored) = &update.stored {
                prop_assert!(stored.equal(&update.master.to_kind(Kind::BFloat16)));
            }
        }
    }
}
