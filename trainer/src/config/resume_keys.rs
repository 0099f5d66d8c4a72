//! The effects of changed keys on a run that resumes. Each key declares its own.

use super::Config;
use serde_json::{Map, Value};
use std::fmt::{Display, Formatter};

/// The effect of a changed key on a run that resumes. Later ones are stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResumeEffect {
    /// Results do not depend on the key.
    Free,
    /// The change is printed and recorded; the run continues with the new value.
    Reported,
    /// The saved weights would represent another function: the run does not start.
    Refused,
}

impl ResumeEffect {
    /// Returns the word of the key's attribute.
    pub fn name(self) -> &'static str {
        match self {
            ResumeEffect::Free => "free",
            ResumeEffect::Reported => "reported",
            ResumeEffect::Refused => "refused",
        }
    }
}

/// The rule of one key.
#[derive(Debug, Clone, Copy)]
pub enum ResumeRule {
    /// One effect for the key and everything below it.
    Effect(ResumeEffect),
    /// The rules of a section's keys.
    Section(&'static [ResumeKey]),
}

/// A key of a section.
#[derive(Debug, Clone, Copy)]
pub struct ResumeKey {
    /// The key, without its section.
    pub name: &'static str,
    /// The rule of the key.
    pub rule: ResumeRule,
}

/// A section whose keys all have a rule. `#[derive(ResumeKeys)]` implements it.
pub trait ResumeKeys {
    /// The keys of the section.
    const KEYS: &'static [ResumeKey];
}

impl<T: ResumeKeys> ResumeKeys for Option<T> {
    const KEYS: &'static [ResumeKey] = T::KEYS;
}

/// A key that differs between the configuration of a checkpoint and that of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyChange {
    /// The dotted key, such as `model.layers`.
    pub key: String,
    /// The value in the checkpoint; null if it is unset.
    pub saved: Value,
    /// The value of the run; null if it is unset.
    pub now: Value,
    /// The consequence of the change.
    pub effect: ResumeEffect,
}

impl Display for KeyChange {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        let show = |value: &Value| match value {
            Value::Null => "unset".to_string(),
            value => value.to_string(),
        };
        let KeyChange {
            key, saved, now, ..
        } = self;
        write!(out, "{key}: {} -> {}", show(saved), show(now))
    }
}

/// Returns the strictest effect below a rule.
fn strictest(rule: ResumeRule) -> ResumeEffect {
    match rule {
        ResumeRule::Effect(effect) => effect,
        ResumeRule::Section(keys) => {
            let effects = keys.iter().map(|key| strictest(key.rule));
            effects.max().unwrap_or(ResumeEffect::Free)
        }
    }
}

impl Config {
    /// Returns all keys that differ from those of the configuration in a checkpoint, derived
    /// values included.
    ///
    /// A section that only one of them has is one change, with the strictest effect of its keys.
    pub fn changes_from(&self, saved: &Config) -> Vec<KeyChange> {
        let value = |config: &Config| {
            serde_json::to_value(config.resolved()).expect("a configuration is plain data")
        };
        let mut changes = Vec::new();
        compare(Config::KEYS, "", &value(saved), &value(self), &mut changes);
        changes
    }

    /// Returns the effect of each dotted key on a run that resumes.
    pub fn resume_effects() -> Map<String, Value> {
        effects(Config::KEYS)
    }
}

fn compare(
    keys: &[ResumeKey],
    section: &str,
    saved: &Value,
    now: &Value,
    changes: &mut Vec<KeyChange>,
) {
    for ResumeKey { name, rule } in keys {
        let key = match section {
            "" => name.to_string(),
            section => format!("{section}.{name}"),
        };
        let saved = &saved[name];
        let now = &now[name];
        if let (ResumeRule::Section(keys), Value::Object(_), Value::Object(_)) = (rule, saved, now)
        {
            compare(keys, &key, saved, now, changes);
        } else if saved != now {
            changes.push(KeyChange {
                key,
                saved: saved.clone(),
                now: now.clone(),
                effect: strictest(*rule),
            });
        }
    }
}

/// Returns the effect of each dotted key, sections included, in the order of their declaration.
fn effects(keys: &[ResumeKey]) -> Map<String, Value> {
    fn list(keys: &[ResumeKey], section: &str, effects: &mut Map<String, Value>) {
        for ResumeKey { name, rule } in keys {
            let key = format!("{section}{name}");
            match rule {
                ResumeRule::Effect(effect) => {
                    effects.insert(key, effect.name().into());
                }
                ResumeRule::Section(keys) => list(keys, &format!("{key}."), effects),
            }
        }
    }
    let mut all = Map::new();
    list(keys, "", &mut all);
    all
}
