//! The run's token: machines share it before they connect, and prove it to each other.
//!
//! It comes from the variable `MOERUN_TOKEN`, else from `token` in the run's folder, which the
//! launcher writes and only the user can read. A hostfile's launcher sends it over ssh.

use crate::{cli::TrainArgs, hint::hinted, run_file};
use anyhow::{Context, Result, anyhow};
use checkpoint::secure::Secret;
use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path, sync::OnceLock};

const VARIABLE: &str = "MOERUN_TOKEN";
/// Most bytes of a token's file.
const MAX_BYTES: u64 = 4096;

pub(crate) fn advice() -> &'static str {
    "set MOERUN_TOKEN to the same text on every machine, or share the run's folder"
}

/// Says why there is no token yet.
pub(crate) fn missing(dir: &Path) -> String {
    let path = dir.join("token");
    format!(
        "no token: {} does not exist yet; {}",
        path.display(),
        advice()
    )
}

/// Returns the run's token, if there is one yet.
///
/// # Errors
/// If it is too short, or its file is a link, another user's, or readable by others.
pub(crate) fn find(args: &TrainArgs, dir: &Path) -> Result<Option<Secret>> {
    if args.token_stdin {
        return from_stdin().map(Some);
    }
    if let Ok(token) = std::env::var(VARIABLE) {
        return parse(&token).context(VARIABLE).map(Some);
    }
    let path = dir.join("token");
    let Some(text) = run_file::read_private(&path, MAX_BYTES)? else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&text);
    if text.trim().is_empty() {
        // The launcher is about to write it.
        return Ok(None);
    }
    parse(&text)
        .with_context(|| path.display().to_string())
        .map(Some)
}

/// Returns the run's token, and makes one if there is none. Writes it where agents look for it.
///
/// # Errors
/// As [`find`].
pub(crate) fn find_or_make(args: &TrainArgs, dir: &Path, is_shared: bool) -> Result<Secret> {
    if let Some(secret) = find(args, dir)? {
        return Ok(secret);
    }
    let secret = Secret::random().map_err(|error| anyhow!("{error}"))?;
    if is_shared {
        write(&secret, dir)?;
    }
    Ok(secret)
}

fn write(secret: &Secret, dir: &Path) -> Result<()> {
    let path = dir.join("token");
    let temporary = dir.join("token.new");
    let _ = std::fs::remove_file(&temporary);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(secret.to_hex().as_bytes())?;
        std::fs::rename(&temporary, &path)
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn parse(token: &str) -> Result<Secret> {
    Secret::from_token(token).ok_or_else(|| {
        hinted(
            anyhow!("the token is too short"),
            "use at least 16 characters, for instance the output of: openssl rand -hex 32",
        )
    })
}

/// Reads the line that the launcher sends over ssh, once.
fn from_stdin() -> Result<Secret> {
    static TOKEN: OnceLock<Option<Secret>> = OnceLock::new();
    let token = TOKEN.get_or_init(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).ok()?;
        Secret::from_token(&line)
    });
    token.clone().context("no token came over standard input")
}
