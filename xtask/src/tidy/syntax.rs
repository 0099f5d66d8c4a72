//! Parsed Rust, and questions that several checks ask of it.

use crate::tree::File;
use anyhow::{Result, anyhow};
use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, Block, Expr, Token, parse::Parser, punctuated::Punctuated, spanned::Spanned,
    visit::Visit,
};

/// Parses a Rust file.
///
/// # Errors
/// If the file is not Rust.
pub(super) fn parse(file: &File) -> Result<syn::File> {
    syn::parse_file(&file.text).map_err(|error| {
        let line = error.span().start().line;
        anyhow!("{}:{line}: cannot parse: {error}", file.path)
    })
}

/// Returns the line on which `node` begins.
pub(super) fn line(node: &impl Spanned) -> usize {
    node.span().start().line
}

/// True if an item exists only in tests.
pub(super) fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let path = attribute.path();
        path.is_ident("test")
            || (path.is_ident("cfg")
                && attribute
                    .parse_args::<syn::Path>()
                    .is_ok_and(|condition| condition.is_ident("test")))
    })
}

/// True if an item has a doc comment.
pub(super) fn has_docs(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|attribute| attribute.path().is_ident("doc"))
}

/// Visits what a macro is called with, as far as it is Rust: expressions, statements, and the same
/// inside its brackets.
pub(super) fn visit_tokens(visitor: &mut impl for<'a> Visit<'a>, tokens: TokenStream) {
    let expressions = Punctuated::<Expr, Token![,]>::parse_terminated;
    if let Ok(expressions) = expressions.parse2(tokens.clone()) {
        for expression in &expressions {
            visitor.visit_expr(expression);
        }
    } else if let Ok(statements) = Block::parse_within.parse2(tokens.clone()) {
        for statement in &statements {
            visitor.visit_stmt(statement);
        }
    } else {
        for token in tokens {
            if let TokenTree::Group(group) = token {
                visit_tokens(visitor, group.stream());
            }
        }
    }
}
