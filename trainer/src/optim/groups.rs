//! The optimizer of each parameter, by the role that it plays in the model.

use super::rule::{Rule, Update};
use crate::{
    config::{Dtype, GroupConfig, OptimizerConfig},
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
        Groups::check(config, kind, &Role::ALL, &mut Problems::default())
    }

    /// Does the same, and reports what is wrong with the configuration for a model that has
    /// `roles`.
    pub(crate) fn check(
        config: &OptimizerConfig,
        kind: Kind,
        roles: &[Role],
        problems: &mut Problems,
    ) -> Groups {
        let mut list: Vec<Group> = Vec::new();
        let mut sources: Vec<&GroupConfig> = Vec::new();
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
            if let Some(problem) = rule.problem() {
                problems.add(format!("{key}.{problem}"));
            }
            keys.push(key);
            sources.push(group);
            list.push(Group {
                rule,
                lr_scale: group.lr_scale,
            });
        }
        let mut assignment = Assignment {
            roles,
            of_role: [None; Role::ALL.len()],
        };
        for (number, group) in list.iter().enumerate() {
            if let Some(named) = &sources[number].roles {
                assignment.name(number, &keys[number], named, group.rule.as_ref(), problems);
            }
        }
        let takes_defaults = |number: &usize| sources[*number].roles.is_none();
        let unnamed: Vec<usize> = (0..list.len()).filter(takes_defaults).collect();
        let takes_rest = |&number: &usize| list[number].rule.default_roles().is_none();
        let (rests, with_defaults): (Vec<usize>, Vec<usize>) =
            unnamed.into_iter().partition(takes_rest);
        for number in with_defaults {
            let defaults = list[number].rule.default_roles().unwrap_or_default();
            assignment.take(number, &keys[number], defaults, problems);
        }
        for &number in &rests {
            assignment.take(number, &keys[number], &Role::ALL, problems);
        }
        let rest = rests.first().copied().unwrap_or_else(|| {
            let adamw = config.adamw();
            list.push(Group {
                rule: Arc::new(adamw),
                lr_scale: 1.0,
            });
            list.len() - 1
        });
        let groups = Groups {
            list,
            of_role: assignment.of_role.map(|group| group.unwrap_or(rest)),
            state_dtype: config.state_dtype,
        };
        groups.check_effects(&keys, &sources, roles, problems);
        groups
    }

    /// Reports options that change nothing in a model with `roles`.
    fn check_effects(
        &self,
        keys: &[String],
        sources: &[&GroupConfig],
        roles: &[Role],
        problems: &mut Problems,
    ) {
        for (number, (key, source)) in keys.iter().zip(sources).enumerate() {
            let mut own = roles
                .iter()
                .filter(|&&role| self.of_role[role as usize] == number);
            let mut decays = own.clone().filter(|role| role.decays());
            if own.next().is_some() && decays.next().is_none() && source.has_weight_decay() {
                problems.add(format!(
                    "{key} has a weight_decay, but norms and biases do not decay: leave it out"
                ));
            }
        }
        let keeps_state = |&role: &Role| !self.of(role).rule.state().is_empty();
        if self.state_dtype != Dtype::Fp32 && !roles.iter().any(keeps_state) {
            problems.add(
                "optimizer.state_dtype has no effect, because no optimizer of optimizer.groups \
                 keeps state: leave it out, or give sgd a momentum",
            );
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

/// The group of each role, while groups are read.
struct Assignment<'a> {
    /// The roles of the model's parameters.
    roles: &'a [Role],
    of_role: [Option<usize>; Role::ALL.len()],
}

impl Assignment<'_> {
    /// Gives group `number` the roles that its key names.
    fn name(
        &mut self,
        number: usize,
        key: &str,
        named: &[Role],
        rule: &dyn Rule,
        problems: &mut Problems,
    ) {
        if named.is_empty() {
            problems.add(format!(
                "{key}.roles is empty: name the roles of the group, or leave the group out"
            ));
        }
        for &role in named {
            let word = role.word();
            if let Some(problem) = rule.problem_with(role) {
                problems.add(format!("{key}.roles: leave {word} out: {problem}"));
            } else if !self.roles.contains(&role) {
                problems.add(format!(
                    "{key}.roles: leave {word} out: the model has no parameters with this role"
                ));
            }
            let taken = &mut self.of_role[role as usize];
            if taken.is_some() {
                problems.add(format!(
                    "{key}.roles: {word} is named twice in optimizer.groups: name it once"
                ));
            }
            taken.get_or_insert(number);
        }
    }

    /// Gives group `number` those of `wanted` that no other group has.
    fn take(&mut self, number: usize, key: &str, wanted: &[Role], problems: &mut Problems) {
        let mut is_used = false;
        for &role in wanted {
            let taken = &mut self.of_role[role as usize];
            is_used |= taken.is_none() && self.roles.contains(&role);
            taken.get_or_insert(number);
        }
        if !is_used {
            problems.add(format!(
                "{key} updates no parameters, because other groups update all of its roles: give \
                 it roles, or leave it out"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn check(groups: Value) -> (Groups, Vec<String>) {
        check_section(json!({"groups": groups}), &Role::ALL)
    }

    fn check_section(optimizer: Value, roles: &[Role]) -> (Groups, Vec<String>) {
        let config = serde_json::from_value(optimizer).unwrap();
        let mut problems = Problems::default();
        let groups = Groups::check(&config, Kind::Float, roles, &mut problems);
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
        // A group that names a role has it, whatever its place.
        let named = json!({"roles": ["expert"], "adamw": {"beta1": 0.8}});
        let muon_for_matrices = [adamw, adamw, adamw, muon, adamw, adamw];
        assert_eq!(state(json!([named, {"muon": {}}])), muon_for_matrices);
        assert_eq!(state(json!([{"muon": {}}, named])), muon_for_matrices);
        assert_eq!(
            state(json!([{"sgd": {}}, {"muon": {}}])),
            [sgd, sgd, sgd, muon, muon, sgd]
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
                "groups[0].roles is empty",
            ),
            (
                json!([{"muon": {}}, {"muon": {"momentum": 0.5}}]),
                "groups[1] updates no parameters",
            ),
            (
                json!([{"sgd": {"momentum": 0, "nesterov": true}}]),
                "groups[0].sgd.nesterov needs a momentum",
            ),
            (
                json!([{"roles": ["norm", "bias"], "adamw": {"weight_decay": 0.1}}]),
                "groups[0] has a weight_decay",
            ),
            (
                json!([{"roles": ["norm"], "sgd": {"weight_decay": 0.1}}]),
                "groups[0] has a weight_decay",
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

    #[test]
    fn options_for_parameters_that_the_model_lacks_are_refused() {
        let dense = [Role::Vocabulary, Role::Norm, Role::Matrix];
        let none = Vec::<String>::new();
        for (optimizer, expected) in [
            (
                json!({"groups": [{"roles": ["expert", "matrix"], "muon": {}}]}),
                "groups[0].roles: leave expert out: the model has no parameters",
            ),
            (
                json!({"groups": [{"roles": ["bias"], "sgd": {}}]}),
                "groups[0].roles: leave bias out",
            ),
            (
                json!({"groups": [{"roles": ["matrix"], "adamw": {}}, {"muon": {}}]}),
                "groups[1] updates no parameters",
            ),
            (
                json!({"groups": [{"sgd": {"momentum": 0}}], "state_dtype": "bf16"}),
                "optimizer.state_dtype has no effect",
            ),
        ] {
            let (_, problems) = check_section(optimizer.clone(), &dense);
            assert!(
                problems.len() == 1 && problems[0].contains(expected),
                "{optimizer}: {problems:?}"
            );
        }
        for optimizer in [
            json!({"groups": [{"muon": {}}], "state_dtype": "bf16"}),
            json!({"groups": [{"roles": ["norm", "matrix"], "adamw": {"weight_decay": 0.2}}]}),
            json!({"groups": [{"roles": ["norm"], "sgd": {}}]}),
        ] {
            assert_eq!(check_section(optimizer, &dense).1, none);
        }
    }
}
