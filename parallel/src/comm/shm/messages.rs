//! Messages between two ranks: each has a tag and a length, and a receiver takes those of a tag in order. What nobody has asked
//! for yet is put aside, so that a message of one tag never waits for one of another.

use super::segment::{CACHE_LINE, Channel, Ring};
use super::{Buffer, Completion};
use std::collections::VecDeque;

/// Bytes of a piece.
const PIECE_BYTES: usize = 64 << 10;

/// A message to write.
struct OutgoingMessage {
    tag: i32,
    bytes: Buffer,
    at: usize,
    announced: bool,
    done: Completion,
}

/// A message that is asked for.
struct PostedReceive {
    tag: i32,
    bytes: Buffer,
    done: Completion,
}

/// The message that is incoming, or has arrived and nobody has asked for.
struct IncomingMessage {
    tag: i32,
    len: usize,
    /// What is there of it, unless it goes straight to where it is posted.
    buffered: Vec<u8>,
    posted: Option<PostedReceive>,
    at: usize,
}

/// The messages to and from one other rank.
struct Peer {
    rank: usize,
    to: Ring,
    from: Ring,
    outgoing: VecDeque<OutgoingMessage>,
    posted: VecDeque<PostedReceive>,
    incoming: Option<IncomingMessage>,
    unexpected: VecDeque<IncomingMessage>,
}

/// The messages of one rank of a group.
pub(super) struct Messages {
    rank: usize,
    peers: Vec<Option<Peer>>,
}

impl Messages {
    pub(super) fn new(rank: usize, size: usize, ring: impl Fn(usize, Channel) -> Ring) -> Messages {
        let peer = |other| Peer {
            rank: other,
            to: ring(rank, Channel::Message(other)),
            from: ring(other, Channel::Message(rank)),
            outgoing: VecDeque::new(),
            posted: VecDeque::new(),
            incoming: None,
            unexpected: VecDeque::new(),
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
        done: Completion,
    ) -> Result<(), String> {
        self.peer(to)?.outgoing.push_back(OutgoingMessage {
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
        done: Completion,
    ) -> Result<(), String> {
        let peer = self.peer(from)?;
        let posted = PostedReceive { tag, bytes, done };
        let unexpected = peer
            .unexpected
            .iter()
            .position(|unexpected| unexpected.tag == tag);
        match unexpected.and_then(|at| peer.unexpected.remove(at)) {
            Some(unexpected) => unexpected.deliver(posted),
            None => peer.posted.push_back(posted),
        }
        Ok(())
    }

    /// Gets on by a piece of everything: whether anything was possible.
    pub(super) fn make_progress(&mut self, touched: &mut [bool]) -> bool {
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
    pub(super) fn depends_on(&self, rank: usize) -> bool {
        let peer = self.peers.get(rank).and_then(Option::as_ref);
        peer.is_some_and(|peer| {
            let incoming = peer
                .incoming
                .as_ref()
                .is_some_and(|incoming| incoming.posted.is_some());
            incoming || !peer.outgoing.is_empty() || !peer.posted.is_empty()
        })
    }

    /// How many are under way.
    pub(super) fn in_flight(&self) -> usize {
        let incoming = |peer: &Peer| {
            peer.incoming
                .iter()
                .filter(|incoming| incoming.posted.is_some())
                .count()
        };
        self.peers
            .iter()
            .flatten()
            .map(|peer| peer.outgoing.len() + peer.posted.len() + incoming(peer))
            .sum()
    }

    /// Gives up whatever is under way.
    pub(super) fn clear(&mut self) {
        for peer in self.peers.iter_mut().flatten() {
            peer.outgoing.clear();
            peer.posted.clear();
            peer.incoming = None;
        }
    }
}

impl Peer {
    fn write(&mut self) -> bool {
        let Some(outgoing) = self.outgoing.front_mut() else {
            return false;
        };
        let free = self.to.free([self.rank]);
        let mut moved = false;
        if !outgoing.announced {
            if free < CACHE_LINE {
                return false;
            }
            let mut head = [0; CACHE_LINE];
            head[..4].copy_from_slice(&outgoing.tag.to_ne_bytes());
            head[8..16].copy_from_slice(&(outgoing.bytes.len() as u64).to_ne_bytes());
            self.to.write(&head, free);
            (outgoing.announced, moved) = (true, true);
        }
        // SAFETY: nobody writes there before the message is sent.
        let bytes = &unsafe { outgoing.bytes.bytes() }[outgoing.at..];
        let count = self.to.write(
            &bytes[..bytes.len().min(PIECE_BYTES)],
            self.to.free([self.rank]),
        );
        outgoing.at += count;
        if outgoing.at == outgoing.bytes.len() {
            self.to.end_written();
            outgoing.done.set(Ok(()));
            self.outgoing.pop_front();
        }
        moved || count > 0
    }

    fn read(&mut self, own: usize) -> bool {
        let mut moved = false;
        if self.incoming.is_none() {
            let head = self.from.readable();
            if head.len() < CACHE_LINE {
                return false;
            }
            let tag = i32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
            let len = u64::from_ne_bytes(head[8..16].try_into().unwrap_or_default()) as usize;
            self.from.read(own, CACHE_LINE);
            moved = true;
            // What came unexpected of the same tag has been delivered, or nobody has asked for it.
            let posted = self.posted.iter().position(|posted| posted.tag == tag);
            let posted = posted.filter(|&at| self.posted[at].bytes.len() == len);
            let posted = posted.and_then(|at| self.posted.remove(at));
            self.incoming = Some(IncomingMessage {
                tag,
                len,
                buffered: Vec::new(),
                posted,
                at: 0,
            });
        }
        let Some(incoming) = &mut self.incoming else {
            return moved;
        };
        let from = self.from.readable();
        let count = from.len().min(incoming.len - incoming.at).min(PIECE_BYTES);
        match &incoming.posted {
            Some(posted) => {
                // SAFETY: the one who receives leaves these bytes alone until it is done.
                let into = unsafe { posted.bytes.bytes_mut() };
                into[incoming.at..][..count].copy_from_slice(&from[..count]);
            }
            None => incoming.buffered.extend_from_slice(&from[..count]),
        }
        incoming.at += count;
        self.from.read(own, count);
        if incoming.at == incoming.len {
            self.from.end_read(own);
            if let Some(mut arrived) = self.incoming.take() {
                let later = self
                    .posted
                    .iter()
                    .position(|posted| posted.tag == arrived.tag);
                match arrived.posted.take() {
                    Some(posted) => posted.done.set(Ok(())),
                    None => match later.and_then(|at| self.posted.remove(at)) {
                        Some(posted) => arrived.deliver(posted),
                        None => self.unexpected.push_back(arrived),
                    },
                }
            }
        }
        moved || count > 0
    }
}

impl IncomingMessage {
    /// Copies what was put aside to where it is posted.
    fn deliver(self, posted: PostedReceive) {
        let expected = posted.bytes.len();
        if expected != self.len {
            let sent = self.len;
            posted.done.set(Err(format!(
                "the message has {sent} bytes and this rank receives {expected}"
            )));
            return;
        }
        // SAFETY: the one who receives leaves these bytes alone until it is done.
        unsafe { posted.bytes.bytes_mut() }.copy_from_slice(&self.buffered);
        posted.done.set(Ok(()));
    }
}
