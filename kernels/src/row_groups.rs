//! The division of rows into consecutive groups, which grouped GEMMs take.

use crate::upload::upload;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, Event, Stream};

/// Numbers of rows of consecutive groups, on the host, on a device, or on both.
///
/// The other side copies them when it first needs them, and keeps the copy. Clones share it, so
/// that backward finds the copies of forward.
#[derive(Clone)]
pub struct RowGroups(Arc<Inner>);

struct Inner {
    num_groups: usize,
    num_rows: i64,
    counts: OnceLock<Vec<i64>>,
    /// The end of each group's rows, int32 `[groups]`.
    ends: Mutex<Option<Tensor>>,
    /// Set until the host reads the counts, if a device had them first.
    arriving: Mutex<Option<Arriving>>,
}

/// Ends of groups on their way from a device.
struct Arriving {
    /// int32 `[groups]` in host memory.
    ends: Tensor,
    /// Follows the copy in the queue of the device; `None` on the CPU.
    copied: Option<Event>,
}

impl RowGroups {
    /// Creates groups with `counts[g]` rows each.
    pub fn new(counts: Vec<i64>) -> RowGroups {
        RowGroups(Arc::new(Inner {
            num_groups: counts.len(),
            num_rows: counts.iter().sum(),
            counts: OnceLock::from(counts),
            ends: Mutex::new(None),
            arriving: Mutex::new(None),
        }))
    }

    /// Creates groups of `num_rows` rows in all, whose ends `[groups]` int32 are on a device.
    /// Queues a copy to the host, which waits for nothing.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn from_device(ends: Tensor, num_rows: i64) -> Result<RowGroups, Error> {
        let device = ends.device();
        let failed = |e: tch::TchError| Error::new(e.to_string());
        // libtorch copies to page-locked memory if the host does not wait.
        let there = ends.f_to_device_(Device::Cpu, Kind::Int, true, false);
        let copied = if device == Device::Cpu {
            None
        } else {
            Some(Stream::current(&ends)?.record()?)
        };
        let arriving = Arriving {
            ends: there.map_err(failed)?,
            copied,
        };
        Ok(RowGroups(Arc::new(Inner {
            num_groups: ends.numel(),
            num_rows,
            counts: OnceLock::new(),
            ends: Mutex::new(Some(ends)),
            arriving: Mutex::new(Some(arriving)),
        })))
    }

    /// Returns the number of groups, with those that have no rows.
    pub fn num_groups(&self) -> usize {
        self.0.num_groups
    }

    /// Returns the rows of all groups.
    pub fn num_rows(&self) -> i64 {
        self.0.num_rows
    }

    /// Returns the rows of each group. Waits for the device that had them first, up to their copy.
    ///
    /// # Panics
    /// If earlier work on the device failed.
    pub fn counts(&self) -> &[i64] {
        self.0.counts.get_or_init(|| {
            let arriving = self.0.arriving.lock().take();
            let arriving = arriving.expect("the host or a device has the counts");
            arriving
                .wait()
                .unwrap_or_else(|error| panic!("counts of rows: {error}"))
        })
    }

    /// Returns the end of each group's rows, int32 `[groups]`.
    ///
    /// # Errors
    /// If there is no page-locked memory for the copy to the device.
    pub fn ends(&self, device: Device) -> Result<Tensor, Error> {
        let mut known = self.0.ends.lock();
        if let Some(ends) = known.as_ref().filter(|ends| ends.device() == device) {
            return Ok(ends.shallow_clone());
        }
        let ends = self.counts().iter().scan(0i32, |end, &count| {
            *end += count as i32;
            Some(*end)
        });
        let ends = upload(&[&ends.collect::<Vec<_>>()], device)?.remove(0);
        *known = Some(ends.shallow_clone());
        Ok(ends)
    }

    /// Returns the first `groups` groups, and the others.
    ///
    /// # Panics
    /// If there are fewer groups.
    pub fn split_at(&self, groups: usize) -> [RowGroups; 2] {
        if groups == self.num_groups() {
            return [self.clone(), RowGroups::new(Vec::new())];
        }
        let (first, others) = self.counts().split_at(groups);
        [first, others].map(|counts| RowGroups::new(counts.to_vec()))
    }

    /// True if [`RowGroups::counts`] waits for nothing.
    #[cfg(test)]
    pub(crate) fn is_on_host(&self) -> bool {
        self.0.counts.get().is_some()
    }
}

impl From<&[i64]> for RowGroups {
    fn from(counts: &[i64]) -> RowGroups {
        RowGroups::new(counts.to_vec())
    }
}

impl std::fmt::Debug for RowGroups {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Inner {
            num_groups,
            num_rows,
            counts,
            ..
        } = &*self.0;
        match counts.get() {
            Some(counts) => formatter.debug_tuple("RowGroups").field(counts).finish(),
            None => write!(
                formatter,
                "RowGroups({num_rows} rows in {num_groups} groups)"
            ),
        }
    }
}

impl Arriving {
    fn wait(self) -> Result<Vec<i64>, Error> {
        if let Some(copied) = &self.copied {
            copied.wait()?;
        }
        let ends = Vec::<i32>::try_from(&self.ends).map_err(|e| Error::new(e.to_string()))?;
        let starts = std::iter::once(&0).chain(&ends);
        let counts = ends.iter().zip(starts);
        Ok(counts.map(|(end, start)| i64::from(end - start)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::test_gpu;
    use proptest::prelude::*;

    fn numbers(ends: &Tensor) -> Vec<i32> {
        Vec::try_from(ends.to_device(Device::Cpu)).unwrap()
    }

    proptest! {
        #[test]
        fn both_sides_have_the_same_groups(
            counts in prop::collection::vec(0i64..5, 0..9),
            at in 0usize..9,
        ) {
            let device = test_gpu().1;
            let at = at.min(counts.len());
            let groups = RowGroups::from(&counts[..]);
            let ends = groups.ends(device).unwrap();
            prop_assert_eq!(ends.kind(), Kind::Int);
            let kept = groups.clone().ends(device).unwrap();
            prop_assert_eq!(kept.data_ptr(), ends.data_ptr());
            let back = RowGroups::from_device(ends.shallow_clone(), groups.num_rows()).unwrap();
            prop_assert_eq!(back.num_groups(), counts.len());
            prop_assert_eq!(back.num_rows(), groups.num_rows());
            prop_assert_eq!(numbers(&back.ends(device).unwrap()), numbers(&ends));
            prop_assert!(!back.is_on_host());
            let [first, others] = back.split_at(at);
            prop_assert_eq!([first.counts(), others.counts()].concat(), counts.clone());
            prop_assert_eq!(back.counts(), counts);
        }
    }
}
