//! Matrices of mixed shapes in one arena.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::Tier;
use super::device::{Backend, Device};
use super::gpu::{Gpu, Pooled, whole};
use super::shaders::{Declared, Kernel, job};
use crate::{Error, Matrix, Result};

/// Rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl Shape {
    /// A shape.
    pub const fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols }
    }

    /// Number of elements; `usize::MAX` stands for any number above it, which nothing can hold.
    pub const fn len(self) -> usize {
        self.rows.saturating_mul(self.cols)
    }

    /// Bytes of elements of this size, likewise.
    pub(crate) const fn bytes(self, size: usize) -> usize {
        self.len().saturating_mul(size)
    }

    /// Whether there are no elements.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// What the elements of a batch are, and so where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// f32 on the GPU.
    F32,
    /// f64 on the GPU.
    F64,
    /// Pairs (high, low) of f32 on the GPU, whose sum is the value.
    DoubleSingle,
    /// f64 on the host.
    Host,
}

impl Element {
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F64 | Self::DoubleSingle | Self::Host => 8,
        }
    }
}

impl Device {
    /// The element type of factors and products.
    pub fn product(&self) -> Element {
        match (self.is_gpu(), self.precision().is_single()) {
            (false, _) => Element::Host,
            (true, true) => Element::F32,
            (true, false) => self.sum(),
        }
    }

    /// The element type of factors as they are read: f32 holds every input exactly.
    pub fn factor(&self) -> Element {
        match self.is_gpu() {
            false => Element::Host,
            true => Element::F32,
        }
    }

    /// The element type of sums and factorisations.
    pub fn sum(&self) -> Element {
        match self.tier() {
            Tier::F64 => Element::F64,
            Tier::DoubleSingle => Element::DoubleSingle,
            Tier::Host => Element::Host,
        }
    }
}

/// Matrices of mixed shapes, row-major, in one arena on the device or on the host.
#[derive(Debug)]
pub struct Batch {
    shapes: Vec<Shape>,
    offsets: Vec<usize>,
    len: usize,
    pub(crate) storage: Storage,
}

#[derive(Debug)]
pub(crate) enum Storage {
    Host(Vec<f64>),
    Gpu { buffer: Arc<Pooled>, element: Element },
}

/// Matrices start at multiples of this many elements, so that vector loads of 16 bytes are aligned.
const ALIGN: usize = 4;

impl Batch {
    /// All zeros.
    ///
    /// # Errors
    /// [`Error::Device`] if the arena is larger than the device can bind at once.
    pub fn zeros(device: &Device, element: Element, shapes: &[Shape]) -> Result<Self> {
        Self::new(device, element, shapes, Gpu::zeros)
    }

    /// For a kernel that writes all elements: on a device they are whatever was there, on the host zeros.
    pub(crate) fn unwritten(device: &Device, element: Element, shapes: &[Shape]) -> Result<Self> {
        Self::new(device, element, shapes, Gpu::scratch)
    }

    fn new(
        device: &Device,
        element: Element,
        shapes: &[Shape],
        buffer: impl FnOnce(&Arc<Gpu>, u64) -> Result<Pooled>,
    ) -> Result<Self> {
        let mut offsets = Vec::with_capacity(shapes.len());
        let mut len = 0_usize;
        for shape in shapes {
            offsets.push(len);
            // Kernels count rows and columns in 32 bits, also of what has no elements.
            let end = shape.len().checked_next_multiple_of(ALIGN).and_then(|own| len.checked_add(own));
            len = end.filter(|_| shape.rows.max(shape.cols) <= u32::MAX as usize).ok_or_else(|| {
                Error::Invalid(format!("a batch cannot hold a matrix of {} x {}", shape.rows, shape.cols))
            })?;
        }
        let bytes = len.saturating_mul(element.bytes() as usize);
        let storage = match (&device.backend, element) {
            (_, Element::Host) => Storage::Host(host_zeros(len)?),
            (Backend::Cpu, _) => return Err(Error::Device("the CPU holds no batches of a GPU".into())),
            (Backend::Gpu(gpu), _) => Storage::Gpu { buffer: buffer(gpu, bytes as u64)?.into(), element },
        };
        Ok(Self { shapes: shapes.to_vec(), offsets, len, storage })
    }

    /// A batch of the host's, of which `write` makes each matrix.
    pub(crate) fn made_on_host(shapes: &[Shape], write: impl Fn(usize, &mut [f64]) + Sync) -> Result<Self> {
        let mut batch = Self::unwritten(&Device::cpu(), Element::Host, shapes)?;
        let matrices = batch.host_mut()?;
        matrices.into_par_iter().enumerate().for_each(|(i, matrix)| write(i, matrix));
        Ok(batch)
    }

    /// The GPU of a device, if this lies there.
    fn gpu<'a>(&'a self, device: &'a Device) -> Result<&'a Arc<Gpu>> {
        match Operands::of("copying", device, [(self, ANY)])? {
            Operands::Gpu(gpu, _) => Ok(gpu),
            Operands::Host(_) => Err(elsewhere("copying", self.place(), device)),
        }
    }

    /// Copies host matrices, rounded to `element`.
    pub fn upload(device: &Device, element: Element, matrices: &[Matrix]) -> Result<Self> {
        let shapes: Vec<_> = matrices.iter().map(|m| Shape::new(m.rows, m.cols)).collect();
        let mut batch = Self::unwritten(device, element, &shapes)?;
        match &mut batch.storage {
            Storage::Host(data) => apart(&shapes, data, 1)
                .into_par_iter()
                .zip(matrices)
                .for_each(|(out, matrix)| out.copy_from_slice(&matrix.data)),
            Storage::Gpu { buffer, element } => {
                let size = element.bytes() as usize;
                let mut bytes = vec![0; batch.len * size];
                apart(&shapes, &mut bytes, size)
                    .into_par_iter()
                    .zip(matrices)
                    .for_each(|(out, matrix)| Self::encode(*element, &matrix.data, out));
                device.gpu()?.write(buffer, 0, &bytes)?;
            }
        }
        Ok(batch)
    }

    /// A copy where this one lives.
    pub fn duplicate(&self, device: &Device) -> Result<Self> {
        let storage = match &self.storage {
            Storage::Host(data) => Storage::Host(data.clone()),
            Storage::Gpu { buffer, element } => {
                let gpu = self.gpu(device)?;
                let bytes = self.len as u64 * element.bytes();
                let copy = gpu.scratch(bytes)?;
                // Matrices are whole vectors long.
                let job = CopyJob { vectors: (bytes / 16) as u32 };
                let workgroups = job.vectors.div_ceil(CHUNK) as usize;
                let mut commands = gpu.commands();
                commands.launch_line(copy_kernel(), &job, workgroups, &[whole(buffer), whole(&copy)])?;
                commands.submit()?;
                Storage::Gpu { buffer: copy.into(), element: *element }
            }
        };
        Ok(Self { shapes: self.shapes.clone(), offsets: self.offsets.clone(), len: self.len, storage })
    }

    /// Copies all matrices to the host, widened to f64.
    pub fn download(&self, device: &Device) -> Result<Vec<Matrix>> {
        self.download_by(device, |values| self.each(values))
    }

    /// [`download`](Self::download) on this thread alone, for those who hold a lock: one that waits for other threads
    /// may meanwhile take up work that wants the lock.
    pub(crate) fn download_alone(&self, device: &Device) -> Result<Vec<Matrix>> {
        self.download_by(device, |values| (0..self.len()).map(|i| self.matrix(i, values)).collect())
    }

    fn download_by(
        &self,
        device: &Device,
        all: impl FnOnce(&(dyn Fn(Range<usize>) -> Vec<f64> + Sync)) -> Vec<Matrix>,
    ) -> Result<Vec<Matrix>> {
        match &self.storage {
            Storage::Host(data) => Ok(all(&|range| data[range].to_vec())),
            Storage::Gpu { buffer, element } => {
                let size = element.bytes() as usize;
                self.gpu(device)?.read_with(buffer, (self.len * size) as u64, |bytes| {
                    all(&|range| Self::decode(*element, &bytes[range.start * size..range.end * size]))
                })
            }
        }
    }

    /// Copies all matrices to the host as f32, to which wider ones are rounded.
    pub(crate) fn download_f32(&self, device: &Device) -> Result<Vec<Matrix<f32>>> {
        let Storage::Gpu { buffer, element: Element::F32 } = &self.storage else {
            return Ok(self.download(device)?.into_par_iter().map(|m| m.map(|v| v as f32)).collect());
        };
        self.gpu(device)?.read_with(buffer, self.len as u64 * 4, |bytes| {
            self.each(|range| bytemuck::pod_collect_to_vec(&bytes[4 * range.start..4 * range.end]))
        })
    }

    /// A matrix of what `values` finds in each one's range of elements, on all threads.
    fn each<T: Send>(&self, values: impl Fn(Range<usize>) -> Vec<T> + Sync) -> Vec<Matrix<T>> {
        (0..self.len()).into_par_iter().map(|i| self.matrix(i, &values)).collect()
    }

    fn matrix<T>(&self, i: usize, values: impl Fn(Range<usize>) -> Vec<T>) -> Matrix<T> {
        let (shape, start) = (self.shapes[i], self.offsets[i]);
        Matrix { rows: shape.rows, cols: shape.cols, data: values(start..start + shape.len()) }
    }

    /// Some of the matrices, in this order: on a device in the same arena, on the host as copies.
    pub(crate) fn select(&self, indices: &[usize]) -> Self {
        let shapes: Vec<_> = indices.iter().map(|&i| self.shapes[i]).collect();
        match &self.storage {
            Storage::Gpu { buffer, element } => {
                let offsets = indices.iter().map(|&i| self.offsets[i]).collect();
                let storage = Storage::Gpu { buffer: buffer.clone(), element: *element };
                Self { shapes, offsets, len: self.len, storage }
            }
            Storage::Host(all) => {
                let (mut offsets, mut data) = (Vec::new(), Vec::new());
                for &i in indices {
                    offsets.push(data.len());
                    data.extend_from_slice(&all[self.offsets[i]..][..self.shapes[i].len()]);
                    data.resize(data.len().next_multiple_of(ALIGN), 0.0);
                }
                Self { shapes, offsets, len: data.len(), storage: Storage::Host(data) }
            }
        }
    }

    /// The shapes, in order.
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// Number of matrices.
    pub fn len(&self) -> usize {
        self.shapes.len()
    }

    /// Whether there are no matrices.
    pub fn is_empty(&self) -> bool {
        self.shapes.is_empty()
    }

    /// What the elements are.
    pub fn element(&self) -> Element {
        match &self.storage {
            Storage::Host(_) => Element::Host,
            Storage::Gpu { element, .. } => *element,
        }
    }

    /// The first element of matrix `i` in the arena.
    pub(crate) fn offset(&self, i: usize) -> usize {
        self.offsets[i]
    }

    /// This, if it lies on the host.
    pub(crate) fn on_host(&self) -> Option<OnHost<'_>> {
        match &self.storage {
            Storage::Host(data) => Some(OnHost { batch: self, data }),
            Storage::Gpu { .. } => None,
        }
    }

    /// The whole arena, of a batch on a GPU.
    pub(crate) fn binding(&self) -> Result<wgpu::BufferBinding<'_>> {
        let on_gpu =
            self.on_gpu().ok_or_else(|| Error::Device("a kernel cannot write to the host".into()))?;
        Ok(on_gpu.binding())
    }

    /// This, which must lie on the host.
    pub(crate) fn host(&self) -> Result<OnHost<'_>> {
        self.on_host().ok_or_else(|| elsewhere("an operation of the CPU", self.place(), &Device::cpu()))
    }

    /// This, if it lies on a GPU, whichever.
    pub(crate) fn on_gpu(&self) -> Option<OnGpu<'_>> {
        match &self.storage {
            Storage::Gpu { buffer, .. } => Some(OnGpu { batch: self, buffer }),
            Storage::Host(_) => None,
        }
    }

    /// The elements of every matrix of a host batch, apart, for parallel work.
    ///
    /// # Errors
    /// [`Error::Device`] if this lies on a GPU.
    pub(crate) fn host_mut(&mut self) -> Result<Vec<&mut [f64]>> {
        match &mut self.storage {
            Storage::Host(data) => Ok(apart(&self.shapes, data, 1)),
            Storage::Gpu { buffer, .. } => {
                Err(Error::Device(format!("a batch that lies on {} was given to the CPU", buffer.gpu().name)))
            }
        }
    }

    /// The wgpu buffer of a batch on a GPU, for a host's own kernels: matrices row-major, one after the
    /// other, each starting at a multiple of 4 elements. Drop the batch only after what uses it was submitted:
    /// its buffer then goes to another.
    pub fn wgpu_buffer(&self) -> Option<&wgpu::Buffer> {
        match &self.storage {
            Storage::Gpu { buffer, .. } => Some(buffer),
            Storage::Host(_) => None,
        }
    }

    /// Where it lies, in the words of an error.
    fn place(&self) -> &str {
        match &self.storage {
            Storage::Host(_) => "the CPU",
            Storage::Gpu { buffer, .. } => &buffer.gpu().name,
        }
    }

    /// Writes the bytes of values, rounded to an element type.
    pub(crate) fn encode(element: Element, values: &[f64], out: &mut [u8]) {
        match element {
            Element::F32 => {
                let (out, _) = out.as_chunks_mut::<4>();
                out.iter_mut().zip(values).for_each(|(out, v)| *out = (*v as f32).to_le_bytes());
            }
            Element::F64 | Element::Host => out.copy_from_slice(bytemuck::cast_slice(values)),
            Element::DoubleSingle => {
                let (out, _) = out.as_chunks_mut::<8>();
                out.iter_mut().zip(values).for_each(|(out, &v)| {
                    let high = v as f32;
                    // Infinity minus infinity would be NaN: keep an overflow an infinity.
                    let low = if high.is_finite() { (v - f64::from(high)) as f32 } else { 0.0 };
                    *out = bytemuck::cast([high.to_le_bytes(), low.to_le_bytes()]);
                });
            }
        }
    }

    /// The values of bytes of an element type.
    pub(crate) fn decode(element: Element, bytes: &[u8]) -> Vec<f64> {
        let wide = |b: [u8; 4]| f64::from(f32::from_le_bytes(b));
        match element {
            Element::F32 => bytes.as_chunks().0.iter().map(|&b| wide(b)).collect(),
            Element::F64 | Element::Host => bytemuck::pod_collect_to_vec(bytes),
            Element::DoubleSingle => {
                let pair = |&[high, low]: &[[u8; 4]; 2]| wide(high) + wide(low);
                bytes.as_chunks().0.as_chunks().0.iter().map(pair).collect()
            }
        }
    }
}

/// Zeros, if there is memory for so many.
fn host_zeros(len: usize) -> Result<Vec<f64>> {
    match len.saturating_mul(size_of::<f64>()) <= isize::MAX as usize {
        true => Ok(vec![0.0; len]),
        false => Err(Error::Invalid(format!("no memory holds {len} elements"))),
    }
}

/// The elements of each matrix of an arena, apart, for parallel work; `size`: items of an element.
fn apart<'a, T>(shapes: &[Shape], mut arena: &'a mut [T], size: usize) -> Vec<&'a mut [T]> {
    let of = |shape: &Shape| {
        let len = shape.len().next_multiple_of(ALIGN) * size;
        Some(&mut arena.split_off_mut(..len)?[..shape.len() * size])
    };
    shapes.iter().filter_map(of).collect()
}

job! {
    /// The job of `shaders/copy.wgsl`.
    struct CopyJob {
        vectors: u32,
    }
}

/// Vectors that a workgroup copies.
const CHUNK: u32 = 1024;

fn copy_kernel() -> Kernel {
    Kernel::new("copy")
}

pub(super) fn declared() -> Declared {
    Declared::new::<CopyJob>([copy_kernel()]).constant("CHUNK", CHUNK)
}

/// Elements of factors, of sums, and of either, on a GPU; on the host all are f64.
pub(crate) const FACTOR: &[Element] = &[Element::F32];
pub(crate) const WIDE: &[Element] = &[Element::F64, Element::DoubleSingle];
pub(crate) const ANY: &[Element] = &[Element::F32, Element::F64, Element::DoubleSingle];

/// The batches that an operation works on, all on one side.
pub(crate) enum Operands<'a, const N: usize> {
    Host([OnHost<'a>; N]),
    Gpu(&'a Arc<Gpu>, [OnGpu<'a>; N]),
}

impl<'a, const N: usize> Operands<'a, N> {
    /// Each batch with what its elements may be on a GPU. `what`: the operation, in the words of an error.
    ///
    /// # Errors
    /// [`Error::Device`] if they lie neither all on the host nor all on the device; [`Error::Invalid`] if one has other
    /// elements.
    pub fn of(what: &str, device: &'a Device, batches: [(&'a Batch, &[Element]); N]) -> Result<Self> {
        let on_host = batches.iter().filter_map(|(batch, _)| batch.on_host());
        if let Ok(all) = <[_; N]>::try_from(on_host.collect::<Vec<_>>()) {
            return Ok(Self::Host(all));
        }
        let of = |(batch, elements): &(&'a Batch, &[Element])| match &batch.storage {
            Storage::Gpu { element, .. } if !elements.contains(element) => Err(Error::Invalid(format!(
                "{what}: a batch of {element:?} was given, where {elements:?} is read"
            ))),
            Storage::Gpu { buffer, .. } => Ok(OnGpu { batch, buffer }),
            Storage::Host(_) => Err(elsewhere(what, batch.place(), device)),
        };
        let Backend::Gpu(gpu) = &device.backend else {
            let strange = batches.iter().find(|(batch, _)| batch.element() != Element::Host);
            return Err(elsewhere(what, strange.map_or("a GPU", |(batch, _)| batch.place()), device));
        };
        let mut all = Vec::with_capacity(N);
        for on_gpu in batches.iter().map(of) {
            let on_gpu = on_gpu?;
            if !Arc::ptr_eq(on_gpu.buffer.gpu(), gpu) {
                return Err(elsewhere(what, on_gpu.batch.place(), device));
            }
            all.push(on_gpu);
        }
        match <[_; N]>::try_from(all) {
            Ok(all) => Ok(Self::Gpu(gpu, all)),
            Err(all) => Err(Error::Device(format!("{what}: {} of {N} batches lie on the GPU", all.len()))),
        }
    }
}

fn elsewhere(what: &str, place: &str, device: &Device) -> Error {
    Error::Device(format!("{what}: a batch that lies on {place} was given to {}", device.place()))
}

/// A batch of the host's.
#[derive(Clone, Copy)]
pub(crate) struct OnHost<'a> {
    batch: &'a Batch,
    data: &'a [f64],
}

impl<'a> OnHost<'a> {
    /// The elements of matrix `i`.
    pub fn values(self, i: usize) -> &'a [f64] {
        &self.data[self.batch.offsets[i]..][..self.batch.shapes[i].len()]
    }

    /// Matrix `i`.
    pub fn matrix(self, i: usize) -> faer::MatRef<'a, f64> {
        let Shape { rows, cols } = self.batch.shapes[i];
        faer::MatRef::from_row_major_slice(self.values(i), rows, cols)
    }
}

/// A batch of a GPU's.
#[derive(Clone, Copy)]
pub(crate) struct OnGpu<'a> {
    batch: &'a Batch,
    pub buffer: &'a Arc<Pooled>,
}

impl<'a> OnGpu<'a> {
    /// The whole arena.
    pub fn binding(self) -> wgpu::BufferBinding<'a> {
        whole(self.buffer)
    }

    /// The first element of matrix `i`, which the arena's size keeps below 2³².
    pub fn offset(self, i: usize) -> u32 {
        self.batch.offsets[i] as u32
    }

    /// The shapes, in order.
    pub fn shapes(self) -> &'a [Shape] {
        &self.batch.shapes
    }

    /// What the elements are.
    pub fn element(self) -> Element {
        self.batch.element()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver gives its memory at any address.
    #[test]
    fn elements_at_any_address_come_back() {
        let values = [1.0, -0.1, 1e30, 1e-20 / 3.0, f64::INFINITY, 0.0];
        for (element, bound) in
            [(Element::F32, 2f64.powi(-24)), (Element::DoubleSingle, 2f64.powi(-48)), (Element::F64, 0.0)]
        {
            for start in 0..8 {
                let mut bytes = vec![0; start + values.len() * element.bytes() as usize];
                Batch::encode(element, &values, &mut bytes[start..]);
                let back = Batch::decode(element, &bytes[start..]);
                assert_eq!(back.len(), values.len());
                for (got, want) in back.into_iter().zip(values) {
                    assert!(
                        got == want || (got - want).abs() <= bound * want.abs(),
                        "{element:?}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn matrices_of_a_batch_lie_apart() {
        let shapes = [Shape::new(1, 1), Shape::new(0, 4), Shape::new(3, 5), Shape::new(2, 2)];
        let of = |i: usize| Matrix::from_fn(shapes[i].rows, shapes[i].cols, |_, _| i as f64 + 1.0);
        let batch = Batch::made_on_host(&shapes, |i, matrix| matrix.fill(i as f64 + 1.0)).unwrap();
        let all = |batch: &Batch| batch.download(&Device::cpu()).unwrap();
        assert_eq!(all(&batch), [of(0), of(1), of(2), of(3)]);
        assert_eq!(all(&batch.select(&[2, 1, 0])), [of(2), of(1), of(0)]);
        let again = Batch::upload(&Device::cpu(), Element::Host, &[of(3), of(2)]).unwrap();
        assert_eq!(all(&again), [of(3), of(2)]);
    }
}
