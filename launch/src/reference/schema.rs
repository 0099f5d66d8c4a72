//! JSON schemas as the reference pages need them: references resolved and types in words.

use super::markdown::{code, inline};
use schemars::{JsonSchema, Schema, generate::SchemaSettings};
use serde_json::Value;

/// The schema of a type.
pub(super) struct SchemaRoot {
    root: Value,
}

/// A named value of an object.
pub(super) struct Field<'a> {
    pub name: &'a str,
    pub schema: &'a Value,
    pub required: bool,
}

/// One of several forms of a value.
pub(super) struct Variant<'a> {
    /// The form, as Markdown.
    pub label: String,
    pub description: &'a str,
}

impl SchemaRoot {
    /// Returns the schema of values that are read.
    pub(super) fn of_input<T: JsonSchema>() -> SchemaRoot {
        SchemaRoot::new(SchemaSettings::draft2020_12(), |generator| {
            generator.into_root_schema_for::<T>()
        })
    }

    /// Returns the schema of values that are written.
    pub(super) fn of_output<T: JsonSchema>() -> SchemaRoot {
        SchemaRoot::new(
            SchemaSettings::draft2020_12().for_serialize(),
            |generator| generator.into_root_schema_for::<T>(),
        )
    }

    fn new(
        settings: SchemaSettings,
        generate: impl FnOnce(schemars::SchemaGenerator) -> Schema,
    ) -> SchemaRoot {
        let schema = generate(settings.into_generator());
        SchemaRoot {
            root: schema.to_value(),
        }
    }

    pub(super) fn root(&self) -> &Value {
        &self.root
    }

    /// Follows references, and takes the value out of an option.
    pub(super) fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        if let Some(reference) = schema["$ref"].as_str() {
            let target = self.root.pointer(reference.trim_start_matches('#'));
            return self.resolve(target.expect("a definition"));
        }
        let options = list(&schema["anyOf"]);
        let is_null = |option: &Value| option["type"] == "null";
        if options.iter().any(is_null) && options.len() == 2 {
            let value = options.iter().find(|option| !is_null(option));
            return self.resolve(value.expect("one of two"));
        }
        schema
    }

    /// Returns the fields of an object, in their order.
    pub(super) fn fields<'a>(&'a self, schema: &'a Value) -> Vec<Field<'a>> {
        let schema = self.resolve(schema);
        let always = list(&schema["required"]);
        // Of the model, what a folder would give.
        let required = [always, list(&schema["else"]["required"])].concat();
        let properties = schema["properties"].as_object().into_iter().flatten();
        properties
            .map(|(name, schema)| Field {
                name,
                schema,
                required: required.iter().any(|required| required == name),
            })
            .collect()
    }

    /// Returns the forms of a value that has several; none if it has one.
    pub(super) fn variants<'a>(&'a self, schema: &'a Value) -> Vec<Variant<'a>> {
        let schema = self.resolve(schema);
        let mut variants = Vec::new();
        for option in list(&schema["oneOf"]).iter().chain(list(&schema["anyOf"])) {
            let inner = self.variants(option);
            if inner.len() > 1 {
                variants.extend(inner);
            } else {
                variants.push(Variant {
                    label: self.type_name(option),
                    description: description(option),
                });
            }
        }
        variants
    }

    /// Returns the type in words, as Markdown.
    pub(super) fn type_name(&self, schema: &Value) -> String {
        let schema = self.resolve(schema);
        if let Some(word) = schema["const"].as_str() {
            return code(word);
        }
        let options = list(&schema["oneOf"]).iter().chain(list(&schema["anyOf"]));
        let options: Vec<String> = options.map(|option| self.type_name(option)).collect();
        if !options.is_empty() {
            return options.join(", ");
        }
        match type_word(schema) {
            "array" => self.array_name(schema),
            "object" => self.object_name(schema),
            word => word.to_string(),
        }
    }

    fn array_name(&self, schema: &Value) -> String {
        let items = plural(&self.type_name(&schema["items"]));
        let [fewest, most] = ["minItems", "maxItems"].map(|limit| schema[limit].as_u64());
        match most.filter(|_| fewest == most) {
            Some(count) => format!("list of {count} {items}"),
            None => format!("list of {items}"),
        }
    }

    fn object_name(&self, schema: &Value) -> String {
        let patterns = schema["patternProperties"].as_object();
        let values = patterns
            .and_then(|patterns| patterns.values().next())
            .unwrap_or(&schema["additionalProperties"]);
        if values.is_object() {
            return format!("map of {}", plural(&self.type_name(values)));
        }
        let fields = self.fields(schema);
        let part = |field: &Field| format!("{}: ...", field.name);
        match fields.len() {
            0..=2 => {
                let parts: Vec<String> = fields.iter().map(part).collect();
                code(&format!("{{{}}}", parts.join(", ")))
            }
            _ => "section".to_string(),
        }
    }
}

/// Returns the first type that is not null.
fn type_word(schema: &Value) -> &str {
    match &schema["type"] {
        Value::String(word) => word,
        types => list(types)
            .iter()
            .filter_map(Value::as_str)
            .find(|word| *word != "null")
            .unwrap_or("any"),
    }
}

/// Returns the plural of a type in words. Values in code have none.
fn plural(name: &str) -> String {
    match name.split_once(" of ") {
        _ if name.contains('`') => name.to_string(),
        Some((container, values)) => format!("{container}s of {values}"),
        None => format!("{name}s"),
    }
}

/// Returns true if a value may be null.
pub(super) fn is_nullable(schema: &Value) -> bool {
    list(&schema["type"]).iter().any(|word| word == "null")
}

/// Returns the doc comment of a schema.
pub(super) fn description(schema: &Value) -> &str {
    schema["description"].as_str().unwrap_or_default()
}

/// Returns variants as items of a list.
pub(super) fn items(variants: &[Variant]) -> Vec<String> {
    variants
        .iter()
        .map(|variant| format!("{}: {}", variant.label, inline(variant.description)))
        .collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_list_names_its_length_if_only_one_is_possible() {
        let root = SchemaRoot { root: Value::Null };
        let name = |limits: Value| {
            let mut schema = json!({"type": "array", "items": {"type": "number"}});
            for (key, value) in limits.as_object().unwrap() {
                schema[key] = value.clone();
            }
            root.type_name(&schema)
        };
        assert_eq!(name(json!({})), "list of numbers");
        assert_eq!(name(json!({"maxItems": 8})), "list of numbers");
        assert_eq!(
            name(json!({"minItems": 1, "maxItems": 8})),
            "list of numbers"
        );
        assert_eq!(
            name(json!({"minItems": 2, "maxItems": 2})),
            "list of 2 numbers"
        );
    }
}
