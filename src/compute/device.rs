//! Choosing and opening a device.

use std::path::PathBuf;
use std::sync::Arc;

use super::batch::Element;
use super::capabilities::{Capabilities, Disable, Precision, Tier, wanted_features};
use super::gpu::Gpu;
use super::{self_test, wait};
use crate::words::count;
use crate::{Error, Result};

/// Which device to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// A hardware GPU, else the CPU. `WGPU_ADAPTER_NAME` in the environment names one, as [`Select::Name`].
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A hardware GPU, else a software adapter; an error if there is neither.
    Gpu,
    /// The adapter at this place of [`Device::adapters`].
    Index(usize),
    /// The first adapter whose name contains this, case aside.
    Name(String),
}

/// As it is parsed.
impl std::fmt::Display for Select {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu => f.write_str("gpu"),
            Self::Index(index) => write!(f, "{index}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl std::str::FromStr for Select {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "gpu" => Self::Gpu,
            "" => return Err(Error::Invalid("a device is `auto`, `cpu`, `gpu`, an index or a name".into())),
            _ => text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Index),
        })
    }
}

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Which device.
    pub select: Select,
    /// Which arithmetic.
    pub precision: Precision,
    /// Capabilities to do without.
    pub disable: Disable,
    /// Device memory to stay within, in bytes. `None`: 2 GiB. Up to a quarter of it is kept in buffers for their next use.
    /// Merges and calibrations cut their work so that it holds, and compute layers that alone need more on the CPU;
    /// [`Device::memory_peak`] tells what was taken.
    pub memory: Option<u64>,
    /// A folder to keep compiled pipelines in, where the driver allows it (Vulkan): programs start faster the next time.
    /// Drivers trust what is in it: let nobody write there whom you would not let change your programs.
    pub pipeline_cache: Option<PathBuf>,
    /// More features to enable, as far as the adapter has them: for others that will share the device. Experimental
    /// ones are left out.
    pub features: wgpu::Features,
}

/// An adapter as [`Device::adapters`] lists it.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// Its name, as the driver gives it.
    pub name: String,
    /// `Vulkan`, `Metal` or `Dx12`.
    pub backend: String,
    /// `discrete GPU`, `integrated GPU`, `virtual GPU`, `software` or `other`.
    pub kind: &'static str,
    /// Driver and version.
    pub driver: String,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// Where the operations run: a GPU or the CPU. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Device {
    pub(crate) backend: Backend,
    precision: Precision,
    tier: Tier,
    memory: u64,
    note: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) enum Backend {
    Cpu,
    Gpu(Arc<Gpu>),
}

const DEFAULT_MEMORY: u64 = 2 << 30;

impl Device {
    /// A hardware GPU, else the CPU.
    pub fn auto() -> Result<Self> {
        Self::open(&DeviceOptions::default())
    }

    /// The CPU, in f64 on all cores.
    pub fn cpu() -> Self {
        Self {
            backend: Backend::Cpu,
            precision: Precision::Auto,
            tier: Tier::Host,
            memory: DEFAULT_MEMORY,
            note: None,
        }
    }

    /// Opens the device that `options` describe.
    ///
    /// # Errors
    /// [`Error::Device`] if no adapter fits or it refuses, naming those that there are;
    /// or if the precision asked for is not to be had on it.
    pub fn open(options: &DeviceOptions) -> Result<Self> {
        let memory = options.memory.unwrap_or(DEFAULT_MEMORY);
        let cpu = |note| {
            if options.precision == Precision::DoubleSingle {
                return Err(Error::Device(
                    "double-single is an arithmetic of GPUs; the CPU always computes in f64".into(),
                ));
            }
            Ok(Self { memory, precision: options.precision, note, ..Self::cpu() })
        };
        if options.select == Select::Cpu {
            let quick = options.precision == Precision::Fast;
            return cpu(
                quick.then(|| "`fast` changes nothing on the CPU, which always computes in f64".to_owned())
            );
        }
        let (instance, adapters) = adapters();
        let Some(index) = choose(&options.select, &adapters)? else {
            let note = match adapters.iter().any(is_software) {
                true => "no hardware GPU found; computing on the CPU (`gpu` would take the software adapter)",
                false => "no GPU driver found; computing on the CPU",
            };
            return cpu(Some(note.to_owned()));
        };
        let adapter = &adapters[index];
        let mut limits = adapter.limits();
        if options.disable.limits {
            limits = wgpu::Limits::default();
        }
        let shared = options.features - wgpu::Features::all_experimental_mask();
        let mut features = adapter.features() & (wanted_features() | shared);
        let units = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        if options.disable.cooperative_matrix {
            features.remove(units);
        }
        let experimental_features = match features.contains(units) {
            // SAFETY: wgpu asks us to know that what is experimental may have bugs that safe calls can hit. The one such
            // feature asked for is cooperative matrices, and it changes nothing for shaders that do not use them. Ours that
            // do use 16 × 16 matrices at aligned indices and strides inside workgroup arrays, and their results are tested
            // against the CPU. Of a host that takes the device from `Device::wgpu`, that method asks the same; it can have
            // one without by `Disable::cooperative_matrix`.
            true => unsafe { wgpu::ExperimentalFeatures::enabled() },
            false => wgpu::ExperimentalFeatures::disabled(),
        };
        let (device, queue) = wait::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("loraweld"),
            required_features: features,
            required_limits: limits,
            experimental_features,
            ..Default::default()
        }))
        .map_err(|e| Error::Device(format!("`{}` cannot be opened: {e}", adapter.get_info().name)))?;
        let mut gpu = Gpu::new(adapter, device, queue, options.disable, memory);
        gpu.instance = Some(instance);
        gpu.record_errors();
        gpu.open_cache(options.pipeline_cache.as_deref());
        Self::on_gpu(gpu, options.precision, memory)
    }

    /// Shares a host's device. `adapter` must be the one that `device` was made from.
    ///
    /// The host should have asked for [`wanted_features`](super::wanted_features) as far as its adapter
    /// has them and for at least [`required_limits`](super::required_limits). Work is submitted to
    /// `queue`; what the host recorded before must be submitted by then.
    ///
    /// # Errors
    /// [`Error::Device`] if the device's limits are too small.
    pub fn from_wgpu(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        Self::from_wgpu_with(adapter, device, queue, &DeviceOptions::default())
    }

    /// [`from_wgpu`](Self::from_wgpu) with a precision, a memory budget or disabled capabilities.
    pub fn from_wgpu_with(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &DeviceOptions,
    ) -> Result<Self> {
        let (have, need) = (device.limits(), super::required_limits());
        for (name, have, need) in [
            (
                "max_storage_buffer_binding_size",
                have.max_storage_buffer_binding_size,
                need.max_storage_buffer_binding_size,
            ),
            (
                "max_compute_workgroups_per_dimension",
                u64::from(have.max_compute_workgroups_per_dimension),
                u64::from(need.max_compute_workgroups_per_dimension),
            ),
            (
                "max_storage_buffers_per_shader_stage",
                u64::from(have.max_storage_buffers_per_shader_stage),
                u64::from(need.max_storage_buffers_per_shader_stage),
            ),
            (
                "max_compute_workgroup_storage_size",
                u64::from(have.max_compute_workgroup_storage_size),
                u64::from(need.max_compute_workgroup_storage_size),
            ),
            (
                "max_compute_invocations_per_workgroup",
                u64::from(have.max_compute_invocations_per_workgroup),
                u64::from(need.max_compute_invocations_per_workgroup),
            ),
        ] {
            if have < need {
                return Err(Error::Device(format!(
                    "the host's device has {name} = {have}; {need} is needed"
                )));
            }
        }
        let memory = options.memory.unwrap_or(DEFAULT_MEMORY);
        let mut gpu = Gpu::new(adapter, device, queue, options.disable, memory);
        gpu.open_cache(options.pipeline_cache.as_deref());
        Self::on_gpu(gpu, options.precision, memory)
    }

    fn on_gpu(mut gpu: Gpu, precision: Precision, memory: u64) -> Result<Self> {
        if precision == Precision::DoubleSingle || !gpu.capabilities.f64 {
            let works = !gpu.disable.double_single && self_test::double_single(&gpu)?;
            gpu.capabilities.double_single = Some(works);
        }
        let tier = gpu.capabilities.tier(precision)?;
        let mut notes = Vec::new();
        if tier == Tier::Host {
            notes.push(
                "has no f64, and double-single arithmetic fails its self-test there: small matrices are summed and \
                 factored on the CPU",
            );
        }
        if precision == Precision::Fast && !gpu.capabilities.matrix_units() {
            notes.push("has no matrix units, without which `fast` computes as `auto` does");
        }
        let note = (!notes.is_empty()).then(|| format!("`{}` {}", gpu.name, notes.join("; it ")));
        Ok(Self { backend: Backend::Gpu(Arc::new(gpu)), precision, tier, memory, note })
    }

    /// The adapters of this machine, in the order that [`Select::Index`] counts.
    pub fn adapters() -> Vec<AdapterSummary> {
        adapters()
            .1
            .iter()
            .map(|adapter| {
                let info = adapter.get_info();
                AdapterSummary {
                    backend: format!("{:?}", info.backend),
                    kind: kind(info.device_type),
                    driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
                    capabilities: Capabilities::read(
                        adapter,
                        adapter.features(),
                        &adapter.limits(),
                        Disable::default(),
                    ),
                    name: info.name,
                }
            })
            .collect()
    }

    /// Which of [`adapters`](Self::adapters) `select` takes; `None` is the CPU.
    pub fn choice(select: &Select) -> Result<Option<usize>> {
        match select {
            Select::Cpu => Ok(None),
            _ => choose(select, &adapters().1),
        }
    }

    /// Whether this is a GPU.
    pub fn is_gpu(&self) -> bool {
        matches!(self.backend, Backend::Gpu(_))
    }

    /// What the GPU can do; `None` on the CPU.
    pub fn capabilities(&self) -> Option<&Capabilities> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Gpu(gpu) => Some(&gpu.capabilities),
        }
    }

    /// The arithmetic that was asked for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where, and in what, small matrices are summed and factored.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The device memory to stay within, in bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The most device memory that was held at once, in bytes, since the device was opened or
    /// [`reset_memory_peak`](Self::reset_memory_peak) was called; 0 on the CPU. Each merge starts it anew.
    ///
    /// Counted are all buffers of this crate until the GPU is done with them: those that wait for their next use, and what
    /// uploads and downloads are staged in, as well; not a host's own buffers, nor what the driver takes for pipelines.
    pub fn memory_peak(&self) -> u64 {
        self.gpu().map_or(0, |gpu| gpu.meter.peak())
    }

    /// Starts [`memory_peak`](Self::memory_peak) anew, from what is held now.
    pub fn reset_memory_peak(&self) {
        if let Backend::Gpu(gpu) = &self.backend {
            gpu.meter.reset_peak();
        }
    }

    /// How often results were read back from the GPU since the device was opened, each time a wait for it; 0 on the CPU.
    pub fn readbacks(&self) -> u64 {
        self.gpu().map_or(0, |gpu| gpu.reads.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// Something the user should know: a fallback that was taken.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// What, and in which arithmetic: `NVIDIA H200 (Vulkan), f32 products, f64 factorisations`.
    pub fn describe(&self) -> String {
        let Backend::Gpu(gpu) = &self.backend else {
            return format!("CPU ({}), f64", count(rayon::current_num_threads(), "thread"));
        };
        let arithmetic = match (self.precision.is_single(), self.tier) {
            (true, Tier::F64) => "f32 products, f64 sums and factorisations",
            (true, Tier::DoubleSingle) => "f32 products, double-single sums and factorisations",
            (false, Tier::F64) => "f64",
            (false, Tier::DoubleSingle) => "double-single",
            (_, Tier::Host) => "f32 products, sums and factorisations on the CPU in f64",
        };
        let statistics = match self.precision == Precision::Fast && gpu.capabilities.matrix_units() {
            true => "statistics of 11 bits, ",
            false => "",
        };
        format!("{}, {statistics}{arithmetic}", gpu.name)
    }

    /// The wgpu device and queue under this; `None` on the CPU.
    ///
    /// A device that was opened here has wgpu's experimental cooperative matrices enabled, where the adapter has them. A
    /// shader of yours that uses them may hit bugs of wgpu that lead to undefined behaviour: leave them to this crate, or
    /// open the device with [`Disable::cooperative_matrix`].
    pub fn wgpu(&self) -> Option<(&wgpu::Device, &wgpu::Queue)> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Gpu(gpu) => Some((&gpu.device, &gpu.queue)),
        }
    }

    /// The adapter of [`wgpu`](Self::wgpu), which frameworks ask for when they are to share the device.
    pub fn wgpu_adapter(&self) -> Option<&wgpu::Adapter> {
        self.gpu().ok().map(|gpu| &gpu.adapter)
    }

    /// The instance of a device that was opened here, for surfaces; a host's device has the host's own.
    pub fn wgpu_instance(&self) -> Option<&wgpu::Instance> {
        self.gpu().ok().and_then(|gpu| gpu.instance.as_ref())
    }

    /// Waits until everything submitted is done. Operations that read results back do it themselves.
    pub fn wait(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu => Ok(()),
            Backend::Gpu(gpu) => gpu.wait(),
        }
    }

    /// Makes the pipelines of the factor-space algebra ([`ops::Stacks`](super::ops::Stacks), [`ops::qr`](super::ops::qr)) on all
    /// threads; they are made when they are needed else.
    pub(crate) fn prepare_algebra(&self) {
        if let (Backend::Gpu(gpu), element @ (Element::F64 | Element::DoubleSingle)) =
            (&self.backend, self.sum())
        {
            gpu.prepare(&super::ops::algebra_kernels(element));
        }
    }

    /// Its name, in the words of an error.
    pub(crate) fn place(&self) -> &str {
        match &self.backend {
            Backend::Cpu => "the CPU",
            Backend::Gpu(gpu) => &gpu.name,
        }
    }

    /// The GPU, or an internal error for code that has already told the two apart.
    pub(crate) fn gpu(&self) -> Result<&Arc<Gpu>> {
        match &self.backend {
            Backend::Gpu(gpu) => Ok(gpu),
            Backend::Cpu => Err(Error::Device("a batch of a GPU was given to the CPU".into())),
        }
    }
}

fn adapters() -> (wgpu::Instance, Vec<wgpu::Adapter>) {
    let all = match cfg!(target_arch = "wasm32") {
        true => wgpu::Backends::BROWSER_WEBGPU,
        false => wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
    };
    let backends = wgpu::Backends::from_env().unwrap_or(all);
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let adapters = wait::block_on(instance.enumerate_adapters(backends));
    (instance, adapters)
}

fn is_software(adapter: &wgpu::Adapter) -> bool {
    adapter.get_info().device_type == wgpu::DeviceType::Cpu
}

fn kind(device_type: wgpu::DeviceType) -> &'static str {
    match device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

fn choose(select: &Select, adapters: &[wgpu::Adapter]) -> Result<Option<usize>> {
    let list = || match adapters.is_empty() {
        true => "there are none: is a Vulkan, Metal or DX12 driver installed?".to_owned(),
        false => adapters
            .iter()
            .enumerate()
            .map(|(i, a)| format!("{i}: {}", a.get_info().name))
            .collect::<Vec<_>>()
            .join("; "),
    };
    // Fastest kind first; the driver's order within a kind.
    let best = || {
        let rank = |a: &wgpu::Adapter| match a.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (0..adapters.len()).min_by_key(|&i| rank(&adapters[i]))
    };
    let named = |name: &str| {
        let wanted = name.to_lowercase();
        adapters
            .iter()
            .position(|a| a.get_info().name.to_lowercase().contains(&wanted))
            .ok_or_else(|| Error::Device(format!("no adapter is named `{name}`; adapters: {}", list())))
    };
    match select {
        Select::Cpu => Ok(None),
        Select::Auto => match std::env::var("WGPU_ADAPTER_NAME") {
            Ok(name) if !name.is_empty() => named(&name).map(Some),
            _ => Ok(best().filter(|&i| !is_software(&adapters[i]))),
        },
        Select::Gpu => match std::env::var("WGPU_ADAPTER_NAME") {
            Ok(name) if !name.is_empty() => named(&name).map(Some),
            _ => best().map(Some).ok_or_else(|| Error::Device(format!("no GPU found; adapters: {}", list()))),
        },
        Select::Index(i) if *i < adapters.len() => Ok(Some(*i)),
        Select::Index(i) => Err(Error::Device(format!("no adapter has index {i}; adapters: {}", list()))),
        Select::Name(name) => named(name).map(Some),
    }
}
