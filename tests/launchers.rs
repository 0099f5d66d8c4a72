//! Ranks that mpirun, srun or torchrun started, and their errors when one of them stops.

use crate::fixture::{
    Experiment, assert_stopped_rank_is_named, curve, finish, finish_child, free_port, rank_process,
    ranks, signal, text, wait_for_step,
};
use std::time::{Duration, Instant};

#[test]
fn slurms_environment_of_two_nodes_is_enough() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(4, &["train.steps=6", "run.dir=ours"]))
            .status
            .success()
    );
    let job = free_port();
    let run = ranks(
        &experiment,
        4,
        &["train.steps=6", "run.dir=theirs"],
        |_, rank| {
            format!(
                "SLURM_PROCID={rank} SLURM_LOCALID={} SLURM_NODEID={} SLURM_STEP_ID=0 \
                 SLURM_STEP_NUM_TASKS=4 SLURM_JOB_ID={job} SLURM_STEP_TASKS_PER_NODE=2(x2) \
                 SLURM_STEP_NODELIST=127.0.0.[1-2]",
                rank % 2,
                rank / 2
            )
        },
    );
    for (rank, child) in run.into_iter().enumerate() {
        let output = finish_child(child);
        assert!(output.status.success(), "{}", text(&output));
        if rank == 0 {
            let said = text(&output);
            assert!(
                said.contains("rank 0 of 4, started by srun, backend gloo"),
                "{said}"
            );
        }
    }
    assert_eq!(curve(&experiment, "ours"), curve(&experiment, "theirs"));
}

#[test]
fn contradictions_are_refused() {
    let experiment = Experiment::new();
    let refused = |variables: &str, ranks: usize, expected: &str| {
        let mut command = experiment.train(ranks, &[]);
        for pair in variables.split_whitespace() {
            let (name, value) = pair.split_once('=').unwrap();
            command.env(name, value);
        }
        let output = finish(&mut command);
        assert!(
            !output.status.success() && text(&output).contains(expected),
            "{}",
            text(&output)
        );
    };
    let torch = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1";
    refused(
        torch,
        3,
        "-n 3, but RANK, WORLD_SIZE and MASTER_ADDR started this process as rank 0 of 2",
    );
    let both = format!("{torch} OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2");
    refused(
        &both,
        1,
        "RANK=0 and OMPI_COMM_WORLD_RANK=1 contradict each other",
    );
    refused("WORLD_SIZE=4", 1, "WORLD_SIZE=4 is set but RANK is not");
    let slurm = "SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4";
    refused(
        slurm,
        1,
        "neither SLURM_STEP_TASKS_PER_NODE nor SLURM_TASKS_PER_NODE is",
    );
    let wish = finish(&mut experiment.train(2, &["run.backend=mpi"]));
    let expected = if cfg!(feature = "mpi") {
        "were not started by MPI"
    } else {
        "built without MPI"
    };
    assert!(
        !wish.status.success() && text(&wish).contains(expected),
        "{}",
        text(&wish)
    );
}

/// Starts three ranks as torchrun does, but without a launcher that ends all when one fails.
fn three_ranks(experiment: &Experiment, backend: &str) -> Vec<std::process::Child> {
    let port = free_port();
    let backend = format!("run.backend={backend}");
    let changes = [
        "train.steps=100000",
        "run.timeout_s=6",
        "parallel.expert=3",
        "model.moe.experts=6",
        "train.global_batch=6",
    ];
    ranks(
        experiment,
        3,
        &[&changes[..], &[&backend]].concat(),
        |_, rank| {
            format!(
                "RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 \
                 MASTER_PORT={port}"
            )
        },
    )
}

#[test]
fn a_stopped_rank_is_named_over_gloo() {
    let experiment = Experiment::new();
    assert_stopped_rank_is_named(&experiment, 2, three_ranks(&experiment, "gloo"));
}

#[test]
fn a_stopped_rank_is_named_over_shared_memory() {
    let experiment = Experiment::new();
    assert_stopped_rank_is_named(&experiment, 2, three_ranks(&experiment, "auto"));
}

#[test]
fn a_killed_rank_is_noticed_in_shared_memory_long_before_the_timeout() {
    let experiment = Experiment::new();
    let run = three_ranks(&experiment, "auto");
    wait_for_step(&experiment, "run", 20);
    signal(&rank_process(&experiment, 2), "KILL");
    let killed = Instant::now();
    for (rank, child) in run.into_iter().enumerate().take(2) {
        let output = finish_child(child);
        let said = text(&output);
        assert!(
            !output.status.success() && said.contains("of the group has exited"),
            "rank {rank}: {said}"
        );
    }
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "{:.1?}",
        killed.elapsed()
    );
}

#[cfg(feature = "mpi")]
mod under_mpirun {
    use super::*;
    use crate::fixture::{assert_close, start};
    use std::process::Command;

    /// Returns `mpirun -n ranks moerun` in the experiment's folder.
    fn mpirun(experiment: &Experiment, ranks: usize, args: &[&str]) -> Command {
        let moerun = experiment.moerun(&[]);
        let mut command = Command::new(std::env::var("MOERUN_MPIRUN").unwrap_or("mpirun".into()));
        command
            .current_dir(experiment.path(""))
            .env("OMP_NUM_THREADS", "1");
        // CI may run as root, and has fewer processors than ranks.
        command.envs([
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ]);
        command
            .args(["--oversubscribe", "-n", &ranks.to_string()])
            .arg(moerun.get_program())
            .args(moerun.get_args())
            .args(args);
        command
    }

    #[test]
    fn mpi_conforms() {
        let experiment = Experiment::new();
        for ranks in [2, 3, 4, 8] {
            let output = finish(&mut mpirun(
                &experiment,
                ranks,
                &["conformance", "--backend", "mpi"],
            ));
            assert!(output.status.success(), "{ranks} ranks: {}", text(&output));
            assert_eq!(
                text(&output).matches("ok ").count(),
                20,
                "{}",
                text(&output)
            );
        }
    }

    #[test]
    fn mpirun_needs_no_option_and_changes_nothing() {
        let experiment = Experiment::new();
        let changes = ["train.steps=8", "parallel.tensor=2", "parallel.zero=2"];
        assert!(
            finish(
                experiment
                    .train(4, &changes)
                    .args(["--set", "run.dir=ours"])
            )
            .status
            .success()
        );
        let mut args = vec!["train", "small.yaml", "--set", "run.dir=theirs"];
        for change in &changes {
            args.extend(["--set", change]);
        }
        let output = finish(&mut mpirun(&experiment, 4, &args));
        assert!(output.status.success(), "{}", text(&output));
        let said = text(&output);
        assert!(
            said.contains("rank 0 of 4, started by mpirun (Open MPI), backend mpi"),
            "{said}"
        );
        let ours = curve(&experiment, "ours");
        let theirs = curve(&experiment, "theirs");
        assert_close(&ours, &theirs, 1e-5);
        // Two runs of one layout match bit for bit. A run under MPI resumes one under Gloo.
        args[3] = "run.dir=again";
        assert!(finish(&mut mpirun(&experiment, 4, &args)).status.success());
        assert_eq!(theirs, curve(&experiment, "again"));
        args[3] = "run.dir=ours";
        args.extend(["--set", "train.steps=10"]);
        let output = finish(&mut mpirun(&experiment, 4, &args));
        assert!(
            text(&output).contains("resuming from the checkpoint of step 8"),
            "{}",
            text(&output)
        );
    }

    #[test]
    fn a_stopped_rank_is_named_over_mpi() {
        let experiment = Experiment::new();
        let args = [
            "train",
            "small.yaml",
            "--set",
            "train.steps=100000",
            "--set",
            "run.timeout_s=6",
        ];
        let run = start(&mut mpirun(&experiment, 4, &args));
        assert_stopped_rank_is_named(&experiment, 2, vec![run]);
    }
}
