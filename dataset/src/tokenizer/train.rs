//! Training of a byte-level BPE as in GPT-2, which can encode any text.

use super::{DocumentTokenizer, END_OF_DOCUMENT, patterns::last_cut};
use crate::{Error, char_boundary::floor_char_boundary, quiet_panic::without_panic};
use tokenizers::{
    AddedToken, TokenizerBuilder, models::bpe::BPE, models::bpe::BpeTrainerBuilder,
    pre_tokenizers::byte_level::ByteLevel,
};

/// Tokens of a byte-level BPE without any merge: 256 bytes and the end of a document.
const MIN_VOCABULARY: usize = 257;

/// Bytes of text to train on; what follows them is not read. Memory stays at a few hundred MiB.
pub const TRAINING_BYTES: usize = 64 << 20;

/// Texts are cut into parts of about this many bytes, because the library needs some hundred bytes
/// of memory for each.
const PART: usize = 1 << 16;

/// Trains a tokenizer on the first [`TRAINING_BYTES`] of the texts. Also returns how many bytes it
/// was trained on.
///
/// # Errors
/// If the vocabulary is smaller than the 256 bytes and the end of a document.
pub fn train<S: AsRef<str> + Send>(
    texts: impl Iterator<Item = S> + Send,
    vocab_size: usize,
) -> Result<(DocumentTokenizer, usize), Error> {
    train_on(texts, vocab_size, TRAINING_BYTES)
}

fn train_on<S: AsRef<str> + Send>(
    texts: impl Iterator<Item = S> + Send,
    vocab_size: usize,
    limit: usize,
) -> Result<(DocumentTokenizer, usize), Error> {
    if vocab_size < MIN_VOCABULARY {
        return Err(Error::Options(format!(
            "--vocab-size {vocab_size} is less than the 256 bytes and the end of a document \
             that every byte-level tokenizer has"
        )));
    }
    let failed =
        |error: String| Error::Tokenizer(format!("training the tokenizer failed: {error}"));
    let library = |error: tokenizers::Error| failed(error.to_string());
    let byte_level = ByteLevel::new(false, true, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(library)?;
    let mut bytes = 0;
    let parts = texts
        .flat_map(|text| parts(text.as_ref()))
        .take_while(|part| {
            let wanted = bytes < limit;
            if wanted {
                bytes += part.len();
            }
            wanted
        });
    without_panic(|| tokenizer.train(&mut trainer, parts).map(|_| ()))
        .map_err(failed)?
        .map_err(library)?;
    let json = tokenizer.to_string(false).map_err(library)?;
    let loaded = DocumentTokenizer::of_json(&json, &Default::default())?;
    Ok((loaded.0, bytes))
}

/// Cuts a text into parts that have the words of the whole. Without a place to cut, a part ends
/// somewhere, and one word counts as two.
fn parts(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > PART {
        let end = floor_char_boundary(rest, PART);
        let cut = last_cut(&rest[..end], |_| true).unwrap_or(end);
        parts.push(rest[..cut].to_owned());
        rest = &rest[cut..];
    }
    parts.push(rest.to_owned());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_train_as_their_words() {
        let text = "some words to learn, and 123 numbers\n".repeat(4000);
        assert!(parts(&text).len() > 1 && parts(&text).concat() == text);
        let long = train([&text].into_iter(), 300).unwrap();
        let short = train(text.split_inclusive('\n'), 300).unwrap();
        assert_eq!((long.0.json(), long.1), (short.0.json(), short.1));
        assert_eq!(long.1, text.len());
    }

    #[test]
    fn the_sample_is_bounded() {
        let trained = train_on(["xy ", "xy ", "z z", "z z"].into_iter().cycle(), 300, 6).unwrap();
        assert_eq!(trained.1, 6);
        assert!(trained.0.json().contains("xy") && !trained.0.json().contains("Ġz"));
    }
}
