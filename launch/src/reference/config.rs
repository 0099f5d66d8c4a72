//! The page of configuration keys.

use super::{
    markdown::{Page, code, inline},
    schema::{Field, SchemaRoot, description, items},
};
use serde_json::Value;
use trainer::config::Config;

const INTRODUCTION: &str = "\
An experiment is a YAML file with the sections below. Unknown keys are refused. `--set KEY=VALUE` \
changes one key on the command line, for example `--set train.steps=100`. `moerun config check` \
prints a configuration with all defaults. Editors read the same descriptions from the JSON schema \
`configs/schema.json`, which `moerun config schema` prints.";

pub(super) fn page() -> String {
    let schema = SchemaRoot::of_input::<Config>();
    let mut page = ConfigPage {
        page: Page::new("Configuration", "trainer/src/config"),
        schema: &schema,
    };
    page.page.paragraphs(INTRODUCTION);
    let sections = schema.fields(schema.root());
    page.overview(&sections);
    for section in sections {
        page.section(section.name, &code(section.name), section.schema, 2);
    }
    page.page.into_text()
}

struct ConfigPage<'a> {
    page: Page,
    schema: &'a SchemaRoot,
}

impl<'a> ConfigPage<'a> {
    fn overview(&mut self, sections: &[Field]) {
        let row = |section: &Field| {
            let needed = if section.required { "yes" } else { "no" };
            vec![
                format!("[`{0}`](#{0})", section.name),
                needed.to_string(),
                inline(description(section.schema)),
            ]
        };
        let rows: Vec<_> = sections.iter().map(row).collect();
        self.page.table(&["section", "required", "content"], &rows);
    }

    /// Adds the keys of the section at `path`, and its subsections, under this heading.
    fn section(&mut self, path: &str, heading: &str, node: &'a Value, level: usize) {
        self.page.heading(level, heading);
        let resolved = self.schema.resolve(node);
        self.page.paragraphs(description(resolved));
        let fields = self.schema.fields(node);
        if fields.is_empty() {
            self.page.paragraphs("One of:");
            self.page.list(&items(&self.schema.variants(node)));
        } else {
            let rows: Vec<_> = fields.iter().map(|field| self.row(field)).collect();
            self.page
                .table(&["key", "type", "default", "meaning"], &rows);
        }
        for field in &fields {
            let variants = self.schema.variants(field.schema);
            if variants.len() > 1 {
                self.page
                    .paragraphs(&format!("Values of `{}`:", field.name));
                self.page.list(&items(&variants));
            }
        }
        if fields.is_empty() {
            self.subsections(path, node, level);
        }
        for field in fields {
            let path = format!("{path}.{}", field.name);
            self.subsections(&path, field.schema, level);
        }
    }

    fn row(&self, field: &Field) -> Vec<String> {
        vec![
            code(field.name),
            self.type_cell(field),
            default(field),
            inline(description(field.schema)),
        ]
    }

    /// Returns the type in words, as Markdown.
    fn type_cell(&self, field: &Field) -> String {
        let resolved = self.schema.resolve(field.schema);
        let has_fields = !self.schema.fields(resolved).is_empty();
        if has_fields {
            return "section".to_string();
        }
        if resolved["type"] == "array" && !self.schema.fields(&resolved["items"]).is_empty() {
            return "list of sections".to_string();
        }
        self.schema.type_name(resolved)
    }

    /// Adds the sections within a value: of an object, of list entries, or of its forms.
    ///
    /// `level` is the level of the section that has the value.
    fn subsections(&mut self, path: &str, node: &'a Value, level: usize) {
        let resolved = self.schema.resolve(node);
        if !self.schema.fields(resolved).is_empty() {
            self.section(path, &code(path), resolved, level + 1);
        }
        let entries = &resolved["items"];
        if !self.schema.fields(entries).is_empty() {
            let path = format!("{path}[]");
            self.section(&path, &code(&path), entries, level + 1);
        }
        // A form `{name: value}` of an enum.
        for option in resolved["oneOf"].as_array().into_iter().flatten() {
            for field in self.schema.fields(option) {
                let path = format!("{path}.{}", field.name);
                self.subsections(&path, field.schema, level);
            }
        }
        let options = resolved["anyOf"].as_array().into_iter().flatten();
        let has_fields = |option: &&Value| !self.schema.fields(option).is_empty();
        let shares_path = options.clone().filter(has_fields).count() > 1;
        for option in options {
            if shares_path && has_fields(&option) {
                let form = self.schema.type_name(option);
                let heading = format!("{}: {form}", code(path));
                self.section(path, &heading, option, level + 1);
            } else {
                self.subsections(path, option, level);
            }
        }
    }
}

/// Returns the default of a key, as Markdown.
fn default(field: &Field) -> String {
    if field.required {
        return "required".to_string();
    }
    match &field.schema["default"] {
        Value::Null => "unset".to_string(),
        Value::Object(_) => String::new(),
        Value::String(text) => code(text),
        value => code(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_headings_are_equal() {
        let page = page();
        let headings = page.lines().filter(|line| line.starts_with('#'));
        let mut seen = HashSet::new();
        for heading in headings {
            let name = heading.trim_start_matches('#');
            assert!(seen.insert(name), "{heading}");
        }
        assert!(seen.contains(" `model.rope.layers`: `{every: ..., from: ...}`"));
        assert!(seen.contains(" `model.rope.layers`: `{all_but: ...}`"));
    }
}
