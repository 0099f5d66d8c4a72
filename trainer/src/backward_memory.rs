//! The most memory that the backward of a microbatch needs besides what forward saved, from the
//! tensors of each unit and the buckets of gradients that are open while it runs.

/// A part of a rank's model whose weights are gathered together. Units are in the order of forward.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct UnitMemory {
    /// Number of the stage on this rank that has the layer; `None` for other units.
    pub(crate) stage: Option<usize>,
    /// Bytes that forward saves and that the unit's backward frees.
    pub(crate) saved: u64,
    /// Bytes of temporary tensors of its backward.
    pub(crate) transient: u64,
    /// Bytes of its weights, if backward gathers them.
    pub(crate) gathered: u64,
    /// Bytes of a gather that has started: the rows of all ranks, and those that this one sends.
    pub(crate) arriving: u64,
}

/// A bucket of gradients that ranks shard.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BucketMemory {
    /// Lowest unit of its members, whose backward completes it.
    pub(crate) first: usize,
    /// Highest unit of its members, whose backward opens it.
    pub(crate) last: usize,
    /// Bytes of its buffer, if that exists only while the bucket is open.
    pub(crate) open: u64,
    /// Bytes of a reduction: the rows of each rank, and those that this rank receives.
    pub(crate) reduction: u64,
}

/// Returns the most bytes that exist at once during backward, above what forward saved. At most
/// `max_reductions` buckets are reduced at once.
pub(crate) fn peak(units: &[UnitMemory], buckets: &[BucketMemory], max_reductions: usize) -> u64 {
    let mut peak = 0;
    let mut freed = 0;
    let mut stage = None;
    for (number, unit) in units.iter().enumerate().rev() {
        // Other stages run backward at other times.
        if stage.is_some() && unit.stage.is_some() && stage != unit.stage {
            freed = 0;
        }
        stage = unit.stage.or(stage);
        let above_saved = bytes_during(units, buckets, number, max_reductions);
        peak = peak.max(above_saved.saturating_sub(freed));
        freed += unit.saved;
    }
    peak
}

/// Returns the bytes during the backward of unit `number`: with its temporary tensors, or after it
/// has freed them, when its gradients are complete and a bucket is packed for the reduction.
fn bytes_during(
    units: &[UnitMemory],
    buckets: &[BucketMemory],
    number: usize,
    max_reductions: usize,
) -> u64 {
    let unit = &units[number];
    let previous = number.checked_sub(1).map(|previous| &units[previous]);
    let is_same_stage = |other: &&UnitMemory| unit.stage.is_some() && other.stage == unit.stage;
    let arriving = previous.filter(is_same_stage);
    let weights = unit.gathered + arriving.map_or(0, |previous| previous.arriving);
    let is_open = |bucket: &&BucketMemory| (bucket.first..=bucket.last).contains(&number);
    let open: u64 = buckets
        .iter()
        .filter(is_open)
        .map(|bucket| bucket.open)
        .sum();
    // The latest come first.
    let mut complete: Vec<&BucketMemory> = buckets.iter().filter(|b| b.first > number).collect();
    complete.sort_by_key(|bucket| bucket.first);
    let reductions = |count: usize| -> u64 {
        let latest = complete.iter().take(count);
        latest.map(|bucket| bucket.reduction).sum()
    };
    let completed_here = buckets.iter().filter(|bucket| bucket.first == number);
    let packing = completed_here.map(|bucket| bucket.reduction).max();
    let computing = unit.transient + reductions(max_reductions);
    let packing = packing.map_or(0, |bytes| bytes + reductions(max_reductions - 1));
    weights + open + computing.max(packing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layer(stage: usize, saved: u64, transient: u64) -> UnitMemory {
        UnitMemory {
            stage: Some(stage),
            saved,
            transient,
            ..UnitMemory::default()
        }
    }

    #[test]
    fn later_layers_have_freed_what_they_saved() {
        let even = [layer(0, 10, 7), layer(0, 10, 7)];
        assert_eq!(peak(&even, &[], 2), 7);
        let first_is_large = [layer(0, 10, 20), layer(0, 10, 7)];
        assert_eq!(peak(&first_is_large, &[], 2), 10);
        // Activations of another stage are not freed.
        let stages = [layer(0, 10, 20), layer(1, 10, 7)];
        assert_eq!(peak(&stages, &[], 2), 20);
    }

    #[test]
    fn the_weights_of_the_layer_before_arrive_meanwhile() {
        let gathering = UnitMemory {
            gathered: 8,
            arriving: 10,
            ..layer(0, 0, 1)
        };
        let embedding = UnitMemory {
            stage: None,
            ..gathering
        };
        assert_eq!(peak(&[embedding, gathering], &[], 2), 9);
        assert_eq!(peak(&[embedding, gathering, gathering], &[], 2), 19);
    }

    #[test]
    fn buckets_are_open_from_their_last_unit_to_their_first() {
        let bucket = |first, last| BucketMemory {
            first,
            last,
            open: 100,
            reduction: 130,
        };
        let bytes = |number, buckets: &[BucketMemory]| {
            bytes_during(&[layer(0, 0, 7); 4], buckets, number, 2)
        };
        assert_eq!(bytes(3, &[bucket(1, 2)]), 7);
        assert_eq!(bytes(2, &[bucket(1, 2)]), 107);
        // Packed: temporary tensors are gone, the buffer still exists.
        assert_eq!(bytes(1, &[bucket(1, 2)]), 230);
        assert_eq!(bytes(0, &[bucket(1, 2)]), 137);
        let three = [bucket(3, 3), bucket(2, 2), bucket(1, 1)];
        assert_eq!(bytes(0, &three), 7 + 2 * 130);
        // Two reductions are in flight until the next bucket is packed.
        assert_eq!(bytes(1, &three), 100 + 7 + 2 * 130);
    }

    proptest! {
        #[test]
        fn the_peak_is_at_least_that_of_the_last_unit_and_grows_with_each_part(
            transients in proptest::collection::vec((0u64..100, 0u64..100), 1..8),
            first in 0usize..8,
            len in 0usize..8,
        ) {
            let units: Vec<UnitMemory> = transients
                .iter()
                .map(|&(saved, transient)| layer(0, saved, transient))
                .collect();
            let first = first.min(units.len() - 1);
            let bucket = BucketMemory {
                first,
                last: (first + len).min(units.len() - 1),
                open: 40,
                reduction: 50,
            };
            let without = peak(&units, &[], 2);
            prop_assert!(without >= units[units.len() - 1].transient);
            let with = peak(&units, &[bucket], 2);
            prop_assert!((without..=without + 90).contains(&with));
        }
    }
}
