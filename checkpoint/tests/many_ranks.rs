//! A checkpoint of 1,000 ranks: its folders, and a removal of it that is killed.

use checkpoint::{
    Checkpoint, Staging, TensorSlice,
    folder::{self, Depth},
    list, retain,
};
use serde_json::Value;
use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tch::Tensor;

const RANKS: usize = 1000;
/// Shards of a folder at most, without the manifest and folders.
const SHARDS_PER_FOLDER: usize = 256;
/// Folder of checkpoints in which the killed process removes.
const ROOT: &str = "MOERUN_TEST_RETAIN_IN";

fn slice(rank: usize) -> TensorSlice {
    TensorSlice {
        name: "w".into(),
        global_shape: vec![RANKS as i64, 2],
        offset: vec![rank as i64, 0],
        shape: vec![1, 2],
    }
}

fn save(root: &Path, step: u64) -> PathBuf {
    let staging = Staging::new(root, step);
    staging.begin().unwrap();
    let shard = |rank: usize| {
        let values = Tensor::from_slice(&[rank as f32, step as f32]).view([1, 2]);
        staging
            .write_shard(rank, vec![(slice(rank), values)])
            .unwrap()
    };
    let shards = (0..RANKS).map(shard).collect();
    staging.commit(shards, 1, Value::Null).unwrap()
}

/// Returns the number of entries of the largest folder under `path`.
fn largest_folder(path: &Path) -> usize {
    let mut count = 0;
    let mut largest = 0;
    for entry in std::fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        count += 1;
        if entry.file_type().unwrap().is_dir() {
            largest = largest.max(largest_folder(&entry.path()));
        }
    }
    largest.max(count)
}

fn verified(root: &Path) -> Vec<u64> {
    let found = folder::survey(root, Depth::Data).unwrap();
    assert_eq!(found.refused, [], "a checkpoint is complete or absent");
    found
        .verified
        .iter()
        .map(|verified| verified.step)
        .collect()
}

/// Runs in a process of its own.
#[test]
#[ignore = "another test starts and kills it"]
fn removes_all_but_the_newest() {
    let root = std::env::var_os(ROOT).expect("the folder of the test that starts this one");
    retain(Path::new(&root), 1, 20, |_| true).unwrap();
}

#[test]
fn folders_are_small_and_a_killed_removal_leaves_no_part() {
    let root = tempfile::tempdir().unwrap();
    let older = save(root.path(), 10);
    let newer = save(root.path(), 20);
    let folders = RANKS.div_ceil(SHARDS_PER_FOLDER) - 1;
    assert_eq!(largest_folder(&newer), SHARDS_PER_FOLDER + folders + 1);
    let mut checkpoint = Checkpoint::open(&newer).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!(manifest.format, 3);
    assert_eq!(
        manifest.files[700].name,
        "ranks-00512/shard-00700.safetensors"
    );
    for rank in [0, 255, 256, 999] {
        let row = checkpoint.tensor(&slice(rank)).unwrap();
        assert_eq!(row.double_value(&[0, 0]), rank as f64);
    }

    let mut removal = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "removes_all_but_the_newest"])
        .env(ROOT, root.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let removing = older.with_extension("removing");
    let begun = Instant::now();
    // It may end before this process has seen the folder that it removes.
    while !removing.exists() && removal.try_wait().unwrap().is_none() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "nothing is removed"
        );
    }
    removal.kill().unwrap();
    let ended = removal.wait().unwrap();
    assert!(ended.success() || ended.signal() == Some(9), "{ended}");
    assert!(!older.exists());
    let left = removing.exists();
    println!("killed during the removal: {left}");
    assert_eq!(verified(root.path()), [20]);
    assert_eq!(list(root.path()).unwrap(), std::slice::from_ref(&newer));
    folder::clean(root.path()).unwrap();
    // Killed before the first file, the older one is complete and gets its name back.
    let kept = verified(root.path());
    assert!(kept == [20] || kept == [20, 10], "{kept:?}");
    assert!(!removing.exists());
    // A damaged shard in a folder of shards is refused by name.
    let shard = newer.join("ranks-00512/shard-00700.safetensors");
    std::fs::write(&shard, "short").unwrap();
    let refused = folder::verify(&newer, Depth::Lengths)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("shard-00700.safetensors is damaged"),
        "{refused}"
    );
    std::fs::remove_dir_all(newer.join("ranks-00512")).unwrap();
    std::os::unix::fs::symlink(&older, newer.join("ranks-00512")).unwrap();
    let refused = folder::verify(&newer, Depth::Lengths)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("it is a symbolic link"), "{refused}");
}
