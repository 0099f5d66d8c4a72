//! Loading device backends of libtorch into a program that was linked against its CPU libraries only.

use crate::Error;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

static LOADED: AtomicBool = AtomicBool::new(false);

/// Whether [`load_library`] has loaded one.
pub(crate) fn any_loaded() -> bool {
    LOADED.load(Ordering::SeqCst)
}

/// Loads `file` for good: from the folder that `variable` names, from beside the libtorch this program runs on, or from the
/// loader's path, in that order.
///
/// # Errors
/// Every place that was tried, with the loader's reason, and `remedy`.
pub fn load_library(file: &str, variable: &str, remedy: &str) -> Result<&'static Library, Error> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    let folder = std::env::var_os(variable).filter(|folder| !folder.is_empty());
    candidates.extend(folder.map(|folder| PathBuf::from(folder).join(file)));
    candidates.extend(folder_of_libtorch().map(|folder| folder.join(file)));
    candidates.push(file.into());
    let mut tried = Vec::new();
    for candidate in candidates {
        // SAFETY: loading runs the library's initialisers, which register kernels with the dispatcher; the handle
        // is leaked on purpose, since registered kernels must stay.
        match unsafe { Library::open(Some(&candidate), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                LOADED.store(true, Ordering::SeqCst);
                return Ok(Box::leak(Box::new(library)));
            }
            Err(error) => tried.push(reason(&candidate, &error)),
        }
    }
    Err(Error::new(format!(
        "{file} could not be loaded ({}). {remedy}",
        tried.join("; ")
    )))
}

/// The loader's own words: it names the file that is missing, which may be one that the library needs.
fn reason(candidate: &Path, error: &libloading::Error) -> String {
    let words =
        std::error::Error::source(error).map_or(error.to_string(), |source| source.to_string());
    if words.contains(&*candidate.to_string_lossy()) {
        words
    } else {
        format!("{}: {words}", candidate.display())
    }
}

/// The real folder of the libtorch_cpu this process runs on, links resolved.
fn folder_of_libtorch() -> Option<PathBuf> {
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
    fn libtorchs_folder_is_found() {
        assert!(folder_of_libtorch().is_some_and(|folder| folder.join("libtorch_cpu.so").exists()));
    }
}
