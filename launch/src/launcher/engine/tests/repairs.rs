//! Keepers that are replaced while their ranks train.

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
