//! The number of streams that communicators may take.
//!
//! A device's pool has a limited number of different streams. Then it returns the first one again.
//! Two communicators on one stream run in the order in which each rank happens to queue their
//! operations, so that ranks can wait for each other forever.

use torch_ext::Priority;

/// The most groups that a message names.
const NAMED_GROUPS: usize = 8;

/// Streams that the groups of a rank have taken from the pool for their communicators.
#[derive(Debug, Default)]
pub(crate) struct StreamBudget {
    groups: Vec<GroupStreams>,
}

#[derive(Debug)]
struct GroupStreams {
    group: String,
    streams: usize,
}

impl StreamBudget {
    /// Takes streams for a group.
    ///
    /// # Errors
    /// If the pool has too few; the message names the groups that took most.
    pub(crate) fn take(&mut self, group: &str, streams: usize) -> Result<(), String> {
        self.groups.push(GroupStreams {
            group: group.to_string(),
            streams,
        });
        let total: usize = self.groups.iter().map(|it| it.streams).sum();
        if total <= Priority::STREAMS {
            return Ok(());
        }
        self.groups.sort_by_key(|it| std::cmp::Reverse(it.streams));
        let named = self
            .groups
            .iter()
            .take(NAMED_GROUPS)
            .map(|it| format!("'{}' {}", it.group, it.streams));
        let mut named = named.collect::<Vec<_>>().join(", ");
        if self.groups.len() > NAMED_GROUPS {
            named += ", ...";
        }
        let limit = Priority::STREAMS;
        Err(format!(
            "the groups of this rank need at least {total} streams, but the device has {limit}: \
             {named}; split the model in fewer ways at once, for example without \
             parallel.context, parallel.vocabulary, parallel.zero or hierarchical dispatch"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn streams_are_refused_once_the_pool_is_empty(
            groups in prop::collection::vec(1usize..6, 1..40),
        ) {
            let mut budget = StreamBudget::default();
            let mut total = 0;
            for (number, &streams) in groups.iter().enumerate() {
                total += streams;
                let taken = budget.take(&format!("group {number}"), streams);
                prop_assert_eq!(taken.is_ok(), total <= Priority::STREAMS);
                if let Err(reason) = taken {
                    let largest = groups[..=number]
                        .iter()
                        .max()
                        .unwrap();
                    let first = format!("need at least {total} streams, but the device has 32: '");
                    prop_assert!(reason.contains(&first), "{}", reason);
                    prop_assert!(reason.contains(&format!("' {largest}, ")), "{}", reason);
                    prop_assert!(reason.len() < 600, "{}", reason);
                    break;
                }
            }
        }
    }
}
