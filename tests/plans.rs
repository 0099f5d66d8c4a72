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
        let printed = text(&output);
        let rows = printed.lines().skip(3).map_while(|line| {
            let words: Vec<String> = line.split_whitespace().map(str::to_string).collect();
            (words.len() > 10).then_some(words)
        });
        rows.collect::<Vec<_>>()
    };
    let parameters = |rows: &[Vec<String>]| {
        rows.iter()
            .map(|row| row[8].parse::<u64>().unwrap())
            .sum::<u64>()
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
        assert_eq!(rows.len().to_string(), ranks);
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
