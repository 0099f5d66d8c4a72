//! The secret of a run, and secrets derived from it.

use super::error::Error;
use serde::{Deserialize, Serialize};

/// Fewest characters of a user's own token.
const MIN_TOKEN_CHARS: usize = 16;

/// The key by which the processes of a run authenticate each other. It is serialized as text.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Secret([u8; 32]);

impl Secret {
    /// Generates a secret for a run.
    ///
    /// # Errors
    /// If the system has no random bytes.
    pub fn random() -> Result<Secret, Error> {
        Ok(Secret(random_bytes()?))
    }

    /// Returns the secret as text, for processes that have to know it.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Parses the text of [`Secret::to_hex`].
    pub fn from_hex(text: &str) -> Option<Secret> {
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let digits = text.get(2 * index..2 * index + 2)?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        Some(Secret(bytes))
    }

    /// Returns the secret that a user's token stands for: any text of at least 16 characters. The
    /// text of [`Secret::to_hex`] is the secret itself.
    pub fn from_token(token: &str) -> Option<Secret> {
        let token = token.trim();
        if token.chars().count() < MIN_TOKEN_CHARS {
            return None;
        }
        let derive = || Secret(blake3::derive_key("moerun token", token.as_bytes()));
        Some(Secret::from_hex(token).unwrap_or_else(derive))
    }

    /// Returns another secret, which every process that knows this one can compute: for instance
    /// that of the keepers from that of the machines. It does not reveal this one.
    pub fn derive(&self, label: &str) -> Secret {
        Secret(*self.keyed_hash(&[b"derive", label.as_bytes()]).as_bytes())
    }

    /// Returns a name for the run that does not reveal the secret.
    pub fn name(&self) -> String {
        blake3::keyed_hash(&self.0, b"name").to_hex()[..16].to_string()
    }

    /// Returns the keyed hash of `parts`, each with its length before it.
    pub(super) fn keyed_hash(&self, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize()
    }
}

// Comparing hashes takes the same time wherever they differ.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for Secret {}

impl From<Secret> for String {
    fn from(secret: Secret) -> String {
        secret.to_hex()
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Secret, &'static str> {
        Secret::from_hex(&text).ok_or("a secret has 64 hexadecimal digits")
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret")
    }
}

/// Returns 32 bytes that cannot be predicted.
pub(super) fn random_bytes() -> Result<[u8; 32], Error> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| Error::Protocol(format!("no random bytes: {e}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_read_back_from_text() {
        let secret = Secret::random().unwrap();
        assert_eq!(Secret::from_hex(&secret.to_hex()), Some(secret));
        assert_eq!(Secret::from_hex("12"), None);
        assert_eq!(Secret::from_hex(&"é".repeat(32)), None);
        assert_eq!(Secret::from_hex(&"+1".repeat(32)), None);
    }

    #[test]
    fn tokens_and_labels_give_different_secrets() {
        let secret = Secret::from_token("a token of a user").unwrap();
        assert_eq!(
            Secret::from_token(" a token of a user\n"),
            Some(secret.clone())
        );
        assert_eq!(Secret::from_token(&secret.to_hex()), Some(secret.clone()));
        assert_eq!(Secret::from_token("too short"), None);
        assert_ne!(secret.derive("keepers"), secret.derive("agents"));
        assert_ne!(secret.derive("keepers"), secret);
        assert_eq!(format!("{secret:?}"), "Secret");
    }
}
