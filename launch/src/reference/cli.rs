//! The page of commands and their arguments.

use super::markdown::{Page, code, inline};
use crate::cli::Cli;
use clap::builder::{PossibleValue, StyledStr};
use clap::{Arg, ArgAction, Command, CommandFactory};

const INTRODUCTION: &str = "\
Every command prints its arguments with `--help`. Errors are `error: what: cause`, followed by \
`hint: fix` if there is one; the exit status is then not 0.";

pub(super) fn page() -> String {
    let mut root = Cli::command().name("moerun").bin_name("moerun");
    root.build();
    let mut page = Page::new("Command line", "launch/src/cli.rs");
    page.paragraphs(INTRODUCTION);
    let mut rows = Vec::new();
    overview(&root, &mut rows);
    page.table(&["command", "purpose"], &rows);
    for command in visible(&root) {
        add_command(&mut page, command);
    }
    page.into_text()
}

/// Returns the subcommands that are not hidden.
fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    let is_visible = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
    command.get_subcommands().filter(is_visible)
}

fn overview(command: &Command, rows: &mut Vec<Vec<String>>) {
    for command in visible(command) {
        if visible(command).next().is_none() {
            let name = full_name(command);
            let anchor = name.replace(' ', "-");
            rows.push(vec![
                format!("[`{name}`](#{anchor})"),
                help(command.get_about()),
            ]);
        }
        overview(command, rows);
    }
}

fn full_name(command: &Command) -> String {
    let name = command.get_bin_name();
    name.unwrap_or_else(|| command.get_name()).to_string()
}

fn add_command(page: &mut Page, command: &Command) {
    let subcommands: Vec<&Command> = visible(command).collect();
    if !subcommands.is_empty() {
        for subcommand in subcommands {
            add_command(page, subcommand);
        }
        return;
    }
    page.heading(2, &code(&full_name(command)));
    let about = command.get_long_about().or(command.get_about());
    page.paragraphs(&about.map(StyledStr::to_string).unwrap_or_default());
    page.code(&command.clone().render_usage().to_string());
    let arguments: Vec<&Arg> = command.get_arguments().filter(is_documented).collect();
    if arguments.is_empty() {
        return;
    }
    let rows: Vec<_> = arguments.iter().map(|argument| row(argument)).collect();
    page.table(&["argument", "default", "meaning"], &rows);
    for argument in arguments {
        let values = argument.get_possible_values();
        if values.iter().any(|value| value.get_help().is_some()) {
            page.paragraphs(&format!("Values of `{}`:", name(argument)));
            page.list(&values.iter().filter_map(value_item).collect::<Vec<_>>());
        }
    }
}

fn is_documented(argument: &&Arg) -> bool {
    !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str())
}

fn row(argument: &Arg) -> Vec<String> {
    let mut meaning = help(argument.get_long_help().or(argument.get_help()));
    let values = argument.get_possible_values();
    let names: Vec<String> = values
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| code(value.get_name()))
        .collect();
    if takes_value(argument) && !names.is_empty() {
        meaning += &format!(". One of {}", names.join(", "));
    }
    vec![code(&name(argument)), default(argument), meaning]
}

/// Returns the argument as one writes it, with the name of its value.
fn name(argument: &Arg) -> String {
    let values: Vec<String> = argument
        .get_value_names()
        .into_iter()
        .flatten()
        .map(|name| name.to_string())
        .collect();
    let value = values.join(" ");
    if argument.is_positional() {
        let dots = if is_repeated(argument) { "..." } else { "" };
        return format!("{value}{dots}");
    }
    let short = argument.get_short().map(|short| format!("-{short}"));
    let long = argument.get_long().map(|long| format!("--{long}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    let flags = flags.join(", ");
    if takes_value(argument) {
        format!("{flags} {value}")
    } else {
        flags
    }
}

fn takes_value(argument: &Arg) -> bool {
    matches!(argument.get_action(), ArgAction::Set | ArgAction::Append)
}

fn is_repeated(argument: &Arg) -> bool {
    matches!(argument.get_action(), ArgAction::Append)
}

/// Returns the default of an argument, as Markdown.
fn default(argument: &Arg) -> String {
    if argument.is_required_set() {
        return "required".to_string();
    }
    if !takes_value(argument) {
        return String::new();
    }
    let values: Vec<String> = argument
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy().into_owned())
        .collect();
    let text = values.join(",");
    if text.is_empty() {
        String::new()
    } else {
        code(&text)
    }
}

fn value_item(value: &PossibleValue) -> Option<String> {
    let help = help(value.get_help());
    Some(format!("{}: {help}", code(value.get_name())))
}

fn help(text: Option<&StyledStr>) -> String {
    inline(&text.map(StyledStr::to_string).unwrap_or_default())
}
