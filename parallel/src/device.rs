//! Devices. No other file of the project names one.

use tch::{Device, Kind, Tensor};
use torch_ext::{Error, Priority, Stream};

/// Bytes that tensors hold on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    pub current: u64,
    /// The maximum since the start or [`Accelerator::reset_peak`].
    pub peak: u64,
}

/// Copies tensors out of a device's memory, on a thread of its own while the device computes.
pub trait Copier: Send {
    /// Copies the bytes of a contiguous tensor to host memory of the same size, and waits for them.
    ///
    /// # Errors
    /// libtorch's message.
    fn copy(&mut self, tensor: &Tensor, into: &mut [u8]) -> Result<(), Error>;

    /// Copies a contiguous tensor into one of the same shape and dtype from
    /// [`Accelerator::staging`].
    ///
    /// # Errors
    /// libtorch's message.
    fn fetch(&mut self, tensor: &Tensor, into: &Tensor) -> Result<(), Error>;
}

/// The device of a rank.
pub trait Accelerator: Send + Sync + std::fmt::Debug {
    /// Returns the name, such as `cpu` or `cuda:0`.
    fn name(&self) -> String;

    /// Returns a tensor of zeros.
    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor;

    /// Returns an uninitialized tensor.
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor;

    /// Copies a tensor from host memory to this device. On the CPU, returns the tensor itself.
    ///
    /// On other devices the copy is queued on the current stream; the host waits for large tensors
    /// only. The caller may change `host` afterwards.
    fn upload(&self, host: &Tensor) -> Tensor;

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// If earlier work failed.
    fn synchronize(&self) -> Result<(), Error>;

    /// Returns the state of the default random generator, `[bytes]` uint8 in host memory.
    ///
    /// # Errors
    /// libtorch's message.
    fn generator_state(&self) -> Result<Tensor, Error>;

    /// Restores a state from [`Accelerator::generator_state`].
    ///
    /// # Errors
    /// If the state belongs to another kind of device.
    fn set_generator_state(&self, state: &Tensor) -> Result<(), Error>;

    /// Returns the memory that this process's tensors hold on the device.
    ///
    /// # Errors
    /// If the figures cannot be read.
    fn memory(&self) -> Result<MemoryUse, Error>;

    /// Resets [`MemoryUse::peak`] to the current use.
    ///
    /// # Errors
    /// As for [`Accelerator::memory`].
    fn reset_peak(&self) -> Result<(), Error>;

    /// Returns a copier; it belongs to the thread that first uses it, whose current device becomes
    /// this one.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn copier(&self) -> Result<Box<dyn Copier>, Error>;

    /// Allocates an uninitialized `[elements]` in host memory that the device copies at full speed.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn staging(&self, elements: i64, kind: Kind) -> Result<Tensor, Error>;

    /// Returns the NUMA node of the device, if it has one and the system tells.
    fn numa_node(&self) -> Option<usize>;

    /// True if the device is the host's processors, so that copying competes with computing.
    fn computes_on_host(&self) -> bool;

    /// Loads all kernels of our own for the device. Without them libtorch's operations run, with a
    /// warning in the log.
    fn load_kernels(&self);

    /// Returns the compute capability of an NVIDIA GPU, such as `(9, 0)`, and None for other
    /// devices.
    ///
    /// # Errors
    /// If the driver does not know the GPU.
    fn compute_capability(&self) -> Result<Option<(i32, i32)>, Error>;
}

/// Resolves `auto` to `cuda`, `npu` or `cpu`, whichever this machine has; returns other kinds as
/// is.
pub fn device_kind(kind: &str) -> &str {
    let exists = |file: &str| std::path::Path::new(file).exists();
    match kind {
        "auto" if exists("/dev/nvidiactl") => "cuda",
        "auto" if exists("/dev/davinci_manager") => "npu",
        "auto" => "cpu",
        other => other,
    }
}

/// Opens the device of a rank: `cpu`, `cuda`, `npu` or `auto` (see [`device_kind`]).
///
/// # Errors
/// If a GPU or NPU was requested and cannot be used; the message has a hint.
pub fn accelerator(kind: &str, local_rank: usize) -> Result<Box<dyn Accelerator>, Error> {
    let index = |variable: &str| {
        let visible = std::env::var(variable).ok();
        visible_index(local_rank, visible.as_deref())
    };
    torch_ext::keep_freed_memory();
    match device_kind(kind) {
        "cpu" => {
            torch_ext::count_host_memory()?;
            Ok(Box::new(Cpu))
        }
        "cuda" => {
            let gpu = DiscreteDevice::cuda(index("CUDA_VISIBLE_DEVICES"))?;
            Ok(Box::new(gpu))
        }
        "npu" => {
            let npu = DiscreteDevice::npu(index("ASCEND_RT_VISIBLE_DEVICES"))?;
            Ok(Box::new(npu))
        }
        other => {
            let message = format!("unknown device {other:?}: use cpu, cuda, npu or auto");
            Err(Error::new(message))
        }
    }
}

/// Loads the library of a kind of device, and compiles kernels for the GPUs of this machine into
/// the cache on disk. Uses no device, so a process that has no rank yet can do it.
///
/// # Errors
/// If the library cannot be loaded, as [`accelerator`] will report, or the kernels cannot be
/// compiled.
pub fn load_ahead(kind: &str) -> Result<(), Error> {
    match device_kind(kind) {
        "cuda" => {
            torch_ext::load_cuda()?;
            kernels::compile_gpu_kernels().map_err(Error::new)
        }
        "npu" => torch_ext::load_npu_library().map(drop),
        _ => Ok(()),
    }
}

/// Returns the index of a rank's device among the visible ones.
///
/// It is the local rank, unless the launcher made one device visible per rank (srun
/// --gpus-per-task).
fn visible_index(local_rank: usize, visible: Option<&str>) -> usize {
    let names = visible.unwrap_or_default().split(',');
    let count = names.filter(|name| !name.trim().is_empty()).count();
    if count == 1 { 0 } else { local_rank }
}

/// The processors of the host.
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
    fn load_kernels(&self) {}
    fn compute_capability(&self) -> Result<Option<(i32, i32)>, Error> {
        Ok(None)
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

/// Returns the peak resident host memory of this process in bytes, including what is not tensors.
///
/// # Errors
/// If the kernel does not report it.
pub fn peak_resident() -> Result<u64, Error> {
    let status =
        std::fs::read_to_string("/proc/self/status").map_err(|e| Error::new(e.to_string()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| Error::new("/proc/self/status: no VmHWM"))
}

/// The device that stands for an NPU, which `tch` cannot name: see [`torch_ext::load_npu`].
pub(crate) const NPU: Device = Device::Mps;

/// A device with its own memory, whose kernels libtorch loads at run time: an NVIDIA GPU or an
/// Ascend NPU.
///
/// Neither has run on hardware yet. The tests run the NPU path against a library that implements
/// its interface in host memory.
#[derive(Debug, Clone, Copy)]
pub struct DiscreteDevice {
    device: Device,
    index: usize,
}

impl DiscreteDevice {
    /// Loads the CUDA library and opens GPU `index`. It becomes the current device of the calling
    /// thread.
    ///
    /// # Errors
    /// If the library cannot be loaded, or there is no such GPU.
    pub fn cuda(index: usize) -> Result<DiscreteDevice, Error> {
        torch_ext::load_cuda()?;
        let count = tch::Cuda::device_count();
        if index as i64 >= count {
            return Err(Error::new(format!(
                "GPU {index} was requested, but the driver has {count}: start at most {count} \
                 ranks on this machine, or use run.device: cpu"
            )));
        }
        let device = Device::Cuda(index);
        torch_ext::use_device(device)?;
        Ok(DiscreteDevice { device, index })
    }

    /// Loads torch_npu's library and opens NPU `index`, the only one that this process may use. It
    /// becomes the current device of the calling thread.
    ///
    /// # Errors
    /// If the library cannot be loaded, or there is no such NPU.
    pub fn npu(index: usize) -> Result<DiscreteDevice, Error> {
        torch_ext::load_npu(index)?;
        torch_ext::use_device(NPU)?;
        Ok(DiscreteDevice { device: NPU, index })
    }
}

/// Largest tensor, in bytes, that goes to a device through page-locked memory. libtorch never
/// returns such memory to the system.
const QUEUED_BYTES: usize = 16 << 20;

impl DiscreteDevice {
    /// Copies a tensor to page-locked memory. Returns `None` if the tensor is empty or large, or if
    /// such memory is exhausted.
    fn pinned_copy(&self, host: &Tensor) -> Option<Tensor> {
        let bytes = host.numel() * host.kind().elt_size_in_bytes();
        if !(1..=QUEUED_BYTES).contains(&bytes) {
            return None;
        }
        let staging = self.staging(host.numel() as i64, host.kind()).ok()?;
        let mut pinned = staging.f_view(host.size().as_slice()).ok()?;
        tch::no_grad(|| pinned.f_copy_(host)).ok()?;
        Some(pinned)
    }
}

impl Accelerator for DiscreteDevice {
    fn name(&self) -> String {
        let kind = if self.device == NPU { "npu" } else { "cuda" };
        format!("{kind}:{}", self.index)
    }
    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::zeros(shape, (kind, self.device))
    }
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::empty(shape, (kind, self.device))
    }
    fn upload(&self, host: &Tensor) -> Tensor {
        match self.pinned_copy(host) {
            // libtorch reuses the page-locked memory only after the copy.
            Some(pinned) => pinned.to_device_(self.device, host.kind(), true, false),
            None => host.to_device(self.device),
        }
    }
    fn synchronize(&self) -> Result<(), Error> {
        torch_ext::use_device(self.device)?;
        torch_ext::synchronize(self.device)
    }
    fn generator_state(&self) -> Result<Tensor, Error> {
        torch_ext::generator_state(self.device)
    }
    fn set_generator_state(&self, state: &Tensor) -> Result<(), Error> {
        torch_ext::set_generator_state(self.device, state)
    }
    fn memory(&self) -> Result<MemoryUse, Error> {
        let (current, peak) = torch_ext::allocator_bytes(self.device)?;
        Ok(MemoryUse {
            current: current.max(0) as u64,
            peak: peak.max(0) as u64,
        })
    }
    fn reset_peak(&self) -> Result<(), Error> {
        torch_ext::reset_peak(self.device)
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
        let address = torch_ext::pci_bus_id(self.index).ok()?.to_lowercase();
        let file = format!("/sys/bus/pci/devices/{address}/numa_node");
        let node = std::fs::read_to_string(file).ok()?;
        node.trim().parse().ok()
    }
    fn computes_on_host(&self) -> bool {
        false
    }
    fn load_kernels(&self) {
        if self.device != NPU {
            // Its error is in the log.
            let _ = kernels::load_gpu_kernels(self.index);
        }
    }
    fn compute_capability(&self) -> Result<Option<(i32, i32)>, Error> {
        if self.device == NPU {
            return Ok(None);
        }
        torch_ext::compute_capability(self.index).map(Some)
    }
}

const PINNED_BYTES: i64 = 4 << 20;

/// Copies through pinned memory, on a stream that overlaps with computation.
///
/// The caller passes tensors whose values are final: the trainer waits for the device at the end of
/// each step.
struct PinnedCopier {
    pinned: Option<Tensor>,
    on_side_stream: bool,
}

impl PinnedCopier {
    fn use_side_stream(&mut self, tensor: &Tensor) -> Result<(), Error> {
        if !self.on_side_stream {
            torch_ext::use_device(tensor.device())?;
            Stream::from_pool(tensor, Priority::Normal)?.make_current()?;
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
            let source = bytes.f_narrow(0, index as i64 * PINNED_BYTES, len);
            let mut staged = pinned.narrow(0, 0, len);
            // A blocking copy waits for this thread's stream only.
            staged.f_copy_(&source.map_err(failed)?).map_err(failed)?;
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
        // A process of its own, since other tests allocate tensors at the same time.
        const INSIDE: &str = "MOERUN_TEST_CPU_CONFORMS";
        if std::env::var_os(INSIDE).is_none() {
            let this_program = std::env::current_exe().unwrap();
            let output = std::process::Command::new(this_program)
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
        let error = accelerator("tpu", 0).unwrap_err().to_string();
        assert!(error.contains("use cpu, cuda, npu or auto"), "{error}");
    }
}
