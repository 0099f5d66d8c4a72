//! No `for_each`, except on a rayon iterator: a `for` loop shows its side effects.

use super::{
    report::Report,
    syntax::{line, visit_tokens},
};
use crate::tree::File;
use syn::{
    Expr, ExprMethodCall, Macro,
    visit::{self, Visit},
};

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    Calls { file, report }.visit_file(syntax);
}

struct Calls<'a> {
    file: &'a File,
    report: &'a mut Report,
}

impl Visit<'_> for Calls<'_> {
    fn visit_expr_method_call(&mut self, call: &ExprMethodCall) {
        if call.method == "for_each" && !is_parallel(&call.receiver) {
            let message = "for_each with side effects: write a `for` loop";
            self.report
                .problem(&self.file.path, line(&call.method), message);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, call: &Macro) {
        visit_tokens(self, call.tokens.clone());
    }
}

/// True if the chain of calls that ends in `receiver` begins with a rayon iterator.
fn is_parallel(receiver: &Expr) -> bool {
    let Expr::MethodCall(call) = receiver else {
        return false;
    };
    let method = call.method.to_string();
    method.starts_with("par_") || method.starts_with("into_par_") || is_parallel(&call.receiver)
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    #[test]
    fn a_serial_for_each_is_found() {
        let source = "fn a() {\n x.iter()\n  .for_each(|y| b(y));\n}";
        let expected = ["3: for_each with side effects: write a `for` loop"];
        assert_eq!(problems_in("a.rs", source, "for_each"), expected);
    }

    #[test]
    fn rayon_chains_pass() {
        let source = "fn a() { x.par_chunks_mut(4).enumerate().for_each(|y| b(y)); }";
        assert!(problems_in("a.rs", source, "for_each").is_empty());
    }
}
