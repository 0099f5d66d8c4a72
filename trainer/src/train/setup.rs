//! Construction of a trainer: data, process groups, model and optimizer of this rank.

use super::{
    ThisRank, Trainer,
    durability::Durability,
    expert_balance::ExpertBalance,
    expert_placement::{ExpertPlacement, ExpertRows},
    handed_on::from_rank_0,
    passes::{Passes, step_plans},
    rehearsal::rehearse,
    resume::Resumption,
    run::Reports,
    run_data::{DataPosition, Resources, RunData},
};
use crate::{
    Error,
    config::{Config, MinTokens, PipelinePlan, RecomputedPart},
    data::{
        Dataset, eod_token::DocumentTokens, recorded::RecordedData, validation::open_validation,
    },
    join_groups::join_groups,
    model::{BuildContext, Model, ModelPart, PipelineSplit, parameters::Parameters},
    optim::{Optimizer, StageRanks, groups::Groups},
    process_groups::ProcessGroups,
    stage_layout::StageLayout,
};
use dataset::order::OrderVersion;
use moe::{
    experts::{Fp8Weights, GemmPrecision},
    lending::calibrate::{ExpertSize, agree_on_break_even, break_even},
};
use parallel::{
    Accelerator, Communicator, GradientBuckets, GroupKind, Mesh, Weight, World,
    agreement::{agree, decode_peer_message},
    pipeline::{CollectiveKind, Executor, Vocabulary},
};
use std::sync::Arc;

impl Trainer {
    /// Sets up a run with initial values. On a device it first rehearses a step.
    ///
    /// # Collective
    /// All ranks of `world`.
    ///
    /// # Errors
    /// If data is missing or does not fit the run, the device cannot be used or lacks what the
    /// configuration needs, or a process group cannot be created.
    pub fn new(
        config: Config,
        world: &World,
        device: Box<dyn Accelerator>,
    ) -> Result<Trainer, Error> {
        if config.run.deterministic {
            torch_ext::set_deterministic(true)?;
        }
        if let Some(problem) = config.device_problem(device.compute_capability()?) {
            return Err(Error::Config(format!("{}: {problem}", device.name())));
        }
        let data = open_data(&config)?;
        let resources = Resources { device, data };
        let mut resources = rehearse(&config, world, resources)?;
        let all = world.all("world")?;
        let recorded = read_recorded(&config, &all)?;
        resources.data.use_recorded(&config, recorded)?;
        Trainer::assemble(config, world, all, resources, |part| part)
    }

    /// Creates the process groups besides `all`, that of all ranks, and of the model what `select`
    /// leaves of this rank's part.
    ///
    /// # Collective
    /// All ranks of `world`.
    ///
    /// # Errors
    /// If the configuration does not fit the ranks, or a process group cannot be created.
    pub(super) fn assemble(
        config: Config,
        world: &World,
        all: Arc<dyn Communicator>,
        resources: Resources,
        select: impl FnOnce(ModelPart) -> ModelPart,
    ) -> Result<Trainer, Error> {
        let Resources { device, data } = resources;
        let mesh = config
            .mesh(world.rank(), world.size())
            .map_err(Error::Config)?;
        let plans = step_plans(&config, &mesh)?;
        // Batch sizes have no effect on the layers and groups of a rank.
        let plan = &plans[0].plan;
        let split = pipeline_split(&mesh, plan);
        let part = split.part(mesh.coordinates().pipeline, mesh.coordinates().tensor);
        let tied_ranks = tied_ranks(&config, &mesh, &split, &part);
        let groups = join_groups(world, &mesh, &config, &tied_ranks)?;
        let lanes = vocabulary_groups(world, &mesh, plan.schedule.order.vocabulary)?;
        let stages = world.p2p_group("pipeline", &mesh.group(GroupKind::Pipeline))?;
        let executor = Executor::new(stages, lanes, device.as_ref())?;
        let ctx = build_context(&config, data.recorded.tokens.end, device.as_ref(), &groups);
        let model = Model::new(&config.model, select(part), &ctx);
        let gradients = gradient_buckets(&config, &model.parameters, device.as_ref())?;
        measure_min_tokens(&config, &mesh, &groups, &all, device.as_ref())?;
        let planner = groups
            .least_loaded
            .as_ref()
            .map(|least_loaded| least_loaded.planner.clone());
        let placement = expert_placement(&config, &mesh, world)?;
        let optimizer = Optimizer::new(
            &config.optimizer,
            config.train.grad_clip,
            &model.parameters,
            device.as_ref(),
            all.clone(),
            stage_ranks(&config, &mesh, world)?,
        )?;
        Ok(Trainer {
            config,
            data,
            model,
            passes: Passes {
                executor,
                single_forward: plan.forward_only(1),
                plans,
                gradients,
            },
            optimizer,
            experts: ExpertBalance { planner, placement },
            rank: ThisRank {
                mesh,
                world: all,
                device,
            },
            durability: Durability::default(),
            resumption: Resumption::default(),
            reports: Reports::default(),
        })
    }
}

/// Returns what the model of a run is built from. The token `end` ends documents.
fn build_context<'a>(
    config: &Config,
    end: Option<u32>,
    device: &'a dyn Accelerator,
    groups: &'a ProcessGroups,
) -> BuildContext<'a> {
    let expert_gemm = if config.train.fp8_experts {
        GemmPrecision::Fp8(Fp8Weights::default())
    } else {
        GemmPrecision::Model
    };
    BuildContext {
        sequence_length: config.data.sequence_length,
        documents: config.data.document_rules(end),
        dtype: config.train.dtype,
        expert_gemm,
        seed: config.run.seed,
        draws_values: config.model.from.is_none(),
        device,
        groups,
        context_attention: config.parallel.context_attention,
        recompute: config.parallel.recompute.clone(),
        offload: config.optimizer.offload && !device.computes_on_host(),
    }
}

/// Opens the files of the data. Any token stands for the one that ends documents until the record
/// is read: a rehearsal runs the same operations with it.
fn open_data(config: &Config) -> Result<RunData, Error> {
    let length = config.data.sequence_length;
    let vocab_size = config.model.vocab_size;
    let any_token = config.data.key_that_needs_eod_token().map(|_| 0);
    let end = config.data.eod_token.or(any_token);
    let mut data = RunData {
        train: Dataset::open(&config.data.train, length, vocab_size, config.run.seed)?,
        validation: match &config.validation {
            Some(section) => open_validation(config, section)?,
            None => Vec::new(),
        },
        recorded: RecordedData {
            tokens: DocumentTokens { begin: None, end },
            ..RecordedData::default()
        },
        position: DataPosition::default(),
        order: OrderVersion::default(),
    };
    data.mask_ends(config, end);
    Ok(data)
}

/// Reads the records and parts of the data on rank 0, for all ranks.
fn read_recorded(config: &Config, world: &Arc<dyn Communicator>) -> Result<RecordedData, Error> {
    let read = || -> Result<Vec<u8>, Error> {
        if world.rank() != 0 {
            return Ok(Vec::new());
        }
        let read = RecordedData::read(config)?;
        Ok(serde_json::to_vec(&read).expect("records are plain data"))
    };
    let bytes = from_rank_0(world, agree(world, read())?)?;
    Ok(decode_peer_message(&bytes)?)
}

fn pipeline_split<'a>(mesh: &Mesh, plan: &'a PipelinePlan) -> PipelineSplit<'a> {
    let order = &plan.schedule.order;
    PipelineSplit {
        ranks: mesh.group(GroupKind::Pipeline).len(),
        placement: order.placement,
        layers: &plan.layers,
        shares_vocabulary: order.vocabulary.is_some(),
        tensor_ranks: mesh.shape().tensor,
    }
}

/// Returns the pipeline ranks with an end of the model, if embedding and output layer are tied.
fn tied_ranks(config: &Config, mesh: &Mesh, split: &PipelineSplit, own: &ModelPart) -> Vec<usize> {
    if !config.model.tie_embeddings || own.vocabulary.is_some() {
        return Vec::new();
    }
    let has_end = |&rank: &usize| {
        let part = split.part(rank, mesh.coordinates().tensor);
        part.has_first() || part.has_last()
    };
    (0..split.ranks).filter(has_end).collect()
}

type VocabularyGroup = (CollectiveKind, Arc<dyn Communicator>);

/// Creates the groups for the collectives of vocabulary parallelism.
fn vocabulary_groups(
    world: &World,
    mesh: &Mesh,
    algorithm: Option<Vocabulary>,
) -> Result<Vec<VocabularyGroup>, Error> {
    let Some(algorithm) = algorithm else {
        return Ok(Vec::new());
    };
    let mut names = vec![
        (CollectiveKind::Hidden, "last hidden state"),
        (CollectiveKind::Statistics, "logit statistics"),
        (CollectiveKind::Embedding, "embedding"),
        (CollectiveKind::EmbeddingGradient, "embedding gradient"),
    ];
    if algorithm == Vocabulary::Naive {
        names.push((CollectiveKind::Maximum, "largest logit"));
    }
    if algorithm.gradient_after_t() {
        names.push((CollectiveKind::HiddenGradient, "hidden gradient"));
    }
    let members = mesh.group(GroupKind::Vocabulary);
    let mut groups = Vec::new();
    for (kind, name) in names {
        groups.push((kind, world.group(name, &members)?));
    }
    Ok(groups)
}

fn gradient_buckets(
    config: &Config,
    parameters: &Parameters,
    device: &dyn Accelerator,
) -> Result<GradientBuckets, Error> {
    let weights: Vec<(Weight, usize)> = parameters
        .iter()
        .map(|parameter| (parameter.weight.clone(), parameter.replicas as usize))
        .collect();
    let bytes = (config.parallel.bucket_mib * 1048576.0) as usize;
    Ok(GradientBuckets::new(
        &weights,
        parameters.replications(),
        bytes,
        parameters.keep_gradients(),
        device,
    )?)
}

/// Sets the planner's `min_tokens` from the measured cost of a transfer, unless it is configured.
fn measure_min_tokens(
    config: &Config,
    mesh: &Mesh,
    groups: &ProcessGroups,
    all: &Arc<dyn Communicator>,
    device: &dyn Accelerator,
) -> Result<(), Error> {
    let Some(moe) = &config.model.moe else {
        return Ok(());
    };
    let Some(least_loaded) = &groups.least_loaded else {
        return Ok(());
    };
    if !matches!(moe.least_loaded.min_tokens, MinTokens::Measured(_)) {
        return Ok(());
    }
    let size = ExpertSize {
        hidden: config.model.hidden as i64,
        ffn: moe.ffn_per_slice(mesh.shape().expert_tensor) as i64,
        kind: config.train.dtype.kind(),
        refetched_in_backward: !config.parallel.recompute.keeps(RecomputedPart::Dispatch),
    };
    let measured = break_even(&least_loaded.lending, size, device)?;
    let agreed = agree_on_break_even(all, measured)?;
    least_loaded.planner.lock().min_tokens = agreed;
    Ok(())
}

/// Returns the ranks that exchange whole matrices: those of the stage, if an optimizer needs them.
fn stage_ranks(config: &Config, mesh: &Mesh, world: &World) -> Result<StageRanks, Error> {
    if !Groups::new(&config.optimizer, config.train.dtype.kind()).need_matrices() {
        return Ok(StageRanks::alone());
    }
    let group = world.group("whole matrices", &mesh.group(GroupKind::Stage))?;
    let layout = StageLayout::new(&config.parallel, mesh)?;
    Ok(StageRanks::new(group, layout))
}

fn expert_placement(
    config: &Config,
    mesh: &Mesh,
    world: &World,
) -> Result<Option<ExpertPlacement>, Error> {
    let Some(moe) = &config.model.moe else {
        return Ok(None);
    };
    let Some(placement) = &moe.placement else {
        return Ok(None);
    };
    let stage = world.group("moving experts", &mesh.group(GroupKind::Stage))?;
    let moe_layers = config.model.num_moe_layers();
    let rows = ExpertRows::new(config, moe, mesh)?;
    let experts = moe.experts;
    Ok(Some(ExpertPlacement::new(
        placement, moe_layers, experts, rows, stage,
    )))
}
