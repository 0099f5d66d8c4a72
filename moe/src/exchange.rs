//! All-to-all exchanges that carry tokens to their experts and results back.

use crate::{
    permute::{Permutation, permute_rows},
    plan::{ReceivePlan, SendPlan},
};
use kernels::upload;
use parallel::{
    Communicator,
    collectives::{PendingAllToAll, start_all_to_all},
};
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::Error;

/// The one or two exchanges of a dispatch, in the order in which rows pass through them.
pub(crate) struct DispatchRoute(pub(crate) Vec<TokenExchange>);

/// The copies of tokens that this rank sends, and their all-to-all. Alone, a rank needs no
/// all-to-all.
pub(crate) struct TokenExchange {
    pub(crate) permutation: Permutation,
    pub(crate) all_to_all: Option<AllToAll>,
}

/// Group and splits of an all-to-all.
pub(crate) struct AllToAll {
    pub(crate) group: Arc<dyn Communicator>,
    pub(crate) input_splits: Vec<i64>,
    pub(crate) output_splits: Vec<i64>,
    /// None if received rows stay in the order of arrival.
    pub(crate) row_order: Option<RowOrder>,
}

/// A permutation of received rows, int32.
pub(crate) struct RowOrder {
    order: Tensor,
    inverse: Tensor,
}

/// Rows in flight, or rows that never leave this rank.
pub(crate) enum PendingRows {
    Local(Tensor),
    InFlight(PendingAllToAll),
}

impl DispatchRoute {
    pub(crate) fn first(&self) -> &TokenExchange {
        &self.0[0]
    }

    pub(crate) fn start(&self, x_td: &Tensor) -> Result<PendingRows, Error> {
        self.first().start(x_td)
    }

    pub(crate) fn wait(&self, pending: PendingRows) -> Result<Tensor, Error> {
        let mut rows = self.first().wait(pending)?;
        for exchange in &self.0[1..] {
            rows = exchange.run(&rows)?;
        }
        Ok(rows)
    }

    pub(crate) fn run(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        self.wait(self.start(x_td)?)
    }

    pub(crate) fn copy(&self) -> DispatchRoute {
        DispatchRoute(self.0.iter().map(TokenExchange::copy).collect())
    }
}

impl TokenExchange {
    /// Returns the exchange of a plan with `per_token` rows per token: over `group`, into the order
    /// of `receive`; or without an all-to-all.
    ///
    /// Its indices go to the device in one copy, for which the host does not wait.
    pub(crate) fn new(
        send: &SendPlan,
        per_token: usize,
        received: Option<(&Arc<dyn Communicator>, &ReceivePlan)>,
        device: Device,
    ) -> Result<TokenExchange, Error> {
        let mut lists: Vec<&[i32]> = vec![&send.token_of_row, &send.row_of_routed_token];
        if let Some((_, receive)) = received {
            lists.extend([receive.order.as_slice(), &receive.inverse]);
        }
        let mut indices = upload(&lists, device)?.into_iter();
        let mut next = || indices.next().expect("each list gives a tensor");
        let token_of_row = next();
        let permutation = Permutation::new(token_of_row, &next(), per_token);
        let all_to_all = received.map(|(group, receive)| AllToAll {
            group: group.clone(),
            input_splits: send.input_splits.clone(),
            output_splits: receive.output_splits.clone(),
            row_order: Some(RowOrder {
                order: next(),
                inverse: next(),
            }),
        });
        Ok(TokenExchange {
            permutation,
            all_to_all,
        })
    }

    fn start(&self, x_td: &Tensor) -> Result<PendingRows, Error> {
        let rows = self.permutation.gather(x_td)?;
        match &self.all_to_all {
            None => Ok(PendingRows::Local(rows)),
            Some(all_to_all) => all_to_all.start(&rows),
        }
    }

    fn wait(&self, pending: PendingRows) -> Result<Tensor, Error> {
        let rows = match pending {
            PendingRows::Local(rows) => return Ok(rows),
            PendingRows::InFlight(rows) => rows.wait()?,
        };
        match self.row_order() {
            Some(RowOrder { order, inverse }) => permute_rows(&rows, order, inverse),
            None => Ok(rows),
        }
    }

    pub(crate) fn run(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        self.wait(self.start(x_td)?)
    }

    fn row_order(&self) -> Option<&RowOrder> {
        self.all_to_all.as_ref()?.row_order.as_ref()
    }

    /// Starts to send rows back to the ranks that they came from.
    pub(crate) fn start_combine(&self, y_rd: &Tensor) -> Result<PendingRows, Error> {
        match &self.all_to_all {
            None => Ok(PendingRows::Local(y_rd.shallow_clone())),
            Some(all_to_all) => all_to_all.start_return(y_rd),
        }
    }

    /// Waits for the rows of [`TokenExchange::start_combine`] and sums those of each token, with
    /// `weights_tc` or unweighted.
    pub(crate) fn wait_combine(
        &self,
        pending: PendingRows,
        weights_tc: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let rows = match pending {
            PendingRows::Local(rows) => rows,
            PendingRows::InFlight(rows) => rows.wait()?,
        };
        match weights_tc {
            Some(weights) => self.permutation.combine_weighted(&rows, weights),
            None => self.permutation.combine(&rows),
        }
    }

    fn copy(&self) -> TokenExchange {
        TokenExchange {
            permutation: self.permutation.copy(),
            all_to_all: self.all_to_all.as_ref().map(AllToAll::copy),
        }
    }
}

impl AllToAll {
    fn start(&self, sent_rows: &Tensor) -> Result<PendingRows, Error> {
        let pending = start_all_to_all(
            sent_rows,
            &self.group,
            &self.output_splits,
            &self.input_splits,
        )?;
        Ok(PendingRows::InFlight(pending))
    }

    fn start_return(&self, y_rd: &Tensor) -> Result<PendingRows, Error> {
        let ordered = match &self.row_order {
            Some(RowOrder { order, inverse }) => permute_rows(y_rd, inverse, order)?,
            None => y_rd.shallow_clone(),
        };
        let pending = start_all_to_all(
            &ordered,
            &self.group,
            &self.input_splits,
            &self.output_splits,
        )?;
        Ok(PendingRows::InFlight(pending))
    }

    fn copy(&self) -> AllToAll {
        AllToAll {
            group: self.group.clone(),
            input_splits: self.input_splits.clone(),
            output_splits: self.output_splits.clone(),
            row_order: self.row_order.as_ref().map(RowOrder::copy),
        }
    }
}

impl RowOrder {
    fn copy(&self) -> RowOrder {
        RowOrder {
            order: self.order.shallow_clone(),
            inverse: self.inverse.shallow_clone(),
        }
    }
}
