//! A shard that was written is read back from the disk and not from the page cache.

use checkpoint::{Staging, TensorSlice};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tch::{Device, Kind, Tensor};

const VALUES: i64 = 4 << 20;

/// Returns the bytes that this process has had read from disks.
fn bytes_from_disks() -> u64 {
    let counts = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = counts
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_shard_is_read_back_from_the_disk() {
    // Not in the temporary folder, which may be in memory.
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();

    let kind = statfs(root.path()).unwrap().filesystem_type();
    if kind == TMPFS_MAGIC {
        eprintln!("skipped: {} is in memory", root.path().display());
        return;
    }
    let staging = Staging::new(root.path(), 1);
    staging.begin().unwrap();
    let values = Tensor::zeros([VALUES], (Kind::Float, Device::Cpu));
    let slice = TensorSlice::whole("w", &[VALUES]);
    let before = bytes_from_disks();
    staging.write_shard(0, vec![(slice, values)]).unwrap();
    let read = bytes_from_disks() - before;
    println!("{read} bytes were read from the disk");
    assert!(read >= 4 * VALUES as u64, "{read}");
}
