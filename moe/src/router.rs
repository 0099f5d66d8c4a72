//! Routers: which experts a token goes to, and with what weight.
// Shapes: T tokens, E experts, K chosen experts, G groups of tokens.

use kernels::{RouterOutput, RouterScoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Softmax over all experts (Mixtral, OLMoE).
    Softmax,
    /// Sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid,
}

/// Top-k routing.
#[derive(Debug, Clone)]
pub struct Router {
    /// E.
    pub num_experts: usize,
    /// K.
    pub top_k: usize,
    /// Logits to scores.
    pub score: Score,
    /// Whether the weights of a token's chosen experts are made to sum to one.
    pub normalize: bool,
    /// Factor on all weights, after normalisation.
    pub scale: f64,
    /// Experts are divided into this many groups of neighbours ...
    pub groups: usize,
    /// ... of which only the best this many may be chosen from. Equal to `groups`: no limit.
    pub top_groups: usize,
    /// Whether a token chooses as many experts in each group (MoGE, arXiv 2505.21411, section 3.1): `top_k / groups`.
    pub even_groups: bool,
    /// Whether experts are chosen in turns instead, whatever their scores are: a token's are neighbours, and all have as much to do.
    pub force_balance: bool,
}

/// What a router decided for each token.
pub struct Routing {
    /// `[T, K]` int64, in descending order of score, if it is scores that decide.
    pub experts_tk: Tensor,
    /// `[T, K]` fp32, differentiable.
    pub weights_tk: Tensor,
    /// `[G, E]` fp32, differentiable: over each group's tokens, the sum of scores that sum to one over the experts, for the
    /// load-balancing loss.
    pub prob_sums_ge: Tensor,
    /// `[]` fp32, differentiable: the sum over all tokens of the square of their logits' log-sum-exp, for the z-loss.
    pub z_sum: Tensor,
}

impl Router {
    /// The best `top_k` of `num_experts`, by normalised softmax scores, without groups.
    pub fn new(num_experts: usize, top_k: usize) -> Router {
        let score = Score::Softmax;
        let normalize = true;
        let scale = 1.0;
        let groups = 1;
        let top_groups = 1;
        let even_groups = false;
        let force_balance = false;
        Router {
            num_experts,
            top_k,
            score,
            normalize,
            scale,
            groups,
            top_groups,
            even_groups,
            force_balance,
        }
    }

    /// Chooses experts from `logits_te` `[T, E]`. `bias_e` `[E]` is added to the scores for choosing only, not to
    /// the weights (loss-free balancing, arXiv 2408.15664). Choices `[T, K]` that have been made already stay. `groups` are neighbouring
    /// tokens, one group after another, that hold all of them.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn route(
        &self,
        logits_te: &Tensor,
        bias_e: Option<&Tensor>,
        chosen_tk: Option<&Tensor>,
        groups: &[Range<usize>],
    ) -> Result<Routing, Error> {
        let logits_te = logits_te.to_kind(Kind::Float);
        let logits = logits_te.detach();
        let experts_tk = match chosen_tk {
            Some(chosen_tk) => chosen_tk.shallow_clone(),
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
        let made = attach_backward(
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
        let [weights_tk, prob_sums_ge, z_sum] = made.try_into().expect("three went in");
        Ok(Routing {
            experts_tk,
            weights_tk,
            prob_sums_ge,
            z_sum,
        })
    }

    /// The same by libtorch.
    fn route_with_libtorch(
        &self,
        logits_te: &Tensor,
        experts_tk: Tensor,
        groups: &[Range<usize>],
    ) -> Routing {
        let scores_te = self.scores(logits_te);
        let mut weights_tk = scores_te.gather(1, &experts_tk, false);
        if self.normalize {
            weights_tk = &weights_tk
                / (weights_tk.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float) + 1e-20);
        }
        if self.scale != 1.0 {
            weights_tk = weights_tk * self.scale;
        }
        let probs_te = match self.score {
            Score::Softmax => scores_te,
            Score::Sigmoid => {
                &scores_te
                    / (scores_te.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float) + 1e-20)
            }
        };
        let sum_of = |tokens: &Range<usize>| {
            let probs = probs_te.narrow(0, tokens.start as i64, tokens.len() as i64);
            probs.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
        };
        let prob_sums_ge = Tensor::stack(&groups.iter().map(sum_of).collect::<Vec<_>>(), 0);
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

    fn scores(&self, logits_te: &Tensor) -> Tensor {
        match self.score {
            Score::Softmax => logits_te.softmax(-1, Kind::Float),
            Score::Sigmoid => logits_te.sigmoid(),
        }
    }

    fn select_experts(&self, logits_te: &Tensor, bias_e: Option<&Tensor>) -> Tensor {
        if self.force_balance {
            let tokens = logits_te.size()[0];
            let top_k = self.top_k as i64;
            let turns = Tensor::arange(tokens * top_k, (Kind::Int64, logits_te.device()));
            return turns
                .remainder(self.num_experts as i64)
                .view([tokens, top_k]);
        }
        let grouped = self.even_groups || self.top_groups < self.groups;
        if !grouped && kernels::supports_router(logits_te) {
            return kernels::select_experts(
                logits_te,
                bias_e,
                self.top_k,
                self.score == Score::Sigmoid,
            );
        }
        let mut scores_te = self.scores(logits_te);
        if let Some(bias_e) = bias_e {
            scores_te += bias_e;
        }
        if self.even_groups {
            let groups = self.groups as i64;
            let per_group = (self.num_experts / self.groups) as i64;
            let (_, within) = scores_te.view([-1, groups, per_group]).topk(
                self.top_k as i64 / groups,
                -1,
                true,
                true,
            );
            let first = Tensor::arange(groups, (Kind::Int64, scores_te.device())) * per_group;
            let chosen_tk = (within + first.unsqueeze(-1)).flatten(1, -1);
            // All of them, in descending order of score.
            let order = scores_te
                .gather(1, &chosen_tk, false)
                .sort_stable(true, -1, true)
                .1;
            return chosen_tk.gather(1, &order, false);
        }
        if self.top_groups < self.groups {
            let groups = self.groups as i64;
            let per_group = (self.num_experts / self.groups) as i64;
            let grouped = scores_te.view([-1, groups, per_group]);
            // A group counts as much as its best expert (DeepSeek-V2) or, with sigmoid scores, its best two (V3).
            let counted = if self.score == Score::Sigmoid {
                2.min(per_group)
            } else {
                1
            };
            let (best, _) = grouped.topk(counted, -1, true, false);
            let group_scores = best.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
            let (_, chosen) = group_scores.topk(self.top_groups as i64, -1, true, false);
            let open = group_scores
                .zeros_like()
                .scatter_value(1, &chosen, 1.0)
                .unsqueeze(-1);
            scores_te = grouped
                .masked_fill(&open.eq(0.0), f64::NEG_INFINITY)
                .view_as(&scores_te);
        }
        scores_te.topk(self.top_k as i64, -1, true, true).1
    }
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

    fn list<T: tch::kind::Element + Copy>(tensor: &Tensor) -> Vec<T> {
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
        let raw = route(
            &Router {
                normalize: false,
                scale: 2.0,
                ..router(Score::Softmax)
            },
            &logits,
            None,
        );
        assert!((list::<f32>(&raw.weights_tk)[0] - 6.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn loops_and_libtorch_agree() {
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
                let chosen = ours.experts_tk.shallow_clone();
                let theirs = router.route_with_libtorch(&logits, chosen, &groups);
                let both = [&ours, &theirs].map(
                    |Routing {
                         weights_tk,
                         prob_sums_ge,
                         z_sum,
                         ..
                     }| {
                        let outputs = [weights_tk, prob_sums_ge, z_sum];
                        let [weights, sums, z] =
                            outputs.map(|output| output.square().sum(Kind::Float));
                        (weights + sums + z * 0.1).backward();
                        let gradient = logits.grad().copy();
                        let _ = logits.grad().zero_();
                        let [weights, sums, z] = outputs.map(Tensor::detach);
                        [weights, sums, z, gradient]
                    },
                );
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
    fn the_bias_chooses_and_does_not_weigh() {
        let bias = Tensor::from_slice(&[10f32, 0., 0., 0.]);
        let routing = route(
            &router(Score::Sigmoid),
            &logits(&[-3., 2., 1., 0.]),
            Some(&bias),
        );
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 1]);
        let a = 1.0 / (1.0 + 3f32.exp());
        let b = 1.0 / (1.0 + (-2f32).exp());
        assert!((list::<f32>(&routing.weights_tk)[0] - a / (a + b)).abs() < 1e-6);
        let total: f32 = list::<f32>(&routing.prob_sums_ge).iter().sum();
        assert!((total - 1.0).abs() < 1e-6);
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        let limited = Router {
            groups: 2,
            top_groups: 1,
            ..router(Score::Softmax)
        };
        // The best expert is 0, so group {0, 1} wins and expert 3, though better than 1, is not chosen.
        let routing = route(&limited, &logits(&[5., 1., 2., 4.]), None);
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 1]);
        // With sigmoid scores the best two of a group count: here {2, 3} wins though 0 is the best.
        let limited = Router {
            score: Score::Sigmoid,
            ..limited
        };
        let routing = route(&limited, &logits(&[5., -5., 2., 2.]), None);
        assert_eq!(list::<i64>(&routing.experts_tk).iter().sum::<i64>(), 5);
    }

    #[test]
    fn forced_balance_takes_turns_and_weighs_by_scores() {
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
    fn with_even_groups_each_group_is_chosen_from_alike() {
        let even = Router {
            groups: 2,
            even_groups: true,
            ..router(Score::Softmax)
        };
        let routing = route(&even, &logits(&[5., 4., 2., 1., 0., 1., 2., 9.]), None);
        assert_eq!(list::<i64>(&routing.experts_tk), [0, 2, 3, 1]);
    }
}
