//! The names that a module defines, imports and mentions.

use crate::tidy::syntax::{is_test, line};
use proc_macro2::{TokenStream, TokenTree};
use std::collections::HashSet;
use syn::{
    Attribute, Ident, ImplItemFn, Item, ItemFn, ItemImpl, ItemMod, ItemUse, Macro, UseTree,
    Visibility,
    visit::{self, Visit},
};

/// A path of names and the line on which it stands.
#[derive(Debug)]
pub(super) struct Path {
    pub names: Vec<String>,
    pub line: usize,
}

/// A name that a `use` brings into scope.
#[derive(Debug)]
pub(super) struct Import {
    /// The name in this scope, or nothing for a glob, whose path ends in `*`.
    pub name: Option<String>,
    pub path: Path,
    /// True if other modules can see it here.
    pub is_reexport: bool,
}

/// The names of one module, without its tests and submodules.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub items: HashSet<String>,
    pub imports: Vec<Import>,
    pub mentions: Vec<Path>,
}

impl Names {
    pub(super) fn read(items: &[Item]) -> Names {
        let mut names = Names::default();
        for item in items {
            names.items.extend(defined(item).map(Ident::to_string));
            names.visit_item(item);
        }
        names
    }

    fn import(&mut self, tree: &UseTree, before: &[String], visibility: &Visibility) {
        let with = |name: &Ident| [before, &[name.to_string()]].concat();
        let (name, names) = match tree {
            UseTree::Path(path) => return self.import(&path.tree, &with(&path.ident), visibility),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(tree, before, visibility);
                }
                return;
            }
            // `use a::{self}` is `use a`.
            UseTree::Name(name) if name.ident == "self" => {
                (before.last().cloned(), before.to_vec())
            }
            UseTree::Name(name) => (Some(name.ident.to_string()), with(&name.ident)),
            UseTree::Rename(rename) => (Some(rename.rename.to_string()), with(&rename.ident)),
            UseTree::Glob(_) => (None, [before, &["*".to_owned()]].concat()),
        };
        let line = line(tree);
        self.imports.push(Import {
            name,
            path: Path { names, line },
            is_reexport: !matches!(visibility, Visibility::Inherited),
        });
    }

    /// Records the paths among the tokens of a macro call.
    fn mention_tokens(&mut self, tokens: TokenStream) {
        let mut path: Option<Path> = None;
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    let line = name.span().start().line;
                    let before = path.take().filter(|_| colons == 2);
                    let mut whole = before.unwrap_or(Path {
                        names: Vec::new(),
                        line,
                    });
                    whole.names.push(name.to_string());
                    path = Some(whole);
                    colons = 0;
                    continue;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => self.mention_tokens(group.stream()),
                _ => {}
            }
            self.mentions.extend(path.take());
            colons = 0;
        }
        self.mentions.extend(path);
    }
}

impl Visit<'_> for Names {
    fn visit_item_use(&mut self, item: &ItemUse) {
        if !is_test(&item.attrs) {
            self.import(&item.tree, &[], &item.vis);
        }
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let names = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string());
        self.mentions.push(Path {
            names: names.collect(),
            line: line(path),
        });
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &Macro) {
        self.mention_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_item_fn(&mut self, item: &ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &ItemImpl) {
        if !is_test(&item.attrs) {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &ImplItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    /// Submodules are read on their own.
    fn visit_item_mod(&mut self, _: &ItemMod) {}

    /// Attributes name macros and settings, not items.
    fn visit_attribute(&mut self, _: &Attribute) {}
}

/// Returns the name that an item defines.
fn defined(item: &Item) -> Option<&Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Macro(item) => item.ident.as_ref(),
        Item::Static(item) => Some(&item.ident),
        Item::Struct(item) => Some(&item.ident),
        Item::Trait(item) => Some(&item.ident),
        Item::Type(item) => Some(&item.ident),
        Item::Union(item) => Some(&item.ident),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_flat_and_mentions_reach_into_macros() {
        let source =
            "pub use a::{b, c as d, e::{self, *}};\nfn f() { g!(x, h::i(j)); k::l::<m::N>() }";
        let names = Names::read(&syn::parse_file(source).unwrap().items);
        let import = |import: &Import| {
            let name = import.name.clone().unwrap_or("*".to_owned());
            format!("{name}={}", import.path.names.join("::"))
        };
        let imports: Vec<String> = names.imports.iter().map(import).collect();
        assert_eq!(imports, ["b=a::b", "d=a::c", "e=a::e", "*=a::e::*"]);
        assert!(names.items.contains("f"));
        let paths = names.mentions.iter().map(|path| path.names.join("::"));
        let paths: HashSet<String> = paths.collect();
        for path in ["h::i", "j", "k::l", "m::N"] {
            assert!(paths.contains(path), "{path} is not in {paths:?}");
        }
    }
}
