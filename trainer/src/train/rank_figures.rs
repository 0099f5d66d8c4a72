//! Figures of a step that each rank has for itself.

use super::step_sums::PassTime;

/// Values of a ratio's distribution per unit, and of a second's.
pub(crate) const PER_UNIT: f64 = 1e9;

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

/// Numbers of figures, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RankFigureSizes {
    pub(crate) moe_layers: usize,
    pub(crate) ranks: usize,
    pub(crate) passes: usize,
}

/// The figures of all ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RankTable {
    /// The figures of each rank, by its number.
    pub(crate) ranks: Vec<RankFigures>,
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
    /// Mean time of each pass, in parts of [`PER_UNIT`] of a second.
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
        let mean = |pass: &PassTime| {
            let nanoseconds = (pass.seconds / pass.count * PER_UNIT).round();
            (pass.count > 0.0).then_some(nanoseconds as u64)
        };
        whole.extend(self.passes.iter().map(mean));
        whole
    }
}

impl RankFigureSizes {
    /// Returns the number of figures of a rank.
    pub(crate) fn figures(self) -> usize {
        self.moe_layers + 3 + self.passes
    }
}

impl<T> ByFigure<T> {
    /// Names values in the order of [`RankFigures::whole`].
    ///
    /// # Panics
    /// If there are fewer values than `sizes` requires.
    pub(crate) fn new(sizes: RankFigureSizes, values: Vec<T>) -> ByFigure<T> {
        let mut values = values.into_iter();
        let mut next = || values.next().expect("all ranks have equally many figures");
        ByFigure {
            tokens: (0..sizes.moe_layers).map(|_| next()).collect(),
            peak_memory: next(),
            peak_resident: next(),
            wait_ratio: next(),
            passes: (0..sizes.passes).map(|_| next()).collect(),
        }
    }
}

impl RankTable {
    /// Returns the table that has only the figures of one rank. The sum of those of all ranks has
    /// all figures.
    pub(crate) fn of_rank(sizes: RankFigureSizes, rank: usize, own: RankFigures) -> RankTable {
        let mut table = RankTable::unpack(sizes, std::iter::repeat(0.0));
        table.ranks[rank] = own;
        table
    }

    /// Lists the figures in the order that [`RankTable::unpack`] reads.
    pub(crate) fn pack(&self) -> Vec<f64> {
        let mut packed = Vec::new();
        let moe_layers = self.ranks.first().map_or(0, |rank| rank.tokens.len());
        for layer in 0..moe_layers {
            let tokens = self.ranks.iter().map(|rank| rank.tokens[layer]);
            packed.extend(tokens.map(Option::unwrap_or_default));
        }
        packed.extend(self.ranks.iter().map(|rank| rank.peak_memory));
        packed.extend(self.ranks.iter().map(|rank| rank.peak_resident));
        let wait_ratios = self.ranks.iter().map(|rank| rank.wait_ratio);
        packed.extend(wait_ratios.map(Option::unwrap_or_default));
        for PassTime { seconds, count } in self.ranks.iter().flat_map(|rank| &rank.passes) {
            packed.extend([seconds, count]);
        }
        packed
    }

    /// Reads figures in the order of [`RankTable::pack`].
    ///
    /// # Panics
    /// If there are fewer figures than `sizes` requires.
    pub(crate) fn unpack(
        sizes: RankFigureSizes,
        packed: impl IntoIterator<Item = f64>,
    ) -> RankTable {
        let mut packed = packed.into_iter();
        let mut next = || packed.next().expect("all ranks sum equally many figures");
        let mut ranks = vec![RankFigures::default(); sizes.ranks];
        for _ in 0..sizes.moe_layers {
            for rank in &mut ranks {
                rank.tokens.push(Some(next()));
            }
        }
        for rank in &mut ranks {
            rank.peak_memory = next();
        }
        for rank in &mut ranks {
            rank.peak_resident = next();
        }
        for rank in &mut ranks {
            rank.wait_ratio = Some(next());
        }
        for rank in &mut ranks {
            for _ in 0..sizes.passes {
                rank.passes.push(PassTime {
                    seconds: next(),
                    count: next(),
                });
            }
        }
        RankTable { ranks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_sum_is_fixed() {
        let sizes = RankFigureSizes {
            moe_layers: 2,
            ranks: 2,
            passes: 2,
        };
        let packed: Vec<f64> = (19..37).map(f64::from).collect();
        let table = RankTable::unpack(sizes, packed.iter().copied());
        assert_eq!(table.pack(), packed);
        let last = &table.ranks[1];
        assert_eq!(last.tokens, [Some(20.0), Some(22.0)]);
        let measured = [last.peak_memory, last.peak_resident];
        assert_eq!(measured, [24.0, 26.0]);
        assert_eq!(last.wait_ratio, Some(28.0));
        let pass = PassTime {
            seconds: 35.0,
            count: 36.0,
        };
        assert_eq!(last.passes[1], pass);
    }

    #[test]
    fn sizes_may_be_zero() {
        let sizes = RankFigureSizes {
            moe_layers: 0,
            ranks: 1,
            passes: 0,
        };
        let table = RankTable::of_rank(sizes, 0, RankFigures::default());
        assert_eq!(table.pack(), [0.0; 3]);
        assert_eq!(sizes.figures(), RankFigures::default().whole().len());
    }

    #[test]
    fn whole_figures_have_the_order_of_their_names() {
        let time = |seconds: f64, count: f64| PassTime { seconds, count };
        let own = RankFigures {
            tokens: vec![Some(5.0), None],
            peak_memory: 7.0,
            peak_resident: 8.0,
            wait_ratio: Some(0.25),
            passes: vec![time(0.5, 4.0), time(0.0, 0.0)],
        };
        let sizes = RankFigureSizes {
            moe_layers: 2,
            ranks: 9,
            passes: 2,
        };
        let whole = ByFigure::new(sizes, own.whole());
        assert_eq!(whole.tokens, [Some(5), None]);
        assert_eq!(whole.peak_memory, Some(7));
        assert_eq!(whole.peak_resident, Some(8));
        assert_eq!(whole.wait_ratio, Some(250_000_000));
        assert_eq!(whole.passes, [Some(125_000_000), None]);
        let unmeasured = RankFigures {
            wait_ratio: None,
            ..own
        };
        let whole = ByFigure::new(sizes, unmeasured.whole());
        assert_eq!(whole.wait_ratio, None);
    }
}
