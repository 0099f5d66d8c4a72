//! Simulates every pipeline schedule on four ranks and compares step time, bubble and memory.

use anyhow::{Result, anyhow};
use parallel::pipeline::check::check;
use parallel::pipeline::communication::with_communication;
use parallel::pipeline::schedules::ScheduleKind;
use parallel::pipeline::simulate::{Costs, Timeline, simulate};

const RANKS: usize = 4;
const MICROBATCHES: usize = 8;

fn main() -> Result<()> {
    println!("{RANKS} ranks, {MICROBATCHES} microbatches; F, B and W of a rank take 1 each");
    println!(
        "{:<12} {:>6} {:>7} {:>17}",
        "schedule", "step", "bubble", "microbatches held"
    );
    for (kind, name) in ScheduleKind::NAMES {
        let timeline = simulated(kind)?;
        let held = timeline
            .peak_microbatches
            .iter()
            .copied()
            .fold(0.0, f64::max);
        let total = timeline.total;
        println!(
            "{name:<12} {total:>6.2} {:>7.2} {held:>17.2}",
            timeline.bubble()
        );
    }
    Ok(())
}

/// Returns the timeline of a schedule whose ranks need one unit of time for each of F, B and W.
fn simulated(kind: ScheduleKind) -> Result<Timeline> {
    let order = kind
        .order(RANKS, MICROBATCHES, None)
        .map_err(|error| anyhow!(error))?;
    // The stages of a rank share its time.
    let time = 1.0 / order.chunks as f64;
    let costs = Costs::uniform(order.stages(), time, time, time);
    let schedule = with_communication(order);
    check(&schedule)?;
    Ok(simulate(&schedule, &costs))
}

#[test]
fn zero_bubble_schedules_beat_1f1b() {
    let bubble = |kind| simulated(kind).unwrap().bubble();
    assert!(bubble(ScheduleKind::ZbV) < bubble(ScheduleKind::ZbH1));
    assert!(bubble(ScheduleKind::ZbH1) < bubble(ScheduleKind::OneFOneB));
}
