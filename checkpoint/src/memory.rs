//! Memory that outlives the process that fills it: a memfd, mapped by the keeper and by one rank. The one room of
//! `unsafe` in this crate.

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use tch::{Device, Tensor};

/// Calls `write` with the bytes of a tensor in host memory without gaps.
///
/// # Panics
/// When it is none.
pub(crate) fn fill<T>(tensor: &Tensor, write: impl FnOnce(&mut [u8]) -> T) -> T {
    assert!(
        tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "bytes of a tensor that lies elsewhere, or apart"
    );
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return write(&mut []);
    }
    // SAFETY: so many bytes, of numbers that may have any bits, which live as long as the tensor; whoever has a tensor may write it.
    write(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), len) })
}

/// A piece of shared memory.
///
/// Two processes map it. Who may write when is settled by messages: a rank writes into a slot that the keeper has given
/// it, in order, and the keeper reads up to where the rank says that it has written. Should a process break that rule,
/// the bytes read are arbitrary, and the checksum refuses them; so bytes are only ever copied in and out.
pub struct Region {
    file: File,
    map: MmapRaw,
}

impl Region {
    /// New memory of `len` bytes, all zero and really there.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn create(name: &str, len: usize) -> io::Result<Region> {
        let file = File::from(memfd_create(
            name,
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?);
        let len = len.max(1);
        file.set_len(len as u64)?;
        // Without this a full machine would be a signal at the first write instead of an error here.
        fallocate(&file, FallocateFlags::empty(), 0, len as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Region::map(file)
    }

    /// Memory that another process made.
    ///
    /// # Errors
    /// When it could shrink under our eyes, or cannot be mapped.
    pub fn open(file: File) -> io::Result<Region> {
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "shared memory that could shrink",
            ));
        }
        Region::map(file)
    }

    fn map(file: File) -> io::Result<Region> {
        let map = MmapOptions::new().populate().map_raw(&file)?;
        Ok(Region { file, map })
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has none; never.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Copies bytes out of it.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        assert!(
            offset
                .checked_add(into.len())
                .is_some_and(|end| end <= self.len()),
            "bytes of the region"
        );
        // SAFETY: the range is inside the mapping, which lives as long as `self` and cannot shrink (it is sealed);
        // `into` is memory of this process alone.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.map.as_ptr().add(offset),
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }

    /// Copies bytes into it.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        self.write(offset, from.len(), |into| into.copy_from_slice(from));
    }

    /// Lets `fill` write `len` bytes at `offset` in place. The caller is the one who may write there now.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn write<T>(&self, offset: usize, len: usize, fill: impl FnOnce(&mut [u8]) -> T) -> T {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "bytes of the region"
        );
        // SAFETY: as in `copy_out`; the slot is this writer's until it has said that it is full, so no other reference
        // to these bytes exists in this process, and the other process does not read them yet.
        fill(unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) })
    }
}

/// Passes a file to the process at the other end.
///
/// # Errors
/// When it is gone.
pub(crate) fn send_file(stream: &UnixStream, file: &File) -> io::Result<()> {
    let files = [file.as_raw_fd()];
    let byte = [IoSlice::new(b"f")];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &byte,
        &[ControlMessage::ScmRights(&files)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Takes a file that the other process passes.
///
/// # Errors
/// When it is gone, or passes something else.
pub(crate) fn receive_file(stream: &UnixStream) -> io::Result<File> {
    let mut byte = [0u8];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut files = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
            files.extend(
                descriptors
                    .into_iter()
                    .map(|fd| unsafe { File::from_raw_fd(fd) }),
            );
        }
    }
    files.pop().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a file was to come with the message",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let region = Region::create("test", 5000).unwrap();
        let other = Region::open(region.file().try_clone().unwrap()).unwrap();
        other.copy_in(4000, b"hello");
        let mut bytes = [0u8; 5];
        region.copy_out(4000, &mut bytes);
        assert_eq!(&bytes, b"hello");
        assert!(region.file().set_len(10).is_err(), "it is sealed");
        let loose = File::from(
            memfd_create("loose", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap(),
        );
        loose.set_len(100).unwrap();
        assert!(Region::open(loose).is_err());
    }
}
