//! Bits per byte of text: an estimate that compares models with different tokenizers.

use crate::config::SourceConfig;
use dataset::info::DatasetInfo;
use std::f64::consts::LN_2;

/// Returns the bits per byte that `loss`, in nats per token, stands for in text of this many bytes
/// per token.
///
/// It is an estimate: `bytes_per_token` is a mean over whole files, and the loss one over the
/// sequences that were read.
pub(crate) fn bits_per_byte(loss: f64, bytes_per_token: f64) -> f64 {
    loss / LN_2 / bytes_per_token
}

/// Returns the mean bytes of text per token of a source, if `info` records them and all tokens
/// count in the loss: those that masks leave out have other lengths. `masks_ends` is true if the
/// tokens after the ends of documents do not count.
pub(crate) fn bytes_per_token(
    source: &SourceConfig,
    info: Option<&DatasetInfo>,
    masks_ends: bool,
) -> Option<f64> {
    let info = info.filter(|_| source.mask.is_none() && !masks_ends)?;
    info.bytes_per_token(&source.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataset::info::FileInfo;

    #[test]
    fn bits_are_those_of_the_text() {
        // 60 bytes in 20 tokens of 6 bits each: 120 bits in 60 bytes.
        let file = FileInfo {
            documents: 2,
            tokens: 20,
            bytes: 60,
            bin: String::new(),
            idx: String::new(),
        };
        let info = DatasetInfo {
            files: [("valid".to_string(), file)].into(),
            ..DatasetInfo::default()
        };
        let mut source = SourceConfig::new("data/valid");
        let bytes = bytes_per_token(&source, Some(&info), false).unwrap();
        assert_eq!(bytes, 3.0);
        assert!((bits_per_byte(64f64.ln(), bytes) - 2.0).abs() < 1e-12);
        assert_eq!(bytes_per_token(&source, None, false), None);
        assert_eq!(bytes_per_token(&source, Some(&info), true), None);
        source.mask = Some("data/mask".into());
        assert_eq!(bytes_per_token(&source, Some(&info), false), None);
    }
}
