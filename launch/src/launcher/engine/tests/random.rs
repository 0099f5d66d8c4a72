//! Random sequences of faults: no state is lost while a copy survives, at most one attempt runs,
//! every wait ends, and every end has a checkpoint or says why not.

use super::world::{DiskState, World};
use crate::launcher::engine::event::Source;
use nix::sys::signal::Signal;
use proptest::{prelude::*, test_runner::RngSeed};
use serde_json::json;
use std::time::Duration;

#[derive(Debug, Clone)]
enum Fault {
    KillRank(usize),
    KillKeeper(usize),
    HangKeeper(usize),
    ContinueKeepers,
    DamageCheckpoint,
    LoseMachine(usize),
    LoseAgent(usize),
    Rejoin(usize),
    Cut(usize),
    Return(usize),
    FullDisk,
    HangingDisk,
    HealDisk,
    WantCheckpoint,
    Stop(usize),
    SignalRank,
    Relaunch,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        4 => (0usize..6).prop_map(Fault::KillRank),
        3 => (0usize..4).prop_map(Fault::KillKeeper),
        2 => (0usize..4).prop_map(Fault::HangKeeper),
        1 => Just(Fault::ContinueKeepers),
        1 => Just(Fault::DamageCheckpoint),
        2 => (1usize..3).prop_map(Fault::LoseMachine),
        1 => (1usize..3).prop_map(Fault::LoseAgent),
        1 => (1usize..3).prop_map(Fault::Rejoin),
        1 => (1usize..3).prop_map(Fault::Cut),
        4 => (1usize..3).prop_map(Fault::Return),
        1 => Just(Fault::FullDisk),
        1 => Just(Fault::HangingDisk),
        2 => Just(Fault::HealDisk),
        1 => Just(Fault::WantCheckpoint),
        1 => (0usize..3).prop_map(Fault::Stop),
        1 => Just(Fault::SignalRank),
        1 => Just(Fault::Relaunch),
    ]
}

fn apply(world: World, fault: &Fault, changes: &serde_json::Value) -> World {
    let mut world = world;
    match fault {
        Fault::KillRank(rank) => world.kill_rank(*rank),
        Fault::KillKeeper(index) => world.kill_keeper(*index),
        Fault::HangKeeper(index) => world.hang_keeper(*index),
        Fault::ContinueKeepers => world.continue_keepers(),
        Fault::DamageCheckpoint => world.damage_checkpoint(),
        Fault::LoseMachine(machine) => world.lose(*machine),
        Fault::LoseAgent(machine) => world.lose_agent(*machine),
        Fault::Rejoin(machine) => world.rejoin(*machine),
        Fault::Cut(machine) => world.cut(*machine),
        Fault::Return(machine) => world.join(*machine),
        Fault::FullDisk => world.disk = DiskState::Full,
        Fault::HangingDisk => world.disk = DiskState::Hangs,
        Fault::HealDisk => world.heal_disk(),
        Fault::WantCheckpoint => world.want_checkpoint(),
        Fault::Stop(0) => world.signal(Source::Launcher, Signal::SIGTERM, 1),
        Fault::Stop(machine) => world.signal(Source::Agent(*machine), Signal::SIGTERM, 1),
        Fault::SignalRank => world.signal_rank(),
        Fault::Relaunch => {
            world.heal_disk();
            world = world.relaunch(3, 0, changes);
            world.join_all();
        }
    }
    world
}

fn check(faults: &[(u16, Fault)], shrinks: bool) -> Result<(), TestCaseError> {
    let without_spare = if shrinks { "shrink" } else { "replace" };
    let changes = json!({"restart": {"without_spare": without_spare}});
    let mut world = World::new(3, 0, &changes);
    world.join_all();
    for (pause, fault) in faults {
        let before = world.preserved();
        let pause = Duration::from_millis(u64::from(*pause));
        world.run_until(pause, |world| world.exit.is_some());
        let preserved = world.preserved();
        // While no fault happens, nothing is lost.
        prop_assert!(
            preserved >= before,
            "{before:?} became {preserved:?}: {}",
            world.describe()
        );
        if world.exit.is_some() {
            break;
        }
        world = apply(world, fault, &changes);
    }
    check_end(&mut world)
}

/// Makes everything work again: the run must end.
fn check_end(world: &mut World) -> Result<(), TestCaseError> {
    let before = world.preserved();
    world.heal_disk();
    world.continue_keepers();
    let mut rounds = 0;
    while world.exit.is_none() && rounds < 60 {
        for machine in 1..world.machines() {
            if !world.is_joined(machine) {
                world.join(machine);
            }
        }
        world.run_until(Duration::from_secs(30), |world| world.exit.is_some());
        rounds += 1;
    }
    prop_assert!(world.violations.is_empty(), "{:?}", world.violations);
    let Some((status, problem)) = &world.exit else {
        return Err(TestCaseError::fail(format!("no end: {}", world.describe())));
    };
    let preserved = world.preserved();
    prop_assert!(
        preserved >= before,
        "at the end {before:?} became {preserved:?}: {} {problem:?}",
        world.describe()
    );
    if *status == 0 {
        prop_assert_eq!(world.checkpoints.last(), Some(&40), "{:?}", world.printed);
        prop_assert!(problem.is_none());
    }
    let reasons = [
        "no checkpoint: ",
        "is not on disk",
        "was lost with a keeper",
    ];
    let says_why = |line: &String| reasons.iter().any(|reason| line.contains(reason));
    let message = problem.iter().map(|problem| &problem.message);
    let says_why = world.printed.iter().chain(message).any(says_why);
    let has_checkpoint = !world.checkpoints.is_empty();
    prop_assert!(
        has_checkpoint || says_why || world.has_keepers(),
        "{problem:?} {:?}",
        world.printed
    );
    Ok(())
}

/// 3000 sequences, the same each time. `MOERUN_SEQUENCES=N` draws N others.
fn config() -> ProptestConfig {
    let drawn = std::env::var("MOERUN_SEQUENCES").ok();
    let drawn = drawn.map(|count| count.parse().expect("MOERUN_SEQUENCES is a number"));
    ProptestConfig {
        cases: drawn.unwrap_or(3000),
        rng_seed: drawn.map_or(RngSeed::Fixed(31), |_| RngSeed::Random),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn nothing_is_lost_and_every_wait_ends(
        faults in prop::collection::vec((0u16..4000, fault()), 1..12),
        shrinks in any::<bool>(),
    ) {
        check(&faults, shrinks)?;
    }
}

/// The second keeper was lost while the disk took no checkpoint: nothing is in memory any more.
#[test]
fn a_state_that_was_lost_is_not_said_to_be_in_memory() {
    let faults = [
        (41, Fault::LoseMachine(1)),
        (0, Fault::FullDisk),
        (4102, Fault::HangKeeper(1)),
        (4122, Fault::KillKeeper(1)),
        (661, Fault::KillKeeper(0)),
    ];
    check(&faults, true).unwrap();
}

/// A keeper hangs while another rebuilds from it, and the launcher does not know it yet.
#[test]
fn a_snapshot_is_tried_again_once_all_keepers_were_asked() {
    let faults = [
        (861, Fault::HangKeeper(2)),
        (1, Fault::Relaunch),
        (1821, Fault::Stop(0)),
        (3141, Fault::HangKeeper(0)),
        (1, Fault::ContinueKeepers),
    ];
    check(&faults, false).unwrap();
}
