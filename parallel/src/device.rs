//! What a rank computes on. Nothing else in the project names a device.

use tch::{Device, Kind, Tensor};
use torch_ext::{Error, Stream};

/// Bytes that tensors hold on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Now.
    pub current: u64,
    /// The most so far.
    pub peak: u64,
}

/// Brings values out of a device's memory, on a thread of its own beside the computation.
pub trait Copier: Send {
    /// Copies the bytes of a contiguous tensor to host memory of that size; they are there when it returns.
    ///
    /// # Errors
    /// libtorch's message.
    fn copy(&mut self, tensor: &Tensor, into: &mut [u8]) -> Result<(), Error>;

    /// Copies a contiguous tensor into one of its shape and dtype in memory that [`Accelerator::staging`] gave.
    ///
    /// # Errors
    /// libtorch's message.
    fn fetch(&mut self, tensor: &Tensor, into: &Tensor) -> Result<(), Error>;
}

/// One device of one rank.
pub trait Accelerator: Send + Sync + std::fmt::Debug {
    /// `cpu`, `cuda:0`, ...
    fn name(&self) -> String;

    /// A tensor of zeros.
    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor;

    /// A tensor whose values are not set.
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor;

    /// A copy on this device of a tensor in host memory (the tensor itself where the device is the host).
    fn upload(&self, host: &Tensor) -> Tensor;

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// An asynchronous failure of earlier work.
    fn synchronize(&self) -> Result<(), Error>;

    /// State of the default random generator, `[bytes]` uint8 in host memory.
    ///
    /// # Errors
    /// libtorch's message.
    fn generator_state(&self) -> Result<Tensor, Error>;

    /// Puts back what [`Accelerator::generator_state`] gave.
    ///
    /// # Errors
    /// When the state belongs to another kind of device.
    fn set_generator_state(&self, state: &Tensor) -> Result<(), Error>;

    /// What tensors of this process hold there.
    ///
    /// # Errors
    /// When the figures cannot be read.
    fn memory(&self) -> Result<MemoryUse, Error>;

    /// Counts the most that tensors hold anew from here.
    ///
    /// # Errors
    /// As [`Accelerator::memory`].
    fn reset_peak(&self) -> Result<(), Error>;

    /// What copies state out of it. The thread that uses it is the one that first calls it.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn copier(&self) -> Result<Box<dyn Copier>, Error>;

    /// `[elements]` of host memory by way of which values come and go at full speed; they are not set.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn staging(&self, elements: i64, kind: Kind) -> Result<Tensor, Error>;

    /// The NUMA node that it is at, where it is at one and the system says so.
    fn numa_node(&self) -> Option<usize>;

    /// Whether copying takes processors that would compute.
    fn computes_on_host(&self) -> bool;
}

/// What `auto` is on this machine: `cuda` or `npu` where there is one, else `cpu`. Other kinds are what they are.
pub fn device_kind(kind: &str) -> &str {
    let there = |file: &str| std::path::Path::new(file).exists();
    match kind {
        "auto" if there("/dev/nvidiactl") => "cuda",
        "auto" if there("/dev/davinci_manager") => "npu",
        "auto" => "cpu",
        other => other,
    }
}

/// The device a rank uses: `cpu`, `cuda` or `npu` (the rank's local one), or `auto` (a GPU or NPU where there is one).
///
/// # Errors
/// When a GPU or NPU was asked for and cannot be used: why, and what to do.
pub fn accelerator(kind: &str, local_rank: usize) -> Result<Box<dyn Accelerator>, Error> {
    let own = |variable: &str| visible_index(local_rank, std::env::var(variable).ok().as_deref());
    match device_kind(kind) {
        "cpu" => {
            torch_ext::keep_freed_memory();
            torch_ext::count_host_memory()?;
            Ok(Box::new(Cpu))
        }
        "cuda" => Ok(Box::new(DiscreteDevice::cuda(own("CUDA_VISIBLE_DEVICES"))?)),
        "npu" => Ok(Box::new(DiscreteDevice::npu(own(
            "ASCEND_RT_VISIBLE_DEVICES",
        ))?)),
        other => Err(Error::new(format!(
            "unknown device {other:?}: use cpu, cuda, npu or auto"
        ))),
    }
}

/// Which of the GPUs or NPUs that a rank sees is its own: the one, where its launcher shows it no other (srun --gpus-per-task), else
/// the one with its local number.
fn visible_index(local_rank: usize, visible: Option<&str>) -> usize {
    match visible.map(|list| {
        list.split(',')
            .filter(|name| !name.trim().is_empty())
            .count()
    }) {
        Some(1) => 0,
        _ => local_rank,
    }
}

/// The host's processors.
#[derive(Debug, Clone, Copy)]
pub struct Cpu;

impl Accelerator for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }
    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::zeros(shape, (kind, Device::Cpu))
    }
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::empty(shape, (kind, Device::Cpu))
    }
    fn upload(&self, host: &Tensor) -> Tensor {
        host.shallow_clone()
    }
    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
    fn generator_state(&self) -> Result<Tensor, Error> {
        torch_ext::generator_state(Device::Cpu)
    }
    fn set_generator_state(&self, state: &Tensor) -> Result<(), Error> {
        torch_ext::set_generator_state(Device::Cpu, state)
    }
    fn memory(&self) -> Result<MemoryUse, Error> {
        torch_ext::count_host_memory()?;
        let (current, peak) = torch_ext::allocator_bytes(Device::Cpu)?;
        Ok(MemoryUse {
            current: current.max(0) as u64,
            peak: peak.max(0) as u64,
        })
    }
    fn reset_peak(&self) -> Result<(), Error> {
        torch_ext::reset_peak(Device::Cpu)
    }
    fn copier(&self) -> Result<Box<dyn Copier>, Error> {
        Ok(Box::new(HostCopier))
    }
    fn staging(&self, elements: i64, kind: Kind) -> Result<Tensor, Error> {
        Ok(self.empty(&[elements], kind))
    }
    fn numa_node(&self) -> Option<usize> {
        None
    }
    fn computes_on_host(&self) -> bool {
        true
    }
}

struct HostCopier;

impl Copier for HostCopier {
    fn copy(&mut self, tensor: &Tensor, into: &mut [u8]) -> Result<(), Error> {
        tensor
            .f_copy_data_u8(into, tensor.numel())
            .map_err(|e| Error::new(e.to_string()))
    }
    fn fetch(&mut self, tensor: &Tensor, into: &Tensor) -> Result<(), Error> {
        tch::no_grad(|| into.shallow_clone().f_copy_(tensor))
            .map(drop)
            .map_err(|e| Error::new(e.to_string()))
    }
}

/// The most host memory that this process had resident so far, in bytes: tensors, gaps between them, and all else.
///
/// # Errors
/// When the kernel does not say.
pub fn peak_resident() -> Result<u64, Error> {
    let status =
        std::fs::read_to_string("/proc/self/status").map_err(|e| Error::new(e.to_string()))?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| Error::new("/proc/self/status has no VmHWM"))
}

/// How `tch` reads an NPU, and asks for one: see [`torch_ext::load_npu`].
pub(crate) const NPU: Device = Device::Mps;

/// A device with memory of its own, whose kernels libtorch loads at run time: an NVIDIA GPU, or an Ascend NPU. Neither has been
/// run on hardware yet; the tests run an NPU's whole path against a library that has its interface on host memory.
#[derive(Debug, Clone, Copy)]
pub struct DiscreteDevice {
    device: Device,
    index: usize,
}

impl DiscreteDevice {
    /// Loads the CUDA library and takes GPU `index`.
    ///
    /// # Errors
    /// When the library cannot be loaded, or there is no such GPU.
    pub fn cuda(index: usize) -> Result<DiscreteDevice, Error> {
        torch_ext::load_cuda()?;
        let count = tch::Cuda::device_count();
        if (index as i64) < count {
            Ok(DiscreteDevice {
                device: Device::Cuda(index),
                index,
            })
        } else {
            Err(Error::new(format!(
                "GPU {index} was asked for and the driver shows {count}: start at most {count} ranks on this machine, \
                 or use device: cpu"
            )))
        }
    }

    /// Loads torch_npu's library and takes NPU `index`: one for a process.
    ///
    /// # Errors
    /// When the library cannot be loaded, or there is no such NPU.
    pub fn npu(index: usize) -> Result<DiscreteDevice, Error> {
        torch_ext::load_npu(index)?;
        Ok(DiscreteDevice { device: NPU, index })
    }
    fn device(&self) -> Device {
        self.device
    }
}

impl Accelerator for DiscreteDevice {
    fn name(&self) -> String {
        let kind = if self.device == NPU { "npu" } else { "cuda" };
        format!("{kind}:{}", self.index)
    }
    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::zeros(shape, (kind, self.device()))
    }
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::empty(shape, (kind, self.device()))
    }
    fn upload(&self, host: &Tensor) -> Tensor {
        host.to_device(self.device())
    }
    fn synchronize(&self) -> Result<(), Error> {
        torch_ext::synchronize(self.device())
    }
    fn generator_state(&self) -> Result<Tensor, Error> {
        torch_ext::generator_state(self.device())
    }
    fn set_generator_state(&self, state: &Tensor) -> Result<(), Error> {
        torch_ext::set_generator_state(self.device(), state)
    }
    fn memory(&self) -> Result<MemoryUse, Error> {
        let (current, peak) = torch_ext::allocator_bytes(self.device())?;
        Ok(MemoryUse {
            current: current.max(0) as u64,
            peak: peak.max(0) as u64,
        })
    }
    fn reset_peak(&self) -> Result<(), Error> {
        torch_ext::reset_peak(self.device())
    }
    fn copier(&self) -> Result<Box<dyn Copier>, Error> {
        Ok(Box::new(PinnedCopier {
            pinned: None,
            on_side_stream: false,
        }))
    }
    fn staging(&self, elements: i64, kind: Kind) -> Result<Tensor, Error> {
        let bytes = torch_ext::pinned(elements * kind.elt_size_in_bytes() as i64)?;
        bytes
            .f_view_dtype(kind)
            .map_err(|e| Error::new(e.to_string()))
    }
    fn numa_node(&self) -> Option<usize> {
        if self.device == NPU {
            return None;
        }
        let at = torch_ext::pci_bus_id(self.index).ok()?.to_lowercase();
        std::fs::read_to_string(format!("/sys/bus/pci/devices/{at}/numa_node"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }
    fn computes_on_host(&self) -> bool {
        false
    }
}

/// Bytes of a pinned buffer.
const PINNED_BYTES: i64 = 4 << 20;

/// By way of pinned memory, on a stream beside the one that computes. Its caller hands over tensors whose values are final:
/// the trainer waits for the device at the end of each step.
struct PinnedCopier {
    pinned: Option<Tensor>,
    on_side_stream: bool,
}

impl PinnedCopier {
    fn use_side_stream(&mut self, tensor: &Tensor) -> Result<(), Error> {
        if !self.on_side_stream {
            torch_ext::set_device(tensor)?;
            Stream::from_pool(tensor)?.make_current()?;
            self.on_side_stream = true;
        }
        Ok(())
    }
}

impl Copier for PinnedCopier {
    fn copy(&mut self, tensor: &Tensor, into: &mut [u8]) -> Result<(), Error> {
        if tensor.device() == Device::Cpu {
            return HostCopier.copy(tensor, into);
        }
        self.use_side_stream(tensor)?;
        let pinned = match self.pinned.take() {
            Some(pinned) => pinned,
            None => torch_ext::pinned(PINNED_BYTES)?,
        };
        let failed = |e: tch::TchError| Error::new(e.to_string());
        let bytes = tensor.f_view_dtype(Kind::Uint8).map_err(failed)?;
        for (index, part) in into.chunks_mut(PINNED_BYTES as usize).enumerate() {
            let len = part.len() as i64;
            let mut staged = pinned.narrow(0, 0, len);
            // A blocking copy waits for this thread's stream only.
            staged
                .f_copy_(
                    &bytes
                        .f_narrow(0, index as i64 * PINNED_BYTES, len)
                        .map_err(failed)?,
                )
                .map_err(failed)?;
            staged.f_copy_data_u8(part, part.len()).map_err(failed)?;
        }
        self.pinned = Some(pinned);
        Ok(())
    }

    fn fetch(&mut self, tensor: &Tensor, into: &Tensor) -> Result<(), Error> {
        self.use_side_stream(tensor)?;
        HostCopier.fetch(tensor, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_reports_its_memory() {
        Cpu.memory().unwrap();
        let _held = Cpu.zeros(&[1 << 20], Kind::Float);
        let memory = Cpu.memory().unwrap();
        assert!(
            memory.current >= 4 << 20 && memory.peak >= memory.current,
            "{memory:?}"
        );
        assert!(peak_resident().unwrap() > 16 << 20);
    }

    #[test]
    fn the_cpu_conforms() {
        // In a process of its own: others of these tests have tensors at the same time.
        const INSIDE: &str = "MOERUN_TEST_CPU_CONFORMS";
        if std::env::var_os(INSIDE).is_none() {
            let own = std::env::current_exe().unwrap();
            let mut again = std::process::Command::new(own);
            let output = again
                .args(["--exact", "device::tests::the_cpu_conforms"])
                .env(INSIDE, "1")
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stdout)
            );
            return;
        }
        let device = accelerator("cpu", 0).unwrap();
        for outcome in crate::conformance::accelerator(device.as_ref()) {
            assert_eq!(outcome.problem, None, "{}", outcome.name);
        }
    }

    #[test]
    fn a_rank_that_sees_one_gpu_takes_it() {
        assert_eq!(visible_index(3, None), 3);
        assert_eq!(visible_index(3, Some("0,1,2,3")), 3);
        assert_eq!(visible_index(3, Some("GPU-5ebe9f43")), 0);
        assert_eq!(visible_index(3, Some("")), 3);
    }

    #[test]
    fn an_unknown_device_is_refused() {
        assert!(
            accelerator("tpu", 0)
                .unwrap_err()
                .to_string()
                .contains("use cpu, cuda, npu or auto")
        );
    }
}
