//! Files changed at random, for tests of what reads them back: reading one may fail, but neither
//! panics, nor hangs, nor takes memory.

use proptest::{collection::vec, prelude::*};

/// Mutations of each kind of file.
pub(crate) const MUTATIONS: u32 = 2000;

#[derive(Debug, Clone)]
enum Change {
    Flip(u8),
    Insert(u8),
    Repeat(u8),
    Remove(u8),
    CutOff,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0u8..8).prop_map(Change::Flip),
        2 => any::<u8>().prop_map(Change::Insert),
        // Characters with a meaning.
        2 => prop::sample::select(b"0-9e\"{}[],:\n #&*".to_vec()).prop_map(Change::Insert),
        1 => (1u8..32).prop_map(Change::Repeat),
        1 => (1u8..32).prop_map(Change::Remove),
        1 => Just(Change::CutOff),
    ]
}

fn apply(bytes: &mut Vec<u8>, place: usize, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let at = place % bytes.len();
    let end = |count: u8| (at + usize::from(count)).min(bytes.len());
    match *change {
        Change::Flip(bit) => bytes[at] ^= 1 << bit,
        Change::Insert(byte) => bytes.insert(at, byte),
        Change::Repeat(count) => {
            let copy = bytes[at..end(count)].to_vec();
            bytes.splice(at..at, copy);
        }
        Change::Remove(count) => drop(bytes.drain(at..end(count))),
        Change::CutOff => bytes.truncate(at),
    }
}

/// Returns `original` with one to four changes.
pub(crate) fn mutated(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    vec((any::<usize>(), change()), 1..5).prop_map(move |changes| {
        let mut bytes = original.clone();
        for (place, change) in changes {
            apply(&mut bytes, place, &change);
        }
        bytes
    })
}

mod tests {
    use super::*;
    use crate::{
        cli::ConfigArgs,
        config_file,
        protocol::{FailureKind, FailureReport},
        registry::{KeeperEntry, KeeperRegistry},
    };
    use checkpoint::keeper::Secret;
    use dataset::{
        input::InputOptions,
        prepare::{PrepareOptions, Shards, prepare},
        tokenizer::TokenizerOptions,
        tokens::{TokenFile, TokenWriter},
    };
    use std::{collections::BTreeMap, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};

    fn config() -> ProptestConfig {
        ProptestConfig::with_cases(MUTATIONS)
    }

    fn registry() -> Vec<u8> {
        let entry = |machine| KeeperEntry {
            pid: 4711,
            machine,
            address: SocketAddr::from(([127, 0, 0, 1], 4711)),
            socket: "moerun/0123456789abcdef/7-1".into(),
            identity: "machine".into(),
        };
        let registry = KeeperRegistry {
            secret: Secret::random().unwrap(),
            generation: 3,
            skipped_batches: BTreeMap::from([(17, 1)]),
            keepers: vec![entry(0), entry(1)],
            spares: 1,
        };
        serde_json::to_vec(&registry).unwrap()
    }

    fn report() -> Vec<u8> {
        let report = FailureReport {
            pid: 4711,
            at: 1_700_000_000_000_000_000,
            message: "the loss of step 17 is nan\nafter 16 steps".into(),
            kind: FailureKind::Diverged { step: 17 },
        };
        serde_json::to_vec(&report).unwrap()
    }

    /// Returns the index of five tokens of two bytes.
    fn token_index() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("text");
        let mut writer = TokenWriter::create(&prefix, 300).unwrap();
        for tokens in [&[1, 2, 3][..], &[], &[299, 5]] {
            writer.push(tokens).unwrap();
        }
        writer.finish().unwrap();
        std::fs::read(prefix.with_extension("idx")).unwrap()
    }

    const EXPERIMENT: &[u8] = b"\
run: {dir: runs/x, device: cpu}
model:
  {vocab_size: 300, hidden: 16, layers: 2, heads: 2, kv_heads: 1,
   moe: {experts: 4, top_k: 2, ffn: 8}}
data: {train: [{path: a, weight: 2.0}], sequence_length: 8}
train: {steps: 10, global_batch: 4, micro_batch: 2}
schedule: {power: {max_lr: 3e-3, warmup_steps: 2}}
";

    const SCHEDULE: &[u8] = b"\
placement: loop
chunks: 1
ranks:
  - F0 F1 BW0 BW1
  - F0 BW0 F1 BW1
";

    /// Options to prepare a few words in `folder`, with the tokenizer that is in it, if any.
    fn words_in(folder: &Path) -> PrepareOptions {
        let text = folder.join("words.txt");
        std::fs::write(&text, "one two three, one two.\n\u{e9}\u{1f980}\n").unwrap();
        let tokenizer = folder.join("tokenizer.json");
        PrepareOptions {
            inputs: vec![text.display().to_string()],
            input: InputOptions::default(),
            output: folder.join("out"),
            tokenizer: tokenizer.exists().then_some(tokenizer),
            tokenizing: TokenizerOptions::default(),
            vocab_size: 260,
            validation_fraction: 0.0,
            max_bytes: None,
            shards: Shards::One,
            part: None,
            threads: 1,
            force: true,
        }
    }

    fn tokenizer() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        prepare(&words_in(folder.path()), &mut |_| ()).unwrap();
        std::fs::read(folder.path().join("out/tokenizer.json")).unwrap()
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn schedules(text in mutated(SCHEDULE.to_vec())) {
            let folder = tempfile::tempdir().unwrap();
            let config = folder.path().join("c.yaml");
            std::fs::write(&config, EXPERIMENT).unwrap();
            let file = folder.path().join("order.yaml");
            std::fs::write(&file, text).unwrap();
            let set = vec![
                "parallel.pipeline=2".into(),
                format!("parallel.schedule={{file: {}}}", file.display()),
            ];
            let config = config_file::load(&ConfigArgs { config, set }).unwrap();
            let _ = config.problems(2);
        }

        #[test]
        fn tokenizers(text in mutated(tokenizer())) {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
            let _ = prepare(&words_in(folder.path()), &mut |_| ());
        }

        #[test]
        fn registries_of_keepers(text in mutated(registry())) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("keepers.json");
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            let _ = KeeperRegistry::load(folder.path());
        }

        #[test]
        fn reports_of_failed_ranks(text in mutated(report())) {
            let _ = serde_json::from_slice::<FailureReport>(&text);
        }

        #[test]
        fn configurations(text in mutated(EXPERIMENT.to_vec())) {
            let folder = tempfile::tempdir().unwrap();
            let config = folder.path().join("c.yaml");
            std::fs::write(&config, text).unwrap();
            let args = ConfigArgs { config, set: Vec::new() };
            if let Ok(config) = config_file::load(&args) {
                let _ = config.problems(4);
            }
        }

        #[test]
        fn indices_of_tokens(index in mutated(token_index())) {
            let folder = tempfile::tempdir().unwrap();
            let prefix = folder.path().join("text");
            std::fs::write(prefix.with_extension("idx"), index).unwrap();
            std::fs::write(prefix.with_extension("bin"), [1, 0, 2, 0, 3, 0, 43, 1, 5, 0]).unwrap();
            let is_verified = TokenFile::open_verified(&prefix).is_ok();
            let opened = TokenFile::open(&prefix);
            prop_assert!(opened.is_ok() || !is_verified);
            if let Ok(tokens) = opened {
                prop_assert!(tokens.read(0, tokens.len() as usize).is_ok());
            }
        }
    }
}
