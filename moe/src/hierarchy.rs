//! Dispatch by way of nodes: a token's row crosses to a node once, to the rank there with the sender's number inside of its
//! own node, and from it to the ranks that work on its experts. On the way back a node's results are summed before they
//! cross (DeepSeek-V3, arXiv 2412.19437, section 3.2.2; Pangu Ultra MoE, arXiv 2505.04519).
//!
//! Which of a token's choices are in a node cannot be told from counts, so a number for each choice travels beside the row.
// Shapes: T tokens, C choices of a token, N (token, node) pairs.

use crate::dispatch::{Exchange, Hierarchy, Hop, Way, upload};
use crate::plan::{plan_receive, plan_send};
use crate::rows::Slots;
use parallel::{Communicator, Work};
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::Error;

/// The number of a choice that is not in the node.
const ELSEWHERE: i32 = -1;

/// Where a rank of the expert group is: the place of its node among the group's, and its own inside.
fn place(rank: usize, nodes: &[usize]) -> (usize, usize) {
    let first = nodes.partition_point(|&node| node < nodes[rank]);
    // Every node has as many of the group.
    let per_node = nodes.partition_point(|&node| node <= nodes[rank]) - first;
    (rank / per_node, rank - first)
}

/// The way of `choices`, (rank of the group, expert), `per_token` for each token, to ranks that are on `nodes`; and the
/// rows that this rank works on, for each expert of `work`.
///
/// # Collective
/// Every rank of the expert group.
pub(crate) fn way(
    hierarchy: &Hierarchy,
    nodes: &[usize],
    choices: &[Option<(usize, usize)>],
    per_token: usize,
    num_experts: usize,
    work: &[usize],
    device: Device,
) -> Result<(Way, Vec<i64>), Error> {
    let Hierarchy { inside, across } = hierarchy;
    // A slot for each token and node with choices of it ...
    let num_nodes = across.size();
    let tokens = choices.len() / per_token;
    let mut crossing = vec![None; tokens * num_nodes];
    let at: Vec<_> = choices
        .iter()
        .map(|to| to.map(|(rank, expert)| (place(rank, nodes), expert)))
        .collect();
    for (choice, to) in at.iter().enumerate() {
        if let Some(((node, _), _)) = to {
            crossing[choice / per_token * num_nodes + node] = Some((*node, 0));
        }
    }
    let send = plan_send(&crossing, num_nodes, num_nodes, 1);
    // ... and beside it what its choices are there.
    let mut numbers = vec![ELSEWHERE; send.token_of_slot.len() * per_token];
    for (choice, to) in at.iter().enumerate() {
        if let Some(((node, rank), expert)) = to {
            let slot = send.slot_of_choice[choice / per_token * num_nodes + node] as usize;
            numbers[slot * per_token + choice % per_token] = (rank * num_experts + expert) as i32;
        }
    }
    let rows_from = exchange_numbers(across, &send.rows_to, 1)?;
    let width = per_token as i64;
    let received = exchange(across, &numbers, &send.rows_to, &rows_from, width)?;
    let first = Hop {
        slots: Slots::new(&send, num_nodes, device),
        exchange: Some(Exchange {
            group: across.clone(),
            rows_to: send.rows_to,
            rows_from,
            order: None,
        }),
    };

    let spread = |&number: &i32| {
        (number != ELSEWHERE)
            .then(|| (number as usize / num_experts, number as usize % num_experts))
    };
    let spread: Vec<_> = received.iter().map(spread).collect();
    let send = plan_send(&spread, per_token, inside.size(), num_experts);
    let slots = Slots::new(&send, per_token, device);
    let counts = exchange_numbers(inside, &send.counts, num_experts)?;
    let incoming: Vec<_> = counts
        .iter()
        .enumerate()
        .map(|(index, &rows)| (index / num_experts, index % num_experts, rows))
        .filter(|part| part.2 > 0)
        .collect();
    let receive = plan_receive(&incoming, work, inside.size(), num_experts);
    let exchange = Exchange {
        group: inside.clone(),
        rows_to: send.rows_to,
        rows_from: receive.rows_from,
        order: Some((
            upload(&receive.order, device),
            upload(&receive.place, device),
        )),
    };
    Ok((
        Way(vec![
            first,
            Hop {
                slots,
                exchange: Some(exchange),
            },
        ]),
        receive.counts,
    ))
}

/// `each` numbers for every rank: those that every rank has for this one.
fn exchange_numbers(
    group: &Arc<dyn Communicator>,
    numbers: &[i64],
    each: usize,
) -> Result<Vec<i64>, Error> {
    let numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
    let splits = vec![1; group.size()];
    Ok(exchange(group, &numbers, &splits, &splits, each as i64)?
        .into_iter()
        .map(i64::from)
        .collect())
}

/// Rows of `width` numbers.
fn exchange(
    group: &Arc<dyn Communicator>,
    rows: &[i32],
    rows_to: &[i64],
    rows_from: &[i64],
    width: i64,
) -> Result<Vec<i32>, Error> {
    let sent = Tensor::from_slice(rows).view([-1, width]);
    let received = Tensor::empty(
        [rows_from.iter().sum::<i64>(), width],
        (sent.kind(), sent.device()),
    );
    group
        .all_to_all(&received, &sent, rows_from, rows_to)
        .and_then(Work::wait)?;
    Vec::<i32>::try_from(received.view([-1])).map_err(|e| Error::new(e.to_string()))
}
