//! AdamW (arXiv 1711.05101) over fp32 masters, with the rounding of the weights that are computed with, in one pass over memory.

use crate::cuda;
use crate::number::{Bf16, Number};
use crate::profile::{Cost, part};
use crate::rows::{Numbers, for_rows, host_kind};
use multiversion::multiversion;
use tch::{Kind, Tensor};
use torch_ext::{AdamW, Error, fused_adamw};

/// Numbers that are rounded while they are still in the first cache.
const WIDTH: usize = 1024;

/// A parameter to update.
pub struct AdamWUpdate {
    /// fp32.
    pub master: Tensor,
    /// fp32.
    pub gradient: Tensor,
    /// First moment, fp32.
    pub exp_avg: Tensor,
    /// Second moment, fp32.
    pub exp_avg_sq: Tensor,
    /// What is computed with, where that is not the master itself: the master is rounded to its dtype.
    pub stored: Option<Tensor>,
}

/// Step number `step`, 1 at the first. Gradients are divided by `scale`, where there is one.
///
/// # Errors
/// libtorch's message, when shapes, dtypes or devices differ.
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
            .fold(Cost::default(), Cost::and)
    };
    part("optimizer", "AdamW", cost, || {
        let scalars = Scalars::of(config, step, scale);
        let mut elsewhere = Vec::new();
        for update in updates {
            match update.place() {
                Backend::OwnLoops => on_threads(update, scalars),
                Backend::Gpu(gpu) => cuda::adamw(gpu, update, scalars),
                Backend::Libtorch => elsewhere.push(update),
            }
        }
        by_libtorch(&elsewhere, config, step, scale)
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
    let of = |tensor: fn(&AdamWUpdate) -> &Tensor| {
        updates
            .iter()
            .map(|u| tensor(u).shallow_clone())
            .collect::<Vec<_>>()
    };
    let count = scalar(step as f64);
    let steps: Vec<Tensor> = updates.iter().map(|_| count.shallow_clone()).collect();
    let masters = of(|u| &u.master);
    let gradients = of(|u| &u.gradient);
    let averages = of(|u| &u.exp_avg);
    let squares = of(|u| &u.exp_avg_sq);
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

/// What goes through an update's numbers.
enum Backend {
    OwnLoops,
    Gpu(&'static dyn cuda::Gpu),
    Libtorch,
}

impl AdamWUpdate {
    fn place(&self) -> Backend {
        let numbers = [
            &self.master,
            &self.gradient,
            &self.exp_avg,
            &self.exp_avg_sq,
        ];
        let alike = |x: &Tensor, kind| {
            x.numel() == self.master.numel() && cuda::same_device_contiguous(&self.master, x, kind)
        };
        let stored = self
            .stored
            .as_ref()
            .is_none_or(|stored| alike(stored, Kind::BFloat16));
        if !stored || !numbers.iter().all(|x| alike(x, Kind::Float)) {
            return Backend::Libtorch;
        }
        match cuda::gpu(&numbers) {
            Some(gpu) => Backend::Gpu(gpu),
            None if host_kind(&numbers).is_some() => Backend::OwnLoops,
            None => Backend::Libtorch,
        }
    }
}

/// The scalars of a step, as a number's update takes them.
#[derive(Clone, Copy)]
pub(crate) struct Scalars {
    pub(crate) inverse_scale: f32,
    pub(crate) decay_factor: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) step_size: f32,
    pub(crate) inverse_root_correction: f32,
    pub(crate) eps: f32,
}

impl Scalars {
    pub(crate) fn of(config: AdamW, step: u64, scale: Option<f64>) -> Scalars {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Scalars {
            inverse_scale: scale.map_or(1.0, |scale| 1.0 / scale) as f32,
            decay_factor: (1.0 - config.lr * config.weight_decay) as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            step_size: (config.lr / correction(config.beta1)) as f32,
            inverse_root_correction: (1.0 / correction(config.beta2).sqrt()) as f32,
            eps: config.eps as f32,
        }
    }
}

fn on_threads(update: &AdamWUpdate, scalars: Scalars) {
    let count = update.master.numel();
    // SAFETY: `place` has said so of all.
    let [master, gradient, average, square] = unsafe {
        [
            &update.master,
            &update.gradient,
            &update.exp_avg,
            &update.exp_avg_sq,
        ]
        .map(|x| Numbers::<f32>::of(x))
    };
    // SAFETY: likewise.
    let stored = update
        .stored
        .as_ref()
        .map(|stored| unsafe { Numbers::<Bf16>::of(stored) });
    for_rows(count.div_ceil(WIDTH), WIDTH, |_, rows| {
        for start in rows.map(|row| row * WIDTH) {
            let place = start..(start + WIDTH).min(count);
            // SAFETY: parts of threads do not overlap.
            unsafe {
                let moments = (average.part_mut(&place, 1), square.part_mut(&place, 1));
                let master = master.part_mut(&place, 1);
                update_chunk(master, gradient.part(&place, 1), moments, scalars);
                if let Some(stored) = &stored {
                    round(master, stored.part_mut(&place, 1));
                }
            }
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn update_chunk(
    master: &mut [f32],
    gradient: &[f32],
    (averages, squares): (&mut [f32], &mut [f32]),
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
    for (((x, g), m), v) in master.iter_mut().zip(gradient).zip(averages).zip(squares) {
        let g = g * inverse_scale;
        *m += (g - *m) * (1.0 - beta1);
        *v = *v * beta2 + g * g * (1.0 - beta2);
        *x = *x * decay_factor - step_size * *m / (v.sqrt() * inverse_root_correction + eps);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn round(master: &[f32], stored: &mut [Bf16]) {
    stored
        .iter_mut()
        .zip(master)
        .for_each(|(stored, x)| *stored = Bf16::narrow(*x));
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    /// Some steps of a parameter.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Case {
        bf16: bool,
        scaled: bool,
        decays: bool,
        steps: u64,
        seed: i64,
    }

    pub(crate) fn cases() -> impl Strategy<Value = Case> {
        let drawn = (
            any::<bool>(),
            any::<bool>(),
            any::<bool>(),
            1u64..4,
            0i64..1000,
        );
        drawn.prop_map(|(bf16, scaled, decays, steps, seed)| Case {
            bf16,
            scaled,
            decays,
            steps,
            seed,
        })
    }

    /// The same `count` numbers after the case's steps by `step_by`, and by libtorch.
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
        let begin = |stored| {
            let [exp_avg, exp_avg_sq] = [(); 2].map(|()| zeros.copy());
            AdamWUpdate {
                master: master.copy(),
                gradient: random(),
                exp_avg,
                exp_avg_sq,
                stored,
            }
        };
        let sides = [
            begin(case.bf16.then(|| master.to_kind(Kind::BFloat16))),
            begin(None),
        ];
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
            sides
                .iter()
                .for_each(|side| side.gradient.shallow_clone().copy_(&gradient));
            step_by(&sides[0], config, step, scale);
            by_libtorch(&[&sides[1]], config, step, scale).unwrap();
        }
        sides
    }

    /// What steps change.
    pub(crate) fn state(update: &AdamWUpdate) -> [&Tensor; 3] {
        [&update.master, &update.exp_avg, &update.exp_avg_sq]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn it_is_libtorchs_update(case in cases(), count in 0i64..20_000) {
            tch::set_num_threads(2);
            let [update, theirs] = ours_and_libtorch(case, count, Device::Cpu, |update, config, step, scale| {
                adamw(std::slice::from_ref(update), config, step, scale).unwrap();
            });
            for (ours, theirs) in state(&update).into_iter().zip(state(&theirs)) {
                prop_assert!(ours.allclose(theirs, 1e-5, 1e-6, false));
            }
            if let Some(stored) = &update.stored {
                prop_assert!(stored.equal(&update.master.to_kind(Kind::BFloat16)));
            }
        }
    }
}
