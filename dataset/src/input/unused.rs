//! Options that have no effect on the inputs.

use super::options::{InputOptions, Split, TextKey};
use std::collections::BTreeSet;

/// Properties of the inputs on which options depend.
#[derive(Debug, Default)]
pub(super) struct Uses {
    /// True if there may be text files. The format of a stream is not known.
    pub(super) has_text: bool,
    /// True if there may be rows of JSON or Parquet.
    pub(super) has_rows: bool,
    /// True if an input is a folder or a pattern.
    pub(super) has_folders: bool,
    /// Extensions of the files from folders, and of the named files of kinds that are not known.
    pub(super) extensions: BTreeSet<String>,
}

impl Uses {
    /// Returns a warning for each option that changes nothing.
    pub(super) fn unused(&self, options: &InputOptions) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |option: &str, reason: &str| {
            warnings.push(format!("{option} has no effect: {reason}"));
        };
        let key = &options.text_key;
        if *key != TextKey::default() && !self.has_rows {
            let reason = "no input is JSON or Parquet";
            warn(&format!("--text-key {key}"), reason);
        }
        let split = match &options.split {
            Split::File => None,
            Split::Line => Some("--split line".to_string()),
            Split::BlankLine => Some("--split blank-line".to_string()),
            Split::Separator(text) => Some(format!("--separator {text:?}")),
        };
        if let Some(split) = split.filter(|_| !self.has_text) {
            warn(&split, "no input is a text file");
        }
        if options.hidden && !self.has_folders {
            warn("--hidden", "no input is a folder or a pattern");
        }
        let listed = options.extensions.as_deref().unwrap_or_default();
        let bare = |listed: &String| listed.trim_start_matches('.').to_lowercase();
        let unused = listed
            .iter()
            .map(bare)
            .filter(|one| !self.extensions.contains(one));
        let unused: Vec<String> = unused.collect();
        if !unused.is_empty() {
            let option = format!("--extensions {}", unused.join(","));
            warn(&option, "no folder has files that end so");
        }
        warnings
    }
}
