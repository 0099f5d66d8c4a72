//! The messages and proofs of a handshake. Pure.

use super::{purpose::Purpose, secret::Secret};

/// The first bytes of both sides; the last is the version of the protocol.
pub(super) const MAGIC: &[u8; 8] = b"moerun\x00\x02";
/// The server's answer to a right proof.
pub(super) const ACCEPTED: &[u8; 8] = b"moerun\x00A";
/// The server's answer if a limit turns the client away.
pub(super) const BUSY: &[u8; 8] = b"moerun\x00B";
/// The server's answer to a wrong proof.
pub(super) const DENIED: &[u8; 8] = b"moerun\x00D";

/// Number of bytes that all messages of the protocol begin with.
pub(super) const MAGIC_LEN: usize = 8;
pub(super) const NONCE_LEN: usize = 32;
pub(super) const HELLO_LEN: usize = MAGIC_LEN + NONCE_LEN;
pub(super) const CLIENT_LEN: usize = HELLO_LEN + NONCE_LEN;

/// A side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

impl Side {
    fn name(self) -> &'static [u8] {
        match self {
            Side::Client => b"client",
            Side::Server => b"server",
        }
    }

    pub(super) fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

/// The nonces of a handshake, which make its proofs unique.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nonces {
    pub(super) server: [u8; NONCE_LEN],
    pub(super) client: [u8; NONCE_LEN],
}

impl Nonces {
    /// Returns the proof that `side` knows the secret.
    pub(super) fn proof(&self, secret: &Secret, purpose: Purpose, side: Side) -> blake3::Hash {
        self.hash(secret, b"proof", purpose, side)
    }

    /// Returns the key of the frames that `side` sends.
    pub(super) fn frame_key(&self, secret: &Secret, purpose: Purpose, side: Side) -> [u8; 32] {
        *self.hash(secret, b"frames", purpose, side).as_bytes()
    }

    fn hash(&self, secret: &Secret, use_: &[u8], purpose: Purpose, side: Side) -> blake3::Hash {
        let label = purpose.label.as_bytes();
        let parts = [use_, label, side.name(), &self.server, &self.client];
        secret.keyed_hash(&parts)
    }
}

/// True if the bytes are the proof. Comparing takes the same time wherever they differ.
pub(super) fn is_proof(expected: blake3::Hash, received: &[u8]) -> bool {
    let received: Result<[u8; 32], _> = received.try_into();
    received.is_ok_and(|received| expected == blake3::Hash::from_bytes(received))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_differ_by_secret_purpose_side_and_nonce() {
        let secret = Secret::random().unwrap();
        let nonces = Nonces {
            server: [1; 32],
            client: [2; 32],
        };
        let swapped = Nonces {
            server: [2; 32],
            client: [1; 32],
        };
        let proof = nonces.proof(&secret, Purpose::KEEPER, Side::Client);
        let others = [
            nonces.proof(&secret.derive("x"), Purpose::KEEPER, Side::Client),
            nonces.proof(&secret, Purpose::AGENT, Side::Client),
            nonces.proof(&secret, Purpose::KEEPER, Side::Server),
            swapped.proof(&secret, Purpose::KEEPER, Side::Client),
            swapped.proof(&secret, Purpose::KEEPER, Side::Server),
            nonces
                .frame_key(&secret, Purpose::KEEPER, Side::Client)
                .into(),
        ];
        for other in others {
            assert_ne!(proof, other);
            assert!(!is_proof(proof, other.as_bytes()));
        }
        assert!(is_proof(proof, proof.as_bytes()) && !is_proof(proof, b"short"));
    }
}
