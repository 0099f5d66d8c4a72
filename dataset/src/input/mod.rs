//! Documents from files.

mod counts;
mod options;

pub use self::{
    counts::InputCounts,
    options::{InputOptions, Split, TextKey},
};
use crate::{Error, documents};
use std::path::PathBuf;

pub struct Piece<'a> {
    pub text: &'a str,
    pub ends_document: bool,
}

#[derive(Debug)]
pub struct InputFile(PathBuf);

impl std::fmt::Display for InputFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.display())
    }
}

pub struct Found {
    pub files: Vec<InputFile>,
    pub notes: Vec<String>,
}

pub fn find(inputs: &[String], options: &InputOptions) -> Result<Found, Error> {
    let inputs: Vec<PathBuf> = inputs.iter().map(PathBuf::from).collect();
    let all = ["txt", "md", "jsonl", "parquet"].map(String::from).to_vec();
    let extensions = options.extensions.clone().unwrap_or(all);
    let files = documents::files(&inputs, &extensions)?;
    Ok(Found {
        files: files.into_iter().map(InputFile).collect(),
        notes: Vec::new(),
    })
}

const STUB_PIECE: usize = 4 << 20;

impl InputFile {
    pub fn bytes(&self) -> Option<u64> {
        Some(std::fs::metadata(&self.0).ok()?.len())
    }

    pub fn is_standard_input(&self) -> bool {
        false
    }

    pub fn read(
        &self,
        options: &InputOptions,
        counts: &mut InputCounts,
        take: &mut dyn FnMut(Piece) -> Result<(), Error>,
    ) -> Result<(), Error> {
        counts.files += 1;
        let key = options.text_key.to_string();
        documents::read(&self.0, &key, &mut |text| {
            counts.rows += 1;
            if text.trim().is_empty() {
                counts.empty += 1;
                return Ok(());
            }
            counts.documents += 1;
            let mut rest = &*text;
            while rest.len() > STUB_PIECE {
                let at = rest.floor_char_boundary(STUB_PIECE);
                take(Piece {
                    text: &rest[..at],
                    ends_document: false,
                })?;
                rest = &rest[at..];
            }
            take(Piece {
                text: rest,
                ends_document: true,
            })
        })
    }
}
