//! Names, weights and checks of the sources of data.

use super::{Config, DataConfig, SourceConfig};
use crate::problems::Problems;
use dataset::tokens::TokenPath;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

impl SourceConfig {
    /// Returns the source of the pair of token files at `path`.
    pub fn new(path: impl Into<PathBuf>) -> SourceConfig {
        SourceConfig {
            path: path.into(),
            name: None,
            format: None,
            dtype: None,
            mask: None,
            weight: None,
        }
    }

    /// Returns the token files of the source.
    pub fn tokens(&self) -> TokenPath<'_> {
        TokenPath {
            path: &self.path,
            format: self.format,
            dtype: self.dtype,
        }
    }
}

/// A source with its key, such as `data.train[0]`.
type KeyedSource<'a> = (String, &'a SourceConfig);

fn keyed<'a>(
    list: &'a str,
    sources: &'a [SourceConfig],
) -> impl Iterator<Item = KeyedSource<'a>> + use<'a> {
    let sources = sources.iter().enumerate();
    sources.map(move |(index, source)| (format!("data.{list}[{index}]"), source))
}

impl Config {
    /// Returns the sources that a run reads, with their keys: those of validation data only with a
    /// section `validation`.
    pub fn sources(&self) -> Vec<KeyedSource<'_>> {
        let validation = keyed("validation", &self.data.validation);
        let validation = validation.filter(|_| self.validation.is_some());
        keyed("train", &self.data.train).chain(validation).collect()
    }
}

impl DataConfig {
    /// Adds what cannot be right in the lists of sources.
    pub(super) fn check_sources(&self, problems: &mut Problems) {
        let validation = keyed("validation", &self.validation);
        for (key, source) in keyed("train", &self.train).chain(validation) {
            if let Some(problem) = source.tokens().problem() {
                problems.add(format!("{key}: {problem}"));
            }
            // JSON has no number for these, so the check of ranges does not see them.
            if let Some(weight) = source.weight.filter(|weight| !weight.is_finite()) {
                problems.add(format!(
                    "{key}.weight is {weight}; it must be a finite number"
                ));
            }
        }
        for (list, sources) in [("train", &self.train), ("validation", &self.validation)] {
            for problem in name_problems(list, sources) {
                problems.add(problem);
            }
            let lacking = sources.iter().position(|source| source.weight.is_none());
            let weighted = sources.iter().position(|source| source.weight.is_some());
            if let (Some(lacking), Some(weighted)) = (lacking, weighted) {
                problems.add(format!(
                    "data.{list}[{weighted}] ({}) has a weight, and data.{list}[{lacking}] ({}) \
                     has none: give one to each source, or to none",
                    sources[weighted].path.display(),
                    sources[lacking].path.display()
                ));
            }
        }
    }
}

/// Returns a problem for each given name by which a source cannot be told from another.
fn name_problems(list: &str, sources: &[SourceConfig]) -> Vec<String> {
    let mut first_uses: BTreeMap<&str, usize> = BTreeMap::new();
    let mut problems = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let Some(name) = source.name.as_deref() else {
            continue;
        };
        if name.trim().is_empty() {
            problems.push(format!(
                "data.{list}[{index}].name is empty: give a name, or leave it out"
            ));
        } else if let Some(first) = first_uses.get(name) {
            problems.push(format!(
                "data.{list}[{index}].name is {name:?}, which data.{list}[{first}] has already"
            ));
        }
        first_uses.entry(name).or_insert(index);
    }
    problems
}

/// Returns the weights of sources, or None if they have none.
pub fn source_weights(sources: &[SourceConfig]) -> Option<Vec<f64>> {
    sources.iter().map(|source| source.weight).collect()
}

/// Returns the names of sources in reports: given ones, or the end of the path that tells the
/// sources apart. A source that is listed several times has a number from the second time on.
pub fn source_names(sources: &[SourceConfig]) -> Vec<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let numbered = |name: String| {
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        match count {
            1 => name,
            _ => format!("{name} ({count})"),
        }
    };
    shortest_names(sources).into_iter().map(numbered).collect()
}

fn shortest_names(sources: &[SourceConfig]) -> Vec<String> {
    let mut parts = 1;
    loop {
        let names: Vec<String> = sources
            .iter()
            .map(|source| {
                let given = source.name.clone();
                given.unwrap_or_else(|| end_of_path(&source.path, parts))
            })
            .collect();
        let mut uses: BTreeMap<&String, usize> = BTreeMap::new();
        for name in &names {
            *uses.entry(name).or_default() += 1;
        }
        let longest = sources.iter().map(|source| source.path.iter().count());
        if uses.values().all(|&count| count == 1) || parts >= longest.max().unwrap_or(0) {
            return names;
        }
        parts += 1;
    }
}

/// Returns the last `parts` components of a path.
fn end_of_path(path: &Path, parts: usize) -> String {
    let skipped = path.iter().count().saturating_sub(parts);
    let end: PathBuf = path.iter().skip(skipped).collect();
    end.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(list: &[(&str, Option<f64>)]) -> Vec<SourceConfig> {
        let source = |&(path, weight): &(&str, Option<f64>)| SourceConfig {
            weight,
            ..SourceConfig::new(path)
        };
        list.iter().map(source).collect()
    }

    #[test]
    fn names_are_the_shortest_that_differ() {
        let names = |paths: &[&str]| {
            let list: Vec<_> = paths.iter().map(|&path| (path, None)).collect();
            source_names(&sources(&list))
        };
        assert_eq!(names(&["data/wiki", "data/code"]), ["wiki", "code"]);
        let long = names(&["a/wiki/train", "a/code/train"]);
        assert_eq!(long, ["wiki/train", "code/train"]);
        assert_eq!(names(&["x/train", "x/train"]), ["x/train", "x/train (2)"]);
        let mut named = sources(&[("a/train", None), ("b/train", None)]);
        named[0].name = Some("web".into());
        assert_eq!(source_names(&named), ["web", "train"]);
    }

    #[test]
    fn weights_are_given_to_all_or_none() {
        let text = "{train: [{path: a}], sequence_length: 8}";
        let mut data: DataConfig = serde_saphyr::from_str(text).unwrap();
        let mut problems = |list: &[(&str, Option<f64>)]| {
            data.train = sources(list);
            let mut problems = Problems::default();
            data.check_sources(&mut problems);
            problems.into_list()
        };
        assert!(problems(&[("a", None), ("b", None)]).is_empty());
        assert!(problems(&[("a", Some(3.0)), ("b", Some(0.1))]).is_empty());
        let mixed = problems(&[("a", None), ("b", Some(0.5))]);
        assert_eq!(
            mixed,
            [
                "data.train[1] (b) has a weight, and data.train[0] (a) has none: give one to each \
              source, or to none"
            ]
        );
        let endless = problems(&[("a", Some(f64::INFINITY))]);
        assert_eq!(
            endless,
            ["data.train[0].weight is inf; it must be a finite number"]
        );
        let mut named = |names: &[&str]| {
            data.train = sources(&vec![("a", None); names.len()]);
            for (source, name) in data.train.iter_mut().zip(names) {
                source.name = Some(name.to_string());
            }
            let mut problems = Problems::default();
            data.check_sources(&mut problems);
            problems.into_list()
        };
        assert!(named(&["web", "code"]).is_empty());
        assert_eq!(
            named(&["web", " ", "web"]),
            [
                "data.train[1].name is empty: give a name, or leave it out",
                "data.train[2].name is \"web\", which data.train[0] has already",
            ]
        );
        let mut problems = |list: &[(&str, Option<f64>)]| {
            data.train = sources(list);
            let mut problems = Problems::default();
            data.check_sources(&mut problems);
            problems.into_list()
        };
        let raw = problems(&[("a.npy", None)]);
        assert!(raw[0].contains("data.train[0]: a.npy is an array without header"));
    }
}
