//! The router: selects the experts of each token, and computes their routing weights.
// Shapes: T tokens, E experts, K selected experts, G groups of tokens.

use kernels::{RouterOutput, RouterScoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Function from logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Softmax over all experts (Mixtral, OLMoE).
    Softmax,
    /// Sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid,
}

/// Function from the scores of a group's experts to the score of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The best expert's (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
    Max,
    /// The sum of the best two (DeepSeek-V3's code).
    Top2Sum,
}

/// The rule by which a token selects its `top_k` experts.
#[derive(Debug, Clone)]
pub struct Router {
    pub num_experts: usize,
    pub top_k: usize,
    pub score: Score,
    /// True if the routing weights of a token are scaled to sum to one.
    pub normalize: bool,
    /// Factor on all routing weights, after normalization.
    pub scale: f64,
    /// Number of groups of neighboring experts.
    pub groups: usize,
    /// Number of best groups that experts are selected from. Equal to `groups`: all.
    pub top_groups: usize,
    pub group_score: GroupScore,
    /// True if each token selects `top_k / groups` experts in every group (MoGE, arXiv 2505.21411,
    /// section 3.1).
    pub even_groups: bool,
    /// True if experts are assigned round-robin instead of by score, so that loads are equal.
    pub force_balance: bool,
}

/// Routing of some tokens.
pub struct Routing {
    /// `[T, K]` int64, in descending order of score unless balance is forced.
    pub experts_tk: Tensor,
    /// `[T, K]` fp32, differentiable.
    pub weights_tk: Tensor,
    /// `[G, E]` fp32, differentiable: scores, normalized over the experts and summed over each
    /// group's tokens, for the load-balancing loss.
    pub prob_sums_ge: Tensor,
    /// `[]` fp32, differentiable: squared log-sum-exp of the logits, summed over all tokens, for
    /// the z-loss.
    pub z_sum: Tensor,
}

impl Router {
    /// Creates a router that selects the best `top_k` of `num_experts` by normalized softmax
    /// scores, without groups.
    pub fn new(num_experts: usize, top_k: usize) -> Router {
        Router {
            num_experts,
            top_k,
            score: Score::Softmax,
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            group_score: GroupScore::Max,
            even_groups: false,
            force_balance: false,
        }
    }

    /// Routes tokens with logits `logits_te` `[T, E]`. `groups` are consecutive ranges that cover
    /// all tokens.
    ///
    /// `bias_e` `[E]` is added to the scores that select experts, but not to the weights (loss-free
    /// balancing, arXiv 2408.15664). If `recorded_tk` `[T, K]` is given, these experts are used.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn route(
        &self,
        logits_te: &Tensor,
        bias_e: Option<&Tensor>,
        recorded_tk: Option<&Tensor>,
        groups: &[Range<usize>],
    ) -> Result<Routing, Error> {
        let logits_te = logits_te.to_kind(Kind::Float);
        let logits = logits_te.detach();
        let experts_tk = match recorded_tk {
            Some(recorded_tk) => recorded_tk.shallow_clone(),
            None => tch::no_grad(|| self.select_experts(&logits, bias_e)),
        };
        if !kernels::supports_router(&logits) {
            return Ok(self.route_with_libtorch(&logits_te, experts_tk, groups));
        }
        let router = RouterScoring {
            sigmoid: self.score == Score::Sigmoid,
            normalize: self.normalize,
            scale: self.scale,
        };
        let RouterOutput {
            weights_tk,
            prob_sums_ge,
            z_sum,
        } = kernels::router(&logits, &experts_tk, router, groups);
        let experts = experts_tk.shallow_clone();
        let groups = groups.to_vec();
        let outputs = attach_backward(
            &[&logits_te],
            vec![weights_tk, prob_sums_ge, z_sum],
            move |grads| {
                let grads = kernels::RouterGradients {
                    weights_tk: grads[0].as_ref(),
                    prob_sums_ge: grads[1].as_ref(),
                    z_sum: grads[2].as_ref(),
                };
                Ok(vec![Some(kernels::router_backward(
                    &logits, &experts, router, &groups, grads,
                ))])
            },
        )?;
        let [weights_tk, prob_sums_ge, z_sum] = outputs
            .try_into()
            .expect("there are as many outputs as inputs");
        Ok(Routing {
            experts_tk,
            weights_tk,
            prob_sums_ge,
            z_sum,
        })
    }

    /// Computes the routing of `experts_tk` by libtorch, on devices without a kernel.
    fn route_with_libtorch(
        &self,
        logits_te: &Tensor,
        experts_tk: Tensor,
        groups: &[Range<usize>],
    ) -> Routing {
        let scores_te = self.scores(logits_te);
        let mut weights_tk = scores_te.gather(1, &experts_tk, false);
        if self.normalize {
            weights_tk = normalize_rows(&weights_tk);
        }
        if self.scale != 1.0 {
            weights_tk = weights_tk * self.scale;
        }
        let probs_te = match self.score {
            Score::Softmax => scores_te,
            Score::Sigmoid => normalize_rows(&scores_te),
        };
        let sum_of_group = |tokens: &Range<usize>| {
            let probs = probs_te.narrow(0, tokens.start as i64, tokens.len() as i64);
            probs.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
        };
        let prob_sums: Vec<Tensor> = groups.iter().map(sum_of_group).collect();
        let prob_sums_ge = Tensor::stack(&prob_sums, 0);
        let z_sum = logits_te
            .logsumexp([-1i64].as_slice(), false)
            .square()
            .sum(Kind::Float);
        Routing {
            experts_tk,
            weights_tk,
            prob_sums_ge,
            z_sum,
        }
    }

    /// Returns the scores of logits `[T, E]` in their dtype, fp32 or fp64.
    pub(crate) fn scores(&self, logits_te: &Tensor) -> Tensor {
        match self.score {
            Score::Softmax => logits_te.softmax(-1, logits_te.kind()),
            Score::Sigmoid => logits_te.sigmoid(),
        }
    }

    fn select_experts(&self, logits_te: &Tensor, bias_e: Option<&Tensor>) -> Tensor {
        if self.force_balance {
            return self.round_robin(logits_te);
        }
        let grouped = self.even_groups || self.top_groups < self.groups;
        if !grouped && kernels::supports_router(logits_te) {
            let sigmoid = self.score == Score::Sigmoid;
            return kernels::select_experts(logits_te, bias_e, self.top_k, sigmoid);
        }
        let mut scores_te = self.scores(logits_te);
        if let Some(bias_e) = bias_e {
            scores_te += bias_e;
        }
        if self.even_groups {
            return self.select_in_each_group(&scores_te);
        }
        if self.top_groups < self.groups {
            scores_te = self.mask_all_but_top_groups(&scores_te);
        }
        scores_te.topk(self.top_k as i64, -1, true, true).1
    }

    fn round_robin(&self, logits_te: &Tensor) -> Tensor {
        let tokens = logits_te.size()[0];
        let top_k = self.top_k as i64;
        let indices = Tensor::arange(tokens * top_k, (Kind::Int64, logits_te.device()));
        indices
            .remainder(self.num_experts as i64)
            .view([tokens, top_k])
    }

    /// Views scores `[T, E]` as `[T, groups, E / groups]`.
    pub(crate) fn by_group(&self, scores_te: &Tensor) -> Tensor {
        let per_group = self.num_experts / self.groups;
        scores_te.view([-1, self.groups as i64, per_group as i64])
    }

    fn select_in_each_group(&self, scores_te: &Tensor) -> Tensor {
        let groups = self.groups as i64;
        let per_group = (self.num_experts / self.groups) as i64;
        let k = self.top_k as i64 / groups;
        let (_, within) = self.by_group(scores_te).topk(k, -1, true, true);
        let first = Tensor::arange(groups, (Kind::Int64, scores_te.device())) * per_group;
        let selected_tk = (within + first.unsqueeze(-1)).flatten(1, -1);
        let selected_scores = scores_te.gather(1, &selected_tk, false);
        let (_, order) = selected_scores.sort_stable(true, -1, true);
        selected_tk.gather(1, &order, false)
    }

    /// Returns the score of each group `[T, groups]`.
    pub(crate) fn group_scores(&self, scores_te: &Tensor) -> Tensor {
        let grouped = self.by_group(scores_te);
        let counted = match self.group_score {
            GroupScore::Max => 1,
            GroupScore::Top2Sum => 2.min(grouped.size()[2]),
        };
        let (best, _) = grouped.topk(counted, -1, true, false);
        best.sum_dim_intlist([-1i64].as_slice(), false, scores_te.kind())
    }

    /// Replaces the scores of experts outside of the best groups by negative infinity.
    pub(crate) fn mask_all_but_top_groups(&self, scores_te: &Tensor) -> Tensor {
        let grouped = self.by_group(scores_te);
        let group_scores = self.group_scores(scores_te);
        let (_, top) = group_scores.topk(self.top_groups as i64, -1, true, false);
        let is_top = group_scores
            .zeros_like()
            .scatter_value(1, &top, 1.0)
            .unsqueeze(-1);
        grouped
            .masked_fill(&is_top.eq(0.0), f64::NEG_INFINITY)
            .view_as(scores_te)
    }
}

/// Divides each row by its sum.
fn normalize_rows(rows: &Tensor) -> Tensor {
    let sums = rows.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
    rows / (sums + 1e-20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(score: Score) -> Router {
        Router {
            score,
            ..Router::new(4, 2)
        }
    }

    fn logits(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).view([-1, 4])
    }

    fn route(router: &Router, logits: &Tensor, bias: Option<&Tensor>) -> Routing {
        let all = 0..logits.size()[0] as usize;
        router
            .route(logits, bias, None, std::slice::from_ref(&all))
            .unwrap()
    }

    fn list<T>(tensor: &Tensor) -> Vec<T>
    where
        T: tch::kind::Element + Copy,
    {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    #[test]
    fn softmax_top_two_by_hand() {
        // e^0 : e^ln3 : e^ln2 : e^0 = 1 : 3 : 2 : 1
        let logits = logits(&[0.0, 3f32.ln(), 2f32.ln(), 0.0]);
        let routing = route(&router(Score::Softmax), &logits, None);
        assert_eq!(list::<i64>(&routing.experts_tk), [1, 2]);
        let weights = list::<f32>(&routing.weights_tk);
        assert!((weights[0] - 0.6).abs() < 1e-6 && (weights[1] - 0.4).abs() < 1e-6);
        let unnormalized = Router {
            normalize: false,
            scale: 2.0,
            ..router(Score::Softmax)
        };
        let raw = route(&unnormalized, &logits, None);
        assert!((list::<f32>(&raw.weights_tk)[0] - 6.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn kernel_and_libtorch_agree() {
        for score in [Score::Softmax, Score::Sigmoid] {
            for normalize in [false, true] {
                let router = Router {
                    normalize,
                    scale: 2.5,
                    ..router(score)
                };
                let logits =
                    Tensor::randn([9, 4], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
                let groups = [0..3, 3..9];
                let ours = router.route(&logits, None, None, &groups).unwrap();
                let experts = ours.experts_tk.shallow_clone();
                let theirs = router.route_with_libtorch(&logits, experts, &groups);
                let both = [&ours, &theirs].map(|routing| {
                    let outputs = [&routing.weights_tk, &routing.prob_sums_ge, &routing.z_sum];
                    let [weights, sums, z] = outputs.map(|output| output.square().sum(Kind::Float));
                    (weights + sums + z * 0.1).backward();
                    let gradient = logits.grad().copy();
                    let _ = logits.grad().zero_();
                    let [weights, sums, z] = outputs.map(Tensor::detach);
                    [weights, sums, z, gradient]
                });
                for (ours, theirs) in both[0].iter().zip(&both[1]) {
                    assert!(
                        ours.allclose(theirs, 1e-5, 1e-6, false),
                        "{score:?} {normalize}: {ours} {theirs}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_bias_selects_and_does_not_weigh() {
        let bias = Tensor::from_slice(&[10f32, 0., 0., 0.]);
        let routing = route(
            &router(Score::Sigmoid),
            &logits(&[-3., 2., 1., 0.]),
            Some(&bias),
        );
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 1]);
        let first = 1.0 / (1.0 + 3f32.exp());
        let second = 1.0 / (1.0 + (-2f32).exp());
        let expected = first / (first + second);
        assert!((list::<f32>(&routing.weights_tk)[0] - expected).abs() < 1e-6);
        let total: f32 = list::<f32>(&routing.prob_sums_ge).iter().sum();
        assert!((total - 1.0).abs() < 1e-6);
    }

    #[test]
    fn experts_are_selected_from_the_best_groups() {
        let limited = Router {
            groups: 2,
            top_groups: 1,
            ..router(Score::Softmax)
        };
        // The best expert is 0, so group {0, 1} wins. Expert 3 is better than 1, but not selected.
        let routing = route(&limited, &logits(&[5., 1., 2., 4.]), None);
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 1]);
        // If the best two of a group count, {2, 3} wins, although 0 is the best.
        for score in [Score::Sigmoid, Score::Softmax] {
            let limited = Router {
                score,
                group_score: GroupScore::Top2Sum,
                ..limited.clone()
            };
            let routing = route(&limited, &logits(&[2.1, -5., 2., 2.]), None);
            assert_eq!(list::<i64>(&routing.experts_tk).iter().sum::<i64>(), 5);
        }
    }

    #[test]
    fn forced_balance_is_round_robin_and_weighs_by_scores() {
        let forced = Router {
            force_balance: true,
            ..router(Score::Softmax)
        };
        let logits = Tensor::randn([6, 4], (Kind::Float, tch::Device::Cpu));
        let routing = route(&forced, &logits, None);
        assert_eq!(
            list::<i64>(&routing.experts_tk),
            [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
        );
        let scores = logits
            .softmax(-1, Kind::Float)
            .gather(1, &routing.experts_tk, false);
        let sums = scores.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        assert!(
            routing
                .weights_tk
                .allclose(&(&scores / sums), 1e-5, 1e-6, false)
        );
    }

    #[test]
    fn with_even_groups_each_group_has_an_equal_number() {
        let even = Router {
            groups: 2,
            even_groups: true,
            ..router(Score::Softmax)
        };
        let routing = route(&even, &logits(&[5., 4., 2., 1., 0., 1., 2., 9.]), None);
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 2, 3, 1]);
    }
}
