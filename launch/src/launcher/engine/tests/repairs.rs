//! Keepers that are replaced while ranks train, and requests that outlive ranks.

use super::world::World;
use crate::launcher::engine::event::Source;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;

/// Returns a run of three machines after 15 steps.
fn trained(spares: usize, changes: &Value) -> World {
    let mut world = World::new(3, spares, changes);
    world.join_all();
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() == 15));
    world
}

#[test]
fn a_keeper_that_does_not_start_is_tried_again() {
    let mut world = trained(0, &json!({"train": {"steps": 400}}));
    world.refuses_keepers = true;
    world.kill_keeper(1);
    world.run_until(Duration::from_secs(5), |_| false);
    let printed = world.printed.join("\n");
    assert!(
        printed.contains("no snapshots until node 1 has a keeper: too little memory"),
        "{printed}"
    );
    assert!(world.preserved() < Some(20), "{:?}", world.preserved());
    world.refuses_keepers = false;
    world.run_until(Duration::from_secs(32), |_| false);
    let step = world.step();
    assert!(step > 100, "training continues: {step}");
    let preserved = world.preserved();
    assert!(preserved >= Some(step - 1), "{preserved:?} of {step}");
    assert_eq!(world.restarts, 1, "the first start only");
}

#[test]
fn ranks_of_an_agent_that_joins_again_are_restarted() {
    let mut world = trained(0, &json!({}));
    world.rejoin(1);
    let ends = |world: &World| world.exit.is_some();
    assert!(world.run_until(Duration::from_secs(60), ends));
    let printed = world.printed.join("\n");
    assert!(
        printed.contains("machine 1 is gone (it joined again); resuming from the snapshot"),
        "{printed}"
    );
    assert_eq!(world.exit.map(|(status, _)| status), Some(0), "{printed}");
}

#[test]
fn a_spare_machine_that_was_lost_is_a_spare_again() {
    let mut world = trained(1, &json!({"train": {"steps": 400}}));
    world.lose(2);
    world.run_until(Duration::from_secs(3), |_| false);
    world.join(2);
    world.run_until(Duration::from_secs(3), |_| false);
    world.lose(1);
    let ends = |world: &World| world.exit.is_some();
    assert!(world.run_until(Duration::from_secs(200), ends));
    let printed = world.printed.join("\n");
    assert!(printed.contains("1 spare node took over"), "{printed}");
    assert_eq!(world.exit.map(|(status, _)| status), Some(0), "{printed}");
}

#[test]
fn a_lost_keeper_of_a_spare_machine_is_replaced() {
    let mut world = trained(1, &json!({"train": {"steps": 400}}));
    world.kill_keeper(2);
    world.run_until(Duration::from_secs(1), |_| false);
    assert_eq!(world.live_keepers().len(), 2, "not at once");
    world.run_until(Duration::from_secs(35), |_| false);
    assert_eq!(world.live_keepers().len(), 3, "{:?}", world.printed);
    assert!(world.step() > 150, "training continues: {}", world.step());
}

/// Kills a rank while keeper 1 refuses to list what it holds, and returns the world after that.
fn restarted_with_refusals(times: usize) -> World {
    let mut world = trained(0, &json!({"checkpoint": {"every": 0}}));
    let keepers = world.live_keepers();
    world.refuse_inventories(1, times);
    world.kill_rank(0);
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() > 20));
    assert_eq!(world.live_keepers(), keepers, "{:?}", world.printed);
    world
}

#[test]
fn a_keeper_that_refuses_an_answer_is_asked_again() {
    // Requests before and after the nodes were seated.
    for times in 1..=2 {
        let world = restarted_with_refusals(times);
        let printed = world.printed.join("\n");
        assert!(
            printed.contains("resuming from the snapshot of step 1"),
            "{printed}"
        );
        assert!(!printed.contains("did not list"), "{printed}");
    }
}

#[test]
fn a_keeper_that_always_refuses_is_not_replaced_and_others_have_its_parts() {
    let world = restarted_with_refusals(100);
    let printed = world.printed.join("\n");
    let rebuilt = "parts of ranks 2, 3 rebuilt from";
    assert!(printed.contains(rebuilt), "{printed}");
    let reason = "did not list what it holds: a message of 9 bytes is longer than 8";
    assert!(printed.contains(reason), "{printed}");
}

#[test]
fn a_request_for_a_checkpoint_is_answered_once() {
    let mut world = World::new(
        3,
        0,
        &json!({"checkpoint": {"every": 0}, "train": {"steps": 60}}),
    );
    world.join_all();
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() == 15));
    world.want_checkpoint();
    world.run_until(Duration::from_secs(2), |_| false);
    assert!(!world.checkpoints.is_empty());
    let asked = |world: &World| {
        let printed = world.printed.iter();
        let asked = printed.filter(|line| line.starts_with("writing a checkpoint after"));
        asked.count()
    };
    world.kill_rank(0);
    world.run_until(Duration::from_secs(2), |_| false);
    assert_eq!(asked(&world), 1);
    // The launcher asks again after a rank was killed before it answered.
    world.want_checkpoint();
    world.run_until(Duration::from_millis(20), |_| false);
    world.kill_rank(0);
    world.run_until(Duration::from_secs(2), |_| false);
    assert_eq!(asked(&world), 3, "{:?}", world.printed);
}

#[test]
fn a_checkpoint_that_was_damaged_meanwhile_does_not_count_at_the_end() {
    let mut world = World::new(3, 0, &json!({}));
    world.join_all();
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() == 26));
    assert_eq!(world.checkpoints.last(), Some(&20));
    // Of a run that was further.
    world.checkpoints.insert(30);
    world.kill_rank(0);
    assert!(world.run_until(long, |world| world.step() == 28));
    world.checkpoints.remove(&30);
    world.signal(Source::Launcher, Signal::SIGTERM, 1);
    assert!(world.run_until(long, |world| world.exit.is_some()));
    assert!(
        world.checkpoints.last() >= Some(&28),
        "{:?}",
        world.checkpoints
    );
}
