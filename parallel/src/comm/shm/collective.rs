//! A collective as the bytes that are left to write to rings, to reduce, and to read from rings.
//!
//! It advances piece by piece and never waits: the other ranks read a piece while the next is
//! written.

use super::{
    super::ReduceOp,
    buffer::Buffer,
    reduce::combine,
    segment::{CACHE_LINE, Channel, Ring},
};
use tch::Kind;

/// The most bytes that one call copies: they are still in the cache when another rank reads them.
const PIECE_BYTES: usize = 32 << 10;

/// This rank's ends of its group's rings.
pub(super) struct Rings {
    pub(super) rank: usize,
    pub(super) size: usize,
    /// This rank writes to them: the ring for all others, and those for each.
    to_all: Ring,
    to: Vec<Ring>,
    /// This rank reads them: by writer, the rings for all ranks and those for this one.
    from_all: Vec<Ring>,
    from: Vec<Ring>,
    /// True for each rank whose doorbell must be rung.
    pub(super) touched: Vec<bool>,
}

impl Rings {
    pub(super) fn new(rank: usize, size: usize, ring: impl Fn(usize, Channel) -> Ring) -> Rings {
        let from_ring = |from| ring(from, Channel::Part(rank));
        Rings {
            rank,
            size,
            to_all: ring(rank, Channel::All),
            to: (0..size).map(|to| ring(rank, Channel::Part(to))).collect(),
            from_all: (0..size).map(|from| ring(from, Channel::All)).collect(),
            from: (0..size).map(from_ring).collect(),
            touched: vec![false; size],
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |&other| other != rank)
    }

    /// Returns the source of each rank; `None` for this one.
    fn sources_of_others(&self, source: fn(usize) -> Source) -> Vec<Option<Source>> {
        let source = |rank| (rank != self.rank).then(|| source(rank));
        (0..self.size).map(source).collect()
    }

    /// Writes up to a piece of `bytes`, with which the message ends if `ends` is true.
    fn write(&mut self, to: Destination, bytes: &[u8], ends: bool) -> usize {
        let (ring, readers) = match to {
            Destination::All => (&mut self.to_all, 0..self.size),
            Destination::One(to) => (&mut self.to[to], to..to + 1),
        };
        let readers = readers.filter(|&reader| reader != self.rank);
        let free = ring.free(readers.clone());
        let piece = &bytes[..bytes.len().min(PIECE_BYTES)];
        let count = ring.write(piece, free);
        if ends && count == bytes.len() {
            ring.end_written();
        }
        if count > 0 {
            for reader in readers {
                self.touched[reader] = true;
            }
        }
        count
    }

    fn reading(&mut self, from: Source) -> &mut Ring {
        match from {
            Source::All(from) => &mut self.from_all[from],
            Source::One(from) => &mut self.from[from],
        }
    }

    /// Releases `count` bytes that were read, with which the message ends if `ends` is true.
    fn read(&mut self, from: Source, count: usize, ends: bool) {
        let reader = self.rank;
        let ring = self.reading(from);
        ring.read(reader, count);
        if ends {
            ring.end_read(reader);
        }
        self.touched[from.rank()] |= count > 0;
    }
}

/// The ranks that a message is for.
#[derive(Debug, Clone, Copy)]
enum Destination {
    All,
    One(usize),
}

/// The writer of a message to all ranks, or to this one.
#[derive(Debug, Clone, Copy)]
enum Source {
    All(usize),
    One(usize),
}

impl Source {
    fn rank(self) -> usize {
        match self {
            Source::All(rank) | Source::One(rank) => rank,
        }
    }
}

/// A message that is written to a ring piece by piece.
struct PendingWrite {
    to: Destination,
    bytes: Buffer,
    written: usize,
    /// True if only bytes that are reduced already may be written.
    follows_reduction: bool,
}

impl PendingWrite {
    fn new(to: Destination, bytes: Buffer) -> PendingWrite {
        PendingWrite {
            to,
            bytes,
            written: 0,
            follows_reduction: false,
        }
    }
}

/// A message that is read from a ring piece by piece.
struct PendingRead {
    from: Source,
    bytes: Buffer,
    read: usize,
}

impl PendingRead {
    fn new(from: Source, bytes: Buffer) -> PendingRead {
        PendingRead {
            from,
            bytes,
            read: 0,
        }
    }
}

/// A reduction, piece by piece, of one message per rank.
struct PendingReduction {
    /// By rank; `None` for this one.
    from: Vec<Option<Source>>,
    /// This rank's values, unless `out` holds them.
    own: Option<Buffer>,
    out: Buffer,
    kind: Kind,
    op: ReduceOp,
    reduced: usize,
    /// True if only bytes that this rank has written already may be overwritten.
    follows_write: bool,
}

/// A copy within this rank.
struct OwnCopy {
    to: Buffer,
    from: Buffer,
}

/// A collective in progress.
#[derive(Default)]
pub(super) struct Collective {
    writes: Vec<PendingWrite>,
    reduction: Option<PendingReduction>,
    reads: Vec<PendingRead>,
    /// Runs before everything else.
    own_copy: Option<OwnCopy>,
}

/// A range of bytes.
#[derive(Debug, Clone, Copy)]
struct Range {
    start: usize,
    len: usize,
}

/// Returns a rank's part of `bytes` bytes: equal numbers of whole cache lines, except at the end.
fn part_of_rank(bytes: usize, rank: usize, size: usize) -> Range {
    let part = bytes.div_ceil(size).next_multiple_of(CACHE_LINE);
    let start = (rank * part).min(bytes);
    let end = ((rank + 1) * part).min(bytes);
    Range {
        start,
        len: end - start,
    }
}

/// Every rank reduces up to this many bytes by itself, in one step instead of two.
const ONE_STEP_ALL_REDUCE_BYTES: usize = 16 << 10;

impl Collective {
    pub(super) fn all_reduce(rings: &Rings, data: &Buffer, kind: Kind, op: ReduceOp) -> Collective {
        let rank = rings.rank;
        let size = rings.size;
        let reduction = |source: fn(usize) -> Source, out, follows_write| PendingReduction {
            from: rings.sources_of_others(source),
            own: None,
            out,
            kind,
            op,
            reduced: 0,
            follows_write,
        };
        if data.len() <= ONE_STEP_ALL_REDUCE_BYTES {
            return Collective {
                writes: vec![PendingWrite::new(Destination::All, data.clone())],
                reduction: Some(reduction(Source::All, data.clone(), true)),
                ..Collective::default()
            };
        }
        // Each rank reduces a part, and writes it to all others.
        let part = |rank| {
            let range = part_of_rank(data.len(), rank, size);
            data.part(range.start, range.len)
        };
        let scatter = |to| PendingWrite::new(Destination::One(to), part(to));
        let mut writes: Vec<PendingWrite> = rings.others().map(scatter).collect();
        writes.push(PendingWrite {
            follows_reduction: true,
            ..PendingWrite::new(Destination::All, part(rank))
        });
        let gather = |from| PendingRead::new(Source::All(from), part(from));
        Collective {
            writes,
            reduction: Some(reduction(Source::One, part(rank), false)),
            reads: rings.others().map(gather).collect(),
            own_copy: None,
        }
    }

    pub(super) fn broadcast(rings: &Rings, data: &Buffer, root: usize) -> Collective {
        let mut collective = Collective::default();
        if rings.rank == root {
            let write = PendingWrite::new(Destination::All, data.clone());
            collective.writes.push(write);
        } else {
            let read = PendingRead::new(Source::All(root), data.clone());
            collective.reads.push(read);
        }
        collective
    }

    pub(super) fn all_gather(rings: &Rings, out: &Buffer, input: &Buffer) -> Collective {
        let part = |rank| out.part(rank * input.len(), input.len());
        let gather = |rank| PendingRead::new(Source::All(rank), part(rank));
        Collective {
            writes: vec![PendingWrite::new(Destination::All, input.clone())],
            reads: rings.others().map(gather).collect(),
            own_copy: Some(OwnCopy {
                to: part(rings.rank),
                from: input.clone(),
            }),
            reduction: None,
        }
    }

    pub(super) fn reduce_scatter(
        rings: &Rings,
        out: &Buffer,
        input: &Buffer,
        kind: Kind,
        op: ReduceOp,
    ) -> Collective {
        let part = |rank| input.part(rank * out.len(), out.len());
        let scatter = |to| PendingWrite::new(Destination::One(to), part(to));
        Collective {
            writes: rings.others().map(scatter).collect(),
            reduction: Some(PendingReduction {
                from: rings.sources_of_others(Source::One),
                own: Some(part(rings.rank)),
                out: out.clone(),
                kind,
                op,
                reduced: 0,
                follows_write: false,
            }),
            ..Collective::default()
        }
    }

    /// Starts an all-to-all of the bytes from and for each rank.
    pub(super) fn all_to_all(rings: &Rings, outputs: &[Buffer], inputs: &[Buffer]) -> Collective {
        let write = |to| PendingWrite::new(Destination::One(to), inputs[to].clone());
        let read = |from| PendingRead::new(Source::One(from), outputs[from].clone());
        Collective {
            writes: rings.others().map(write).collect(),
            reads: rings.others().map(read).collect(),
            own_copy: Some(OwnCopy {
                to: outputs[rings.rank].clone(),
                from: inputs[rings.rank].clone(),
            }),
            reduction: None,
        }
    }

    /// Advances every part by one piece; true if any moved.
    pub(super) fn make_progress(&mut self, rings: &mut Rings) -> bool {
        let mut moved = false;
        if let Some(copy) = self.own_copy.take() {
            copy.to.copy_from(&copy.from);
        }
        let reduction = self.reduction.as_ref();
        let reduced = reduction.map_or(0, |reduction| reduction.reduced);
        self.writes.retain_mut(|write| {
            let end = if write.follows_reduction {
                reduced
            } else {
                write.bytes.len()
            };
            moved |= write.make_progress(rings, end);
            write.written < write.bytes.len()
        });
        if let Some(reduction) = &mut self.reduction {
            let len = reduction.out.len();
            let end = match self.writes.first() {
                Some(write) if reduction.follows_write => write.written,
                _ => len,
            };
            moved |= reduction.make_progress(rings, end);
        }
        self.reads.retain_mut(|read| {
            moved |= read.make_progress(rings);
            read.read < read.bytes.len()
        });
        moved
    }

    /// True if the collective waits for `rank`.
    pub(super) fn depends_on(&self, rank: usize) -> bool {
        let writes_to = |write: &PendingWrite| match write.to {
            Destination::All => true,
            Destination::One(to) => to == rank,
        };
        let reads_from = |read: &PendingRead| read.from.rank() == rank;
        let unfinished = self.reduction.as_ref().filter(|it| !it.is_done());
        let reduces = |reduction: &PendingReduction| {
            let mut sources = reduction.from.iter().flatten();
            sources.any(|source| source.rank() == rank)
        };
        self.writes.iter().any(writes_to)
            || self.reads.iter().any(reads_from)
            || unfinished.is_some_and(reduces)
    }

    pub(super) fn is_done(&self) -> bool {
        let reduction = self.reduction.as_ref();
        reduction.is_none_or(PendingReduction::is_done)
            && self.own_copy.is_none()
            && self.writes.is_empty()
            && self.reads.is_empty()
    }
}

impl PendingWrite {
    /// Writes up to a piece of the bytes before `end`; true if anything was written.
    fn make_progress(&mut self, rings: &mut Rings, end: usize) -> bool {
        if end <= self.written {
            return false;
        }
        // SAFETY: the operation writes these bytes only after `written` is past them.
        let bytes = &unsafe { self.bytes.bytes() }[self.written..end];
        let count = rings.write(self.to, bytes, end == self.bytes.len());
        self.written += count;
        count > 0
    }
}

impl PendingRead {
    /// Reads up to a piece; true if anything was read.
    fn make_progress(&mut self, rings: &mut Rings) -> bool {
        let readable = rings.reading(self.from).readable();
        let missing = self.bytes.len() - self.read;
        let count = readable.len().min(missing).min(PIECE_BYTES);
        if count == 0 {
            return false;
        }
        // SAFETY: no other operation uses these bytes meanwhile.
        let into = unsafe { self.bytes.bytes_mut() };
        into[self.read..][..count].copy_from_slice(&readable[..count]);
        self.read += count;
        rings.read(self.from, count, self.read == self.bytes.len());
        true
    }
}

impl PendingReduction {
    fn is_done(&self) -> bool {
        self.reduced == self.out.len()
    }

    /// Reduces up to a piece of the bytes before `end`; true if anything was reduced.
    fn make_progress(&mut self, rings: &mut Rings, end: usize) -> bool {
        let element = self.kind.elt_size_in_bytes();
        let mut count = (end - self.reduced).min(PIECE_BYTES);
        for from in self.from.iter().flatten() {
            count = count.min(rings.reading(*from).readable().len());
        }
        count -= count % element;
        if count == 0 {
            return false;
        }
        // SAFETY: no other operation uses these bytes meanwhile.
        let out = &mut unsafe { self.out.bytes_mut() }[self.reduced..][..count];
        // SAFETY: these bytes are not written during the operation.
        let own = self.own.as_ref().map(|own| unsafe { own.bytes() });
        let own = own.map(|own| &own[self.reduced..][..count]);
        let values = self.from.iter().map(|from| match *from {
            Some(Source::All(rank)) => Some(&rings.from_all[rank].readable()[..count]),
            Some(Source::One(rank)) => Some(&rings.from[rank].readable()[..count]),
            None => own,
        });
        combine(self.kind, self.op, &values.collect::<Vec<_>>(), out);
        self.reduced += count;
        for &from in self.from.iter().flatten() {
            rings.read(from, count, self.is_done());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_all_bytes(bytes in 0..100_000usize, size in 1..9usize) {
            let mut end = 0;
            for rank in 0..size {
                let Range { start, len } = part_of_rank(bytes, rank, size);
                prop_assert!(start == end && (start.is_multiple_of(64) || len == 0));
                end = start + len;
            }
            prop_assert_eq!(end, bytes);
        }
    }
}
