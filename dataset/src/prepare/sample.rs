//! The sample of a corpus on which a tokenizer is trained.

use super::documents::stop;
use crate::{
    Error,
    char_boundary::floor_char_boundary,
    input::{InputCounts, InputFile, InputOptions},
    tokenizer::TRAINING_BYTES,
};

/// Size of a sample.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// Most text, in bytes. The last text is taken whole.
    total: u64,
    /// Most text of a document or a part of it, in bytes.
    each: usize,
}

/// The sample on which a tokenizer is trained.
pub(super) const TRAINING_SAMPLE: Size = Size {
    total: TRAINING_BYTES as u64,
    each: usize::MAX,
};

/// The sample on which two encoders are compared.
pub(super) const CHECKED_SAMPLE: Size = Size {
    total: 1 << 20,
    each: 64 << 10,
};

/// Returns text of the corpus: all of a small one, otherwise as much as `size` allows.
///
/// Each file gives text from its beginning, in proportion to its size on disk, so that a corpus
/// sorted by source is represented as a whole. `limit` bounds the text of the corpus as `--max-mb`
/// does.
pub(super) fn sample(
    files: &[InputFile],
    options: &InputOptions,
    limit: Option<u64>,
    size: Size,
) -> Result<Vec<String>, Error> {
    let sizes: Vec<u64> = files.iter().map(|file| file.bytes().unwrap_or(0)).collect();
    let quotas = quotas(&sizes, size.total);
    let limit = limit.unwrap_or(u64::MAX);
    let mut texts: Vec<String> = Vec::new();
    let mut taken = 0u64;
    for (file, quota) in files.iter().zip(quotas) {
        let quota = quota.min(limit);
        if taken >= quota {
            continue;
        }
        let mut is_full = false;
        let mut counts = InputCounts::default();
        let read = file.read(options, &mut counts, &mut |piece| {
            let text = &piece.text[..floor_char_boundary(piece.text, size.each)];
            taken += text.len() as u64;
            if !text.trim().is_empty() {
                texts.push(text.to_string());
            }
            is_full = taken >= quota;
            if is_full { Err(stop()) } else { Ok(()) }
        });
        if !is_full {
            read?;
        }
    }
    Ok(texts)
}

/// Returns for each file the bytes of text that it and the files before it may give.
fn quotas(sizes: &[u64], sample: u64) -> Vec<u64> {
    let total: u128 = sizes.iter().map(|&size| u128::from(size)).sum();
    let mut before = 0u128;
    let quota = |&size: &u64| {
        before += u128::from(size);
        let share = u128::from(sample) * before / total.max(1);
        u64::try_from(share).unwrap_or(u64::MAX)
    };
    sizes.iter().map(quota).collect()
}

#[cfg(test)]
mod tests {
    use super::quotas;

    #[test]
    fn each_file_gives_its_share() {
        assert_eq!(quotas(&[10, 30, 0, 60], 50), [5, 20, 20, 50]);
        assert_eq!(quotas(&[1, 1], 1000), [500, 1000]);
        assert_eq!(quotas(&[0, 0], 1000), [0, 0]);
    }
}
