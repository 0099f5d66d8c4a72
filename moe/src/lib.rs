//! Mixture-of-Experts layers: routers, dispatch to experts on other ranks, and load balancing.
//!
//! A [`MoeLayer`] joins the parts. Its [`Router`] selects experts for each token. The
//! [`dispatch::Dispatcher`] sends tokens to the ranks that compute them, as [`plan`] decides from
//! the counts of all ranks. [`experts`] computes. If loads are uneven, [`lending`] spreads the work
//! over more ranks. [`balance`] has the losses that keep routing even.
//!
//! Invariants:
//! - Routing is dropless and exact: every routed token reaches its expert, on any rank.
//! - Plans are pure functions of plain numbers, so all ranks compute the same plan.
//! - A rank, an expert or a group without tokens takes part in every collective and in backward.
//!
//! ```
//! use moe::Router;
//! use moe::lending::assignment::home_loads;
//! use moe::lending::least_loaded::{Imbalance, Planner};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), torch_ext::Error> {
//! // 16 tokens select 2 of 8 experts each.
//! let logits_te = Tensor::randn([16, 8], (Kind::Float, Device::Cpu));
//! let routing = Router::new(8, 2).route(&logits_te, None, None, &[0..16])?;
//! assert_eq!(routing.experts_tk.size(), [16, 2]);
//! assert_eq!(routing.weights_tk.size(), [16, 2]);
//!
//! // Four ranks hold two experts each. The first expert is lent to the other ranks.
//! let loads = [6000, 500, 300, 300, 300, 200, 200, 200];
//! let planner = Planner {
//!     capacity: 1.0,
//!     min_tokens: 64,
//!     threshold: 1.3,
//!     over: Imbalance::Device,
//!     strict_paper: false,
//!     nodes: Vec::new(),
//! };
//! let assignment = planner.plan(&loads, 4);
//! assert!(assignment.lent_tokens() > 0);
//! assert!(assignment.loads()[0] < home_loads(&loads, 4)[0]);
//! # Ok(())
//! # }
//! ```

pub mod balance;
pub mod consistency;
pub mod dispatch;
mod exchange;
pub mod experts;
mod fp8;
mod hierarchy;
mod layer;
pub mod lending;
mod permute;
pub mod placement;
pub mod plan;
mod router;
mod selection_gap;

pub use layer::{
    MoeLayer, MoeOutput, MoeStats, MoeWeights, RoutedOutput, RoutingReplay, SavePolicy,
    SharedExperts,
};
pub use router::{GroupScore, Router, Routing, Score};
pub use selection_gap::smallest_gap_during;
