//! Updates in the host's memory of weights that a device computes with (ZeRO-Offload, arXiv 2101.06840, section 4).
//!
//! Masters and moments never leave the host. Gradients come chunk by chunk, through pinned memory and on a stream of their own:
//! while the host's processors update one chunk the next one arrives. What was updated goes back in the model's dtype.

use crate::Error;
use kernels::profile::{Cost, span};
use kernels::{AdamWUpdate, adamw};
use parallel::{Accelerator, Copier};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use tch::{Kind, Tensor};
use torch_ext::AdamW;

/// Elements that travel together: enough for full speed, and few beside what is kept.
const CHUNK_ELEMENTS: i64 = 4 << 20;
/// Chunks that are here at once: one is updated, one arrives.
const STAGING_BUFFERS: usize = 2;

/// What brings gradients here and takes weights back.
pub(crate) struct Offload {
    /// Gradients' chunks, in order, for the thread that fetches them.
    wanted: Sender<Vec<Tensor>>,
    fetched: Receiver<Result<Tensor, torch_ext::Error>>,
    /// Memory to fetch into.
    free: Sender<Tensor>,
    /// A chunk in the model's dtype.
    rounded: Tensor,
}

impl Offload {
    /// For updates of up to `largest` elements of weights of dtype `kind` on `device`.
    ///
    /// # Errors
    /// When there is no pinned memory.
    pub(crate) fn new(
        device: &dyn Accelerator,
        largest: i64,
        kind: Kind,
    ) -> Result<Offload, Error> {
        let elements = largest.min(CHUNK_ELEMENTS);
        let rounded = device.staging(elements, kind)?;
        let (wanted, to_fetch) = channel();
        let (done, fetched) = channel();
        let (free, memory) = channel();
        for _ in 0..STAGING_BUFFERS {
            free.send(device.staging(elements, Kind::Float)?)
                .expect("its other end is here");
        }
        let copier = device.copier()?;
        std::thread::spawn(move || fetch(copier, &to_fetch, &memory, &done));
        Ok(Offload {
            wanted,
            fetched,
            free,
            rounded,
        })
    }

    /// Carries `updates` out, whose gradients and stored weights are on `device`, and all else here.
    ///
    /// # Errors
    /// libtorch's message. What was updated before stays so.
    pub(crate) fn update(
        &self,
        device: &dyn Accelerator,
        updates: &[AdamWUpdate],
        config: AdamW,
        step: u64,
        scale: Option<f64>,
    ) -> Result<(), Error> {
        let ended = || {
            Error::Torch(torch_ext::Error::new(
                "the thread that fetches gradients has ended",
            ))
        };
        let lengths: Vec<i64> = updates
            .iter()
            .map(|update| update.master.numel() as i64)
            .collect();
        let chunks = chunks(&lengths, self.rounded.numel() as i64);
        // The thread's stream does not wait for the one that computed them.
        device.synchronize()?;
        let wanted = chunks
            .iter()
            .map(|(index, range)| flat_slice(&updates[*index].gradient, range));
        self.wanted.send(wanted.collect()).map_err(|_| ended())?;
        for (index, range) in &chunks {
            let update = &updates[*index];
            let staged = span(
                "optimizer",
                "gradients from the device",
                Cost::default,
                || self.fetched.recv(),
            );
            let staged = staged.map_err(|_| ended())??;
            let here = |tensor: &Tensor| flat_slice(tensor, range);
            let len = range.end - range.start;
            let master = here(&update.master);
            let rounded =
                (self.rounded.kind() != Kind::Float).then(|| self.rounded.narrow(0, 0, len));
            let chunk = AdamWUpdate {
                master: master.shallow_clone(),
                gradient: staged.narrow(0, 0, len),
                exp_avg: here(&update.exp_avg),
                exp_avg_sq: here(&update.exp_avg_sq),
                stored: rounded.as_ref().map(Tensor::shallow_clone),
            };
            adamw(&[chunk], config, step, scale)?;
            // Nobody else takes it out: it is there for the next chunk but one.
            let _ = self.free.send(staged);
            if let Some(stored) = &update.stored {
                let updated = rounded.unwrap_or(master);
                let cost = || Cost::passes(2.0, &updated);
                span("optimizer", "weights to the device", cost, || {
                    tch::no_grad(|| here(stored).f_copy_(&updated)).map(drop)
                })?;
            }
        }
        Ok(())
    }
}

/// A part of a tensor, seen as one row.
fn flat_slice(tensor: &Tensor, range: &Range<i64>) -> Tensor {
    tensor
        .view([-1])
        .narrow(0, range.start, range.end - range.start)
}

/// Chunks of at most `largest` elements, in order: of which of the lists, and which of its elements.
fn chunks(lengths: &[i64], largest: i64) -> Vec<(usize, Range<i64>)> {
    let of = |(index, &length): (usize, &i64)| {
        let starts = (0..length).step_by(largest.max(1) as usize);
        starts.map(move |start| (index, start..(start + largest).min(length)))
    };
    lengths.iter().enumerate().flat_map(of).collect()
}

/// Until nobody wants any more, or something fails.
fn fetch(
    mut copier: Box<dyn Copier>,
    wanted: &Receiver<Vec<Tensor>>,
    memory: &Receiver<Tensor>,
    done: &Sender<Result<Tensor, torch_ext::Error>>,
) {
    for chunk in wanted.iter().flatten() {
        let Ok(staged) = memory.recv() else { return };
        let fetched = copier.fetch(&chunk, &staged.narrow(0, 0, chunk.numel() as i64));
        if done.send(fetched.map(|()| staged)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::Cpu;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn chunks_are_all_elements_in_order(lengths in prop::collection::vec(0..50i64, 0..20), largest in 1..20i64) {
            let mut seen = Vec::new();
            for (index, range) in chunks(&lengths, largest) {
                prop_assert!(range.end - range.start <= largest && !range.is_empty());
                seen.extend(range.map(|element| (index, element)));
            }
            let all = lengths.iter().enumerate().flat_map(|(index, &length)| (0..length).map(move |at| (index, at)));
            prop_assert_eq!(seen, all.collect::<Vec<_>>());
        }

        #[test]
        fn in_chunks_it_is_the_same_update(
            lengths in prop::collection::vec(1..200i64, 1..6), largest in 1..100i64, bf16: bool, seed in 0..1000i64,
        ) {
            tch::manual_seed(seed);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let random = |length: i64| Tensor::randn([length, 1], (Kind::Float, tch::Device::Cpu));
            let begun: Vec<[Tensor; 4]> = lengths.iter().map(|&n| [random(n), random(n), random(n), random(n).abs()]).collect();
            let updates = |stored: bool| begun.iter().map(|begun| {
                let [master, gradient, exp_avg, exp_avg_sq] = begun.each_ref().map(Tensor::copy);
                let stored = stored.then(|| master.to_kind(kind).copy());
                AdamWUpdate { master, gradient, exp_avg, exp_avg_sq, stored }
            }).collect::<Vec<_>>();
            let (away, here) = (updates(true), updates(false));
            let config = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, weight_decay: 0.1, eps: 1e-8 };
            let offload = Offload::new(&Cpu, largest, kind).unwrap();
            for step in 1..3 {
                offload.update(&Cpu, &away, config, step, Some(2.0)).unwrap();
                adamw(&here, config, step, Some(2.0)).unwrap();
            }
            for (away, here) in away.iter().zip(&here) {
                prop_assert!(away.master.equal(&here.master) && away.exp_avg.equal(&here.exp_avg));
                prop_assert!(away.exp_avg_sq.equal(&here.exp_avg_sq));
                prop_assert!(away.stored.as_ref().unwrap().equal(&here.master.to_kind(kind)));
            }
        }
    }
}
