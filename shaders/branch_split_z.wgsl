// Each branch's part of Z as halves for matrix units; see branch_split.wgsl.
//
//   Z: tokens × rank, f32      halves: z_rows × columns, f16      scales: branches × z_rows
//
// Grid: (8 tokens, branch). Bindings: 3 Z, 4 halves, 5 scales.

#import branch
#import exponents

@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;

#import branch_split
#import branch_split_row

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let token = work.x * 8u + t / 32u;
    let column = jobs[0].column_starts[work.y] + t % 32u * 4u;
    let inside = column < jobs[0].column_starts[work.y + 1u];
    var value = vec4<f32>(0.0);
    if (inside && token < job.tokens) {
        value = z_quad(job, token, column);
    }
    put_row(job, t, token, column, inside, value, work.y * job.z_rows + token);
}
