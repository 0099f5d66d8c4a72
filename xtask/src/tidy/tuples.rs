//! No tuple as a parameter of a function.
//!
//! A tuple hides the number of parameters and has no names. Closures are exempt: iterators hand
//! them tuples.

use super::{report::Report, syntax::line};
use crate::tree::File;
use syn::{FnArg, Pat, Signature, Type, visit::Visit};

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    Signatures { file, report }.visit_file(syntax);
}

struct Signatures<'a> {
    file: &'a File,
    report: &'a mut Report,
}

impl Visit<'_> for Signatures<'_> {
    fn visit_signature(&mut self, signature: &Signature) {
        for input in &signature.inputs {
            if let FnArg::Typed(input) = input
                && (matches!(*input.pat, Pat::Tuple(_)) || is_tuple(&input.ty))
            {
                let message = format!(
                    "tuple parameter of `{}`: pass its parts, or a struct with names",
                    signature.ident
                );
                self.report.problem(&self.file.path, line(input), message);
            }
        }
    }
}

fn is_tuple(ty: &Type) -> bool {
    match ty {
        Type::Tuple(tuple) => !tuple.elems.is_empty(),
        Type::Reference(reference) => is_tuple(&reference.elem),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    #[test]
    fn tuples_are_found_in_functions_and_methods() {
        let source = "fn a(x: u8,\n (y, z): Pair) {}\nimpl A { fn b(&self, x: &(u8, u8)) {} }";
        let hint = "pass its parts, or a struct with names";
        let expected = [
            format!("2: tuple parameter of `a`: {hint}"),
            format!("3: tuple parameter of `b`: {hint}"),
        ];
        assert_eq!(problems_in("a.rs", source, "tuples"), expected);
    }

    #[test]
    fn closures_units_and_slices_of_tuples_pass() {
        let source = "fn a(x: &[(u8, u8)], y: ()) { x.iter().map(|(a, b)| a + b); }";
        assert!(problems_in("a.rs", source, "tuples").is_empty());
    }
}
