//! Figures of a step that each rank has for itself.

use crate::train::step_sums::PassTime;
use parallel::pipeline::PassKind;

/// Values of a ratio's distribution per unit, and of a second's.
pub(crate) const PER_UNIT: f64 = 1e9;

/// Number of kinds of passes.
const KINDS: usize = PassKind::NAMES.len();

/// Figures of one rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct RankFigures {
    /// Computed tokens of each MoE layer of the model, `None` for layers of other ranks.
    pub(crate) tokens: Vec<Option<f64>>,
    /// Peak bytes of tensors on the device.
    pub(crate) peak_memory: f64,
    /// Peak resident bytes of the process.
    pub(crate) peak_resident: f64,
    /// `None` if it was not measured.
    pub(crate) wait_ratio: Option<f64>,
    /// Times of passes, `[kinds * chunks]`; empty without a pipeline.
    pub(crate) passes: Vec<PassTime>,
}

/// Values by figure, in the order in which ranks exchange them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ByFigure<T> {
    /// Computed tokens, by MoE layer.
    pub(crate) tokens: Vec<T>,
    /// Peak bytes of tensors on the device.
    pub(crate) peak_memory: T,
    /// Peak resident bytes of the process.
    pub(crate) peak_resident: T,
    /// In parts of [`PER_UNIT`].
    pub(crate) wait_ratio: T,
    /// Mean time of each kind of pass in all chunks, in parts of [`PER_UNIT`] of a second; empty
    /// without a pipeline.
    pub(crate) passes: Vec<T>,
}

impl RankFigures {
    /// Returns the figures as whole numbers; those that do not apply to this rank are `None`.
    pub(crate) fn whole(&self) -> Vec<Option<u64>> {
        let mut whole: Vec<Option<u64>> = self
            .tokens
            .iter()
            .map(|tokens| tokens.map(|tokens| tokens as u64))
            .collect();
        whole.push(Some(self.peak_memory as u64));
        whole.push(Some(self.peak_resident as u64));
        let wait_ratio = self.wait_ratio.map(|ratio| (ratio * PER_UNIT).round());
        whole.push(wait_ratio.map(|ratio| ratio as u64));
        let chunks = (self.passes.len() / KINDS).max(1);
        let mean = |chunks: &[PassTime]| {
            let seconds: f64 = chunks.iter().map(|pass| pass.seconds).sum();
            let count: f64 = chunks.iter().map(|pass| pass.count).sum();
            let parts = (seconds / count * PER_UNIT).round();
            (count > 0.0).then_some(parts as u64)
        };
        whole.extend(self.passes.chunks(chunks).map(mean));
        whole
    }

    /// Lists the figures in the order that [`RankFigures::unpack`] reads. Those that do not apply
    /// to this rank are 0.
    pub(crate) fn pack(&self) -> Vec<f64> {
        let tokens = self.tokens.iter();
        let mut packed: Vec<f64> = tokens.map(|tokens| tokens.unwrap_or_default()).collect();
        packed.extend([self.peak_memory, self.peak_resident]);
        packed.push(self.wait_ratio.unwrap_or_default());
        for PassTime { seconds, count } in &self.passes {
            packed.extend([*seconds, *count]);
        }
        packed
    }

    /// Reads the figures of a rank with `moe_layers` in the order of [`RankFigures::pack`].
    ///
    /// # Panics
    /// If there are fewer figures.
    pub(crate) fn unpack(moe_layers: usize, packed: &[f64]) -> RankFigures {
        let (tokens, rest) = packed.split_at(moe_layers);
        let [peak_memory, peak_resident, wait_ratio, passes @ ..] = rest else {
            panic!("all ranks have equally many figures");
        };
        let pass = |pair: &[f64]| PassTime {
            seconds: pair[0],
            count: pair[1],
        };
        RankFigures {
            tokens: tokens.iter().copied().map(Some).collect(),
            peak_memory: *peak_memory,
            peak_resident: *peak_resident,
            wait_ratio: Some(*wait_ratio),
            passes: passes.chunks_exact(2).map(pass).collect(),
        }
    }
}

impl<T> ByFigure<T> {
    /// Names values in the order of [`RankFigures::whole`].
    ///
    /// # Panics
    /// If there are too few values.
    pub(crate) fn new(moe_layers: usize, values: Vec<T>) -> ByFigure<T> {
        let mut values = values.into_iter();
        let mut next = || values.next().expect("all ranks have equally many figures");
        ByFigure {
            tokens: (0..moe_layers).map(|_| next()).collect(),
            peak_memory: next(),
            peak_resident: next(),
            wait_ratio: next(),
            passes: values.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: f64, count: f64) -> PassTime {
        PassTime { seconds, count }
    }

    #[test]
    fn packed_figures_are_read_in_their_order() {
        let mut figures = RankFigures {
            tokens: vec![Some(5.0), Some(6.0)],
            peak_memory: 7.0,
            peak_resident: 8.0,
            wait_ratio: Some(0.25),
            passes: vec![time(0.5, 4.0), time(0.0, 0.0)],
        };
        assert_eq!(RankFigures::unpack(2, &figures.pack()), figures);
        figures.tokens[0] = None;
        figures.wait_ratio = None;
        let read = RankFigures::unpack(2, &figures.pack());
        assert_eq!(read.tokens, [Some(0.0), Some(6.0)]);
        assert_eq!(read.wait_ratio, Some(0.0));
        assert_eq!(RankFigures::default().pack(), [0.0; 3]);
    }

    #[test]
    fn whole_figures_have_the_order_of_their_names() {
        let mut passes = vec![PassTime::default(); 2 * KINDS];
        // Two chunks: 4 passes of 0.5 s, and 1 pass of 0.75 s.
        passes[0] = time(2.0, 4.0);
        passes[1] = time(0.75, 1.0);
        let own = RankFigures {
            tokens: vec![Some(5.0), None],
            peak_memory: 7.0,
            peak_resident: 8.0,
            wait_ratio: Some(0.25),
            passes,
        };
        let whole = ByFigure::new(2, own.whole());
        assert_eq!(whole.tokens, [Some(5), None]);
        assert_eq!(whole.peak_memory, Some(7));
        assert_eq!(whole.peak_resident, Some(8));
        assert_eq!(whole.wait_ratio, Some(250_000_000));
        assert_eq!(whole.passes.len(), KINDS);
        assert_eq!(whole.passes[..2], [Some(550_000_000), None]);
        let unmeasured = RankFigures {
            wait_ratio: None,
            passes: Vec::new(),
            ..own
        };
        let whole = ByFigure::new(2, unmeasured.whole());
        assert_eq!(whole.wait_ratio, None);
        assert_eq!(whole.passes, []);
    }
}
