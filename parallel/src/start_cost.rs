//! The cost of a start: what ranks ask of the store to join their world and its groups.
//!
//! The ranks are threads of this process, at a real store. Their machines are simulated, so that
//! groups choose the transports that they would between machines.

use crate::{
    Backend, CommError, Cpu, MemberRanges, RankEnv, StoreServer, StoreTraffic, World,
    host_groups::GroupLimits, world::Joining,
};
use std::{
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

/// A start to measure.
#[derive(Debug, Clone)]
pub struct StartPlan {
    pub ranks: usize,
    pub ranks_per_machine: usize,
    pub backend: Backend,
    /// The groups to create, one after the other.
    pub groups: Vec<PlannedGroup>,
}

/// Groups of one name that have each rank once.
#[derive(Debug, Clone)]
pub struct PlannedGroup {
    pub name: String,
    /// Global ranks of each group.
    pub members: Vec<Vec<usize>>,
}

impl PlannedGroup {
    fn fits(&self, ranks: usize) -> bool {
        let mut members = self.members.concat();
        members.sort_unstable();
        members.into_iter().eq(0..ranks)
    }
}

/// The cost of a start.
#[derive(Debug, Clone)]
pub struct StartCost {
    pub world: JoinCost,
    /// For each of the plan's groups, with a barrier as its first operation.
    pub groups: Vec<JoinCost>,
}

/// The cost of joining.
#[derive(Debug, Clone)]
pub struct JoinCost {
    /// Of the rank with the most requests, and of that with the most bytes. One rank of a group
    /// answers for all, so this is not the same for each.
    pub most_traffic: StoreTraffic,
    /// Sum over all ranks.
    pub total: StoreTraffic,
    /// From the start of the first rank to the end of the last.
    pub seconds: f64,
    /// Open files per rank, those of the store's server included.
    pub files_per_rank: f64,
}

/// A step of all ranks, before and after which they wait for the thread that measures.
type Step = Arc<Barrier>;

impl StartCost {
    /// Starts the ranks of a plan as threads, and measures each step.
    ///
    /// # Errors
    /// If the groups of a name do not have each rank once, the store cannot be served, or ranks
    /// cannot join within `timeout`.
    pub fn measure(plan: &StartPlan, timeout: Duration) -> Result<StartCost, CommError> {
        let failed = |operation: &'static str, reason: String| CommError {
            rank: 0,
            group: "world".into(),
            members: MemberRanges::first(plan.ranks),
            operation,
            reason,
        };
        if let Some(group) = plan.groups.iter().find(|group| !group.fits(plan.ranks)) {
            let reason = format!("the groups '{}' do not have each rank once", group.name);
            return Err(failed("planning a start", reason));
        }
        let server =
            StoreServer::local().map_err(|error| failed("serving the store", error.to_string()))?;
        let step: Step = Arc::new(Barrier::new(plan.ranks + 1));
        let plan = Arc::new(plan.clone());
        let start = |rank| {
            let plan = plan.clone();
            let step = step.clone();
            let env = RankEnv::single_node(rank, plan.ranks, server.access().clone());
            thread::spawn(move || run_rank(&plan, &env, timeout, &step))
        };
        let ranks: Vec<_> = (0..plan.ranks).map(start).collect();
        let watch = |_| Observed::of_step(&step, plan.ranks);
        let observed = (0..=plan.groups.len())
            .map(watch)
            .collect::<Vec<Observed>>();
        let ended = ranks.into_iter().map(|rank| rank.join());
        let traffic = ended.map(|ended| ended.expect("a rank returns its errors"));
        let traffic = traffic.collect::<Result<Vec<_>, CommError>>()?;
        let cost = |(index, observed): (usize, &Observed)| {
            let of_step = traffic.iter().map(|rank| rank[index]);
            observed.cost(of_step)
        };
        let mut costs = observed
            .iter()
            .enumerate()
            .map(cost)
            .collect::<Vec<JoinCost>>();
        Ok(StartCost {
            world: costs.remove(0),
            groups: costs,
        })
    }
}

/// Measurements of a step, as the measuring thread takes them.
struct Observed {
    seconds: f64,
    files_per_rank: f64,
}

impl Observed {
    fn of_step(step: &Step, ranks: usize) -> Observed {
        let files = open_files();
        step.wait();
        let began = Instant::now();
        step.wait();
        Observed {
            seconds: began.elapsed().as_secs_f64(),
            files_per_rank: (open_files() as f64 - files as f64) / ranks as f64,
        }
    }

    fn cost(&self, traffic: impl Iterator<Item = StoreTraffic> + Clone) -> JoinCost {
        let most = |of: fn(StoreTraffic) -> u64| traffic.clone().map(of).max().unwrap_or(0);
        JoinCost {
            most_traffic: StoreTraffic {
                requests: most(|traffic| traffic.requests),
                bytes: most(|traffic| traffic.bytes),
            },
            total: traffic.sum(),
            seconds: self.seconds,
            files_per_rank: self.files_per_rank,
        }
    }
}

/// Returns the traffic of each step. A rank that fails still takes part in all steps, so that none
/// waits for it there.
fn run_rank(
    plan: &StartPlan,
    env: &RankEnv,
    timeout: Duration,
    step: &Step,
) -> Result<Vec<StoreTraffic>, CommError> {
    tch::set_num_threads(1);
    let joining = Joining {
        machine: (env.rank / plan.ranks_per_machine) as u64,
        limits: GroupLimits::default(),
    };
    step.wait();
    let world = World::join_as(env, timeout, plan.backend, &Cpu, joining);
    step.wait();
    let traffic_of = |world: &Result<World, CommError>| match world {
        Ok(world) => world.store_traffic(),
        Err(_) => StoreTraffic::default(),
    };
    let mut before = traffic_of(&world);
    let mut steps = vec![before];
    let mut created = Vec::new();
    for group in &plan.groups {
        let own = group
            .members
            .iter()
            .find(|members| members.contains(&env.rank));
        let own = own.expect("the plan was checked");
        step.wait();
        let joined = world.as_ref().map_err(Clone::clone).and_then(|world| {
            let joined = world.group(&group.name, own)?;
            joined.barrier()?.wait()?;
            Ok(joined)
        });
        step.wait();
        created.push(joined);
        let after = traffic_of(&world);
        steps.push(after - before);
        before = after;
    }
    let created: Result<Vec<_>, CommError> = created.into_iter().collect();
    created.and(world).map(|_| steps)
}

/// Returns the number of open files of this process.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count())
}
