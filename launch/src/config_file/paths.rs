//! Paths in configurations: `~` and environment variables.

/// Replaces a leading `~` and all of `$NAME` and `${NAME}` by the values that `variable` returns.
///
/// # Errors
/// The variable that is not set, or another user's home.
pub(super) fn expand(
    path: &str,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<String, String> {
    let value = |name: &str| match variable(name) {
        Some(value) if !value.is_empty() => Ok(value),
        _ => Err(format!("the environment variable {name} is not set")),
    };
    let mut expanded = String::new();
    let mut rest = path;
    if let Some(after) = path.strip_prefix('~') {
        if !after.is_empty() && !after.starts_with('/') {
            return Err("only the home folder of the own user, ~, can be named".to_string());
        }
        expanded += &value("HOME")?;
        rest = after;
    }
    while let Some((before, after)) = rest.split_once('$') {
        expanded += before;
        let name;
        (name, rest) = variable_name(after)?;
        expanded += &match name {
            "" => "$".to_string(),
            name => value(name)?,
        };
    }
    Ok(expanded + rest)
}

/// Returns the name after a `$`, empty if there is none, and the text after the name.
fn variable_name(text: &str) -> Result<(&str, &str), String> {
    if let Some(text) = text.strip_prefix('{') {
        let (name, rest) = text.split_once('}').ok_or("${ has no }")?;
        let is_name = !name.is_empty() && name_len(name) == name.len();
        return if is_name {
            Ok((name, rest))
        } else {
            Err(format!("${{{name}}} is no environment variable"))
        };
    }
    Ok(text.split_at(name_len(text)))
}

/// Returns the length of the name at the beginning of a text.
fn name_len(text: &str) -> usize {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return 0;
    }
    let is_end = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    text.find(is_end).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_variables(path: &str) -> Result<String, String> {
        expand(path, &|name| match name {
            "HOME" => Some("/home/me".into()),
            "SCRATCH" => Some("/scratch".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        })
    }

    #[test]
    fn home_and_variables_are_replaced() {
        for (path, expected) in [
            ("~", "/home/me"),
            ("~/runs", "/home/me/runs"),
            ("$SCRATCH/x", "/scratch/x"),
            ("a/${SCRATCH}b/$SCRATCH", "a//scratchb//scratch"),
            ("a~b", "a~b"),
            ("cost$", "cost$"),
            ("a$1", "a$1"),
            ("größe/$SCRATCH", "größe//scratch"),
        ] {
            assert_eq!(with_variables(path).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn what_cannot_be_replaced_is_named() {
        for (path, word) in [
            ("$NOWHERE/x", "NOWHERE is not set"),
            ("${NOWHERE}", "NOWHERE is not set"),
            ("$EMPTY/x", "EMPTY is not set"),
            ("~other/x", "home folder of the own user"),
            ("${SCRATCH/x", "has no }"),
            ("${a b}", "no environment variable"),
        ] {
            let error = with_variables(path).unwrap_err();
            assert!(error.contains(word), "{path}: {error}");
        }
    }
}
