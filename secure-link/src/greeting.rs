//! The server's side of a handshake as a value without input or output.

use super::{
    proof::{self, ACCEPTED, CLIENT_LEN, HELLO_LEN, MAGIC, MAGIC_LEN, NONCE_LEN, Session, Side},
    purpose::Purpose,
    refusals::Refusal,
    secret::Secret,
    socket::Endpoint,
};

/// A client that has not proven the secret yet.
#[derive(Debug)]
pub(super) struct Greeting {
    nonce: [u8; NONCE_LEN],
    endpoint: Endpoint,
    received: [u8; CLIENT_LEN],
    len: usize,
}

/// The answer to bytes of a client.
#[derive(Debug)]
pub(super) enum Verdict {
    /// More bytes are needed.
    Incomplete,
    Accepted(Session),
    Refused(Refusal),
}

impl Greeting {
    /// Begins the handshake of a client that has dialed `endpoint`.
    pub(super) fn new(nonce: [u8; NONCE_LEN], endpoint: Endpoint) -> Greeting {
        Greeting {
            nonce,
            endpoint,
            received: [0; CLIENT_LEN],
            len: 0,
        }
    }

    /// Returns the server's first message.
    pub(super) fn hello(&self) -> [u8; HELLO_LEN] {
        let mut hello = [0; HELLO_LEN];
        hello[..MAGIC_LEN].copy_from_slice(MAGIC);
        hello[MAGIC_LEN..].copy_from_slice(&self.nonce);
        hello
    }

    /// Returns the place of the bytes that the client has yet to send.
    pub(super) fn missing(&mut self) -> &mut [u8] {
        &mut self.received[self.len..]
    }

    /// Records that `len` more bytes were received.
    pub(super) fn receive(&mut self, len: usize, secret: &Secret, purpose: Purpose) -> Verdict {
        self.len = (self.len + len).min(CLIENT_LEN);
        let begun = self.len.min(MAGIC_LEN);
        if self.received[..begun] != MAGIC[..begun] {
            return Verdict::Refused(Refusal::Malformed);
        }
        if self.len < CLIENT_LEN {
            return Verdict::Incomplete;
        }
        let mut client = [0; NONCE_LEN];
        client.copy_from_slice(&self.received[MAGIC_LEN..HELLO_LEN]);
        let session = Session {
            server: self.nonce,
            client,
            endpoint: self.endpoint,
        };
        let expected = session.proof(secret, purpose, Side::Client);
        if !proof::is_proof(expected, &self.received[HELLO_LEN..]) {
            return Verdict::Refused(Refusal::Unauthenticated);
        }
        Verdict::Accepted(session)
    }
}

/// Returns the server's last message.
pub(super) fn acceptance(session: &Session, secret: &Secret, purpose: Purpose) -> [u8; HELLO_LEN] {
    let mut message = [0; HELLO_LEN];
    message[..MAGIC_LEN].copy_from_slice(ACCEPTED);
    let proof = session.proof(secret, purpose, Side::Server);
    message[MAGIC_LEN..].copy_from_slice(proof.as_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret() -> Secret {
        Secret::from_hex(&"5a".repeat(32)).unwrap()
    }

    fn client_message(greeting: &Greeting, purpose: Purpose) -> Vec<u8> {
        let session = Session {
            server: greeting.nonce,
            client: [9; NONCE_LEN],
            endpoint: greeting.endpoint,
        };
        let proof = session.proof(&secret(), purpose, Side::Client);
        [MAGIC.as_slice(), &session.client, proof.as_bytes()].concat()
    }

    fn feed(greeting: &mut Greeting, bytes: &[u8]) -> Verdict {
        let missing = greeting.missing();
        let len = bytes.len().min(missing.len());
        missing[..len].copy_from_slice(&bytes[..len]);
        greeting.receive(len, &secret(), Purpose::KEEPER)
    }

    proptest! {
        #[test]
        fn a_proof_may_arrive_in_any_pieces(cuts in prop::collection::vec(1usize..30, 1..20)) {
            let mut greeting = Greeting::new([7; NONCE_LEN], Endpoint::Local);
            let message = client_message(&greeting, Purpose::KEEPER);
            let mut rest = message.as_slice();
            for cut in cuts {
                let piece = rest.split_off(..cut.min(rest.len())).unwrap();
                match feed(&mut greeting, piece) {
                    Verdict::Accepted(_) => prop_assert!(rest.is_empty()),
                    Verdict::Incomplete => prop_assert!(!rest.is_empty()),
                    Verdict::Refused(refusal) => panic!("{refusal:?}"),
                }
                if rest.is_empty() {
                    break;
                }
            }
        }

        #[test]
        fn a_changed_byte_is_refused(at in 0usize..CLIENT_LEN, flip in 1u8..) {
            let mut greeting = Greeting::new([7; NONCE_LEN], Endpoint::Local);
            let mut message = client_message(&greeting, Purpose::KEEPER);
            message[at] ^= flip;
            let verdict = feed(&mut greeting, &message);
            prop_assert!(matches!(verdict, Verdict::Refused(_)));
        }
    }

    #[test]
    fn a_proof_for_another_purpose_or_sent_back_is_refused() {
        let mut greeting = Greeting::new([7; NONCE_LEN], Endpoint::Local);
        let message = client_message(&greeting, Purpose::AGENT);
        let verdict = feed(&mut greeting, &message);
        let refused = Refusal::Unauthenticated;
        assert!(matches!(verdict, Verdict::Refused(refusal) if refusal == refused));

        // A client that repeats the server's own nonce and proof.
        let mut greeting = Greeting::new([7; NONCE_LEN], Endpoint::Local);
        let session = Session {
            server: [7; NONCE_LEN],
            client: [7; NONCE_LEN],
            endpoint: greeting.endpoint,
        };
        let acceptance = acceptance(&session, &secret(), Purpose::KEEPER);
        let reflected = [greeting.hello().as_slice(), &acceptance[MAGIC_LEN..]].concat();
        let verdict = feed(&mut greeting, &reflected);
        assert!(matches!(verdict, Verdict::Refused(refusal) if refusal == refused));
    }
}
