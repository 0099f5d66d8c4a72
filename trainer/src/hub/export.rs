//! Writing a model as a folder that transformers and inference servers load.

use super::{
    ByteProgress,
    config_json::{CONFIG_FILE, ConfigJson},
    encoding::LogicalTensor,
    folder::INDEX_FILE,
    mapping::Mapping,
    model_folder::ModelFolder,
    shards::{NewFile, NewTensor, index_text, plan_files, stored_dtype},
    values::{CheckpointValues, ModelValues},
    writer::{Sources, write_files},
};
use crate::{
    Error,
    config::{Config, Dtype, ModelConfig},
    data::eod_token::DocumentTokens,
    families::{Family, canonical::canonical, expression::express},
    inference::loaded::{FoundCheckpoint, find_checkpoint, find_tokenizer, tokenizers_of},
    train::saved_config::{read_run_state, saved_config},
};
use dataset::tokenizer::{END_OF_DOCUMENT, load_tokenizer};
use safetensors::Dtype as StoredDtype;
use serde_json::{Map, Value, json};
use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// Bytes of a new file at most, unless one tensor has more.
const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Endings of files that have weights, which an export does not copy.
const WEIGHTS: [&str; 8] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "gguf",
    "h5",
    "msgpack",
    "onnx",
];

/// Source and destination of [`export`].
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// A run's folder, its `checkpoints` folder, or one checkpoint.
    pub checkpoint: PathBuf,
    /// The folder to write. It must not exist, or be empty.
    pub output: PathBuf,
    /// Dtype of the weights. By default that of the folder the model came from, bf16 if that is
    /// quantized; else that of training.
    pub dtype: Option<Dtype>,
    /// The folder the model came from, if it is no longer where `model.from` says.
    pub source: Option<PathBuf>,
    /// Bytes of a file at most, unless one tensor has more. By default the files are those of the
    /// folder the model came from, or have [`DEFAULT_SHARD_BYTES`].
    pub shard_bytes: Option<u64>,
}

/// The outcome of an export.
#[derive(Debug, Clone)]
pub struct ExportReport {
    /// `model_type` of the folder.
    pub family: String,
    /// Steps that the model was trained for, if it was trained.
    pub step: Option<u64>,
    pub files: usize,
    pub tensors: usize,
    pub bytes: u64,
    /// Tensors that were copied from the folder the model came from, because moerun does not
    /// train them.
    pub carried: usize,
    /// Notes for the user, one line each.
    pub notes: Vec<String>,
}

/// Writes the model of a checkpoint. Calls `progress` with the bytes that are done and all.
///
/// # Errors
/// If there is no usable checkpoint, no family can express the model, or a file cannot be read or
/// written. The output does not exist then.
pub fn export(options: &ExportOptions, progress: &ByteProgress) -> Result<ExportReport, Error> {
    let FoundCheckpoint {
        checkpoint,
        mut notes,
    } = find_checkpoint(&options.checkpoint)?;
    let state = read_run_state(&checkpoint)?;
    let config = saved_config(&checkpoint, &state)?;
    let path = checkpoint.path().to_path_buf();
    let values = CheckpointValues::new(path.clone())?;
    let came_from = options.source.clone().or(config.model.from.clone());
    let source = came_from.map(|from| open_source(&from, &config.model));
    let source = source.transpose()?;
    let form = match &source {
        Some(source) => Form::of_source(source, options.dtype),
        None => {
            let documents = DocumentTokens::of_run(state.document_tokens.as_ref(), &config);
            let run = ExportedRun {
                config: &config,
                documents: &documents,
                checkpoint: &path,
            };
            Form::of_family(&run, options.dtype, &mut notes)?
        }
    };
    let mut report = write_folder(
        options,
        &values,
        &config.model,
        source.as_ref(),
        &form,
        progress,
    )?;
    report.step = Some(state.step);
    notes.append(&mut report.notes);
    report.notes = notes;
    Ok(report)
}

/// Opens the folder that a model came from, and compares its model.
fn open_source(from: &Path, model: &ModelConfig) -> Result<ModelFolder, Error> {
    let source = ModelFolder::open(from).map_err(|error| {
        Error::Folder(format!(
            "the model came from a folder that an export needs, for tokenizer, configuration and \
             tensors that moerun does not train: {error}; if it moved, name it with --source"
        ))
    })?;
    if canonical(source.model()) != canonical(model) {
        return Err(Error::Folder(format!(
            "{} has another model than the checkpoint",
            from.display()
        )));
    }
    Ok(source)
}

/// The run whose model is exported.
struct ExportedRun<'a> {
    config: &'a Config,
    documents: &'a DocumentTokens,
    checkpoint: &'a Path,
}

/// Everything of the folder but the values.
pub(crate) struct Form {
    family: Family,
    config: ConfigJson,
    dtype: Option<StoredDtype>,
    copies: Vec<PathBuf>,
    /// Names and texts of small files.
    texts: Vec<(String, String)>,
}

impl Form {
    /// Returns the form of a model that came from a folder.
    pub(crate) fn of_source(source: &ModelFolder, dtype: Option<Dtype>) -> Form {
        let mut config = source.config.clone();
        let is_quantized = config.has("quantization_config");
        config.remove("quantization_config");
        let dtype = dtype.map(stored_dtype);
        let written = dtype.or(is_quantized.then_some(StoredDtype::BF16));
        let named = written.map(|dtype| json!(name_of(dtype)));
        let keys = ["dtype", "torch_dtype"];
        let before = keys.iter().find_map(|key| config.keys().get(*key).cloned());
        if let Some(name) = named.or(before) {
            for key in keys {
                config.set(key, &name);
            }
        }
        // Readers differ in the spellings that they know.
        let mut known = ConfigJson::empty(config.path().to_path_buf());
        source.family.rules().write(source.model(), &mut known);
        for (key, value) in known.keys() {
            if !config.keys().contains_key(key) && !value.is_null() {
                config.set(key, value);
            }
        }
        Form {
            family: source.family,
            config,
            dtype,
            copies: other_files(&source.reader.table.table.folder),
            texts: Vec::new(),
        }
    }

    /// Returns a form that consists of `config.json` only.
    pub(crate) fn without_tokenizer(
        family: Family,
        mut config: ConfigJson,
        dtype: StoredDtype,
    ) -> Form {
        for key in ["dtype", "torch_dtype"] {
            config.set(key, name_of(dtype));
        }
        config.remove("quantization_config");
        Form {
            family,
            config,
            dtype: Some(dtype),
            copies: Vec::new(),
            texts: Vec::new(),
        }
    }

    /// Returns the form of a new model that keeps the other files of a folder.
    pub(super) fn of_new_model(
        from: &ModelFolder,
        family: Family,
        config: ConfigJson,
        dtype: Option<Dtype>,
    ) -> Form {
        let table = &from.reader.table;
        let stored = || table.tensors.values().find_map(LogicalTensor::plain_dtype);
        let dtype = dtype.map(stored_dtype).or_else(stored);
        let dtype = dtype.unwrap_or(StoredDtype::BF16);
        Form {
            copies: other_files(&table.table.folder),
            ..Form::without_tokenizer(family, config, dtype)
        }
    }

    fn of_family(
        run: &ExportedRun,
        dtype: Option<Dtype>,
        notes: &mut Vec<String>,
    ) -> Result<Form, Error> {
        let dtype = stored_dtype(dtype.unwrap_or(run.config.train.dtype));
        let (family, mut config) = express(&run.config.model)?;
        // Some models depend on it.
        if !config.has("max_position_embeddings") {
            config.set("max_position_embeddings", run.config.data.sequence_length);
        }
        let mut form = Form::without_tokenizer(family, config, dtype);
        match find_tokenizer(&tokenizers_of(run.config, run.checkpoint)) {
            Ok(path) => form.add_tokenizer(path, run)?,
            Err(error) => notes.push(format!("the folder has no tokenizer: {error}")),
        }
        Ok(form)
    }

    /// Adds a tokenizer that moerun trained or was given, and the configuration that transformers
    /// needs with it.
    fn add_tokenizer(&mut self, path: PathBuf, run: &ExportedRun) -> Result<(), Error> {
        let tokenizer = load_tokenizer(&path)?;
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": run.config.data.sequence_length,
            "clean_up_tokenization_spaces": false,
        });
        let documents = run.documents;
        let end = documents.end.or(tokenizer.token_to_id(END_OF_DOCUMENT));
        let begin = documents.begin.or(end);
        let mut generation = Map::new();
        for (name, token) in [("bos_token", begin), ("eos_token", end)] {
            let Some(id) = token else { continue };
            // An id that the tokenizer does not have is that of another tokenizer.
            let Some(text) = tokenizer.id_to_token(id) else {
                continue;
            };
            config[name] = json!(text);
            let key = format!("{name}_id");
            self.config.set(&key, id);
            generation.insert(key, json!(id));
        }
        if !generation.is_empty() {
            self.add_text("generation_config.json", &Value::Object(generation));
        }
        self.add_text("tokenizer_config.json", &config);
        self.copies.push(path);
        Ok(())
    }

    fn add_text(&mut self, name: &str, value: &Value) {
        let text = serde_json::to_string_pretty(value).expect("the value is plain data");
        self.texts.push((name.to_string(), text + "\n"));
    }
}

fn name_of(dtype: StoredDtype) -> &'static str {
    match dtype {
        StoredDtype::BF16 => "bfloat16",
        StoredDtype::F16 => "float16",
        _ => "float32",
    }
}

/// Returns the files of a folder that are neither weights nor written anew.
fn other_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_other = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        let is_written = name == CONFIG_FILE || name == INDEX_FILE;
        path.is_file() && !is_written && !ending.is_some_and(|ending| WEIGHTS.contains(&ending))
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_other).collect();
    files.sort();
    files
}

/// Returns the tensors to write.
fn new_tensors(
    mapping: &Mapping,
    source: Option<&ModelFolder>,
    form: &Form,
    freezes_biases: bool,
) -> Vec<NewTensor> {
    let dtype_of = |name: &str, stored: Option<StoredDtype>| {
        let pieces = mapping.theirs.get(name).map(|theirs| &theirs.pieces);
        let is_bias = pieces.is_some_and(|pieces| mapping.tensors[pieces[0].0].is_selection_bias);
        let given = form.dtype.or(stored).unwrap_or(StoredDtype::BF16);
        match stored {
            // bf16 would merge biases that differ in small steps.
            _ if is_bias && !freezes_biases => StoredDtype::F32,
            None if is_bias => StoredDtype::F32,
            Some(stored) if is_bias => stored,
            _ => given,
        }
    };
    let Some(source) = source else {
        let mut theirs: Vec<_> = mapping.theirs.iter().collect();
        theirs.sort_by_key(|(_, theirs)| theirs.pieces[0]);
        let tensors = theirs.into_iter().map(|(name, theirs)| NewTensor {
            name: name.clone(),
            dtype: dtype_of(name, None),
            shape: theirs.shape(),
            file: None,
        });
        return tensors.collect();
    };
    let table = &source.reader.table;
    let mut tensors: Vec<_> = table.tensors.iter().collect();
    tensors.sort_by_key(|(_, tensor)| table.position(tensor));
    let tensors = tensors.into_iter().map(|(name, tensor)| {
        let stored = tensor.plain_dtype();
        // There can be thousands of carried tensors (multi-token prediction), so that list is not
        // searched.
        let is_repeated = source.account.repeated.contains(name);
        let is_carried = !is_repeated && !mapping.theirs.contains_key(name);
        NewTensor {
            name: name.clone(),
            dtype: match stored {
                Some(stored) if is_carried => stored,
                stored => dtype_of(name, stored),
            },
            shape: tensor.shape.clone(),
            file: Some(tensor.file(&table.table).to_string()),
        }
    });
    tensors.collect()
}

/// Writes the tensors and the other files of a folder.
///
/// # Errors
/// If a tensor cannot be read, or a file cannot be written. The output does not exist then.
pub(crate) fn write_folder(
    options: &ExportOptions,
    values: &dyn ModelValues,
    model: &ModelConfig,
    source: Option<&ModelFolder>,
    form: &Form,
    progress: &ByteProgress,
) -> Result<ExportReport, Error> {
    let named = |name: &str| match source {
        Some(source) => source.reader.table.tensors.contains_key(name),
        None => true,
    };
    let mapping = Mapping::new(form.family, model, &named)?;
    let moe = model.moe.as_ref();
    let freezes_biases = moe.is_none_or(|moe| moe.bias_update_rate == 0.0);
    let mut tensors = new_tensors(&mapping, source, form, freezes_biases);
    if options.shard_bytes.is_some() {
        for tensor in &mut tensors {
            tensor.file = None;
        }
    }
    let count = tensors.len();
    let of_tensors: u64 = tensors.iter().map(NewTensor::bytes).sum();
    let files = plan_files(tensors, options.shard_bytes.unwrap_or(DEFAULT_SHARD_BYTES));
    let bytes: u64 = files.iter().map(|file| file.len).sum();
    let sources = Sources {
        mapping: &mapping,
        values,
        before: source.map(|source| &source.reader.table),
        repeated: mapping.embedding(),
    };
    let staging = Staging::begin(&options.output)?;
    write_files(staging.folder(), &files, &sources, &|done| {
        progress(done, of_tensors)
    })?;
    staging.finish(form, &files, source.is_some_and(has_index))?;
    Ok(ExportReport {
        family: form.family.name().to_string(),
        step: None,
        files: files.len(),
        tensors: count,
        bytes,
        carried: source.map_or(0, |source| source.account.carried.len()),
        notes: form.family.reader_notes(model),
    })
}

fn has_index(source: &ModelFolder) -> bool {
    source.reader.table.table.folder.join(INDEX_FILE).exists()
}

/// Refuses a folder that has files, with advice to the user.
///
/// # Errors
/// If it has any.
pub(super) fn refuse_files(folder: &Path, advice: &str) -> Result<(), Error> {
    if std::fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some()) {
        return Err(Error::Folder(format!(
            "{} has files already: {advice}",
            folder.display()
        )));
    }
    Ok(())
}

/// A folder that is written next to its place and renamed at the end. Dropped before that, it is
/// removed.
struct Staging<'a> {
    output: &'a Path,
    folder: Option<tempfile::TempDir>,
}

impl Staging<'_> {
    /// Creates the folder next to the output.
    ///
    /// # Errors
    /// If the output has files, or the folder cannot be created.
    fn begin(output: &Path) -> Result<Staging<'_>, Error> {
        refuse_files(output, "name a new folder, because readers would mix both")?;
        let is_used = output
            .symlink_metadata()
            .is_ok_and(|metadata| !metadata.is_dir());
        if is_used || output.file_name().is_none() {
            return Err(Error::Folder(format!(
                "{} cannot become a folder: name one that does not exist",
                output.display()
            )));
        }
        let parent = parent_of(output);
        std::fs::create_dir_all(parent).map_err(Error::io("cannot create", parent))?;
        let folder = tempfile::Builder::new()
            .prefix(".moerun-export-")
            .tempdir_in(parent);
        let folder = folder.map_err(Error::io("cannot create a folder in", parent))?;
        Ok(Staging {
            output,
            folder: Some(folder),
        })
    }

    fn folder(&self) -> &Path {
        self.folder
            .as_ref()
            .expect("the folder is not finished")
            .path()
    }

    /// Adds the other files, and gives the folder its name.
    ///
    /// # Errors
    /// If a file cannot be written or the folder cannot be renamed.
    fn finish(mut self, form: &Form, files: &[NewFile], has_index: bool) -> Result<(), Error> {
        for copy in &form.copies {
            let name = copy.file_name().unwrap_or(copy.as_os_str());
            let name = if form.texts.is_empty() {
                name
            } else {
                // The tokenizer of a run may have another name.
                "tokenizer.json".as_ref()
            };
            let into = self.folder().join(name);
            let copied = std::fs::copy(copy, &into).and_then(|_| sync(&into));
            copied.map_err(Error::io("cannot copy", copy))?;
        }
        for (name, text) in &form.texts {
            self.write(name, text)?;
        }
        self.write(CONFIG_FILE, &form.config.to_text())?;
        if files.len() > 1 || has_index {
            self.write(INDEX_FILE, &index_text(files))?;
        }
        let folder = self
            .folder
            .take()
            .expect("the folder is not finished")
            .keep();
        let renamed = set_mode(&folder)
            .and_then(|()| sync(&folder))
            // An empty folder with the name is replaced.
            .and_then(|()| std::fs::rename(&folder, self.output));
        if let Err(error) = renamed {
            let _ = std::fs::remove_dir_all(&folder);
            return Err(Error::io("cannot create", self.output)(error));
        }
        sync(parent_of(self.output)).map_err(Error::io("cannot write", self.output))
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.folder().join(name);
        let write = || {
            std::fs::write(&path, text)?;
            sync(&path)
        };
        write().map_err(Error::io("cannot write", &path))
    }
}

/// Returns the folder of an output.
fn parent_of(output: &Path) -> &Path {
    match output.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// Writes a file or the list of a folder to the disk.
fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Gives a temporary folder, which only its owner can read, the permissions of others.
fn set_mode(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    nix::sys::stat::umask(mask);
    let mode = 0o777 & !mask.bits();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        families::expression::config_of,
        hub::{encoding::Region, folder::TensorTable, golden},
    };
    use tch::Tensor;

    fn open(name: &str) -> ModelFolder {
        ModelFolder::open(&golden::families().join(name).join("model")).unwrap()
    }

    /// Writes a folder with the values of another one.
    fn copy_of(source: &ModelFolder, output: &Path, dtype: Option<Dtype>) -> ModelFolder {
        let options = ExportOptions {
            checkpoint: PathBuf::new(),
            output: output.to_path_buf(),
            dtype,
            source: None,
            shard_bytes: None,
        };
        let form = Form::of_source(source, dtype);
        let values = &source.reader;
        write_folder(
            &options,
            values,
            source.model(),
            Some(source),
            &form,
            &|_, _| (),
        )
        .unwrap();
        ModelFolder::open(output).unwrap()
    }

    /// Returns all values of a tensor of a folder.
    fn values(folder: &ModelFolder, name: &str) -> Vec<Tensor> {
        let table = &folder.reader.table;
        let tensor = &table.tensors[name];
        let (matrices, [rows, columns]) = tensor.matrices();
        let region = |matrix| Region {
            is_vector: tensor.shape.len() == 1,
            matrix,
            rows: 0..rows,
            columns: 0..columns,
        };
        let matrices = (0..matrices).map(|matrix| table.read(tensor, &region(matrix)).unwrap());
        matrices.collect()
    }

    #[test]
    fn configurations_convert_both_ways() {
        for name in golden::names() {
            let folder = open(&name);
            let written = config_of(folder.family, folder.model());
            let read = folder.family.rules().read(&written).unwrap();
            assert_eq!(canonical(&read), canonical(folder.model()), "{name}");
        }
    }

    #[test]
    fn an_export_repeats_the_folder_it_came_from() {
        for name in golden::names() {
            let folder = tempfile::tempdir().unwrap();
            let output = folder.path().join("export");
            let source = open(&name);
            let copy = copy_of(&source, &output, None);
            let table = &source.reader.table;
            let keys = |folder: &ModelFolder| {
                let tensors = folder.reader.table.tensors.iter();
                let keys = tensors.map(|(name, tensor)| (name.clone(), tensor.shape.clone()));
                keys.collect::<Vec<_>>()
            };
            assert_eq!(keys(&copy), keys(&source), "{name}");
            let is_quantized = source.config.has("quantization_config");
            for (tensor, _) in keys(&source) {
                let new = values(&copy, &tensor);
                let old = values(&source, &tensor);
                let rounded = |values: &Tensor| values.to_kind(new[0].kind());
                for (new, old) in new.iter().zip(&old) {
                    assert_eq!(new, &rounded(old), "{name}: {tensor}");
                }
            }
            if !is_quantized {
                // The same bytes, header included.
                for file in &table.table.files {
                    let [new, old] = [&copy, &source].map(|folder| {
                        std::fs::read(folder.reader.table.table.folder.join(file)).unwrap()
                    });
                    assert!(new == old, "{name}: {file}");
                }
            }
            for (key, value) in source.config.keys() {
                let is_kept = key != "quantization_config" && !key.ends_with("dtype");
                let new = copy.config.keys().get(key);
                assert!(!is_kept || new == Some(value), "{name}: {key}: {new:?}");
            }
            assert!(!copy.config.has("quantization_config"));
            let others = |folder: &ModelFolder| {
                let files = other_files(&folder.reader.table.table.folder);
                let named = files
                    .iter()
                    .map(|path| (path.file_name().unwrap().to_owned(), path));
                let read = named.map(|(name, path)| (name, std::fs::read(path).unwrap()));
                read.collect::<Vec<_>>()
            };
            assert_eq!(others(&copy), others(&source), "{name}");
        }
    }

    #[test]
    fn a_dtype_changes_weights_and_keeps_biases() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("export");
        let copy = copy_of(&open("glm4_moe"), &output, Some(Dtype::Bf16));
        let dtypes = TensorTable::read(&output).unwrap().tensors;
        for (name, tensor) in dtypes {
            let is_bias = name.ends_with("e_score_correction_bias");
            let expected = if is_bias {
                StoredDtype::F32
            } else {
                StoredDtype::BF16
            };
            assert_eq!(tensor.dtype, expected, "{name}");
        }
        assert_eq!(copy.config.keys()["dtype"], "bfloat16");
    }

    #[test]
    fn the_largest_size_of_a_file_divides_the_files_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("export");
        let source = open("glm4_moe");
        let options = ExportOptions {
            checkpoint: PathBuf::new(),
            output: output.clone(),
            dtype: None,
            source: None,
            shard_bytes: Some(20_000),
        };
        let form = Form::of_source(&source, None);
        let totals = parking_lot::Mutex::new(Vec::new());
        let progress = |done, total| totals.lock().push([done, total]);
        let model = source.model();
        let written = write_folder(
            &options,
            &source.reader,
            model,
            Some(&source),
            &form,
            &progress,
        );
        assert!(written.unwrap().files > 1);
        let copy = ModelFolder::open(&output).unwrap();
        assert_eq!(copy.num_tensors(), source.num_tensors());
        let largest = *totals.lock().iter().max().unwrap();
        assert_eq!(largest[0], largest[1], "progress ends at the total");
    }

    #[test]
    fn a_folder_with_files_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
        let refused = Staging::begin(folder.path()).err().unwrap().to_string();
        assert!(
            refused.contains("has files already: name a new folder"),
            "{refused}"
        );
        // The rename at the end would fail at these, after everything was written.
        let file = folder.path().join("notes.txt");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &link).unwrap();
        for output in [&file, &link, Path::new("..")] {
            let refused = Staging::begin(output).err().unwrap().to_string();
            let reason = ["cannot become a folder", "has files already"];
            assert!(
                reason.iter().any(|reason| refused.contains(reason)),
                "{refused}"
            );
        }
        std::fs::remove_file(&link).unwrap();
        let next = folder.path().join("next");
        drop(Staging::begin(&next).unwrap());
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 1, "an interrupted export leaves nothing");
    }
}
