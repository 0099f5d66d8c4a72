//! The loop: microbatches, gradients, the update, and what surrounds them.

pub(crate) mod checkpointing;
mod expert_placement;
pub(crate) mod metrics;
pub(crate) mod reference;
pub(crate) mod snapshots;
mod stages;

use crate::config::{Config, Dtype, MinTokens, RecomputedPart, SnapshotEvery};
use crate::data::Dataset;
use crate::model::{BuildContext, IGNORED, Model, ModelPart};
use crate::optim::Optimizer;
use crate::optim::schedule::learning_rate;
use crate::process_groups::ProcessGroups;
use crate::train::checkpointing::{RunState, StateTensors};
use crate::train::expert_placement::ExpertPlacement;
use crate::train::metrics::{
    JsonLinesWriter, Progress, RoutingLine, SnapshotMetrics, StepMetrics, percentiles,
};
use crate::train::snapshots::{KeeperAccess, Snapshots};
use crate::train::stages::{MoeLayerSums, StepInputs, StepStages, StepSums};
use crate::{Error, config::MoeConfig};
use kernels::profile;
use moe::balance::{BalanceScope, BatchTotals, update_bias};
use moe::lending::calibrate::{ExpertSize, agree_on_break_even, break_even};
use moe::lending::least_loaded::Planner;
use parallel::agreement::{agree, sum_over_ranks};
use parallel::pipeline::{CollectiveKind, Executor, PassKind, Schedule, Vocabulary};
use parallel::{Accelerator, Communicator, GradientBuckets, GroupKind, Mesh, Weight, World};
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Steps done in all.
    pub step: u64,
    /// Whether it was asked to stop before the last step.
    pub stopped: bool,
    /// The last validation loss, in nats a token.
    pub validation_loss: Option<f64>,
}

/// A run on one rank.
pub struct Trainer {
    config: Config,
    mesh: Mesh,
    world: Arc<dyn Communicator>,
    device: Box<dyn Accelerator>,
    model: Model,
    pipeline: Executor,
    /// The passes of a step.
    schedule: Schedule,
    /// The same without backward, and of one microbatch alone.
    forward_schedule: Schedule,
    single_forward: Schedule,
    gradients: GradientBuckets,
    optimizer: Optimizer,
    /// What decides which experts are lent, where they are.
    planner: Option<Arc<Mutex<Planner>>>,
    /// Where experts move over time.
    expert_placement: Option<ExpertPlacement>,
    train: Dataset,
    validation: Option<Dataset>,
    /// Optimizer steps done.
    step: u64,
    /// Samples drawn.
    samples: u64,
    /// Tokens learned from.
    tokens: u64,
    snapshots: Option<Snapshots>,
    reserved: Option<ReservedSlot>,
    /// Batches to leave out before a step: one made the loss not finite.
    skips: BTreeMap<u64, u64>,
    /// Seconds of the last step.
    seconds: f64,
}

/// A slot for the snapshot of a step.
struct ReservedSlot {
    slot: Option<usize>,
    /// Whether every rank has one.
    on_all_ranks: bool,
    /// Whether a checkpoint is due.
    checkpoint: bool,
}

/// What a run goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeSource {
    /// Nothing: it begins.
    Nothing,
    /// A snapshot in the memory of keepers.
    Snapshot,
    /// A checkpoint on disk.
    Checkpoint,
}

impl Trainer {
    /// Sets up a run from its beginning.
    ///
    /// # Collective
    /// All ranks of `world`.
    ///
    /// # Errors
    /// When data is missing, the device cannot be used, or the ranks cannot be joined.
    pub fn new(
        config: Config,
        world: &World,
        device: Box<dyn Accelerator>,
    ) -> Result<Trainer, Error> {
        let mesh = config
            .mesh(world.rank(), world.size())
            .map_err(Error::Config)?;
        let data = &config.data;
        let open = |sources, seed| {
            Dataset::open(sources, data.sequence_length, config.model.vocab_size, seed)
        };
        let train = open(&data.train, config.run.seed)?;
        let validation = match &config.validation {
            Some(_) => Some(open(&data.validation, config.run.seed)?),
            None => None,
        };
        let all = world.all("world")?;
        let accumulation = config.microbatches(&mesh);
        let plan = config.pipeline_plan(accumulation).map_err(Error::Config)?;
        let order = &plan.schedule.order;
        let stages = mesh.group(GroupKind::Pipeline);
        let at = mesh.coordinates();
        let part = |rank| {
            let placement = order.placement;
            let shared = order.vocabulary.is_some();
            let tensor = (at.tensor, mesh.shape().tensor);
            ModelPart::for_rank(
                (rank, stages.len()),
                placement,
                &plan.layers,
                shared,
                tensor,
            )
        };
        let own = part(at.pipeline);
        let ends: Vec<usize> = if config.model.tie_embeddings && own.vocabulary.is_none() {
            (0..stages.len())
                .filter(|&rank| part(rank).has_first() || part(rank).has_last())
                .collect()
        } else {
            Vec::new()
        };
        let ranks = ProcessGroups::join(world, &mesh, &config, &ends)?;
        let vocabulary = mesh.group(GroupKind::Vocabulary);
        let mut lanes = Vec::new();
        for (kind, name) in order.vocabulary.map_or(Vec::new(), vocabulary_collectives) {
            lanes.push((kind, world.group(name, &vocabulary)?));
        }
        let pipeline = Executor::new(world.chain("pipeline", &stages)?, lanes, device.as_ref())?;
        let model = Model::new(
            &config.model,
            own,
            &BuildContext::from_config(&config, device.as_ref(), &ranks),
        );
        let parameters = &model.parameters;
        let weights: Vec<(Weight, usize)> = parameters
            .iter()
            .map(|p| (p.weight.clone(), p.replicas as usize))
            .collect();
        let bytes = (config.parallel.bucket_mib * 1048576.0) as usize;
        let keep = parameters.keep_gradients();
        let gradients = GradientBuckets::new(
            &weights,
            parameters.replications(),
            bytes,
            keep,
            device.as_ref(),
        )?;
        let planner = ranks
            .least_loaded
            .as_ref()
            .map(|least_loaded| least_loaded.planner.clone());
        if let Some((moe, least_loaded)) =
            config.model.moe.as_ref().zip(ranks.least_loaded.as_ref())
            && matches!(moe.least_loaded.min_tokens, MinTokens::Measured(_))
        {
            let size = ExpertSize {
                hidden: config.model.hidden as i64,
                ffn: (moe.ffn / mesh.shape().expert_tensor) as i64,
                kind: config.train.dtype.kind(),
                refetched_in_backward: !config.parallel.recompute.keeps(RecomputedPart::Dispatch),
            };
            let measured = break_even(&least_loaded.lending, size, device.as_ref())?;
            locked(&least_loaded.planner).min_tokens = agree_on_break_even(&all, measured)?;
        }
        let expert_placement = match config
            .model
            .moe
            .as_ref()
            .and_then(|moe| Some((moe.experts, moe.placement.as_ref()?)))
        {
            Some((experts, placement)) => {
                let stage = world.group("experts on the move", &mesh.group(GroupKind::Stage))?;
                let moe_layers = config.model.num_moe_layers();
                let owners = mesh.shape().expert;
                Some(ExpertPlacement::new(
                    placement, moe_layers, experts, owners, stage,
                ))
            }
            None => None,
        };
        let settings = &config.optimizer;
        let clip = config.train.grad_clip;
        let optimizer = Optimizer::new(settings, clip, parameters, device.as_ref(), all.clone())?;
        Ok(Trainer {
            config,
            mesh,
            world: all,
            device,
            model,
            pipeline,
            forward_schedule: plan.forward_only(accumulation),
            single_forward: plan.forward_only(1),
            schedule: plan.schedule,
            gradients,
            optimizer,
            planner,
            expert_placement,
            train,
            validation,
            step: 0,
            samples: 0,
            tokens: 0,
            snapshots: None,
            reserved: None,
            skips: BTreeMap::new(),
            seconds: 0.0,
        })
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The gradients of the last [`Trainer::forward_backward`].
    pub fn gradients(&self) -> &GradientBuckets {
        &self.gradients
    }

    /// Choices for which an expert is lent, where experts are.
    pub fn min_tokens(&self) -> Option<i64> {
        self.planner
            .as_ref()
            .map(|planner| locked(planner).min_tokens)
    }

    /// Where this rank sits.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    fn checkpoint_dir(&self) -> PathBuf {
        self.config.run.dir.join("checkpoints")
    }

    fn state_tensors(&self) -> StateTensors<'_> {
        StateTensors {
            model: &self.model,
            optimizer: &self.optimizer,
            device: self.device.as_ref(),
            rank: self.world.rank(),
        }
    }

    /// Takes snapshots with the keeper of this node from here on, and resumes from what it was told to.
    pub fn use_keeper(&mut self, access: KeeperAccess) {
        let rank = self.world.rank();
        let every = self.config.snapshot.every;
        self.snapshots = Some(Snapshots::new(access, rank, every, self.device.as_ref()));
    }

    /// Leaves out so many batches before each of these steps.
    pub fn skip_batches(&mut self, skips: BTreeMap<u64, u64>) {
        self.skips = skips;
    }

    /// Goes on from the snapshot that the launcher chose, else from the newest usable checkpoint of the run's folder, if there
    /// is one; refused ones are told to `warn`.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When the snapshot cannot be read, or there are checkpoints and none can be used.
    pub fn resume(&mut self, warn: &mut dyn FnMut(&str)) -> Result<ResumeSource, Error> {
        // Experts are named as they were before their values are read.
        let prepare = |state: &RunState| {
            let (Some(expert_placement), Some(placement)) =
                (&self.expert_placement, &state.placement)
            else {
                return;
            };
            if expert_placement.fits(placement) {
                for (moe_layer, moe, held) in self.model.local_moe_layers() {
                    held.set_physical_slots(
                        &self.model.parameters,
                        &moe.dispatcher,
                        &placement.physical_slots[moe_layer],
                    );
                }
            }
        };
        let snapshot = match &self.snapshots {
            Some(snapshots) => checkpointing::resume_snapshot(
                snapshots.restored(),
                &self.state_tensors(),
                &self.world,
                &prepare,
            )?,
            None => None,
        };
        let (state, resumed) = match snapshot {
            Some(state) => (state, ResumeSource::Snapshot),
            None => match checkpointing::resume(
                &self.checkpoint_dir(),
                &self.state_tensors(),
                &self.world,
                &prepare,
                warn,
            )? {
                Some(state) => (state, ResumeSource::Checkpoint),
                None => return Ok(ResumeSource::Nothing),
            },
        };
        if let (Some(expert_placement), Some(placement)) =
            (&mut self.expert_placement, &state.placement)
        {
            expert_placement.resume(placement);
        }
        (self.step, self.samples, self.tokens) = (state.step, state.samples, state.tokens);
        // What was measured when the run began: the same plans, and so the same bits, as without a break.
        if let (Some(planner), Some(min_tokens), true) = (
            &self.planner,
            state.min_tokens,
            self.min_tokens_is_measured(),
        ) {
            locked(planner).min_tokens = min_tokens;
        }
        for key in ["/run/seed", "/data", "/train/global_batch"] {
            let now = serde_json::to_value(&self.config).expect("plain data");
            if now.pointer(key) != state.config.pointer(key) {
                let key = key[1..].replace('/', ".");
                warn(&format!(
                    "{key} is not what the checkpoint was made with: the data goes on in another order"
                ));
            }
        }
        Ok(resumed)
    }

    /// Takes the memory that snapshots need. Where a node has too little, there are none, and `warn` is told.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When a number of steps was asked for and a node has too little memory.
    pub fn begin_snapshots(&mut self, warn: &mut dyn FnMut(&str)) -> Result<(), Error> {
        if self.snapshots.is_none() {
            return Ok(());
        }
        let planned = self.plan_snapshots();
        match agree(&self.world, planned) {
            Ok(()) => Ok(()),
            Err(Error::Comm(error)) => Err(error.into()),
            Err(error) if matches!(self.config.snapshot.every, SnapshotEvery::Steps(_)) => {
                Err(Error::Config(format!(
                    "{error}; use more memory or nodes, a larger snapshot.memory_gib, or snapshot.every: 0"
                )))
            }
            Err(error) => {
                warn(&format!(
                    "no snapshots in memory: {error}; after a failure only checkpoints are left"
                ));
                self.snapshots = None;
                Ok(())
            }
        }
    }

    /// Lays out what each rank saves.
    fn plan_snapshots(&mut self) -> Result<(), Error> {
        let tensors = self.state_tensors().tensors()?;
        let save_plan = checkpointing::plan_save(&tensors, &self.world)?;
        let state = self.state();
        let snapshots = self.snapshots.as_mut().expect("the caller has looked");
        snapshots.plan(&save_plan, &tensors, &state, self.device.as_ref())
    }

    /// Lays it out anew where experts have moved. A keeper that cannot be reached, or has too little memory, has no slot then.
    fn replan_snapshots(&mut self) -> Result<(), Error> {
        if !self.snapshots.as_ref().is_some_and(Snapshots::needs_plan) {
            return Ok(());
        }
        match self.plan_snapshots() {
            Err(Error::Keeper(reason)) => {
                tracing::warn!("{reason}");
                Ok(())
            }
            planned => planned,
        }
    }

    /// Hands the state of this moment over to the copying thread.
    fn take_snapshot(&mut self, slot: usize) -> Result<(), Error> {
        let begun = Instant::now();
        let state = self.state();
        let generator = self.device.generator_state()?;
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.take(slot, state, generator);
            snapshots.cost.stall = begun.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Makes sure that the state of this moment is in the keepers' memory, whose newest the launcher writes to disk at the end:
    /// whether it is.
    ///
    /// # Collective
    /// All ranks.
    fn take_final_snapshot(&mut self) -> Result<bool, Error> {
        let Some(snapshots) = &mut self.snapshots else {
            return Ok(false);
        };
        let sum = |world: &Arc<dyn Communicator>, fact: bool| {
            Ok::<f64, Error>(sum_over_ranks(world, &[f64::from(u8::from(fact))])?[0])
        };
        // It may have been due anyway.
        let copied = snapshots.wait_until_stored(self.step);
        if sum(&self.world, copied)? as usize == self.world.size() {
            return Ok(true);
        }
        // The last step may have moved experts.
        self.replan_snapshots()?;
        let deadline = Instant::now() + Duration::from_secs(self.config.run.timeout_s);
        loop {
            let Some(snapshots) = &mut self.snapshots else {
                return Ok(false);
            };
            let slot = snapshots.reserve(self.step, true, self.device.as_ref());
            if sum(&self.world, slot.is_none())? == 0.0 {
                self.take_snapshot(slot.expect("every rank has one"))?;
                let copied = self
                    .snapshots
                    .as_mut()
                    .is_some_and(|snapshots| snapshots.wait_until_stored(self.step));
                return Ok(sum(&self.world, copied)? as usize == self.world.size());
            }
            snapshots.skip(slot, true);
            let late = Instant::now() > deadline;
            if sum(&self.world, late || !snapshots.is_open())? > 0.0 {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What is saved besides tensors.
    fn state(&self) -> RunState {
        RunState {
            step: self.step,
            samples: self.samples,
            tokens: self.tokens,
            ranks: self.world.size(),
            min_tokens: self.min_tokens(),
            placement: self
                .expert_placement
                .as_ref()
                .map(|expert_placement| expert_placement.state().clone()),
            config: serde_json::to_value(&self.config).expect("plain data"),
        }
    }

    /// Writes a checkpoint of the steps done so far.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When it cannot be written; older ones are untouched.
    pub fn save(&self) -> Result<PathBuf, Error> {
        let path = checkpointing::save(
            &self.checkpoint_dir(),
            &self.state(),
            &self.state_tensors(),
            &self.world,
        )?;
        if self.world.rank() == 0 {
            checkpoint::retain(&self.checkpoint_dir(), self.config.checkpoint.keep)?;
        }
        Ok(path)
    }

    /// Whether the price of a transfer is not given.
    fn min_tokens_is_measured(&self) -> bool {
        let moe = self.config.model.moe.as_ref();
        moe.is_some_and(|moe| matches!(moe.least_loaded.min_tokens, MinTokens::Measured(_)))
    }

    fn tokens_per_step(&self) -> u64 {
        (self.config.train.global_batch * self.config.data.sequence_length) as u64
    }

    fn accumulation(&self) -> usize {
        self.schedule.order.microbatches
    }

    /// Inputs and labels of this rank's microbatch number `index`. Consecutive microbatches of the global batch go to
    /// one rank, so the same microbatches exist in every layout.
    fn microbatch(&self, index: usize) -> Result<(Tensor, Tensor), Error> {
        let size = self.config.train.micro_batch as u64;
        let number = (self.mesh.coordinates().data * self.accumulation() + index) as u64;
        let first = self.samples + number * size;
        let (inputs, labels) = self.train.batch(first..first + size)?;
        Ok((self.device.upload(&inputs), self.device.upload(&labels)))
    }

    fn groups_per_step(&self) -> f64 {
        let train = &self.config.train;
        match self
            .config
            .model
            .moe
            .as_ref()
            .map(|moe| moe.load_balance_over)
        {
            Some(BalanceScope::Sequence) => train.global_batch as f64,
            Some(BalanceScope::Microbatch) => (train.global_batch / train.micro_batch) as f64,
            Some(BalanceScope::Batch) | None => 1.0,
        }
    }

    /// Carries `schedule` out over the microbatches that `batch` gives; learns where there are `gradients`.
    fn pass(
        &self,
        schedule: &Schedule,
        gradients: Option<&GradientBuckets>,
        batch: &dyn Fn(usize) -> Result<(Tensor, Tensor), Error>,
        totals: BatchTotals,
    ) -> Result<StepSums, Error> {
        let order = &schedule.order;
        let mut stages = StepStages::new(StepInputs {
            model: &self.model,
            device: self.device.as_ref(),
            gradients,
            batch,
            totals,
            algorithm: order.vocabulary,
            last_rank: order.rank_and_chunk(order.stages() - 1).0,
            sequences: self.config.train.micro_batch as i64,
            eod_token: self.config.data.eod_token,
            positions: (self.config.data.sequence_length / self.mesh.shape().context) as i64,
            kind: self.config.train.dtype.kind(),
        });
        let spans = self.pipeline.run(schedule, &mut stages)?;
        stages.sums.record_spans(&spans, order.chunks);
        Ok(stages.sums)
    }

    /// Losses and gradients of the next step, without the update.
    fn accumulate(&self) -> Result<StepSums, Error> {
        let batch = |index| self.microbatch(index);
        let totals = |counts_le| BatchTotals {
            groups: self.groups_per_step(),
            tokens: self.tokens_per_step() as f64,
            counts_le,
        };
        let mut counts = None;
        if self.model.counts_whole_batch() {
            // The first backward already needs the token counts of the last forward: count first.
            let sums = self.pass(&self.forward_schedule, None, &batch, totals(None))?;
            let experts = sums
                .moe_layers
                .first()
                .map_or(0, |moe_layer| moe_layer.tokens_per_expert.len())
                as i64;
            let tokens_per_expert = sums
                .moe_layers
                .iter()
                .flat_map(|moe_layer| &moe_layer.tokens_per_expert);
            let tokens_per_expert: Vec<f32> = tokens_per_expert
                .map(|&tokens_per_expert| tokens_per_expert as f32)
                .collect();
            let own = self
                .device
                .upload(&Tensor::from_slice(&tokens_per_expert).view([-1, experts]));
            self.world
                .all_reduce(&own, parallel::ReduceOp::Sum)?
                .wait()?;
            counts = Some(own);
        }
        self.gradients.begin(self.accumulation());
        let sums = self.pass(
            &self.schedule,
            Some(&self.gradients),
            &batch,
            totals(counts.as_ref()),
        )?;
        self.gradients.finish()?;
        Ok(sums)
    }

    /// Computes losses and gradients of the next step and leaves the weights as they are: the gradient norm. For
    /// tests and tools.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When data cannot be read or a collective fails.
    pub fn forward_backward(&self) -> Result<f64, Error> {
        self.accumulate()?;
        self.optimizer
            .grad_norm(&self.model.parameters, &self.gradients)
    }

    /// Writes what the step was made of. It is worth less than the step.
    fn write_trace(&self) {
        let rank = self.world.rank();
        let path = self
            .config
            .run
            .dir
            .join("logs")
            .join(format!("rank-{rank}.trace.json"));
        let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        match made.and_then(|()| profile::write(&profile::stop(), rank, &path)) {
            Ok(()) => tracing::info!("step {} is traced in {}", self.step, path.display()),
            Err(error) => tracing::warn!("cannot write {}: {error}", path.display()),
        }
    }

    /// One optimizer step. Also says whether any rank's `stop` was true.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When data cannot be read, a collective fails, or the loss is not finite.
    pub fn train_step(&mut self, stop: bool) -> Result<(StepMetrics, bool), Error> {
        let started = Instant::now();
        let traced = self.config.run.trace_step == Some(self.step + 1);
        if traced {
            profile::start();
        }
        if let Some(&batches) = self.skips.get(&(self.step + 1)) {
            self.samples += batches * self.config.train.global_batch as u64;
        }
        let sums = self.accumulate()?;
        let grad_norm = self
            .optimizer
            .grad_norm(&self.model.parameters, &self.gradients)?;
        let layers = sums.moe_layers.len();
        let ranks = self.world.size();
        // One collective for all figures of the step.
        let checkpoint = self.checkpoint_due(self.step + 1);
        let snapshot = self
            .snapshots
            .as_ref()
            .is_some_and(|snapshots| snapshots.due(self.step + 1, checkpoint));
        if snapshot {
            self.replan_snapshots()?;
        }
        let slot = match &mut self.snapshots {
            Some(snapshots) if snapshot => {
                snapshots.reserve(self.step + 1, checkpoint, self.device.as_ref())
            }
            _ => None,
        };
        let lacks = f64::from(u8::from(snapshot && slot.is_none()));
        let cost = self.snapshots.as_ref().map_or(0.0, Snapshots::cost_seconds);
        let mut figures = vec![
            sums.cross_entropy,
            sums.load_balance,
            sums.z,
            f64::from(u8::from(stop)),
        ];
        figures.extend([lacks, cost, self.seconds]);
        let choices_at = figures.len();
        figures.extend(
            sums.moe_layers
                .iter()
                .flat_map(|moe_layer| &moe_layer.tokens_per_expert),
        );
        let moved_at = figures.len();
        figures.extend(sums.moe_layers.iter().flat_map(|moe_layer| moe_layer.moved));
        let rows_at = figures.len();
        let own_at = rows_at + layers * ranks;
        let passes_at = own_at + 3 * ranks;
        // Times of passes are told apart where there is a pipeline.
        let passes = if self.mesh.shape().pipeline > 1 {
            2 * sums.passes.len()
        } else {
            0
        };
        figures.resize(passes_at + passes * ranks, 0.0);
        for (layer, moe_layer) in sums.moe_layers.iter().enumerate() {
            figures[rows_at + layer * ranks + self.world.rank()] = moe_layer.rows;
        }
        figures[own_at + self.world.rank()] = self.device.memory()?.peak as f64;
        figures[own_at + ranks + self.world.rank()] = parallel::peak_resident()? as f64;
        figures[own_at + 2 * ranks + self.world.rank()] = sums.wait_ratio;
        let own_passes = &mut figures[passes_at + passes * self.world.rank()..][..passes];
        own_passes
            .iter_mut()
            .zip(sums.passes.iter().flat_map(|&(s, n)| [s, n]))
            .for_each(|(to, from)| *to = from);
        let figures = sum_over_ranks(&self.world, &figures)?;
        let loss = figures[0];
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::Diverged {
                step: self.step + 1,
                loss,
            });
        }
        if let Some(snapshots) = &mut self.snapshots {
            // What is being copied is about to change.
            snapshots.wait();
            if snapshot {
                snapshots.choose_interval(figures[5] / ranks as f64, figures[6] / ranks as f64);
            }
        }
        let lr = learning_rate(
            &self.config.schedule,
            self.step,
            self.config.train.steps,
            self.tokens_per_step(),
        );
        self.optimizer.step(
            &self.model.parameters,
            &self.gradients,
            self.step + 1,
            lr,
            grad_norm,
            self.device.as_ref(),
        )?;
        self.model.mark_stale();
        let experts = sums
            .moe_layers
            .first()
            .map_or(1, |moe_layer| moe_layer.tokens_per_expert.len().max(1));
        let tokens_per_expert: Vec<&[f64]> =
            figures[choices_at..moved_at].chunks(experts).collect();
        if let Some(MoeConfig {
            bias_update_rate, ..
        }) = &self.config.model.moe
        {
            for (moe_layer, _, mut bias) in self.model.biases() {
                update_bias(
                    &mut bias,
                    &self
                        .device
                        .upload(&Tensor::from_slice(tokens_per_expert[moe_layer])),
                    *bias_update_rate,
                );
            }
        }
        let moved_experts = match &mut self.expert_placement {
            Some(expert_placement) => Some(expert_placement.step(
                self.step + 1,
                &tokens_per_expert,
                &self.model,
                &self.optimizer,
            )?),
            None => None,
        };
        let synchronized = self.device.synchronize();
        // A device that gave up among ranks says less of it than they know, or nothing, and what it computed is worth nothing.
        self.world.check()?;
        synchronized?;
        self.step += 1;
        self.samples += self.config.train.global_batch as u64;
        self.tokens += self.tokens_per_step();
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.progress.step_done(self.step);
            if moved_experts.is_some_and(|moved| moved > 0) {
                snapshots.forget_plan();
            }
        }
        self.reserved = snapshot.then_some(ReservedSlot {
            slot,
            on_all_ranks: figures[4] == 0.0,
            checkpoint,
        });
        let seconds = started.elapsed().as_secs_f64();
        self.seconds = seconds;
        if traced {
            self.write_trace();
        }
        let rows: Vec<&[f64]> = figures[rows_at..own_at].chunks(ranks).collect();
        let moved: Vec<&[f64]> = figures[moved_at..rows_at]
            .chunks(MoeLayerSums::MOVED)
            .collect();
        let expert_imbalance: Vec<f64> = tokens_per_expert
            .iter()
            .map(|tokens_per_expert| imbalance(tokens_per_expert.iter().copied()))
            .collect();
        let rank_imbalance: Vec<f64> = rows.iter().map(|rows| self.rank_imbalance(rows)).collect();
        let record = StepMetrics {
            step: self.step,
            loss,
            load_balance_loss: figures[1],
            z_loss: figures[2],
            lr,
            grad_norm,
            tokens: self.tokens,
            tokens_per_s: self.tokens_per_step() as f64 / seconds,
            step_ms: seconds * 1e3,
            expert_imbalance_percentiles: percentiles(&expert_imbalance),
            rank_imbalance_percentiles: percentiles(&rank_imbalance),
            expert_imbalance,
            rank_imbalance,
            tokens_per_rank: rows
                .iter()
                .map(|rows| rows.iter().map(|&rows| rows as u64).collect())
                .collect(),
            lent_tokens: moved.iter().map(|moved| moved[0] as u64).collect(),
            lent_bytes: moved.iter().map(|moved| moved[1] as u64).collect(),
            internode_bytes: moved.iter().map(|moved| moved[2] as u64).collect(),
            plan_ms: moved
                .iter()
                .map(|moved| moved[3] * 1e3 / self.stage_ranks() as f64)
                .collect(),
            moved_experts,
            snapshot: self
                .snapshots
                .as_ref()
                .filter(|_| snapshot)
                .map(|snapshots| SnapshotMetrics {
                    stall_ms: snapshots.cost.stall * 1e3,
                    copy_ms: snapshots.cost.copy * 1e3,
                    bytes: snapshots.cost.bytes,
                    skipped: snapshots.skipped,
                }),
            tokens_per_expert: tokens_per_expert
                .iter()
                .map(|tokens_per_expert| tokens_per_expert.iter().map(|&c| c as u64).collect())
                .collect(),
            rank_peak_memory: figures[own_at..own_at + ranks]
                .iter()
                .map(|&bytes| bytes as u64)
                .collect(),
            rank_peak_resident: figures[own_at + ranks..own_at + 2 * ranks]
                .iter()
                .map(|&b| b as u64)
                .collect(),
            rank_wait_ratio: figures[own_at + 2 * ranks..passes_at].to_vec(),
            rank_pass_ms: figures[passes_at..]
                .chunks(passes.max(1))
                .map(|p| self.pass_times(p))
                .collect(),
        };
        Ok((record, figures[3] > 0.0))
    }

    /// Whether a checkpoint is to be written after step `step`, as far as is known before it.
    fn checkpoint_due(&self, step: u64) -> bool {
        let every = self.config.checkpoint.every;
        (every > 0 && step.is_multiple_of(every)) || step == self.config.train.steps
    }

    /// Takes the snapshot of the last step, for which [`Trainer::train_step`] has reserved slots: after all that the step
    /// leaves on disk, so that nothing of it is missing when a run goes on from here.
    fn take_reserved(&mut self) -> Result<(), Error> {
        let Some(ReservedSlot {
            slot,
            on_all_ranks,
            checkpoint,
        }) = self.reserved.take()
        else {
            return Ok(());
        };
        let Some(snapshots) = &mut self.snapshots else {
            return Ok(());
        };
        match slot {
            // Where experts have just moved, the slot was for what they were called before.
            Some(slot) if on_all_ranks && !snapshots.needs_plan() => self.take_snapshot(slot),
            slot => {
                snapshots.skip(slot, checkpoint);
                Ok(())
            }
        }
    }

    /// Ranks that work on a layer.
    fn stage_ranks(&self) -> usize {
        self.world.size() / self.mesh.shape().pipeline
    }

    /// The largest over the mean of what a layer's ranks worked on, `rows` of each rank of the run.
    fn rank_imbalance(&self, rows: &[f64]) -> f64 {
        // Ranks of other stages have none.
        let stage = |rank: usize| self.mesh.coordinates_of(rank).pipeline;
        let busy = rows.iter().position(|&rows| rows > 0.0).map_or(0, stage);
        imbalance(
            rows.iter()
                .enumerate()
                .filter(|&(rank, _)| stage(rank) == busy)
                .map(|(_, &rows)| rows),
        )
    }

    /// The mean milliseconds of each pass that ran, by its name, from seconds and counts.
    fn pass_times(&self, passes: &[f64]) -> BTreeMap<String, f64> {
        let chunks = self.schedule.order.chunks;
        let named = passes
            .chunks(2)
            .enumerate()
            .filter(|(_, figures)| figures[1] > 0.0)
            .map(|(index, figures)| {
                let (_, kind) = PassKind::NAMES[index / chunks];
                let chunk = index % chunks;
                let name = if chunk == 0 {
                    kind.to_string()
                } else {
                    format!("{kind}.{chunk}")
                };
                (name, figures[0] / figures[1] * 1e3)
            });
        named.collect()
    }

    /// The mean loss over the validation sequences, in nats a token; None where there is no validation.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When data cannot be read or a collective fails.
    pub fn validate(&self) -> Result<Option<f64>, Error> {
        let (Some(config), Some(data)) = (&self.config.validation, &self.validation) else {
            return Ok(None);
        };
        let total = (config.sequences as u64).min(data.num_windows());
        let tokens = total * self.config.data.sequence_length as u64;
        let size = self.config.train.micro_batch as u64;
        let ranks = self.mesh.shape().data as u64;
        let mut loss = 0.0;
        // Every rank makes the same number of forwards; places past the end are read again and do not count.
        for round in 0..total.div_ceil(size * ranks) {
            if let Some(snapshots) = &self.snapshots {
                snapshots.progress.tick();
            }
            let first = (round * ranks + self.mesh.coordinates().data as u64) * size;
            let batch = |_| {
                let (inputs, labels) =
                    data.windows((first..first + size).map(|number| number.min(total - 1)))?;
                let beyond = (first + size).saturating_sub(total).min(size) as i64;
                let _ = labels
                    .narrow(0, size as i64 - beyond, beyond)
                    .fill_(IGNORED);
                Ok((self.device.upload(&inputs), self.device.upload(&labels)))
            };
            let totals = BatchTotals {
                groups: 1.0,
                tokens: tokens as f64,
                counts_le: None,
            };
            loss += self
                .pass(&self.single_forward, None, &batch, totals)?
                .cross_entropy;
        }
        Ok(Some(sum_over_ranks(&self.world, &[loss])?[0]))
    }

    /// Trains to the end of the configuration, or until `stop` is true on any rank.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When a step fails, or the last checkpoint cannot be written. A checkpoint that fails on the way is told to
    /// `progress`, and training goes on.
    pub fn run(
        &mut self,
        stop: &dyn Fn() -> bool,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, Error> {
        let rank0 = self.world.rank() == 0;
        let open = |name: &str| {
            rank0
                .then(|| JsonLinesWriter::resume(&self.config.run.dir.join(name), self.step))
                .transpose()
        };
        let mut metrics = open("metrics.jsonl")?;
        let mut routing = open("routing.jsonl")?;
        let steps = self.config.train.steps;
        let mut outcome = Outcome {
            step: self.step,
            stopped: false,
            validation_loss: None,
        };
        while self.step < steps && !outcome.stopped {
            let (record, stopped) = self.train_step(stop())?;
            outcome.stopped = stopped && self.step < steps;
            if rank0 {
                keep(&mut metrics, &record, progress);
                let shown = self.step == 1
                    || self.step == steps
                    || self.step.is_multiple_of(self.config.run.log_every);
                if shown && !record.tokens_per_expert.is_empty() {
                    let line = RoutingLine {
                        step: self.step,
                        tokens_per_expert: record.tokens_per_expert.clone(),
                    };
                    keep(&mut routing, &line, progress);
                }
                progress.step(&record, steps);
            }
            let last = self.step == steps || outcome.stopped;
            let due = |every: u64| every > 0 && self.step.is_multiple_of(every);
            if self
                .config
                .validation
                .as_ref()
                .is_some_and(|v| (due(v.every) || last) && !outcome.stopped)
            {
                outcome.validation_loss = self.validate()?;
                if let Some(loss) = outcome.validation_loss.filter(|_| rank0) {
                    keep(
                        &mut metrics,
                        &serde_json::json!({"step": self.step, "validation_loss": loss}),
                        progress,
                    );
                    progress.validation(self.step, loss);
                }
            }
            self.take_reserved()?;
            // With keepers, checkpoints are written from their memory while training goes on.
            let written = match &mut self.snapshots {
                Some(_) if last => self.take_final_snapshot()?,
                Some(snapshots) => !snapshots.is_overdue(),
                None => false,
            };
            if !written && (self.snapshots.is_some() || self.checkpoint_due(self.step) || last) {
                match self.save() {
                    Ok(path) if rank0 && last => {
                        progress.note(&format!("checkpoint {}", path.display()))
                    }
                    Ok(_) => {}
                    Err(Error::Comm(error)) => return Err(error.into()),
                    Err(error) if last => return Err(error),
                    Err(error) if rank0 => {
                        progress.warn(&format!(
                            "no checkpoint at step {}: {error}; training goes on",
                            self.step
                        ));
                    }
                    Err(_) => {}
                }
            }
        }
        outcome.step = self.step;
        Ok(outcome)
    }

    /// Text for the start of a run: what is trained, on how many ranks, on how much data.
    pub fn summary(&self) -> String {
        let crate::config::ParameterCount { total, active } = self.config.model.num_parameters();
        let lending = match (&self.planner, &self.config.model.moe) {
            (Some(planner), _) => {
                let how = if self.min_tokens_is_measured() {
                    "measured"
                } else {
                    "as configured"
                };
                format!(
                    "; an expert is lent for {} tokens or more ({how})",
                    locked(planner).min_tokens
                )
            }
            (None, Some(moe)) if moe.dispatch.least_loaded() || moe.placement.is_some() => {
                "; each rank has all experts (parallel.expert is 1), so none is lent or moves"
                    .to_string()
            }
            _ => String::new(),
        };
        let state = if self.model.parameters.are_offloaded() {
            "; the optimizer's state is in the host's memory"
        } else {
            ""
        };
        format!(
            "{} on {}; {:.1}M parameters ({:.1}M active), {}; {} tokens of text, {} a step{state}{lending}",
            self.mesh,
            self.device.name(),
            total as f64 / 1e6,
            active as f64 / 1e6,
            if self.config.train.dtype == Dtype::Bf16 {
                "bf16"
            } else {
                "fp32"
            },
            self.train.num_tokens(),
            self.tokens_per_step()
        )
    }
}

fn locked(planner: &Mutex<Planner>) -> MutexGuard<'_, Planner> {
    planner.lock()
}

/// The collectives of a pipeline that shares the vocabulary out, with the names of their groups.
fn vocabulary_collectives(algorithm: Vocabulary) -> Vec<(CollectiveKind, &'static str)> {
    let mut kinds = vec![
        (CollectiveKind::Hidden, "last hidden state"),
        (CollectiveKind::Statistics, "logit statistics"),
        (CollectiveKind::Embedding, "embedding"),
        (CollectiveKind::EmbeddingGradient, "embedding gradient"),
    ];
    if algorithm == Vocabulary::Naive {
        kinds.push((CollectiveKind::Maximum, "largest logit"));
    }
    if algorithm.gradient_after_t() {
        kinds.push((CollectiveKind::HiddenGradient, "hidden gradient"));
    }
    kinds
}

/// A line of metrics is worth less than the run: the first that cannot be written is told, and no more are tried.
fn keep(
    metrics: &mut Option<JsonLinesWriter>,
    line: &impl serde::Serialize,
    progress: &mut dyn Progress,
) {
    if let Some(open) = metrics
        && let Err(error) = open.write(line)
    {
        progress.warn(&format!("{error}; training goes on without metrics"));
        *metrics = None;
    }
}

/// The largest over the mean; 1 where there is nothing.
fn imbalance(loads: impl Iterator<Item = f64> + Clone) -> f64 {
    let mean = loads.clone().sum::<f64>() / loads.clone().count().max(1) as f64;
    if mean == 0.0 {
        1.0
    } else {
        loads.fold(0.0, f64::max) / mean
    }
}
