//! The test suite for devices.

use super::outcome::{Outcome, Verdict, expect, text};
use crate::Accelerator;
use tch::{Device, Kind, Tensor};

/// Runs the suite. Nothing else may use the device meanwhile, since the suite measures its memory.
pub fn accelerator(device: &dyn Accelerator) -> Vec<Outcome> {
    type Case = fn(&dyn Accelerator) -> Verdict;
    let cases: [(&str, Case); 6] = [
        ("tensors of every dtype and shape", tensors),
        ("an uploaded tensor comes back", round_trip),
        ("arithmetic, with gradients", arithmetic),
        ("a restored generator repeats its numbers", generator),
        ("memory use, and its peak after a reset", memory),
        ("a copier on a thread of its own", copier),
    ];
    cases
        .map(|(name, case)| Outcome {
            name,
            problem: case(device).err(),
        })
        .to_vec()
}

const KINDS: [Kind; 7] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
    Kind::Uint8,
];

fn tensors(device: &dyn Accelerator) -> Verdict {
    for kind in KINDS {
        for shape in [&[0i64] as &[i64], &[], &[3], &[2, 0, 4], &[5, 7]] {
            let zeros = device.zeros(shape, kind);
            expect(
                &format!("zeros of {kind:?} {shape:?}"),
                &zeros,
                &vec![0.0; zeros.numel()],
            )?;
            let empty = device.empty(shape, kind);
            let is_right = empty.size() == shape && empty.kind() == kind;
            if !is_right || !empty.is_contiguous() {
                return Err(format!(
                    "an empty {kind:?} {shape:?} came as {:?} {:?}",
                    empty.kind(),
                    empty.size()
                ));
            }
        }
    }
    Ok(())
}

fn round_trip(device: &dyn Accelerator) -> Verdict {
    for kind in KINDS {
        let host = Tensor::arange(60, (Kind::Int64, Device::Cpu))
            .to_kind(kind)
            .view([3, 20]);
        let expected: Vec<f64> = (0..60).map(f64::from).collect();
        expect(&format!("{kind:?}"), &device.upload(&host), &expected)?;
    }
    device.synchronize().map_err(text)
}

fn arithmetic(device: &dyn Accelerator) -> Verdict {
    let host = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([2, 2]);
    let x = device.upload(&host).detach().copy().set_requires_grad(true);
    let y = x.matmul(&x.tr());
    y.sum(Kind::Float).backward();
    device.synchronize().map_err(text)?;
    expect("a matmul", &y.detach(), &[5.0, 11.0, 11.0, 25.0])?;
    expect("its gradient", &x.grad(), &[8.0, 12.0, 8.0, 12.0])
}

fn generator(device: &dyn Accelerator) -> Verdict {
    let draw = || -> Result<Vec<f32>, String> {
        let mut drawn = device.zeros(&[16], Kind::Float);
        Vec::try_from(drawn.uniform_(0.0, 1.0).to_device(Device::Cpu)).map_err(text)
    };
    let state = device.generator_state().map_err(text)?;
    let first = draw()?;
    if first == draw()? {
        return Err("the generator repeats its numbers without being restored".into());
    }
    device.set_generator_state(&state).map_err(text)?;
    if first != draw()? {
        return Err("the restored generator draws other numbers".into());
    }
    match device.set_generator_state(&Tensor::from_slice(&[1u8, 2])) {
        Ok(()) => Err("the generator accepted a state of two bytes".into()),
        Err(_) => Ok(()),
    }
}

fn memory(device: &dyn Accelerator) -> Verdict {
    const BYTES: u64 = 32 << 20;
    device.reset_peak().map_err(text)?;
    let before = device.memory().map_err(text)?;
    let tensor = device.zeros(&[BYTES as i64 / 4], Kind::Float);
    let during = device.memory().map_err(text)?;
    if during.current < before.current + BYTES || during.peak < during.current {
        return Err(format!(
            "allocating {BYTES} bytes changed {before:?} to {during:?}"
        ));
    }
    drop(tensor);
    device.reset_peak().map_err(text)?;
    let after = device.memory().map_err(text)?;
    if after.peak + BYTES / 2 >= during.peak {
        return Err(format!(
            "resetting the peak after the tensor was freed changed {during:?} to {after:?}"
        ));
    }
    Ok(())
}

fn copier(device: &dyn Accelerator) -> Verdict {
    // Larger than a staging buffer, and not a multiple of it.
    let host = Tensor::arange((9 << 20) + 13, (Kind::Int, Device::Cpu));
    let tensor = device.upload(&host);
    device.synchronize().map_err(text)?;
    let mut copier = device.copier().map_err(text)?;
    let staging = device
        .staging(host.numel() as i64, Kind::Int)
        .map_err(text)?;
    let copied = std::thread::spawn(move || {
        let mut bytes = vec![0u8; tensor.numel() * 4];
        copier.copy(&tensor, &mut bytes)?;
        copier.fetch(&tensor, &staging)?;
        Ok::<_, torch_ext::Error>((bytes, staging))
    });
    let (bytes, staging) = copied
        .join()
        .map_err(|_| "the copying thread panicked")?
        .map_err(text)?;
    let mut numbers = bytes.chunks_exact(4).enumerate();
    let is_right = |(index, number): (usize, &[u8])| number == (index as i32).to_ne_bytes();
    if !numbers.all(is_right) {
        return Err("the copied bytes differ".into());
    }
    if staging.device() != Device::Cpu || !staging.equal(&host) {
        return Err("the fetched tensor differs".into());
    }
    Ok(())
}
