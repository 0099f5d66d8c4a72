//! Hierarchical dispatch: a token crosses to each node once and is forwarded within it.
//!
//! A row crosses to the rank that has the sender's number within its own node. That rank forwards
//! it to the ranks that compute its experts. On the return path a node's results are summed before
//! they cross (DeepSeek-V3, arXiv 2412.19437, section 3.2.2; Pangu Ultra MoE, arXiv 2505.04519).
//!
//! Counts cannot tell which experts of a token are on a node. So one number per routed token is
//! sent along with each row.
// Shapes: T tokens, C routed tokens of a token, N (token, node) pairs.

use crate::{
    exchange::{AllToAll, DispatchRoute, TokenExchange},
    plan::{IncomingRows, RoutedTokens, RowTarget, plan_receive, plan_send},
};
use parallel::{Communicator, Work};
use std::sync::Arc;
use tch::{Device, Tensor};
use torch_ext::Error;

/// The process groups of hierarchical dispatch.
#[derive(Clone)]
pub struct Hierarchy {
    /// The ranks of the expert group on this node.
    pub intra_node: Arc<dyn Communicator>,
    /// One rank of each node: the ranks with the same number within their node.
    pub inter_node: Arc<dyn Communicator>,
}

/// Sent in place of a target for routed tokens that go to other nodes.
const NOT_ON_NODE: i32 = -1;

/// A target by node: the index of the node in the group, and the rank's number within the node.
struct NodeTarget {
    node: usize,
    rank: usize,
    expert: usize,
}

impl NodeTarget {
    fn new(target: RowTarget, nodes: &[usize]) -> NodeTarget {
        let node = nodes[target.rank];
        let first = nodes.partition_point(|&other| other < node);
        // Every node has an equal number of the group's ranks.
        let per_node = nodes.partition_point(|&other| other <= node) - first;
        NodeTarget {
            node: target.rank / per_node,
            rank: target.rank - first,
            expert: target.expert,
        }
    }
}

/// Plans the route of `routed` tokens over the group's ranks, which are on `nodes`. Also returns
/// the number of rows that this rank receives for each of `computed_experts`.
///
/// # Collective
/// Every rank of the expert group.
pub(crate) fn dispatch_route(
    hierarchy: &Hierarchy,
    nodes: &[usize],
    routed: &RoutedTokens,
    computed_experts: &[usize],
    device: Device,
) -> Result<(DispatchRoute, Vec<i64>), Error> {
    let (crossing, targets) = cross_nodes(&hierarchy.inter_node, nodes, routed, device)?;
    let received = RoutedTokens {
        targets,
        per_token: routed.per_token,
        num_experts: routed.num_experts,
    };
    let intra_node = &hierarchy.intra_node;
    let (forwarding, counts) =
        forward_within_node(intra_node, &received, computed_experts, device)?;
    let route = DispatchRoute(vec![crossing, forwarding]);
    Ok((route, counts))
}

/// Plans the exchange between nodes, and exchanges the targets of the rows. The targets returned
/// are those of the received rows, within this node.
fn cross_nodes(
    inter_node: &Arc<dyn Communicator>,
    nodes: &[usize],
    routed: &RoutedTokens,
    device: Device,
) -> Result<(TokenExchange, Vec<Option<RowTarget>>), Error> {
    let RoutedTokens {
        targets,
        per_token,
        num_experts,
    } = routed;
    let num_nodes = inter_node.size();
    let targets: Vec<Option<NodeTarget>> = targets
        .iter()
        .map(|target| target.map(|target| NodeTarget::new(target, nodes)))
        .collect();
    // One row per token and node with experts of the token.
    let mut crossing = RoutedTokens {
        targets: vec![None; targets.len() / per_token * num_nodes],
        per_token: num_nodes,
        num_experts: 1,
    };
    for (index, target) in targets.iter().enumerate() {
        if let Some(NodeTarget { node, .. }) = target {
            let token = index / per_token;
            crossing.targets[token * num_nodes + node] = Some(RowTarget {
                rank: *node,
                expert: 0,
            });
        }
    }
    let send = plan_send(&crossing, num_nodes);
    let mut codes = vec![NOT_ON_NODE; send.token_of_row.len() * per_token];
    for (index, target) in targets.iter().enumerate() {
        if let Some(target) = target {
            let token = index / per_token;
            let row = send.row_of_routed_token[token * num_nodes + target.node] as usize;
            let code = target.rank * num_experts + target.expert;
            codes[row * per_token + index % per_token] = code as i32;
        }
    }
    let output_splits = all_to_all_counts(inter_node, &send.input_splits, 1)?;
    let received = all_to_all(
        inter_node,
        &codes,
        &send.input_splits,
        &output_splits,
        *per_token as i64,
    )?;
    let target = |&code: &i32| {
        (code != NOT_ON_NODE).then(|| RowTarget {
            rank: code as usize / num_experts,
            expert: code as usize % num_experts,
        })
    };
    let exchange = TokenExchange {
        all_to_all: Some(AllToAll {
            group: inter_node.clone(),
            input_splits: send.input_splits.clone(),
            output_splits,
            row_order: None,
        }),
        ..TokenExchange::new(&send, num_nodes, None, device)?
    };
    Ok((exchange, received.iter().map(target).collect()))
}

/// Plans the exchange within the node. Also returns the rows for each of `computed_experts`.
fn forward_within_node(
    intra_node: &Arc<dyn Communicator>,
    routed: &RoutedTokens,
    computed_experts: &[usize],
    device: Device,
) -> Result<(TokenExchange, Vec<i64>), Error> {
    let num_experts = routed.num_experts;
    let send = plan_send(routed, intra_node.size());
    let counts = all_to_all_counts(intra_node, &send.counts, num_experts)?;
    let incoming_rows: Vec<IncomingRows> = counts
        .iter()
        .enumerate()
        .map(|(index, &rows)| IncomingRows {
            rank: index / num_experts,
            expert: index % num_experts,
            rows,
        })
        .filter(|incoming| incoming.rows > 0)
        .collect();
    let receive = plan_receive(
        &incoming_rows,
        computed_experts,
        intra_node.size(),
        num_experts,
    );
    let received = Some((intra_node, &receive));
    let exchange = TokenExchange::new(&send, routed.per_token, received, device)?;
    Ok((exchange, receive.counts))
}

/// Sends `per_rank` numbers to every rank, and returns the numbers that every rank sent to this
/// one.
fn all_to_all_counts(
    group: &Arc<dyn Communicator>,
    numbers: &[i64],
    per_rank: usize,
) -> Result<Vec<i64>, Error> {
    let numbers = numbers
        .iter()
        .map(|&number| number as i32)
        .collect::<Vec<i32>>();
    let splits = vec![1; group.size()];
    let received = all_to_all(group, &numbers, &splits, &splits, per_rank as i64)?;
    Ok(received.into_iter().map(i64::from).collect())
}

/// Exchanges rows of `width` numbers.
fn all_to_all(
    group: &Arc<dyn Communicator>,
    rows: &[i32],
    input_splits: &[i64],
    output_splits: &[i64],
    width: i64,
) -> Result<Vec<i32>, Error> {
    let sent = Tensor::from_slice(rows).view([-1, width]);
    let num_received: i64 = output_splits.iter().sum();
    let received = Tensor::empty([num_received, width], (sent.kind(), sent.device()));
    group
        .all_to_all(&received, &sent, output_splits, input_splits)
        .and_then(Work::wait)?;
    Vec::<i32>::try_from(received.view([-1])).map_err(|e| Error::new(e.to_string()))
}
