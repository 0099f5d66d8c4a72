//! Reading files of a run's folder, which others may have put there: nothing follows a link, waits
//! for a pipe, or reads without end.

use crate::hint::hinted;
use anyhow::{Context, Result, anyhow};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Reads a regular file of at most `max` bytes.
///
/// # Errors
/// If there is none, it cannot be read, it is a link or no regular file, or it is longer.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let (file, _) = open(path)?;
    read_all(file, max)
}

/// Reads a file that contains a secret; `None` if there is none. It must belong to this user, and
/// no other user may be able to read or write it.
///
/// # Errors
/// As [`read`], or if it belongs to another user, or others can read or write it.
pub(crate) fn read_private(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    let unreadable = || format!("cannot read {}", path.display());
    let (file, metadata) = match open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(unreadable),
    };
    let own = nix::unistd::geteuid().as_raw();
    refuse_others(path, own, metadata.uid(), metadata.mode())?;
    read_all(file, max).map(Some).with_context(unreadable)
}

fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK);
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok((file, metadata))
}

fn read_all(file: File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        let reason = format!("it is longer than {max} bytes");
        return Err(io::Error::new(ErrorKind::InvalidData, reason));
    }
    Ok(bytes)
}

/// Refuses a file by its owner and its mode.
fn refuse_others(path: &Path, own: u32, owner: u32, mode: u32) -> Result<()> {
    let path = path.display();
    let hint = "remove it: the next start writes another";
    if owner != own {
        let error = anyhow!("{path} belongs to user {owner}, and this process to user {own}");
        return Err(hinted(error, hint));
    }
    if mode & 0o077 != 0 {
        return Err(hinted(anyhow!("other users can read {path}"), hint));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::Permissions,
        os::unix::fs::{PermissionsExt, symlink},
    };

    const MAX: u64 = 100;

    fn message(path: &Path) -> String {
        format!("{:#}", read_private(path, MAX).unwrap_err())
    }

    #[test]
    fn a_secret_is_read_from_a_private_file_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert_eq!(read_private(&path, MAX).unwrap(), None);
        std::fs::write(&path, "secret").unwrap();
        for mode in [0o644, 0o640, 0o620, 0o602] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(message(&path).contains("other users can read"));
        }
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_private(&path, MAX).unwrap(), Some(b"secret".into()));
        let error = refuse_others(&path, 7, 8, 0o100_600)
            .unwrap_err()
            .to_string();
        assert!(error.contains("belongs to user 8, and this process to user 7"));
    }

    #[test]
    fn links_pipes_folders_and_endless_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "secret").unwrap();
        std::fs::set_permissions(at("file"), Permissions::from_mode(0o600)).unwrap();
        symlink(at("file"), at("link")).unwrap();
        let error = read_private(&at("link"), MAX).unwrap_err();
        assert!(error.to_string().contains("cannot read"), "{error:#}");
        // Opening a pipe without O_NONBLOCK would wait for its writer.
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(message(&at("pipe")).contains("not a regular file"));
        std::fs::create_dir(at("folder")).unwrap();
        assert!(message(&at("folder")).contains("not a regular file"));
        let long = File::options().write(true).open(at("file")).unwrap();
        long.set_len(1 << 40).unwrap();
        assert!(message(&at("file")).contains("longer than 100 bytes"));
        long.set_len(MAX).unwrap();
        assert_eq!(read(&at("file"), MAX).unwrap().len(), 100);
    }
}
