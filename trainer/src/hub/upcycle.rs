//! An MoE model made from a dense one: the dense network of each layer becomes experts.

use super::{
    ByteProgress,
    config_json::ConfigJson,
    export::{ExportOptions, ExportReport, Form, write_folder},
    model_folder::ModelFolder,
    reader::FolderReader,
    values::ModelValues,
};
use crate::{
    Error,
    config::{Dtype, ModelConfig},
    families::{Family, canonical::canonical, expression::differences, moe_keys},
    model::init::normal,
};
use checkpoint::TensorSlice;
use parking_lot::Mutex;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use std::{collections::HashMap, path::PathBuf};
use tch::{Kind, Tensor};

/// Standard deviation of a router's initial weights.
const ROUTER_STD: f64 = 0.02;

/// A way from the dense network to experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UpcycleMethod {
    /// Each expert is the network (Sparse Upcycling, arXiv 2212.05055).
    Naive,
    /// Each expert is a part of the network, and a token chooses whole copies, so that the model
    /// first computes what the dense one does (arXiv 2410.07524, section 3.1).
    VirtualGroups,
    /// Each expert is the network with this share of its inner width drawn anew, from the
    /// distribution of the values it replaces (Drop-Upcycling, arXiv 2502.19261).
    Drop(f64),
}

/// Source, destination and sizes of [`upcycle`].
#[derive(Debug, Clone)]
pub struct UpcycleOptions {
    /// Folder of a dense model.
    pub dense: PathBuf,
    /// The folder to write. It must not exist, or be empty.
    pub output: PathBuf,
    pub experts: usize,
    pub top_k: usize,
    /// Parts into which virtual groups divide the network.
    pub granularity: usize,
    pub method: UpcycleMethod,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Dtype of the weights. By default that of the folder.
    pub dtype: Option<Dtype>,
}

/// Writes an MoE model that is made from a dense one. Calls `progress` with the bytes that are done
/// and all.
///
/// # Errors
/// If the numbers do not fit, no MoE family can express the model, or a file cannot be read or
/// written.
pub fn upcycle(options: &UpcycleOptions, progress: &ByteProgress) -> Result<ExportReport, Error> {
    let dense = ModelFolder::open(&options.dense)?;
    dense.check_repeated()?;
    let model = sparse_model(options, &dense)?;
    let (family, config) = sparse_config(&dense, &model)?;
    let form = Form::of_new_model(&dense, family, config, options.dtype);
    let values = Upcycled {
        dense: &dense.reader,
        dense_ffn: dense.model().ffn.unwrap_or(0) as i64,
        ffn: model.moe.as_ref().map_or(0, |moe| moe.ffn) as i64,
        options,
        spreads: Mutex::new(HashMap::new()),
    };
    let to = ExportOptions {
        checkpoint: PathBuf::new(),
        output: options.output.clone(),
        dtype: options.dtype,
        source: None,
        shard_bytes: None,
    };
    write_folder(&to, &values, &model, None, &form, progress)
}

/// Returns the MoE model.
fn sparse_model(options: &UpcycleOptions, dense: &ModelFolder) -> Result<ModelConfig, Error> {
    let UpcycleOptions {
        experts,
        top_k,
        granularity,
        method,
        ..
    } = *options;
    let refuse = |reason: String| Err(Error::Config(reason));
    let mut model = dense.model().clone();
    let Some(ffn) = model.ffn.filter(|_| model.moe.is_none()) else {
        return refuse(format!(
            "{} is an MoE model already: name the folder of a dense one",
            options.dense.display()
        ));
    };
    if top_k == 0 || top_k > experts {
        return refuse(format!(
            "--top-k {top_k} is not between 1 and --experts {experts}"
        ));
    }
    if method != UpcycleMethod::VirtualGroups && granularity != 1 {
        return refuse(format!(
            "--granularity {granularity} needs --method virtual-groups"
        ));
    }
    if let UpcycleMethod::Drop(share) = method
        && !(share > 0.0 && share <= 1.0)
    {
        return refuse(format!("--drop-share {share} is not above 0 and at most 1"));
    }
    for (name, whole) in [
        ("intermediate_size", ffn),
        ("--experts", experts),
        ("--top-k", top_k),
    ] {
        if granularity == 0 || !whole.is_multiple_of(granularity) {
            return refuse(format!(
                "{name} {whole} is not a multiple of --granularity {granularity}: the parts of a \
                 network are chosen together"
            ));
        }
    }
    let sizes = moe_keys::Sizes {
        experts,
        top_k,
        ffn: ffn / granularity,
    };
    model.moe = Some(moe_keys::section(sizes, moe_keys::softmax(true)));
    model.ffn = None;
    Ok(model)
}

/// Returns the first family that can express the MoE model, and its configuration: that of the
/// dense model with other keys of the family.
fn sparse_config(dense: &ModelFolder, model: &ModelConfig) -> Result<(Family, ConfigJson), Error> {
    let expected = canonical(model);
    let mut reasons = Vec::new();
    for family in [Family::Mixtral, Family::Qwen3Moe] {
        let mut config = dense.config.clone();
        config.set("architectures", [family.rules().architecture()]);
        config.set("model_type", family.rules().model_type());
        family.rules().write(model, &mut config);
        let read = match family.rules().read(&config) {
            Ok(read) => read,
            Err(error) => {
                reasons.push(format!("{} refuses it ({error})", family.name()));
                continue;
            }
        };
        let lost = differences(&expected, &canonical(&read));
        if lost.is_empty() {
            return Ok((family, config));
        }
        reasons.push(format!("{} has no {}", family.name(), lost.join(", ")));
    }
    Err(Error::Folder(format!(
        "no MoE family can express the upcycled model: {}",
        reasons.join("; ")
    )))
}

/// Mean and standard deviation of values.
#[derive(Debug, Clone, Copy)]
struct Spread {
    mean: f64,
    std: f64,
}

/// The values of an upcycled model.
struct Upcycled<'a> {
    dense: &'a FolderReader,
    /// Inner width of the dense network.
    dense_ffn: i64,
    /// Inner width of an expert.
    ffn: i64,
    options: &'a UpcycleOptions,
    /// Of the values that are drawn anew, by the matrix and the expert.
    spreads: Mutex<HashMap<String, Spread>>,
}

/// An expert's matrix by its global name: `layers.N.moe.experts.E.PART`.
struct ExpertMatrix<'a> {
    /// Global name of the dense network.
    dense: String,
    expert: i64,
    part: &'a str,
}

impl ExpertMatrix<'_> {
    fn parse(name: &str) -> Option<ExpertMatrix<'_>> {
        let (layer, rest) = name.split_once(".moe.experts.")?;
        let (expert, part) = rest.split_once('.')?;
        Some(ExpertMatrix {
            dense: format!("{layer}.mlp"),
            expert: expert.parse().ok()?,
            part,
        })
    }
}

impl ModelValues for Upcycled<'_> {
    fn values(&self, slice: &TensorSlice, is_selection_bias: bool) -> Result<Tensor, Error> {
        if slice.name.ends_with(".moe.gate") {
            return Ok(self.router(slice));
        }
        match ExpertMatrix::parse(&slice.name) {
            None => self.dense.values(slice, is_selection_bias),
            Some(matrix) if matrix.part == "down" => self.down(&matrix, slice),
            Some(matrix) => self.gate_up(&matrix, slice),
        }
    }
}

impl Upcycled<'_> {
    /// Returns rows of a router. Parts of one copy have the same row, so a token chooses all.
    fn router(&self, slice: &TensorSlice) -> Tensor {
        let granularity = self.options.granularity as i64;
        let hidden = slice.global_shape[1];
        let copies = [slice.global_shape[0] / granularity, hidden];
        let row = |expert: i64| {
            let offset = [expert / granularity, 0];
            let seed = self.options.seed;
            normal(
                seed,
                &slice.name,
                &copies,
                &offset,
                &[1, hidden],
                ROUTER_STD,
            )
        };
        let rows = slice.offset[0]..slice.offset[0] + slice.shape[0];
        let values: Vec<f32> = rows.flat_map(row).collect();
        Tensor::from_slice(&values).view(slice.shape.as_slice())
    }

    /// Returns the first inner element of the network that an expert has.
    fn first_inner(&self, expert: i64) -> i64 {
        expert % self.options.granularity as i64 * self.ffn
    }

    /// Returns rows of gate and up: inner elements of the gate, then those of up.
    fn gate_up(&self, matrix: &ExpertMatrix, slice: &TensorSlice) -> Result<Tensor, Error> {
        let first = self.first_inner(matrix.expert);
        let rows = slice.offset[0]..slice.offset[0] + slice.shape[0];
        let mut parts = Vec::new();
        for (half, start) in [(0, first), (self.ffn, self.dense_ffn + first)] {
            let begin = rows.start.max(half);
            let end = rows.end.min(half + self.ffn);
            if begin < end {
                parts.push(self.dense_rows(matrix, slice, start + begin - half, end - begin)?);
            }
        }
        let values = Tensor::cat(&parts, 0);
        if let UpcycleMethod::Drop(share) = self.options.method {
            for (half, name) in [(0, "gate"), (self.ffn, "up")] {
                let spread = self.spread(matrix, name, share, slice.global_shape[1])?;
                for inner in self.dropped(matrix, share) {
                    let row = half + inner;
                    if rows.contains(&row) {
                        let drawn = self.drawn(&slice.name, row, slice.global_shape[1], spread);
                        let mut into = values.get(row - rows.start);
                        into.copy_(&drawn);
                    }
                }
            }
        }
        Ok(values)
    }

    /// Returns rows of down, whose columns are the inner elements. In virtual groups a token's
    /// weights sum to one over all parts, which makes the sum of a copy's parts too small by their
    /// number.
    fn down(&self, matrix: &ExpertMatrix, slice: &TensorSlice) -> Result<Tensor, Error> {
        let mut dense = slice.clone();
        dense.name = format!("{}.down", matrix.dense);
        dense.global_shape[1] = self.dense_ffn;
        dense.offset[1] = self.first_inner(matrix.expert);
        let values = self.dense_values(&dense)? * self.options.granularity as f64;
        if let UpcycleMethod::Drop(share) = self.options.method {
            let hidden = slice.global_shape[0];
            let spread = self.spread(matrix, "down", share, hidden)?;
            for inner in self.dropped(matrix, share) {
                let drawn = self.drawn(&slice.name, inner, hidden, spread);
                let drawn = drawn.narrow(0, slice.offset[0], slice.shape[0]);
                let mut into = values.select(1, inner);
                into.copy_(&drawn);
            }
        }
        Ok(values)
    }

    /// Returns rows of the dense network's gate and up.
    fn dense_rows(
        &self,
        matrix: &ExpertMatrix,
        slice: &TensorSlice,
        first: i64,
        count: i64,
    ) -> Result<Tensor, Error> {
        let mut dense = slice.clone();
        dense.name = format!("{}.gate_up", matrix.dense);
        dense.global_shape[0] = 2 * self.dense_ffn;
        dense.offset[0] = first;
        dense.shape[0] = count;
        self.dense_values(&dense)
    }

    /// Returns a slice of the dense network in fp32, in which it is scaled and drawn anew.
    fn dense_values(&self, slice: &TensorSlice) -> Result<Tensor, Error> {
        Ok(self.dense.values(slice, false)?.to_kind(Kind::Float))
    }

    /// Returns the inner elements of an expert that are drawn anew, the same in all matrices, in
    /// order.
    fn dropped(&self, matrix: &ExpertMatrix, share: f64) -> Vec<i64> {
        let count = (share * self.ffn as f64).floor() as usize;
        let mut inner: Vec<i64> = (0..self.ffn).collect();
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.options.seed.to_le_bytes());
        key[8..16].copy_from_slice(&(matrix.expert as u64).to_le_bytes());
        let layer: u64 = matrix
            .dense
            .bytes()
            .map(u64::from)
            .fold(7, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte));
        key[16..24].copy_from_slice(&layer.to_le_bytes());
        let mut random = ChaCha8Rng::from_seed(key);
        for index in 0..count {
            let other = index + (random.next_u64() % (inner.len() - index) as u64) as usize;
            inner.swap(index, other);
        }
        inner.truncate(count);
        inner.sort_unstable();
        inner
    }

    /// Returns the spread of the values of one dense matrix that an expert draws anew.
    fn spread(
        &self,
        matrix: &ExpertMatrix,
        name: &str,
        share: f64,
        hidden: i64,
    ) -> Result<Spread, Error> {
        let key = format!("{}.{}.{name}", matrix.dense, matrix.expert);
        if let Some(spread) = self.spreads.lock().get(&key) {
            return Ok(*spread);
        }
        let dropped = Tensor::from_slice(&self.dropped(matrix, share));
        let values = match name {
            "down" => {
                let whole = [hidden, self.dense_ffn];
                let slice = TensorSlice::whole(format!("{}.down", matrix.dense), &whole);
                self.dense_values(&slice)?.index_select(1, &dropped)
            }
            _ => {
                let whole = [2 * self.dense_ffn, hidden];
                let slice = TensorSlice::whole(format!("{}.gate_up", matrix.dense), &whole);
                let first = if name == "gate" { 0 } else { self.dense_ffn };
                let rows = self.dense_rows(matrix, &slice, first, self.dense_ffn)?;
                rows.index_select(0, &dropped)
            }
        };
        let values = values.to_kind(Kind::Double);
        let spread = Spread {
            mean: values.mean(Kind::Double).double_value(&[]),
            std: values.std(false).double_value(&[]),
        };
        self.spreads.lock().insert(key, spread);
        Ok(spread)
    }

    /// Draws the values of an inner element of a matrix.
    fn drawn(&self, name: &str, inner: i64, width: i64, spread: Spread) -> Tensor {
        let rows = [inner + 1, width];
        let seed = self.options.seed;
        let values = normal(seed, name, &rows, &[inner, 0], &[1, width], spread.std);
        Tensor::from_slice(&values) + spread.mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BuildContext, Model, ModelPart, ProcessGroups, hub::golden::families};
    use parallel::Cpu;

    fn options(dense: &str, output: PathBuf, method: UpcycleMethod) -> UpcycleOptions {
        UpcycleOptions {
            dense: families().join(dense).join("model"),
            output,
            experts: 4,
            top_k: 2,
            granularity: 1,
            method,
            seed: 3,
            dtype: None,
        }
    }

    fn logits(folder: &ModelFolder) -> Tensor {
        let groups = ProcessGroups::single_rank();
        let ctx = BuildContext::single_rank(16, Dtype::Fp32, &Cpu, &groups);
        let config = folder.model();
        let model = Model::new(config, ModelPart::whole(config.layers), &ctx);
        folder.load(&model, &|_, _| ()).unwrap();
        let tokens: Vec<i64> = (0..32).map(|number| number * number % 48).collect();
        let tokens = Tensor::from_slice(&tokens).view([2, 16]);
        let output = tch::no_grad(|| model.forward(&tokens)).unwrap();
        model.logits(&output.hidden_td)
    }

    #[test]
    fn copies_and_virtual_groups_compute_what_the_dense_model_does() {
        let folder = tempfile::tempdir().unwrap();
        for dense in ["llama", "qwen3"] {
            let expected =
                logits(&ModelFolder::open(&families().join(dense).join("model")).unwrap());
            for (method, granularity) in [
                (UpcycleMethod::Naive, 1),
                (UpcycleMethod::VirtualGroups, 2),
                (UpcycleMethod::VirtualGroups, 1),
            ] {
                let output = folder
                    .path()
                    .join(format!("{dense}-{method:?}-{granularity}"));
                let options = UpcycleOptions {
                    granularity,
                    experts: 4 * granularity,
                    top_k: 2 * granularity,
                    ..options(dense, output.clone(), method)
                };
                upcycle(&options, &|_, _| ()).unwrap();
                let sparse = ModelFolder::open(&output).unwrap();
                let moe = sparse.model().moe.as_ref().unwrap();
                assert_eq!(moe.experts, 4 * granularity);
                let found = logits(&sparse);
                let largest = expected.abs().max().double_value(&[]);
                let worst = (&found - &expected).abs().max().double_value(&[]) / largest;
                assert!(worst < 1e-5, "{dense}, {method:?}, {granularity}: {worst}");
            }
        }
    }

    #[test]
    fn a_share_of_each_expert_is_drawn_anew() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("drop");
        let options = options("llama", output.clone(), UpcycleMethod::Drop(0.5));
        upcycle(&options, &|_, _| ()).unwrap();
        let sparse = ModelFolder::open(&output).unwrap();
        let dense = ModelFolder::open(&options.dense).unwrap();
        let ffn = dense.model().ffn.unwrap() as i64;
        let hidden = dense.model().hidden as i64;
        let read = |folder: &ModelFolder, name: &str, shape: [i64; 2]| {
            let slice = TensorSlice::whole(name, &shape);
            folder.reader.values(&slice, false).unwrap()
        };
        let gate_up = read(&dense, "layers.1.mlp.gate_up", [2 * ffn, hidden]);
        let down = read(&dense, "layers.1.mlp.down", [hidden, ffn]);
        let mut sets = Vec::new();
        for expert in 0..4 {
            let name = format!("layers.1.moe.experts.{expert}");
            let own = read(&sparse, &format!("{name}.gate_up"), [2 * ffn, hidden]);
            let own_down = read(&sparse, &format!("{name}.down"), [hidden, ffn]);
            let differs = |a: Tensor, b: Tensor| a.ne_tensor(&b).any().int64_value(&[]) == 1;
            let changed = |inner: i64| {
                let gate = differs(own.get(inner), gate_up.get(inner));
                let up = differs(own.get(ffn + inner), gate_up.get(ffn + inner));
                let down = differs(own_down.select(1, inner), down.select(1, inner));
                assert_eq!([gate, up], [down; 2], "one set for all three matrices");
                gate
            };
            sets.push((0..ffn).filter(|&inner| changed(inner)).collect::<Vec<_>>());
            assert_eq!(sets[expert].len() as i64, ffn / 2);
        }
        assert_ne!(sets[0], sets[1], "experts differ");
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |change: fn(&mut UpcycleOptions)| {
            let output = folder.path().join("x");
            let mut options = options("llama", output.clone(), UpcycleMethod::VirtualGroups);
            change(&mut options);
            let message = upcycle(&options, &|_, _| ()).unwrap_err().to_string();
            assert!(!output.exists());
            message
        };
        let message = refused(|options| options.granularity = 3);
        assert!(
            message.contains("is not a multiple of --granularity 3"),
            "{message}"
        );
        let message = refused(|options| options.top_k = 5);
        assert!(message.contains("--top-k 5"), "{message}");
        let message = refused(|options| options.dense = families().join("mixtral/model"));
        assert!(message.contains("is an MoE model already"), "{message}");
        let message = refused(|options| {
            options.method = UpcycleMethod::Naive;
            options.granularity = 2;
        });
        assert!(
            message.contains("needs --method virtual-groups"),
            "{message}"
        );
    }
}
