//! The modules of a crate, and where names in them lead.

use super::names::{Import, Names, Path};
use crate::{
    tidy::syntax::{is_test, parse},
    tree::{File, Tree},
};
use anyhow::{Context, Result};
use std::collections::HashMap;
use syn::{Item, ItemMod};

/// Names are followed over this many re-exports; a ring of them would have no end.
const MAX_HOPS: usize = 16;

const ROOT: usize = 0;

/// A module, which may be a part of a file.
struct Module<'a> {
    file: &'a File,
    parent: usize,
    children: HashMap<String, usize>,
    names: Names,
}

/// The modules of a crate; the first is its root.
pub(super) struct Modules<'a> {
    tree: &'a Tree,
    modules: Vec<Module<'a>>,
}

/// A line of one file that names something defined in another.
pub(super) struct FileImport<'a> {
    pub from: &'a str,
    pub to: &'a str,
    pub line: usize,
}

/// The end of a path: a module, or an item that a module defines.
#[derive(Clone, Copy)]
enum Target {
    Module(usize),
    ItemOf(usize),
}

impl<'a> Modules<'a> {
    /// Reads the modules below the root file of a crate.
    ///
    /// # Errors
    /// If a module has no file, or a file is not Rust.
    pub(super) fn read(tree: &'a Tree, root: &'a File) -> Result<Modules<'a>> {
        let mut modules = Modules {
            tree,
            modules: Vec::new(),
        };
        let (folder, _) = root
            .path
            .rsplit_once('/')
            .context("a root is in a folder")?;
        modules.add(root, &parse(root)?.items, ROOT, folder)?;
        Ok(modules)
    }

    /// Adds a module and those below it, whose files are in `folder`, and returns its index.
    fn add(
        &mut self,
        file: &'a File,
        items: &[Item],
        parent: usize,
        folder: &str,
    ) -> Result<usize> {
        let own = self.modules.len();
        self.modules.push(Module {
            file,
            parent,
            children: HashMap::new(),
            names: Names::read(items),
        });
        for item in items {
            if let Item::Mod(item) = item
                && !is_test(&item.attrs)
            {
                let child = self.add_child(item, own, folder)?;
                self.modules[own]
                    .children
                    .insert(item.ident.to_string(), child);
            }
        }
        Ok(own)
    }

    fn add_child(&mut self, item: &ItemMod, parent: usize, folder: &str) -> Result<usize> {
        let folder = format!("{folder}/{}", item.ident);
        if let Some((_, items)) = &item.content {
            return self.add(self.modules[parent].file, items, parent, &folder);
        }
        let paths = [format!("{folder}.rs"), format!("{folder}/mod.rs")];
        let mut files = paths.iter().filter_map(|path| self.tree.file(path));
        let file = files
            .next()
            .with_context(|| format!("{} is missing", paths[0]))?;
        self.add(file, &parse(file)?.items, parent, &folder)
    }

    /// Returns every line that names something of another file.
    pub(super) fn imports(&self) -> Vec<FileImport<'a>> {
        let mut found = Vec::new();
        for (own, module) in self.modules.iter().enumerate() {
            let imports = module.names.imports.iter();
            let imports = imports.filter(|import| !self.is_plain_reexport(own, import));
            let paths = imports
                .map(|import| &import.path)
                .chain(&module.names.mentions);
            for path in paths {
                for target in self.used(own, path) {
                    found.push(FileImport {
                        from: &module.file.path,
                        to: &self.modules[target].file.path,
                        line: path.line,
                    });
                }
            }
        }
        found
    }

    /// Returns the modules whose files a path in the module `own` depends on: the one that defines
    /// the item, and the one that is named, if it re-exports the item.
    ///
    /// A submodule may use everything in the modules above it.
    fn used(&self, own: usize, path: &Path) -> impl Iterator<Item = usize> {
        let defining = match self.follow(own, &path.names, 0) {
            Some(Target::ItemOf(module)) => Some(module),
            // A module alone is a name for paths, which are followed where they are used.
            _ => None,
        };
        let named = match self.follow(own, parent(path), 0) {
            Some(Target::Module(module)) => defining.map(|_| module),
            _ => None,
        };
        let used = [defining, named].into_iter().flatten();
        used.filter(move |&module| module != own && !self.is_below(own, module))
    }

    /// True if a `use` only passes on an item of a submodule.
    fn is_plain_reexport(&self, own: usize, import: &Import) -> bool {
        let target = match self.follow(own, &import.path.names, 0) {
            Some(Target::ItemOf(target) | Target::Module(target)) => target,
            None => return false,
        };
        import.is_reexport && self.is_below(target, own)
    }

    fn is_below(&self, module: usize, above: usize) -> bool {
        let parent = self.modules[module].parent;
        module != ROOT && (parent == above || self.is_below(parent, above))
    }

    /// Follows a path that stands in the module `from`; other crates lead nowhere.
    fn follow(&self, from: usize, path: &[String], hops: usize) -> Option<Target> {
        let first = path.first().filter(|_| hops < MAX_HOPS)?;
        match first.as_str() {
            "crate" => self.find(ROOT, &path[1..], hops),
            "self" => self.find(from, &path[1..], hops),
            "super" => {
                let above = path.iter().take_while(|name| *name == "super").count();
                let start = (0..above).fold(from, |module, _| self.modules[module].parent);
                self.find(start, &path[above..], hops)
            }
            name if self.defines(from, name, hops) => self.find(from, path, hops),
            _ => None,
        }
    }

    /// True if `name` is a child, an item or an import of `module`.
    fn defines(&self, module: usize, name: &str, hops: usize) -> bool {
        let Module {
            children, names, ..
        } = &self.modules[module];
        children.contains_key(name)
            || names.items.contains(name)
            || names.imports.iter().any(|import| match &import.name {
                Some(imported) => imported == name,
                None => self.glob_defines(module, import, name, hops),
            })
    }

    fn glob_defines(&self, module: usize, glob: &Import, name: &str, hops: usize) -> bool {
        match self.follow(module, parent(&glob.path), hops + 1) {
            Some(Target::Module(from)) => from != module && self.defines(from, name, hops + 1),
            _ => false,
        }
    }

    /// Finds what `path` names inside `module`.
    fn find(&self, module: usize, path: &[String], hops: usize) -> Option<Target> {
        let Some(name) = path.first() else {
            return Some(Target::Module(module));
        };
        let Module {
            children, names, ..
        } = &self.modules[module];
        let child = children.get(name).copied();
        if let Some(child) = child
            && path.len() > 1
        {
            return self.find(child, &path[1..], hops);
        }
        if names.items.contains(name) {
            return Some(Target::ItemOf(module));
        }
        for import in &names.imports {
            let is_alias = import.path.names[..] != path[..1];
            if import.name.as_ref() == Some(name) && is_alias {
                let longer = [&import.path.names, &path[1..]].concat();
                return self.follow(module, &longer, hops + 1);
            }
        }
        for glob in names.imports.iter().filter(|import| import.name.is_none()) {
            if self.glob_defines(module, glob, name, hops) {
                let longer = [parent(&glob.path), path].concat();
                return self.follow(module, &longer, hops + 1);
            }
        }
        if let Some(child) = child {
            return Some(Target::Module(child));
        }
        // A macro may have defined it.
        Some(Target::ItemOf(module))
    }
}

/// Returns a path without its last name.
fn parent(path: &Path) -> &[String] {
    path.names.split_last().map_or(&[], |(_, parent)| parent)
}
