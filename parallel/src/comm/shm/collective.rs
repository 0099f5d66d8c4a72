//! One collective as what is left to write into rings, to combine, and to read out of rings. It gets on piece by piece and never
//! waits: a piece that one rank has written the others read while the next is written.

use super::super::ReduceOp;
use super::Buffer;
use super::reduce::combine;
use super::segment::{Channel, Ring};
use tch::Kind;

/// Bytes of a piece: what is written is still near the processor when it is read.
const PIECE_BYTES: usize = 32 << 10;

/// This rank's ends of its group's rings.
pub(super) struct Rings {
    pub(super) rank: usize,
    pub(super) size: usize,
    /// What it writes, to all and to each.
    to_all: Ring,
    to: Vec<Ring>,
    /// What each other writes, to all and to this rank.
    from_all: Vec<Ring>,
    from: Vec<Ring>,
    /// Ranks for which something has changed since they were told.
    pub(super) touched: Vec<bool>,
}

impl Rings {
    pub(super) fn new(rank: usize, size: usize, ring: impl Fn(usize, Channel) -> Ring) -> Rings {
        Rings {
            rank,
            size,
            to_all: ring(rank, Channel::All),
            to: (0..size).map(|to| ring(rank, Channel::Part(to))).collect(),
            from_all: (0..size).map(|from| ring(from, Channel::All)).collect(),
            from: (0..size)
                .map(|from| ring(from, Channel::Part(rank)))
                .collect(),
            touched: vec![false; size],
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |&other| other != rank)
    }

    /// Writes up to a piece of the first of `bytes`; with the last of them the message is at its end.
    fn write(&mut self, to: Destination, bytes: &[u8], last: bool) -> usize {
        let (ring, readers) = match to {
            Destination::All => (&mut self.to_all, 0..self.size),
            Destination::One(to) => (&mut self.to[to], to..to + 1),
        };
        let readers = readers.filter(|&reader| reader != self.rank);
        let free = ring.free(readers.clone());
        let count = ring.write(&bytes[..bytes.len().min(PIECE_BYTES)], free);
        if last && count == bytes.len() {
            ring.end_written();
        }
        if count > 0 {
            readers.for_each(|reader| self.touched[reader] = true);
        }
        count
    }

    fn reading(&mut self, from: Source) -> &mut Ring {
        match from {
            Source::All(from) => &mut self.from_all[from],
            Source::One(from) => &mut self.from[from],
        }
    }

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

/// For whom something is written.
#[derive(Debug, Clone, Copy)]
enum Destination {
    All,
    One(usize),
}

/// Who has written something: for all, or for this rank.
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

/// What is left of a message to write.
struct PendingWrite {
    to: Destination,
    bytes: Buffer,
    at: usize,
    /// Only what has been combined may go.
    follows_reduction: bool,
}

/// What is left of a message to read.
struct PendingRead {
    from: Source,
    bytes: Buffer,
    at: usize,
}

/// What is left to combine of one message of each rank.
struct PendingReduction {
    /// By rank; None is this one.
    from: Vec<Option<Source>>,
    /// What this rank gives, where that is not what the result overwrites.
    own: Option<Buffer>,
    out: Buffer,
    kind: Kind,
    op: ReduceOp,
    at: usize,
    /// Only what this rank has written may be overwritten.
    follows_write: bool,
}

/// A collective under way.
#[derive(Default)]
pub(super) struct Collective {
    writing: Vec<PendingWrite>,
    combining: Option<PendingReduction>,
    reading: Vec<PendingRead>,
    /// Copied within this rank, first of all.
    own: Option<(Buffer, Buffer)>,
}

/// A rank's bytes of those that all ranks have: as many each but for the last ones, in whole cache lines.
pub(super) fn part(bytes: usize, rank: usize, size: usize) -> (usize, usize) {
    let each = bytes
        .div_ceil(size)
        .next_multiple_of(super::segment::CACHE_LINE);
    let start = (rank * each).min(bytes);
    (start, ((rank + 1) * each).min(bytes) - start)
}

/// Sums of so few bytes are made by every rank for itself, which takes one turn instead of two.
const ONE_STEP_ALL_REDUCE_BYTES: usize = 16 << 10;

impl Collective {
    pub(super) fn all_reduce(rings: &Rings, data: &Buffer, kind: Kind, op: ReduceOp) -> Collective {
        let rank = rings.rank;
        let size = rings.size;
        let writing = |to, bytes, follows_reduction| PendingWrite {
            to,
            bytes,
            at: 0,
            follows_reduction,
        };
        let combining = |from: fn(usize) -> Source, out, follows_write| {
            let from = (0..size)
                .map(|other| (other != rank).then_some(from(other)))
                .collect();
            Some(PendingReduction {
                from,
                own: None,
                out,
                kind,
                op,
                at: 0,
                follows_write,
            })
        };
        if data.len() <= ONE_STEP_ALL_REDUCE_BYTES {
            let writing = vec![writing(Destination::All, data.clone(), false)];
            let combining = combining(Source::All, data.clone(), true);
            return Collective {
                writing,
                combining,
                ..Collective::default()
            };
        }
        let of = |rank| {
            let (start, len) = part(data.len(), rank, size);
            data.part(start, len)
        };
        let mut all: Vec<PendingWrite> = rings
            .others()
            .map(|to| writing(Destination::One(to), of(to), false))
            .collect();
        all.push(writing(Destination::All, of(rank), true));
        let reading = rings
            .others()
            .map(|from| PendingRead {
                from: Source::All(from),
                bytes: of(from),
                at: 0,
            })
            .collect();
        Collective {
            writing: all,
            combining: combining(Source::One, of(rank), false),
            reading,
            own: None,
        }
    }

    pub(super) fn broadcast(rings: &Rings, data: &Buffer, root: usize) -> Collective {
        let bytes = data.clone();
        if rings.rank == root {
            Collective {
                writing: vec![PendingWrite {
                    to: Destination::All,
                    bytes,
                    at: 0,
                    follows_reduction: false,
                }],
                ..Collective::default()
            }
        } else {
            Collective {
                reading: vec![PendingRead {
                    from: Source::All(root),
                    bytes,
                    at: 0,
                }],
                ..Collective::default()
            }
        }
    }

    pub(super) fn all_gather(rings: &Rings, out: &Buffer, input: &Buffer) -> Collective {
        let part = |rank| out.part(rank * input.len(), input.len());
        Collective {
            writing: vec![PendingWrite {
                to: Destination::All,
                bytes: input.clone(),
                at: 0,
                follows_reduction: false,
            }],
            reading: rings
                .others()
                .map(|rank| PendingRead {
                    from: Source::All(rank),
                    bytes: part(rank),
                    at: 0,
                })
                .collect(),
            own: Some((part(rings.rank), input.clone())),
            combining: None,
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
        let from = (0..rings.size)
            .map(|other| (other != rings.rank).then_some(Source::One(other)))
            .collect();
        let own = Some(part(rings.rank));
        let writing = rings.others().map(|to| PendingWrite {
            to: Destination::One(to),
            bytes: part(to),
            at: 0,
            follows_reduction: false,
        });
        Collective {
            writing: writing.collect(),
            combining: Some(PendingReduction {
                from,
                own,
                out: out.clone(),
                kind,
                op,
                at: 0,
                follows_write: false,
            }),
            ..Collective::default()
        }
    }

    /// `outputs` and `inputs` are bytes from and for each rank.
    pub(super) fn all_to_all(rings: &Rings, outputs: &[Buffer], inputs: &[Buffer]) -> Collective {
        let writing = |to: usize| PendingWrite {
            to: Destination::One(to),
            bytes: inputs[to].clone(),
            at: 0,
            follows_reduction: false,
        };
        let reading = |from: usize| PendingRead {
            from: Source::One(from),
            bytes: outputs[from].clone(),
            at: 0,
        };
        Collective {
            writing: rings.others().map(writing).collect(),
            reading: rings.others().map(reading).collect(),
            own: Some((outputs[rings.rank].clone(), inputs[rings.rank].clone())),
            combining: None,
        }
    }

    /// Gets on by a piece of everything: whether anything was possible.
    pub(super) fn make_progress(&mut self, rings: &mut Rings) -> bool {
        let mut moved = false;
        if let Some((to, from)) = self.own.take() {
            to.copy_from(&from);
        }
        let combined = self.combining.as_ref().map_or(0, |combining| combining.at);
        self.writing.retain_mut(|writing| {
            let until = if writing.follows_reduction {
                combined
            } else {
                writing.bytes.len()
            };
            if until > writing.at {
                // SAFETY: nobody writes there before `at` is past it.
                let bytes = &unsafe { writing.bytes.bytes() }[writing.at..until];
                let count = rings.write(writing.to, bytes, until == writing.bytes.len());
                writing.at += count;
                moved |= count > 0;
            }
            writing.at < writing.bytes.len()
        });
        if let Some(combining) = &mut self.combining {
            let until = if combining.follows_write {
                self.writing
                    .first()
                    .map_or(combining.out.len(), |writing| writing.at)
            } else {
                combining.out.len()
            };
            moved |= combining.make_progress(rings, until);
        }
        self.reading.retain_mut(|reading| {
            let from = rings.reading(reading.from).readable();
            let count = from
                .len()
                .min(reading.bytes.len() - reading.at)
                .min(PIECE_BYTES);
            if count > 0 {
                // SAFETY: this operation alone uses these bytes meanwhile.
                let into = unsafe { reading.bytes.bytes_mut() };
                into[reading.at..][..count].copy_from_slice(&from[..count]);
                reading.at += count;
                rings.read(reading.from, count, reading.at == reading.bytes.len());
                moved = true;
            }
            reading.at < reading.bytes.len()
        });
        moved
    }

    /// Whether it goes on only with `rank`'s help.
    pub(super) fn depends_on(&self, rank: usize) -> bool {
        let to = |writing: &PendingWrite| match writing.to {
            Destination::All => true,
            Destination::One(to) => to == rank,
        };
        let combining = self
            .combining
            .as_ref()
            .filter(|combining| combining.at < combining.out.len());
        self.writing.iter().any(to)
            || self
                .reading
                .iter()
                .any(|reading| reading.from.rank() == rank)
            || combining.is_some_and(|combining| {
                combining
                    .from
                    .iter()
                    .flatten()
                    .any(|from| from.rank() == rank)
            })
    }

    pub(super) fn is_done(&self) -> bool {
        let combined = self
            .combining
            .as_ref()
            .is_none_or(|combining| combining.at == combining.out.len());
        combined && self.own.is_none() && self.writing.is_empty() && self.reading.is_empty()
    }
}

impl PendingReduction {
    fn make_progress(&mut self, rings: &mut Rings, until: usize) -> bool {
        let element = self.kind.elt_size_in_bytes();
        let mut count = (until - self.at).min(PIECE_BYTES);
        for from in self.from.iter().flatten() {
            count = count.min(rings.reading(*from).readable().len());
        }
        count -= count % element;
        if count == 0 {
            return false;
        }
        // SAFETY: this operation alone uses these bytes meanwhile.
        let out = &mut unsafe { self.out.bytes_mut() }[self.at..][..count];
        // SAFETY: nobody writes these during the operation.
        let own = self
            .own
            .as_ref()
            .map(|own| &unsafe { own.bytes() }[self.at..][..count]);
        let given = self.from.iter().map(|from| match *from {
            Some(Source::All(rank)) => Some(&rings.from_all[rank].readable()[..count]),
            Some(Source::One(rank)) => Some(&rings.from[rank].readable()[..count]),
            None => own,
        });
        combine(self.kind, self.op, &given.collect::<Vec<_>>(), out);
        self.at += count;
        for &from in self.from.iter().flatten() {
            rings.read(from, count, self.at == self.out.len());
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
        fn parts_are_the_whole(bytes in 0..100_000usize, size in 1..9usize) {
            let mut end = 0;
            for rank in 0..size {
                let (start, len) = part(bytes, rank, size);
                prop_assert!(start == end && (start.is_multiple_of(64) || len == 0));
                end = start + len;
            }
            prop_assert_eq!(end, bytes);
        }
    }
}
