//! Messages between two ranks, which have a tag and a length.
//!
//! A receiver gets those of a tag in order. Unexpected messages are buffered, so that a message of
//! one tag never waits for one of another.

use super::{
    buffer::{Buffer, Completion},
    segment::{CACHE_LINE, Channel, Ring, Segment},
};
use std::{collections::VecDeque, sync::Arc};

/// The most bytes that one call copies.
const PIECE_BYTES: usize = 64 << 10;

struct OutgoingMessage {
    tag: i32,
    bytes: Buffer,
    written: usize,
    /// True once its header is written.
    announced: bool,
    completion: Completion,
}

/// A receive that no message has matched yet.
struct PostedReceive {
    tag: i32,
    bytes: Buffer,
    completion: Completion,
}

/// A message that is arriving, or has arrived unexpectedly.
struct IncomingMessage {
    tag: i32,
    len: usize,
    /// The bytes read so far, unless there is a matching receive for them.
    buffered: Vec<u8>,
    posted: Option<PostedReceive>,
    read: usize,
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
    /// True once this rank has sent it a message.
    has_sent: bool,
}

/// The messages of one rank of a group.
pub(super) struct Messages {
    rank: usize,
    /// True once this rank has sent a message.
    sends: bool,
    segment: Arc<Segment>,
    peers: Vec<Option<Peer>>,
}

impl Messages {
    pub(super) fn new(rank: usize, segment: &Arc<Segment>) -> Messages {
        let ring = |writer, channel| Ring::new(segment, writer, channel);
        let peer = |other| Peer {
            rank: other,
            to: ring(rank, Channel::Message(other)),
            from: ring(other, Channel::Message(rank)),
            outgoing: VecDeque::new(),
            posted: VecDeque::new(),
            incoming: None,
            unexpected: VecDeque::new(),
            has_sent: false,
        };
        Messages {
            rank,
            sends: false,
            segment: segment.clone(),
            peers: (0..segment.members())
                .map(|other| (other != rank).then(|| peer(other)))
                .collect(),
        }
    }

    fn peer(&mut self, rank: usize) -> Result<&mut Peer, String> {
        let own = self.rank;
        let peer = self.peers.get_mut(rank).and_then(Option::as_mut);
        peer.ok_or_else(|| format!("rank {own} of the group has no peer {rank}"))
    }

    /// Starts to send a message.
    ///
    /// # Errors
    /// If there is no such rank.
    pub(super) fn send(
        &mut self,
        to: usize,
        tag: i32,
        bytes: Buffer,
        completion: Completion,
    ) -> Result<(), String> {
        let peer = self.peer(to)?;
        let is_first = !std::mem::replace(&mut peer.has_sent, true);
        peer.outgoing.push_back(OutgoingMessage {
            tag,
            bytes,
            written: 0,
            announced: false,
            completion,
        });
        self.sends = true;
        if is_first {
            self.segment.announce_messages(to);
        }
        Ok(())
    }

    /// Starts to receive a message.
    ///
    /// # Errors
    /// If there is no such rank.
    pub(super) fn receive(
        &mut self,
        from: usize,
        tag: i32,
        bytes: Buffer,
        completion: Completion,
    ) -> Result<(), String> {
        let peer = self.peer(from)?;
        let posted = PostedReceive {
            tag,
            bytes,
            completion,
        };
        let mut unexpected = peer.unexpected.iter();
        let first = unexpected.position(|message| message.tag == tag);
        match first.and_then(|index| peer.unexpected.remove(index)) {
            Some(message) => message.deliver(posted),
            None => peer.posted.push_back(posted),
        }
        Ok(())
    }

    /// Advances every message by one piece; true if any moved.
    pub(super) fn make_progress(&mut self, touched: &mut [bool]) -> bool {
        let own = self.rank;
        let mut moved = false;
        let gets_messages = self.segment.gets_messages(own);
        if !gets_messages && !self.sends {
            return false;
        }
        for peer in self.peers.iter_mut().flatten() {
            let written = peer.write();
            let read = gets_messages && peer.read(own);
            touched[peer.rank] |= written || read;
            moved |= written || read;
        }
        moved
    }

    /// True if messages to or from `rank` are in progress.
    pub(super) fn depends_on(&self, rank: usize) -> bool {
        let peer = self.peers.get(rank).and_then(Option::as_ref);
        peer.is_some_and(|peer| peer.in_flight() > 0)
    }

    /// Returns the number of messages in progress.
    pub(super) fn in_flight(&self) -> usize {
        let peers = self.peers.iter().flatten();
        peers.map(Peer::in_flight).sum()
    }

    /// Drops the messages in progress.
    pub(super) fn clear(&mut self) {
        for peer in self.peers.iter_mut().flatten() {
            peer.outgoing.clear();
            peer.posted.clear();
            peer.incoming = None;
        }
    }
}

impl Peer {
    fn in_flight(&self) -> usize {
        let incoming = self.incoming.as_ref();
        let is_expected = incoming.is_some_and(|incoming| incoming.posted.is_some());
        self.outgoing.len() + self.posted.len() + usize::from(is_expected)
    }

    /// Writes up to a piece of the first outgoing message; true if anything was written.
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
            let len = outgoing.bytes.len() as u64;
            let mut header = [0; CACHE_LINE];
            header[..4].copy_from_slice(&outgoing.tag.to_ne_bytes());
            header[8..16].copy_from_slice(&len.to_ne_bytes());
            self.to.write(&header, free);
            outgoing.announced = true;
            moved = true;
        }
        // SAFETY: the sender does not write these bytes before the message is sent.
        let bytes = &unsafe { outgoing.bytes.bytes() }[outgoing.written..];
        let piece = &bytes[..bytes.len().min(PIECE_BYTES)];
        let free = self.to.free([self.rank]);
        let count = self.to.write(piece, free);
        outgoing.written += count;
        if outgoing.written == outgoing.bytes.len() {
            self.to.end_written();
            outgoing.completion.set(Ok(()));
            self.outgoing.pop_front();
        }
        moved || count > 0
    }

    /// Reads up to a piece of the incoming message; true if anything was read.
    fn read(&mut self, own: usize) -> bool {
        let has_started = self.incoming.is_none();
        if has_started {
            self.incoming = self.read_header(own);
        }
        let Some(incoming) = &mut self.incoming else {
            return false;
        };
        let readable = self.from.readable();
        let missing = incoming.len - incoming.read;
        let count = readable.len().min(missing).min(PIECE_BYTES);
        let piece = &readable[..count];
        match &incoming.posted {
            Some(posted) => {
                // SAFETY: the receiver does not access these bytes before the operation is
                // complete.
                let into = unsafe { posted.bytes.bytes_mut() };
                into[incoming.read..][..count].copy_from_slice(piece);
            }
            None => incoming.buffered.extend_from_slice(piece),
        }
        incoming.read += count;
        self.from.read(own, count);
        if incoming.read == incoming.len {
            self.from.end_read(own);
            self.complete_incoming();
        }
        has_started || count > 0
    }

    /// Reads the header of the next message and finds its receive.
    fn read_header(&mut self, own: usize) -> Option<IncomingMessage> {
        let header = self.from.readable();
        if header.len() < CACHE_LINE {
            return None;
        }
        let tag = i32::from_ne_bytes(header[..4].try_into().unwrap_or_default());
        let len = u64::from_ne_bytes(header[8..16].try_into().unwrap_or_default()) as usize;
        self.from.read(own, CACHE_LINE);
        // Earlier messages of this tag have been delivered, or no receive is posted for them.
        let posted = self
            .find_posted(tag)
            .filter(|&index| self.posted[index].bytes.len() == len);
        let posted = posted.and_then(|index| self.posted.remove(index));
        Some(IncomingMessage {
            tag,
            len,
            buffered: Vec::new(),
            posted,
            read: 0,
        })
    }

    /// Delivers the incoming message, all of which has been read.
    fn complete_incoming(&mut self) {
        let Some(mut message) = self.incoming.take() else {
            return;
        };
        if let Some(posted) = message.posted.take() {
            posted.completion.set(Ok(()));
            return;
        }
        // A receive may have been posted since the header was read.
        let posted = self.find_posted(message.tag);
        match posted.and_then(|index| self.posted.remove(index)) {
            Some(posted) => message.deliver(posted),
            None => self.unexpected.push_back(message),
        }
    }

    fn find_posted(&self, tag: i32) -> Option<usize> {
        let mut posted = self.posted.iter();
        posted.position(|posted| posted.tag == tag)
    }
}

impl IncomingMessage {
    /// Copies a buffered message to its receive.
    fn deliver(self, posted: PostedReceive) {
        let expected = posted.bytes.len();
        if expected != self.len {
            let sent = self.len;
            let error = format!("the message has {sent} bytes, but this rank receives {expected}");
            posted.completion.set(Err(error));
            return;
        }
        // SAFETY: the receiver does not access these bytes before the operation is complete.
        let into = unsafe { posted.bytes.bytes_mut() };
        into.copy_from_slice(&self.buffered);
        posted.completion.set(Ok(()));
    }
}
