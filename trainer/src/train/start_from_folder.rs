//! Start of a run with the weights of a Hugging Face model.

use super::{Trainer, handed_on::from_rank_0, resume::ResumeSource};
use crate::{
    Error,
    families::canonical::canonical,
    hub::{
        config_json::ConfigJson,
        folder::TensorTable,
        model_folder::{ModelFolder, bias_slices},
    },
    model::{parameters::Parameter, replicas::Replicas},
};
use parallel::{
    Communicator, Work,
    agreement::{agree, decode_peer_message},
    own_rows,
};
use serde::{Deserialize, Serialize};
use std::{ops::Range, path::Path, sync::Arc};

/// The parts of a folder that rank 0 reads for all ranks.
#[derive(Serialize, Deserialize)]
struct Headers {
    config: Vec<u8>,
    table: TensorTable,
}

impl Trainer {
    /// Copies the weights of `model.from` to this rank's part of the model, if it is set.
    ///
    /// Rank 0 reads the headers for all. Of values that several ranks hold, each reads a share, and
    /// sends it to the others: together they read the folder once.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If the folder is damaged, or has another model.
    pub(super) fn start_from_folder(&mut self) -> Result<ResumeSource, Error> {
        let Some(from) = self.config.model.from.clone() else {
            return Ok(ResumeSource::Nothing);
        };
        let world = &self.rank.world;
        let folder = self.open_folder(&from)?;
        let own_shares = self.model.parameters.iter().flat_map(|parameter| {
            let rows = self.share_of(parameter, None);
            parameter.slices_of_rows(&rows)
        });
        let targets = own_shares.chain(bias_slices(&self.model)).collect();
        let progress = |done, total| {
            if let Some(show) = &self.resumption.loading {
                show(done, total);
            }
        };
        agree(world, folder.read(targets, &progress))?;
        // Ranks of two stages share a tied embedding, so both send it first.
        let is_tied = |parameter: &&Parameter| parameter.replicas == Replicas::TiedEmbedding;
        let (tied, others): (Vec<_>, Vec<_>) = self.model.parameters.iter().partition(is_tied);
        for parameter in tied.into_iter().chain(others) {
            self.exchange_shares(parameter)?;
            parameter.sync_from_master();
        }
        self.model.mark_stale();
        self.resumption.report.notes = folder.notes(&self.config.model);
        Ok(ResumeSource::Folder)
    }

    fn open_folder(&self, from: &Path) -> Result<ModelFolder, Error> {
        let world = &self.rank.world;
        let read = || -> Result<Vec<u8>, Error> {
            if !self.rank.is_first() {
                return Ok(Vec::new());
            }
            let headers = Headers {
                config: ConfigJson::bytes(from)?,
                table: TensorTable::read(from)?,
            };
            Ok(serde_json::to_vec(&headers).expect("headers are plain data"))
        };
        let headers = from_rank_0(world, agree(world, read())?)?;
        let headers: Headers = decode_peer_message(&headers)?;
        let open = || -> Result<ModelFolder, Error> {
            let config = ConfigJson::parse(from, &headers.config)?;
            let folder = ModelFolder::with_table(config, headers.table)?;
            if canonical(folder.model()) != canonical(&self.config.model) {
                return Err(Error::Folder(format!(
                    "{} has another model than the section model: it has changed since the \
                     configuration was read",
                    from.display()
                )));
            }
            if self.rank.is_first() {
                folder.check_repeated()?;
            }
            Ok(folder)
        };
        agree(world, open())
    }

    /// Returns the rows of `own` that a replica reads: this rank, or the one with the number given.
    /// Masters in host memory cannot be sent on the device's communicators, so every rank reads all
    /// of them.
    fn share_of(&self, parameter: &Parameter, replica: Option<usize>) -> Range<i64> {
        let group = self.replica_group(parameter);
        if self.model.parameters.are_offloaded() {
            return parameter.own.clone();
        }
        let own = &parameter.own;
        let rank = replica.unwrap_or(group.rank());
        let share = own_rows(own.end - own.start, rank, group.size());
        own.start + share.start..own.start + share.end
    }

    fn replica_group(&self, parameter: &Parameter) -> &Arc<dyn Communicator> {
        let replications = self.model.parameters.replications();
        &replications[parameter.replicas as usize].replica_group
    }

    /// Sends this rank's share of a parameter to the other replicas, and receives theirs.
    fn exchange_shares(&self, parameter: &Parameter) -> Result<(), Error> {
        let group = self.replica_group(parameter);
        if group.size() == 1 || self.model.parameters.are_offloaded() {
            return Ok(());
        }
        for replica in 0..group.size() {
            let rows = self.share_of(parameter, Some(replica));
            let start = rows.start - parameter.own.start;
            let share = parameter.master.narrow(0, start, rows.end - rows.start);
            if share.numel() > 0 {
                group.broadcast(&share, replica).and_then(Work::wait)?;
            }
        }
        Ok(())
    }
}
