//! Keepers of an earlier launch: taken over, or ended once their state is saved.

use super::world::{DiskState, World};
use crate::launcher::engine::event::Source;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(30);

/// Returns a run of 15 steps whose launcher was killed and started again.
fn relaunched(changes: &Value) -> World {
    let mut world = World::new(3, 0, &json!({}));
    world.join_all();
    assert!(world.run_until(LONG, |world| world.step() == 15));
    let mut world = world.relaunch(3, 0, changes);
    world.join_all();
    world
}

#[test]
fn keepers_of_an_earlier_launch_end_once_their_state_is_saved() {
    let mut world = relaunched(&json!({"snapshot": {"every": 0}}));
    let earlier = world.live_keepers();
    assert_eq!(earlier.len(), 3);
    assert!(world.run_until(LONG, |world| world.step() > 15));
    let printed = world.printed.join("\n");
    let said = "keepers of an earlier launcher had step 15 in memory; wrote it to a checkpoint";
    assert!(printed.contains(said), "{printed}");
    assert!(world.checkpoints.contains(&15), "{:?}", world.checkpoints);
    let live = world.live_keepers();
    assert!(live.is_disjoint(&earlier), "{live:?} of {earlier:?}");
}

#[test]
fn keepers_that_answer_late_are_taken_over() {
    let mut world = relaunched(&json!({}));
    world.hang_keeper(1);
    world.hang_keeper(2);
    world.run_until(Duration::from_secs(7), |_| false);
    world.continue_keepers();
    assert!(world.run_until(LONG, |world| world.step() > 15));
    assert_eq!(world.starts, [15], "{:?}", world.printed);
}

#[test]
fn state_out_of_reach_is_given_up_in_words() {
    let mut world = relaunched(&json!({}));
    world.hang_keeper(1);
    world.hang_keeper(2);
    assert!(world.run_until(2 * LONG, |world| world.step() > 11));
    let printed = world.printed.join("\n");
    let given_up = "is not on disk: too many of its parts are out of reach; continuing without it";
    assert!(printed.contains(given_up), "{printed}");
}

#[test]
fn a_stop_while_an_earlier_state_is_saved_ends_the_launcher() {
    let mut world = relaunched(&json!({"snapshot": {"every": 0}}));
    world.disk = DiskState::Hangs;
    world.run_until(Duration::from_secs(2), |_| false);
    world.signal(Source::Launcher, Signal::SIGINT, 1);
    world.run_until(Duration::from_secs(2), |_| false);
    assert!(world.exit.is_none(), "it waits for the disk");
    world.signal(Source::Launcher, Signal::SIGINT, 2);
    assert!(world.run_until(LONG, |world| world.exit.is_some()));
    assert_eq!(world.exit.as_ref().map(|(status, _)| *status), Some(130));
    assert_eq!(world.live_keepers().len(), 3, "their state is still there");
}
