//! Copy of a rank's tensors into a slot of the keeper's memory, chunk by chunk.

use crate::Error;
use checkpoint::keeper::{self, FillReporter, KeeperClient, Secret, SlotMemory, SnapshotId};
use parallel::{Accelerator, Copier};
use tch::Tensor;

/// Chunks per report to the keeper.
const CHUNKS_PER_REPORT: usize = 16;

/// Fills slots and reports to the keeper how far it got.
pub(crate) struct SlotWriter {
    reporter: FillReporter,
    copier: Box<dyn Copier>,
    chunk_bytes: usize,
}

/// A tensor as one row, with its place in the image.
pub(crate) struct FlatTensor {
    pub(crate) offset: u64,
    pub(crate) values: Tensor,
    pub(crate) element_bytes: usize,
}

impl FlatTensor {
    pub(crate) fn new(offset: u64, tensor: &Tensor) -> FlatTensor {
        FlatTensor {
            offset,
            values: tensor.view(-1),
            element_bytes: tensor.kind().elt_size_in_bytes(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.values.numel() * self.element_bytes) as u64
    }

    fn end(&self) -> u64 {
        self.offset + self.bytes()
    }

    /// Returns the values in the bytes from `start` to `end` of the image.
    fn narrow(&self, start: u64, end: u64) -> Tensor {
        let size = self.element_bytes as i64;
        let first = (start - self.offset) as i64 / size;
        let count = (end - start) as i64 / size;
        self.values.narrow(0, first, count)
    }
}

/// Header and tensors of a snapshot, in the order of the image.
pub(crate) struct ImageContent<'a> {
    pub(crate) header: &'a [u8],
    pub(crate) tensors: &'a [FlatTensor],
    /// Bytes of the whole image.
    pub(crate) bytes: u64,
}

impl SlotWriter {
    /// Connects to the keeper behind `socket` in the session of `client`.
    ///
    /// # Errors
    /// If the keeper cannot be reached, or the device has no memory for a copier.
    pub(crate) fn connect(
        socket: &str,
        secret: &Secret,
        client: &KeeperClient,
        chunk_bytes: usize,
        device: &dyn Accelerator,
    ) -> Result<SlotWriter, Error> {
        let reporter = FillReporter::connect(socket, secret, client).map_err(keeper_failed)?;
        Ok(SlotWriter {
            reporter,
            copier: device.copier()?,
            chunk_bytes,
        })
    }

    /// Waits until the keeper knows all that was written before. Returns true if it has this rank's
    /// part of snapshot `id`.
    pub(crate) fn is_complete(&mut self, id: SnapshotId) -> Result<bool, keeper::Error> {
        self.reporter.is_complete(id)
    }

    pub(crate) fn heartbeat(&mut self, step: u64, ticks: u64) -> Result<(), keeper::Error> {
        self.reporter.heartbeat(step, ticks)
    }

    /// Writes `content` to the slot `slot`, which is the memory `memory`.
    ///
    /// # Errors
    /// If libtorch cannot copy, or the keeper is gone.
    pub(crate) fn fill(
        &mut self,
        slot: usize,
        memory: &SlotMemory,
        content: &ImageContent,
    ) -> Result<(), Error> {
        let bytes = content.bytes;
        let chunk_bytes = self.chunk_bytes as u64;
        let chunks = bytes.div_ceil(chunk_bytes);
        let mut first = 0;
        let mut crcs = Vec::new();
        for chunk in 0..chunks {
            let start = chunk * chunk_bytes;
            let end = (start + chunk_bytes).min(bytes);
            // Tensors that lie in this chunk. The first may begin before it, the last may end
            // after it.
            let tensors = content.tensors;
            while first < tensors.len() && tensors[first].end() <= start {
                first += 1;
            }
            let in_chunk = tensors[first..]
                .iter()
                .take_while(|tensor| tensor.offset < end);
            let copier = &mut self.copier;
            let crc = memory.write(start as usize, (end - start) as usize, |into| {
                let header = content.header.get(start as usize..).unwrap_or_default();
                let header = &header[..header.len().min(into.len())];
                into[..header.len()].copy_from_slice(header);
                for tensor in in_chunk {
                    let from = start.max(tensor.offset);
                    let to = end.min(tensor.end());
                    let bytes = &mut into[(from - start) as usize..(to - start) as usize];
                    copier.copy(&tensor.narrow(from, to), bytes)?;
                }
                // The chunk is still in the cache.
                Ok::<u32, torch_ext::Error>(checkpoint::crc32c(into))
            });
            crcs.push(crc?);
            if crcs.len() == CHUNKS_PER_REPORT || chunk + 1 == chunks {
                let crcs = std::mem::take(&mut crcs);
                self.reporter
                    .filled(slot, end, crcs)
                    .map_err(keeper_failed)?;
            }
        }
        Ok(())
    }
}

/// Returns the error of a rank whose keeper failed.
pub(crate) fn keeper_failed(error: keeper::Error) -> Error {
    Error::keeper("the keeper of this node")(error)
}
