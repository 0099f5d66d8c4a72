//! Records of a step from the figures that the ranks have exchanged.

use super::{
    distribution::Distribution,
    rank_figures::{ByFigure, PER_UNIT, RankFigures},
    records::{
        LayerDistribution, LayerMetrics, LayerTotal, MoeMetrics, QkClipMetrics, RankDistribution,
        RankDistributions, RankLine, RankLists, RoutingLine, SnapshotMetrics, StepMetrics,
    },
    step_figures::MoeLayerFigures,
    summed_figures::SummedFigures,
};
use crate::train::step_sums::PassTime;
use parallel::pipeline::PassKind;
use std::collections::BTreeMap;

/// Results of a step that are not exchanged as figures.
#[derive(Clone, Copy)]
pub(crate) struct StepResults {
    /// Number of completed steps, including this one.
    pub(crate) step: u64,
    pub(crate) counted_tokens: u64,
    pub(crate) lr: f64,
    pub(crate) grad_norm: f64,
    /// Tokens of this step.
    pub(crate) step_tokens: u64,
    /// Tokens of all steps so far.
    pub(crate) tokens: u64,
    /// Epochs so far of the source that has most.
    pub(crate) epochs: f64,
    pub(crate) seconds: f64,
    pub(crate) moved_experts: Option<u64>,
    pub(crate) qk_clip: Option<QkClipMetrics>,
    pub(crate) snapshot: Option<SnapshotMetrics>,
    /// Number of ranks that work on a layer.
    pub(crate) stage_ranks: usize,
    /// Number of ranks that hold a slice of each expert, all of which compute its tokens.
    pub(crate) expert_slices: usize,
    /// True if passes are timed.
    pub(crate) times_passes: bool,
}

impl SummedFigures {
    /// Returns the metrics of a step with these `results`.
    pub(crate) fn into_metrics(self, results: StepResults) -> StepMetrics {
        let layers = self.layers(&results);
        let figures = &self.step;
        let lists = self.listed.as_deref();
        let step = results.step;
        StepMetrics {
            step,
            loss: figures.cross_entropy,
            counted_tokens: results.counted_tokens,
            load_balance_loss: figures.load_balance,
            z_loss: figures.z,
            lr: results.lr,
            grad_norm: results.grad_norm,
            tokens: results.tokens,
            epochs: results.epochs,
            tokens_per_s: results.step_tokens as f64 / results.seconds,
            step_ms: results.seconds * 1e3,
            moe: moe_metrics(&layers, &figures.moe_layers),
            moved_experts: results.moved_experts,
            qk_clip: results.qk_clip,
            snapshot: results.snapshot,
            rank_distributions: rank_distributions(&self.ranks),
            ranks: lists.map(|ranks| RankLine {
                step,
                lists: rank_lists(ranks, results.times_passes),
            }),
            routing: lists.filter(|_| !layers.is_empty()).map(|_| RoutingLine {
                step,
                tokens_per_expert: tokens_per_expert(&figures.moe_layers),
                layers,
            }),
        }
    }

    /// Returns the figures of each MoE layer.
    fn layers(&self, results: &StepResults) -> Vec<LayerMetrics> {
        let layer = |(layer, tokens): (&MoeLayerFigures, &Option<Distribution>)| {
            let tokens = tokens.as_ref().map(|tokens| tokens.in_units(1.0));
            let rank_tokens = tokens.unwrap_or_default();
            let transfers = layer.transfers;
            LayerMetrics {
                expert_imbalance: imbalance(&layer.tokens_per_expert),
                rank_imbalance: largest_over_mean(rank_tokens.largest, rank_tokens.mean),
                rank_tokens,
                lent_tokens: transfers.lent_tokens as u64 / results.expert_slices as u64,
                lent_bytes: transfers.lent_bytes as u64,
                internode_bytes: transfers.internode_bytes as u64,
                plan_ms: transfers.plan_seconds * 1e3 / results.stage_ranks as f64,
            }
        };
        let layers = self.step.moe_layers.iter().zip(&self.ranks.tokens);
        layers.map(layer).collect()
    }
}

/// Returns the figures over `layers`, whose sums are `sums`; `None` if there are none.
fn moe_metrics(layers: &[LayerMetrics], sums: &[MoeLayerFigures]) -> Option<MoeMetrics> {
    let distribution = |figure: fn(&LayerMetrics) -> f64| {
        LayerDistribution::of(&layers.iter().map(figure).collect::<Vec<_>>())
    };
    let total = |figure: fn(&LayerMetrics) -> u64| {
        LayerTotal::of(&layers.iter().map(figure).collect::<Vec<_>>())
    };
    let plan_ms: Vec<f64> = layers.iter().map(|layer| layer.plan_ms).collect();
    let routed_tokens: f64 = sums.iter().flat_map(|sums| &sums.tokens_per_expert).sum();
    let rank_imbalance = distribution(|layer| layer.rank_imbalance)?;
    Some(MoeMetrics {
        expert_imbalance: distribution(|layer| layer.expert_imbalance)?,
        rank_imbalance,
        most_loaded_rank: layers[rank_imbalance.largest_layer]
            .rank_tokens
            .largest_rank,
        routed_tokens: routed_tokens as u64,
        lent_tokens: total(|layer| layer.lent_tokens)?,
        lent_bytes: total(|layer| layer.lent_bytes)?,
        internode_bytes: total(|layer| layer.internode_bytes)?,
        plan_ms: LayerTotal::of(&plan_ms)?,
    })
}

fn rank_distributions(figures: &ByFigure<Option<Distribution>>) -> RankDistributions {
    let bytes = |figure: &Option<Distribution>| {
        let bytes = figure.as_ref().map(|figure| figure.in_units(1.0));
        bytes.unwrap_or_default()
    };
    let passes = PassKind::NAMES.iter().zip(&figures.passes);
    let passes = passes.filter_map(|((_, name), figure)| {
        let times = figure.as_ref()?.in_units(PER_UNIT / 1e3);
        Some((name.to_string(), times))
    });
    let ratio = |figure: &Distribution| -> RankDistribution { figure.in_units(PER_UNIT) };
    RankDistributions {
        peak_memory: bytes(&figures.peak_memory),
        peak_resident: bytes(&figures.peak_resident),
        wait_ratio: figures.wait_ratio.as_ref().map(ratio),
        pass_ms: passes.collect(),
    }
}

fn rank_lists(ranks: &[RankFigures], times_passes: bool) -> RankLists {
    let layers = ranks.first().map_or(0, |rank| rank.tokens.len());
    let of_layer = |layer: usize| {
        let tokens = ranks.iter().map(|rank| rank.tokens[layer]);
        tokens
            .map(|tokens| tokens.unwrap_or_default() as u64)
            .collect()
    };
    let measured = ranks.iter().filter(|_| times_passes);
    let in_pipeline = measured.clone().filter(|rank| !rank.passes.is_empty());
    RankLists {
        tokens_per_rank: (0..layers).map(of_layer).collect(),
        rank_peak_memory: ranks.iter().map(|rank| rank.peak_memory as u64).collect(),
        rank_peak_resident: ranks.iter().map(|rank| rank.peak_resident as u64).collect(),
        rank_wait_ratio: measured.filter_map(|rank| rank.wait_ratio).collect(),
        rank_pass_ms: in_pipeline.map(|rank| pass_ms(&rank.passes)).collect(),
    }
}

/// Returns the mean milliseconds of each pass that ran, by its name.
fn pass_ms(passes: &[PassTime]) -> BTreeMap<String, f64> {
    let chunks = (passes.len() / PassKind::NAMES.len()).max(1);
    let name = |index: usize| {
        let (_, kind) = PassKind::NAMES[index / chunks];
        match index % chunks {
            0 => kind.to_string(),
            chunk => format!("{kind}.{chunk}"),
        }
    };
    let ran = passes
        .iter()
        .enumerate()
        .filter(|(_, pass)| pass.count > 0.0);
    ran.map(|(index, pass)| (name(index), pass.seconds / pass.count * 1e3))
        .collect()
}

fn tokens_per_expert(layers: &[MoeLayerFigures]) -> Vec<Vec<u64>> {
    let whole = |layer: &MoeLayerFigures| {
        let counts = layer.tokens_per_expert.iter();
        counts.map(|&count| count as u64).collect()
    };
    layers.iter().map(whole).collect()
}

/// Returns the maximum over the mean, or 1 if all loads are zero.
fn imbalance(loads: &[f64]) -> f64 {
    let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
    largest_over_mean(loads.iter().copied().fold(0.0, f64::max), mean)
}

fn largest_over_mean(largest: f64, mean: f64) -> f64 {
    if mean > 0.0 { largest / mean } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::summed_figures::tests::Run;

    /// The largest line of a step.
    const MAX_LINE_BYTES: usize = 4096;

    fn results() -> StepResults {
        StepResults {
            step: 1_000_000,
            counted_tokens: 16_777_216,
            lr: 2.0e-4 / 3.0,
            grad_norm: 1.0 / 3.0,
            step_tokens: 16_777_216,
            tokens: 15_000_000_000_000,
            epochs: 4.0 / 3.0,
            seconds: 10.0 / 3.0,
            moved_experts: Some(14_848),
            qk_clip: Some(QkClipMetrics {
                largest_logit: 400.0 / 3.0,
                clipped_heads: 7808,
            }),
            snapshot: Some(SnapshotMetrics {
                stall_ms: 1.0 / 3.0,
                copy_ms: 2000.0 / 3.0,
                bytes: 3_000_000_000,
                skipped: 1000,
            }),
            stage_ranks: 256,
            expert_slices: 1,
            times_passes: true,
        }
    }

    fn line(moe_layers: usize, ranks: usize) -> String {
        let run = Run {
            moe_layers,
            experts: 16,
            ranks,
        };
        let (summed, _) = run.simulate();
        serde_json::to_string(&summed.into_metrics(results())).unwrap()
    }

    /// Returns the keys of an object and of the objects in it.
    fn keys(value: &serde_json::Value) -> Vec<String> {
        let inner = |(key, value): (&String, &serde_json::Value)| {
            let below = keys(value)
                .into_iter()
                .map(move |below| format!("{key}.{below}"));
            [key.clone()].into_iter().chain(below).collect::<Vec<_>>()
        };
        let fields = value.as_object().into_iter().flatten();
        fields.flat_map(inner).collect()
    }

    #[test]
    fn a_line_has_the_same_keys_for_any_number_of_ranks_and_layers() {
        let parsed = |moe_layers, ranks| {
            let line: serde_json::Value = serde_json::from_str(&line(moe_layers, ranks)).unwrap();
            assert!(!line.to_string().contains('['), "a list may grow: {line}");
            keys(&line)
        };
        let expected = parsed(4, 4);
        for (moe_layers, ranks) in [(4, 128), (58, 4), (58, 128), (58, 4096)] {
            assert_eq!(parsed(moe_layers, ranks), expected);
        }
        assert!(line(58, 4096).len() < MAX_LINE_BYTES);
    }

    /// Returns `value` with each number as long as JSON writes any.
    fn longest(value: serde_json::Value) -> serde_json::Value {
        use serde_json::Value::{Number, Object};
        match value {
            Number(number) if number.is_f64() => f64::MIN_POSITIVE.into(),
            Number(_) => u64::MAX.into(),
            Object(fields) => {
                let fields = fields.into_iter();
                Object(fields.map(|(key, value)| (key, longest(value))).collect())
            }
            other => other,
        }
    }

    #[test]
    fn a_line_is_short_whatever_its_numbers_are() {
        let (mut summed, _) = Run {
            moe_layers: 58,
            experts: 16,
            ranks: 16,
        }
        .simulate();
        // No schedule has all kinds of passes.
        let time = summed.ranks.passes[0];
        summed.ranks.passes.fill(time);
        let metrics = serde_json::to_value(summed.into_metrics(results())).unwrap();
        let longest = longest(metrics).to_string();
        assert!(longest.contains("\"IB\""), "{longest}");
        assert!(longest.len() < MAX_LINE_BYTES, "{}", longest.len());
    }

    #[test]
    fn slices_of_an_expert_count_a_token_once() {
        let metrics = |expert_slices: usize| {
            let run = Run {
                moe_layers: 3,
                experts: 4,
                ranks: 8,
            };
            let (mut summed, _) = run.simulate();
            summed.listed = Some(Vec::new());
            summed.into_metrics(StepResults {
                expert_slices,
                ..results()
            })
        };
        let whole = metrics(1);
        let sliced = metrics(2);
        let lent = |metrics: &StepMetrics| {
            let layers = &metrics.routing.as_ref().unwrap().layers;
            let of_layers: Vec<u64> = layers.iter().map(|layer| layer.lent_tokens).collect();
            let total: u64 = of_layers.iter().sum();
            assert_eq!(metrics.moe.as_ref().unwrap().lent_tokens.total, total);
            of_layers
        };
        assert_eq!(lent(&whole), [80_000; 3]);
        assert_eq!(lent(&sliced), [40_000; 3]);
        for metrics in [whole, sliced] {
            let experts = metrics.routing.unwrap().tokens_per_expert;
            let routed: u64 = experts.iter().flatten().sum();
            assert_eq!(metrics.moe.unwrap().routed_tokens, routed);
        }
    }

    #[test]
    fn layers_are_summarized() {
        let distribution = LayerDistribution::of(&[1.0, 3.0, 2.0, 3.0]).unwrap();
        let expected = LayerDistribution {
            mean: 2.25,
            median: 3.0,
            p90: 3.0,
            largest: 3.0,
            largest_layer: 1,
        };
        assert_eq!(distribution, expected);
        let total = LayerTotal::of(&[1u64, 5, 2]).unwrap();
        assert_eq!((total.total, total.largest, total.largest_layer), (8, 5, 1));
        assert_eq!(LayerDistribution::of(&[]), None);
        assert_eq!(LayerTotal::<u64>::of(&[]), None);
        assert_eq!(imbalance(&[0.0, 0.0]), 1.0);
        assert_eq!(imbalance(&[1.0, 3.0]), 1.5);
    }

    #[test]
    fn lists_name_the_passes_of_each_chunk() {
        let mut passes = vec![PassTime::default(); 2 * PassKind::NAMES.len()];
        passes[1] = PassTime {
            seconds: 0.5,
            count: 2.0,
        };
        let rank = RankFigures {
            tokens: vec![Some(4.0), None],
            wait_ratio: Some(0.5),
            passes,
            ..RankFigures::default()
        };
        let lists = rank_lists(&[rank.clone(), rank.clone()], true);
        assert_eq!(lists.tokens_per_rank, [[4, 4], [0, 0]]);
        assert_eq!(lists.rank_pass_ms[1]["F.1"], 250.0);
        assert_eq!(lists.rank_wait_ratio, [0.5, 0.5]);
        let untimed = rank_lists(&[rank], false);
        assert!(untimed.rank_pass_ms.is_empty() && untimed.rank_wait_ratio.is_empty());
    }
}
