//! The launcher's own machine: a thread that carries out commands and passes reports on.

use super::{
    machine::Machine,
    machine_protocol::{MachineCommand, MachineReport},
    queue::Queue,
};
use anyhow::{Context, Result};
use std::thread::JoinHandle;

pub(super) struct OwnMachine {
    commands: Queue<MachineCommand>,
    thread: Option<JoinHandle<()>>,
}

impl OwnMachine {
    pub(super) fn start(
        new: impl FnOnce() -> Machine + Send + 'static,
        on_report: impl Fn(MachineReport) + Send + 'static,
    ) -> Result<OwnMachine> {
        let commands: Queue<MachineCommand> = Queue::new();
        let received = commands.clone();
        // The kernel ends ranks with the thread that started them.
        let thread = std::thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                let mut machine = new();
                loop {
                    if let Some(command) = received.pop(machine.poll_interval()) {
                        if matches!(command, MachineCommand::End { .. }) {
                            return;
                        }
                        machine.handle(command);
                    }
                    for report in machine.reports() {
                        on_report(report);
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(OwnMachine {
            commands,
            thread: Some(thread),
        })
    }

    pub(super) fn send(&self, command: MachineCommand) {
        self.commands.push(command);
    }
}

impl Drop for OwnMachine {
    fn drop(&mut self) {
        self.commands.push(MachineCommand::End { status: 0 });
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its hook.
            let _ = thread.join();
        }
    }
}
