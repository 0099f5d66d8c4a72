//! The tensors of a folder: their files, positions, dtypes and shapes.

use crate::Error;
use checkpoint::TensorIndex;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The file of a folder with one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The list of tensors of a folder with several files.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Length of an index at most.
const MAX_INDEX_BYTES: u64 = 1 << 28;

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredTensor {
    /// Index of the file.
    pub(crate) file: usize,
    /// Position of the first byte in the file.
    pub(crate) start: u64,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

impl StoredTensor {
    /// Returns the length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().product();
        elements * self.dtype.bitsize() as u64 / 8
    }
}

/// All tensors of a folder. One rank reads it and sends it to the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TensorTable {
    pub(crate) folder: PathBuf,
    /// Names of the files in the folder.
    pub(crate) files: Vec<String>,
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorTable {
    /// Reads the headers of all files of a folder.
    ///
    /// # Errors
    /// If a file is missing, damaged or no safetensors file, or files and index contradict each
    /// other.
    pub(crate) fn read(folder: &Path) -> Result<TensorTable, Error> {
        let index = folder.join(INDEX_FILE);
        let single = folder.join(SINGLE_FILE);
        let weight_map = match (index.exists(), single.exists()) {
            (false, true) => None,
            (true, false) => Some(read_index(&index)?),
            (true, true) => {
                let weight_map = read_index(&index)?;
                if weight_map.values().any(|file| file != SINGLE_FILE) {
                    return Err(Error::Folder(format!(
                        "{} has both {SINGLE_FILE} and {INDEX_FILE} of other files, and readers \
                         differ in which they take: remove one of them",
                        folder.display()
                    )));
                }
                Some(weight_map)
            }
            (false, false) => {
                return Err(Error::Folder(format!(
                    "{} has neither {SINGLE_FILE} nor {INDEX_FILE}: name the folder of a model in \
                     the form of Hugging Face; other formats than safetensors are not read",
                    folder.display()
                )));
            }
        };
        let files: Vec<String> = match &weight_map {
            None => vec![SINGLE_FILE.to_string()],
            Some(weight_map) => {
                let names: BTreeSet<&String> = weight_map.values().collect();
                names.into_iter().cloned().collect()
            }
        };
        let headers = files.par_iter().map(|name| read_header(folder, name));
        let headers = headers.collect::<Vec<_>>();
        let mut tensors: BTreeMap<String, StoredTensor> = BTreeMap::new();
        for (file, header) in headers.into_iter().enumerate() {
            for (name, tensor) in header? {
                let path = || folder.join(&files[file]).display().to_string();
                if let Some(weight_map) = &weight_map {
                    check_index(weight_map, &name, &files[file], &path)?;
                }
                let tensor = StoredTensor { file, ..tensor };
                if let Some(other) = tensors.insert(name.clone(), tensor) {
                    return Err(Error::Folder(format!(
                        "{}: {name} is in {} too",
                        path(),
                        files[other.file]
                    )));
                }
            }
        }
        for (name, file) in weight_map.iter().flatten() {
            if !tensors.contains_key(name) {
                return Err(Error::Folder(format!(
                    "{}: {INDEX_FILE} says that it has {name}, and it does not",
                    folder.join(file).display()
                )));
            }
        }
        Ok(TensorTable {
            folder: folder.to_path_buf(),
            files,
            tensors,
        })
    }

    /// Returns the path of a tensor's file.
    pub(crate) fn path(&self, tensor: &StoredTensor) -> PathBuf {
        self.folder.join(&self.files[tensor.file])
    }

    /// Returns an error about a tensor.
    pub(crate) fn error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        let file = match self.tensors.get(name) {
            Some(tensor) => self.path(tensor),
            None => self.folder.clone(),
        };
        Error::Folder(format!("{}: {name}: {reason}", file.display()))
    }
}

fn check_index(
    weight_map: &BTreeMap<String, String>,
    name: &str,
    file: &str,
    path: &dyn Fn() -> String,
) -> Result<(), Error> {
    match weight_map.get(name) {
        Some(indexed) if indexed == file => Ok(()),
        Some(other) => Err(Error::Folder(format!(
            "{}: {name} is in this file, and {INDEX_FILE} says that it is in {other}",
            path()
        ))),
        None => Err(Error::Folder(format!(
            "{}: {name} is in this file, and {INDEX_FILE} does not list it",
            path()
        ))),
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = read_at_most(path, MAX_INDEX_BYTES)?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::Folder(format!("{}: {error}", path.display())))?;
    for (name, file) in &index.weight_map {
        let is_plain = Path::new(file)
            .file_name()
            .is_some_and(|name| name == file.as_str());
        if !is_plain {
            return Err(Error::Folder(format!(
                "{}: {name} is said to be in {file:?}, which is no file name",
                path.display()
            )));
        }
    }
    Ok(index.weight_map)
}

/// Opens a file. Anything else, such as a pipe, could block forever.
///
/// # Errors
/// If it is missing or no file.
pub(super) fn open_file(path: &Path) -> Result<File, Error> {
    let found = std::fs::metadata(path).map_err(Error::io("cannot open", path))?;
    if !found.is_file() {
        return Err(Error::Folder(format!("{} is no file", path.display())));
    }
    File::open(path).map_err(Error::io("cannot open", path))
}

/// Reads a file of at most `max` bytes.
///
/// # Errors
/// If it is missing, no file or longer.
pub(super) fn read_at_most(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let read = open_file(path)?.take(max + 1).read_to_end(&mut bytes);
    read.map_err(Error::io("cannot read", path))?;
    if bytes.len() as u64 > max {
        return Err(Error::Folder(format!(
            "{} has more than {max} bytes, too many for a file of its kind",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Returns the tensors of a file, with the file's index still 0.
fn read_header(folder: &Path, name: &str) -> Result<Vec<(String, StoredTensor)>, Error> {
    let path = folder.join(name);
    let file = open_file(&path)?;
    let index = TensorIndex::from_file(&file, &path)?;
    let tensor = |name: String| {
        let info = index.metadata().info(&name).expect("the name is from here");
        let stored = StoredTensor {
            file: 0,
            start: index.data_start() + info.data_offsets.0 as u64,
            dtype: info.dtype,
            shape: info.shape.iter().map(|&size| size as u64).collect(),
        };
        (name, stored)
    };
    let names = index.metadata().offset_keys().into_iter();
    Ok(names.map(tensor).collect())
}
