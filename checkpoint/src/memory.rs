//! Memory that outlives the process that fills it: a memfd, mapped by the keeper and by one rank.
//!
//! This is the only file of the crate with `unsafe` code.

use memmap2::{MmapOptions, MmapRaw};
use nix::{
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MmapAdvise, madvise},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
};
use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::net::UnixStream,
    },
    ptr::NonNull,
};
use tch::{Device, Tensor};

/// Bytes of a huge page on x86-64, and on Arm with pages of 4 KiB.
const HUGE_PAGE: usize = 2 << 20;

/// Calls `write` with the bytes of a tensor, which is contiguous and in host memory.
///
/// # Panics
/// If the tensor is on another device or not contiguous.
pub fn with_tensor_bytes<T>(tensor: &Tensor, write: impl FnOnce(&mut [u8]) -> T) -> T {
    assert!(
        tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "the tensor is not contiguous in host memory"
    );
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return write(&mut []);
    }
    // SAFETY: a contiguous tensor in host memory has `len` bytes at `data_ptr`, which live as long
    // as the tensor. Its values are numbers, for which any bits are valid. Tensors are written
    // through shared references throughout, so the caller may write this one.
    write(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), len) })
}

/// Asks the system to back a large tensor in host memory with huge pages when it is first written:
/// it takes them one by one, and would take 512 times as many small ones. This is advice, so that
/// nothing is lost where it has no effect.
pub fn advise_huge_pages(tensor: &Tensor) {
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() || len < 2 * HUGE_PAGE {
        return;
    }
    let start = tensor.data_ptr().addr();
    let first = start.next_multiple_of(HUGE_PAGE);
    let end = (start + len) / HUGE_PAGE * HUGE_PAGE;
    let Some(address) = NonNull::new(tensor.data_ptr().with_addr(first)) else {
        return;
    };
    // SAFETY: the pages from `first` to `end` are inside the tensor, and the advice changes no
    // values.
    let advised = unsafe { madvise(address, end - first, MmapAdvise::MADV_HUGEPAGE) };
    if let Err(error) = advised {
        tracing::debug!("no huge pages: {error}");
    }
}

/// A piece of memory that two processes map.
///
/// Messages decide which process may write when. The keeper gives a slot to a rank, the rank fills
/// it in order, and the keeper reads up to where the rank reports that it has written. If a process
/// breaks this rule, the bytes read are arbitrary and their checksum refuses them. Bytes are
/// therefore only copied in and out.
pub struct Region {
    file: File,
    map: MmapRaw,
}

impl Region {
    /// Allocates `len` bytes that are zero and backed by memory.
    ///
    /// # Errors
    /// If there is too little memory.
    pub fn create(name: &str, len: usize) -> io::Result<Region> {
        let file = File::from(memfd_create(
            name,
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?);
        let len = len.max(1);
        file.set_len(len as u64)?;
        // Without this, too little memory would be a signal at the first write, not an error here.
        fallocate(&file, FallocateFlags::empty(), 0, len as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Region::map(file)
    }

    /// Maps memory that another process allocated.
    ///
    /// # Errors
    /// If the memory is not sealed against shrinking, or cannot be mapped.
    pub fn open(file: File) -> io::Result<Region> {
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the shared memory is not sealed against shrinking",
            ));
        }
        Region::map(file)
    }

    fn map(file: File) -> io::Result<Region> {
        let map = MmapOptions::new().populate().map_raw(&file)?;
        Ok(Region { file, map })
    }

    /// Returns the memfd, for passing it to another process.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Always returns false: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Fills `into` with the bytes that begin at `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.check_range(offset, into.len());
        // SAFETY: the range is inside the mapping, which lives as long as `self` and is sealed
        // against shrinking. `into` is memory of this process alone.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.map.as_ptr().add(offset),
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }

    /// Copies `from` to the bytes that begin at `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        self.write(offset, from.len(), |into| into.copy_from_slice(from));
    }

    /// Calls `fill` with `len` bytes at `offset`, to write them in place. The caller has to be the
    /// one that may write there now.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn write<T>(&self, offset: usize, len: usize, fill: impl FnOnce(&mut [u8]) -> T) -> T {
        self.check_range(offset, len);
        // SAFETY: as in `copy_out`. The slot belongs to this writer until it reports that it is
        // full, so no other reference to these bytes exists in this process, and the other process
        // does not read them yet.
        fill(unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) })
    }

    fn check_range(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} are not inside the region of {}",
            self.len()
        );
    }
}

/// Passes an open file to the process at the other end.
///
/// # Errors
/// If the connection is closed.
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

/// Receives an open file from the process at the other end.
///
/// # Errors
/// If the connection is closed, or the message comes without a file.
pub(crate) fn receive_file(stream: &UnixStream) -> io::Result<File> {
    let mut byte = [0u8];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut files = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel has just created this descriptor for this process, so nothing
                // else owns it.
                files.push(unsafe { File::from_raw_fd(descriptor) });
            }
        }
    }
    files.pop().ok_or_else(|| {
        let reason = "the message came without a file";
        io::Error::new(io::ErrorKind::InvalidData, reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mapping_reads_what_another_writes() {
        let region = Region::create("test", 5000).unwrap();
        let other = Region::open(region.file().try_clone().unwrap()).unwrap();
        other.copy_in(4000, b"hello");
        let mut bytes = [0u8; 5];
        region.copy_out(4000, &mut bytes);
        assert_eq!(&bytes, b"hello");
        assert!(region.file().set_len(10).is_err(), "the region is sealed");
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let loose = File::from(memfd_create("loose", flags).unwrap());
        loose.set_len(100).unwrap();
        assert!(Region::open(loose).is_err());
    }

    #[test]
    #[should_panic(expected = "5 bytes at 4096 are not inside the region of 4100")]
    fn bytes_outside_of_a_region_are_refused() {
        let region = Region::create("test", 4100).unwrap();
        region.copy_in(4096, b"hello");
    }
}
