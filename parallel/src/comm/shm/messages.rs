//! Messages between two ranks: each has a tag and a length, and a receiver takes those of a tag in order. What nobody has asked
//! for yet is put aside, so that a message of one tag never waits for one of another.

use super::segment::{LINE, Lane, Ring};
use super::{Buffer, Done};
use std::collections::VecDeque;

/// Bytes of a piece.
const PIECE: usize = 64 << 10;

/// A message to write.
struct Sending {
    tag: i32,
    bytes: Buffer,
    at: usize,
    announced: bool,
    done: Done,
}

/// A message that is asked for.
struct Wanted {
    tag: i32,
    bytes: Buffer,
    done: Done,
}

/// The message that is arriving, or has arrived and nobody has asked for.
struct Arriving {
    tag: i32,
    len: usize,
    /// What is there of it, unless it goes straight to where it is wanted.
    kept: Vec<u8>,
    wanted: Option<Wanted>,
    at: usize,
}

/// The messages to and from one other rank.
struct Peer {
    rank: usize,
    to: Ring,
    from: Ring,
    sending: VecDeque<Sending>,
    wanted: VecDeque<Wanted>,
    arriving: Option<Arriving>,
    early: VecDeque<Arriving>,
}

/// The messages of one rank of a group.
pub(super) struct Messages {
    rank: usize,
    peers: Vec<Option<Peer>>,
}

impl Messages {
    pub(super) fn new(rank: usize, size: usize, ring: impl Fn(usize, Lane) -> Ring) -> Messages {
        let peer = |other| Peer {
            rank: other,
            to: ring(rank, Lane::Message(other)),
            from: ring(other, Lane::Message(rank)),
            sending: VecDeque::new(),
            wanted: VecDeque::new(),
            arriving: None,
            early: VecDeque::new(),
        };
        Messages {
            rank,
            peers: (0..size)
                .map(|other| (other != rank).then(|| peer(other)))
                .collect(),
        }
    }

    fn peer(&mut self, rank: usize) -> Result<&mut Peer, String> {
        let own = self.rank;
        let peer = self.peers.get_mut(rank).and_then(Option::as_mut);
        peer.ok_or_else(|| format!("there is no other rank {rank} for rank {own} of the group"))
    }

    /// Begins to send.
    ///
    /// # Errors
    /// When there is no such rank.
    pub(super) fn send(
        &mut self,
        to: usize,
        tag: i32,
        bytes: Buffer,
        done: Done,
    ) -> Result<(), String> {
        self.peer(to)?.sending.push_back(Sending {
            tag,
            bytes,
            at: 0,
            announced: false,
            done,
        });
        Ok(())
    }

    /// Begins to receive.
    ///
    /// # Errors
    /// When there is no such rank.
    pub(super) fn receive(
        &mut self,
        from: usize,
        tag: i32,
        bytes: Buffer,
        done: Done,
    ) -> Result<(), String> {
        let peer = self.peer(from)?;
        let wanted = Wanted { tag, bytes, done };
        let early = peer.early.iter().position(|early| early.tag == tag);
        match early.and_then(|at| peer.early.remove(at)) {
            Some(early) => early.deliver(wanted),
            None => peer.wanted.push_back(wanted),
        }
        Ok(())
    }

    /// Gets on by a piece of everything: whether anything was possible.
    pub(super) fn get_on(&mut self, touched: &mut [bool]) -> bool {
        let own = self.rank;
        let mut moved = false;
        for peer in self.peers.iter_mut().flatten() {
            let moves = [peer.write(), peer.read(own)].contains(&true);
            touched[peer.rank] |= moves;
            moved |= moves;
        }
        moved
    }

    /// Whether messages to or from `rank` are under way.
    pub(super) fn needs(&self, rank: usize) -> bool {
        let peer = self.peers.get(rank).and_then(Option::as_ref);
        peer.is_some_and(|peer| {
            let arriving = peer
                .arriving
                .as_ref()
                .is_some_and(|arriving| arriving.wanted.is_some());
            arriving || !peer.sending.is_empty() || !peer.wanted.is_empty()
        })
    }

    /// How many are under way.
    pub(super) fn under_way(&self) -> usize {
        let arriving = |peer: &Peer| {
            peer.arriving
                .iter()
                .filter(|arriving| arriving.wanted.is_some())
                .count()
        };
        self.peers
            .iter()
            .flatten()
            .map(|peer| peer.sending.len() + peer.wanted.len() + arriving(peer))
            .sum()
    }

    /// Gives up whatever is under way.
    pub(super) fn clear(&mut self) {
        for peer in self.peers.iter_mut().flatten() {
            peer.sending.clear();
            peer.wanted.clear();
            peer.arriving = None;
        }
    }
}

impl Peer {
    fn write(&mut self) -> bool {
        let Some(sending) = self.sending.front_mut() else {
            return false;
        };
        let free = self.to.free([self.rank]);
        let mut moved = false;
        if !sending.announced {
            if free < LINE {
                return false;
            }
            let mut head = [0; LINE];
            head[..4].copy_from_slice(&sending.tag.to_ne_bytes());
            head[8..16].copy_from_slice(&(sending.bytes.len() as u64).to_ne_bytes());
            self.to.write(&head, free);
            (sending.announced, moved) = (true, true);
        }
        // SAFETY: nobody writes there before the message is sent.
        let bytes = &unsafe { sending.bytes.bytes() }[sending.at..];
        let count = self
            .to
            .write(&bytes[..bytes.len().min(PIECE)], self.to.free([self.rank]));
        sending.at += count;
        if sending.at == sending.bytes.len() {
            self.to.end_written();
            sending.done.set(Ok(()));
            self.sending.pop_front();
        }
        moved || count > 0
    }

    fn read(&mut self, own: usize) -> bool {
        let mut moved = false;
        if self.arriving.is_none() {
            let head = self.from.readable();
            if head.len() < LINE {
                return false;
            }
            let tag = i32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
            let len = u64::from_ne_bytes(head[8..16].try_into().unwrap_or_default()) as usize;
            self.from.read(own, LINE);
            moved = true;
            // What came early of the same tag has been delivered, or nobody has asked for it.
            let wanted = self.wanted.iter().position(|wanted| wanted.tag == tag);
            let wanted = wanted.filter(|&at| self.wanted[at].bytes.len() == len);
            let wanted = wanted.and_then(|at| self.wanted.remove(at));
            self.arriving = Some(Arriving {
                tag,
                len,
                kept: Vec::new(),
                wanted,
                at: 0,
            });
        }
        let Some(arriving) = &mut self.arriving else {
            return moved;
        };
        let from = self.from.readable();
        let count = from.len().min(arriving.len - arriving.at).min(PIECE);
        match &arriving.wanted {
            Some(wanted) => {
                // SAFETY: the one who receives leaves these bytes alone until it is done.
                let into = unsafe { wanted.bytes.bytes_mut() };
                into[arriving.at..][..count].copy_from_slice(&from[..count]);
            }
            None => arriving.kept.extend_from_slice(&from[..count]),
        }
        arriving.at += count;
        self.from.read(own, count);
        if arriving.at == arriving.len {
            self.from.end_read(own);
            if let Some(mut arrived) = self.arriving.take() {
                let later = self
                    .wanted
                    .iter()
                    .position(|wanted| wanted.tag == arrived.tag);
                match arrived.wanted.take() {
                    Some(wanted) => wanted.done.set(Ok(())),
                    None => match later.and_then(|at| self.wanted.remove(at)) {
                        Some(wanted) => arrived.deliver(wanted),
                        None => self.early.push_back(arrived),
                    },
                }
            }
        }
        moved || count > 0
    }
}

impl Arriving {
    /// Copies what was put aside to where it is wanted.
    fn deliver(self, wanted: Wanted) {
        let expected = wanted.bytes.len();
        if expected != self.len {
            let sent = self.len;
            wanted.done.set(Err(format!(
                "the message has {sent} bytes and this rank receives {expected}"
            )));
            return;
        }
        // SAFETY: the one who receives leaves these bytes alone until it is done.
        unsafe { wanted.bytes.bytes_mut() }.copy_from_slice(&self.kept);
        wanted.done.set(Ok(()));
    }
}
