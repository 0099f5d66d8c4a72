//! No `let` that packs several bindings into a tuple.
//!
//! `let (a, b) = (x, y);` is two statements in one. A tuple that a function returns is fine.

use super::{
    report::Report,
    syntax::{line, visit_tokens},
};
use crate::tree::File;
use syn::{
    Expr, Local, Macro, Pat,
    visit::{self, Visit},
};

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    Lets { file, report }.visit_file(syntax);
}

struct Lets<'a> {
    file: &'a File,
    report: &'a mut Report,
}

impl Visit<'_> for Lets<'_> {
    fn visit_local(&mut self, local: &Local) {
        let initial = local.init.as_ref().map(|init| &*init.expr);
        if let Pat::Tuple(names) = untyped(&local.pat)
            && let Some(Expr::Tuple(values)) = initial
            && names.elems.len() == values.elems.len()
        {
            let count = names.elems.len();
            let message = format!("one let for {count} bindings: write {count} let statements");
            self.report.problem(&self.file.path, line(local), message);
        }
        visit::visit_local(self, local);
    }

    fn visit_macro(&mut self, call: &Macro) {
        visit_tokens(self, call.tokens.clone());
    }
}

fn untyped(pattern: &Pat) -> &Pat {
    match pattern {
        Pat::Type(typed) => &typed.pat,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    #[test]
    fn packed_bindings_are_found() {
        let source = "fn a() {\n let (x, y) = (1, 2);\n let (x, y): (u8, u8) = (1, 2);\n}";
        let expected = [
            "2: one let for 2 bindings: write 2 let statements",
            "3: one let for 2 bindings: write 2 let statements",
        ];
        assert_eq!(problems_in("a.rs", source, "lets"), expected);
    }

    #[test]
    fn macros_are_searched() {
        let source = "proptest! {\n fn a(x in 0..9) {\n  let (y, z) = (x, x);\n }\n}";
        let expected = ["3: one let for 2 bindings: write 2 let statements"];
        assert_eq!(problems_in("a.rs", source, "lets"), expected);
    }

    #[test]
    fn tuples_that_a_function_returns_pass() {
        let source = "fn a() { let (x, y) = b(); let z = (x, y); }";
        assert!(problems_in("a.rs", source, "lets").is_empty());
    }
}
