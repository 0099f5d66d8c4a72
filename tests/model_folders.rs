//! Runs that start from the folder of a Hugging Face model, and exports of them.

use crate::{
    agreement::{assert_same, trace_of},
    fixture::{Experiment, finish, text},
};
use dataset::tokens::TokenWriter;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use trainer::{ModelFolder, config::Config};

/// Vocabulary of the golden folders.
const VOCAB: usize = 48;
const TOKENS: usize = 4000;

fn golden(name: &str) -> PathBuf {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden/families");
    families.join(name).join("model").canonicalize().unwrap()
}

fn write_tokens(path: &Path) {
    let mut writer = TokenWriter::create(path, VOCAB).unwrap();
    let tokens: Vec<u32> = (0..TOKENS)
        .map(|number| (number * number % 47) as u32)
        .collect();
    writer.push(&tokens).unwrap();
    writer.finish().unwrap();
}

fn config(folder: &Path, model: &str, parallel: &Value) -> Config {
    let model = trainer::folder_model(&golden(model)).unwrap();
    let mut parallel = parallel.clone();
    parallel["bucket_mib"] = json!(1);
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5},
        "parallel": parallel,
        "model": model,
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 16},
        "train": {"steps": 3, "global_batch": 8, "micro_batch": 1},
        "optimizer": {"eps": 1e-4},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

#[test]
fn a_run_from_a_folder_is_the_same_in_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    write_tokens(&folder.path().join("tokens"));
    let expert_and_data = || json!({"expert": 2});
    let tensor_and_pipeline = || json!({"tensor": 2, "pipeline": 2});
    let cases = [
        ("mixtral", vec![expert_and_data(), tensor_and_pipeline()]),
        (
            "glm4_moe",
            vec![expert_and_data(), json!({"tensor": 2, "zero": 3})],
        ),
        (
            "gpt_oss",
            vec![json!({"expert": 2, "zero": 1}), tensor_and_pipeline()],
        ),
        (
            "deepseek_v3",
            vec![expert_and_data(), tensor_and_pipeline()],
        ),
        (
            "deepseek_v3-fp8",
            vec![json!({"zero": 2, "zero_group_size": 2})],
        ),
        (
            "qwen3_moe-tied",
            vec![json!({"pipeline": 2}), json!({"context": 2})],
        ),
        ("llama", vec![json!({}), tensor_and_pipeline()]),
    ];
    for (model, layouts) in cases {
        let trace =
            |ranks, parallel: &Value| trace_of(ranks, config(folder.path(), model, parallel));
        let single = trace(1, &json!({}));
        for parallel in layouts {
            let what = format!("{model}, {parallel}");
            assert_same(&what, &trace(4, &parallel), &single);
        }
    }
}

/// Returns the YAML of a run from a folder.
fn yaml(model: &Path) -> String {
    let model = model.display();
    format!(
        "run: {{dir: run, device: cpu}}\n\
         model: {{from: {model}}}\n\
         data: {{train: [{{path: tokens}}], sequence_length: 16}}\n\
         train: {{steps: 2, global_batch: 4, micro_batch: 2}}\n\
         optimizer: {{weight_decay: 0}}\n\
         schedule: {{constant: {{lr: 1.0e-30}}}}\n\
         checkpoint: {{every: 2}}\n"
    )
}

#[test]
fn a_folder_becomes_a_run_and_a_folder_again() {
    let experiment = Experiment::new();
    write_tokens(&experiment.path("tokens"));
    // Experts of two ranks are experts of one folder.
    let expert = "parallel.expert=2";
    let data = "parallel.expert=1";
    for (name, parallel) in [
        ("qwen3_moe", data),
        ("deepseek_v3-mtp", expert),
        ("gpt_oss-mxfp4", data),
        ("mixtral", expert),
    ] {
        let _ = std::fs::remove_dir_all(experiment.path("run"));
        std::fs::write(experiment.path("x.yaml"), yaml(&golden(name))).unwrap();
        let arguments = ["train", "x.yaml", "-n", "2", "--set", parallel];
        let trained = finish(&mut experiment.moerun(&arguments));
        let said = text(&trained);
        assert!(trained.status.success(), "{said}");
        assert!(said.contains("starting from the weights of"), "{said}");
        let output = experiment.path(&format!("{name}-export"));
        let output = output.to_str().unwrap();
        let arguments = ["model", "export", "--checkpoint", "run", "-o", output];
        let exported = finish(&mut experiment.moerun(&arguments));
        assert!(exported.status.success(), "{}", text(&exported));
        // With such a learning rate the weights are those of the folder.
        let before = ModelFolder::open(&golden(name)).unwrap();
        let after = ModelFolder::open(Path::new(output)).unwrap();
        assert_eq!(after.family(), before.family());
        if before.bytes_by_dtype().keys().eq(["F32"].iter()) {
            for file in std::fs::read_dir(golden(name)).unwrap() {
                let file = file.unwrap();
                let copy = std::fs::read(Path::new(output).join(file.file_name())).unwrap();
                let is_config = file.file_name() == "config.json";
                assert!(
                    is_config || copy == std::fs::read(file.path()).unwrap(),
                    "{file:?}"
                );
            }
        }
        let inspected = finish(&mut experiment.moerun(&["model", "inspect", output]));
        assert!(
            text(&inspected).contains(before.family()),
            "{}",
            text(&inspected)
        );
    }
    let arguments = [
        "generate",
        "--model",
        "qwen3_moe-export",
        "--max-tokens",
        "4",
    ];
    let generated = finish(&mut experiment.moerun(&arguments));
    assert!(generated.status.success(), "{}", text(&generated));
}

#[test]
fn wrong_folders_are_refused_before_a_rank_starts() {
    let experiment = Experiment::new();
    write_tokens(&experiment.path("tokens"));
    let text_of = |changes: &[&str]| {
        let mut arguments = vec!["config", "check", "x.yaml"];
        for change in changes {
            arguments.extend(["--set", change]);
        }
        let checked = finish(&mut experiment.moerun(&arguments));
        assert!(!checked.status.success());
        text(&checked)
    };
    std::fs::write(experiment.path("x.yaml"), yaml(&golden("mixtral"))).unwrap();
    let said = text_of(&["model.layers=3"]);
    assert!(
        said.contains("model.layers 3 is not the model of"),
        "{said}"
    );
    std::fs::write(experiment.path("x.yaml"), yaml(&golden("glm4_moe"))).unwrap();
    let mut updated = experiment.moerun(&[
        "config",
        "check",
        "x.yaml",
        "--set",
        "model.moe.bias_update_rate=0.001",
    ]);
    let updated = finish(&mut updated);
    assert!(updated.status.success(), "{}", text(&updated));
    let said = text_of(&["model.from=nowhere"]);
    assert!(said.contains("nowhere/config.json"), "{said}");
    std::fs::create_dir(experiment.path("other")).unwrap();
    let unknown = json!({"model_type": "jamba"}).to_string();
    std::fs::write(experiment.path("other/config.json"), unknown).unwrap();
    let said = text_of(&["model.from=other"]);
    assert!(said.contains("moerun does not know \"jamba\""), "{said}");
}

/// Trains from a folder and returns the losses.
fn losses(experiment: &Experiment, model: &Path) -> Vec<f64> {
    let _ = std::fs::remove_dir_all(experiment.path("run"));
    let text_of_run = yaml(model).replace("lr: 1.0e-30", "lr: 1.0e-3");
    std::fs::write(experiment.path("x.yaml"), text_of_run).unwrap();
    let arguments = ["train", "x.yaml", "-n", "2", "--set", "train.steps=20"];
    let trained = finish(&mut experiment.moerun(&arguments));
    assert!(trained.status.success(), "{}", text(&trained));
    losses_of_run(experiment)
}

fn losses_of_run(experiment: &Experiment) -> Vec<f64> {
    let lines = std::fs::read_to_string(experiment.path("run/metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64();
    lines.lines().filter_map(loss).collect()
}

#[test]
fn an_upcycled_model_continues_from_the_loss_of_the_dense_one() {
    let experiment = Experiment::new();
    write_tokens(&experiment.path("tokens"));
    let dense = golden("llama");
    let arguments = [
        "model",
        "upcycle",
        dense.to_str().unwrap(),
        "-o",
        "sparse",
        "--experts",
        "8",
        "--top-k",
        "4",
        "--granularity",
        "2",
    ];
    let made = finish(&mut experiment.moerun(&arguments));
    assert!(made.status.success(), "{}", text(&made));
    let sparse = losses(&experiment, &experiment.path("sparse"));
    let dense = losses(&experiment, &dense);
    let is_close = (sparse[0] - dense[0]).abs() < 1e-5 * dense[0];
    assert!(is_close, "{} and {}", sparse[0], dense[0]);
    assert!(sparse.last() < sparse.first(), "{sparse:?}");
}

#[test]
fn the_likelihood_of_a_text_is_the_sum_of_its_tokens() {
    let experiment = Experiment::new();
    let model = golden("qwen3_moe");
    let evaluate = |requests: &[[&str; 2]]| {
        let lines = requests.iter().map(|[context, continuation]| {
            json!({"context": context, "continuation": continuation}).to_string() + "\n"
        });
        std::fs::write(experiment.path("requests.jsonl"), lines.collect::<String>()).unwrap();
        let model = model.to_str().unwrap();
        let arguments = ["evaluate", "--model", model, "--requests", "requests.jsonl"];
        finish(&mut experiment.moerun(&arguments))
    };
    let output = evaluate(&[["a", "bc"], ["a", "b"], ["ab", "c"], ["", "a"]]);
    assert!(output.status.success(), "{}", text(&output));
    let lines = String::from_utf8(output.stdout).unwrap();
    let scores = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let scores: Vec<Value> = scores.collect();
    let likelihood = |number: usize| scores[number]["log_likelihood"].as_f64().unwrap();
    let parts = likelihood(1) + likelihood(2);
    assert!((likelihood(0) - parts).abs() < 1e-4, "{lines}");
    assert_eq!(scores[0]["tokens"], 2);
    let refused = evaluate(&[["a", "b"], ["a", ""]]);
    assert!(!refused.status.success());
    assert!(text(&refused).contains("request 2: the continuation has 0 tokens"));
    std::fs::write(experiment.path("requests.jsonl"), "{\"context\": 1}\n").unwrap();
    let arguments = [
        "evaluate",
        "--model",
        "nowhere",
        "--requests",
        "requests.jsonl",
    ];
    let refused = finish(&mut experiment.moerun(&arguments));
    assert!(
        text(&refused).contains("requests.jsonl, line 1"),
        "{}",
        text(&refused)
    );
}

#[test]
fn an_imported_checkpoint_starts_the_run_that_its_folder_does() {
    let experiment = Experiment::new();
    write_tokens(&experiment.path("tokens"));
    let model = golden("deepseek_v3");
    let expected = losses(&experiment, &model);
    std::fs::remove_dir_all(experiment.path("run")).unwrap();
    let arguments = ["model", "import", model.to_str().unwrap(), "-o", "run"];
    let imported = finish(&mut experiment.moerun(&arguments));
    assert!(imported.status.success(), "{}", text(&imported));
    let arguments = ["train", "x.yaml", "-n", "2", "--set", "train.steps=20"];
    let trained = finish(&mut experiment.moerun(&arguments));
    let said = text(&trained);
    assert!(trained.status.success(), "{said}");
    assert!(
        said.contains("resuming from the checkpoint of step 0"),
        "{said}"
    );
    assert_eq!(losses_of_run(&experiment), expected);
    let arguments = ["model", "import", model.to_str().unwrap(), "-o", "run"];
    let refused = finish(&mut experiment.moerun(&arguments));
    assert!(
        text(&refused).contains("run has files already"),
        "{}",
        text(&refused)
    );
}
