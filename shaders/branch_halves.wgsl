// What matrix units multiply in selection: Z or B_cat as halves, cut by mask into high and low parts of 11 bits; row by
// row, each branch's columns padded with zeros to a multiple of 16. High parts of all rows, then low ones.
//
//   Z: tokens × rank, f32                 B_catᵀ: rank × width (padded), f32, its largest value in [1, 2)
//   halves: z_rows × columns of Z, or whole tiles of 64 channels × columns of B_cat, f16
//   scales: what undoes the powers of two, for rows of Z: branches × z_rows, or z_rows
//
// STEP_B: B_cat times 2^12, out of f16's subnormal numbers, of 32 channels a workgroup.
// STEP_Z: each branch's part of a row of Z brought into f16's range.
// STEP_WEIGHTED: the whole row, each branch times its factor and its weight on the token; where the weight is zero
// it becomes zero, also where the branch overflowed.
// Grid: (32 channels, 8 quads of columns), (8 tokens, branch) or (8 tokens, 1).
// Bindings: 3 Z or B_catᵀ, 4 halves, and for Z 5 scales, weighted 6 weights, 7 controls. The permutation sets STEP.

#import branch
#import exponents

@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;
@group(0) @binding(6) var<storage, read> weights: array<f32>;
@group(0) @binding(7) var<storage, read> controls: Controls;

const STEP_B: u32 = 0u;
const STEP_Z: u32 = 1u;
const STEP_WEIGHTED: u32 = 2u;
const TILE: u32 = 64u;
const B_SCALE: f32 = 4096.0;

var<workgroup> most: array<u32, 256>;

fn put(place: u32, low: u32, value: vec4<f32>) {
    // f32(f16(v)) would be folded away.
    let upper = bitcast<vec4<f32>>(bitcast<vec4<u32>>(value) & vec4<u32>(0xffffe000u));
    halves[place] = vec4<f16>(upper);
    halves[low + place] = vec4<f16>(value - upper);
}

fn branch_of(column: u32) -> u32 {
    var branch = 0u;
    while (column >= jobs[0].column_starts[branch + 1u]) {
        branch++;
    }
    return branch;
}

// Four neighbouring columns of a row, `step` elements apart, from element `first` of the branch's first column on.
fn quad(first: u32, step: u32, k: u32, rank: u32) -> vec4<f32> {
    var value = vec4<f32>(0.0);
    if (k < rank) { value.x = values[first + k * step]; }
    if (k + 1u < rank) { value.y = values[first + (k + 1u) * step]; }
    if (k + 2u < rank) { value.z = values[first + (k + 2u) * step]; }
    if (k + 3u < rank) { value.w = values[first + (k + 3u) * step]; }
    return value;
}

fn split_b(job: Job, channel: u32, column: u32) {
    let rows = (job.width + TILE - 1u) / TILE * TILE;
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
    put((channel * job.columns + column) / 4u, rows * job.columns / 4u, value);
}

// The most of 32 threads.
fn row_most(values: vec4<u32>, row: u32, lane: u32) -> u32 {
    most[row * 32u + lane] = max(max(values.x, values.y), max(values.z, values.w));
    workgroupBarrier();
    var all = 0u;
    for (var i = 0u; i < 32u; i++) {
        all = max(all, most[row * 32u + i]);
    }
    return all;
}

fn split_z(job: Job, row: u32, token: u32, which: u32, lane: u32) {
    // A quad of columns each, of which there are 32 at most.
    let weighted = STEP == STEP_WEIGHTED;
    var column = lane * 4u;
    var end = job.columns;
    if (!weighted) {
        column += jobs[0].column_starts[which];
        end = jobs[0].column_starts[which + 1u];
    }
    let inside = column < end;
    var value = vec4<f32>(0.0);
    if (inside && token < job.tokens) {
        let branch = branch_of(column);
        let rank = jobs[0].starts[branch + 1u] - jobs[0].starts[branch];
        value = quad(token * job.rank + jobs[0].starts[branch], 1u, column - jobs[0].column_starts[branch], rank);
        if (weighted) {
            let weight = weights[token * job.branches + branch];
            let factor = jobs[0].factors[branch] * controls.strengths[jobs[0].adapters[branch]];
            value = select(value * (weight * factor), vec4<f32>(0.0), weight == 0.0);
        }
    }
    let scale = scale_of(row_most(exponents(bitcast<vec4<u32>>(value)), row, lane));
    if (lane == 0u) {
        // 1 / s of a power of two, exactly.
        let inverse = bitcast<f32>((254u << 23u) - bitcast<u32>(scale));
        scales[select(which, 0u, weighted) * job.z_rows + token] = inverse / B_SCALE;
    }
    if (inside) {
        put((token * job.columns + column) / 4u, job.z_rows * job.columns / 4u, value * scale);
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = t / 32u;
    let lane = t % 32u;
    if (STEP == STEP_B) {
        split_b(jobs[0], work.x * 32u + lane, (work.y * 8u + row) * 4u);
    } else {
        split_z(jobs[0], row, work.x * 8u + row, work.y, lane);
    }
}
