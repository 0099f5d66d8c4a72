//! Loading of libtorch's device backends into a program that is linked with its CPU libraries only.

use crate::Error;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

static LOADED: AtomicBool = AtomicBool::new(false);

/// Returns true if [`load_library`] has loaded a library.
pub(crate) fn any_loaded() -> bool {
    LOADED.load(Ordering::SeqCst)
}

/// Loads a library for the lifetime of the process.
///
/// The search tries the folder in the environment variable `variable`, the folder of the running
/// libtorch, and the loader's path, in that order.
///
/// # Errors
/// All candidates, with the loader's reason for each, and `hint`.
pub fn load_library(file: &str, variable: &str, hint: &str) -> Result<&'static Library, Error> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    let folder = std::env::var_os(variable).filter(|folder| !folder.is_empty());
    candidates.extend(folder.map(|folder| PathBuf::from(folder).join(file)));
    candidates.extend(libtorch_folder().map(|folder| folder.join(file)));
    candidates.push(file.into());
    let mut tried = Vec::new();
    for candidate in candidates {
        // SAFETY: loading runs the library's initializers, which register kernels with the
        // dispatcher. The handle is leaked, because registered kernels must stay.
        match unsafe { Library::open(Some(&candidate), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                LOADED.store(true, Ordering::SeqCst);
                return Ok(Box::leak(Box::new(library)));
            }
            Err(error) => tried.push(reason(&candidate, &error)),
        }
    }
    let tried = tried.join("; ");
    Err(Error::new(format!(
        "{file} could not be loaded: {tried}; hint: {hint}"
    )))
}

/// Returns the loader's message, which may name a missing dependency, with the candidate's path.
fn reason(candidate: &Path, error: &libloading::Error) -> String {
    let source = std::error::Error::source(error);
    let message = source.map_or(error.to_string(), |source| source.to_string());
    if message.contains(&*candidate.to_string_lossy()) {
        message
    } else {
        format!("{}: {message}", candidate.display())
    }
}

/// Returns the folder of this process's libtorch_cpu, with links resolved.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let path = PathBuf::from(&line[line.find('/')?..]);
    Some(path.canonicalize().ok()?.parent()?.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_libtorch_is_found() {
        assert!(libtorch_folder().is_some_and(|folder| folder.join("libtorch_cpu.so").exists()));
    }
}
