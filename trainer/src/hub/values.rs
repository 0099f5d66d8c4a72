//! The values of a model's tensors, from a checkpoint or from a folder.

use super::reader::FolderReader;
use crate::Error;
use checkpoint::{Checkpoint, TensorSlice};
use parking_lot::Mutex;
use std::path::PathBuf;
use tch::{Device, Tensor};

/// A source of values, which several threads read.
pub(crate) trait ModelValues: Sync {
    /// Returns a slice of a tensor in host memory, in the dtype that it is stored in. Quantized
    /// values are in fp32.
    ///
    /// # Errors
    /// If there is no such tensor, or a file cannot be read.
    fn values(&self, slice: &TensorSlice, is_selection_bias: bool) -> Result<Tensor, Error>;
}

/// A checkpoint, which each thread that reads opens once.
pub(crate) struct CheckpointValues {
    path: PathBuf,
    manifest: Vec<u8>,
    free: Mutex<Vec<Checkpoint>>,
}

impl CheckpointValues {
    /// Reads the manifest of a checkpoint.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn new(path: PathBuf) -> Result<CheckpointValues, Error> {
        Ok(CheckpointValues {
            manifest: Checkpoint::manifest_text(&path)?,
            path,
            free: Mutex::new(Vec::new()),
        })
    }
}

impl ModelValues for CheckpointValues {
    fn values(&self, slice: &TensorSlice, is_selection_bias: bool) -> Result<Tensor, Error> {
        let free = self.free.lock().pop();
        let mut checkpoint = match free {
            Some(checkpoint) => checkpoint,
            None => Checkpoint::with_manifest(&self.path, &self.manifest)?,
        };
        let name = crate::train::saved_config::saved_name(&slice.name, is_selection_bias);
        let values = checkpoint.tensor(&TensorSlice {
            name,
            ..slice.clone()
        });
        self.free.lock().push(checkpoint);
        Ok(values?)
    }
}

impl ModelValues for FolderReader {
    fn values(&self, slice: &TensorSlice, _is_selection_bias: bool) -> Result<Tensor, Error> {
        let options = (self.kind(&slice.name), Device::Cpu);
        let values = Tensor::empty(slice.shape.as_slice(), options);
        self.read_into(slice, &values)?;
        Ok(values)
    }
}
