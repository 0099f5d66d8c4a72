//! The optimizer of each parameter, by the role that it plays in the model.

use super::rule::{Rule, Update};
use crate::{
    config::{Dtype, OptimizerConfig},
    model::role::Role,
    problems::Problems,
};
use std::sync::Arc;
use tch::Kind;

/// The optimizers of a run.
pub(crate) struct Groups {
    list: Vec<Group>,
    /// Index of the group of each of [`Role::ALL`].
    of_role: [usize; Role::ALL.len()],
    state_dtype: Dtype,
}

/// Parameters with one optimizer.
pub(crate) struct Group {
    pub(crate) rule: Arc<dyn Rule>,
    /// Factor on the learning rate.
    pub(crate) lr_scale: f64,
}

impl Groups {
    /// Returns the optimizers that a configuration describes, for a model that computes in `kind`.
    pub(crate) fn new(config: &OptimizerConfig, kind: Kind) -> Groups {
        Groups::check(config, kind, &mut Problems::default())
    }

    /// Does the same, and reports what is wrong with the configuration.
    pub(crate) fn check(config: &OptimizerConfig, kind: Kind, problems: &mut Problems) -> Groups {
        let mut list: Vec<Group> = Vec::new();
        let mut of_role = [None; Role::ALL.len()];
        let mut takes_rest = None;
        let mut keys = Vec::new();
        for (index, group) in config.groups.iter().enumerate() {
            let key = format!("optimizer.groups[{index}]");
            let mut rules = group.rules(config, kind);
            let rule = rules.pop().filter(|_| rules.is_empty());
            let Some(rule) = rule else {
                problems.add(format!(
                    "{key} needs one optimizer: give one of adamw, muon and sgd"
                ));
                continue;
            };
            let named = group.roles.as_deref();
            let mut is_used = false;
            for &role in named.or(rule.default_roles()).unwrap_or_default() {
                let word = role.word();
                if let Some(problem) = rule.problem_with(role) {
                    problems.add(format!("{key}.roles: leave {word} out: {problem}"));
                }
                let taken = &mut of_role[role as usize];
                if taken.is_none() {
                    *taken = Some(list.len());
                    is_used = true;
                } else if named.is_some() {
                    problems.add(format!(
                        "{key}.roles: {word} is named twice in optimizer.groups: name it once"
                    ));
                    is_used = true;
                }
            }
            if named.is_none() && rule.default_roles().is_none() {
                is_used = takes_rest.is_none();
                takes_rest.get_or_insert(list.len());
            }
            if !is_used {
                problems.add(format!(
                    "{key} updates no parameters, because other groups update all of its roles: \
                     give it roles, or leave it out"
                ));
            }
            keys.push(key);
            list.push(Group {
                rule,
                lr_scale: group.lr_scale,
            });
        }
        let rest = takes_rest.unwrap_or_else(|| {
            let adamw = config.adamw();
            list.push(Group {
                rule: Arc::new(adamw),
                lr_scale: 1.0,
            });
            list.len() - 1
        });
        if of_role.iter().all(Option::is_some)
            && let Some(group) = takes_rest
        {
            let key = &keys[group];
            problems.add(format!(
                "{key} updates no parameters, because other groups name all roles: leave it out"
            ));
        }
        Groups {
            list,
            of_role: of_role.map(|group| group.unwrap_or(rest)),
            state_dtype: config.state_dtype,
        }
    }

    /// Returns the group of parameters with this role.
    pub(crate) fn of(&self, role: Role) -> &Group {
        &self.list[self.of_role[role as usize]]
    }

    /// True if parameters with these roles have one group.
    pub(crate) fn are_together(&self, one: Role, other: Role) -> bool {
        self.of_role[one as usize] == self.of_role[other as usize]
    }

    /// Returns the dtype of all state.
    pub(crate) fn state_kind(&self) -> Kind {
        self.state_dtype.kind()
    }

    /// Returns the bytes of state per element of a parameter with this role.
    pub(crate) fn state_bytes(&self, role: Role) -> u64 {
        let tensors = self.of(role).rule.state().len();
        (tensors * self.state_kind().elt_size_in_bytes()) as u64
    }

    /// Returns the dtype of the whole matrices that the update of parameters with this role needs,
    /// if it does.
    pub(crate) fn matrix_kind(&self, role: Role) -> Option<Kind> {
        match self.of(role).rule.update() {
            Update::Matrices(rule) => Some(rule.kind()),
            Update::Rows(_) => None,
        }
    }

    /// True if the update of some parameters needs whole matrices.
    pub(crate) fn need_matrices(&self) -> bool {
        Role::ALL
            .iter()
            .any(|&role| self.matrix_kind(role).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn check(groups: Value) -> (Groups, Vec<String>) {
        let config = serde_json::from_value(json!({"groups": groups})).unwrap();
        let mut problems = Problems::default();
        let groups = Groups::check(&config, Kind::Float, &mut problems);
        (groups, problems.into_list())
    }

    /// Returns the names of the state of each role.
    fn state(groups: Value) -> Vec<&'static str> {
        let (groups, problems) = check(groups);
        assert_eq!(problems, Vec::<String>::new());
        let first = |&role: &Role| groups.of(role).rule.state().first().copied().unwrap_or("");
        Role::ALL.iter().map(first).collect()
    }

    #[test]
    fn roles_choose_the_optimizer() {
        let adamw = "exp_avg";
        let muon = "muon_momentum";
        let sgd = "sgd_momentum";
        assert_eq!(state(json!([])), [adamw; 6]);
        assert_eq!(
            state(json!([{"muon": {}}])),
            [adamw, adamw, adamw, muon, muon, adamw]
        );
        assert_eq!(
            state(json!([{"muon": {}}, {"sgd": {}}])),
            [sgd, sgd, sgd, muon, muon, sgd]
        );
        assert_eq!(
            state(json!([{"sgd": {"momentum": 0}}, {"roles": ["router"], "muon": {}}])),
            ["", "", muon, "", "", ""]
        );
        // The first group with a role by default takes it, whatever its place.
        assert_eq!(
            state(json!([{"roles": ["expert"], "adamw": {"beta1": 0.8}}, {"muon": {}}])),
            [adamw, adamw, adamw, muon, adamw, adamw]
        );
    }

    #[test]
    fn groups_that_contradict_or_do_nothing_are_refused() {
        for (groups, expected) in [
            (
                json!([{"roles": ["norm"]}]),
                "groups[0] needs one optimizer",
            ),
            (
                json!([{"sgd": {}, "muon": {}}]),
                "groups[0] needs one optimizer",
            ),
            (
                json!([{"roles": ["norm", "matrix"], "muon": {}}]),
                "groups[0].roles: leave norm out",
            ),
            (
                json!([{"roles": ["vocabulary"], "muon": {}}]),
                "leave vocabulary out",
            ),
            (
                json!([{"roles": ["norm"], "sgd": {}}, {"roles": ["norm"], "adamw": {}}]),
                "groups[1].roles: norm is named twice",
            ),
            (
                json!([{"sgd": {}}, {"adamw": {}}]),
                "groups[1] updates no parameters",
            ),
            (
                json!([{"roles": ["matrix", "expert"], "sgd": {}}, {"muon": {}}]),
                "groups[1] updates no parameters",
            ),
            (
                json!([{"roles": [], "sgd": {}}]),
                "groups[0] updates no parameters",
            ),
            (
                json!([
                    {"roles": ["vocabulary", "norm", "router", "matrix", "expert", "bias"],
                     "sgd": {}},
                    {"adamw": {}},
                ]),
                "groups[1] updates no parameters",
            ),
        ] {
            let (_, problems) = check(groups.clone());
            assert!(
                problems.len() == 1 && problems[0].contains(expected),
                "{groups}: {problems:?}"
            );
        }
    }
}
