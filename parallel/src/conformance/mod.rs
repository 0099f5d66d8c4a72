//! Test suites that every [`Communicator`](crate::Communicator) and every
//! [`Accelerator`](crate::Accelerator) must pass.
//!
//! `moerun conformance` runs both on the hardware. The tests run them for every backend that needs
//! no special hardware.

mod accelerator;
mod communicator;
mod outcome;

pub use accelerator::accelerator;
pub use communicator::communicator;
pub use outcome::Outcome;
