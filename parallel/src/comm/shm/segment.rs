//! The memory that a group's ranks share: for each rank a doorbell, and rings of bytes that one rank writes and others read.

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::thread::futex;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// A cache line: what different ranks write lies on different ones, and messages begin on one.
pub(super) const CACHE_LINE: usize = 64;

/// Bytes of the rings that one rank writes for collectives, or for messages, together.
const RING_BYTES_PER_RANK: usize = 1 << 20;
/// Of one of them, at least and at most.
const RING_BYTES_RANGE: (usize, usize) = (32 << 10, 256 << 10);

/// What a ring is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// From one rank to all others.
    All,
    /// A collective's parts, from one rank to another.
    Part(usize),
    /// Messages from one rank to another.
    Message(usize),
}

/// Where everything is, for a group of some size.
#[derive(Debug, Clone, Copy)]
struct Layout {
    members: usize,
    ring: usize,
}

impl Layout {
    fn new(members: usize) -> Layout {
        let ring = (RING_BYTES_PER_RANK / members)
            .next_power_of_two()
            .clamp(RING_BYTES_RANGE.0, RING_BYTES_RANGE.1);
        Layout { members, ring }
    }

    /// The lines of one ring's positions: how far it is written, and how far each rank has read it.
    fn control(&self) -> usize {
        (1 + self.members) * CACHE_LINE
    }

    fn rings(&self) -> usize {
        self.members * (2 * self.members + 1)
    }

    fn number(&self, writer: usize, channel: Channel) -> usize {
        writer * (2 * self.members + 1)
            + match channel {
                Channel::All => 0,
                Channel::Part(to) => 1 + to,
                Channel::Message(to) => 1 + self.members + to,
            }
    }

    /// The first line says which segment it is; then each rank has one.
    fn positions(&self, ring: usize) -> usize {
        (1 + self.members) * CACHE_LINE + ring * self.control()
    }

    fn data(&self, ring: usize) -> usize {
        self.positions(self.rings()).next_multiple_of(4096) + ring * self.ring
    }

    fn len(&self) -> usize {
        self.data(self.rings())
    }
}

/// A group's shared memory, as one process sees it. Pages that nobody writes take no memory.
pub(super) struct Segment {
    layout: Layout,
    map: MmapRaw,
}

impl Segment {
    /// New memory for `members` ranks, known by `nonce`, and the file by which others get at it.
    pub(super) fn create(members: usize, nonce: u64) -> io::Result<(Segment, File)> {
        let file = File::from(memfd_create(
            "moerun-group",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?);
        let layout = Layout::new(members);
        file.set_len(layout.len() as u64)?;
        // A file that could shrink would make a signal of a read.
        fcntl(
            &file,
            FcntlArg::F_ADD_SEALS(
                SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL,
            ),
        )?;
        let segment = Segment {
            layout,
            map: MmapOptions::new().map_raw(&file)?,
        };
        segment.number(0).store(nonce, Ordering::SeqCst);
        Ok((segment, file))
    }

    /// The memory that another rank made.
    ///
    /// # Errors
    /// When it is not that.
    pub(super) fn open(file: &File, members: usize, nonce: u64) -> io::Result<Segment> {
        let layout = Layout::new(members);
        let seals = SealFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GET_SEALS)?);
        let fits = seals.contains(SealFlag::F_SEAL_SHRINK)
            && file.metadata()?.len() == layout.len() as u64;
        let other = || io::Error::new(io::ErrorKind::InvalidData, "other memory than the group's");
        let segment = fits
            .then(|| MmapOptions::new().map_raw(file))
            .ok_or_else(other)??;
        let segment = Segment {
            layout,
            map: segment,
        };
        if segment.number(0).load(Ordering::SeqCst) == nonce {
            Ok(segment)
        } else {
            Err(other())
        }
    }

    fn number(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.layout.data(0));
        // SAFETY: aligned and inside the mapping, which cannot shrink (it is sealed) and lives as long as `self`; all processes
        // go to these bytes as atomic numbers alone.
        unsafe { &*self.map.as_mut_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// A number in the line of a rank.
    fn of(&self, member: usize, what: Word) -> &AtomicU32 {
        assert!(member < self.layout.members);
        let offset = (1 + member) * CACHE_LINE + what as usize;
        // SAFETY: as above.
        unsafe { &*self.map.as_mut_ptr().add(offset).cast::<AtomicU32>() }
    }

    /// The process and the moment it began, by which others see that it is gone.
    pub(super) fn process(&self, member: usize) -> &AtomicU64 {
        assert!(member < self.layout.members);
        self.number((1 + member) * CACHE_LINE + 8)
    }

    /// How many threads of a rank wait for operations.
    pub(super) fn waiters(&self, member: usize) -> &AtomicU32 {
        self.of(member, Word::Waiters)
    }

    /// How many operations of a rank are under way.
    pub(super) fn pending(&self, member: usize) -> &AtomicU32 {
        self.of(member, Word::Pending)
    }

    /// Whether operations of a rank are under way and none of its threads waits.
    pub(super) fn needs_progress_thread(&self, member: usize) -> bool {
        // What was written to rings before is seen by who begins or waits after.
        fence(Ordering::SeqCst);
        self.pending(member).load(Ordering::SeqCst) > 0
            && self.waiters(member).load(Ordering::SeqCst) == 0
    }

    /// Tells a rank that something has changed: those of its threads that wait, or the one that looks after what nobody waits for.
    pub(super) fn ring_doorbell(&self, member: usize) {
        self.ring(member, Doorbell::Waiting);
        if self.needs_progress_thread(member) {
            self.ring(member, Doorbell::ProgressThread);
        }
    }

    /// Lets the thread that looks after a rank's operations see that the rank has left the group.
    pub(super) fn wake_progress_thread(&self, member: usize) {
        self.ring(member, Doorbell::ProgressThread);
    }

    fn ring(&self, member: usize, bell: Doorbell) {
        let [doorbell_count, sleepers] = bell.words().map(|word| self.of(member, word));
        doorbell_count.fetch_add(1, Ordering::SeqCst);
        if sleepers.load(Ordering::SeqCst) > 0 {
            let _ = futex::wake(doorbell_count, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// How often a bell of a rank was doorbell_count.
    pub(super) fn doorbell_count(&self, member: usize, bell: Doorbell) -> u32 {
        self.of(member, bell.words()[0]).load(Ordering::SeqCst)
    }

    /// Sleeps until a bell has been doorbell_count more often than `seen` times, at most `longest`.
    pub(super) fn sleep(
        &self,
        member: usize,
        bell: Doorbell,
        seen: u32,
        longest: Option<Duration>,
    ) {
        let [doorbell_count, sleepers] = bell.words().map(|word| self.of(member, word));
        let nanos = |longest: Duration| longest.subsec_nanos().into();
        let longest = longest.map(|longest| futex::Timespec {
            tv_sec: longest.as_secs() as i64,
            tv_nsec: nanos(longest),
        });
        sleepers.fetch_add(1, Ordering::SeqCst);
        // Whatever ends it, the caller looks.
        let _ = futex::wait(
            doorbell_count,
            futex::Flags::empty(),
            seen,
            longest.as_ref(),
        );
        sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// For whom a bell of a rank is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Doorbell {
    /// Threads that wait for an operation.
    Waiting,
    /// The thread that looks after operations that nobody waits for.
    ProgressThread,
}

impl Doorbell {
    /// How often it was doorbell_count, and how many threads sleep by it.
    fn words(self) -> [Word; 2] {
        match self {
            Doorbell::Waiting => [Word::Rung, Word::Sleepers],
            Doorbell::ProgressThread => [Word::ProgressRung, Word::ProgressSleepers],
        }
    }
}

/// What the line of a rank holds, and where.
#[derive(Clone, Copy)]
enum Word {
    Rung = 0,
    Sleepers = 4,
    // The process has 8 to 15.
    Waiters = 16,
    ProgressRung = 20,
    ProgressSleepers = 24,
    Pending = 28,
}

/// One end of a ring of bytes. Positions count bytes since the beginning.
pub(super) struct Ring {
    segment: Arc<Segment>,
    number: usize,
    /// This end's position: of the one who writes, or of the one who reads.
    at: u64,
}

impl Ring {
    pub(super) fn new(segment: &Arc<Segment>, writer: usize, channel: Channel) -> Ring {
        Ring {
            segment: segment.clone(),
            number: segment.layout.number(writer, channel),
            at: 0,
        }
    }

    fn head(&self) -> &AtomicU64 {
        self.segment
            .number(self.segment.layout.positions(self.number))
    }

    fn tail(&self, reader: usize) -> &AtomicU64 {
        self.segment
            .number(self.segment.layout.positions(self.number) + (1 + reader) * CACHE_LINE)
    }

    /// The bytes from this end's position on, up to where the ring begins again.
    fn bytes(&self) -> (*mut u8, usize) {
        let layout = &self.segment.layout;
        let within = self.at as usize % layout.ring;
        // SAFETY: inside the mapping: `within` is less than the ring's length.
        (
            unsafe {
                self.segment
                    .map
                    .as_mut_ptr()
                    .add(layout.data(self.number) + within)
            },
            layout.ring - within,
        )
    }

    /// How many bytes may be written, with `readers` that have to read all.
    pub(super) fn free(&self, readers: impl IntoIterator<Item = usize>) -> usize {
        let read = readers
            .into_iter()
            .map(|reader| self.tail(reader).load(Ordering::Acquire))
            .min();
        let unread = self.at.saturating_sub(read.unwrap_or(self.at));
        self.segment.layout.ring.saturating_sub(unread as usize)
    }

    /// Writes the first of `bytes`, as many as there is room for among `free` and before the ring begins again.
    pub(super) fn write(&mut self, bytes: &[u8], free: usize) -> usize {
        let (to, room) = self.bytes();
        let count = bytes.len().min(free).min(room);
        // SAFETY: `to` has `room` bytes; nobody reads or writes them before `head` is past them, since every reader is past
        // what was there.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, count) };
        self.at += count as u64;
        self.head().store(self.at, Ordering::Release);
        count
    }

    /// The one who writes goes on to the next line: a message is at its end.
    pub(super) fn end_written(&mut self) {
        self.at = self.at.next_multiple_of(CACHE_LINE as u64);
        self.head().store(self.at, Ordering::Release);
    }

    /// What has been written and not been read by this end, up to where the ring begins again.
    pub(super) fn readable(&self) -> &[u8] {
        let (from, room) = self.bytes();
        let written = self.head().load(Ordering::Acquire).saturating_sub(self.at) as usize;
        // SAFETY: `from` has `room` bytes; the one who writes leaves them alone until this end's position is past them.
        unsafe { std::slice::from_raw_parts(from, written.min(room)) }
    }

    /// `reader`, whose end this is, has read so many bytes more.
    pub(super) fn read(&mut self, reader: usize, count: usize) {
        self.at += count as u64;
        self.tail(reader).store(self.at, Ordering::Release);
    }

    /// `reader`, whose end this is, goes on to the next line: a message is at its end.
    pub(super) fn end_read(&mut self, reader: usize) {
        self.at = self.at.next_multiple_of(CACHE_LINE as u64);
        self.tail(reader).store(self.at, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_has_its_own_place(members in 2..9usize) {
            let layout = Layout::new(members);
            let channels = |_| {
                std::iter::once(Channel::All)
                    .chain((0..members).map(Channel::Part))
                    .chain((0..members).map(Channel::Message))
            };
            let mut numbers: Vec<_> =
                (0..members).flat_map(|writer| channels(writer).map(move |channel| layout.number(writer, channel))).collect();
            numbers.sort_unstable();
            prop_assert!(numbers.iter().copied().eq(0..layout.rings()));
            prop_assert!(layout.positions(layout.rings()) <= layout.data(0));
            prop_assert_eq!(layout.len() - layout.data(0), layout.rings() * layout.ring);
            prop_assert!(layout.ring.is_multiple_of(CACHE_LINE));
        }

        #[test]
        fn rings_carry_any_messages_in_order(lens in prop::collection::vec(0..90_000usize, 1..12), steps in any::<u64>()) {
            let (segment, file) = Segment::create(2, 7).unwrap();
            let (here, there) = (Arc::new(segment), Arc::new(Segment::open(&file, 2, 7).unwrap()));
            prop_assert!(Segment::open(&file, 2, 8).is_err() && Segment::open(&file, 3, 7).is_err());
            let (mut writer, mut reader) = (Ring::new(&here, 0, Channel::Part(1)), Ring::new(&there, 0, Channel::Part(1)));
            let message = |number: usize, len: usize| (0..len).map(|i| (i * 7 + number) as u8).collect::<Vec<u8>>();
            let (mut sent, mut got) = ((0, 0), (0, Vec::new()));
            let mut random = steps | 1;
            while got.0 < lens.len() {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if random >> 63 == 0 && sent.0 < lens.len() {
                    let whole = message(sent.0, lens[sent.0]);
                    let free = writer.free([1]).min((random >> 40) as usize % 50_000);
                    sent.1 += writer.write(&whole[sent.1..], free);
                    if sent.1 == whole.len() {
                        writer.end_written();
                        sent = (sent.0 + 1, 0);
                    }
                } else {
                    let left = lens[got.0] - got.1.len();
                    let take = reader.readable().len().min(left).min((random >> 30) as usize % 50_000);
                    got.1.extend_from_slice(&reader.readable()[..take]);
                    reader.read(1, take);
                    if got.1.len() == lens[got.0] {
                        prop_assert_eq!(&got.1, &message(got.0, lens[got.0]));
                        reader.end_read(1);
                        got = (got.0 + 1, Vec::new());
                    }
                }
            }
        }
    }
}
