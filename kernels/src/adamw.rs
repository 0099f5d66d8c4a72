//! AdamW (arXiv 1711.05101) on fp32 master weights, fused with the rounding of the stored weights.

use crate::{
    adamw_update::{AdamWUpdate, Scalars},
    cuda,
    number::{Bf16, Number},
    profile::{Cost, span},
    rows::{HostData, for_rows, host_kind},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};
use torch_ext::{AdamW, Error, fused_adamw};

/// Elements per chunk: a chunk is rounded while it is still in the L1 cache.
const WIDTH: usize = 1024;

/// Applies one AdamW step to each parameter; `step` is 1 for the first.
///
/// Gradients are divided by `scale` if there is one.
///
/// # Errors
/// libtorch's message if shapes, dtypes or devices differ.
pub fn adamw(
    updates: &[AdamWUpdate],
    config: AdamW,
    step: u64,
    scale: Option<f64>,
) -> Result<(), Error> {
    let cost = || {
        updates
            .iter()
            .map(|update| Cost::passes(7.0, &update.master))
            .fold(Cost::default(), Cost::plus)
    };
    span("optimizer", "AdamW", cost, || {
        let scalars = Scalars::of(config, step, scale);
        let mut for_libtorch = Vec::new();
        for update in updates {
            match backend(update) {
                Backend::OwnLoops => on_threads(update, scalars),
                Backend::Gpu(gpu) => cuda::adamw(gpu, update, scalars),
                Backend::Libtorch => for_libtorch.push(update),
            }
        }
        by_libtorch(&for_libtorch, config, step, scale)
    })
}

fn by_libtorch(
    updates: &[&AdamWUpdate],
    config: AdamW,
    step: u64,
    scale: Option<f64>,
) -> Result<(), Error> {
    let Some(first) = updates.first() else {
        return Ok(());
    };
    let scalar = |x: f64| {
        Tensor::from(x)
            .to_kind(Kind::Float)
            .to_device(first.master.device())
    };
    let all = |tensor: fn(&AdamWUpdate) -> &Tensor| -> Vec<Tensor> {
        updates
            .iter()
            .map(|update| tensor(update).shallow_clone())
            .collect()
    };
    let step = scalar(step as f64);
    let steps = updates
        .iter()
        .map(|_| step.shallow_clone())
        .collect::<Vec<Tensor>>();
    let masters = all(|update| &update.master);
    let gradients = all(|update| &update.gradient);
    let averages = all(|update| &update.exp_avg);
    let squares = all(|update| &update.exp_avg_sq);
    let scale = scale.map(scalar);
    fused_adamw(
        &masters,
        &gradients,
        &averages,
        &squares,
        &steps,
        config,
        scale.as_ref(),
    )?;
    for update in updates {
        if let Some(stored) = &update.stored {
            tch::no_grad(|| stored.shallow_clone().copy_(&update.master));
        }
    }
    Ok(())
}

/// The implementation that applies an update.
enum Backend {
    OwnLoops,
    Gpu(&'static dyn cuda::Gpu),
    Libtorch,
}

fn backend(update: &AdamWUpdate) -> Backend {
    let master = &update.master;
    let tensors = [
        master,
        &update.gradient,
        &update.exp_avg,
        &update.exp_avg_sq,
    ];
    let fits = |x: &Tensor, kind| {
        x.numel() == master.numel() && cuda::same_device_contiguous(master, x, kind)
    };
    let stored_fits = update
        .stored
        .as_ref()
        .is_none_or(|stored| fits(stored, Kind::BFloat16));
    if !stored_fits || !tensors.iter().all(|x| fits(x, Kind::Float)) {
        return Backend::Libtorch;
    }
    match cuda::gpu(&tensors) {
        Some(gpu) => Backend::Gpu(gpu),
        None if host_kind(&tensors).is_some() => Backend::OwnLoops,
        None => Backend::Libtorch,
    }
}

fn on_threads(update: &AdamWUpdate, scalars: Scalars) {
    let count = update.master.numel();
    // SAFETY: `backend` has checked the device, layout and dtype of all tensors.
    let [master, gradient, average, square] = unsafe {
        [
            &update.master,
            &update.gradient,
            &update.exp_avg,
            &update.exp_avg_sq,
        ]
        .map(|x| HostData::<f32>::of(x))
    };
    // SAFETY: as above.
    let stored = update
        .stored
        .as_ref()
        .map(|stored| unsafe { HostData::<Bf16>::of(stored) });
    for_rows(count.div_ceil(WIDTH), WIDTH, |_, rows| {
        for start in rows.map(|row| row * WIDTH) {
            let chunk = start..(start + WIDTH).min(count);
            let gradient = gradient.rows(&chunk, 1);
            // SAFETY: each chunk belongs to one thread.
            unsafe {
                let master = master.rows_mut(&chunk, 1);
                let average = average.rows_mut(&chunk, 1);
                let square = square.rows_mut(&chunk, 1);
                update_chunk(master, gradient, average, square, scalars);
                if let Some(stored) = &stored {
                    round(master, stored.rows_mut(&chunk, 1));
                }
            }
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn update_chunk(
    master: &mut [f32],
    gradient: &[f32],
    averages: &mut [f32],
    squares: &mut [f32],
    scalars: Scalars,
) {
    let Scalars {
        inverse_scale,
        decay_factor,
        beta1,
        beta2,
        step_size,
        inverse_root_correction,
        eps,
    } = scalars;
    let elements = master.iter_mut().zip(gradient).zip(averages).zip(squares);
    for (((x, g), m), v) in elements {
        let g = g * inverse_scale;
        *m += (g - *m) * (1.0 - beta1);
        *v = *v * beta2 + g * g * (1.0 - beta2);
        let denominator = v.sqrt() * inverse_root_correction + eps;
        *x = *x * decay_factor - step_size * *m / denominator;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn round(master: &[f32], stored: &mut [Bf16]) {
    for (stored, x) in stored.iter_mut().zip(master) {
        *stored = Bf16::narrow(*x);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    /// A few steps of one parameter.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Case {
        bf16: bool,
        scaled: bool,
        decays: bool,
        steps: u64,
        seed: i64,
    }

    pub(crate) fn cases() -> impl Strategy<Value = Case> {
        let flags = any::<[bool; 3]>();
        let numbers = (1u64..4, 0i64..1000);
        (flags, numbers).prop_map(|(flags, (steps, seed))| Case {
            bf16: flags[0],
            scaled: flags[1],
            decays: flags[2],
            steps,
            seed,
        })
    }

    /// Applies the steps of a case to `count` elements, by `step_by` and by libtorch.
    pub(crate) fn ours_and_libtorch(
        case: Case,
        count: i64,
        device: Device,
        step_by: impl Fn(&AdamWUpdate, AdamW, u64, Option<f64>),
    ) -> [AdamWUpdate; 2] {
        tch::manual_seed(case.seed);
        let random = || Tensor::randn([count], (Kind::Float, device));
        let master = random();
        let zeros = random().zeros_like();
        let initial = |stored| AdamWUpdate {
            master: master.copy(),
            gradient: random(),
            exp_avg: zeros.copy(),
            exp_avg_sq: zeros.copy(),
            stored,
        };
        let stored = case.bf16.then(|| master.to_kind(Kind::BFloat16));
        let sides = [initial(stored), initial(None)];
        let weight_decay = if case.decays { 0.1 } else { 0.0 };
        let config = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay,
            eps: 1e-8,
        };
        let scale = case.scaled.then_some(3.0);
        for step in 1..=case.steps {
            let gradient = random();
            for side in &sides {
                side.gradient.shallow_clone().copy_(&gradient);
            }
            step_by(&sides[0], config, step, scale);
            by_libtorch(&[&sides[1]], config, step, scale).unwrap();
        }
        sides
    }

    /// Returns the tensors that a step changes.
    pub(crate) fn state(update: &AdamWUpdate) -> [&Tensor; 3] {
        [&update.master, &update.exp_avg, &update.exp_avg_sq]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn it_matches_libtorch(
            case in cases(),
            count in 0i64..20_000,
        ) {
            tch::set_num_threads(2);
            let step_by = |update: &AdamWUpdate, config, step, scale| {
                adamw(std::slice::from_ref(update), config, step, scale).unwrap();
            };
            let [update, theirs] = ours_and_libtorch(case, count, Device::Cpu, step_by);
            for (ours, theirs) in state(&update)
                .into_iter()
                .zip(state(&theirs))
            {
                prop_assert!(ours.allclose(theirs, 1e-5, 1e-6, false));
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
}
