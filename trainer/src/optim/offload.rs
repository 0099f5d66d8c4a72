//! Updates on the host for weights on a device (ZeRO-Offload, arXiv 2101.06840, section 4).
//!
//! Masters and optimizer state never leave host memory. Gradients arrive chunk by chunk through
//! pinned memory, on a stream of their own: while the host updates one chunk, the next one arrives.
//! Updated weights return in the model's dtype.

use super::{
    rounded_state::update_rows,
    rule::{RowRule, RowUpdate, StepScalars, flat_slice},
};
use crate::Error;
use kernels::profile::{Cost, span};
use parallel::{Accelerator, Copier};
use std::{
    ops::Range,
    sync::mpsc::{Receiver, Sender, channel},
};
use tch::{Kind, Tensor};

/// Elements of a chunk: enough for full bandwidth, and few compared with the optimizer's state.
const CHUNK_ELEMENTS: i64 = 4 << 20;
/// Chunks on the host at once: one is updated while one arrives.
const STAGING_BUFFERS: usize = 2;

/// Transfers of gradients to the host and of weights to the device.
pub(crate) struct Offload {
    /// Chunks of gradients for the thread to fetch, in order.
    wanted: Sender<Vec<Tensor>>,
    fetched: Receiver<Result<Tensor, torch_ext::Error>>,
    /// Free memory for the thread.
    free: Sender<Tensor>,
    /// A chunk in the model's dtype.
    rounded: Tensor,
}

/// A part of one of the updated tensors.
#[derive(Debug, Clone, PartialEq)]
struct Chunk {
    update: usize,
    elements: Range<i64>,
}

impl Offload {
    /// Prepares updates of up to `largest` elements for weights of dtype `kind` on `device`.
    ///
    /// # Errors
    /// If there is no pinned memory.
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
            let buffer = device.staging(elements, Kind::Float)?;
            free.send(buffer).expect("the receiver exists");
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

    /// Executes `updates`, whose gradients and stored weights are on `device` and whose other
    /// tensors are on the host.
    ///
    /// # Errors
    /// If libtorch refuses an operation. Earlier chunks then stay updated.
    pub(crate) fn update(
        &self,
        device: &dyn Accelerator,
        rule: &dyn RowRule,
        updates: &[RowUpdate],
        scalars: StepScalars,
    ) -> Result<(), Error> {
        let masters = updates.iter().map(|update| &update.master);
        let lengths: Vec<i64> = masters.map(|master| master.numel() as i64).collect();
        let chunks = chunks(&lengths, self.rounded.numel() as i64);
        // The thread's stream does not wait for the one that computed the gradients.
        device.synchronize()?;
        let gradients = chunks
            .iter()
            .map(|chunk| flat_slice(&updates[chunk.update].gradient, &chunk.elements));
        let sent = self.wanted.send(gradients.collect());
        sent.map_err(|_| thread_exited())?;
        for chunk in &chunks {
            let update = &updates[chunk.update];
            self.update_chunk(rule, update, &chunk.elements, scalars)?;
        }
        Ok(())
    }

    fn update_chunk(
        &self,
        rule: &dyn RowRule,
        update: &RowUpdate,
        elements: &Range<i64>,
        scalars: StepScalars,
    ) -> Result<(), Error> {
        let receive = || self.fetched.recv();
        let staged = span(
            "optimizer",
            "gradients from the device",
            Cost::default,
            receive,
        );
        let staged = staged.map_err(|_| thread_exited())??;
        let RowUpdate {
            master,
            state,
            stored,
            rounding,
            ..
        } = update.elements(elements);
        let len = elements.end - elements.start;
        let is_rounded = self.rounded.kind() != Kind::Float;
        let rounded = is_rounded.then(|| self.rounded.narrow(0, 0, len));
        let on_host = RowUpdate {
            master: master.shallow_clone(),
            gradient: staged.narrow(0, 0, len),
            state,
            stored: rounded.as_ref().map(Tensor::shallow_clone),
            rounding,
        };
        update_rows(rule, &[on_host], scalars)?;
        // Free for the next chunk but one. The send fails only if the thread has exited.
        let _ = self.free.send(staged);
        if let Some(mut stored) = stored {
            let updated = rounded.unwrap_or(master);
            let cost = || Cost::passes(2.0, &updated);
            span("optimizer", "weights to the device", cost, || {
                tch::no_grad(|| stored.f_copy_(&updated)).map(drop)
            })?;
        }
        Ok(())
    }
}

fn thread_exited() -> Error {
    let message = "the thread that fetches gradients has exited";
    Error::Torch(torch_ext::Error::new(message))
}

/// Splits tensors of these lengths into chunks of at most `largest` elements, in order.
fn chunks(lengths: &[i64], largest: i64) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (update, &length) in lengths.iter().enumerate() {
        for start in (0..length).step_by(largest.max(1) as usize) {
            let elements = start..(start + largest).min(length);
            chunks.push(Chunk { update, elements });
        }
    }
    chunks
}

/// Fetches chunks until the optimizer is dropped or a copy fails.
fn fetch(
    mut copier: Box<dyn Copier>,
    wanted: &Receiver<Vec<Tensor>>,
    memory: &Receiver<Tensor>,
    done: &Sender<Result<Tensor, torch_ext::Error>>,
) {
    for chunk in wanted.iter().flatten() {
        let Ok(staged) = memory.recv() else { return };
        let into = staged.narrow(0, 0, chunk.numel() as i64);
        let fetched = copier.fetch(&chunk, &into);
        if done.send(fetched.map(|()| staged)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::adamw::Adamw;
    use parallel::Cpu;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn chunks_are_all_elements_in_order(
            lengths in prop::collection::vec(0..50i64, 0..20),
            largest in 1..20i64,
        ) {
            let mut seen = Vec::new();
            for Chunk { update, elements } in chunks(&lengths, largest) {
                prop_assert!(elements.end - elements.start <= largest && !elements.is_empty());
                seen.extend(elements.map(|element| (update, element)));
            }
            let mut all = Vec::new();
            for (update, &length) in lengths.iter().enumerate() {
                all.extend((0..length).map(|element| (update, element)));
            }
            prop_assert_eq!(seen, all);
        }

        #[test]
        fn chunked_updates_equal_whole_ones(
            lengths in prop::collection::vec(1..200i64, 1..6),
            largest in 1..100i64,
            bf16: bool,
            seed in 0..1000i64,
        ) {
            tch::manual_seed(seed);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let random = |length: i64| Tensor::randn([length, 1], (Kind::Float, tch::Device::Cpu));
            let begun: Vec<[Tensor; 4]> = lengths
                .iter()
                .map(|&n| [random(n), random(n), random(n), random(n).abs()])
                .collect();
            let update = |begun: &[Tensor; 4], with_stored: bool| {
                let [master, gradient, exp_avg, exp_avg_sq] = begun.each_ref().map(Tensor::copy);
                let stored = with_stored.then(|| master.to_kind(kind).copy());
                let state = vec![exp_avg, exp_avg_sq];
                RowUpdate { master, gradient, state, stored, rounding: None }
            };
            let updates = |with_stored: bool| -> Vec<RowUpdate> {
                begun.iter().map(|begun| update(begun, with_stored)).collect()
            };
            let offloaded = updates(true);
            let plain = updates(false);
            let rule = Adamw { beta1: 0.9, beta2: 0.95, weight_decay: 0.1, eps: 1e-8 };
            let offload = Offload::new(&Cpu, largest, kind).unwrap();
            for step in 1..3 {
                let scalars = StepScalars { step, lr: 1e-2, decays: true, scale: Some(2.0) };
                offload.update(&Cpu, &rule, &offloaded, scalars).unwrap();
                rule.update_rows(&plain, scalars).unwrap();
            }
            for (offloaded, plain) in offloaded.iter().zip(&plain) {
                prop_assert!(offloaded.master.equal(&plain.master));
                prop_assert_eq!(&offloaded.state, &plain.state);
                let stored = offloaded.stored.as_ref().unwrap();
                prop_assert!(stored.equal(&plain.master.to_kind(kind)));
            }
        }
    }
}
