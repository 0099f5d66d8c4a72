//! A trained model from a checkpoint.

use crate::{
    Error,
    config::{Config, Dtype},
    data::eod_token::DocumentTokens,
    hub::{ByteProgress, config_json::CONFIG_FILE, model_folder::ModelFolder},
    model::{
        BuildContext, Model, ModelPart,
        rope_scaling::{LongropeScaling, RopeScaling},
    },
    process_groups::ProcessGroups,
    train::{
        checkpointing::restore_model,
        saved_config::{read_run_state, saved_config},
    },
};
use checkpoint::{
    Checkpoint,
    folder::{self, Depth, Verified},
};
use parallel::Cpu;
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// Longest context of a model from a folder: longer ones make the table of rotary embedding large.
const MAX_CONTEXT: usize = 32_768;

/// A model on one CPU.
pub(crate) struct LoadedModel {
    /// Most tokens that the model sees at once.
    pub(crate) context: usize,
    /// Token that comes before each text, as before the documents of a run's data.
    pub(crate) document_start: Option<u32>,
    /// Token that begins an empty text, if a folder or the data of a run names one.
    pub(crate) start_token: Option<u32>,
    /// Tokens that end a text, if a folder or the data of a run names any.
    pub(crate) end_tokens: Vec<u32>,
    /// Places of its tokenizer, the best first.
    pub(crate) tokenizers: Vec<PathBuf>,
    /// The run that trained the model; `None` for a folder of Hugging Face.
    pub(crate) run: Option<TrainedBy>,
    pub(crate) model: Model,
    /// Notes for the user about the choice of the checkpoint, one line each.
    pub(crate) notes: Vec<String>,
}

/// The run that trained a model.
pub(crate) struct TrainedBy {
    pub(crate) step: u64,
    pub(crate) config: Config,
    /// Tokens at the ends of the documents that it was trained on.
    pub(crate) documents: DocumentTokens,
}

impl LoadedModel {
    /// Loads the folder of a Hugging Face model, or a checkpoint as [`LoadedModel::of_run`] does.
    /// Calls `progress` with the bytes of the folder's files that are done and all.
    pub(crate) fn open(path: &Path, progress: &ByteProgress) -> Result<LoadedModel, Error> {
        if path.join(CONFIG_FILE).is_file() {
            LoadedModel::of_folder(path, progress)
        } else {
            LoadedModel::of_run(path)
        }
    }

    fn of_folder(path: &Path, progress: &ByteProgress) -> Result<LoadedModel, Error> {
        let folder = ModelFolder::open(path)?;
        let config = folder.model();
        let longest = folder.longest_sequence()?.unwrap_or(MAX_CONTEXT);
        let mut notes = Vec::new();
        let context = match config.rope.scaling {
            // It has other frequencies for long texts. One text would need both.
            Some(RopeScaling::Longrope(LongropeScaling {
                original_length, ..
            })) if original_length < longest => {
                notes.push(format!(
                    "longer texts than {original_length} tokens lose their beginning: there the \
                     model's frequencies change"
                ));
                original_length
            }
            _ => longest,
        };
        let context = context.min(MAX_CONTEXT);
        let groups = ProcessGroups::single_rank();
        let ctx = BuildContext {
            draws_values: false,
            ..BuildContext::single_rank(context, Dtype::Fp32, &Cpu, &groups)
        };
        let model = Model::new(config, ModelPart::whole(config.layers), &ctx);
        folder.load(&model, progress)?;
        Ok(LoadedModel {
            context,
            // The tokenizer of a folder knows what comes before a text.
            document_start: None,
            start_token: folder.start_token()?,
            end_tokens: folder.end_tokens()?,
            tokenizers: vec![path.join(TOKENIZER_FILE)],
            run: None,
            model,
            notes,
        })
    }

    /// Loads one checkpoint, or the newest usable one of a run's folder or its `checkpoints`
    /// folder.
    pub(crate) fn of_run(path: &Path) -> Result<LoadedModel, Error> {
        let FoundCheckpoint {
            mut checkpoint,
            notes,
        } = find_checkpoint(path)?;
        let state = read_run_state(&checkpoint)?;
        let path = checkpoint.path().to_path_buf();
        let config = saved_config(&checkpoint, &state)?;
        let groups = ProcessGroups::single_rank();
        let sequence_length = config.data.sequence_length;
        let ctx = BuildContext {
            draws_values: false,
            ..BuildContext::single_rank(sequence_length, config.train.dtype, &Cpu, &groups)
        };
        let model = Model::new(&config.model, ModelPart::whole(config.model.layers), &ctx);
        restore_model(&mut checkpoint, &model)?;
        let documents = DocumentTokens::of_run(state.document_tokens.as_ref(), &config);
        Ok(LoadedModel {
            context: sequence_length,
            document_start: documents.begin,
            start_token: documents.begin.or(documents.end),
            end_tokens: documents.end.into_iter().collect(),
            tokenizers: tokenizers_of(&config, &path),
            run: Some(TrainedBy {
                step: state.step,
                config,
                documents,
            }),
            model,
            notes,
        })
    }
}

/// A checkpoint, with notes for the user about its choice.
pub(crate) struct FoundCheckpoint {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) notes: Vec<String>,
}

/// Opens the checkpoint `path`, or the newest verified one of a run's folder.
///
/// # Errors
/// If there is none, or it is damaged.
pub(crate) fn find_checkpoint(path: &Path) -> Result<FoundCheckpoint, Error> {
    if is_checkpoint(path)? {
        let verified = folder::verify(path, Depth::Data)?;
        return open(verified, Vec::new());
    }
    let inner = path.join("checkpoints");
    let root = if inner.is_dir() { &inner } else { path };
    let survey = folder::newest(root, Depth::Data)?;
    let refused = survey.refused.into_iter();
    let reasons: Vec<String> = refused.map(|refused| refused.reason).collect();
    if let Some(newest) = survey.verified.into_iter().next() {
        return open(newest, reasons);
    }
    let folder = path.display();
    Err(Error::Resume(if reasons.is_empty() {
        format!("no checkpoint in {folder}: name a run's folder or a step-NNNNNNNN folder")
    } else {
        let reasons = reasons.join("; ");
        format!("no checkpoint in {folder} can be used: {reasons}")
    }))
}

/// True if `path` is the folder of one checkpoint, by its contents or its name.
fn is_checkpoint(path: &Path) -> Result<bool, Error> {
    let manifest = path.join("manifest.json");
    match std::fs::symlink_metadata(&manifest) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Ok(folder::has_checkpoint_name(path) && path.is_dir())
        }
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(Error::io("cannot read", &manifest)(error)),
    }
}

fn open(verified: Verified, refused: Vec<String>) -> Result<FoundCheckpoint, Error> {
    let path = &verified.path;
    let used = |reason| format!("{reason}; using {}", path.display());
    let mut notes: Vec<String> = refused.into_iter().map(used).collect();
    notes.extend(verified.note);
    Ok(FoundCheckpoint {
        checkpoint: Checkpoint::open(path)?,
        notes,
    })
}

/// Name of a tokenizer's file.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// Returns the places of the tokenizer of a run, the best first.
pub(crate) fn tokenizers_of(config: &Config, checkpoint: &Path) -> Vec<PathBuf> {
    let in_folder = |folder: &Path| folder.join(TOKENIZER_FILE);
    let run = checkpoint.ancestors().nth(2);
    let first_source = config.data.train.first();
    let data = first_source.and_then(|source| source.path.parent());
    let places = [
        run.map(in_folder),
        config.data.tokenizer.clone(),
        data.map(in_folder),
    ];
    places.into_iter().flatten().collect()
}

/// Returns the first of these files that exists.
///
/// # Errors
/// If none does.
pub(crate) fn find_tokenizer(places: &[PathBuf]) -> Result<PathBuf, Error> {
    if let Some(found) = places.iter().find(|path| path.exists()) {
        return Ok(found.clone());
    }
    let listed: Vec<String> = places
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    Err(Error::Tokenizer(format!(
        "no tokenizer at {}: name one with --tokenizer",
        listed.join(", ")
    )))
}
