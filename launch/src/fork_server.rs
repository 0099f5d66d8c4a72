//! Fork server: a process that has loaded libtorch and copies itself for each rank of its machine.
//!
//! Loading takes longer than all else that a rank does before it joins the others, and hundreds of
//! ranks on one machine share its processors. The server has a single thread, touches no device,
//! and starts nothing that a copy would lack. Copies are children of the launcher or agent, which
//! adopts them, so they do not depend on the server.

use crate::rank;
use anyhow::{Context, Result, anyhow};
use nix::unistd::{Pid, dup2_stdin, setpgid};
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    io::{IoSlice, IoSliceMut, stdin},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use torch_ext::{Forked, fork_orphan};

/// Longest reply in bytes.
pub(crate) const MAX_REPLY_BYTES: usize = 1024;

/// A message of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Everything is loaded.
    Ready,
    /// Process id of the copy for the oldest order without a reply.
    Forked(i32),
    /// There is no copy for it, for this reason.
    Failed(String),
}

/// The process in which [`serve`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// The server, whose launcher needs no more ranks.
    Ended,
    /// A new rank, whose standard input is its own.
    Rank,
}

/// Serves the launcher at the other end of standard input, a socket of whole messages.
///
/// # Errors
/// If the launcher is gone, or the socket fails.
pub(crate) fn serve() -> Result<Served> {
    rank::exit_with_launcher()?;
    reply(&Reply::Ready)?;
    while let Some(input) = receive_order()? {
        let forked = match fork_orphan() {
            Ok(Forked::Copy) => {
                become_rank(input)?;
                return Ok(Served::Rank);
            }
            Ok(Forked::Original(pid)) => Reply::Forked(pid),
            Err(error) => Reply::Failed(error.to_string()),
        };
        reply(&forked)?;
    }
    Ok(Served::Ended)
}

/// Takes the rank's own standard input, in place of the server's socket.
fn become_rank(input: OwnedFd) -> Result<()> {
    dup2_stdin(input).context("cannot set a rank's standard input")?;
    // Outside the terminal's process group: Ctrl-C reaches only the launcher, which stops the ranks
    // in order.
    let own = Pid::from_raw(0);
    setpgid(own, own).context("cannot leave the process group of the launcher")
}

fn reply(reply: &Reply) -> Result<()> {
    let text = serde_json::to_vec(reply).expect("plain data");
    send(stdin(), &text, SendFlags::NOSIGNAL).context("cannot answer the launcher")?;
    Ok(())
}

/// Orders a copy whose standard input is `input`. Returns false if the server has to catch up
/// first.
///
/// # Errors
/// If the server is gone.
pub(crate) fn order(server: impl AsFd, input: BorrowedFd) -> rustix::io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let inputs = [input];
    control.push(SendAncillaryMessage::ScmRights(&inputs));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // A message needs at least a byte.
    match sendmsg(server, &[IoSlice::new(&[0])], &mut control, flags) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns a rank's standard input, or None if the launcher orders no more.
fn receive_order() -> Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        match recvmsg(stdin(), &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received.context("cannot receive orders")?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let files = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let input = files.and_then(|mut files| files.next());
    input
        .map(Some)
        .ok_or_else(|| anyhow!("an order without a rank's standard input"))
}
