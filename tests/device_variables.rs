//! The environment in which ranks load libtorch's CUDA library, seen by a library in its place.

use crate::fixture::{Experiment, finish, free_port, text};
use std::{path::Path, process::Command};

/// Writes the environment to a file when it is loaded, as CUDA's libraries read theirs.
const LIBRARY: &str = r#"
#include <stdio.h>
#include <stdlib.h>
extern char** environ;
__attribute__((constructor)) static void tell(void) {
    FILE* file = fopen(getenv("MOERUN_TEST_TOLD"), "w");
    for (char** line = environ; *line; line++) fprintf(file, "%s\n", *line);
    fclose(file);
}
"#;

fn build_library(folder: &Path) {
    let source = folder.join("tell.c");
    std::fs::write(&source, LIBRARY).unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(folder.join("libtorch_cuda.so"))
        .arg(&source)
        .status();
    assert!(built.unwrap().success());
}

/// Returns the variables that a rank has set when it loads the library.
fn told(experiment: &Experiment, changes: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
    let file = experiment.path("told");
    let _ = std::fs::remove_file(&file);
    let mut command = experiment.train(1, &[&["run.device=cuda", "parallel={}"], changes].concat());
    command
        .env("MOERUN_TORCH_LIB", experiment.path("."))
        .env("MOERUN_TEST_TOLD", &file)
        .envs(variables.iter().copied());
    let output = finish(&mut command);
    // The library has no CUDA.
    assert!(
        text(&output).contains("GPU 0 was requested"),
        "{}",
        text(&output)
    );
    let environment = std::fs::read_to_string(&file).unwrap();
    let names = ["PYTORCH_", "CUDA_DEVICE_", "CUBLAS_"];
    let lines = environment.lines();
    let own = lines.filter(|line| names.iter().any(|name| line.starts_with(name)));
    let mut own: Vec<String> = own.map(str::to_string).collect();
    own.sort_unstable();
    own
}

#[test]
fn ranks_on_gpus_get_what_cuda_reads_when_it_is_loaded() {
    let experiment = Experiment::new();
    build_library(&experiment.path("."));
    let queues = "CUDA_DEVICE_MAX_CONNECTIONS=32";
    let allocator = "PYTORCH_ALLOC_CONF=expandable_segments:True";
    let work_areas = "CUBLAS_WORKSPACE_CONFIG=:4096:8";
    let port = free_port().to_string();
    let torchrun = [
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port.as_str()),
    ];
    for launcher in [&[][..], &[("MOERUN_FORK_SERVER", "0")], &torchrun] {
        assert_eq!(told(&experiment, &[], launcher), [queues, allocator]);
        let repeats = told(&experiment, &["run.deterministic=true"], launcher);
        assert_eq!(repeats, [work_areas, queues, allocator]);
        let own = [
            ("PYTORCH_CUDA_ALLOC_CONF", "backend:native"),
            ("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        ];
        assert_eq!(
            told(&experiment, &[], &[launcher, &own].concat()),
            [
                "CUDA_DEVICE_MAX_CONNECTIONS=1",
                "PYTORCH_CUDA_ALLOC_CONF=backend:native"
            ]
        );
    }
}
