//! The output of `moerun plan` and its errors.

use crate::fixture::{Experiment, finish, text};

#[test]
fn every_schedule_is_drawn_and_its_file_is_the_same_schedule() {
    let experiment = Experiment::new();
    let plan = |args: &[&str]| {
        let output = finish(&mut experiment.moerun(&[&["plan", "schedule"], args].concat()));
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    for schedule in [
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
        "zb-v",
        "v-half",
        "v-min",
        "dualpipe-v",
    ] {
        for vocabulary in [
            &[][..],
            &["--vocabulary", "vocab-1"],
            &["--vocabulary", "vocab-2"],
        ] {
            let args = [&[schedule, "-n", "3", "-m", "6"], vocabulary].concat();
            let drawn = plan(&args);
            assert!(
                drawn.contains("rank 2 |") && drawn.contains("microbatches held"),
                "{drawn}"
            );
        }
        let file = plan(&[schedule, "-n", "3", "-m", "6", "--yaml"]);
        std::fs::write(experiment.path("own.yaml"), file).unwrap();
        let known = plan(&[schedule, "-n", "3", "-m", "6"]);
        let own = plan(&["own.yaml", "--svg", "own.svg"]);
        assert_eq!(known.lines().next(), own.lines().next());
        let svg = std::fs::read_to_string(experiment.path("own.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }
    let broken = "placement: loop\nchunks: 1\nranks: [F0 BW0, BW0 F0]\n";
    std::fs::write(experiment.path("broken.yaml"), broken).unwrap();
    for (args, words) in [
        (vec!["broken.yaml"], "BW0"),
        (vec!["nothing"], "neither a schedule"),
        (vec!["1f1b", "--times", "1,2"], "give F,B,W"),
        (vec!["1f1b", "-n", "0"], "rank"),
    ] {
        let output = finish(&mut experiment.moerun(&[&["plan", "schedule"][..], &args].concat()));
        assert!(
            !output.status.success() && text(&output).contains(words),
            "{args:?}: {}",
            text(&output)
        );
        assert!(!text(&output).contains("panicked"), "{}", text(&output));
    }
}

/// A line of the table of `plan mesh`.
struct EqualRanks {
    ranks: String,
    count: u64,
    parameters: u64,
}

/// Reads the table, whose last eight columns are one word each.
fn table(printed: &str) -> Vec<EqualRanks> {
    let mut lines = printed
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("rank"));
    let header = lines.next().unwrap();
    let count_end = header.find("ranks").unwrap() + "ranks".len();
    let rows = lines.take_while(|line| !line.is_empty()).map(|line| {
        let (ranks, figures) = line.split_at(count_end);
        let (ranks, count) = ranks.trim().rsplit_once("  ").unwrap();
        let parameters = figures.split_whitespace().rev().nth(7).unwrap();
        EqualRanks {
            ranks: ranks.trim().to_string(),
            count: count.trim().parse().unwrap(),
            parameters: parameters.parse().unwrap(),
        }
    });
    rows.collect()
}

#[test]
fn equal_ranks_of_a_large_mesh_share_a_line() {
    let experiment = Experiment::new();
    let changes = [
        "parallel={pipeline: 2, expert: 8, zero: 1}",
        "model.moe.experts=8",
        "train.global_batch=16384",
        "train.micro_batch=1",
    ];
    let mut plan = experiment.moerun(&["plan", "mesh", "small.yaml", "-n", "16384"]);
    for change in changes {
        plan.args(["--set", change]);
    }
    let output = finish(&mut plan);
    assert!(output.status.success(), "{}", text(&output));
    let printed = text(&output);
    let rows = table(&printed);
    assert!((2..=32).contains(&rows.len()), "{printed}");
    assert_eq!(rows.iter().map(|row| row.count).sum::<u64>(), 16_384);
    assert!(rows[0].ranks.starts_with("0"), "{}", rows[0].ranks);
    assert!(printed.len() < 10_000, "{} bytes", printed.len());
}

#[test]
fn a_mesh_names_every_rank_and_shares_out_every_parameter() {
    let experiment = Experiment::new();
    let plan = |ranks: &str, parallel: &str| {
        let set = format!("parallel={parallel}");
        let output = finish(&mut experiment.moerun(&[
            "plan",
            "mesh",
            "small.yaml",
            "-n",
            ranks,
            "--set",
            &set,
        ]));
        assert!(output.status.success(), "{}", text(&output));
        table(&text(&output))
    };
    let parameters = |rows: &[EqualRanks]| -> u64 {
        let held = rows.iter().map(|row| row.count * row.parameters);
        held.sum()
    };
    let one = parameters(&plan("1", "{}"));
    for (ranks, parallel) in [
        ("2", "{pipeline: 2}"),
        ("4", "{zero: 3}"),
        ("4", "{expert: 2, zero: 1}"),
        (
            "4",
            "{pipeline: 2, tensor: 2, expert: 2, zero: 1, vocabulary: vocab-1}",
        ),
    ] {
        let rows = plan(ranks, parallel);
        let counted: u64 = rows.iter().map(|row| row.count).sum();
        assert_eq!(counted.to_string(), ranks);
        let held = parameters(&rows);
        // Every tensor rank holds the norms and routers.
        assert!(
            held >= one && held < one + one / 20,
            "{parallel}: {held} and {one}"
        );
    }
    let output = finish(&mut experiment.moerun(&["plan", "mesh", "small.yaml", "-n", "3"]));
    assert!(
        !output.status.success() && text(&output).contains("cannot run on 3 ranks"),
        "{}",
        text(&output)
    );
}
