//! Decisions do no input or output: no clock, file, socket, process, thread or terminal.
//!
//! The rule holds for the folders and files in [`PURE`]. What they need from outside is an
//! argument, and what they want done is a value that they return.

use super::{
    report::Report,
    syntax::{is_test, line, visit_tokens},
};
use crate::tree::File;
use syn::{
    ItemFn, ItemMod, ItemUse, Macro, Path, UseTree,
    visit::{self, Visit},
};

/// Folders, which end in `/`, and files that decide.
const PURE: [&str; 10] = [
    "checkpoint/src/keeper/decide/",
    "checkpoint/src/keeper/layout.rs",
    "checkpoint/src/keeper/recover.rs",
    "checkpoint/src/keeper/topology.rs",
    "checkpoint/src/stripes.rs",
    "launch/src/launcher/engine/",
    "secure-link/src/greeting.rs",
    "secure-link/src/pace.rs",
    "secure-link/src/places.rs",
    "secure-link/src/proof.rs",
];

/// Paths that no such file may name, each with all that is below it.
const IMPURE: [&str; 25] = [
    "std::fs",
    "std::io",
    "std::env",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::SystemTime",
    "std::time::Instant::now",
    "Instant::now",
    "SystemTime",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::UdpSocket",
    "std::sync::Mutex",
    "std::sync::mpsc",
    "parking_lot",
    "crossbeam_channel",
    "nix",
    "rustix",
    "getrandom",
    "signal_hook",
    "tracing",
    "crate::memory",
    "crate::keeper::daemon",
    "crate::launcher::runtime",
];

/// Plain values below paths of [`IMPURE`].
const VALUES: [&str; 3] = [
    "nix::sys::signal::Signal",
    "std::os::unix::process::ExitStatusExt",
    "std::process::ExitStatus",
];

/// Macros that write to the terminal.
const IMPURE_MACROS: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    let is_pure = |pure: &&str| file.path == **pure || is_below(&file.path, pure);
    if PURE.iter().any(is_pure) {
        Uses { file, report }.visit_file(syntax);
    }
}

fn is_below(path: &str, folder: &str) -> bool {
    let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
    folder.ends_with('/') && path.starts_with(folder) && !is_test
}

struct Uses<'a> {
    file: &'a File,
    report: &'a mut Report,
}

impl Uses<'_> {
    fn check_path(&mut self, path: &str, line: usize) {
        let is_named = |name: &&&str| {
            let rest = path.strip_prefix(**name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        if VALUES.iter().any(|value| is_named(&value)) {
            return;
        }
        if let Some(impure) = IMPURE.iter().find(is_named) {
            let message = format!("{impure} in a file that decides: make it an argument");
            self.report.problem(&self.file.path, line, message);
        }
    }

    /// Checks each name that a `use` brings in.
    fn check_use(&mut self, tree: &UseTree, prefix: &str, line: usize) {
        match tree {
            UseTree::Path(path) => {
                let prefix = format!("{prefix}{}::", path.ident);
                self.check_use(&path.tree, &prefix, line);
            }
            UseTree::Name(name) if name.ident == "self" => {
                self.check_path(prefix.trim_end_matches("::"), line);
            }
            UseTree::Name(name) => self.check_path(&format!("{prefix}{}", name.ident), line),
            UseTree::Rename(rename) => {
                self.check_path(&format!("{prefix}{}", rename.ident), line);
            }
            UseTree::Glob(_) => self.check_path(prefix.trim_end_matches("::"), line),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.check_use(tree, prefix, line);
                }
            }
        }
    }
}

impl<'a> Visit<'a> for Uses<'_> {
    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'a ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.check_use(&item.tree, "", line(item));
    }

    fn visit_path(&mut self, path: &'a Path) {
        let names: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        self.check_path(&names.join("::"), line(path));
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'a Macro) {
        if let Some(name) = IMPURE_MACROS.iter().find(|name| call.path.is_ident(name)) {
            let message = format!("{name}! in a file that decides: return what to print");
            self.report.problem(&self.file.path, line(call), message);
        }
        self.visit_path(&call.path);
        visit_tokens(self, call.tokens.clone());
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    const PATH: &str = "checkpoint/src/keeper/decide/slots.rs";

    #[test]
    fn clocks_files_and_prints_are_found() {
        let source = "use std::{fs, net::{SocketAddr, TcpStream}};\n\
             fn a() {\n let now = Instant::now();\n println!(\"{now:?}\");\n \
             std::thread::sleep(x);\n tracing::warn!(\"x\");\n}";
        let expected = [
            "1: std::fs in a file that decides: make it an argument",
            "1: std::net::TcpStream in a file that decides: make it an argument",
            "3: Instant::now in a file that decides: make it an argument",
            "4: println! in a file that decides: return what to print",
            "5: std::thread in a file that decides: make it an argument",
            "6: tracing in a file that decides: make it an argument",
        ];
        assert_eq!(problems_in(PATH, source, "pure_files"), expected);
    }

    #[test]
    fn every_pure_file_exists() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for path in super::PURE {
            assert!(root.join(path).exists(), "{path}");
        }
    }

    #[test]
    fn plain_data_tests_and_other_files_pass() {
        let source = "use nix::sys::signal::Signal;\n\
             use std::{net::SocketAddr, time::Instant};\n\
             #[cfg(test)]\nmod tests {\n fn a() { Instant::now(); }\n}";
        assert!(problems_in(PATH, source, "pure_files").is_empty());
        let source = "fn a() { std::fs::read(x); }";
        assert!(problems_in("a.rs", source, "pure_files").is_empty());
    }
}
