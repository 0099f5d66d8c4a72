//! The table of situations in the docs: which process fails, how and when, and the result.

use super::world::{DiskState, World};
use crate::launcher::engine::event::Source;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::{fmt::Write, path::Path, time::Duration};

/// The moment at which something happens.
#[derive(Clone, Copy)]
enum Moment {
    /// Machines have not joined yet.
    Joining,
    Starting,
    Training,
    /// A checkpoint is being written.
    Writing,
    /// A rank was just killed.
    Recovering,
    /// The run was asked to stop.
    Stopping,
}

const MOMENTS: [(Moment, &str); 6] = [
    (Moment::Joining, "machines join"),
    (Moment::Starting, "ranks start"),
    (Moment::Training, "ranks train"),
    (Moment::Writing, "a checkpoint is written"),
    (Moment::Recovering, "the run recovers from a killed rank"),
    (Moment::Stopping, "the run stops"),
];

fn reach(world: &mut World, moment: Moment) {
    let long = Duration::from_secs(30);
    let reached = match moment {
        Moment::Joining => return world.tick(),
        Moment::Starting => {
            world.join_all();
            world.run_until(long, |world| !world.ranks().is_empty())
        }
        Moment::Training => {
            world.join_all();
            world.run_until(long, |world| world.step() == 15)
        }
        Moment::Writing => {
            world.join_all();
            let reached = world.run_until(long, |world| world.step() == 20);
            world.run_until(Duration::from_millis(80), |_| false);
            reached
        }
        Moment::Recovering => {
            reach(world, Moment::Training);
            world.kill_rank(0);
            world.run_until(Duration::from_millis(60), |_| false);
            true
        }
        Moment::Stopping => {
            reach(world, Moment::Training);
            world.signal(Source::Launcher, Signal::SIGTERM, 1);
            true
        }
    };
    assert!(reached, "{:?} {:?}", world.printed, world.exit);
}

struct Happening {
    what: &'static str,
    happens: fn(&mut World),
    changes: fn() -> Value,
    /// True if the lost machine joins again after ten seconds.
    returns: bool,
}

fn none() -> Value {
    json!({})
}

fn shrinks() -> Value {
    json!({"restart": {"without_spare": "shrink"}})
}

const HAPPENINGS: [Happening; 20] = [
    Happening {
        what: "a rank is killed",
        happens: |world| world.kill_rank(1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "a keeper is killed",
        happens: |world| world.kill_keeper(1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "a keeper hangs for good",
        happens: |world| world.hang_keeper(1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "a keeper hangs, and a rank is killed",
        happens: |world| {
            world.hang_keeper(1);
            world.kill_rank(1);
        },
        changes: none,
        returns: false,
    },
    Happening {
        what: "machine 1 loses power and comes back",
        happens: |world| world.lose(1),
        changes: none,
        returns: true,
    },
    Happening {
        what: "machine 1 loses power for good",
        happens: |world| world.lose(1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "machine 1 loses power for good; `without_spare: shrink`",
        happens: |world| world.lose(1),
        changes: shrinks,
        returns: false,
    },
    Happening {
        what: "machine 1 loses power and comes back; `without_spare: shrink`",
        happens: |world| world.lose(1),
        changes: shrinks,
        returns: true,
    },
    Happening {
        what: "the agent of machine 1 is killed and started again",
        happens: |world| world.lose_agent(1),
        changes: none,
        returns: true,
    },
    Happening {
        what: "the agent of machine 1 is killed for good, its keeper stays",
        happens: |world| world.lose_agent(1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "the network of machine 1 is cut, later restored",
        happens: |world| world.cut(1),
        changes: none,
        returns: true,
    },
    Happening {
        what: "machines 1 and 2 lose power and come back",
        happens: |world| {
            world.lose(1);
            world.lose(2);
        },
        changes: none,
        returns: true,
    },
    Happening {
        what: "SIGTERM to the launcher",
        happens: |world| world.signal(Source::Launcher, Signal::SIGTERM, 1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "SIGINT to the launcher",
        happens: |world| world.signal(Source::Launcher, Signal::SIGINT, 1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "SIGINT twice to the launcher",
        happens: |world| {
            world.signal(Source::Launcher, Signal::SIGINT, 1);
            world.signal(Source::Launcher, Signal::SIGINT, 2);
        },
        changes: none,
        returns: false,
    },
    Happening {
        what: "SIGTERM to the agent of machine 1",
        happens: |world| world.signal(Source::Agent(1), Signal::SIGTERM, 1),
        changes: none,
        returns: false,
    },
    Happening {
        what: "SIGTERM to one rank",
        happens: World::signal_rank,
        changes: none,
        returns: false,
    },
    Happening {
        what: "SIGUSR1 to the launcher",
        happens: World::want_checkpoint,
        changes: none,
        returns: false,
    },
    Happening {
        what: "the disk is full",
        happens: |world| world.disk = DiskState::Full,
        changes: none,
        returns: false,
    },
    Happening {
        what: "the disk hangs for a minute",
        happens: |world| world.disk = DiskState::Hangs,
        changes: none,
        returns: false,
    },
];

/// Plays one situation. Returns its row of the table.
fn row(moment: Moment, when: &str, happening: &Happening) -> String {
    let changes = (happening.changes)();
    let mut world = World::new(3, 0, &changes);
    reach(&mut world, moment);
    let printed_before = world.printed.len();
    (happening.happens)(&mut world);
    world.run_until(Duration::from_secs(10), |world| world.exit.is_some());
    if happening.returns || matches!(moment, Moment::Joining) {
        world.run_until(Duration::from_secs(10), |world| world.exit.is_some());
        world.join_all();
    }
    world.run_until(Duration::from_secs(60), |world| world.exit.is_some());
    world.heal_disk();
    world.run_until(Duration::from_secs(300), |world| world.exit.is_some());
    let (status, problem) = world.exit.clone().unwrap_or_else(|| {
        panic!(
            "{} while {when}: no end: {}",
            happening.what,
            world.describe()
        )
    });
    assert!(world.violations.is_empty(), "{:?}", world.violations);
    let place = if world.has_keepers() {
        "memory"
    } else {
        "checkpoint"
    };
    let preserved = match world.preserved() {
        Some(step) => format!("step {step} ({place})"),
        None => "nothing was trained".into(),
    };
    let mut printed: Vec<String> = world.printed[printed_before..].to_vec();
    if let Some(problem) = problem {
        printed.push(format!("error: {}", problem.message));
    }
    printed.retain(|line| !line.starts_with("waiting for machines"));
    let printed = printed.join("<br>");
    let what = happening.what;
    format!("| {what} | {when} | {preserved} | {status} | {printed} |")
}

const HEAD: &str = "# Situations

What happens to a run on three machines of two ranks, whose state of every step is protected by
parity of one node. The run has 40 steps and a checkpoint every 10. A test plays each situation in a
simulated cluster and writes this table.

| what | when | preserved | exit status | printed |
|---|---|---|---|---|
";

#[test]
fn the_table_of_situations_is_current() {
    let mut table = HEAD.to_string();
    let mut rows = 0;
    for happening in &HAPPENINGS {
        for (moment, when) in MOMENTS {
            let _ = writeln!(table, "{}", row(moment, when, happening));
            rows += 1;
        }
    }
    assert!(rows >= 80, "{rows}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/situations.md");
    if std::env::var("MOERUN_UPDATE_SITUATIONS").is_ok() {
        std::fs::write(&path, &table).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == table,
        "{} is stale: run this test with MOERUN_UPDATE_SITUATIONS=1",
        path.display()
    );
}
