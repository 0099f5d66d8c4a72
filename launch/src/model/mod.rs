//! `moerun model`: models of Hugging Face transformers.

pub(crate) mod export;
pub(crate) mod inspect;
