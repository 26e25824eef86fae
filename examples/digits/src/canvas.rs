//! The window's picture of the samples, and the window without a display.

use anyhow::{Context, Result};
use eframe::wgpu;
use egui::TextureId;

use crate::data::SIDE;
use crate::shared::{Shared, View};

/// A texture with the samples side by side.
pub struct Canvas {
    cells: [u32; 2],
    view: wgpu::TextureView,
    pipeline: wgpu::ComputePipeline,
}

impl Canvas {
    /// So many columns and rows.
    pub fn new(device: &wgpu::Device, cells: [usize; 2]) -> Self {
        let [columns, rows] = cells.map(|count| count as u32);
        let cell = SIDE as u32 + 1;
        let texture = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("samples"),
            size: extent(columns * cell, rows * cell),
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: wgpu::TextureFormat::Rgba8Unorm,
            usage: wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::TEXTURE_BINDING,
            view_formats: &[],
        });
        let module = device.create_shader_module(wgpu::include_wgsl!("canvas.wgsl"));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("samples"),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        Self { cells: [columns, rows], view: texture.create_view(&Default::default()), pipeline }
    }

    /// Makes it known to egui.
    pub fn register(&self, renderer: &mut egui_wgpu::Renderer, device: &wgpu::Device) -> TextureId {
        renderer.register_native_texture(device, &self.view, wgpu::FilterMode::Nearest)
    }

    /// Draws images, from the buffer that they are in.
    pub fn draw(&self, shared: &Shared, images: &View) {
        let (device, queue) = shared.wgpu();
        let slice = images.slice();
        let binding = wgpu::BufferBinding {
            buffer: slice.buffer(),
            offset: slice.offset(),
            size: std::num::NonZeroU64::new(slice.size()),
        };
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.pipeline.get_bind_group_layout(0),
            entries: &[
                wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(binding) },
                wgpu::BindGroupEntry { binding: 1, resource: wgpu::BindingResource::TextureView(&self.view) },
            ],
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(self.cells[0], self.cells[1], 1);
        drop(pass);
        queue.submit([encoder.finish()]);
    }
}

fn extent(width: u32, height: u32) -> wgpu::Extent3d {
    wgpu::Extent3d { width, height, depth_or_array_layers: 1 }
}

/// Paints a frame and reads it back.
pub fn paint(
    shared: &Shared,
    renderer: &mut egui_wgpu::Renderer,
    triangles: &[egui::ClippedPrimitive],
    size: [u32; 2],
) -> Result<Vec<u8>> {
    let (device, queue) = shared.wgpu();
    let [width, height] = size;
    let screen = egui_wgpu::ScreenDescriptor { size_in_pixels: size, pixels_per_point: 1.0 };
    let texture = device.create_texture(&wgpu::TextureDescriptor {
        label: Some("frame"),
        size: extent(width, height),
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba8Unorm,
        usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
        view_formats: &[],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    let before = renderer.update_buffers(device, queue, &mut encoder, triangles, &screen);
    let target = texture.create_view(&Default::default());
    let pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
        label: Some("frame"),
        color_attachments: &[Some(wgpu::RenderPassColorAttachment {
            view: &target,
            depth_slice: None,
            resolve_target: None,
            ops: wgpu::Operations {
                load: wgpu::LoadOp::Clear(wgpu::Color::BLACK),
                store: wgpu::StoreOp::Store,
            },
        })],
        ..Default::default()
    });
    renderer.render(&mut pass.forget_lifetime(), triangles, &screen);
    let row = (width * 4).next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
    let staging = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("frame"),
        size: u64::from(row * height),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    encoder.copy_texture_to_buffer(
        texture.as_image_copy(),
        wgpu::TexelCopyBufferInfo {
            buffer: &staging,
            layout: wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(row), rows_per_image: None },
        },
        extent(width, height),
    );
    queue.submit(before.into_iter().chain([encoder.finish()]));
    staging.map_async(wgpu::MapMode::Read, .., |_| ());
    shared.loraweld.wait()?;
    let bytes = staging.get_mapped_range(..).context("the frame cannot be read")?;
    Ok(bytes.chunks_exact(row as usize).flat_map(|line| line[..width as usize * 4].to_vec()).collect())
}
