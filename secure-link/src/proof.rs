//! The messages and proofs of a handshake. Pure.

use super::{purpose::Purpose, secret::Secret, socket::Endpoint};

/// The first bytes of both sides; the last is the version of the protocol.
pub(super) const MAGIC: &[u8; 8] = b"moerun\x00\x03";
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

/// The data that make the proofs of a handshake unique.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session {
    /// Nonce of the server.
    pub(super) server: [u8; NONCE_LEN],
    /// Nonce of the client.
    pub(super) client: [u8; NONCE_LEN],
    /// The address that the client dialed. A process that relays the handshake of a client to
    /// another server has an address of its own, so that both sides hash different ones.
    pub(super) endpoint: Endpoint,
}

impl Session {
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
        let endpoint = self.endpoint.to_bytes();
        let parts = [
            use_,
            label,
            side.name(),
            &endpoint,
            &self.server,
            &self.client,
        ];
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
    fn proofs_differ_by_secret_purpose_side_nonce_and_address() {
        let secret = Secret::random().unwrap();
        let session = Session {
            server: [1; 32],
            client: [2; 32],
            endpoint: Endpoint::Tcp("10.0.0.7:5".parse().unwrap()),
        };
        let swapped = Session {
            server: [2; 32],
            client: [1; 32],
            ..session
        };
        let mut other_ip = session;
        other_ip.endpoint = Endpoint::Tcp("10.0.0.8:5".parse().unwrap());
        let mut other_port = session;
        other_port.endpoint = Endpoint::Tcp("10.0.0.7:6".parse().unwrap());
        let mut local = session;
        local.endpoint = Endpoint::Local;
        let proof = session.proof(&secret, Purpose::KEEPER, Side::Client);
        let others = [
            other_ip.proof(&secret, Purpose::KEEPER, Side::Client),
            other_port.proof(&secret, Purpose::KEEPER, Side::Client),
            local.proof(&secret, Purpose::KEEPER, Side::Client),
            session.proof(&secret.derive("x"), Purpose::KEEPER, Side::Client),
            session.proof(&secret, Purpose::AGENT, Side::Client),
            session.proof(&secret, Purpose::KEEPER, Side::Server),
            swapped.proof(&secret, Purpose::KEEPER, Side::Client),
            swapped.proof(&secret, Purpose::KEEPER, Side::Server),
            session
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
