//! Hierarchical dispatch: a token's row crosses to a node once, to the rank there with the sender's number within its
//! own node, and from it to the ranks that work on its experts. On the return path a node's results are summed before they
//! cross (DeepSeek-V3, arXiv 2412.19437, section 3.2.2; Pangu Ultra MoE, arXiv 2505.04519).
//!
//! Which of a token's routed tokens are in a node cannot be told from counts, so a number for each choice travels beside the row.
// Shapes: T tokens, C routed tokens of a token, N (token, node) pairs.

use crate::dispatch::{AllToAll, DispatchRoute, Hierarchy, TokenExchange, upload};
use crate::permute::Permutation;
use crate::plan::{plan_receive, plan_send};
use parallel::{Communicator, Work};
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::Error;

/// The number of a choice that is not in the node.
const NOT_ON_NODE: i32 = -1;

/// Where a rank of the expert group is: the index of its node among the group's, and its own number within it.
fn locate(rank: usize, nodes: &[usize]) -> (usize, usize) {
    let first = nodes.partition_point(|&node| node < nodes[rank]);
    // Every node has as many of the group.
    let per_node = nodes.partition_point(|&node| node <= nodes[rank]) - first;
    (rank / per_node, rank - first)
}

/// The route of `routed_tokens`, (rank of the group, expert), `per_token` for each token, to ranks that are on `nodes`; and the
/// rows that this rank works on, for each expert of `work`.
///
/// # Collective
/// Every rank of the expert group.
pub(crate) fn dispatch_route(
    hierarchy: &Hierarchy,
    nodes: &[usize],
    routed_tokens: &[Option<(usize, usize)>],
    per_token: usize,
    num_experts: usize,
    work: &[usize],
    device: Device,
) -> Result<(DispatchRoute, Vec<i64>), Error> {
    let Hierarchy {
        intra_node,
        inter_node,
    } = hierarchy;
    // A slot for each token and node with routed tokens of it ...
    let num_nodes = inter_node.size();
    let tokens = routed_tokens.len() / per_token;
    let mut crossing = vec![None; tokens * num_nodes];
    let at: Vec<_> = routed_tokens
        .iter()
        .map(|to| to.map(|(rank, expert)| (locate(rank, nodes), expert)))
        .collect();
    for (choice, to) in at.iter().enumerate() {
        if let Some(((node, _), _)) = to {
            crossing[choice / per_token * num_nodes + node] = Some((*node, 0));
        }
    }
    let send = plan_send(&crossing, num_nodes, num_nodes, 1);
    // ... and beside it what its routed tokens are there.
    let mut numbers = vec![NOT_ON_NODE; send.token_of_row.len() * per_token];
    for (choice, to) in at.iter().enumerate() {
        if let Some(((node, rank), expert)) = to {
            let slot = send.row_of_routed_token[choice / per_token * num_nodes + node] as usize;
            numbers[slot * per_token + choice % per_token] = (rank * num_experts + expert) as i32;
        }
    }
    let output_splits = all_to_all_counts(inter_node, &send.input_splits, 1)?;
    let width = per_token as i64;
    let received = all_to_all(
        inter_node,
        &numbers,
        &send.input_splits,
        &output_splits,
        width,
    )?;
    let first = TokenExchange {
        permutation: Permutation::new(&send, num_nodes, device),
        all_to_all: Some(AllToAll {
            group: inter_node.clone(),
            input_splits: send.input_splits,
            output_splits,
            order: None,
        }),
    };

    let spread = |&number: &i32| {
        (number != NOT_ON_NODE)
            .then(|| (number as usize / num_experts, number as usize % num_experts))
    };
    let spread: Vec<_> = received.iter().map(spread).collect();
    let send = plan_send(&spread, per_token, intra_node.size(), num_experts);
    let permutation = Permutation::new(&send, per_token, device);
    let counts = all_to_all_counts(intra_node, &send.counts, num_experts)?;
    let incoming: Vec<_> = counts
        .iter()
        .enumerate()
        .map(|(index, &rows)| (index / num_experts, index % num_experts, rows))
        .filter(|part| part.2 > 0)
        .collect();
    let receive = plan_receive(&incoming, work, intra_node.size(), num_experts);
    let all_to_all = AllToAll {
        group: intra_node.clone(),
        input_splits: send.input_splits,
        output_splits: receive.output_splits,
        order: Some((
            upload(&receive.order, device),
            upload(&receive.inverse, device),
        )),
    };
    Ok((
        DispatchRoute(vec![
            first,
            TokenExchange {
                permutation,
                all_to_all: Some(all_to_all),
            },
        ]),
        receive.counts,
    ))
}

/// `each` numbers for every rank: those that every rank has for this one.
fn all_to_all_counts(
    group: &Arc<dyn Communicator>,
    numbers: &[i64],
    each: usize,
) -> Result<Vec<i64>, Error> {
    let numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
    let splits = vec![1; group.size()];
    Ok(all_to_all(group, &numbers, &splits, &splits, each as i64)?
        .into_iter()
        .map(i64::from)
        .collect())
}

/// Rows of `width` numbers.
fn all_to_all(
    group: &Arc<dyn Communicator>,
    rows: &[i32],
    input_splits: &[i64],
    output_splits: &[i64],
    width: i64,
) -> Result<Vec<i32>, Error> {
    let sent = Tensor::from_slice(rows).view([-1, width]);
    let received = Tensor::empty(
        [output_splits.iter().sum::<i64>(), width],
        (sent.kind(), sent.device()),
    );
    group
        .all_to_all(&received, &sent, output_splits, input_splits)
        .and_then(Work::wait)?;
    Vec::<i32>::try_from(received.view([-1])).map_err(|e| Error::new(e.to_string()))
}
