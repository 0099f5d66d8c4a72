//! Runs of thousands of ranks.

use super::world::World;
use serde_json::json;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(20);

/// Returns a run whose ranks are about to start.
fn starting(machines: usize) -> World {
    let mut world = World::new(machines, 0, &json!({}));
    world.join_all();
    let is_started = world.run_until(Duration::from_secs(10), |world| {
        world.ranks().len() == 2 * machines
    });
    assert!(is_started, "{}", world.describe());
    world
}

#[test]
fn all_keepers_are_started_before_any_of_them_answers() {
    let mut world = World::new(512, 0, &json!({}));
    world.join_all();
    assert_eq!(world.now, Duration::ZERO);
    assert_eq!(world.live_keepers().len(), 512);
}

#[test]
fn a_killed_rank_is_noticed_at_once_though_a_keeper_takes_seconds() {
    let mut world = starting(512);
    let trains = world.run_until(Duration::from_secs(10), |world| world.step() >= 2);
    assert!(trains, "{}", world.describe());
    world.hang_keeper(7);
    world.run_until(Duration::from_secs(2), |_| false);
    world.kill_rank(1000);
    let ends = world.run_until(5 * TICK, |world| world.ranks().is_empty());
    assert!(ends, "{}", world.describe());
    world.run_until(Duration::from_secs(3), |_| false);
    world.continue_keepers();
    let step = world.step();
    let resumes = world.run_until(Duration::from_secs(60), |world| world.step() > step);
    assert!(
        resumes && world.violations.is_empty(),
        "{}",
        world.describe()
    );
}

/// A second of the heartbeats of 2,048 keepers. Looking at all ranks for each of them would take
/// minutes.
#[test]
fn heartbeats_of_thousands_of_keepers_take_little_work() {
    let mut world = starting(2048);
    let began = Instant::now();
    for progress in 1..=10 {
        world.now += TICK;
        world.pulse(progress);
    }
    let spent = began.elapsed();
    assert!(spent < Duration::from_secs(10), "{spent:?}");
}
