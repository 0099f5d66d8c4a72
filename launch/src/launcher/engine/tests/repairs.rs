//! Keepers that are replaced while their ranks train, and keepers that a run no longer needs.

use super::world::World;
use serde_json::json;
use std::time::Duration;

#[test]
fn a_keeper_that_does_not_start_is_tried_again() {
    let mut world = World::new(3, 0, &json!({"train": {"steps": 400}}));
    world.join_all();
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() == 15));
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
fn keepers_of_an_earlier_launch_end_once_their_state_is_saved() {
    let mut world = World::new(3, 0, &json!({}));
    world.join_all();
    let long = Duration::from_secs(30);
    assert!(world.run_until(long, |world| world.step() == 15));
    let earlier = world.live_keepers();
    assert_eq!(earlier.len(), 3);
    let mut world = world.relaunch(3, 0, &json!({"snapshot": {"every": 0}}));
    world.join_all();
    assert!(world.run_until(long, |world| world.step() > 15));
    let printed = world.printed.join("\n");
    let said = "keepers of an earlier launcher had step 15 in memory; wrote it to a checkpoint";
    assert!(printed.contains(said), "{printed}");
    assert!(world.checkpoints.contains(&15), "{:?}", world.checkpoints);
    let live = world.live_keepers();
    assert!(live.is_disjoint(&earlier), "{live:?} of {earlier:?}");
}
