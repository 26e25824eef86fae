//! One wgpu device for burn and loraweld, and burn's tensors as loraweld sees them.

use std::any::Any;

use anyhow::{Context, Result, anyhow, ensure};
use burn::backend::wgpu::{AutoCompiler, CubeTensor, Wgpu, WgpuSetup};
use burn::cubecl::client::Client;
use burn::cubecl::wgpu::WgpuServer;
use burn::prelude::*;
use burn::tensor::DType;
use loraweld::{Activations, DeviceOptions, Dtype, Select, wgpu};

/// A device that burn and loraweld share, with its queue.
///
/// Both record and submit on their own, so order is by submission: [`flush`](Self::flush) submits what burn has
/// recorded, and what loraweld submits afterwards sees it.
#[derive(Clone)]
pub struct Shared {
    /// As loraweld sees it.
    pub loraweld: loraweld::Device,
    /// As burn sees it.
    pub burn: Device,
    client: Client,
}

impl Shared {
    /// Opens a device by loraweld's rules of choice, and registers it with burn.
    pub fn open(select: Select) -> Result<Self> {
        // burn looks at what the adapter can do, not at what the device was opened with: it gets all of it. Buffers
        // that are mapped for good are slower on GPUs with memory of their own, and nobody here uses them.
        let features = wgpu::Features::all() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;
        let loraweld = loraweld::Device::open(&DeviceOptions { select, features, ..Default::default() })?;
        let (Some((device, queue)), Some(adapter), Some(instance)) =
            (loraweld.wgpu(), loraweld.wgpu_adapter(), loraweld.wgpu_instance())
        else {
            return Err(anyhow!("there is no GPU to share; `--device gpu` also takes a software adapter"));
        };
        let setup = WgpuSetup {
            instance: instance.clone(),
            adapter: adapter.clone(),
            device: device.clone(),
            queue: queue.clone(),
            backend: adapter.get_info().backend,
        };
        let burn = Device::wgpu_options().setup(setup).init()?;
        let client = primitive(&Tensor::<1>::zeros([1], &burn))?.client;
        Ok(Self { loraweld, burn, client })
    }

    /// The device and queue under both.
    pub fn wgpu(&self) -> (&wgpu::Device, &wgpu::Queue) {
        self.loraweld.wgpu().expect("it was opened with a GPU")
    }

    /// Submits what burn has recorded so far. The pass before an own submission that reads burn's buffers.
    pub fn flush(&self) -> Result<()> {
        self.client.flush().map_err(|e| anyhow!("burn cannot submit its work: {e:?}"))
    }

    /// The buffer behind a tensor of f32, rows × columns of its last dimension.
    pub fn view<const D: usize>(&self, tensor: &Tensor<D>) -> Result<View> {
        let dims = tensor.dims();
        let width = dims[D - 1];
        let primitive = primitive(tensor)?;
        ensure!(
            primitive.is_contiguous() && primitive.dtype == DType::F32,
            "a tensor of {:?} {dims:?} with strides {:?} cannot be shared: f32 in rows is needed",
            primitive.dtype,
            primitive.meta.strides()
        );
        let resource = self
            .client
            .get_resource::<WgpuServer<AutoCompiler>>(primitive.handle)
            .map_err(|e| anyhow!("burn does not give the buffer of a tensor: {e:?}"))?;
        Ok(View {
            buffer: resource.resource().buffer.clone(),
            offset: resource.resource().offset,
            rows: dims.iter().product::<usize>() / width.max(1),
            width,
            _pinned: Box::new(resource),
        })
    }

    /// A tensor with the content of a part of a buffer that is not burn's: one copy on the device.
    pub fn import<const D: usize>(
        &self,
        from: wgpu::BufferSlice<'_>,
        shape: [usize; D],
    ) -> Result<Tensor<D>> {
        let tensor = Tensor::empty(shape, &self.burn);
        let view = self.view(&tensor)?;
        // What burn may still have to do with the memory that the tensor got comes before the copy.
        self.flush()?;
        self.copy(from, view.slice());
        Ok(tensor)
    }

    /// Writes a tensor to a part of a buffer that is not burn's: one copy on the device. (Within a buffer, such as one
    /// of burn's pools, wgpu does not copy.)
    pub fn export<const D: usize>(&self, tensor: &Tensor<D>, to: wgpu::BufferSlice<'_>) -> Result<()> {
        let view = self.view(tensor)?;
        self.flush()?;
        self.copy(view.slice(), to);
        Ok(())
    }

    fn copy(&self, from: wgpu::BufferSlice<'_>, to: wgpu::BufferSlice<'_>) {
        let (device, queue) = self.wgpu();
        let mut encoder = device.create_command_encoder(&Default::default());
        let size = from.size().min(to.size());
        encoder.copy_buffer_to_buffer(from.buffer(), from.offset(), to.buffer(), to.offset(), size);
        queue.submit([encoder.finish()]);
    }

    /// A tensor of values that come from a file or a generator.
    pub fn tensor<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &self.burn)
    }
}

/// Where a tensor lies. Keeps its memory in place and from being used again until it is dropped.
pub struct View {
    buffer: wgpu::Buffer,
    offset: u64,
    rows: usize,
    width: usize,
    /// burn's claim on the memory; its type has no public name.
    _pinned: Box<dyn Any>,
}

impl View {
    /// As loraweld takes it.
    pub fn activations(&self) -> Activations<'_> {
        let Self { buffer, offset, rows, width, .. } = self;
        Activations::Buffer { buffer, offset: *offset, dtype: Dtype::F32, tokens: *rows, width: *width }
    }

    /// As part of the buffer that it lies in.
    pub fn slice(&self) -> wgpu::BufferSlice<'_> {
        self.buffer.slice(self.offset..self.offset + (self.rows * self.width * 4) as u64)
    }
}

fn primitive<const D: usize>(tensor: &Tensor<D>) -> Result<CubeTensor> {
    let primitive = tensor.clone().try_into_primitive::<Wgpu>();
    primitive.map_err(|e| anyhow!("{e:?}")).context("the tensor is not burn's on wgpu")
}

/// A tensor's values, on the host.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let data = tensor.try_into_data().map_err(|e| anyhow!("burn cannot read a tensor: {e:?}"))?;
    data.try_into_vec::<f32>().map_err(|e| anyhow!("{e:?}"))
}
