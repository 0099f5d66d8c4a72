//! Mutated manifests and shards: none panics, hangs or takes memory, and none is accepted silently.
//!
//! Prints the counts. The seed is fixed.

use checkpoint::{
    Checkpoint, Staging, TensorSlice, crc32c,
    folder::{Depth, verify},
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};
use tch::{Kind, Tensor};

/// Mutations of each kind of file.
const MUTATIONS: usize = 2000;

/// Growth of the process at most. A whole checkpoint here has some kilobytes.
const MAX_GROWTH_KIB: u64 = 64 << 10;

const SHARD: &str = "shard-00000.safetensors";

struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    fn below(&mut self, count: usize) -> usize {
        (self.0.next_u64() % count as u64) as usize
    }
}

/// Writes a checkpoint of two shards, with a tensor in four slices.
fn save(root: &Path) -> PathBuf {
    let staging = Staging::new(root, 7);
    staging.begin().unwrap();
    let matrix = Tensor::arange(48, (Kind::Float, tch::Device::Cpu)).view([6, 8]);
    let mut shards = Vec::new();
    for (rank, row) in [0, 4].into_iter().enumerate() {
        let height = if row == 0 { 4 } else { 2 };
        let mut tensors = Vec::new();
        for column in [0, 3] {
            let width = if column == 0 { 3 } else { 5 };
            let slice = TensorSlice {
                name: "matrix".into(),
                global_shape: vec![6, 8],
                offset: vec![row, column],
                shape: vec![height, width],
            };
            tensors.push((
                slice,
                matrix.narrow(0, row, height).narrow(1, column, width),
            ));
        }
        let name = format!("count-{rank}");
        tensors.push((
            TensorSlice::whole(name, &[1]),
            Tensor::from_slice(&[rank as i64]),
        ));
        shards.push(staging.write_shard(rank, tensors).unwrap());
    }
    let state = json!({"step": 7, "samples": 56, "config": {"lr": 3e-4, "names": ["a", "b"]}});
    staging.commit(shards, 3, state).unwrap()
}

/// Returns the largest size of this process so far.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.unwrap().parse().unwrap()
}

/// Changes some bytes: flips a bit, overwrites, cuts off, removes, repeats or inserts.
fn mutate_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len());
    let end = (at + 1 + random.below(16)).min(bytes.len());
    match random.below(8) {
        0..3 => bytes[at] ^= 1 << random.below(8),
        3 => bytes[at] = random.below(256) as u8,
        4 => bytes.truncate(at),
        5 => drop(bytes.drain(at..end)),
        6 => {
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        _ => bytes.insert(at, random.below(256) as u8),
    }
}

/// Collects the paths of all values inside of `value`.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_string());
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, inner)| (key.clone(), inner))
            .collect(),
        Value::Array(list) => {
            let numbered = list.iter().enumerate();
            numbered
                .map(|(index, inner)| (index.to_string(), inner))
                .collect()
        }
        _ => Vec::new(),
    };
    for (key, inner) in children {
        pointers(inner, &format!("{at}/{key}"), found);
    }
}

/// Changes one value of a JSON document, or removes it.
fn mutate_json(document: &mut Value, random: &mut Random) {
    let mut all = Vec::new();
    pointers(document, "", &mut all);
    let pointer = all.swap_remove(random.below(all.len()));
    if random.below(5) == 0
        && let Some((parent, key)) = pointer.rsplit_once('/')
    {
        match document.pointer_mut(parent) {
            Some(Value::Object(map)) => drop(map.shift_remove(key)),
            Some(Value::Array(list)) => drop(list.remove(key.parse().unwrap())),
            _ => {}
        }
        return;
    }
    let target = document.pointer_mut(&pointer).unwrap();
    *target = match random.below(12) {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(0),
        3 => json!(u64::MAX),
        4 => json!(i64::MIN),
        5 => json!(1e308),
        6 => json!("../../etc/passwd"),
        7 => json!("/dev/zero"),
        8 => json!([]),
        9 => json!(vec![1u64 << 40; 70]),
        10 => json!([target.clone(), target.clone()]),
        _ => target
            .as_i64()
            .map_or(json!({}), |number| json!(number ^ 1)),
    };
}

/// Reads every tensor that the manifest lists, as far as that is possible.
fn read_all(path: &Path) -> usize {
    let Ok(mut checkpoint) = Checkpoint::open(path) else {
        return 0;
    };
    let tensors = checkpoint.manifest().tensors.clone();
    let whole = tensors
        .iter()
        .map(|(name, entry)| TensorSlice::whole(name, &entry.shape));
    whole
        .filter(|slice| checkpoint.tensor(slice).is_ok())
        .count()
}

fn without_checksum(manifest: &[u8]) -> Value {
    let mut manifest: Value = serde_json::from_slice(manifest).unwrap();
    manifest
        .as_object_mut()
        .unwrap()
        .shift_remove("crc32c")
        .unwrap();
    manifest
}

#[test]
fn mutated_manifests_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path());
    let file = path.join("manifest.json");
    let good = std::fs::read(&file).unwrap();
    let value: Value = serde_json::from_slice(&good).unwrap();
    let mut random = Random::new(1);
    let peak = peak_kib();
    let begun = Instant::now();
    let mut same = 0;
    let mut refused = 0;
    let mut reported = 0;
    for number in 0..MUTATIONS {
        let mut bytes = good.clone();
        match number % 4 {
            0 | 1 => mutate_bytes(&mut bytes, &mut random),
            2 => {
                let mut changed = value.clone();
                mutate_json(&mut changed, &mut random);
                bytes = serde_json::to_vec(&changed).unwrap();
            }
            _ => {
                // As an earlier version wrote it: nothing but the contents can be checked.
                let mut changed = without_checksum(&good);
                mutate_json(&mut changed, &mut random);
                bytes = serde_json::to_vec(&changed).unwrap();
            }
        }
        std::fs::write(&file, &bytes).unwrap();
        read_all(&path);
        match verify(&path, Depth::Data) {
            Err(_) => refused += 1,
            Ok(verified) if verified.note.is_some() => reported += 1,
            Ok(_) => {
                let read: Value = serde_json::from_slice(&bytes).unwrap();
                assert_eq!(read, value, "mutation {number} was accepted silently");
                same += 1;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let growth = peak_kib() - peak;
    println!(
        "{MUTATIONS} manifests: {refused} refused, {reported} without a checksum reported, {same} \
         with the same contents; {growth} KiB more, {seconds:.1} s"
    );
    assert!(refused > MUTATIONS * 3 / 4 && growth < MAX_GROWTH_KIB);
}

#[test]
fn mutated_shards_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = save(root.path());
    let file = path.join(SHARD);
    let manifest = path.join("manifest.json");
    let good = std::fs::read(&file).unwrap();
    let good_manifest = std::fs::read(&manifest).unwrap();
    let header_len = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&good[8..8 + header_len]).unwrap();
    // Times of files have ticks; the commit remembered the good files.
    std::thread::sleep(std::time::Duration::from_millis(60));
    let mut random = Random::new(2);
    let peak = peak_kib();
    let begun = Instant::now();
    let mut refused = 0;
    let mut same = 0;
    let mut tensors = 0;
    for number in 0..MUTATIONS {
        let mut bytes = good.clone();
        match number % 4 {
            0 | 1 => mutate_bytes(&mut bytes, &mut random),
            2 => {
                let mut changed = header.clone();
                mutate_json(&mut changed, &mut random);
                let changed = serde_json::to_vec(&changed).unwrap();
                bytes = (changed.len() as u64).to_le_bytes().to_vec();
                bytes.extend(changed);
                bytes.extend(&good[8 + header_len..]);
            }
            _ => {
                let shift = random.below(64);
                let length = (header_len as u64) ^ (1 << shift);
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
        }
        std::fs::write(&file, &bytes).unwrap();
        std::fs::write(&manifest, &good_manifest).unwrap();
        match verify(&path, Depth::Data) {
            Err(_) => refused += 1,
            Ok(_) => {
                assert_eq!(bytes, good, "mutation {number} was accepted silently");
                same += 1;
            }
        }
        // With a manifest that is made to match, the header is read.
        let mut matching = without_checksum(&good_manifest);
        matching["files"][0]["bytes"] = json!(bytes.len());
        matching["files"][0]["crc32c"] = json!(crc32c(&bytes));
        std::fs::write(&manifest, matching.to_string()).unwrap();
        tensors += read_all(&path);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let growth = peak_kib() - peak;
    println!(
        "{MUTATIONS} shards: {refused} refused, {same} unchanged; with manifests made to match, \
         {tensors} tensors could be read; {growth} KiB more, {seconds:.1} s"
    );
    assert!(refused + same == MUTATIONS && growth < MAX_GROWTH_KIB);
}
