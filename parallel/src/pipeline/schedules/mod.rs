//! The known orders, one file each. All are pure functions of the sizes.

mod dual_pipe_v;
mod gpipe;
mod interleaved;
mod one_f_one_b;
mod v_shape;
mod zb_h1;
mod zb_v;

use super::Order;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A known order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ScheduleKind {
    /// All forwards, then all backwards (arXiv 1811.06965). Holds every microbatch.
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward (arXiv 1806.03377). Rank `i` of `p` holds `p - i` microbatches.
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B over several chunks a rank (arXiv 2104.04473): the bubble divided by the number of chunks.
    #[serde(rename = "interleaved")]
    Interleaved,
    /// 1F1B with weight gradients in the bubble (arXiv 2401.10241): a third of the bubble, the memory of 1F1B.
    #[serde(rename = "zb-h1")]
    ZbH1,
    /// Two chunks in a V, no bubble where F, B and W take equal times (arXiv 2401.10241).
    #[serde(rename = "zb-v")]
    ZbV,
    /// Two chunks in a V, half of 1F1B's memory (arXiv 2405.15362).
    #[serde(rename = "v-half")]
    VHalf,
    /// Two chunks in a V, a third of 1F1B's memory (arXiv 2405.15362).
    #[serde(rename = "v-min")]
    VMin,
    /// DualPipe without its second copy of the parameters (arXiv 2412.19437; cut in half by Sea AI Lab).
    #[serde(rename = "dualpipe-v")]
    DualPipeV,
}

impl ScheduleKind {
    /// All of them, with their names.
    pub const NAMES: [(ScheduleKind, &'static str); 8] = [
        (ScheduleKind::GPipe, "gpipe"),
        (ScheduleKind::OneFOneB, "1f1b"),
        (ScheduleKind::Interleaved, "interleaved"),
        (ScheduleKind::ZbH1, "zb-h1"),
        (ScheduleKind::ZbV, "zb-v"),
        (ScheduleKind::VHalf, "v-half"),
        (ScheduleKind::VMin, "v-min"),
        (ScheduleKind::DualPipeV, "dualpipe-v"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        ScheduleKind::NAMES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// Chunks of a rank, where `wanted` is what a person asked for.
    ///
    /// # Errors
    /// When the order has another number of chunks.
    pub fn chunks(self, wanted: Option<usize>) -> Result<usize, String> {
        use ScheduleKind::*;
        match self {
            GPipe | OneFOneB | ZbH1 => fixed_chunks(self, 1, wanted),
            ZbV | VHalf | VMin | DualPipeV => fixed_chunks(self, 2, wanted),
            Interleaved => match wanted.unwrap_or(2) {
                0 | 1 => {
                    Err("interleaved needs at least 2 chunks a rank; with 1 it is 1f1b".into())
                }
                chunks => Ok(chunks),
            },
        }
    }

    /// The order for `ranks` ranks and `microbatches` microbatches.
    ///
    /// # Errors
    /// When the order does not exist for these sizes: the arithmetic, and the nearest size for which it does.
    pub fn order(
        self,
        ranks: usize,
        microbatches: usize,
        chunks: Option<usize>,
    ) -> Result<Order, String> {
        if ranks == 0 || microbatches == 0 {
            return Err(format!(
                "{} needs at least one rank and one microbatch",
                self.name()
            ));
        }
        let chunks = self.chunks(chunks)?;
        Ok(match self {
            ScheduleKind::GPipe => gpipe::order(ranks, microbatches),
            ScheduleKind::OneFOneB => one_f_one_b::order(ranks, microbatches),
            ScheduleKind::Interleaved => interleaved::order(ranks, microbatches, chunks)?,
            ScheduleKind::ZbH1 => zb_h1::order(ranks, microbatches),
            ScheduleKind::ZbV => zb_v::order(ranks, microbatches),
            ScheduleKind::VHalf => v_shape::order(v_shape::half(ranks), ranks, microbatches),
            ScheduleKind::VMin => v_shape::order(v_shape::min(ranks), ranks, microbatches),
            ScheduleKind::DualPipeV => dual_pipe_v::order(ranks, microbatches)?,
        })
    }
}

fn fixed_chunks(kind: ScheduleKind, chunks: usize, wanted: Option<usize>) -> Result<usize, String> {
    match wanted {
        Some(other) if other != chunks => {
            let plural = if chunks == 1 { "" } else { "s" };
            Err(format!(
                "{} has {chunks} chunk{plural} a rank, not {other}",
                kind.name()
            ))
        }
        _ => Ok(chunks),
    }
}
