//! Time to copy a rank's state into a keeper's memory, for `moerun bench snapshot`.

use crate::{
    Error,
    train::{
        slot_writer::{FlatTensor, ImageContent, SlotWriter},
        snapshots::{KeeperAccess, SLOTS},
    },
};
use checkpoint::keeper::{self, KeeperClient, SlotMemory, SnapshotId};
use parallel::Accelerator;
use std::time::Instant;
use tch::{Kind, Tensor};

/// Tensors in which the state is split.
const TENSORS: i64 = 16;
const FP32_BYTES: i64 = 4;

/// A state of a given size and a keeper to copy it to. Serves benchmarks only.
pub struct CopyTimer {
    client: KeeperClient,
    writer: SlotWriter,
    slots: Vec<SlotMemory>,
    tensors: Vec<Tensor>,
}

impl CopyTimer {
    /// Creates a state of `mib` MiB in 16 tensors, and connects to the keeper.
    ///
    /// # Errors
    /// If the keeper cannot be reached, or has too little memory.
    pub fn new(
        access: KeeperAccess,
        device: &dyn Accelerator,
        mib: usize,
    ) -> Result<CopyTimer, Error> {
        let KeeperAccess {
            socket,
            secret,
            chunk,
            ..
        } = &access;
        let mut client = KeeperClient::connect(socket, secret, 0).map_err(keeper_error)?;
        let writer = SlotWriter::connect(socket, secret, &client, *chunk, device)?;
        let bytes = (mib as i64) << 20;
        let slots = client.allocate(bytes as u64, SLOTS).map_err(keeper_error)?;
        let values = bytes / (TENSORS * FP32_BYTES);
        let tensors = (0..TENSORS)
            .map(|value| device.zeros(&[values], Kind::Float) + value)
            .collect();
        Ok(CopyTimer {
            client,
            writer,
            slots,
            tensors,
        })
    }

    /// Copies the state as the snapshot of step `step` and returns the seconds that it took.
    ///
    /// # Errors
    /// If the keeper has no free slot because earlier snapshots were not committed.
    pub fn copy(&mut self, step: u64) -> Result<f64, Error> {
        let mut bytes = 0;
        let mut tensors = Vec::new();
        for tensor in &self.tensors {
            let flat = FlatTensor::new(bytes, tensor);
            bytes += flat.bytes();
            tensors.push(flat);
        }
        let id = SnapshotId {
            generation: 1,
            step,
        };
        let slot = self
            .client
            .reserve(id, bytes, false)
            .map_err(keeper_error)?;
        let slot = slot.ok_or_else(|| Error::Keeper("the keeper has no free slot".into()))?;
        let content = ImageContent {
            header: &[],
            tensors: &tensors,
            bytes,
        };
        let begun = Instant::now();
        self.writer.fill(slot, &self.slots[slot], &content)?;
        let seconds = begun.elapsed().as_secs_f64();
        // The next copy begins when the keeper knows all of this one.
        self.writer.is_complete(id).map_err(keeper_error)?;
        self.client.release(slot).map_err(keeper_error)?;
        Ok(seconds)
    }
}

fn keeper_error(error: keeper::Error) -> Error {
    Error::keeper("the keeper")(error)
}
