// B_cat as halves for matrix units, times B_SCALE; see branch/shared/split.wgsl. Once for a layer.
//
//   B_catᵀ: rank × width (padded), f32      halves: whole tiles of 64 channels × columns, f16
//
// They are laid out in fragments of 16 channels × 16 columns, those of 16 channels one after the other: a unit reads 512
// bytes in a row. High parts of all channels, then with HAS_LOW low ones.
//
// Grid: (CHANNELS channels, QUADS quads of columns). Bindings: 3 B_catᵀ, 4 halves.

enable f16;

#import branch/shared/job
#import shared/halves

@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<f16>>;

#import branch/shared/split

const TILE: u32 = 64u;
const CHANNELS: u32 = 32u;
const QUADS: u32 = 8u;

@compute @workgroup_size(CHANNELS * QUADS)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let rows = (job.width + TILE - 1u) / TILE * TILE;
    let channel = work.x * CHANNELS + t % CHANNELS;
    let column = (work.y * QUADS + t / CHANNELS) * 4u;
    if (channel >= rows || column >= job.columns) {
        return;
    }
    var value = vec4<f32>(0.0);
    if (channel < job.width) {
        let branch = branch_of(column);
        let rank = jobs[0].starts[branch + 1u] - jobs[0].starts[branch];
        let stride = job.stride * 4u;
        let first = job.b * 4u + jobs[0].starts[branch] * stride + channel;
        value = quad(first, stride, column - jobs[0].column_starts[branch], rank) * B_SCALE;
    }
    let fragment = channel / 16u * (job.columns / 16u) + column / 16u;
    let place = fragment * 64u + channel % 16u * 4u + column % 16u / 4u;
    let parts = split(value);
    halves[place] = parts.high;
    if ((job.flags & HAS_LOW) != 0u) {
        halves[rows * job.columns / 4u + place] = parts.low;
    }
}
