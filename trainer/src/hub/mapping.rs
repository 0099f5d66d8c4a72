//! Every tensor of a model as rows of a folder's tensors, and the account of both sides.

use super::{
    encoding::{LogicalTable, LogicalTensor},
    rule::{LAYERS, Names, Rows, Run, Source, Stack},
};
use crate::{
    Error,
    config::ModelConfig,
    families::Family,
    model::decoder::{model_specs, selection_biases},
};
use std::collections::BTreeMap;

/// Tensors that a message lists.
const LISTED: usize = 8;

/// Rows of a tensor of the model in one tensor of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Name of the folder's tensor.
    pub(crate) name: String,
    /// Index of its matrix.
    pub(crate) matrix: u64,
    pub(crate) is_transposed: bool,
    pub(crate) runs: Vec<Run>,
}

/// A tensor of the model.
#[derive(Debug, Clone)]
pub(crate) struct MappedTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    /// True for the biases that select experts, which are no parameters.
    pub(crate) is_selection_bias: bool,
    pub(crate) pieces: Vec<Piece>,
}

/// A tensor of the folder, by the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TheirTensor {
    /// Size of the dimension before those of a matrix or vector, if there is one.
    matrices: Option<u64>,
    /// Rows of a matrix in the model's orientation, as far as pieces reach.
    rows: u64,
    /// Columns of a matrix in the model's orientation; `None` for vectors.
    columns: Option<u64>,
    pub(crate) is_transposed: bool,
    /// Rows that the pieces have, over all matrices.
    covered: u64,
    /// Indices of the model's tensors and of their pieces.
    pub(crate) pieces: Vec<(usize, usize)>,
}

/// All tensors of a model and the tensors of a folder that they are.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) tensors: Vec<MappedTensor>,
    pub(crate) theirs: BTreeMap<String, TheirTensor>,
    by_name: BTreeMap<String, usize>,
}

/// Tensors of a folder that the model has no counterpart of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    /// Names of tensors that the family carries through unchanged, such as those of multi-token
    /// prediction.
    pub(crate) carried: Vec<String>,
    /// Names of tensors that repeat another one.
    pub(crate) repeated: Vec<String>,
}

impl Mapping {
    /// Maps the tensors of a model by the names of a family. `has` says which names the folder has;
    /// without a folder, all are assumed.
    ///
    /// # Errors
    /// If the family has no name for a tensor.
    pub(crate) fn new(
        family: Family,
        model: &ModelConfig,
        has: &dyn Fn(&str) -> bool,
    ) -> Result<Mapping, Error> {
        let tables = family.rules().names(model);
        let mut mapping = Mapping {
            tensors: Vec::new(),
            theirs: BTreeMap::new(),
            by_name: BTreeMap::new(),
        };
        for spec in model_specs(model) {
            let shape: Vec<u64> = spec.dims.iter().map(|dim| dim.size).collect();
            for expert in 0..spec.matrices() as usize {
                let of = TensorName::parse(&spec.name(expert));
                let experts = spec.matrices();
                let pieces = of.pieces(family, &tables, model, &shape, has)?;
                mapping.add(of.name, shape.clone(), false, pieces, experts);
            }
        }
        for bias in selection_biases(model) {
            let of = TensorName::parse(&bias.name);
            let shape = vec![bias.experts];
            let pieces = of.pieces(family, &tables, model, &shape, has)?;
            mapping.add(of.name, shape, true, pieces, 1);
        }
        Ok(mapping)
    }

    fn add(
        &mut self,
        name: String,
        shape: Vec<u64>,
        is_selection_bias: bool,
        pieces: Vec<MappedPiece>,
        experts: u64,
    ) {
        let index = self.tensors.len();
        for (number, MappedPiece { piece, stack }) in pieces.iter().enumerate() {
            let theirs = self
                .theirs
                .entry(piece.name.clone())
                .or_insert(TheirTensor {
                    matrices: match stack {
                        Stack::None => None,
                        Stack::Experts => Some(experts),
                        Stack::One => Some(1),
                    },
                    rows: 0,
                    columns: shape.get(1).copied(),
                    is_transposed: piece.is_transposed,
                    covered: 0,
                    pieces: Vec::new(),
                });
            for run in &piece.runs {
                let end = run.theirs + (run.count.max(1) - 1) * run.step + 1;
                theirs.rows = theirs.rows.max(end);
                theirs.covered += run.count;
            }
            theirs.pieces.push((index, number));
        }
        self.by_name.insert(name.clone(), index);
        self.tensors.push(MappedTensor {
            name,
            shape,
            is_selection_bias,
            pieces: pieces.into_iter().map(|mapped| mapped.piece).collect(),
        });
    }

    /// Returns the tensor of the model with this global name.
    pub(crate) fn tensor(&self, name: &str) -> Option<&MappedTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// Returns the folder's name of the embedding.
    pub(crate) fn embedding(&self) -> &str {
        let embedding = self.tensor("embedding");
        &embedding.expect("every model has an embedding").pieces[0].name
    }

    /// Compares the folder with the rules: every tensor of the model is complete, and every tensor
    /// of the folder is used once, or known to be carried through or to repeat another one.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape or dtype, or is not known.
    pub(crate) fn account(
        &self,
        family: Family,
        model: &ModelConfig,
        table: &LogicalTable,
    ) -> Result<Account, Error> {
        let mut problems = Vec::new();
        for (name, theirs) in &self.theirs {
            match table.tensors.get(name) {
                None => {
                    let shape = theirs.shape();
                    let needed = format!("it is missing; config.json makes it {shape:?}");
                    problems.push(table.error(name, needed));
                }
                Some(found) => problems.extend(theirs.check(name, found, table).err()),
            }
        }
        let mut account = Account::default();
        for name in table.tensors.keys() {
            if self.theirs.contains_key(name) {
                continue;
            }
            if family.rules().carries(name, model) {
                account.carried.push(name.clone());
            } else if model.tie_embeddings && name == family.rules().output_layer() {
                account.repeated.push(name.clone());
            } else {
                let family = family.name();
                problems.push(table.error(name, format!("{family} models have no such tensor")));
            }
        }
        combine(problems)?;
        Ok(account)
    }
}

impl TheirTensor {
    /// Returns the number of matrices or vectors.
    pub(crate) fn matrices(&self) -> u64 {
        self.matrices.unwrap_or(1)
    }

    /// Returns the rows of a matrix in the model's orientation.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns the columns of a matrix in the model's orientation: 1 for vectors.
    pub(crate) fn columns(&self) -> u64 {
        self.columns.unwrap_or(1)
    }

    /// Returns the tensors of the model in a matrix, with their rows in it.
    pub(crate) fn pieces_of<'a>(
        &'a self,
        mapping: &'a Mapping,
        matrix: u64,
    ) -> impl Iterator<Item = (&'a MappedTensor, &'a Piece)> {
        let pieces = self.pieces.iter().map(|&(tensor, piece)| {
            let tensor = &mapping.tensors[tensor];
            (tensor, &tensor.pieces[piece])
        });
        pieces.filter(move |(_, piece)| piece.matrix == matrix)
    }

    /// Returns the shape in the folder.
    pub(crate) fn shape(&self) -> Vec<u64> {
        let mut shape: Vec<u64> = self.matrices.into_iter().collect();
        match (self.columns, self.is_transposed) {
            (None, _) => shape.push(self.rows),
            (Some(columns), false) => shape.extend([self.rows, columns]),
            (Some(columns), true) => shape.extend([columns, self.rows]),
        }
        shape
    }

    fn check(&self, name: &str, found: &LogicalTensor, table: &LogicalTable) -> Result<(), Error> {
        table.check_dtype(name, found)?;
        let shape = self.shape();
        if found.shape != shape {
            let reason = format!(
                "its shape is {:?}, config.json makes it {shape:?}",
                found.shape
            );
            return Err(table.error(name, reason));
        }
        if self.covered != self.rows * self.matrices() {
            return Err(table.error(name, "the model uses a part of it only"));
        }
        Ok(())
    }
}

/// Returns one error that lists the first of many.
fn combine(problems: Vec<Error>) -> Result<(), Error> {
    let Some(first) = problems.first() else {
        return Ok(());
    };
    if problems.len() == 1 {
        return Err(Error::Folder(first.to_string()));
    }
    let listed = problems
        .iter()
        .take(LISTED)
        .map(|error| format!("\n  {error}"));
    let mut message = format!("{} tensors do not fit the model:", problems.len());
    message.extend(listed);
    if problems.len() > LISTED {
        message += &format!("\n  and {} more", problems.len() - LISTED);
    }
    Err(Error::Folder(message))
}

/// A piece, and the form of the folder's tensor.
struct MappedPiece {
    piece: Piece,
    stack: Stack,
}

/// The parts of a tensor's global name.
struct TensorName {
    name: String,
    layer: Option<usize>,
    expert: usize,
    /// The name without layer and expert.
    key: String,
}

impl TensorName {
    fn parse(name: &str) -> TensorName {
        let mut parsed = TensorName {
            name: name.to_string(),
            layer: None,
            expert: 0,
            key: name.to_string(),
        };
        let number = |text: &str| text.parse::<usize>().ok();
        if let Some((layer, key)) = name
            .strip_prefix("layers.")
            .and_then(|of| of.split_once('.'))
            && let Some(layer) = number(layer)
        {
            parsed.layer = Some(layer);
            parsed.key = key.to_string();
        }
        if let Some((block, of)) = parsed.key.split_once(".experts.")
            && let Some((expert, part)) = of.split_once('.')
            && let Some(expert) = number(expert)
        {
            parsed.expert = expert;
            parsed.key = format!("{block}.experts.{part}");
        }
        parsed
    }

    fn name_in_folder(&self, source: &Source) -> String {
        let name = source.name.replace("{expert}", &self.expert.to_string());
        match self.layer {
            Some(layer) => format!("{LAYERS}.{layer}.{name}"),
            None => name,
        }
    }

    fn pieces(
        &self,
        family: Family,
        tables: &[Names],
        model: &ModelConfig,
        shape: &[u64],
        has: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<MappedPiece>, Error> {
        let entries = tables.iter().flat_map(|table| table.iter());
        let rule = entries.clone().find(|(key, _)| *key == self.key);
        let Some((_, alternatives)) = rule else {
            let family = family.name();
            return Err(Error::Folder(format!(
                "{family} models have no name for {}",
                self.name
            )));
        };
        let has_all = |sources: &&&[Source]| {
            let mut sources = sources.iter();
            sources.all(|source| has(&self.name_in_folder(source)))
        };
        let sources = alternatives
            .iter()
            .find(has_all)
            .unwrap_or(&alternatives[0]);
        let count = shape[0] / sources.len() as u64;
        let part = self.key.rsplit('.').next().unwrap_or(&self.key);
        let rows = Rows {
            model,
            layer: self.layer.unwrap_or(0),
            part,
            count,
        };
        let pieces = sources.iter().zip(0u64..).map(|(source, number)| {
            let mut runs = source.order.runs(&rows);
            for run in &mut runs {
                run.ours += number * count;
            }
            let matrix = match source.stack {
                Stack::Experts => self.expert as u64,
                Stack::None | Stack::One => 0,
            };
            MappedPiece {
                piece: Piece {
                    name: self.name_in_folder(source),
                    matrix,
                    is_transposed: source.is_transposed,
                    runs,
                },
                stack: source.stack,
            }
        });
        Ok(pieces.collect())
    }
}
