//! Random faults in a run on three machines. The run recovers from each, and its losses are those
//! of an unbroken run bit for bit.
//!
//! `MOERUN_KILLS` is the number of faults (default 6), `MOERUN_KILLS_SEED` their seed, and
//! `MOERUN_KILLS_COPY` a folder that gets the files of a run that failed.

use crate::{
    fixture::{Experiment, curve, find_rank, finish, newest_step, signal, text},
    machines::{Network, ip},
};
use std::{
    collections::BTreeMap,
    fmt::{Debug, Display, Formatter},
    fs::File,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

const MACHINES: usize = 3;
/// Longer than `restart.heartbeat_timeout_s` in [`COMMON`].
const OUTAGE: Duration = Duration::from_secs(4);
/// Shorter than that: no process counts as lost.
const HICCUP: Duration = Duration::from_secs(1);
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);
const RUN_LIMIT: Duration = Duration::from_secs(3600);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Steps that a recovered run has done since the fault: the first may still be of before.
const SETTLED_STEPS: u64 = 3;
const COMMON: [&str; 8] = [
    "parallel.expert=3",
    "model.moe.experts=6",
    "train.global_batch=6",
    "checkpoint.every=0",
    "run.log_every=1000",
    // Shared memory would connect the machines in spite of a cut.
    "run.backend=gloo",
    "restart.heartbeat_timeout_s=2",
    "restart.max_restarts=100000",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Rank,
    Keeper,
    Launcher,
    Agent,
    /// The launcher and all agents at once.
    Commands,
    /// All processes of a machine.
    Machine,
    Link,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    Terminate,
    /// SIGSTOP, and nothing after it: the run has to end the process.
    Stop,
    /// SIGSTOP, and SIGCONT after [`OUTAGE`].
    Pause,
    /// SIGSTOP, and SIGCONT after [`HICCUP`].
    Hiccup,
    /// The link is down for [`OUTAGE`].
    Cut,
    /// The link is down for [`HICCUP`].
    Glitch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    victim: Victim,
    fault: Fault,
}

impl Display for Kind {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        let victim = match self.victim {
            Victim::Rank => "rank",
            Victim::Keeper => "keeper",
            Victim::Launcher => "launcher",
            Victim::Agent => "agent",
            Victim::Commands => "launcher and agents",
            Victim::Machine => "machine",
            Victim::Link => "link",
        };
        let fault = match self.fault {
            Fault::Kill => "SIGKILL",
            Fault::Terminate => "SIGTERM",
            Fault::Stop => "SIGSTOP",
            Fault::Pause => "SIGSTOP, late SIGCONT",
            Fault::Hiccup => "SIGSTOP, soon SIGCONT",
            Fault::Cut => "cut",
            Fault::Glitch => "cut for a second",
        };
        formatter.pad(&format!("{victim}: {fault}"))
    }
}

/// Returns all combinations that a run can recover from.
fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    let mut add = |victim, faults: &[Fault]| {
        kinds.extend(faults.iter().map(|&fault| Kind { victim, fault }));
    };
    let passing = [Fault::Kill, Fault::Terminate, Fault::Pause, Fault::Hiccup];
    let all = [&passing[..], &[Fault::Stop]].concat();
    add(Victim::Rank, &all);
    add(Victim::Keeper, &all);
    add(Victim::Launcher, &passing);
    add(Victim::Agent, &passing);
    add(Victim::Commands, &passing);
    add(Victim::Machine, &[Fault::Kill]);
    add(Victim::Link, &[Fault::Cut, Fault::Glitch]);
    kinds
}

/// Draws by splitmix64, which repeats a seed's faults.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Follows the newest step in the metrics, which goes back at a restart.
struct Steps {
    path: PathBuf,
    highest: u64,
    /// A step whose snapshot was complete on all machines: no fault may undo it.
    complete: u64,
    /// The most steps that were computed again after a fault.
    repeated: u64,
    advanced: Instant,
    longest_pause: Duration,
}

impl Steps {
    fn poll(&mut self) -> u64 {
        let newest = newest_step(&self.path).unwrap_or(0);
        let complete = self.complete;
        assert!(
            newest >= complete,
            "step {newest} after {complete} was complete"
        );
        self.repeated = self.repeated.max(self.highest.saturating_sub(newest));
        if newest > self.highest {
            self.longest_pause = self.longest_pause.max(self.advanced.elapsed());
            self.highest = newest;
            self.advanced = Instant::now();
        }
        self.highest
    }

    fn restart_clock(&mut self) {
        self.advanced = Instant::now();
        self.longest_pause = Duration::ZERO;
    }
}

/// The consequences of a fault until it is over.
#[derive(Default)]
struct Injected {
    /// The time after which what is paused or cut comes back.
    outage: Duration,
    /// Stopped processes that continue later.
    paused: Vec<String>,
    /// Stopped processes that the run has to end.
    stopped: Vec<String>,
    /// A machine whose link comes back later.
    cut: Option<usize>,
    /// True if the run stops, and a scheduler starts it again.
    ends_run: bool,
    /// Commands that were killed, and are started again at once.
    killed: Vec<usize>,
}

/// A run on three machines, with the commands that a user has started.
struct Run<'a> {
    experiment: &'a Experiment,
    network: &'a Network,
    steps: String,
    commands: Vec<Option<Child>>,
}

impl Run<'_> {
    fn start(&mut self, machine: usize) {
        let mut changes = COMMON.to_vec();
        changes.extend(["snapshot.every=1", &self.steps]);
        let train = self.experiment.train(1, &changes);
        let mut command = self
            .network
            .inside(train, self.experiment, machine, MACHINES);
        let path = self.output_path(machine);
        let output = File::options().create(true).append(true).open(path);
        let output = output.unwrap();
        let child = command
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn();
        self.commands[machine] = Some(child.unwrap());
    }

    fn start_all(&mut self) {
        for machine in (0..MACHINES).rev() {
            self.start(machine);
        }
    }

    fn output_path(&self, machine: usize) -> PathBuf {
        self.experiment.path(&format!("output-{machine}"))
    }

    fn output(&self, machine: usize) -> String {
        std::fs::read_to_string(self.output_path(machine)).unwrap_or_default()
    }

    fn pid(&self, machine: usize) -> String {
        let command = self.commands[machine].as_ref();
        command.expect("the command runs").id().to_string()
    }

    /// Returns the status of a command that has ended since the last call.
    fn ended(&mut self, machine: usize) -> Option<ExitStatus> {
        let status = self.commands[machine].as_mut()?.try_wait().unwrap()?;
        self.commands[machine] = None;
        Some(status)
    }

    /// Waits until all commands have ended with `code`.
    fn wait_for_end(&mut self, code: i32, limit: Duration) {
        let began = Instant::now();
        for machine in 0..MACHINES {
            while self.commands[machine].is_some() {
                if let Some(status) = self.ended(machine) {
                    assert_eq!(status.code(), Some(code), "machine {machine} ended");
                }
                assert!(began.elapsed() < limit, "machine {machine} does not end");
                std::thread::sleep(POLL_INTERVAL);
            }
        }
    }

    /// Returns the processes of a machine.
    fn processes(&self, machine: usize) -> Vec<String> {
        let name = &self.network.namespaces[machine];
        let inode = std::fs::metadata(format!("/run/netns/{name}"))
            .unwrap()
            .ino();
        let link = format!("net:[{inode}]");
        let mut processes = self.experiment.processes();
        processes.retain(|pid| {
            std::fs::read_link(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|target| target.as_os_str() == link.as_str())
        });
        processes
    }

    fn keeper(&self, machine: usize) -> Option<String> {
        let processes = self.processes(machine);
        processes.into_iter().find(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.ends_with(b"keeper\0serve\0"))
        })
    }

    /// Returns the processes that a fault concerns, or None if there are none now.
    fn victims(&self, victim: Victim, machine: usize) -> Option<Vec<String>> {
        Some(match victim {
            Victim::Rank => vec![find_rank(self.experiment, machine)?],
            Victim::Keeper => vec![self.keeper(machine)?],
            Victim::Launcher | Victim::Agent => vec![self.pid(machine)],
            Victim::Commands => (0..MACHINES).map(|machine| self.pid(machine)).collect(),
            Victim::Machine => self.processes(machine),
            Victim::Link => Vec::new(),
        })
    }

    fn inject(&self, kind: Kind, machine: usize) -> Injected {
        let victims = self
            .victims(kind.victim, machine)
            .expect("the run is whole");
        let mut injected = Injected {
            outage: match kind.fault {
                Fault::Hiccup | Fault::Glitch => HICCUP,
                _ => OUTAGE,
            },
            ..Injected::default()
        };
        match kind.fault {
            Fault::Kill => {
                send("KILL", &victims);
                injected.killed = match kind.victim {
                    Victim::Launcher | Victim::Agent | Victim::Machine => vec![machine],
                    Victim::Commands => (0..MACHINES).collect(),
                    Victim::Rank | Victim::Keeper | Victim::Link => Vec::new(),
                };
            }
            Fault::Terminate => {
                send("TERM", &victims);
                injected.ends_run = true;
            }
            Fault::Stop => {
                send("STOP", &victims);
                injected.stopped = victims;
            }
            Fault::Pause | Fault::Hiccup => {
                send("STOP", &victims);
                injected.paused = victims;
            }
            Fault::Cut | Fault::Glitch => {
                self.set_link(machine, "down");
                injected.cut = Some(machine);
            }
        }
        injected
    }

    fn set_link(&self, machine: usize, state: &str) {
        let hub = &self.network.namespaces[MACHINES];
        assert!(ip(&format!("-n {hub} link set m{machine} {state}")));
    }

    /// Does what a user or a scheduler would, until the run is whole again.
    fn recover(&mut self, mut injected: Injected, steps: &mut Steps) {
        let began = Instant::now();
        if injected.ends_run {
            self.wait_for_end(143, RECOVERY_LIMIT);
            let newest = newest_step(&steps.path).unwrap();
            let saved = format!("run/checkpoints/step-{newest:08}");
            assert!(self.experiment.path(&saved).exists(), "no {saved}");
            self.experiment.assert_no_orphans();
            steps.highest = steps.highest.max(newest);
            self.start_all();
        }
        let mut cleared = None;
        loop {
            let step = steps.poll();
            self.restart_killed(&mut injected);
            if began.elapsed() > injected.outage {
                send("CONT", &std::mem::take(&mut injected.paused));
                if let Some(machine) = injected.cut.take() {
                    self.set_link(machine, "up");
                }
            }
            injected.stopped.retain(|pid| is_alive(pid));
            let is_over = injected.killed.is_empty()
                && injected.paused.is_empty()
                && injected.stopped.is_empty()
                && injected.cut.is_none();
            if is_over {
                let since = *cleared.get_or_insert(step);
                let wanted = since + SETTLED_STEPS;
                if step >= wanted
                    && let Some(complete) = self.complete_step(wanted)
                {
                    steps.complete = complete;
                    return;
                }
            }
            let waited = began.elapsed();
            assert!(
                waited < RECOVERY_LIMIT,
                "no recovery after {waited:.0?}: {}",
                self.status()
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn restart_killed(&mut self, injected: &mut Injected) {
        for machine in 0..MACHINES {
            let Some(status) = self.ended(machine) else {
                continue;
            };
            let position = injected.killed.iter().position(|&killed| killed == machine);
            let Some(position) = position.filter(|_| status.signal() == Some(9)) else {
                panic!("the command of machine {machine} ended by itself: {status}");
            };
            injected.killed.remove(position);
            self.start(machine);
        }
    }

    fn status(&self) -> String {
        let mut command = Command::new("ip");
        let moerun = self.experiment.moerun(&["snapshot", "status", "run"]);
        command
            .args(["netns", "exec", &self.network.namespaces[0]])
            .arg(moerun.get_program())
            .args(moerun.get_args())
            .current_dir(self.experiment.path(""));
        text(&finish(&mut command))
    }

    /// Returns the step of a snapshot that every node has protected, once all ranks run and it is
    /// not before `wanted`.
    fn complete_step(&self, wanted: u64) -> Option<u64> {
        let has_ranks = (0..MACHINES).all(|rank| find_rank(self.experiment, rank).is_some());
        if !has_ranks {
            return None;
        }
        let parity = format!("parity on {MACHINES} of {MACHINES} nodes");
        let step_of = |line: &str| {
            let rest = line.strip_prefix("snapshot of step ")?;
            let number = rest.split(' ').next()?.parse::<u64>().ok()?;
            line.ends_with(&parity).then_some(number)
        };
        let newest = self.status().lines().filter_map(step_of).max();
        newest.filter(|&step| step >= wanted)
    }
}

/// Shows what the commands printed if the test fails.
impl Drop for Run<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if let Ok(copy) = std::env::var("MOERUN_KILLS_COPY") {
            let _ = Command::new("cp")
                .arg("-r")
                .arg(self.experiment.path(""))
                .arg(copy)
                .output();
        }
        for machine in 0..MACHINES {
            let output = self.output(machine);
            let lines: Vec<&str> = output.lines().collect();
            let last = &lines[lines.len().saturating_sub(40)..];
            eprintln!("machine {machine} printed:\n{}", last.join("\n"));
        }
    }
}

fn send(name: &str, pids: &[String]) {
    if !pids.is_empty() {
        let mut kill = Command::new("kill");
        kill.arg(format!("-{name}")).args(pids).output().unwrap();
    }
}

/// True unless a process is gone or a zombie.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("Z", |(_, rest)| rest);
    !state.starts_with('Z')
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        let number = text.parse();
        number.unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
    })
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn print_table(times: &BTreeMap<Kind, Vec<Duration>>) {
    let mut all = Vec::new();
    println!(
        "{:40} {:>5} {:>8} {:>8}",
        "fault", "times", "median", "worst"
    );
    let print = |name: &dyn Display, times: &[Duration]| {
        let mut times = times.to_vec();
        let median = median(&mut times).as_secs_f64();
        let worst = times[times.len() - 1].as_secs_f64();
        println!("{name:40} {:>5} {median:>7.2}s {worst:>7.2}s", times.len());
    };
    for (kind, times) in times {
        all.extend(times.clone());
        print(kind, times);
    }
    print(&"all", &all);
}

/// Injects faults one after the other. Returns the longest pause between new steps after each.
fn break_often(
    run: &mut Run,
    steps: &mut Steps,
    draws: &mut Draws,
) -> BTreeMap<Kind, Vec<Duration>> {
    let count = number("MOERUN_KILLS", 6);
    let mut times: BTreeMap<Kind, Vec<Duration>> = BTreeMap::new();
    let mut deck = Vec::new();
    for fault in 1..=count {
        if deck.is_empty() {
            deck = kinds();
            draws.shuffle(&mut deck);
        }
        let kind = deck.pop().expect("it is full");
        let machine = match kind.victim {
            Victim::Launcher => 0,
            Victim::Agent => 1 + draws.below(MACHINES - 1),
            _ => draws.below(MACHINES),
        };
        let gap = steps.highest + draws.below(30) as u64;
        while steps.poll() < gap {
            std::thread::sleep(POLL_INTERVAL);
        }
        std::thread::sleep(Duration::from_millis(draws.below(100) as u64));
        let step = steps.poll();
        println!("{fault}/{count}: {kind} at machine {machine}, after step {step}");
        steps.restart_clock();
        let injected = run.inject(kind, machine);
        run.recover(injected, steps);
        let pause = steps.longest_pause;
        println!("  next step after {pause:.2?}");
        times.entry(kind).or_default().push(pause);
    }
    times
}

#[test]
fn three_machines_survive_any_fault() {
    let network = Network::new(MACHINES);
    if !network.is_isolated() {
        println!("skipped: cutting links needs network namespaces");
        return;
    }
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("MOERUN_KILLS_SEED", clock.unwrap().as_secs());
    println!("MOERUN_KILLS_SEED={seed}");
    let experiment = Experiment::with_standbys();
    let mut run = Run {
        experiment: &experiment,
        network: &network,
        steps: "train.steps=100000000".into(),
        commands: (0..MACHINES).map(|_| None).collect(),
    };
    run.start_all();
    let mut steps = Steps {
        path: experiment.path("run/metrics.jsonl"),
        highest: 0,
        complete: 0,
        repeated: 0,
        advanced: Instant::now(),
        longest_pause: Duration::ZERO,
    };
    run.recover(Injected::default(), &mut steps);
    let times = break_often(&mut run, &mut steps, &mut Draws(seed));
    signal(&run.pid(0), "TERM");
    run.wait_for_end(143, RECOVERY_LIMIT);
    experiment.assert_no_orphans();
    // The run ends by itself some steps later, and an unbroken one after the same step.
    let stopped = newest_step(&steps.path).unwrap();
    let last = stopped + 20;
    run.steps = format!("train.steps={last}");
    run.start_all();
    run.wait_for_end(0, RECOVERY_LIMIT);
    experiment.assert_no_orphans();
    assert_nothing_was_lost(&run.output(0));
    train_alone(&experiment, &run.steps);
    let [broken, unbroken] = ["run", "alone"].map(|dir| curve(&experiment, dir));
    for (broken, unbroken) in broken.iter().zip(&unbroken) {
        assert_eq!(broken, unbroken);
    }
    assert_eq!(broken.len(), unbroken.len());
    let repeated = steps.repeated;
    println!("{last} steps, bit for bit those of an unbroken run; at most {repeated} repeated");
    print_table(&times);
}

/// Trains with the same layout on one machine and without faults.
fn train_alone(experiment: &Experiment, steps: &str) {
    let mut changes = COMMON.to_vec();
    let alone = [
        "run.dir=alone",
        "snapshot.every=0",
        "parallel.ranks_per_node=1",
        steps,
    ];
    changes.extend(alone);
    let output = File::create(experiment.path("alone-output")).unwrap();
    let mut train = experiment.train(MACHINES, &changes);
    let child = train.stdout(output.try_clone().unwrap()).stderr(output);
    let mut child = child.spawn().unwrap();
    let began = Instant::now();
    while began.elapsed() < RUN_LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the unbroken run: {status}");
            return;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    let _ = child.kill();
    let _ = child.wait();
    panic!("the unbroken run does not end");
}

/// Asserts that the launcher always continued from a snapshot, or from the checkpoint of an
/// orderly stop.
fn assert_nothing_was_lost(said: &str) {
    for line in said.lines() {
        let is_loss = ["starting over", "resuming from checkpoint"];
        assert!(!is_loss.iter().any(|loss| line.contains(loss)), "{line}");
    }
}
