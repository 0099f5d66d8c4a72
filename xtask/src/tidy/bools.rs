//! No `match` on a bool.

use super::{
    report::Report,
    syntax::{line, visit_tokens},
};
use crate::tree::File;
use syn::{
    ExprMatch, Lit, Macro, Pat,
    visit::{self, Visit},
};

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    Matches { file, report }.visit_file(syntax);
}

struct Matches<'a> {
    file: &'a File,
    report: &'a mut Report,
}

impl Visit<'_> for Matches<'_> {
    fn visit_expr_match(&mut self, expression: &ExprMatch) {
        if expression.arms.iter().any(|arm| is_bool(&arm.pat)) {
            let message = "match on a bool: use `if` and `else`";
            self.report
                .problem(&self.file.path, line(expression), message);
        }
        visit::visit_expr_match(self, expression);
    }

    fn visit_macro(&mut self, call: &Macro) {
        visit_tokens(self, call.tokens.clone());
    }
}

fn is_bool(pattern: &Pat) -> bool {
    match pattern {
        Pat::Lit(literal) => matches!(literal.lit, Lit::Bool(_)),
        Pat::Guard(guarded) => is_bool(&guarded.pat),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    #[test]
    fn a_match_with_a_bool_pattern_is_found() {
        let source = "fn a() {\n match x { true => 1, false if y => 2, _ => 3 };\n}";
        let expected = ["2: match on a bool: use `if` and `else`"];
        assert_eq!(problems_in("a.rs", source, "bools"), expected);
    }

    #[test]
    fn matches_on_other_things_pass() {
        let source =
            "fn a() { match (x, y) { (true, _) => 1, _ => 2 }; match x { 1 => 2, _ => 3 } }";
        assert!(problems_in("a.rs", source, "bools").is_empty());
    }
}
