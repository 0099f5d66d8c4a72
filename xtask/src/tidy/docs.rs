//! Docs on every public item of a library that another crate uses.
//!
//! Use is judged by name: a function, type, trait or constant needs docs if another crate mentions
//! its name, and a method if another crate mentions both its name and that of its type or trait.

use super::{
    report::Report,
    syntax::{has_docs, is_test, line, parse},
};
use crate::{
    lexer::code_words,
    tree::{File, Language, Tree},
};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use syn::{
    Attribute, Ident, ImplItem, Item, ItemImpl, ItemMod, ItemTrait, TraitItem, Type, Visibility,
    visit::{self, Visit},
};

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let mut names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in tree.written_in(Language::Rust) {
        let words = code_words(&file.text).into_iter().map(|word| word.text);
        names.entry(file.top_folder()).or_default().extend(words);
    }
    for file in tree.written_in(Language::Rust) {
        let library = file.top_folder();
        let source = format!("{library}/src/");
        if file.path.starts_with(&source) && tree.file(&format!("{source}lib.rs")).is_some() {
            let others = names.iter().filter(|(name, _)| **name != library);
            let users = others.map(|(_, words)| words).collect();
            let mut items = Items {
                file,
                users,
                report,
            };
            items.visit_file(&parse(file)?);
        }
    }
    Ok(())
}

struct Items<'a> {
    file: &'a File,
    /// The words of each other crate.
    users: Vec<&'a BTreeSet<&'a str>>,
    report: &'a mut Report,
}

impl Items<'_> {
    /// Reports an item without docs if a crate mentions all of `names`, the last of which is its.
    fn require(&mut self, names: &[&Ident], attributes: &[Attribute]) {
        let path: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let is_user =
            |words: &&BTreeSet<&str>| path.iter().all(|name| words.contains(name.as_str()));
        if !has_docs(attributes) && self.users.iter().any(is_user) {
            let message = format!("`{}` is used by other crates: add docs", path.join("::"));
            let line = names.last().map_or(1, line);
            self.report.problem(&self.file.path, line, message);
        }
    }
}

impl Visit<'_> for Items<'_> {
    fn visit_item(&mut self, item: &Item) {
        if let Some(public) = public(item) {
            self.require(&[public.name], public.attributes);
        }
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, item: &ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_trait(&mut self, item: &ItemTrait) {
        if !is_public(&item.vis) {
            return;
        }
        for member in &item.items {
            if let TraitItem::Fn(method) = member {
                self.require(&[&item.ident, &method.sig.ident], &method.attrs);
            }
        }
    }

    fn visit_item_impl(&mut self, item: &ItemImpl) {
        let Some(name) = type_name(&item.self_ty).filter(|_| item.trait_.is_none()) else {
            return;
        };
        for member in &item.items {
            match member {
                ImplItem::Fn(method) if is_public(&method.vis) => {
                    self.require(&[name, &method.sig.ident], &method.attrs);
                }
                ImplItem::Const(constant) if is_public(&constant.vis) => {
                    self.require(&[name, &constant.ident], &constant.attrs);
                }
                _ => {}
            }
        }
    }
}

struct Public<'a> {
    name: &'a Ident,
    attributes: &'a [Attribute],
}

/// Returns the name and attributes of a public item of a kind that needs docs.
fn public(item: &Item) -> Option<Public<'_>> {
    let (visibility, name, attributes) = match item {
        Item::Const(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Enum(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Fn(item) => (&item.vis, &item.sig.ident, &item.attrs),
        Item::Static(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Struct(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Trait(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Type(item) => (&item.vis, &item.ident, &item.attrs),
        Item::Union(item) => (&item.vis, &item.ident, &item.attrs),
        _ => return None,
    };
    is_public(visibility).then_some(Public { name, attributes })
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn type_name(ty: &Type) -> Option<&Ident> {
    match ty {
        Type::Path(path) => path.path.segments.last().map(|segment| &segment.ident),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::{tidy::problems, tree::Tree};

    fn found(library: &str, user: &str) -> Vec<String> {
        let files = [("moe/src/lib.rs", library), ("launch/src/main.rs", user)];
        problems(&Tree::of(&files), "docs")
    }

    #[test]
    fn used_items_need_docs() {
        let library = "pub struct A;\nimpl A {\n pub fn b(&self) {}\n}\npub fn c() {}";
        let expected = [
            "1: `A` is used by other crates: add docs",
            "3: `A::b` is used by other crates: add docs",
            "5: `c` is used by other crates: add docs",
        ];
        assert_eq!(found(library, "fn main() { A.b(); c(); }"), expected);
    }

    #[test]
    fn unused_private_documented_and_test_items_pass() {
        let library = "fn a() {}\n/// Docs.\npub fn b() {}\npub fn c() {}\n\
                       #[cfg(test)]\nmod tests { pub fn a() {} }\nimpl D { pub fn a() {} }";
        assert!(found(library, "fn main() { a(); b(); }").is_empty());
    }

    #[test]
    fn methods_of_public_traits_need_docs() {
        let library = "/// Docs.\npub trait A {\n fn b();\n fn c();\n}";
        let expected = ["3: `A::b` is used by other crates: add docs"];
        assert_eq!(found(library, "impl A for D { fn b() {} }"), expected);
    }
}
