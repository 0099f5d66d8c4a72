//! The shared memory of a group: a doorbell per rank, and rings of bytes that one rank writes and
//! others read.

use memmap2::{MmapOptions, MmapRaw};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use rustix::thread::futex;
use std::{
    fs::File,
    io,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
    time::Duration,
};

/// Bytes of a cache line. Different ranks write to different lines, and messages start on one.
pub(super) const CACHE_LINE: usize = 64;

/// Bytes of all rings that one rank writes for collectives, or for messages.
const RING_BYTES_PER_RANK: usize = 1 << 20;
/// Limits of the bytes of a ring that one rank reads, and of one that all read.
const PAIR_RING_BYTES: RangeInclusive<usize> = 8 << 10..=256 << 10;
const SHARED_RING_BYTES: RangeInclusive<usize> = 32 << 10..=256 << 10;

/// Bytes of the positions of a writer and its only reader.
const PAIR_POSITION_BYTES: usize = 2 * CACHE_LINE;

/// The purpose of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// From one rank to all others.
    All,
    /// From one rank to another: a part of a collective.
    Part(usize),
    /// From one rank to another: messages.
    Message(usize),
}

/// The offsets in the memory of a group.
///
/// First come the nonce and a line per rank, then the positions of all rings, then their bytes.
/// Pages take memory only once they are used, so what one operation uses is adjacent.
#[derive(Debug, Clone, Copy)]
struct Layout {
    members: usize,
    shared_ring_bytes: usize,
    pair_ring_bytes: usize,
}

/// The place of a ring in the memory of a group.
#[derive(Debug, Clone, Copy)]
struct RingPlace {
    /// Offset of the lines with the writer's and then the readers' positions.
    positions: usize,
    /// The only reader; `None` if all other ranks read.
    reader: Option<usize>,
    data: usize,
    bytes: usize,
}

impl Layout {
    fn new(members: usize) -> Layout {
        let fair = (RING_BYTES_PER_RANK / members).next_power_of_two();
        let within = |range: RangeInclusive<usize>| fair.clamp(*range.start(), *range.end());
        Layout {
            members,
            shared_ring_bytes: within(SHARED_RING_BYTES),
            pair_ring_bytes: within(PAIR_RING_BYTES),
        }
    }

    /// Returns the number of rings for one pair, of each kind.
    fn pairs(&self) -> usize {
        self.members * self.members
    }

    fn ring(&self, writer: usize, channel: Channel) -> RingPlace {
        // Rings of one reader are adjacent, since it looks at them together.
        let pair = |reader: usize| reader * self.members + writer;
        let (number, reader) = match channel {
            Channel::All => {
                return RingPlace {
                    positions: self.shared_positions() + writer * self.shared_position_bytes(),
                    reader: None,
                    data: self.shared_data() + writer * self.shared_ring_bytes,
                    bytes: self.shared_ring_bytes,
                };
            }
            Channel::Part(reader) => (pair(reader), reader),
            Channel::Message(reader) => (self.pairs() + pair(reader), reader),
        };
        RingPlace {
            positions: self.pair_positions() + number * PAIR_POSITION_BYTES,
            reader: Some(reader),
            data: self.pair_data() + number * self.pair_ring_bytes,
            bytes: self.pair_ring_bytes,
        }
    }

    fn shared_position_bytes(&self) -> usize {
        (1 + self.members) * CACHE_LINE
    }

    fn shared_positions(&self) -> usize {
        (1 + self.members) * CACHE_LINE
    }

    fn pair_positions(&self) -> usize {
        self.shared_positions() + self.members * self.shared_position_bytes()
    }

    fn shared_data(&self) -> usize {
        let end = self.pair_positions() + 2 * self.pairs() * PAIR_POSITION_BYTES;
        end.next_multiple_of(4096)
    }

    fn pair_data(&self) -> usize {
        self.shared_data() + self.members * self.shared_ring_bytes
    }

    fn len(&self) -> usize {
        self.pair_data() + 2 * self.pairs() * self.pair_ring_bytes
    }
}

/// The shared memory of a group, mapped by one process. Pages take memory only once they are
/// written.
pub(super) struct Segment {
    layout: Layout,
    map: MmapRaw,
}

impl Segment {
    /// Creates memory for `members` ranks, which `nonce` identifies, and returns it with its file.
    pub(super) fn create(members: usize, nonce: u64) -> io::Result<(Segment, File)> {
        let file = File::from(memfd_create(
            "moerun-group",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?);
        let layout = Layout::new(members);
        file.set_len(layout.len() as u64)?;
        // If the file could shrink, a read could raise SIGBUS.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let segment = Segment {
            layout,
            map: MmapOptions::new().map_raw(&file)?,
        };
        segment.atomic_u64(0).store(nonce, Ordering::SeqCst);
        Ok((segment, file))
    }

    /// Maps memory that another rank created.
    ///
    /// # Errors
    /// If the file has another size or nonce.
    pub(super) fn open(file: &File, members: usize, nonce: u64) -> io::Result<Segment> {
        let layout = Layout::new(members);
        let seals = SealFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GET_SEALS)?);
        let fits = seals.contains(SealFlag::F_SEAL_SHRINK)
            && file.metadata()?.len() == layout.len() as u64;
        let wrong_file =
            || io::Error::new(io::ErrorKind::InvalidData, "not the memory of this group");
        if !fits {
            return Err(wrong_file());
        }
        let map = MmapOptions::new().map_raw(file)?;
        let segment = Segment { layout, map };
        if segment.atomic_u64(0).load(Ordering::SeqCst) != nonce {
            return Err(wrong_file());
        }
        Ok(segment)
    }

    pub(super) fn members(&self) -> usize {
        self.layout.members
    }

    fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.layout.shared_data());
        // SAFETY: aligned and inside the mapping, which is sealed against shrinking and lives as
        // long as `self`. All processes access these bytes only as atomic numbers.
        unsafe { &*self.map.as_mut_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// Returns a word in the line of a rank.
    fn word(&self, member: usize, word: Word) -> &AtomicU32 {
        assert!(member < self.layout.members);
        let offset = (1 + member) * CACHE_LINE + word as usize;
        // SAFETY: as above.
        unsafe { &*self.map.as_mut_ptr().add(offset).cast::<AtomicU32>() }
    }

    /// Returns the identity of a rank's process, by which others notice its exit.
    pub(super) fn process(&self, member: usize) -> &AtomicU64 {
        assert!(member < self.layout.members);
        self.atomic_u64((1 + member) * CACHE_LINE + 8)
    }

    /// Returns the number of a rank's threads that wait for operations.
    pub(super) fn waiters(&self, member: usize) -> &AtomicU32 {
        self.word(member, Word::Waiters)
    }

    /// Returns the number of a rank's operations in progress.
    pub(super) fn pending(&self, member: usize) -> &AtomicU32 {
        self.word(member, Word::Pending)
    }

    /// True if a rank has operations in progress for which none of its threads waits.
    pub(super) fn needs_progress_thread(&self, member: usize) -> bool {
        // A thread that starts or waits later sees what was written to rings before.
        fence(Ordering::SeqCst);
        self.pending(member).load(Ordering::SeqCst) > 0
            && self.waiters(member).load(Ordering::SeqCst) == 0
    }

    /// Tells a rank that it gets messages. Before, it does not look for any.
    pub(super) fn announce_messages(&self, member: usize) {
        self.word(member, Word::GetsMessages)
            .store(1, Ordering::SeqCst);
    }

    /// True if another rank has sent a message to this one.
    pub(super) fn gets_messages(&self, member: usize) -> bool {
        self.word(member, Word::GetsMessages).load(Ordering::SeqCst) != 0
    }

    /// Wakes a rank's waiting threads, and its progress thread if it is needed.
    pub(super) fn ring_doorbell(&self, member: usize) {
        self.ring_one_doorbell(member, Doorbell::Waiting);
        if self.needs_progress_thread(member) {
            self.ring_one_doorbell(member, Doorbell::ProgressThread);
        }
    }

    /// Wakes a rank's progress thread, so that it notices that the rank has left the group.
    pub(super) fn wake_progress_thread(&self, member: usize) {
        self.ring_one_doorbell(member, Doorbell::ProgressThread);
    }

    fn ring_one_doorbell(&self, member: usize, bell: Doorbell) {
        let words = bell.words();
        let count = self.word(member, words.count);
        let sleepers = self.word(member, words.sleepers);
        count.fetch_add(1, Ordering::SeqCst);
        if sleepers.load(Ordering::SeqCst) > 0 {
            let _ = futex::wake(count, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// Returns the number of times that a doorbell of a rank was rung.
    pub(super) fn doorbell_count(&self, member: usize, bell: Doorbell) -> u32 {
        let count = self.word(member, bell.words().count);
        count.load(Ordering::SeqCst)
    }

    /// Sleeps until a doorbell was rung more than `seen` times, or for `timeout`.
    pub(super) fn sleep(
        &self,
        member: usize,
        bell: Doorbell,
        seen: u32,
        timeout: Option<Duration>,
    ) {
        let words = bell.words();
        let count = self.word(member, words.count);
        let sleepers = self.word(member, words.sleepers);
        let timeout = timeout.map(|timeout| futex::Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        sleepers.fetch_add(1, Ordering::SeqCst);
        // Whatever ends the wait, the caller checks again.
        let _ = futex::wait(count, futex::Flags::empty(), seen, timeout.as_ref());
        sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A doorbell of a rank, by the threads that it wakes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Doorbell {
    /// The threads that wait for an operation.
    Waiting,
    ProgressThread,
}

/// The words of a doorbell.
struct DoorbellWords {
    /// The number of times that it was rung.
    count: Word,
    /// The number of threads that sleep until it rings.
    sleepers: Word,
}

impl Doorbell {
    fn words(self) -> DoorbellWords {
        match self {
            Doorbell::Waiting => DoorbellWords {
                count: Word::Rung,
                sleepers: Word::Sleepers,
            },
            Doorbell::ProgressThread => DoorbellWords {
                count: Word::ProgressRung,
                sleepers: Word::ProgressSleepers,
            },
        }
    }
}

/// The words in the line of a rank, with their offsets.
#[derive(Clone, Copy)]
enum Word {
    Rung = 0,
    Sleepers = 4,
    // Bytes 8 to 15 identify the process.
    Waiters = 16,
    ProgressRung = 20,
    ProgressSleepers = 24,
    Pending = 28,
    GetsMessages = 32,
}

/// One end of a ring of bytes. Positions count all bytes since the start.
pub(super) struct Ring {
    segment: Arc<Segment>,
    place: RingPlace,
    /// The writer's or the reader's position, whichever end this is.
    position: u64,
}

/// Contiguous bytes of a ring.
struct Contiguous {
    data: *mut u8,
    len: usize,
}

impl Ring {
    pub(super) fn new(segment: &Arc<Segment>, writer: usize, channel: Channel) -> Ring {
        Ring {
            segment: segment.clone(),
            place: segment.layout.ring(writer, channel),
            position: 0,
        }
    }

    /// Returns the writer's published position.
    fn head(&self) -> &AtomicU64 {
        self.segment.atomic_u64(self.place.positions)
    }

    /// Returns a reader's published position.
    fn tail(&self, reader: usize) -> &AtomicU64 {
        let line = match self.place.reader {
            Some(only) => {
                assert_eq!(only, reader, "the reader of a ring");
                1
            }
            None => 1 + reader,
        };
        self.segment
            .atomic_u64(self.place.positions + line * CACHE_LINE)
    }

    /// Returns the bytes from this end's position to where the ring wraps around.
    fn contiguous(&self) -> Contiguous {
        let within = self.position as usize % self.place.bytes;
        let offset = self.place.data + within;
        Contiguous {
            // SAFETY: inside the mapping, since `within` is less than the ring's length.
            data: unsafe { self.segment.map.as_mut_ptr().add(offset) },
            len: self.place.bytes - within,
        }
    }

    /// Returns the number of bytes that may be written, given the ranks that have to read all.
    pub(super) fn free(&self, readers: impl IntoIterator<Item = usize>) -> usize {
        let tails = readers.into_iter().map(|reader| self.tail(reader));
        let read = tails.map(|tail| tail.load(Ordering::Acquire)).min();
        let unread = self.position.saturating_sub(read.unwrap_or(self.position));
        self.place.bytes.saturating_sub(unread as usize)
    }

    /// Writes the first of `bytes`, up to `free` and up to where the ring wraps around.
    pub(super) fn write(&mut self, bytes: &[u8], free: usize) -> usize {
        let space = self.contiguous();
        let count = bytes.len().min(free).min(space.len);
        // SAFETY: `data` has `len` bytes. No rank accesses them before `head` is past them, since
        // every reader is past the previous contents.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), space.data, count) };
        self.position += count as u64;
        self.head().store(self.position, Ordering::Release);
        count
    }

    /// Advances the writer to the next line, at the end of a message.
    pub(super) fn end_written(&mut self) {
        self.position = self.position.next_multiple_of(CACHE_LINE as u64);
        self.head().store(self.position, Ordering::Release);
    }

    /// Returns the bytes that this end has not read, up to where the ring wraps around.
    pub(super) fn readable(&self) -> &[u8] {
        let space = self.contiguous();
        let head = self.head().load(Ordering::Acquire);
        let unread = head.saturating_sub(self.position) as usize;
        // SAFETY: `data` has `len` bytes. The writer leaves them alone until this end's position is
        // past them.
        unsafe { std::slice::from_raw_parts(space.data, unread.min(space.len)) }
    }

    /// Advances `reader`, whose end this is, by `count` bytes.
    pub(super) fn read(&mut self, reader: usize, count: usize) {
        self.position += count as u64;
        self.tail(reader).store(self.position, Ordering::Release);
    }

    /// Advances `reader`, whose end this is, to the next line, at the end of a message.
    pub(super) fn end_read(&mut self, reader: usize) {
        self.position = self.position.next_multiple_of(CACHE_LINE as u64);
        self.tail(reader).store(self.position, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_many_ranks_look_at_is_small() {
        let layout = Layout::new(256);
        let shared = layout.pair_positions() - layout.shared_positions();
        assert!(shared < 5 << 20, "{shared} bytes of positions");
        // Where a rank looks for messages from all others.
        let row = layout.ring(255, Channel::Message(0)).positions
            - layout.ring(0, Channel::Message(0)).positions;
        assert!(row < 33 << 10, "{row} bytes of positions of one reader");
        assert!(
            layout.len() < 2 << 30,
            "{} bytes of addresses",
            layout.len()
        );
    }

    proptest! {
        #[test]
        fn rings_are_disjoint(members in 2..9usize) {
            let layout = Layout::new(members);
            let channels = || {
                std::iter::once(Channel::All)
                    .chain((0..members).map(Channel::Part))
                    .chain((0..members).map(Channel::Message))
            };
            let mut positions = Vec::new();
            let mut data = Vec::new();
            for writer in 0..members {
                for place in channels().map(|channel| layout.ring(writer, channel)) {
                    let lines = 1 + if place.reader.is_some() { 1 } else { members };
                    positions.push((place.positions, lines * CACHE_LINE));
                    data.push((place.data, place.bytes));
                    prop_assert!(
                        place
                            .bytes
                            .is_multiple_of(CACHE_LINE)
                    );
                }
            }
            let end_of_ranks = (1 + members) * CACHE_LINE;
            for (mut parts, first, end) in [
                (positions, end_of_ranks, layout.shared_data()),
                (data, layout.shared_data(), layout.len()),
            ] {
                parts.sort_unstable();
                let mut last_end = first;
                for (offset, len) in parts {
                    prop_assert_eq!(offset, last_end);
                    last_end = offset + len;
                }
                prop_assert!(last_end <= end && end - last_end < 4096);
            }
        }

        #[test]
        fn rings_carry_any_messages_in_order(
            lens in prop::collection::vec(0..90_000usize, 1..12),
            steps in any::<u64>(),
        ) {
            let (segment, file) = Segment::create(2, 7).unwrap();
            prop_assert!(Segment::open(&file, 2, 8).is_err());
            prop_assert!(Segment::open(&file, 3, 7).is_err());
            let here = Arc::new(segment);
            let there = Arc::new(Segment::open(&file, 2, 7).unwrap());
            let mut writer = Ring::new(&here, 0, Channel::Part(1));
            let mut reader = Ring::new(&there, 0, Channel::Part(1));
            let message = |index: usize| -> Vec<u8> {
                (0..lens[index])
                    .map(|i| (i * 7 + index) as u8)
                    .collect()
            };
            let mut sending = 0;
            let mut sent_bytes = 0;
            let mut receiving = 0;
            let mut received = Vec::new();
            let mut random = steps | 1;
            while receiving < lens.len() {
                random = random.wrapping_mul(6364136223846793005);
                random = random.wrapping_add(1442695040888963407);
                let writes = random >> 63 == 0;
                if writes && sending < lens.len() {
                    let whole = message(sending);
                    let limit = (random >> 40) as usize % 50_000;
                    let free = writer.free([1]).min(limit);
                    sent_bytes += writer.write(&whole[sent_bytes..], free);
                    if sent_bytes == whole.len() {
                        writer.end_written();
                        sending += 1;
                        sent_bytes = 0;
                    }
                } else {
                    let missing = lens[receiving] - received.len();
                    let limit = (random >> 30) as usize % 50_000;
                    let readable = reader.readable();
                    let count = readable
                        .len()
                        .min(missing)
                        .min(limit);
                    received.extend_from_slice(&readable[..count]);
                    reader.read(1, count);
                    if received.len() == lens[receiving] {
                        prop_assert_eq!(&received, &message(receiving));
                        reader.end_read(1);
                        receiving += 1;
                        received.clear();
                    }
                }
            }
        }
    }
}
