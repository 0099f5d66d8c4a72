//! Lines and columns of values in a YAML text.

use super::{
    key_path::{KeyPath, Step},
    value::yaml_options,
};
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor},
};
use std::fmt;

/// Columns of a line that an excerpt shows on each side of the place.
const EXCERPT_COLUMNS: usize = 40;

/// A place in a text, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: u64,
    pub(super) column: u64,
}

/// Returns the place of a value, or None if the text has no such value.
pub(super) fn locate(text: &str, path: &KeyPath) -> Option<Place> {
    let mut is_found = false;
    let seed = Search {
        steps: &path.0,
        is_found: &mut is_found,
    };
    // The parser's errors have a place: the search fails where it finds the value.
    let result =
        serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), |yaml| {
            seed.deserialize(yaml)
        });
    let place = result.err()?.location()?;
    is_found.then_some(Place {
        line: place.line(),
        column: place.column(),
    })
}

/// Returns the line of a place with a mark below it.
pub(super) fn excerpt(text: &str, place: Place) -> String {
    let line = text
        .lines()
        .nth(place.line as usize - 1)
        .unwrap_or_default();
    let column = place.column.saturating_sub(1) as usize;
    let start = column.saturating_sub(EXCERPT_COLUMNS);
    let shown = line.chars().skip(start).take(2 * EXCERPT_COLUMNS);
    // One column per character: the mark is below the right one.
    let shown: String = shown
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let number = place.line.to_string();
    let margin = " ".repeat(number.len());
    let mark = " ".repeat(column - start);
    format!("\n  {number} | {shown}\n  {margin} | {mark}^")
}

/// Walks to a value and fails there.
struct Search<'a> {
    steps: &'a [Step],
    is_found: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for Search<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, yaml: D) -> Result<(), D::Error> {
        if self.steps.is_empty() {
            *self.is_found = true;
            return Err(D::Error::invalid_type(Unexpected::Other("value"), &self));
        }
        yaml.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Search<'_> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "the search to end")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if self.steps[0] != Step::Key(key) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let inner = Search {
                steps: &self.steps[1..],
                is_found: &mut *self.is_found,
            };
            map.next_value_seed(inner)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        for index in 0.. {
            let is_next = self.steps[0] == Step::Index(index);
            let inner = Search {
                steps: &self.steps[1..],
                is_found: &mut *self.is_found,
            };
            let entry = if is_next {
                list.next_element_seed(inner)?
            } else {
                list.next_element::<IgnoredAny>()?.map(|_| ())
            };
            if entry.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Step {
        Step::Key(name.into())
    }

    #[test]
    fn values_are_found_in_both_styles() {
        let text = "a: 1\nb:\n  c: [x, {d: 2}]\n  e: 3\n";
        let line = |steps: &[Step]| locate(text, &KeyPath(steps.to_vec())).map(|place| place.line);
        assert_eq!(line(&[key("a")]), Some(1));
        assert_eq!(line(&[key("b"), key("e")]), Some(4));
        assert_eq!(
            line(&[key("b"), key("c"), Step::Index(1), key("d")]),
            Some(3)
        );
        assert_eq!(line(&[key("b"), key("x")]), None);
        assert_eq!(line(&[key("a"), key("x")]), None);
    }

    #[test]
    fn an_excerpt_marks_its_column() {
        let shown = excerpt("x\nab\u{1b}cd", Place { line: 2, column: 4 });
        assert_eq!(shown, "\n  2 | ab cd\n    |    ^");
    }
}
