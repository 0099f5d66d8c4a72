//! Connections to the agents of other machines.

use super::{
    machine_protocol::{HEARTBEAT_INTERVAL, Hello, HelloReply, MachineCommand, MachineReport},
    queue::Queue,
};
use crate::{
    hint::WithHint,
    launcher::engine::{
        event::{Answer, Event, Failed, Host, Source},
        requests::RequestId,
    },
};
use anyhow::{Context, Result};
use checkpoint::secure::{
    Admitted, Connection, Door, FrameWriter, Limits, PeerAddress, Purpose, RefusalCounts, Secret,
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

/// The time in which an agent must introduce itself.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The other machines that a launcher waits for.
pub(crate) struct Join {
    pub(crate) address: SocketAddr,
    /// Number of machines besides the launcher's.
    pub(crate) others: usize,
    pub(crate) ranks_per_machine: usize,
    /// The time without a sign of life after which a machine is lost.
    pub(crate) heartbeat_timeout: Duration,
}

/// The current connection of a machine. Its number distinguishes it from earlier ones.
struct AgentLink {
    number: u64,
    commands: Queue<Option<MachineCommand>>,
    socket: Arc<TcpStream>,
}

#[derive(Default)]
struct Links {
    last: u64,
    by_machine: BTreeMap<usize, AgentLink>,
}

pub(super) struct AgentLinks {
    links: Arc<Mutex<Links>>,
    /// Accepts agents until it is dropped.
    door: Option<Door>,
}

impl AgentLinks {
    /// Returns the links of a run on one machine.
    pub(super) fn none() -> AgentLinks {
        AgentLinks {
            links: Arc::default(),
            door: None,
        }
    }

    /// Accepts the agents of other machines from now on. Returns also the address it listens at.
    ///
    /// # Errors
    /// If this machine cannot listen at `join.address`.
    pub(super) fn listen(
        join: Join,
        secret: Secret,
        events: Queue<Event>,
    ) -> Result<(AgentLinks, SocketAddr)> {
        let address = join.address;
        let listener = TcpListener::bind(address)
            .with_context(|| format!("cannot listen at {address}"))
            .hint("--rdzv must name a free port of this machine, the one with --node-rank 0")?;
        let address = listener
            .local_addr()
            .context("cannot read the port of the listener")?;
        let links: Arc<Mutex<Links>> = Arc::default();
        let served = Served {
            links: links.clone(),
            events,
            join,
        };
        let serve = move |admitted| served.serve(admitted);
        let door = Door::open(listener, secret, Purpose::AGENT, Limits::default(), serve)
            .with_context(|| format!("cannot listen at {address}"))?;
        let agents = AgentLinks {
            links,
            door: Some(door),
        };
        Ok((agents, address))
    }

    /// Returns the counts of connections that were refused.
    pub(super) fn refusals(&self) -> RefusalCounts {
        let door = self.door.as_ref();
        door.map(|door| door.refusals().counts())
            .unwrap_or_default()
    }

    /// Sends a command. A machine that cannot be reached is lost, and its ranks with it.
    pub(super) fn send(&self, machine: usize, command: MachineCommand) {
        if let Some(link) = self.links.lock().by_machine.get(&machine) {
            link.commands.push(Some(command));
        }
    }

    /// Ends the connection to a machine that is lost.
    pub(super) fn drop_machine(&self, machine: usize) {
        if let Some(link) = self.links.lock().by_machine.remove(&machine) {
            link.end();
        }
    }

    /// Tells all agents to exit with this status.
    pub(super) fn end(&self, status: u8) {
        for link in self.links.lock().by_machine.values() {
            link.commands.push(Some(MachineCommand::End { status }));
            link.commands.push(None);
        }
        let began = std::time::Instant::now();
        // Agents close their connections once they have the order.
        while !self.links.lock().by_machine.is_empty() && began.elapsed() < HELLO_TIMEOUT {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl AgentLink {
    fn end(&self) {
        self.commands.push(None);
        // Also ends the thread that reads from the connection.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The side that serves connections.
struct Served {
    links: Arc<Mutex<Links>>,
    events: Queue<Event>,
    join: Join,
}

impl Served {
    /// Receives an agent's reports until it is gone.
    fn serve(&self, admitted: Admitted<TcpStream>) {
        let Admitted {
            mut connection,
            address,
            ..
        } = admitted;
        let Ok(hello) = connection.receive::<Hello>(Some(HELLO_TIMEOUT)) else {
            return;
        };
        let PeerAddress::Ip(address) = address else {
            return;
        };
        let timeout_s = self.join.heartbeat_timeout.as_secs_f64();
        if let Some(reason) = self.refusal(&hello) {
            let _ = connection.send(&HelloReply::Refused(reason));
            return;
        }
        if self.links.lock().by_machine.contains_key(&hello.machine) {
            let _ = connection.send(&HelloReply::Taken { timeout_s });
            return;
        }
        if connection
            .send(&HelloReply::Accepted { timeout_s })
            .is_err()
        {
            return;
        }
        let machine = hello.machine;
        let Connection { mut reader, writer } = connection;
        let Some(number) = self.register(machine, writer) else {
            return;
        };
        self.events.push(Event::MachineJoined {
            machine,
            host: Host {
                address: Some(address),
                identity: hello.identity,
            },
            keepers: hello.keepers,
        });
        // The engine decides when a machine is silent, and then closes the connection.
        let reason = loop {
            match reader.receive(None) {
                Ok(report) => self.events.push(event(machine, report)),
                Err(error) => break error.to_string(),
            }
        };
        let mut links = self.links.lock();
        let is_current = links
            .by_machine
            .get(&machine)
            .is_some_and(|link| link.number == number);
        if is_current {
            if let Some(link) = links.by_machine.remove(&machine) {
                link.end();
            }
            drop(links);
            self.events.push(Event::MachineLost { machine, reason });
        }
    }

    /// Records a connection and starts its sending thread.
    fn register(&self, machine: usize, writer: FrameWriter<TcpStream>) -> Option<u64> {
        let commands = Queue::new();
        let mut links = self.links.lock();
        links.last += 1;
        let number = links.last;
        let link = AgentLink {
            number,
            commands: commands.clone(),
            socket: writer.socket().clone(),
        };
        std::thread::Builder::new()
            .spawn(move || send_all(writer, &commands))
            .ok()?;
        links.by_machine.insert(machine, link);
        Some(number)
    }

    /// Returns the reason to refuse an agent, if there is one.
    fn refusal(&self, hello: &Hello) -> Option<String> {
        const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");
        let Hello {
            machine,
            ranks,
            version,
            ..
        } = hello;
        let last = self.join.others;
        let expected = self.join.ranks_per_machine;
        if !(1..=last).contains(machine) {
            return Some(format!("--node-rank {machine} is not between 1 and {last}"));
        }
        if *ranks != expected {
            return Some(format!(
                "it was started with -n {ranks}, and the launcher with -n {expected}"
            ));
        }
        if version != OWN_VERSION {
            return Some(format!(
                "it runs moerun {version} and the launcher {OWN_VERSION}: install the same version \
                 on every machine"
            ));
        }
        None
    }
}

/// Sends commands and signs of life until the connection ends.
fn send_all(mut writer: FrameWriter<TcpStream>, commands: &Queue<Option<MachineCommand>>) {
    loop {
        let command = match commands.pop(HEARTBEAT_INTERVAL) {
            Some(Some(command)) => command,
            Some(None) => return,
            None => MachineCommand::Heartbeat,
        };
        if writer.send(&command).is_err() {
            let _ = writer.socket().shutdown(Shutdown::Both);
            return;
        }
    }
}

fn event(machine: usize, report: MachineReport) -> Event {
    match report {
        MachineReport::Ranks(report) => Event::Ranks { machine, report },
        MachineReport::Keeper { request, started } => Event::Reply {
            id: RequestId(request),
            reply: match started {
                Ok(started) => Ok(Answer::KeeperStarted {
                    pid: started.pid,
                    address: started.ready.address,
                }),
                Err(reason) => Err(Failed::Refused(format!("machine {machine}: {reason}"))),
            },
        },
        MachineReport::Stop { signal, count } => Event::Stop {
            source: Source::Agent(machine),
            signal,
            count,
        },
        MachineReport::CheckpointWanted => Event::CheckpointWanted,
        MachineReport::Heartbeat => Event::Heartbeat { machine },
    }
}

/// Returns the event of a report from the launcher's own machine.
pub(super) fn own_event(report: MachineReport) -> Event {
    match (report, 0) {
        (
            MachineReport::Keeper {
                request,
                started: Err(reason),
            },
            _,
        ) => Event::Reply {
            id: RequestId(request),
            reply: Err(Failed::Refused(reason)),
        },
        (report, machine) => event(machine, report),
    }
}
