//! Sets of layers, as words, lists and periods.

use super::limits::MAX_LAYERS;
use super::words::NoneOrAll;
use crate::problems::Problems;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A set of layers, which are numbered from 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "none, all, a list of layers, {every: N, from: FIRST}, or {all_but: {every: N, \
                 from: FIRST}}"
)]
pub enum LayerSet {
    /// All or none.
    Word(NoneOrAll),
    /// The numbers of the layers.
    Layers(#[schemars(inner(range(max = MAX_LAYERS)))] Vec<usize>),
    /// One layer of each period.
    Periodic(LayerPeriod),
    /// All layers but one of each period.
    AllBut(AllBut),
}

/// All layers but one of each period.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AllBut {
    /// The layers that are left out.
    pub all_but: LayerPeriod,
}

/// One layer of each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerPeriod {
    /// Distance between two of the layers.
    #[schemars(range(min = 1, max = MAX_LAYERS))]
    pub every: usize,
    /// The first of the layers.
    #[schemars(range(max = MAX_LAYERS))]
    #[serde(default)]
    pub from: usize,
}

impl LayerPeriod {
    fn contains(&self, layer: usize) -> bool {
        let after = layer.checked_sub(self.from);
        after.is_some_and(|after| after.is_multiple_of(self.every.max(1)))
    }
}

impl LayerSet {
    /// The set of all layers.
    pub const ALL: LayerSet = LayerSet::Word(NoneOrAll::All);
    /// The set without layers.
    pub const NONE: LayerSet = LayerSet::Word(NoneOrAll::None);

    /// Returns true if the set has layer `layer`.
    pub fn contains(&self, layer: usize) -> bool {
        match self {
            LayerSet::Word(word) => *word == NoneOrAll::All,
            LayerSet::Layers(layers) => layers.contains(&layer),
            LayerSet::Periodic(period) => period.contains(layer),
            LayerSet::AllBut(AllBut { all_but }) => !all_but.contains(layer),
        }
    }

    /// Refuses the set, the value of `key`, if it names a layer that a model of `layers` layers
    /// lacks, or has none of the model's layers. In that case `advice` says how to change it.
    pub(crate) fn problems(&self, key: &str, layers: usize, advice: &str, problems: &mut Problems) {
        if let Some(layer) = self.unknown_layer(layers) {
            problems.add(format!(
                "{key} names layer {layer}; the model has 0 to {}",
                layers.saturating_sub(1)
            ));
        } else if !(0..layers).any(|layer| self.contains(layer)) {
            problems.add(format!("{key} has none of the model's layers: {advice}"));
        }
    }

    /// Returns a layer that the set names although a model of `layers` layers has none of that
    /// number.
    fn unknown_layer(&self, layers: usize) -> Option<usize> {
        let LayerSet::Layers(named) = self else {
            return None;
        };
        named.iter().copied().find(|&layer| layer >= layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_the_layers_that_they_name() {
        let layers = |yaml: &str| -> Vec<usize> {
            let set: LayerSet = serde_saphyr::from_str(yaml).unwrap();
            (0..8).filter(|&layer| set.contains(layer)).collect()
        };
        assert!(layers("none").is_empty());
        assert_eq!(layers("all"), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(layers("[1, 6]"), [1, 6]);
        assert_eq!(layers("{every: 3}"), [0, 3, 6]);
        assert_eq!(layers("{every: 4, from: 3}"), [3, 7]);
        assert_eq!(layers("{all_but: {every: 4, from: 3}}"), [0, 1, 2, 4, 5, 6]);
        let unknown: Result<LayerSet, _> = serde_saphyr::from_str("{each: 2}");
        assert!(unknown.unwrap_err().to_string().contains("{every: N"));
    }

    #[test]
    fn sets_that_do_not_fit_the_model_are_refused() {
        let problems = |yaml: &str, layers: usize| {
            let set: LayerSet = serde_saphyr::from_str(yaml).unwrap();
            let mut problems = Problems::default();
            set.problems("key", layers, "leave it out", &mut problems);
            problems.into_list().join("; ")
        };
        assert_eq!(
            problems("[0, 4, 9]", 4),
            "key names layer 4; the model has 0 to 3"
        );
        for set in ["[0, 4, 9]", "all", "{every: 4, from: 9}"] {
            assert_eq!(problems(set, 10), "");
        }
        for set in [
            "none",
            "[]",
            "{every: 4, from: 40}",
            "{all_but: {every: 1}}",
        ] {
            assert_eq!(
                problems(set, 16),
                "key has none of the model's layers: leave it out"
            );
        }
    }
}
