//! Byte-level BPE of one piece of text: the merge of lowest rank first, the leftmost of equals.
//!
//! A cache answers for frequent pieces. Merges are looked up by the ids of both tokens, so the
//! result is that of the `tokenizers` library for every vocabulary, whatever its ranks.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

/// The id of a byte that is no token, and the rank of two tokens that do not merge.
const NONE: u32 = u32::MAX;

/// Longest piece in bytes whose pairs are searched one by one. The heap is faster from here on.
const SHORT: usize = 48;

/// Buffers for pieces of more bytes are freed at once. They take about 24 bytes for each byte.
const HUGE: usize = 1 << 16;

/// A merge: its rank, lower first, and the id of the result.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

const NO_MERGE: Merge = Merge {
    rank: NONE,
    id: NONE,
};

#[derive(Clone, Copy)]
struct Slot {
    pair: u64,
    merge: Merge,
}

/// Merges by pair of ids: a hash table with open addressing, at most half full.
struct MergeTable {
    slots: Vec<Slot>,
    shift: u32,
}

/// A pair in free slots. Ids are below 2^32 - 1, so no merge has it.
const FREE: u64 = u64::MAX;

impl MergeTable {
    fn new(merges: impl ExactSizeIterator<Item = PairMerge>) -> MergeTable {
        let bits = (2 * merges.len())
            .next_power_of_two()
            .trailing_zeros()
            .max(4);
        let free = Slot {
            pair: FREE,
            merge: NO_MERGE,
        };
        let mut table = MergeTable {
            slots: vec![free; 1 << bits],
            shift: 64 - bits,
        };
        for merge in merges {
            let pair = pair(merge.left, merge.right);
            let mut index = table.home(pair);
            while ![FREE, pair].contains(&table.slots[index].pair) {
                index = (index + 1) & (table.slots.len() - 1);
            }
            let PairMerge { rank, id, .. } = merge;
            // The library keeps the last of equal pairs.
            table.slots[index] = Slot {
                pair,
                merge: Merge { rank, id },
            };
        }
        table
    }

    fn home(&self, pair: u64) -> usize {
        (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    fn get(&self, left: u32, right: u32) -> Merge {
        let pair = pair(left, right);
        let mut index = self.home(pair);
        loop {
            let slot = self.slots[index];
            if slot.pair == pair || slot.pair == FREE {
                return slot.merge;
            }
            index = (index + 1) & (self.slots.len() - 1);
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Two tokens that merge to a third.
#[derive(Debug, Clone, Copy)]
pub(super) struct PairMerge {
    pub(super) left: u32,
    pub(super) right: u32,
    pub(super) rank: u32,
    pub(super) id: u32,
}

/// The vocabulary of a byte-level BPE.
pub(super) struct Vocabulary {
    bytes: [u32; 256],
    merges: MergeTable,
    /// Tokens by their bytes, if pieces that are tokens are not merged (`ignore_merges`).
    whole: Option<HashMap<Box<[u8]>, u32>>,
}

/// A byte that the vocabulary lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MissingByte(pub(super) u8);

impl Vocabulary {
    /// Makes a vocabulary from the ids of single bytes and the merges. Later merges replace
    /// earlier ones of the same pair.
    pub(super) fn new(
        bytes: [Option<u32>; 256],
        merges: impl ExactSizeIterator<Item = PairMerge>,
        whole: Option<HashMap<Box<[u8]>, u32>>,
    ) -> Vocabulary {
        Vocabulary {
            bytes: bytes.map(|id| id.unwrap_or(NONE)),
            merges: MergeTable::new(merges),
            whole,
        }
    }

    /// Appends the ids of a piece.
    ///
    /// # Errors
    /// If a byte of the piece is no token. `into` is unchanged then.
    pub(super) fn encode(
        &self,
        piece: &[u8],
        cache: &mut Cache,
        into: &mut Vec<u32>,
    ) -> Result<(), MissingByte> {
        if cache.append(piece, into) {
            return Ok(());
        }
        let start = into.len();
        match self.whole.as_ref().and_then(|whole| whole.get(piece)) {
            Some(&id) => into.push(id),
            None => self.merge(piece, &mut cache.work, into)?,
        }
        cache.insert(piece, &into[start..]);
        Ok(())
    }

    fn merge(&self, piece: &[u8], work: &mut Work, into: &mut Vec<u32>) -> Result<(), MissingByte> {
        work.ids.clear();
        for &byte in piece {
            let id = self.bytes[byte as usize];
            if id == NONE {
                return Err(MissingByte(byte));
            }
            work.ids.push(id);
        }
        if piece.len() <= SHORT {
            self.merge_short(work);
        } else {
            self.merge_long(work);
        }
        into.extend_from_slice(&work.ids);
        if piece.len() > HUGE {
            *work = Work::default();
        }
        Ok(())
    }

    /// Merges by a search for the lowest rank in each step.
    fn merge_short(&self, work: &mut Work) {
        let Work { ids, pairs, .. } = work;
        pairs.clear();
        pairs.extend(ids.windows(2).map(|two| self.merges.get(two[0], two[1])));
        loop {
            let mut best = NONE;
            let mut at = 0;
            for (index, merge) in pairs.iter().enumerate() {
                if merge.rank < best {
                    best = merge.rank;
                    at = index;
                }
            }
            if best == NONE {
                return;
            }
            ids[at] = pairs[at].id;
            ids.remove(at + 1);
            pairs.remove(at);
            if at > 0 {
                pairs[at - 1] = self.merges.get(ids[at - 1], ids[at]);
            }
            if at < pairs.len() {
                pairs[at] = self.merges.get(ids[at], ids[at + 1]);
            }
        }
    }

    /// Merges with a heap of candidates: n log n for a piece of n bytes.
    fn merge_long(&self, work: &mut Work) {
        let Work {
            ids, links, heap, ..
        } = work;
        let len = ids.len();
        links.clear();
        links.extend((0..len as u32).map(|index| Link {
            previous: index.wrapping_sub(1),
            next: index + 1,
        }));
        heap.clear();
        let candidate = |ids: &[u32], left: usize, right: usize| {
            let rank = self.merges.get(ids[left], ids[right]).rank;
            (rank != NONE).then_some(Reverse([rank, left as u32]))
        };
        heap.extend((1..len).filter_map(|right| candidate(ids, right - 1, right)));
        while let Some(Reverse([rank, left])) = heap.pop() {
            let left = left as usize;
            let right = links[left].next as usize;
            if ids[left] == NONE || right >= len {
                continue;
            }
            let merge = self.merges.get(ids[left], ids[right]);
            // An entry from before one of both tokens was merged.
            if merge.rank != rank {
                continue;
            }
            ids[left] = merge.id;
            ids[right] = NONE;
            let next = links[right].next as usize;
            links[left].next = next as u32;
            if next < len {
                links[next].previous = left as u32;
                heap.extend(candidate(ids, left, next));
            }
            let previous = links[left].previous as usize;
            if previous < len {
                heap.extend(candidate(ids, previous, left));
            }
        }
        ids.retain(|&id| id != NONE);
    }
}

/// Neighbours of a token, as positions; those past both ends are at least the piece's length.
#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

/// Buffers that merges reuse.
#[derive(Default)]
struct Work {
    ids: Vec<u32>,
    pairs: Vec<Merge>,
    links: Vec<Link>,
    heap: BinaryHeap<Reverse<[u32; 2]>>,
}

/// A piece of less than 8 * `WORDS` bytes, with its length in the last byte.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key<const WORDS: usize>([[u8; 8]; WORDS]);

impl<const WORDS: usize> Key<WORDS> {
    #[inline(always)]
    fn of(piece: &[u8]) -> Option<Key<WORDS>> {
        if piece.len() >= 8 * WORDS {
            return None;
        }
        let mut words = [[0; 8]; WORDS];
        let bytes = words.as_flattened_mut();
        bytes[..piece.len()].copy_from_slice(piece);
        bytes[8 * WORDS - 1] = piece.len() as u8;
        Some(Key(words))
    }

    #[inline(always)]
    fn hash(self) -> u64 {
        let mut hash = 0;
        for two in self.0.chunks_exact(2) {
            let [left, right] = [two[0], two[1]].map(u64::from_le_bytes);
            let product = u128::from(left ^ hash ^ 0x9e37_79b9_7f4a_7c15)
                * u128::from(right ^ 0xd1b5_4a32_d192_ed03);
            hash = product as u64 ^ (product >> 64) as u64;
        }
        hash
    }
}

#[derive(Clone, Copy)]
struct Entry<const WORDS: usize, const IDS: usize> {
    key: Key<WORDS>,
    ids: [u32; IDS],
    len: u32,
}

/// A cache of fixed size in sets of two entries, of pieces with at most `IDS` ids.
struct SetCache<const WORDS: usize, const IDS: usize>(Box<[[Entry<WORDS, IDS>; 2]]>);

impl<const WORDS: usize, const IDS: usize> SetCache<WORDS, IDS> {
    /// Makes an empty cache of `sets` sets, a power of two.
    fn new(sets: usize) -> Self {
        let empty = Entry {
            key: Key([[0; 8]; WORDS]),
            ids: [0; IDS],
            len: 0,
        };
        SetCache(vec![[empty; 2]; sets].into())
    }

    #[inline(always)]
    fn set(&mut self, key: Key<WORDS>) -> &mut [Entry<WORDS, IDS>; 2] {
        let set = key.hash() as usize & (self.0.len() - 1);
        &mut self.0[set]
    }

    #[inline(always)]
    fn append(&mut self, key: Key<WORDS>, into: &mut Vec<u32>) -> bool {
        let set = self.set(key);
        if set[0].key != key {
            if set[1].key != key {
                return false;
            }
            set.swap(0, 1);
        }
        let entry = &set[0];
        // One id is by far the most frequent case.
        if entry.len == 1 {
            into.push(entry.ids[0]);
        } else {
            into.extend_from_slice(&entry.ids[..entry.len as usize]);
        }
        true
    }

    fn insert(&mut self, key: Key<WORDS>, ids: &[u32]) {
        let set = self.set(key);
        set.swap(0, 1);
        set[0].key = key;
        set[0].len = ids.len() as u32;
        set[0].ids[..ids.len()].copy_from_slice(ids);
    }
}

/// Sets in the cache of short pieces: 2 MiB.
const SHORT_SETS: usize = 1 << 15;

/// Largest number of ids of a piece in the cache of short pieces.
const SHORT_IDS: usize = 3;

/// Sets in the cache of longer pieces, such as words of two bytes per letter: 2 MiB.
const MEDIUM_SETS: usize = 1 << 14;

/// Largest number of ids of a piece in the cache of longer pieces.
const MEDIUM_IDS: usize = 7;

/// Longest piece in bytes that the cache of long pieces keeps.
const LONG: usize = 128;

/// Pieces in the cache of long pieces, before it is emptied: at most 16 MiB.
const LONG_PIECES: usize = 1 << 14;

/// Ids of pieces that were encoded before, for one thread at a time. Memory is bounded.
pub(super) struct Cache {
    /// Pieces of at most 15 bytes and 3 ids.
    short: SetCache<2, SHORT_IDS>,
    /// Other pieces of at most 31 bytes and 7 ids.
    medium: SetCache<4, MEDIUM_IDS>,
    long: HashMap<Box<[u8]>, Box<[u32]>>,
    work: Work,
}

impl Cache {
    pub(super) fn new() -> Cache {
        Cache {
            short: SetCache::new(SHORT_SETS),
            medium: SetCache::new(MEDIUM_SETS),
            long: HashMap::new(),
            work: Work::default(),
        }
    }

    /// Appends the ids of a piece. Returns false if they are not here.
    #[inline(always)]
    fn append(&mut self, piece: &[u8], into: &mut Vec<u32>) -> bool {
        if let Some(key) = Key::of(piece)
            && self.short.append(key, into)
        {
            return true;
        }
        match Key::of(piece) {
            Some(key) => self.medium.append(key, into),
            None => self.append_long(piece, into),
        }
    }

    fn insert(&mut self, piece: &[u8], ids: &[u32]) {
        let short = Key::of(piece).filter(|_| ids.len() <= SHORT_IDS);
        match (short, Key::of(piece)) {
            (Some(key), _) => self.short.insert(key, ids),
            (None, Some(key)) if ids.len() <= MEDIUM_IDS => self.medium.insert(key, ids),
            // Rare: most of its bytes are tokens of their own.
            (None, Some(_)) => (),
            (None, None) => self.insert_long(piece, ids),
        }
    }

    fn append_long(&self, piece: &[u8], into: &mut Vec<u32>) -> bool {
        if piece.len() > LONG {
            return false;
        }
        let ids = self.long.get(piece);
        into.extend(ids.into_iter().flatten());
        ids.is_some()
    }

    fn insert_long(&mut self, piece: &[u8], ids: &[u32]) {
        if piece.len() > LONG {
            return;
        }
        if self.long.len() >= LONG_PIECES {
            self.long.clear();
        }
        self.long.insert(piece.into(), ids.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Merges step by step, as BPE is defined.
    fn expected(merges: &[PairMerge], piece: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = piece.iter().map(|&byte| byte.into()).collect();
        loop {
            let merge = |at: usize| {
                let pair = |merge: &&PairMerge| [merge.left, merge.right] == ids[at..at + 2];
                merges.iter().rev().find(pair)
            };
            let candidates =
                (1..ids.len()).filter_map(|right| Some((merge(right - 1)?, right - 1)));
            let Some((merge, at)) = candidates.min_by_key(|(merge, at)| (merge.rank, *at)) else {
                return ids;
            };
            ids.splice(at..at + 2, [merge.id]);
        }
    }

    fn vocabulary(merges: &[PairMerge]) -> Vocabulary {
        let bytes = std::array::from_fn(|byte| (byte != 7).then_some(byte as u32));
        Vocabulary::new(bytes, merges.iter().copied(), None)
    }

    /// Merges among three bytes and earlier results, with ranks in any order.
    fn merges() -> impl Strategy<Value = Vec<PairMerge>> {
        let pairs = prop::collection::vec((0u32..20, 0u32..20, 0u32..1000), 0..20);
        pairs.prop_map(|pairs| {
            let id = |index: usize, choice: u32| match choice as usize % (3 + index) {
                byte @ 0..3 => b'a' as u32 + byte as u32,
                earlier => 256 + earlier as u32 - 3,
            };
            let merges = pairs.iter().enumerate().map(|(index, pair)| PairMerge {
                left: id(index, pair.0),
                right: id(index, pair.1),
                rank: pair.2 * 32 + index as u32,
                id: 256 + index as u32,
            });
            merges.collect()
        })
    }

    proptest! {
        #[test]
        fn merges_in_the_order_of_ranks(merges in merges(), piece in "[abc]{1,40}") {
            let vocabulary = vocabulary(&merges);
            let mut cache = Cache::new();
            // Short and long pieces take different ways.
            for piece in [piece.clone(), piece.repeat(4)] {
                let mut ids = Vec::new();
                for _ in 0..2 {
                    vocabulary.encode(piece.as_bytes(), &mut cache, &mut ids).unwrap();
                }
                let once = expected(&merges, piece.as_bytes());
                prop_assert_eq!(ids, [once.clone(), once].concat());
            }
        }
    }

    #[test]
    fn missing_bytes_are_an_error() {
        let mut ids = vec![1];
        let result = vocabulary(&[]).encode(b"a\x07", &mut Cache::new(), &mut ids);
        assert_eq!((result, ids), (Err(MissingByte(7)), vec![1]));
    }

    #[test]
    fn full_caches_still_answer() {
        let vocabulary = vocabulary(&[]);
        let mut cache = Cache::new();
        for number in 0..2 * LONG_PIECES {
            for piece in [
                format!("{number}"),
                format!("a longer piece {number}"),
                format!("{number:>40}"),
            ] {
                let mut ids = Vec::new();
                vocabulary
                    .encode(piece.as_bytes(), &mut cache, &mut ids)
                    .unwrap();
                let bytes: Vec<u32> = piece.bytes().map(u32::from).collect();
                assert_eq!(ids, bytes);
            }
        }
        assert!(cache.long.len() <= LONG_PIECES);
    }
}
