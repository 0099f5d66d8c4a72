//! The ranges of numbers. The JSON schema declares them; this file reads them from it.

use super::{Config, ModelConfig};
use serde_json::Value;
use std::{
    fmt::{Display, Formatter},
    sync::OnceLock,
};

/// The limits that a JSON schema sets for a number.
#[derive(Debug, Clone, PartialEq)]
pub struct NumberRange {
    lower: Option<Limit>,
    upper: Option<Limit>,
}

#[derive(Debug, Clone, PartialEq)]
struct Limit {
    value: Value,
    is_exclusive: bool,
}

impl Limit {
    /// Returns the limit that the schema sets under one of these names.
    fn new(schema: &Value, inclusive: &str, exclusive: &str) -> Option<Limit> {
        let limit = |name: &str, is_exclusive: bool| {
            let value = whole(schema.get(name)?);
            Some(Limit {
                value,
                is_exclusive,
            })
        };
        limit(exclusive, true).or_else(|| limit(inclusive, false))
    }
}

/// Returns a number without its fraction if that is zero, so that 1.0 is shown as 1.
fn whole(value: &Value) -> Value {
    match value.as_f64() {
        Some(number) if number.fract() == 0.0 && number.abs() < 1e6 => (number as i64).into(),
        _ => value.clone(),
    }
}

impl NumberRange {
    /// Returns the limits in a schema, or None if it sets none.
    pub fn new(schema: &Value) -> Option<NumberRange> {
        let lower = Limit::new(schema, "minimum", "exclusiveMinimum");
        let upper = Limit::new(schema, "maximum", "exclusiveMaximum");
        if lower.is_none() && upper.is_none() {
            return None;
        }
        Some(NumberRange { lower, upper })
    }

    /// Returns true if the number is within the limits.
    pub fn contains(&self, number: &Value) -> bool {
        let above = self.lower.as_ref().is_none_or(|limit| {
            let least = compare(number, &limit.value);
            least.is_gt() || least.is_eq() && !limit.is_exclusive
        });
        let below = self.upper.as_ref().is_none_or(|limit| {
            let most = compare(number, &limit.value);
            most.is_lt() || most.is_eq() && !limit.is_exclusive
        });
        above && below
    }
}

/// Compares two numbers, exactly if both are integers.
fn compare(one: &Value, other: &Value) -> std::cmp::Ordering {
    match (as_integer(one), as_integer(other)) {
        (Some(one), Some(other)) => one.cmp(&other),
        _ => {
            let float = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            float(one).total_cmp(&float(other))
        }
    }
}

fn as_integer(value: &Value) -> Option<i128> {
    let unsigned = value.as_u64().map(i128::from);
    unsigned.or_else(|| value.as_i64().map(i128::from))
}

impl Display for NumberRange {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        match (&self.lower, &self.upper) {
            (Some(lower), None) if lower.is_exclusive => write!(out, "above {}", lower.value),
            (Some(lower), None) => write!(out, "at least {}", lower.value),
            (None, Some(upper)) if upper.is_exclusive => write!(out, "below {}", upper.value),
            (None, Some(upper)) => write!(out, "at most {}", upper.value),
            (Some(lower), Some(upper)) => {
                let least = &lower.value;
                let most = &upper.value;
                match (lower.is_exclusive, upper.is_exclusive) {
                    (true, true) => write!(out, "above {least} and below {most}"),
                    (true, false) => write!(out, "above {least} and at most {most}"),
                    (false, true) => write!(out, "from {least} to below {most}"),
                    (false, false) => write!(out, "from {least} to {most}"),
                }
            }
            (None, None) => Ok(()),
        }
    }
}

/// Returns the JSON schema of configurations.
pub fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(Config).to_value())
}

/// Follows the references of a part of [`schema`].
pub fn resolve_schema(schema: &Value) -> &Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let target = self::schema().pointer(reference.trim_start_matches('#'));
            resolve_schema(target.expect("a definition"))
        }
        None => schema,
    }
}

impl Config {
    /// Returns a message for each number that is outside of its range.
    pub fn range_problems(&self) -> Vec<String> {
        let value = serde_json::to_value(self).expect("a configuration is plain data");
        let mut problems = Vec::new();
        check(schema(), &value, "", &mut problems);
        problems
    }
}

impl ModelConfig {
    /// Returns a message for each number of the section that is outside of its range.
    pub(crate) fn range_problems(&self) -> Vec<String> {
        let value = serde_json::to_value(self).expect("a configuration is plain data");
        let mut problems = Vec::new();
        check(
            &schema()["properties"]["model"],
            &value,
            "model",
            &mut problems,
        );
        problems
    }
}

fn check(schema: &Value, value: &Value, key: &str, problems: &mut Vec<String>) {
    let schema = resolve_schema(schema);
    for form in ["anyOf", "oneOf"] {
        let forms = schema[form].as_array().into_iter().flatten();
        for form in forms.filter(|form| accepts(form, value)) {
            check(form, value, key, problems);
        }
    }
    match value {
        Value::Object(section) => {
            for (name, value) in section {
                let key = match key {
                    "" => name.clone(),
                    section => format!("{section}.{name}"),
                };
                check(&schema["properties"][name], value, &key, problems);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                check(
                    &schema["items"],
                    value,
                    &format!("{key}[{index}]"),
                    problems,
                );
            }
        }
        Value::Number(_) => {
            if let Some(range) = NumberRange::new(schema).filter(|range| !range.contains(value)) {
                problems.push(format!("{key} is {value}; it must be {range}"));
            }
        }
        // JSON has no number for these, and a key that may be unset has another type.
        Value::Null if schema["type"] == "number" => {
            problems.push(format!("{key} is not finite; it must be a finite number"));
        }
        _ => {}
    }
}

/// Returns true if a value may be of this form.
fn accepts(schema: &Value, value: &Value) -> bool {
    let schema = resolve_schema(schema);
    let mut forms = ["anyOf", "oneOf"]
        .iter()
        .flat_map(|form| schema[form].as_array().into_iter().flatten());
    if forms.any(|form| accepts(form, value)) {
        return true;
    }
    match value {
        Value::Object(section) => {
            let properties = &schema["properties"];
            section.keys().all(|name| properties.get(name).is_some())
        }
        Value::Array(_) => schema["type"] == "array",
        Value::Number(_) => schema["type"] == "integer" || schema["type"] == "number",
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn range(schema: Value) -> NumberRange {
        NumberRange::new(&schema).unwrap()
    }

    #[test]
    fn ranges_have_words() {
        for (schema, words) in [
            (json!({"minimum": 1}), "at least 1"),
            (json!({"minimum": 0.0}), "at least 0"),
            (json!({"exclusiveMinimum": 0}), "above 0"),
            (
                json!({"minimum": 0, "exclusiveMaximum": 1}),
                "from 0 to below 1",
            ),
            (
                json!({"exclusiveMinimum": 0, "maximum": 10.0}),
                "above 0 and at most 10",
            ),
            (json!({"minimum": 1, "maximum": 4}), "from 1 to 4"),
        ] {
            assert_eq!(range(schema).to_string(), words);
        }
        assert_eq!(NumberRange::new(&json!({"type": "integer"})), None);
    }

    #[test]
    fn limits_are_exact() {
        let below = range(json!({"minimum": 0, "exclusiveMaximum": 1}));
        assert!(below.contains(&json!(0)) && below.contains(&json!(0.999)));
        assert!(!below.contains(&json!(1.0)) && !below.contains(&json!(-1e-9)));
        let large = range(json!({"minimum": 0, "maximum": u64::MAX - 1}));
        assert!(large.contains(&json!(u64::MAX - 1)));
        assert!(!large.contains(&json!(u64::MAX)));
    }

    /// Every number of the schema has a lower limit, and every fraction is finite by its type.
    #[test]
    fn every_number_has_a_range() {
        fn walk(node: &Value, path: &str, missing: &mut Vec<String>) {
            let is_number = ["integer", "number"]
                .iter()
                .any(|kind| node["type"] == *kind || node["type"][0] == *kind);
            if is_number && NumberRange::new(node).is_none() {
                missing.push(path.to_string());
            }
            match node {
                Value::Object(map) => {
                    for (name, child) in map {
                        walk(child, &format!("{path}/{name}"), missing);
                    }
                }
                Value::Array(list) => {
                    for child in list {
                        walk(child, path, missing);
                    }
                }
                _ => {}
            }
        }
        let mut missing = Vec::new();
        walk(schema(), "", &mut missing);
        assert_eq!(missing, Vec::<String>::new());
    }
}
