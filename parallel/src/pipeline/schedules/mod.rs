//! The orders of the papers, one file each. All are pure functions of the sizes.

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

/// A pipeline schedule from a paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ScheduleKind {
    /// GPipe (arXiv 1811.06965): all forwards, then all backwards. A rank holds every microbatch.
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward in turn (PipeDream, arXiv 1806.03377). Rank `i` of `p` holds `p -
    /// i` microbatches.
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B with several model chunks per rank (Megatron-LM, arXiv 2104.04473). The bubble is
    /// divided by the number of chunks.
    #[serde(rename = "interleaved")]
    Interleaved,
    /// 1F1B with weight gradients in the bubble (Zero Bubble, arXiv 2401.10241). It has a third of
    /// the bubble and the memory of 1F1B.
    #[serde(rename = "zb-h1")]
    ZbH1,
    /// Two chunks per rank in a V (Zero Bubble, arXiv 2401.10241). It has no bubble if F, B and W
    /// take equal times.
    #[serde(rename = "zb-v")]
    ZbV,
    /// Two chunks per rank in a V, with half of the activation memory of 1F1B (Controllable Memory,
    /// arXiv 2405.15362).
    #[serde(rename = "v-half")]
    VHalf,
    /// Two chunks per rank in a V, with a third of the activation memory of 1F1B (Controllable
    /// Memory, arXiv 2405.15362).
    #[serde(rename = "v-min")]
    VMin,
    /// DualPipe (DeepSeek-V3, arXiv 2412.19437) without its second copy of the parameters, as cut
    /// in half by Sea AI Lab. It overlaps forward and backward passes.
    #[serde(rename = "dualpipe-v")]
    DualPipeV,
}

impl ScheduleKind {
    /// All schedules with their names.
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

    /// Returns the name in configurations and commands.
    pub fn name(self) -> &'static str {
        ScheduleKind::NAMES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// Returns the number of chunks per rank; `wanted` is the user's choice.
    ///
    /// # Errors
    /// If the schedule does not support that choice.
    pub fn chunks(self, wanted: Option<usize>) -> Result<usize, String> {
        use ScheduleKind::*;
        match self {
            GPipe | OneFOneB | ZbH1 => fixed_chunks(self, 1, wanted),
            ZbV | VHalf | VMin | DualPipeV => fixed_chunks(self, 2, wanted),
            Interleaved => match wanted.unwrap_or(2) {
                0 | 1 => {
                    Err("interleaved needs at least 2 chunks per rank; with 1 it is 1f1b".into())
                }
                chunks => Ok(chunks),
            },
        }
    }

    /// Returns the order for `ranks` ranks and `microbatches` microbatches.
    ///
    /// # Errors
    /// If the schedule does not exist for these sizes. The message has the arithmetic and the
    /// nearest sizes for which it exists.
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
        check_size(ranks, microbatches, chunks)
            .map_err(|error| format!("{}: {error}", self.name()))?;
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

/// Most forward passes of all ranks in a step for which a schedule is made.
const MAX_FORWARDS: usize = 1 << 17;
/// Most ranks times messages: each rank of the planner remembers them.
const MAX_RANK_MESSAGES: usize = 1 << 24;

/// Refuses sizes for which planning would take more than seconds.
///
/// # Errors
/// The sizes and the limit.
pub(super) fn check_size(ranks: usize, microbatches: usize, chunks: usize) -> Result<(), String> {
    let forwards = ranks.saturating_mul(microbatches).saturating_mul(chunks);
    let limit = MAX_FORWARDS.min(MAX_RANK_MESSAGES / ranks.max(1));
    if forwards > limit {
        return Err(format!(
            "{ranks} ranks x {microbatches} microbatches x {chunks} chunks = {forwards} forward \
             passes; at most {limit} can be planned on {ranks} ranks"
        ));
    }
    Ok(())
}

fn fixed_chunks(kind: ScheduleKind, chunks: usize, wanted: Option<usize>) -> Result<usize, String> {
    match wanted {
        Some(other) if other != chunks => {
            let plural = if chunks == 1 { "" } else { "s" };
            Err(format!(
                "{} has {chunks} chunk{plural} per rank, not {other}",
                kind.name()
            ))
        }
        _ => Ok(chunks),
    }
}
