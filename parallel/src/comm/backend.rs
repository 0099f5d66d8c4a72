//! Which library carries what ranks tell each other.

use crate::ByMpi;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// MPI for ranks that mpirun started, Gloo for others.
    #[default]
    Auto,
    /// Gloo, over TCP.
    Gloo,
    /// MPI: only for ranks that mpirun or its like started.
    Mpi,
}

impl std::str::FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Backend, String> {
        match text {
            "auto" => Ok(Backend::Auto),
            "gloo" => Ok(Backend::Gloo),
            "mpi" => Ok(Backend::Mpi),
            other => Err(format!("there is no backend {other:?}: use auto, gloo or mpi")),
        }
    }
}

/// What it becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// Gloo, over TCP.
    Gloo,
    /// MPI.
    Mpi,
}

impl Carrier {
    /// The name, in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Carrier::Gloo => "gloo",
            Carrier::Mpi => "mpi",
        }
    }
}

impl Backend {
    /// Decides, for ranks that MPI may have started, in a program that has MPI in it or not.
    ///
    /// # Errors
    /// When the wish cannot be fulfilled: why, and what to do.
    pub(crate) fn decide(self, by_mpi: ByMpi, has_mpi: bool) -> Result<Carrier, String> {
        match (self, by_mpi, has_mpi) {
            (Backend::Auto, ByMpi::Yes, true) | (Backend::Mpi, ByMpi::Yes | ByMpi::Perhaps, true) => Ok(Carrier::Mpi),
            (Backend::Auto | Backend::Gloo, ..) => Ok(Carrier::Gloo),
            (Backend::Mpi, _, false) => {
                Err("this moerun was built without MPI: run ./scripts/setup --mpi and build with \
                 --features mpi, or use run.communicator: gloo"
                    .into())
            }
            (Backend::Mpi, ByMpi::No, true) => {
                Err("run.communicator is mpi and these ranks were not started by MPI: start \
                 'mpirun -n N moerun train ...', or use run.communicator: auto"
                    .into())
            }
        }
    }
}

/// The MPI library that is built in, as it calls itself; None where none is.
pub fn mpi_library() -> Option<String> {
    #[cfg(feature = "mpi")]
    return Some(super::mpi::library());
    #[cfg(not(feature = "mpi"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpi_is_taken_where_it_started_the_ranks() {
        assert_eq!(Backend::Auto.decide(ByMpi::Yes, true), Ok(Carrier::Mpi));
        assert_eq!(Backend::Auto.decide(ByMpi::Yes, false), Ok(Carrier::Gloo));
        assert_eq!(Backend::Auto.decide(ByMpi::Perhaps, true), Ok(Carrier::Gloo));
        assert_eq!(Backend::Mpi.decide(ByMpi::Perhaps, true), Ok(Carrier::Mpi));
        assert_eq!(Backend::Auto.decide(ByMpi::No, true), Ok(Carrier::Gloo));
        assert_eq!(Backend::Gloo.decide(ByMpi::Yes, true), Ok(Carrier::Gloo));
        assert!(Backend::Mpi.decide(ByMpi::No, true).unwrap_err().contains("mpirun -n N"));
        assert!(Backend::Mpi.decide(ByMpi::Yes, false).unwrap_err().contains("setup --mpi"));
    }
}
