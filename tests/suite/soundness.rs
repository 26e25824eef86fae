//! What a caller gets wrong is an error that says so, on every device: never a panic, an access outside a buffer, or
//! numbers that mean nothing.

use crate::common::{Random, devices, gpus, product, relative};
use loraweld::compute::ops::{
    Activations, EntryMember, EntryMerger, EntryRule, Window, accumulate, cholesky, gram, inner, matmul,
    project, rank_update,
};
use loraweld::compute::{Batch, DeviceOptions, Element, Select, Shape};
use loraweld::fusion::{
    Encoder, Objective, Refiner, RefinerOptions, Scope, Selection, Selector, SelectorOptions, Values,
    ValuesMut, guide,
};
use loraweld::{Adapter, Device, Dtype, Error, Format, Layer, Matrix, RawMatrix, Result, wgpu};

const LAYER: &str = "transformer.blocks.0.to_q";

/// A device that no other test has.
fn another() -> Device {
    Device::open(&DeviceOptions { select: Select::Gpu, ..Default::default() }).unwrap()
}

/// The error's text, which must have all of these parts.
fn refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let error = result.expect_err("this should be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

fn buffer(device: &Device, size: u64, content: &[u8]) -> wgpu::Buffer {
    let (gpu, queue) = device.wgpu().unwrap();
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let descriptor =
        wgpu::BufferDescriptor { label: Some("the host's"), size, usage, mapped_at_creation: false };
    let buffer = gpu.create_buffer(&descriptor);
    queue.write_buffer(&buffer, 0, content);
    buffer
}

fn read(device: &Device, buffer: &wgpu::Buffer, len: u64) -> Vec<u8> {
    let (gpu, queue) = device.wgpu().unwrap();
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: len, usage, mapped_at_creation: false };
    let staging = gpu.create_buffer(&descriptor);
    let mut encoder = gpu.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, len);
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| ());
    device.wait().unwrap();
    staging.get_mapped_range(..).unwrap().to_vec()
}

fn adapters(count: usize, input: usize, output: usize) -> Vec<Adapter> {
    let mut random = Random(5);
    let narrow = |m: Matrix| m.map(|v| v as f32);
    let adapter = |k: usize| {
        let (a, b) = (narrow(random.matrix(2, input, 1.0)), narrow(random.matrix(output, 2, 1.0)));
        Adapter::new(format!("adapter {k}"), Format::Peft, vec![Layer::new(LAYER, a, b).unwrap()]).unwrap()
    };
    (0..count).map(adapter).collect()
}

fn selector(device: &Device, adapters: &[Adapter], options: SelectorOptions) -> Result<Selector> {
    let weighted: Vec<_> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
    Selector::new(device, &weighted, options)
}

#[test]
fn sizes_that_no_memory_holds_are_refused() {
    for case in devices() {
        let device = &case.device;
        for shape in [
            Shape::new(1 << 40, 1 << 40),
            Shape::new(usize::MAX, 2),
            Shape::new(usize::MAX, 1),
            Shape::new((1 << 63) + 1, 2),
            Shape::new(1 << 33, 0),
        ] {
            for element in [device.factor(), Element::Host] {
                refused(Batch::zeros(device, element, &[shape]), &[]);
                refused(Batch::zeros(device, element, &[Shape::new(1, 1), shape]), &[]);
            }
        }
        let both = adapters(2, 8, 8);
        for options in [
            SelectorOptions { tokens: usize::MAX, records: 1, ..Default::default() },
            SelectorOptions { tokens: 1, records: usize::MAX, ..Default::default() },
            SelectorOptions { tokens: 1, records: (1 << 61) + 1, ..Default::default() },
        ] {
            if device.is_gpu() {
                refused(selector(device, &both, options), &[]);
            }
        }
        let objective = || Objective::new([[1.0f32, 2.0].as_slice()]).unwrap();
        for (samples, len) in [(usize::MAX, 2), (1 << 40, 1 << 40), ((1 << 62) + 1, 1)] {
            let refiner = Refiner::new(device, vec![objective()], samples, len, RefinerOptions::default());
            refused(refiner, &[]);
        }
    }
}

#[test]
fn activations_that_their_buffer_does_not_hold_are_refused() {
    for case in gpus() {
        let device = &case.device;
        let a = Batch::zeros(device, device.factor(), &[Shape::new(2, 8)]).unwrap();
        let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(2, 2)]).unwrap();
        let buffer = buffer(device, 256, &[0; 256]);
        for (offset, tokens) in [
            (0, 9),
            (0, 1 << 59),
            (0, (1 << 59) + 1),
            (0, usize::MAX),
            (4, 8),
            (2, 1),
            (u64::MAX - 3, 1),
            (u64::MAX - 31, 1),
        ] {
            let x = Activations::Buffer { buffer: &buffer, offset, dtype: Dtype::F32, tokens, width: 8 };
            refused(accumulate(device, &[(0, x)], &a, &mut sums), &["256"]);
        }
    }
}

#[test]
fn windows_and_ranks_fit_their_members() {
    let member =
        |a, b, rank| EntryMember { a, b, rank, scale: 1.0, threshold: 0.0, key: [0; 2], weight: 1.0 };
    for case in devices() {
        let device = &case.device;
        let ones = Matrix::from_fn(2, 2, |_, _| 1.0);
        let merger = |member: EntryMember, rules: usize| {
            let rule = EntryRule {
                members: vec![member],
                chance: u32::MAX,
                elect: true,
                zero_is_minus: false,
                scale: 1.0,
            };
            let upload = || Batch::upload(device, device.factor(), std::slice::from_ref(&ones)).unwrap();
            EntryMerger::new(upload(), upload(), vec![rule; rules])
        };
        for (a, b, rank) in [(1, 0, 2), (0, 1, 2), (3, 0, 0), (0, 0, usize::MAX), (usize::MAX, 0, 2)] {
            refused(merger(member(a, b, rank), 1), &["ranks"]);
        }
        refused(merger(member(0, 0, 2), 2), &["rules"]);
        let merger = merger(member(0, 0, 2), 1).unwrap();
        let find = |windows: &[Vec<Option<Window>>]| merger.magnitudes(device, windows, &|| Ok(()));
        find(&[vec![Some(Window::ALL)]]).unwrap();
        refused(find(&[]), &["window"]);
        refused(find(&[vec![None; 2]]), &["window"]);
        let wide = Batch::zeros(device, device.factor(), &[Shape::new(2, 3)]).unwrap();
        refused(merger.applied(device, &wide, &|| Ok(())), &["entries", "2 x 3"]);
        refused(merger.squared(device, &wide, &|| Ok(())), &["entries", "2 x 3"]);
    }
}

#[test]
fn batches_of_another_side_or_device_are_refused() {
    let cpu = Device::cpu();
    let ones = [Matrix::from_fn(4, 4, |_, _| 1.0)];
    let values = [1.0f32; 16];
    let x = RawMatrix::from_f32(4, 4, &values).unwrap();
    for case in gpus() {
        let other = another();
        let (device, name) = (&case.device, case.device.describe());
        let name = name.split(',').next().unwrap();
        let upload = |device: &Device| Batch::upload(device, device.factor(), &ones).unwrap();
        let (here, there, host) = (upload(device), upload(&other), upload(&cpu));
        for strange in [&there, &host] {
            let place = if strange.element() == Element::Host { "the CPU" } else { name };
            refused(matmul(device, &here, strange), &["matmul", place, name]);
            refused(inner(device, strange, &here), &["inner", place, name]);
            refused(rank_update(device, Some(strange), &here, &here), &["rank_update", place, name]);
        }
        refused(project(device, &[x], &there), &["project", name]);
        refused(there.download(device), &[name]);
        refused(there.duplicate(device), &[name]);
        refused(project(&cpu, &[x], &here), &["project", name, "the CPU"]);
        refused(matmul(&cpu, &here, &here), &["matmul", name, "the CPU"]);
        // Sums of one side, products of the other.
        let inputs = [(0, Activations::Host(x))];
        let (mut sums, mut on_cpu) = (upload_sums(device, &ones), upload_sums(&cpu, &ones));
        if device.sum() != Element::Host {
            refused(accumulate(&cpu, &inputs, &host, &mut sums), &[name, "the CPU"]);
            refused(gram(&cpu, &host, &mut sums), &[name, "the CPU"]);
            refused(cholesky(&cpu, &mut sums), &[name, "the CPU"]);
            let mut foreign = upload_sums(&other, &ones);
            refused(accumulate(device, &inputs, &here, &mut foreign), &[name]);
        }
        refused(accumulate(&cpu, &inputs, &here, &mut on_cpu), &[name, "the CPU"]);
        // A host's buffer of another device, which only wgpu can tell.
        let beside = device.wgpu_adapter().unwrap().request_device(&wgpu::DeviceDescriptor::default());
        let (beside, _queue) = pollster::block_on(beside).unwrap();
        let usage = wgpu::BufferUsages::STORAGE;
        let label = Some("the host's");
        let foreign = beside.create_buffer(&wgpu::BufferDescriptor {
            label,
            size: 64,
            usage,
            mapped_at_creation: false,
        });
        let x = Activations::Buffer { buffer: &foreign, offset: 0, dtype: Dtype::F32, tokens: 4, width: 4 };
        refused(accumulate(device, &[(0, x)], &here, &mut sums), &["the host's"]);
        let own = buffer(device, 64, bytemuck::cast_slice(&values));
        let y = Activations::Buffer { buffer: &own, offset: 0, dtype: Dtype::F32, tokens: 4, width: 4 };
        let mut encoder = device.wgpu().unwrap().0.create_command_encoder(&Default::default());
        refused(guide(device, &mut encoder, y, x, 1.0), &["the host's"]);
        // The encoder is as good as before.
        device.wgpu().unwrap().1.submit([encoder.finish()]);
        device.wait().unwrap();
    }
}

fn upload_sums(device: &Device, matrices: &[Matrix]) -> Batch {
    Batch::upload(device, device.sum(), matrices).unwrap()
}

#[test]
fn batches_of_another_element_type_are_refused() {
    let ones = [Matrix::from_fn(4, 4, |_, _| 1.0)];
    for case in gpus() {
        let device = &case.device;
        let of = |element| Batch::upload(device, element, &ones).unwrap();
        let (narrow, wide) = (of(Element::F32), of(Element::F64));
        refused(matmul(device, &wide, &narrow), &["F64", "F32"]);
        refused(inner(device, &narrow, &wide), &["F64", "F32"]);
        refused(rank_update(device, None, &narrow, &wide), &["F64", "F32"]);
        refused(cholesky(device, &mut of(Element::F32)), &["F32", "F64"]);
        refused(gram(device, &wide, &mut of(Element::DoubleSingle)), &["F64", "DoubleSingle"]);
        refused(gram(device, &narrow, &mut of(Element::F32)), &["F32", "F64"]);
    }
}

/// Kernels read whole words, but bind no more than what a buffer has.
#[test]
fn halves_may_end_within_a_word_of_buffers_of_any_size() {
    for case in gpus() {
        let device = &case.device;
        let a = Matrix::from_fn(1, 3, |_, j| (j + 1) as f64);
        let factor = Batch::upload(device, device.factor(), std::slice::from_ref(&a)).unwrap();
        let x = [1.0, -2.0, 4.0].map(half::f16::from_f32);
        let content: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).chain([0x7e; 2]).collect();
        for size in [8, 10, 12, 14] {
            let buffer = buffer(device, size, &content);
            let x =
                Activations::Buffer { buffer: &buffer, offset: 0, dtype: Dtype::F16, tokens: 1, width: 3 };
            let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(1, 1)]).unwrap();
            accumulate(device, &[(0, x)], &factor, &mut sums).unwrap();
            assert_eq!(sums.download(device).unwrap()[0].data(), [81.0], "{}: {size} bytes", case.name);

            let other = self::buffer(device, size, &[0; 8]);
            let u = Activations::Buffer { buffer: &other, offset: 0, dtype: Dtype::F16, tokens: 1, width: 3 };
            let mut encoder = device.wgpu().unwrap().0.create_command_encoder(&Default::default());
            guide(device, &mut encoder, x, u, 1.0).unwrap();
            device.wgpu().unwrap().1.submit([encoder.finish()]);
            let doubled: Vec<u8> =
                [2.0, -4.0, 8.0].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            let changed = read(device, &buffer, 8);
            assert_eq!(
                (&changed[..6], &changed[6..]),
                (&doubled[..], &[0x7e; 2][..]),
                "{}: {size} bytes",
                case.name
            );
        }
        // A word that the buffer does not end can neither be bound nor copied.
        let short = buffer(device, 6, &content[..4]);
        let x = |tokens, width| Activations::Buffer {
            buffer: &short,
            offset: 0,
            dtype: Dtype::F16,
            tokens,
            width,
        };
        let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(1, 1)]).unwrap();
        refused(accumulate(device, &[(0, x(1, 3))], &factor, &mut sums), &["6 bytes", "multiple of 4"]);
        let two = Batch::upload(device, device.factor(), &[Matrix::from_fn(1, 2, |_, _| 1.0)]).unwrap();
        accumulate(device, &[(0, x(1, 2))], &two, &mut sums).unwrap();
        assert_eq!(sums.download(device).unwrap()[0].data(), [1.0], "{}", case.name);
    }
}

/// More groups of tokens than a row of a grid has workgroups.
#[test]
fn every_token_may_be_a_group() {
    let (tokens, input, output) = (70_000, 4, 6);
    let both = adapters(2, input, output);
    let mut random = Random(6);
    let x: Vec<f32> = random.matrix(tokens, input, 1.0).data().iter().map(|v| *v as f32).collect();
    let f0: Vec<f32> = random.matrix(tokens, output, 1.0).data().iter().map(|v| *v as f32).collect();
    let device = &gpus().remove(2).device;
    let mut selector =
        selector(device, &both, SelectorOptions { tokens, records: 2, ..Default::default() }).unwrap();
    let mut run = |scope| {
        let mut f = f0.clone();
        let how = Selection { scope, ..Default::default() };
        selector.run(LAYER, RawMatrix::from_f32(tokens, input, &x).unwrap(), &mut f, &how).unwrap();
        f
    };
    let want = run(Scope::Token);
    assert_ne!(want, f0);
    assert!(run(Scope::Group(1)) == want);
}

/// Takes the latents themselves for features, on the device.
struct Identity(Device);

impl Identity {
    fn copy(&self, from: Values<'_>, to: ValuesMut<'_>) {
        let (Values::Buffer(from), ValuesMut::Buffer(to)) = (from, to) else { panic!("not on the device") };
        let (gpu, queue) = self.0.wgpu().unwrap();
        let mut encoder = gpu.create_command_encoder(&Default::default());
        let bytes = to.size();
        encoder.copy_buffer_to_buffer(from.buffer(), from.offset(), to.buffer(), to.offset(), bytes);
        queue.submit([encoder.finish()]);
    }
}

impl Encoder for Identity {
    fn forward(&mut self, _: usize, latents: Values<'_>, features: ValuesMut<'_>) -> Result<()> {
        self.copy(latents, features);
        Ok(())
    }

    fn backward(&mut self, _: usize, gradient: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
        self.copy(gradient, latents);
        Ok(())
    }
}

/// More samples than a row of a grid has workgroups.
#[test]
fn many_samples_are_refined_as_few() {
    let device = &gpus().remove(2).device;
    let latents = |samples: usize| -> Vec<f32> { (0..2 * samples).map(|i| (i % 14) as f32 - 5.0).collect() };
    let refine = |samples: usize| {
        let objective = Objective::new([[1.0f32, 1.0].as_slice()]).unwrap();
        let mut refiner =
            Refiner::new(device, vec![objective], samples, 2, RefinerOptions::default()).unwrap();
        let x = buffer(device, 8 * samples as u64, bytemuck::cast_slice(&latents(samples)));
        refiner.step(&mut Identity(device.clone()), ValuesMut::Buffer(x.slice(..)), 0.0).unwrap();
        let moved: Vec<f32> = bytemuck::pod_collect_to_vec(&read(device, &x, x.size()));
        (moved, refiner.outcome().unwrap())
    };
    let (few, outcome) = refine(7);
    assert_ne!(few, latents(7));
    let (many, outcomes) = refine(70_000);
    assert!(many.chunks(14).all(|samples| samples == few));
    assert!(outcomes.gradients.chunks(7).all(|norms| norms == outcome.gradients));
    assert!(outcomes.losses[0].chunks(7).all(|losses| losses == outcome.losses[0]));
}

/// Measures the first two latents, and takes one pattern for the gradient of all of them.
struct Pattern(Device);

impl Pattern {
    fn gradient(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i % 14) as f32 - 5.0).collect()
    }
}

impl Encoder for Pattern {
    fn forward(&mut self, objective: usize, latents: Values<'_>, features: ValuesMut<'_>) -> Result<()> {
        Identity(self.0.clone()).forward(objective, latents, features)
    }

    fn backward(&mut self, _: usize, _: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
        let ValuesMut::Buffer(to) = latents else { panic!("not on the device") };
        let (_, queue) = self.0.wgpu().unwrap();
        let gradient = Self::gradient(to.size() as usize / 4);
        queue.write_buffer(to.buffer(), to.offset(), bytemuck::cast_slice(&gradient));
        Ok(())
    }
}

/// Latents of one sample so long are refined as short ones are.
fn refines_as_few(len: usize) {
    let device = &gpus().remove(2).device;
    let refine = |len: usize| {
        let objective = Objective::new([[1.0f32, 1.0].as_slice()]).unwrap();
        let mut refiner = Refiner::new(device, vec![objective], 1, len, RefinerOptions::default()).unwrap();
        let x = buffer(device, 4 * len as u64, bytemuck::cast_slice(&vec![1.0f32; len]));
        refiner.step(&mut Pattern(device.clone()), ValuesMut::Buffer(x.slice(..)), 0.0).unwrap();
        let moved: Vec<f32> = bytemuck::pod_collect_to_vec(&read(device, &x, x.size()));
        (moved, refiner.outcome().unwrap().gradients[0])
    };
    let (few, norm) = refine(14);
    assert!(few.iter().all(|x| (x - 1.0).abs() <= 0.25) && few[0] > 1.0 && few[13] < 1.0, "{few:?}");
    let (many, long_norm) = refine(len);
    assert!((norm - long_norm).abs() <= 1e-4 * norm, "{norm} and {long_norm}");
    for (i, (got, want)) in many.iter().zip(few.iter().cycle()).enumerate() {
        assert!((got - want).abs() <= 1e-5, "element {i}: {got}, not {want}");
    }
}

/// More than the parts of a norm hold at their least.
#[test]
fn long_latents_are_refined_as_short_ones() {
    refines_as_few(14 * 40_000);
}

/// More elements than a row of a grid has workgroups for: 65,535 of 1,024 each.
#[test]
#[ignore = "it takes a GPU with bindings of 280 MB, and about 2 GB of its memory"]
fn latents_beyond_a_row_of_a_grid_are_refined_as_short_ones() {
    refines_as_few(14 * 5_000_000);
}

#[test]
fn a_device_that_is_gone_gives_errors_not_zeros() {
    if !gpus().is_empty() {
        let device = &another();
        let ones = [Matrix::from_fn(4, 4, |_, _| 1.0)];
        let a = Batch::upload(device, device.factor(), &ones).unwrap();
        let values = [1.0f32; 16];
        let x = [RawMatrix::from_f32(4, 4, &values).unwrap()];
        let want = product(&ones[0], &ones[0]);
        let z = project(device, &x, &a).unwrap().download(device).unwrap();
        assert!(relative(&z[0], &want) < 1e-6);
        device.wgpu().unwrap().0.destroy();
        for _ in 0..2 {
            let z = matmul(device, &a, &a).and_then(|z| z.download(device));
            assert!(matches!(z, Err(Error::Device(_))), "{z:?}");
        }
    }
}
