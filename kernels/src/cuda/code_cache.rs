//! Machine code of compiled kernels on disk, so that a start does not compile.
//!
//! A file is named by the digest of the source, the options and the compiler's version. It begins
//! with the digest of the machine code. Files are written to a temporary name and renamed, so that
//! ranks that start together see whole files.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

/// Length of a digest in bytes.
const DIGEST: usize = blake3::OUT_LEN;

/// A folder of machine code, or none.
pub(super) struct CodeCache(pub(super) Option<PathBuf>);

impl CodeCache {
    /// Returns the user's cache: `kernels` in `MOERUN_CACHE`, or in `moerun` in the cache folder of
    /// the user. Without a home folder nothing is kept.
    pub(super) fn of_user() -> CodeCache {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let folder = variable("MOERUN_CACHE").map(PathBuf::from).or_else(|| {
            let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let of_home = || variable("HOME").map(|home| Path::new(&home).join(".cache"));
            caches.or_else(of_home).map(|caches| caches.join("moerun"))
        });
        CodeCache(folder.map(|folder| folder.join("kernels")))
    }

    /// Returns the machine code for what `inputs` describe: from the cache, or from `compile`.
    ///
    /// # Errors
    /// Those of `compile`. Files that are damaged or cannot be written only cause warnings.
    pub(super) fn get_or_compile(
        &self,
        inputs: &[&str],
        compile: impl FnOnce() -> Result<Vec<u8>, String>,
    ) -> Result<Vec<u8>, String> {
        let Some(folder) = &self.0 else {
            return compile();
        };
        let path = folder.join(file_name(inputs));
        if let Some(code) = read(&path) {
            return Ok(code);
        }
        let code = compile()?;
        if let Err(error) = write(folder, &path, &code) {
            tracing::warn!(
                "compiled kernels are not kept, so each start compiles them: {}: {error}",
                path.display()
            );
        }
        Ok(code)
    }
}

/// Returns the name of the file for these inputs.
fn file_name(inputs: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for input in inputs {
        // With its length: inputs must not run into each other.
        hasher.update(&(input.len() as u64).to_le_bytes());
        hasher.update(input.as_bytes());
    }
    format!("{}.cubin", hasher.finalize().to_hex())
}

/// Returns the machine code in a file, or None if the file is missing or damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!("{}: {error}: kernels are compiled again", path.display());
            return None;
        }
    };
    let is_whole = bytes
        .split_at_checked(DIGEST)
        .is_some_and(|(digest, code)| !code.is_empty() && blake3::hash(code).as_bytes() == digest);
    if !is_whole {
        tracing::warn!("{}: damaged: kernels are compiled again", path.display());
        return None;
    }
    Some(bytes.split_off(DIGEST))
}

fn write(folder: &Path, path: &Path, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = std::fs::File::create(&unfinished).and_then(|mut file| {
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)
    });
    let renamed = written.and_then(|()| std::fs::rename(&unfinished, path));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// A cache in a folder of its own, and the number of compilations.
    struct Counted {
        folder: tempfile::TempDir,
        compiled: Cell<usize>,
    }

    impl Counted {
        fn new() -> Counted {
            Counted {
                folder: tempfile::tempdir().unwrap(),
                compiled: Cell::new(0),
            }
        }

        fn get(&self, inputs: &[&str]) -> Vec<u8> {
            let cache = CodeCache(Some(self.folder.path().join("kernels")));
            let compile = || {
                self.compiled.set(self.compiled.get() + 1);
                Ok(b"machine code".to_vec())
            };
            cache.get_or_compile(inputs, compile).unwrap()
        }

        fn files(&self) -> Vec<PathBuf> {
            std::fs::read_dir(self.folder.path().join("kernels"))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect()
        }
    }

    #[test]
    fn each_input_is_compiled_once() {
        let cache = Counted::new();
        for _ in 0..2 {
            assert_eq!(cache.get(&["source", "sm_90"]), b"machine code");
        }
        assert_eq!(cache.compiled.get(), 1);
        cache.get(&["source", "sm_100"]);
        cache.get(&["sources", "m_90"]);
        assert_eq!(cache.compiled.get(), 3);
        assert_eq!(cache.files().len(), 3);
    }

    #[test]
    fn damaged_files_are_compiled_again() {
        let cache = Counted::new();
        cache.get(&["source"]);
        let path = cache.files().remove(0);
        let whole = std::fs::read(&path).unwrap();
        let flipped = |index: usize| {
            let mut bytes = whole.clone();
            bytes[index] ^= 1;
            bytes
        };
        let damaged = [
            Vec::new(),
            whole[..DIGEST].to_vec(),
            whole[..whole.len() - 1].to_vec(),
            flipped(0),
            flipped(whole.len() - 1),
        ];
        for (count, bytes) in damaged.into_iter().enumerate() {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(cache.get(&["source"]), b"machine code");
            assert_eq!(cache.compiled.get(), count + 2);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn without_a_folder_kernels_are_compiled_each_time() {
        let code = CodeCache(None).get_or_compile(&["source"], || Ok(vec![1]));
        assert_eq!(code, Ok(vec![1]));
        let file = tempfile::NamedTempFile::new().unwrap();
        let unwritable = CodeCache(Some(file.path().join("kernels")));
        assert_eq!(
            unwritable.get_or_compile(&["source"], || Ok(vec![2])),
            Ok(vec![2])
        );
        let failing = unwritable.get_or_compile(&["source"], || Err("refused".to_owned()));
        assert_eq!(failing, Err("refused".to_owned()));
    }
}
