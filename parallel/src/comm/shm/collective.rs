//! One collective as what is left to write into rings, to combine, and to read out of rings. It gets on piece by piece and never
//! waits: a piece that one rank has written the others read while the next is written.

use super::super::ReduceOp;
use super::Buffer;
use super::reduce::combine;
use super::segment::{Lane, Ring};
use tch::Kind;

/// Bytes of a piece: what is written is still near the processor when it is read.
const PIECE: usize = 32 << 10;

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
    pub(super) fn new(rank: usize, size: usize, ring: impl Fn(usize, Lane) -> Ring) -> Rings {
        Rings {
            rank,
            size,
            to_all: ring(rank, Lane::All),
            to: (0..size).map(|to| ring(rank, Lane::Part(to))).collect(),
            from_all: (0..size).map(|from| ring(from, Lane::All)).collect(),
            from: (0..size).map(|from| ring(from, Lane::Part(rank))).collect(),
            touched: vec![false; size],
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |&other| other != rank)
    }

    /// Writes up to a piece of the first of `bytes`; with the last of them the message is at its end.
    fn write(&mut self, to: To, bytes: &[u8], last: bool) -> usize {
        let (ring, readers) = match to {
            To::All => (&mut self.to_all, 0..self.size),
            To::One(to) => (&mut self.to[to], to..to + 1),
        };
        let readers = readers.filter(|&reader| reader != self.rank);
        let free = ring.free(readers.clone());
        let count = ring.write(&bytes[..bytes.len().min(PIECE)], free);
        if last && count == bytes.len() {
            ring.end_written();
        }
        if count > 0 {
            readers.for_each(|reader| self.touched[reader] = true);
        }
        count
    }

    fn reading(&mut self, from: From) -> &mut Ring {
        match from {
            From::All(from) => &mut self.from_all[from],
            From::One(from) => &mut self.from[from],
        }
    }

    fn read(&mut self, from: From, count: usize, ends: bool) {
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
enum To {
    All,
    One(usize),
}

/// Who has written something: for all, or for this rank.
#[derive(Debug, Clone, Copy)]
enum From {
    All(usize),
    One(usize),
}

impl From {
    fn rank(self) -> usize {
        match self {
            From::All(rank) | From::One(rank) => rank,
        }
    }
}

/// What is left of a message to write.
struct Writing {
    to: To,
    bytes: Buffer,
    at: usize,
    /// Only what has been combined may go.
    when_combined: bool,
}

/// What is left of a message to read.
struct Reading {
    from: From,
    bytes: Buffer,
    at: usize,
}

/// What is left to combine of one message of each rank.
struct Combining {
    /// By rank; None is this one.
    from: Vec<Option<From>>,
    /// What this rank gives, where that is not what the result overwrites.
    own: Option<Buffer>,
    out: Buffer,
    kind: Kind,
    op: ReduceOp,
    at: usize,
    /// Only what this rank has written may be overwritten.
    when_written: bool,
}

/// A collective under way.
#[derive(Default)]
pub(super) struct Collective {
    writing: Vec<Writing>,
    combining: Option<Combining>,
    reading: Vec<Reading>,
    /// Copied within this rank, first of all.
    own: Option<(Buffer, Buffer)>,
}

/// A rank's bytes of those that all ranks have: as many each but for the last ones, in whole cache lines.
pub(super) fn part(bytes: usize, rank: usize, size: usize) -> (usize, usize) {
    let each = bytes.div_ceil(size).next_multiple_of(super::segment::LINE);
    let start = (rank * each).min(bytes);
    (start, ((rank + 1) * each).min(bytes) - start)
}

/// Sums of so few bytes are made by every rank for itself, which takes one turn instead of two.
const FEW: usize = 16 << 10;

impl Collective {
    pub(super) fn all_reduce(rings: &Rings, data: &Buffer, kind: Kind, op: ReduceOp) -> Collective {
        let rank = rings.rank;
        let size = rings.size;
        let writing = |to, bytes, when_combined| Writing {
            to,
            bytes,
            at: 0,
            when_combined,
        };
        let combining = |from: fn(usize) -> From, out, when_written| {
            let from = (0..size)
                .map(|other| (other != rank).then_some(from(other)))
                .collect();
            Some(Combining {
                from,
                own: None,
                out,
                kind,
                op,
                at: 0,
                when_written,
            })
        };
        if data.len() <= FEW {
            let writing = vec![writing(To::All, data.clone(), false)];
            let combining = combining(From::All, data.clone(), true);
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
        let mut all: Vec<Writing> = rings
            .others()
            .map(|to| writing(To::One(to), of(to), false))
            .collect();
        all.push(writing(To::All, of(rank), true));
        let reading = rings
            .others()
            .map(|from| Reading {
                from: From::All(from),
                bytes: of(from),
                at: 0,
            })
            .collect();
        Collective {
            writing: all,
            combining: combining(From::One, of(rank), false),
            reading,
            own: None,
        }
    }

    pub(super) fn broadcast(rings: &Rings, data: &Buffer, root: usize) -> Collective {
        let bytes = data.clone();
        if rings.rank == root {
            Collective {
                writing: vec![Writing {
                    to: To::All,
                    bytes,
                    at: 0,
                    when_combined: false,
                }],
                ..Collective::default()
            }
        } else {
            Collective {
                reading: vec![Reading {
                    from: From::All(root),
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
            writing: vec![Writing {
                to: To::All,
                bytes: input.clone(),
                at: 0,
                when_combined: false,
            }],
            reading: rings
                .others()
                .map(|rank| Reading {
                    from: From::All(rank),
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
            .map(|other| (other != rings.rank).then_some(From::One(other)))
            .collect();
        let own = Some(part(rings.rank));
        let writing = rings.others().map(|to| Writing {
            to: To::One(to),
            bytes: part(to),
            at: 0,
            when_combined: false,
        });
        Collective {
            writing: writing.collect(),
            combining: Some(Combining {
                from,
                own,
                out: out.clone(),
                kind,
                op,
                at: 0,
                when_written: false,
            }),
            ..Collective::default()
        }
    }

    /// `outputs` and `inputs` are bytes from and for each rank.
    pub(super) fn all_to_all(rings: &Rings, outputs: &[Buffer], inputs: &[Buffer]) -> Collective {
        let writing = |to: usize| Writing {
            to: To::One(to),
            bytes: inputs[to].clone(),
            at: 0,
            when_combined: false,
        };
        let reading = |from: usize| Reading {
            from: From::One(from),
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
    pub(super) fn get_on(&mut self, rings: &mut Rings) -> bool {
        let mut moved = false;
        if let Some((to, from)) = self.own.take() {
            to.copy_from(&from);
        }
        let combined = self.combining.as_ref().map_or(0, |combining| combining.at);
        self.writing.retain_mut(|writing| {
            let until = if writing.when_combined {
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
            let until = if combining.when_written {
                self.writing
                    .first()
                    .map_or(combining.out.len(), |writing| writing.at)
            } else {
                combining.out.len()
            };
            moved |= combining.get_on(rings, until);
        }
        self.reading.retain_mut(|reading| {
            let from = rings.reading(reading.from).readable();
            let count = from.len().min(reading.bytes.len() - reading.at).min(PIECE);
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
    pub(super) fn needs(&self, rank: usize) -> bool {
        let to = |writing: &Writing| match writing.to {
            To::All => true,
            To::One(to) => to == rank,
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

impl Combining {
    fn get_on(&mut self, rings: &mut Rings, until: usize) -> bool {
        let element = self.kind.elt_size_in_bytes();
        let mut count = (until - self.at).min(PIECE);
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
            Some(From::All(rank)) => Some(&rings.from_all[rank].readable()[..count]),
            Some(From::One(rank)) => Some(&rings.from[rank].readable()[..count]),
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
