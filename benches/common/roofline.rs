//! What a device can do at most, measured by kernels that do nothing else, through the same wgpu.

use loraweld::Device;
use serde::Serialize;
use wgpu::BufferUsages as Usage;

/// The measured limits of a GPU, in bytes and operations a second; a fused multiply-add counts two.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Roofline {
    /// Copies of a size that a layer's features have, and of one much larger than any cache.
    pub copies: [Copies; 2],
    /// Bytes from the device to memory of the host.
    pub link: f64,
    pub f32: f64,
    pub f64: Option<f64>,
    /// Matrix units, products of f16 that are summed in f32.
    pub matrix: Option<f64>,
}

/// Bytes read and written by copies of one size.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Copies {
    pub bytes: u64,
    /// By a kernel.
    pub kernel: f64,
    /// By `copy_buffer_to_buffer`, which drivers may do with other engines.
    pub command: f64,
}

impl Roofline {
    /// Bytes that pass to and from memory in a second, by the better of two ways to copy.
    pub fn memory(&self) -> f64 {
        let [_, large] = self.copies;
        large.kernel.max(large.command)
    }

    /// `None` on the CPU. Each number is the best of several runs, the work of each in one submission.
    pub fn measure(device: &Device, fast: bool) -> Option<Self> {
        let caps = device.capabilities()?;
        let bytes = if fast { caps.max_binding.min(512 << 20) & !0xffff } else { 1 << 22 };
        let [steps, groups] = if fast { [512, 8192] } else { [16, 8] };
        let m = Meter { device, sample: if fast { 0.03 } else { 0.0 } };
        let [from, to] =
            [(); 2].map(|()| m.buffer(bytes, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST));
        let host = m.buffer(bytes, Usage::MAP_READ | Usage::COPY_DST);
        let command = |to: &wgpu::Buffer, bytes: u64| {
            bytes as f64 / m.best(|encoder| encoder.copy_buffer_to_buffer(&from, 0, to, 0, bytes))
        };
        let copies = |bytes: u64| {
            let source = include_str!("shaders/copy.wgsl");
            let seconds = m.kernel(source, &from, &to, (bytes / (16 * 1024)) as u32);
            let kernel = 2.0 * bytes as f64 / seconds.expect("a kernel that copies");
            Copies { bytes, kernel, command: 2.0 * command(&to, bytes) }
        };
        let fma = |scalar: &str, steps: u32| {
            let source = include_str!("shaders/fma.wgsl").replace("SCALAR", scalar);
            let seconds = m.kernel(&source.replace("STEPS", &steps.to_string()), &from, &to, groups)?;
            Some(f64::from(groups) * 256.0 * f64::from(steps) * 4.0 * 8.0 * 4.0 * 2.0 / seconds)
        };
        let matrix = || {
            let source = include_str!("shaders/matrix.wgsl").replace("STEPS", &steps.to_string());
            let seconds = m.kernel(&source, &from, &to, groups)?;
            Some(f64::from(groups) * 8.0 * f64::from(steps) * 8.0 * 16f64.powi(3) * 2.0 / seconds)
        };
        let seed: &[u8] = &[0.5f32.to_le_bytes(), 0.25f32.to_le_bytes()].concat();
        let seed64: &[u8] = &[0.5f64.to_le_bytes(), 0.25f64.to_le_bytes()].concat();
        let write = |bytes| device.wgpu().expect("a GPU").1.write_buffer(&from, 0, bytes);
        write(seed);
        let f32 = fma("f32", steps);
        let matrix = caps.matrix_units().then(matrix).flatten();
        write(seed64);
        Some(Self {
            copies: [copies(bytes / 16), copies(bytes)],
            link: command(&host, bytes),
            f32: f32.expect("a kernel of multiply-adds"),
            f64: caps.f64.then(|| fma("f64", steps / 4)).flatten(),
            matrix,
        })
    }
}

struct Meter<'a> {
    device: &'a Device,
    /// Seconds that a submission should take.
    sample: f64,
}

impl Meter<'_> {
    fn buffer(&self, size: u64, usage: Usage) -> wgpu::Buffer {
        let (gpu, _) = self.device.wgpu().expect("a GPU");
        gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    }

    /// Seconds of one dispatch of a kernel with two bindings; `None` if the driver does not take it.
    fn kernel(&self, source: &str, from: &wgpu::Buffer, to: &wgpu::Buffer, groups: u32) -> Option<f64> {
        let (gpu, _) = self.device.wgpu().expect("a GPU");
        let scope = gpu.push_error_scope(wgpu::ErrorFilter::Validation);
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: None, source };
        // SAFETY: the three kernels' loops count to constants and their indices stay within the buffers: four
        // vectors for each invocation of a copy, the first elements otherwise. The crate's own kernels run so too.
        let module =
            unsafe { gpu.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            eprintln!("roofline: a kernel was refused: {error}");
            return None;
        }
        let layout = pipeline.get_bind_group_layout(0);
        let entries = [(0, from), (1, to)]
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        let group = gpu.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &layout,
            entries: &entries,
        });
        Some(self.best(|encoder| {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(groups, 1, 1);
        }))
    }

    /// Seconds of one repetition: the best of several submissions, after a warm-up that brings clocks up.
    fn best(&self, encode: impl Fn(&mut wgpu::CommandEncoder)) -> f64 {
        let submit = |repeats: u32| {
            let all = |encoder: &mut _| (0..repeats).for_each(|_| encode(encoder));
            super::submitted(self.device, 1, all).as_secs_f64() / f64::from(repeats)
        };
        // So many that submitting them costs nothing, and no watchdog wakes up.
        submit(1);
        let repeats = ((self.sample / submit(1)).ceil() as u32).clamp(1, 100);
        (0..10).map(|_| submit(repeats)).fold(f64::INFINITY, f64::min)
    }
}
