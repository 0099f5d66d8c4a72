//! Purposes of ports: what a connection carries, and its bounds.

/// The encoding of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Bincode,
    /// For messages whose types bincode cannot read, such as ones with optional fields.
    Json,
}

/// The purpose of a port. A proof of the secret is valid for one purpose only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purpose {
    /// The name, which is part of every proof and of log lines.
    pub label: &'static str,
    /// The longest body of a frame in bytes, at most 256 MiB.
    pub max_frame_bytes: u32,
    pub encoding: Encoding,
    /// True if every frame is authenticated by the secret, not only the connection.
    pub sealed: bool,
}

impl Purpose {
    /// The TCP port of a keeper. Its longest messages are a chunk, and the checksums of all chunks
    /// of one rank's part.
    pub const KEEPER: Purpose = Purpose {
        label: "keeper",
        max_frame_bytes: 256 << 20,
        encoding: Encoding::Bincode,
        sealed: false,
    };
    /// The Unix socket of a keeper, for the ranks of its node. Its longest message is the header of
    /// a part with very many tensors.
    pub const RANK: Purpose = Purpose {
        label: "rank",
        max_frame_bytes: 256 << 20,
        encoding: Encoding::Bincode,
        sealed: false,
    };
    /// The store at which ranks find each other. Its longest message has the addresses of all
    /// ranks of a group.
    pub const STORE: Purpose = Purpose {
        label: "store",
        max_frame_bytes: 64 << 20,
        encoding: Encoding::Bincode,
        sealed: true,
    };
    /// The port of the launcher for the agents of other machines. Its messages start processes, so
    /// each is authenticated.
    pub const AGENT: Purpose = Purpose {
        label: "agent",
        max_frame_bytes: 16 << 20,
        encoding: Encoding::Json,
        sealed: true,
    };
}
