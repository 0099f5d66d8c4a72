//! Wrong inputs: each ends within seconds in one clear message and a non-zero status, and leaves no
//! process.

use crate::fixture::{Experiment, finish, refused};
use serde_json::Value;

/// Returns the configuration with one part of its text replaced.
fn changed(experiment: &Experiment, from: &str, to: &str) {
    let config = std::fs::read_to_string(experiment.path("small.yaml")).unwrap();
    assert!(config.contains(from));
    std::fs::write(experiment.path("small.yaml"), config.replace(from, to)).unwrap();
}

#[test]
fn configurations() {
    let experiment = Experiment::new();
    let original = std::fs::read(experiment.path("small.yaml")).unwrap();
    for (from, to, words) in [
        (
            "steps: 20",
            "stebs: 20",
            vec![
                "small.yaml",
                "line 14",
                "unknown field `stebs`",
                "did you mean steps?",
            ],
        ),
        (
            "hidden: 32",
            "hidden: wide",
            vec!["small.yaml", "line 5", "model.hidden is \"wide\""],
        ),
        (
            "constant:",
            "constnat:",
            vec!["line 15", "did you mean constant?"],
        ),
        (
            "heads: 4",
            "heads: 4\n  heads: 8",
            vec!["line 8", "duplicate"],
        ),
        (
            "vocab_size: 512",
            "# vocab_size: 512",
            vec!["missing field `vocab_size`"],
        ),
        ("run:", "run: [", vec!["small.yaml", "line"]),
        (
            "run: {dir: run,",
            "run: {bind: none, dir: run,",
            vec![
                "error: small.yaml: 1 key has a new name",
                "run.bind -> run.cpu_affinity",
                "hint: rename them",
            ],
        ),
    ] {
        changed(&experiment, from, to);
        refused(&experiment, &mut experiment.train(2, &[]), &words);
        std::fs::write(experiment.path("small.yaml"), &original).unwrap();
    }
    let mut missing = experiment.moerun(&["train", "nowhere.yaml"]);
    refused(
        &experiment,
        &mut missing,
        &["cannot open the configuration nowhere.yaml"],
    );
}

#[test]
fn snapshots_and_restarts() {
    let experiment = Experiment::new();
    for (change, words) in [
        (
            "snapshot.every=often",
            vec!["snapshot.every", "a number of steps, or auto"],
        ),
        (
            "snapshot.redundancy={copies: 1}",
            vec![
                "snapshot.redundancy: a copy on another node needs at least 2 nodes, and there is \
                 1",
            ],
        ),
        (
            "snapshot.redundancy={parity: {data: 0, parity: 1}}",
            vec!["snapshot.redundancy.parity.data is 0"],
        ),
        (
            "snapshot.memory_gib=-1",
            vec!["snapshot.memory_gib is -1; it must be above 0"],
        ),
        (
            "restart.heartbeat_timeout_s=0",
            vec!["restart.heartbeat_timeout_s is 0; it must be above 0"],
        ),
        ("restart.on_divergence=pray", vec!["pray"]),
    ] {
        refused(&experiment, &mut experiment.train(2, &[change]), &words);
    }
    for command in [
        &["snapshot", "status", "nowhere"][..],
        &["snapshot", "verify", "nowhere"],
        &["chaos", "nowhere"],
    ] {
        refused(
            &experiment,
            &mut experiment.moerun(command),
            &["nowhere has no keepers"],
        );
    }
    refused(
        &experiment,
        &mut experiment.moerun(&["plan", "survival", "--mtbf-h", "0"]),
        &["invalid value '0' for '--mtbf-h"],
    );
    refused(
        &experiment,
        &mut experiment.moerun(&["bench", "snapshot", "--case", "fast"]),
        &["--case fast: no such case"],
    );
}

#[test]
fn nodes_that_do_not_divide() {
    let experiment = Experiment::new();
    let mut train = experiment.train(
        4,
        &[
            "parallel={expert: 4, ranks_per_node: 3}",
            "model.moe={experts: 4, top_k: 2, ffn: 32, dispatch: hierarchical}",
        ],
    );
    refused(
        &experiment,
        &mut train,
        &[
            "nodes of 3 ranks do not divide the expert ranks 0..4",
            "parallel.expert",
        ],
    );
}

#[test]
fn numbers_that_do_not_divide() {
    let experiment = Experiment::new();
    for (ranks, change, words) in [
        (
            4,
            "train.global_batch=12",
            vec![
                "train.global_batch 12 is not a multiple of",
                "2 x data 4 = 8",
            ],
        ),
        (
            2,
            "model.moe.experts=5",
            vec!["model.moe.experts 5 is not a multiple of parallel.expert 2"],
        ),
        (
            2,
            "model.hidden=30",
            vec!["model.hidden 30 is not a multiple of model.heads 4"],
        ),
        (
            2,
            "model.kv_heads=3",
            vec!["model.heads 4 is not a multiple of model.kv_heads 3"],
        ),
        (
            2,
            "model.moe.top_k=9",
            vec!["model.moe.top_k 9 is more than the 4 experts"],
        ),
        (
            3,
            "train.steps=1",
            vec![
                "expert 2 x expert_tensor 1 does not divide the 3 ranks",
                "--nproc-per-node",
            ],
        ),
        (
            2,
            "parallel.data=4",
            vec![
                "= 4 ranks, but 2 were started",
                "nearest that fits: {data: 2,",
            ],
        ),
        (
            3,
            "parallel.pipeline=2",
            vec!["3 ranks are not a multiple of tensor 1", "use 2 or 4 ranks"],
        ),
        (
            3,
            "parallel={tensor: 3}",
            vec![
                "model.heads 4 is not a multiple of parallel.tensor 3",
                "divides: 2 or 4",
            ],
        ),
        (
            2,
            "parallel={context: 2, context_attention: ulysses, tensor: 1, zero: 4}",
            vec!["parallel.zero is 4"],
        ),
        (
            3,
            "parallel={context: 3}",
            vec![
                "data.sequence_length 32 is not a multiple of 6",
                "nearest: 30 or 36",
            ],
        ),
        (
            2,
            "parallel={expert_tensor: 4}",
            vec![
                "expert 1 x expert_tensor 4 does not divide the 2 ranks",
                "nearest",
            ],
        ),
        (
            2,
            "parallel={zero: 1, zero_group_size: 3}",
            vec!["data x context = 2 is not a multiple of parallel.zero_group_size 3"],
        ),
        (
            2,
            "parallel={zero_group_size: 2}",
            vec!["parallel.zero is 0: give 1, 2 or 3"],
        ),
        (
            1,
            "parallel={recompute: {layers: [5]}}",
            vec!["names layer 5; the model has 0 to 1"],
        ),
        (
            1,
            "parallel={recompute: {parts: [gelu]}}",
            vec!["unknown variant `gelu`", "norm"],
        ),
        (
            2,
            "parallel={pipeline: 2, schedule: zb-x}",
            vec!["zb-v", "v-half"],
        ),
        (
            2,
            "parallel={pipeline: 2, stage_layers: [3, 0]}",
            vec!["the model has 2 layers"],
        ),
        (
            2,
            "data.eod_token=512",
            vec!["data.eod_token 512 is outside of model.vocab_size 512"],
        ),
        (
            2,
            "optimizer.qk_clip={threshold: 0}",
            vec!["optimizer.qk_clip.threshold is 0"],
        ),
        (
            1,
            "optimizer={groups: [{roles: [norm, bias], sgd: {}}]}",
            vec!["optimizer.groups[0].roles: leave bias out: the model has no parameters"],
        ),
        (2, "train.micro_batch=0", vec!["train.micro_batch is 0"]),
        (
            2,
            "model.moe.dispatch=least",
            vec!["unknown variant `least`", "least_loaded", "hierarchical"],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, dispatch: least_loaded, least_loaded: \
             {capacity: 0.5}}",
            vec!["model.moe.least_loaded.capacity is 0.5"],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, dispatch: least_loaded, least_loaded: \
             {min_tokens: few}}",
            vec!["min_tokens", "a number of tokens, or measured"],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, least_loaded: {threshold: 2.0}}",
            vec![
                "model.moe.least_loaded has no effect",
                "use least_loaded or",
            ],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, placement: {every: 0, smoothing: 1.5}}",
            vec![
                "model.moe.placement.every is 0",
                "model.moe.placement.smoothing is 1.5",
            ],
        ),
        (
            2,
            "model.moe={experts: 6, top_k: 3, ffn: 32, router: {groups: 2, even_groups: true}}",
            vec!["model.moe.top_k 3 is not a multiple of model.moe.router.groups 2"],
        ),
        (
            2,
            "model.dense_layers=1",
            vec!["model.ffn (their inner width) is needed"],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, layers: [2]}",
            vec!["model.moe.layers names layer 2; the model has 0 to 1"],
        ),
        (
            2,
            "model.moe={experts: 4, top_k: 2, ffn: 32, layers: none}",
            vec!["model.moe.layers has none of", "leave model.moe out"],
        ),
        (
            2,
            "model={vocab_size: 512, hidden: 32, layers: 2, heads: 4, ffn: 64, moe_every: 2, \
             moe: {experts: 4, top_k: 2, ffn: 32, layers: [1]}}",
            vec![
                "model.moe.layers names",
                "moe_every 2",
                "leave those two out",
            ],
        ),
        (
            2,
            "model.rope={fraction: 0.3}",
            vec!["model.rope.fraction 0.3 of model.hidden / heads 8 is 2.4"],
        ),
        (
            2,
            "schedule={wsd: {lr: 1e-3, warmup_steps: 15, decay_steps: 10}}",
            vec!["15 + decay_steps 10 = 25 is more than"],
        ),
    ] {
        refused(&experiment, &mut experiment.train(ranks, &[change]), &words);
    }
    refused(
        &experiment,
        &mut experiment.train(0, &[]),
        &["invalid value '0' for '--nproc-per-node"],
    );
    refused(
        &experiment,
        &mut experiment.train(1, &["data.eod_token=0", "data.sequence_length=4194304"]),
        &[
            "takes a mask of 35184372088832 values",
            "ring attention",
            "data.mask_documents to false",
        ],
    );
    refused(
        &experiment,
        &mut experiment.train(2, &["train.stebs=1"]),
        &["no key stebs", "did you mean steps?"],
    );
    refused(
        &experiment,
        &mut experiment.train(2, &["run.bind=none", "run.communicator=mpi"]),
        &[
            "error: --set: 2 keys have new names",
            "run.bind -> run.cpu_affinity",
            "run.communicator -> run.backend",
        ],
    );
    refused(
        &experiment,
        &mut experiment.train(2, &["train.steps=lots"]),
        &["train.steps is \"lots\""],
    );
    refused(
        &experiment,
        &mut experiment.train(2, &["run.device=gpu"]),
        &["run.device is \"gpu\"; use auto, cpu, cuda or npu"],
    );
    let fp8 = |also: &str, words: &str| {
        refused(
            &experiment,
            &mut experiment.train(2, &["train.fp8_experts=true", also]),
            &[words],
        );
    };
    fp8(
        "train.steps=20",
        "train.fp8_experts needs train.dtype: bf16",
    );
    fp8(
        "model.moe.ffn=40",
        "each rank's part of model.moe.ffn are [32, 40]",
    );
}

#[test]
fn documents_and_loss_masks() {
    let experiment = Experiment::new();
    // A record of an earlier version, which names no tokens.
    let path = experiment.path("data/dataset.json");
    let mut info: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    info.as_object_mut().unwrap().remove("eos");
    std::fs::write(&path, info.to_string()).unwrap();
    let train = |change: &str| experiment.train(2, &[change]);
    for key in ["eod_mask_loss", "mask_documents", "reset_positions"] {
        refused(
            &experiment,
            &mut train(&format!("data.{key}=true")),
            &[&format!("data.{key} needs data.eod_token"), "give it"],
        );
    }
    refused(
        &experiment,
        &mut experiment.train(
            2,
            &[
                "data.eod_token=0",
                "data.reset_positions=true",
                "model.rope={layers: none}",
            ],
        ),
        &["data.reset_positions has no effect", "model.rope.layers"],
    );
    refused(
        &experiment,
        &mut train("data.train=[{path: data/train, mask: data/valid}]"),
        &[
            "the mask data/valid.bin has",
            "values, but data/train.bin has",
        ],
    );
    refused(
        &experiment,
        &mut train("data.validation.0.mask=data/missing"),
        &["cannot open", "data/missing.idx"],
    );
}

#[test]
fn data_files() {
    let experiment = Experiment::new();
    let train = || experiment.train(2, &[]);
    let bin = experiment.path("data/train.bin");
    let idx = experiment.path("data/train.idx");
    let tokens = std::fs::read(&bin).unwrap();
    let index = std::fs::read(&idx).unwrap();

    std::fs::write(&bin, &tokens[..tokens.len() - 7]).unwrap();
    refused(
        &experiment,
        &mut train(),
        &[
            "data/train.bin has",
            "it is truncated or belongs to another index",
        ],
    );
    std::fs::write(&bin, &tokens).unwrap();
    std::fs::write(&idx, &index[..20]).unwrap();
    refused(
        &experiment,
        &mut train(),
        &["data/train.idx is damaged: 20 bytes"],
    );
    std::fs::write(&idx, vec![b'x'; 200]).unwrap();
    refused(
        &experiment,
        &mut train(),
        &["data/train.idx is damaged", "no Megatron index"],
    );
    std::fs::remove_file(&idx).unwrap();
    refused(&experiment, &mut train(), &["cannot open data/train.idx"]);
    std::fs::write(&idx, &index).unwrap();

    let mut damaged = tokens.clone();
    damaged.fill(0xFF);
    std::fs::write(&bin, &damaged).unwrap();
    refused(
        &experiment,
        &mut train(),
        &["token 65535 at position", "outside of model.vocab_size 512"],
    );
    std::fs::write(&bin, &tokens).unwrap();
    let long = format!("data.sequence_length={}", tokens.len());
    refused(
        &experiment,
        &mut experiment.train(2, &[&long]),
        &["fewer than one sample of data.sequence_length"],
    );
    refused(
        &experiment,
        &mut experiment.train(2, &["data.train=[]"]),
        &["data.train lists no source"],
    );
}

#[test]
fn places_and_ports() {
    let experiment = Experiment::new();
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut busy = experiment.train(2, &[]);
    refused(
        &experiment,
        busy.args(["--master-port", &port]),
        &["cannot serve on port", &port, "choose another"],
    );

    std::fs::write(experiment.path("occupied"), "a file").unwrap();
    refused(
        &experiment,
        &mut experiment.train(2, &["run.dir=occupied"]),
        &["cannot read occupied/checkpoints", "Not a directory"],
    );

    let mut alone = experiment.train(1, &[]);
    refused(
        &experiment,
        alone.env("RANK", "0"),
        &["RANK is set but", "unset RANK, or set both"],
    );
    let mut beyond = experiment.train(1, &[]);
    for (name, value) in [
        ("RANK", "2"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ] {
        beyond.env(name, value);
    }
    refused(
        &experiment,
        &mut beyond,
        &["RANK=2 is not below WORLD_SIZE=2"],
    );

    if !std::path::Path::new("/dev/nvidiactl").exists() {
        refused(
            &experiment,
            &mut experiment.train(1, &["run.device=cuda", "parallel.expert=1"]),
            &["rank 0 failed", "cuda"],
        );
    }
}

#[test]
fn runs_that_do_not_fit_their_checkpoints_or_diverge() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(2, &["train.steps=5"]))
            .status
            .success()
    );
    let mut wider = experiment.train(2, &["train.steps=6", "model.hidden=64"]);
    refused(
        &experiment,
        &mut wider,
        &["model.hidden: 32 -> 64", "--accept-changes"],
    );
    let mut deeper = experiment.train(2, &["train.steps=6", "model.layers=3"]);
    refused(&experiment, &mut deeper, &["model.layers: 2 -> 3"]);
    let mut wild = experiment.train(
        2,
        &[
            "schedule={constant: {lr: 10}}",
            "optimizer.weight_decay=10",
            "train.grad_clip=0",
            "run.dir=wild",
        ],
    );
    refused(
        &experiment,
        &mut wild,
        &["the loss is", "at step", "lower the learning rate"],
    );
    refused(
        &experiment,
        &mut experiment.moerun(&["generate", "--checkpoint", "data"]),
        &["no checkpoint in data"],
    );
    let mut wrong_tokenizer = experiment.moerun(&[
        "generate",
        "--checkpoint",
        "run",
        "--tokenizer",
        "small.yaml",
    ]);
    refused(
        &experiment,
        &mut wrong_tokenizer,
        &["cannot read the tokenizer small.yaml"],
    );
}

#[test]
fn corpora() {
    let experiment = Experiment::new();
    std::fs::create_dir(experiment.path("empty")).unwrap();
    let prepare = |input: &str| {
        let mut command = experiment.moerun(&["data", "prepare", "-o", "out"]);
        command.arg(input);
        command
    };
    refused(
        &experiment,
        &mut prepare("empty"),
        &["empty: no files to read"],
    );
    refused(
        &experiment,
        &mut prepare("nowhere"),
        &["cannot open nowhere"],
    );
    refused(
        &experiment,
        prepare("small.yaml").args(["--tokenizer", "small.yaml"]),
        &["cannot use the tokenizer"],
    );
    refused(
        &experiment,
        prepare("small.yaml").args(["--vocab-size", "9"]),
        &["--vocab-size 9 is less than the 256 bytes"],
    );
    std::fs::write(experiment.path("bad.jsonl"), "not json\n").unwrap();
    refused(
        &experiment,
        &mut prepare("bad.jsonl"),
        &["bad.jsonl:1: not JSON"],
    );
    std::fs::write(experiment.path("bad.parquet"), "PAR0").unwrap();
    refused(
        &experiment,
        &mut prepare("bad.parquet"),
        &["bad.parquet: it is not a Parquet file"],
    );
}
