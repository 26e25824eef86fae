// Images of 8 × 8 values in −1..1, side by side with a pixel between them: a workgroup draws one, as many in a row as
// the grid is wide.
@group(0) @binding(0) var<storage, read> images: array<f32>;
@group(0) @binding(1) var canvas: texture_storage_2d<rgba8unorm, write>;

@compute @workgroup_size(8, 8)
fn main(
    @builtin(workgroup_id) cell: vec3<u32>,
    @builtin(num_workgroups) cells: vec3<u32>,
    @builtin(local_invocation_id) pixel: vec3<u32>,
) {
    let image = cell.y * cells.x + cell.x;
    let value = clamp(images[image * 64u + pixel.y * 8u + pixel.x] * 0.5 + 0.5, 0.0, 1.0);
    textureStore(canvas, cell.xy * 9u + pixel.xy, vec4(value, value, value, 1.0));
}
