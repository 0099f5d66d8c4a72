//! Passes and orders as text: `F3`, `B0.1` (chunk 1), one line per rank.

use super::{
    Collective, CollectiveKind, Message, Order, Pass, PassKind, Payload, Placement,
    schedules::check_size,
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Microbatches and chunks in a text are below this.
const MAX_NUMBER: usize = 1 << 20;

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.kind.name(), self.microbatch)?;
        if self.chunk > 0 {
            write!(f, ".{}", self.chunk)
        } else {
            Ok(())
        }
    }
}

impl FromStr for Pass {
    type Err = String;

    fn from_str(text: &str) -> Result<Pass, String> {
        let letters = text
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(text.len());
        let (name, numbers) = text.split_at(letters);
        let (microbatch, chunk) = numbers.split_once('.').unwrap_or((numbers, "0"));
        let kind = PassKind::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(kind, _)| *kind);
        let small = |number: &str| number.parse().ok().filter(|&number| number < MAX_NUMBER);
        match (kind, small(microbatch), small(chunk)) {
            (Some(kind), Some(microbatch), Some(chunk)) => Ok(Pass {
                kind,
                chunk,
                microbatch,
            }),
            _ => Err(format!(
                "invalid pass {text:?}: write F3, BW3, B3 or W3 for microbatch 3, and F3.1 for the \
                 rank's second chunk; both are below {MAX_NUMBER}"
            )),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Message {
            payload,
            stage,
            microbatch,
        } = self;
        let name = match payload {
            Payload::Activation => "activation",
            Payload::Gradient => "gradient",
        };
        write!(f, "the {name} of microbatch {microbatch} for stage {stage}")
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            CollectiveKind::Hidden => "the broadcast of the last hidden state",
            CollectiveKind::Maximum => "the maximum of the logits",
            CollectiveKind::Statistics => "the reduction of logit statistics",
            CollectiveKind::HiddenGradient => "the sum of the hidden state's gradient",
            CollectiveKind::Embedding => "the sum of the embedding",
            CollectiveKind::EmbeddingGradient => "the broadcast of the embedding's gradient",
        };
        write!(f, "{name} of microbatch {}", self.microbatch)
    }
}

/// A user's own schedule: the file form of an [`Order`].
///
/// ```yaml
/// placement: v
/// chunks: 2
/// ranks:
///   - F0 F1 F0.1 BW0.1 BW0 F1.1 BW1.1 BW1
///   - F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderFile {
    /// The assignment of stages to ranks.
    #[serde(default = "default_placement")]
    pub placement: Placement,
    /// Number of model chunks per rank.
    #[serde(default = "default_chunks")]
    pub chunks: usize,
    /// The passes of each rank, separated by spaces.
    pub ranks: Vec<String>,
}

fn default_placement() -> Placement {
    Placement::Loop
}

fn default_chunks() -> usize {
    1
}

impl OrderFile {
    /// Returns the order. Its number of microbatches is one more than the largest in the file.
    ///
    /// # Errors
    /// The first word that is not a pass, with its rank.
    pub fn parse(&self) -> Result<Order, String> {
        let mut ranks = Vec::new();
        for (rank, line) in self.ranks.iter().enumerate() {
            let passes: Result<Vec<Pass>, String> =
                line.split_whitespace().map(str::parse).collect();
            ranks.push(passes.map_err(|error| format!("rank {rank}: {error}"))?);
        }
        let microbatches = ranks
            .iter()
            .flatten()
            .map(|pass: &Pass| pass.microbatch + 1)
            .max()
            .unwrap_or(0);
        let chunks = self.chunks;
        if !(1..MAX_NUMBER).contains(&chunks) {
            return Err(format!(
                "chunks is {chunks}; it must be from 1 to below {MAX_NUMBER}"
            ));
        }
        if ranks.is_empty() {
            return Err("ranks is empty: give a line of passes for each rank".to_string());
        }
        check_size(ranks.len(), microbatches, chunks)?;
        let placement = self.placement;
        Ok(Order {
            microbatches,
            chunks,
            placement,
            vocabulary: None,
            ranks,
        })
    }
}

impl From<&Order> for OrderFile {
    fn from(order: &Order) -> OrderFile {
        let line = |passes: &Vec<Pass>| {
            let passes: Vec<String> = passes.iter().map(Pass::to_string).collect();
            passes.join(" ")
        };
        OrderFile {
            placement: order.placement,
            chunks: order.chunks,
            ranks: order.ranks.iter().map(line).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_read_as_they_are_written() {
        for (kind, _) in PassKind::NAMES {
            for (chunk, microbatch) in [(0, 0), (1, 12)] {
                let pass = Pass {
                    kind,
                    chunk,
                    microbatch,
                };
                assert_eq!(pass.to_string().parse(), Ok(pass));
            }
        }
        let large = u64::MAX.to_string();
        let large = [
            format!("F{large}"),
            format!("F0.{large}"),
            format!("F1{large}"),
        ];
        let large: Vec<&str> = large.iter().map(String::as_str).collect();
        let wrong = ["", "F", "X1", "F1.", "F-1", "3", "F1048576", "F\u{1b}1"];
        for wrong in wrong.into_iter().chain(large) {
            let error = wrong.parse::<Pass>().unwrap_err();
            assert!(error.contains("invalid pass"), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_word_is_named_with_its_rank() {
        let file = OrderFile {
            placement: Placement::Loop,
            chunks: 1,
            ranks: vec!["F0 BW0".into(), "F0 Q0".into()],
        };
        let error = file.parse().unwrap_err();
        assert!(error.starts_with("rank 1: invalid pass \"Q0\""), "{error}");
    }

    #[test]
    fn sizes_that_cannot_be_planned_are_refused() {
        let with = |chunks: usize, line: &str| OrderFile {
            placement: Placement::Loop,
            chunks,
            ranks: vec![line.to_string()],
        };
        for (file, word) in [
            (with(0, "F0 BW0"), "chunks is 0; it must be from 1"),
            (with(usize::MAX, "F0 BW0"), "it must be from 1"),
            (
                with(1024, "F1048575"),
                "1 ranks x 1048576 microbatches x 1024 chunks",
            ),
        ] {
            let error = file.parse().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let empty = OrderFile {
            ranks: Vec::new(),
            ..with(1, "")
        };
        assert!(empty.parse().unwrap_err().contains("ranks is empty"));
    }
}
