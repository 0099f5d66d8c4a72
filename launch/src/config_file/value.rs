//! Reads YAML into a JSON value, guided by the schema: text stays text where a key is text, whole
//! floats become integers, and numbers outside of their range become problems.

use super::{
    forms::{Forms, NumberForm},
    key_path::{KeyPath, Step},
    paths,
};
use serde::{
    Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use serde_saphyr::{NonFiniteFloatPolicy, Options};
use std::{cell::RefCell, fmt};

/// A value that its key does not allow.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BadValue {
    pub(super) path: KeyPath,
    /// The reason without the key.
    pub(super) reason: String,
}

/// Values of a text that their keys do not allow. Others stand in for them, so that one message can
/// name all problems.
pub(super) type BadValues = RefCell<Vec<BadValue>>;

/// Reads YAML as the value at `path`.
///
/// # Errors
/// If the text is no YAML, or a key is given twice.
pub(super) fn read(
    text: &str,
    forms: Forms,
    path: KeyPath,
    bad_values: &BadValues,
) -> Result<Value, serde_saphyr::Error> {
    let reader = Reader {
        forms,
        path,
        bad_values,
    };
    serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), |yaml| {
        reader.deserialize(yaml)
    })
}

/// Returns options of the parser with which NaN and infinity are numbers.
pub(super) fn yaml_options() -> Options {
    serde_saphyr::options! { non_finite_float_policy: NonFiniteFloatPolicy::PassThrough }
}

/// Reads one value in the form that its key allows.
struct Reader<'a> {
    forms: Forms,
    path: KeyPath,
    bad_values: &'a BadValues,
}

impl<'a> Reader<'a> {
    fn inner(&self, step: Step, forms: Forms) -> Reader<'a> {
        Reader {
            forms,
            path: self.path.with(step),
            bad_values: self.bad_values,
        }
    }

    fn refuse(&self, reason: String) {
        let path = self.path.clone();
        self.bad_values.borrow_mut().push(BadValue { path, reason });
    }

    /// Returns the number form of a key that allows nothing but numbers.
    fn only_number(&self) -> Option<NumberForm> {
        let others = ["string", "array", "object", "boolean"];
        let is_other = others.iter().any(|kind| self.forms.allows(kind));
        self.forms.number().filter(|_| !is_other)
    }

    /// Returns the number form of a key that allows numbers and words, but not values of `kind`.
    fn number_instead_of(&self, kind: &str) -> Option<NumberForm> {
        self.forms.number().filter(|_| !self.forms.allows(kind))
    }

    fn refuse_kind(&self, form: &NumberForm, given: &str) -> Value {
        let kind = if form.is_integer() {
            "a whole number"
        } else {
            "a number"
        };
        let range = form.range_words();
        self.refuse(format!("is {given}; it must be {kind} {range}"));
        form.stand_in()
    }

    fn number(&self, number: Value, shown: String) -> Value {
        let Some(form) = self.forms.number() else {
            return number;
        };
        if form.contains(&number) {
            return number;
        }
        let range = form.range_words();
        self.refuse(format!("is {shown}; it must be {range}"));
        form.stand_in()
    }

    fn float(&self, number: f64) -> Value {
        let shown = number.to_string();
        let Some(form) = self.forms.number() else {
            // JSON has no such number; as text it is refused by its key.
            return serde_json::Number::from_f64(number).map_or(shown.into(), Value::Number);
        };
        if form.is_integer() {
            return match whole(number) {
                Some(integer) => self.number(integer.clone(), integer.to_string()),
                None => self.refuse_kind(&form, &shown),
            };
        }
        if !number.is_finite() {
            let range = form.range_words();
            self.refuse(format!("is {shown}; it must be a finite number {range}"));
            return form.stand_in();
        }
        self.number(number.into(), shown)
    }

    fn text(&self, text: &str) -> Value {
        if self.forms.is_path() {
            let variable = |name: &str| std::env::var(name).ok();
            return match paths::expand(text, &variable) {
                Ok(path) => path.into(),
                Err(reason) => {
                    self.refuse(format!("is {text:?}: {reason}"));
                    text.into()
                }
            };
        }
        let Some(form) = self.only_number() else {
            return text.into();
        };
        // Quoted numbers are numbers to other YAML readers too.
        if let Ok(integer) = text.parse::<u64>() {
            return self.number(integer.into(), text.to_string());
        }
        match text.parse::<f64>() {
            Ok(number) => self.float(number),
            Err(_) => self.refuse_kind(&form, &format!("{text:?}")),
        }
    }
}

/// Returns a float as an integer if it is one.
fn whole(number: f64) -> Option<Value> {
    // 2^64 is the smallest float that no u64 holds.
    let limit = 2f64.powi(64);
    if number.fract() != 0.0 || !number.is_finite() || number >= limit || number < -limit / 2.0 {
        return None;
    }
    Some(if number < 0.0 {
        Value::from(number as i64)
    } else {
        Value::from(number as u64)
    })
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, yaml: D) -> Result<Value, D::Error> {
        if self.forms.is_text() {
            // Text that looks like a number or a truth value stays as it is written.
            yaml.deserialize_option(self)
        } else {
            yaml.deserialize_any(self)
        }
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let expected = if self.forms.is_text() {
            "text"
        } else {
            "a value"
        };
        out.write_str(expected)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, yaml: D) -> Result<Value, D::Error> {
        yaml.deserialize_str(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(match self.number_instead_of("boolean") {
            Some(form) => self.refuse_kind(&form, &value.to_string()),
            None => value.into(),
        })
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(self.number(value.into(), value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(self.number(value.into(), value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(self.float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(self.text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        if let Some(form) = self.number_instead_of("array") {
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(self.refuse_kind(&form, "a list"));
        }
        let forms = self.forms.item();
        let mut entries = Vec::new();
        loop {
            let entry = self.inner(Step::Index(entries.len()), forms.clone());
            match list.next_element_seed(entry)? {
                Some(entry) => entries.push(entry),
                None => return Ok(Value::Array(entries)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        if let Some(form) = self.number_instead_of("object") {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(self.refuse_kind(&form, "a section"));
        }
        let mut section = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let forms = self.forms.key(&key);
            let is_known = !forms.is_empty();
            let value = map.next_value_seed(self.inner(Step::Key(key.clone()), forms))?;
            // Null resets a key to its default.
            if !(value.is_null() && is_known) {
                section.insert(key, value);
            }
        }
        Ok(Value::Object(section))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_all(text: &str) -> (Value, Vec<String>) {
        let bad_values = BadValues::default();
        let value = read(text, Forms::of_config(), KeyPath::default(), &bad_values).unwrap();
        let shown = |bad: &BadValue| format!("{} {}", bad.path, bad.reason);
        let bad = bad_values.borrow().iter().map(shown).collect();
        (value, bad)
    }

    #[test]
    fn the_schema_decides_what_a_scalar_is() {
        for (text, expected) in [
            ("run: {dir: 12345}", json!({"run": {"dir": "12345"}})),
            ("run: {dir: no}", json!({"run": {"dir": "no"}})),
            ("run: {dir: 007}", json!({"run": {"dir": "007"}})),
            ("run: {dir: .inf}", json!({"run": {"dir": ".inf"}})),
            (
                "train: {steps: 1e9}",
                json!({"train": {"steps": 1_000_000_000}}),
            ),
            ("train: {steps: 20.0}", json!({"train": {"steps": 20}})),
            ("train: {steps: '20'}", json!({"train": {"steps": 20}})),
            (
                "run: {seed: 18446744073709551615}",
                json!({"run": {"seed": u64::MAX}}),
            ),
            (
                "parallel: {data: auto}",
                json!({"parallel": {"data": "auto"}}),
            ),
            ("parallel: {data: 4.0}", json!({"parallel": {"data": 4}})),
            ("train: {grad_clip: 1}", json!({"train": {"grad_clip": 1}})),
            ("train: {steps: null, micro_batch: ~}", json!({"train": {}})),
            ("model: {moe: null}", json!({"model": {}})),
            (
                "train: {unknown: null}",
                json!({"train": {"unknown": null}}),
            ),
        ] {
            assert_eq!(read_all(text), (expected, vec![]), "{text}");
        }
    }

    #[test]
    fn numbers_outside_of_their_range_are_all_named() {
        for (text, expected) in [
            (
                "train: {steps: 0}",
                "train.steps is 0; it must be at least 1",
            ),
            (
                "train: {steps: -1}",
                "train.steps is -1; it must be at least 1",
            ),
            (
                "train: {steps: 1.5}",
                "train.steps is 1.5; it must be a whole number at least 1",
            ),
            (
                "train: {steps: .nan}",
                "train.steps is NaN; it must be a whole number at least 1",
            ),
            (
                "train: {steps: 1e20}",
                "train.steps is 100000000000000000000; it must be a whole",
            ),
            (
                "train: {steps: []}",
                "train.steps is a list; it must be a whole number at least 1",
            ),
            (
                "train: {steps: wide}",
                "train.steps is \"wide\"; it must be a whole number",
            ),
            (
                "train: {steps: {}}",
                "train.steps is a section; it must be a whole number",
            ),
            (
                "train: {steps: true}",
                "train.steps is true; it must be a whole number",
            ),
            (
                "train: {grad_clip: -.inf}",
                "train.grad_clip is -inf; it must be a finite number",
            ),
            (
                "optimizer: {beta1: 1.0}",
                "optimizer.beta1 is 1; it must be from 0 to below 1",
            ),
            (
                "parallel: {data: 0}",
                "parallel.data is 0; it must be from 1 to",
            ),
            (
                "parallel: {zero: 256}",
                "parallel.zero is 256; it must be from 0 to 3",
            ),
            (
                "data: {eod_token: 4294967296}",
                "data.eod_token is 4294967296; it must be",
            ),
            (
                "schedule: {wsd: {lr: .inf}}",
                "schedule.wsd.lr is inf; it must be a finite number",
            ),
            (
                "data: {train: [{weight: 0}]}",
                "data.train[0].weight is 0; it must be above 0",
            ),
            (
                "restart: {step_timeout_s: .nan}",
                "restart.step_timeout_s is NaN; it must be a",
            ),
        ] {
            let (_, bad) = read_all(text);
            assert_eq!(bad.len(), 1, "{text}: {bad:?}");
            assert!(bad[0].starts_with(expected), "{text}: {bad:?}");
        }
    }

    #[test]
    fn keys_given_twice_are_refused() {
        let bad_values = BadValues::default();
        let text = "train: {steps: 1, steps: 2}";
        let result = read(text, Forms::of_config(), KeyPath::default(), &bad_values);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("duplicate"), "{error}");
    }
}
