//! CRC-32C, with the processor's vector instructions: a checksum must not cost more than the copy that it checks.

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use crc_fast::Digest;

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(Crc32Iscsi, bytes) as u32
}

/// The CRC-32C of two pieces one after the other; the second has `len` bytes.
pub(crate) fn combine(first: u32, second: u32, len: usize) -> u32 {
    crc_fast::checksum_combine(Crc32Iscsi, first.into(), second.into(), len as u64) as u32
}

/// The CRC-32C of bytes that come piece by piece.
pub(crate) struct RunningCrc(Digest);

impl RunningCrc {
    pub(crate) fn new() -> RunningCrc {
        RunningCrc(Digest::new(Crc32Iscsi))
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn value(&self) -> u32 {
        self.0.finalize() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_the_checksum_of_the_whole() {
        // The check value of CRC-32C (iSCSI, RFC 3720).
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut running = RunningCrc::new();
        running.add(b"1234");
        running.add(b"56789");
        assert_eq!(
            (
                running.value(),
                combine(crc32c(b"1234"), crc32c(b"56789"), 5)
            ),
            (0xe306_9283, 0xe306_9283)
        );
    }
}
