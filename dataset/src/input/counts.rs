//! Counts of everything that reading left out, replaced or noticed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most examples of rows that are kept.
const MAX_EXAMPLES: usize = 10;

fn is_zero(count: &u64) -> bool {
    *count == 0
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident $(: $line:literal)?,)*) => {
        /// Counts of documents, and of everything that was left out, replaced or noticed.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(default)]
        pub struct InputCounts {
            $($(#[$doc])* #[serde(skip_serializing_if = "is_zero")] pub $name: u64,)*
            /// The first rows that were left out, with the reasons.
            #[serde(skip_serializing_if = "Vec::is_empty")]
            pub examples: Vec<String>,
        }

        impl InputCounts {
            /// Adds the counts of other input. Examples beyond the first few are dropped.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                let room = MAX_EXAMPLES.saturating_sub(self.examples.len());
                self.examples.extend(other.examples.iter().take(room).cloned());
            }

            /// Returns a line for the user for each count that is not zero, and the examples.
            pub fn lines(&self) -> Vec<String> {
                let lines = [$($((self.$name, $line),)?)*];
                let lines = lines.into_iter().filter(|&(count, _)| count > 0);
                let lines = lines.map(|(count, line)| format!("{line}: {count}"));
                let examples = self.examples.iter().map(|example| format!("for example {example}"));
                lines.chain(examples).collect()
            }
        }
    };
}

counts! {
    /// Files that were read.
    files,
    /// Rows, or documents of text files, with those that were left out.
    rows,
    /// Documents that were passed on.
    documents,
    /// Bytes of text that were passed on.
    bytes,
    /// Documents without any character but white space, left out.
    empty: "documents left out because they are empty",
    /// Rows with null as text, left out.
    nulls: "rows left out because their text is null",
    /// Rows without the field, left out.
    no_key: "rows left out because they lack the text's key",
    /// Rows with something else than text in the field, left out.
    wrong_type: "rows left out because the key holds something else than text",
    /// Rows that are not JSON, left out.
    not_json: "rows left out because they are not JSON",
    /// Rows with text of which more than a tenth is not UTF-8, left out.
    not_text: "rows left out because their bytes are not text in UTF-8",
    /// Rows of more bytes than fit in memory, left out.
    too_long: "rows left out because they are too long",
    /// Rows in which some of several keys are missing or null, read without them.
    missing_parts: "rows read without one of several keys, which is missing or null",
    /// Documents with bytes that are not UTF-8, replaced by U+FFFD.
    invalid_utf8: "documents with bytes that are not UTF-8, replaced by U+FFFD",
    /// Documents with halves of surrogate pairs, replaced by U+FFFD.
    lone_surrogates: "documents with halves of surrogate pairs, replaced by U+FFFD",
    /// Rows with NaN or Infinity, which JSON does not allow.
    non_finite: "rows with NaN or Infinity, which were accepted",
    /// Documents with NUL characters, kept.
    nul: "documents with NUL characters, which were kept",
    /// Files or documents with a byte order mark, removed.
    byte_order_marks: "byte order marks that were removed",
    /// Documents with line ends of CR LF, kept.
    crlf: "documents with line ends of CR LF, which were kept",
    /// Files in UTF-16 or UTF-32, decoded.
    transcoded: "files in UTF-16 or UTF-32, which were decoded",
    /// Text files that look like JSON Lines, read as text.
    json_as_text: "text files that look like JSON but were read as text, as their suffix says",
    /// Documents with more than 2 MiB of white space before their text, of which the rest was left
    /// out.
    leading_space: "documents of which white space at the start was left out, beyond 2 MiB",
    /// Hidden files and folders, left out.
    hidden: "hidden files and folders that were left out",
    /// Paths that name a file or folder again, left out.
    repeated: "paths left out because they name a file or folder again",
    /// Files in folders that belong to other splits than `train`, left out.
    other_splits: "files left out because they belong to other splits than train",
    /// Files in folders that are not known, left out.
    unknown: "files left out because their kind is unknown",
}

impl InputCounts {
    /// Adds an example, if there is room.
    pub(crate) fn add_example(&mut self, example: impl FnOnce() -> String) {
        if self.examples.len() < MAX_EXAMPLES {
            self.examples.push(example());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_come_back_from_json() {
        let mut counts = InputCounts {
            nulls: 2,
            documents: 3,
            examples: vec!["a:1: null".into()],
            ..InputCounts::default()
        };
        let other = InputCounts {
            nulls: 1,
            examples: (0..20).map(|n| format!("b:{n}: null")).collect(),
            ..InputCounts::default()
        };
        counts.add(&other);
        assert_eq!((counts.nulls, counts.documents), (3, 3));
        assert_eq!(counts.examples.len(), MAX_EXAMPLES);
        assert_eq!(counts.examples[1], "b:0: null");
        assert_eq!(
            counts.lines()[0],
            "rows left out because their text is null: 3"
        );
        assert_eq!(counts.lines().len(), 1 + MAX_EXAMPLES);
        let json = serde_json::to_string(&counts).unwrap();
        assert!(!json.contains("crlf"), "{json}");
        assert_eq!(serde_json::from_str::<InputCounts>(&json).unwrap(), counts);
    }
}
