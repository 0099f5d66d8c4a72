//! Which library carries what ranks tell each other.

use crate::ByMpi;
use crate::device::NPU;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device;

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NCCL for tensors of GPUs, HCCL for those of NPUs; for others the memory that ranks of one machine share, and between
    /// machines MPI where mpirun started the ranks, else Gloo.
    #[default]
    Auto,
    /// Gloo, over TCP, by way of the host's memory.
    Gloo,
    /// MPI: only for ranks that mpirun or its like started; by way of the host's memory.
    Mpi,
    /// NCCL, for ranks with GPUs.
    Nccl,
    /// HCCL, for ranks with NPUs.
    Hccl,
}

impl Backend {
    /// The name, as people write it.
    fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Gloo => "gloo",
            Backend::Mpi => "mpi",
            Backend::Nccl => "nccl",
            Backend::Hccl => "hccl",
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Backend, String> {
        let all = [
            Backend::Auto,
            Backend::Gloo,
            Backend::Mpi,
            Backend::Nccl,
            Backend::Hccl,
        ];
        let found = all.into_iter().find(|backend| backend.name() == text);
        found.ok_or_else(|| {
            format!("there is no backend {text:?}: use auto, gloo, mpi, nccl or hccl")
        })
    }
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Carriers {
    pub(crate) host: OnHost,
    /// Whether groups on one machine use its memory instead.
    pub(crate) shares: bool,
    /// For tensors that are not the host's; None where those go by way of its memory.
    pub(crate) device: Option<OnDevice>,
}

/// What carries tensors in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnHost {
    /// Gloo, over TCP.
    Gloo,
    /// MPI.
    Mpi,
}

/// What carries a device's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnDevice {
    /// NCCL.
    Nccl,
    /// HCCL.
    Hccl,
}

impl Carriers {
    /// The name, in messages.
    pub(crate) fn name(self) -> &'static str {
        match (self.device, self.host, self.shares) {
            (Some(OnDevice::Nccl), ..) => "nccl",
            (Some(OnDevice::Hccl), ..) => "hccl",
            (None, OnHost::Gloo, false) => "gloo",
            (None, OnHost::Mpi, false) => "mpi",
            (None, OnHost::Gloo, true) => "gloo (in a machine its memory)",
            (None, OnHost::Mpi, true) => "mpi (in a machine its memory)",
        }
    }
}

impl Backend {
    /// Decides, for ranks that MPI may have started, with tensors on `device`, in a program that has MPI in it or not.
    ///
    /// # Errors
    /// When the wish cannot be fulfilled: why, and what to do.
    pub(crate) fn decide(
        self,
        by_mpi: ByMpi,
        device: Device,
        has_mpi: bool,
    ) -> Result<Carriers, String> {
        let host = match (self, by_mpi, has_mpi) {
            (Backend::Gloo, ..) => OnHost::Gloo,
            (Backend::Mpi, ByMpi::Yes | ByMpi::Perhaps, true) => OnHost::Mpi,
            (Backend::Mpi, _, false) => {
                return Err(
                    "this moerun was built without MPI: run ./scripts/setup --mpi and build with \
                            --features mpi, or use run.communicator: gloo"
                        .into(),
                );
            }
            (Backend::Mpi, ByMpi::No, true) => {
                return Err(
                    "run.communicator is mpi and these ranks were not started by MPI: start \
                            'mpirun -n N moerun train ...', or use run.communicator: auto"
                        .into(),
                );
            }
            (_, ByMpi::Yes, true) => OnHost::Mpi,
            _ => OnHost::Gloo,
        };
        let device = match (self, device) {
            (Backend::Gloo | Backend::Mpi, _) | (Backend::Auto, Device::Cpu) => None,
            (Backend::Auto | Backend::Nccl, Device::Cuda(_)) => Some(OnDevice::Nccl),
            (Backend::Auto | Backend::Hccl, NPU) => Some(OnDevice::Hccl),
            (Backend::Auto, _) => None,
            (Backend::Nccl | Backend::Hccl, _) => {
                let (name, device) = if self == Backend::Nccl {
                    ("nccl", "cuda")
                } else {
                    ("hccl", "npu")
                };
                return Err(format!(
                    "run.communicator is {name}, which carries tensors of {device} alone, and these ranks have none: use \
                     run.device: {device}, or run.communicator: auto"
                ));
            }
        };
        Ok(Carriers {
            host,
            shares: !matches!(self, Backend::Gloo | Backend::Mpi),
            device,
        })
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
        let decide =
            |backend: Backend, by_mpi, has_mpi| backend.decide(by_mpi, Device::Cpu, has_mpi);
        let of = |host, shares| {
            Ok(Carriers {
                host,
                shares,
                device: None,
            })
        };
        assert_eq!(
            decide(Backend::Auto, ByMpi::Yes, true),
            of(OnHost::Mpi, true)
        );
        assert_eq!(
            decide(Backend::Auto, ByMpi::Yes, false),
            of(OnHost::Gloo, true)
        );
        assert_eq!(
            decide(Backend::Auto, ByMpi::Perhaps, true),
            of(OnHost::Gloo, true)
        );
        assert_eq!(
            decide(Backend::Mpi, ByMpi::Perhaps, true),
            of(OnHost::Mpi, false)
        );
        assert_eq!(
            decide(Backend::Auto, ByMpi::No, true),
            of(OnHost::Gloo, true)
        );
        assert_eq!(
            decide(Backend::Gloo, ByMpi::Yes, true),
            of(OnHost::Gloo, false)
        );
        assert!(
            decide(Backend::Mpi, ByMpi::No, true)
                .unwrap_err()
                .contains("mpirun -n N")
        );
        assert!(
            decide(Backend::Mpi, ByMpi::Yes, false)
                .unwrap_err()
                .contains("setup --mpi")
        );
    }

    #[test]
    fn a_device_has_its_vendors_library() {
        let decide = |backend: Backend, device| backend.decide(ByMpi::No, device, false);
        let of = |device| {
            Ok(Carriers {
                host: OnHost::Gloo,
                shares: true,
                device,
            })
        };
        assert_eq!(
            decide(Backend::Auto, Device::Cuda(3)),
            of(Some(OnDevice::Nccl))
        );
        assert_eq!(
            decide(Backend::Nccl, Device::Cuda(3)),
            of(Some(OnDevice::Nccl))
        );
        let gloo = Carriers {
            host: OnHost::Gloo,
            shares: false,
            device: None,
        };
        assert_eq!(decide(Backend::Gloo, Device::Cuda(3)), Ok(gloo));
        assert_eq!(decide(Backend::Auto, NPU), of(Some(OnDevice::Hccl)));
        assert!(
            decide(Backend::Nccl, Device::Cpu)
                .unwrap_err()
                .contains("run.device: cuda")
        );
        assert!(
            decide(Backend::Hccl, Device::Cuda(0))
                .unwrap_err()
                .contains("run.device: npu")
        );
        assert!(
            "rccl"
                .parse::<Backend>()
                .unwrap_err()
                .contains("nccl or hccl")
        );
    }
}
